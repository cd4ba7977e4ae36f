"""Ray actors by node: runners, and the specialists that they send micro-batches to.

A cell is what one node hosts: every group of modalities in as many replicas as the node has room for, and two runners, so
that one reads while the other commits. Pixels stay on their node. Cells know nothing of each other: when a node is lost,
its cell is, and a node that joins gets one.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourmill.config import Config
from fourmill.errors import ConfigError, FourmillError
from fourmill.flows import journal
from fourmill.flows.cell import REVIVAL_POLL_S, REVIVAL_S, Cell
from fourmill.flows.committing import JobReport
from fourmill.flows.isolate import Died
from fourmill.flows.journal import Journal
from fourmill.flows.micro_batch import MicroBatch, MicroResult
from fourmill.flows.plan import Job
from fourmill.flows.progress import say
from fourmill.flows.ray_errors import lost_errors
from fourmill.flows.resolve import Resolved, Wanted
from fourmill.flows.runner import Call, Runner
from fourmill.flows.specialist import Specialist

CALL_ATTEMPTS = 6  # of one micro-batch, when the actors that it is queued at die
POLL_S = 5.0  # how often a waiting runner looks whether its specialist hangs
RUNNERS = 2  # per cell
WAITING_S = 60.0  # before a person is told that a run waits for its share of a cluster


def device_of(config: Config) -> str:
    if config.engine.device != "auto":
        return config.engine.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class RunnerActor:
    """A Runner inside a Ray actor; its calls go to the specialists of its cell, least busy first."""

    def __init__(
        self,
        config: Config,
        wanted: dict[str, Wanted],
        groups: list[list[str]],
        listing: tuple[str, int],
        folder: str,
        name: str,
    ) -> None:
        import ray

        # by name: a constructor that holds handles could not be run again after a restart
        self.groups = [[Host(actor, ray.get_actor(actor)) for actor in group] for group in groups]
        self.folder, self._name = Path(folder), name
        self.deadline_s, self.straggler_s = config.engine.batch_deadline_s, config.engine.straggler_s
        self.beats = 0
        environment = wait_until_up(self.groups[0][0].actor.ready)
        self._runner = Runner(config, wanted, self._submit, environment, listing, Journal(self.folder, name))

    def run(self, job: Job) -> JobReport:
        return self._runner.run(job)

    def progress(self) -> tuple[int, int]:
        """Rows that were decoded of the job under way, and a number that changes as long as anything goes on."""
        return self._runner.rows_done, self.beats + self._runner.rows_done

    def died_decoding(self, shard: int) -> list[int]:
        """The micro-batches of the shard (by their first row) in whose decoding a runner of this name died."""
        return [int(entry.step) for entry in journal.deaths(self.folder, self._name, f"shard {shard}")]

    def clear_notes(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _submit(
        self, group: int, batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str], alone: bool = False
    ) -> Call:
        import ray

        return Call(_Sent(self, self.groups[group], batch.name, ray.put(batch), labels, tokens, alone).result)


@dataclass
class Host:
    """A specialist's actor as one runner sees it."""

    name: str
    actor: Any
    busy: int = 0  # micro-batches of this runner that it has not answered


class _Sent:
    """A micro-batch at a specialist; sent again when that one dies before its turn."""

    def __init__(
        self,
        runner: RunnerActor,
        hosts: Sequence[Host],
        name: str,
        reference: Any,
        labels: Sequence[str],
        tokens: Sequence[str],
        alone: bool,
    ) -> None:
        # two runners may have the same rows: each sending is known by its own name
        self._runner, self._hosts, self._task = runner, hosts, f"{name} {secrets.token_hex(4)}"
        self._arguments = (reference, list(labels), list(tokens), self._task, alone)
        self._send()

    def _send(self) -> None:
        self._host = min(self._hosts, key=self._load)
        self._host.busy += 1
        self._future = self._host.actor.process.remote(*self._arguments)

    def _load(self, host: Host) -> tuple[bool, int, float]:
        """Whether it is held up by something slow, how much it has to do for this runner, how long it has been at it."""
        doing = journal.under_way(self._runner.folder, host.name)
        seconds = 0.0 if doing is None else time.time() - doing.since
        return seconds > self._runner.straggler_s, host.busy, seconds

    def result(self) -> MicroResult:
        """Raises `Died` where this micro-batch ended the process that ran it, RayActorError where no actor is left."""
        for attempt in range(1, CALL_ATTEMPTS + 1):
            try:
                return self._wait()
            except lost_errors():
                if attempt == CALL_ATTEMPTS:
                    raise
            finally:
                self._host.busy -= 1
                self._runner.beats += 1
            wait_until_up(self._host.actor.ready)
            for death in journal.deaths(self._runner.folder, self._host.name, self._task):
                raise Died(death.step, "hung" if death.hung else "killed its process")
            self._send()
        raise AssertionError("unreachable")

    def _wait(self) -> MicroResult:
        """Whatever holds the specialist up for longer than the deadline, this micro-batch or one before it, is ended."""
        import ray

        while True:
            try:
                result: MicroResult = ray.get(self._future, timeout=POLL_S)
                return result
            except ray.exceptions.GetTimeoutError:
                doing = journal.under_way(self._runner.folder, self._host.name)
                if doing is not None and time.time() - doing.since > self._runner.deadline_s:
                    journal.note_hanging(self._runner.folder, self._host.name, doing)
                    ray.kill(self._host.actor, no_restart=False)


def wait_until_up(method: Any) -> Any:
    """Call an actor's method until it answers. RayActorError where it is dead for good, or not back in time."""
    import ray

    end = time.monotonic() + REVIVAL_S
    while True:
        try:
            return ray.get(method.remote())
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(REVIVAL_POLL_S)


class Pool:
    """The cells for one configuration, inside a Ray session."""

    def __init__(self, resolved: Resolved, jobs: int, listing: tuple[str, int]) -> None:
        """Starts the cells and waits for the first one. ``jobs``: no more runners than this are of use."""
        self._resolved, self._listing = resolved, listing
        self._device = device_of(resolved.config)
        self._runners = min(RUNNERS, jobs)
        self._token = secrets.token_hex(8)
        self._folder = str(Path(tempfile.gettempdir()) / f"fourmill-{self._token}")
        self._cells: dict[str, Cell] = {}
        self._left_out: set[str] = set()  # nodes whose specialists could not load their networks
        self.grow()
        if not self._cells:
            raise ConfigError(self._no_room())
        self._wait_for_first()

    # -- nodes ----------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Start a cell on every node that has room for one and has none yet; forget those of nodes that are gone."""
        alive = {node["NodeID"]: node["Resources"] for node in _nodes()}
        for node in set(self._cells) - set(alive):
            del self._cells[node]
        for node, resources in alive.items():
            replicas = self._replicas(resources)
            if node not in self._cells and node not in self._left_out and replicas:
                self._cells[node] = self._start_cell(node, resources, replicas)

    def arrivals(self) -> list[Any]:
        """Runners of cells whose specialists have loaded since the last call."""
        new: list[Any] = []
        for node, cell in list(self._cells.items()):
            if not cell.runners:
                try:
                    if cell.is_loaded(0):
                        new += self._start_runners(cell)
                except FourmillError as error:  # the others go on without this node
                    say(f"node {node[:8]} is left out: {error}")
                    self._kill(self._cells.pop(node))
                    self._left_out.add(node)
        return new

    def node_is_alive(self, runner: Any) -> bool:
        self.grow()
        return any(runner in cell.runners for cell in self._cells.values())

    def has_hope(self) -> bool:
        """Whether any cell is there, or on its way."""
        return bool(self._cells)

    def close(self) -> None:
        import ray

        runners = [runner for cell in self._cells.values() for runner in cell.runners]
        if runners:
            ray.wait([runner.clear_notes.remote() for runner in runners], num_returns=len(runners), timeout=1)
        for cell in self._cells.values():
            self._kill(cell)
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _kill(cell: Cell) -> None:
        import ray

        for actor in [*cell.runners, *cell.specialists]:
            ray.kill(actor)

    # -- actors ---------------------------------------------------------------------------------------

    def _replicas(self, resources: dict[str, float]) -> int:
        """How many specialists per group the node has room for; 0: none."""
        engine, groups = self._resolved.config.engine, len(self._resolved.groups())
        if self._device == "cuda" and engine.gpus_per_actor > 0:
            room = int(resources.get("GPU", 0) / engine.gpus_per_actor + 1e-6) // groups
            return min(room, engine.replicas or room)
        cpus = resources.get("CPU", 0)
        return (engine.replicas or max(1, int(cpus) // groups)) if cpus else 0

    def _no_room(self) -> str:
        engine, groups = self._resolved.config.engine, len(self._resolved.groups())
        if self._device == "cuda":
            return (
                f"no node has the {groups * engine.gpus_per_actor:g} GPUs that {groups} groups of "
                f"engine.gpus_per_actor: {engine.gpus_per_actor:g} take; lower it, or make fewer engine.groups"
            )
        return "no node of the Ray cluster has a CPU to offer"

    def _start_cell(self, node: str, resources: dict[str, float], replicas: int) -> Cell:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        config, groups = self._resolved.config, self._resolved.groups()
        calls = config.engine.calls_per_actor
        options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0, "max_concurrency": calls}
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        if self._device == "cuda":
            options |= {"num_cpus": 0, "num_gpus": config.engine.gpus_per_actor}
        else:
            share = min(1.0, int(1000 * resources["CPU"] / (replicas * len(groups))) / 1000)
            options |= {"num_cpus": share, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        names = [
            [f"fourmill-{self._token}-{node[:8]}-{g}-{i}" for i in range(replicas)]
            for g in range(len(groups))
        ]
        specialist = ray.remote(Specialist)
        specialists = [
            specialist.options(name=name, **options).remote(
                config.dataset,
                [self._resolved.wanted[n] for n in self._resolved.closure(group)],
                config.image_size,
                self._device,
                (self._folder, name),
                calls,
            )
            for group, row in zip(groups, names, strict=True)
            for name in row
        ]
        return Cell(node, specialists, names, {actor.ready.remote(): actor for actor in specialists})

    def _start_runners(self, cell: Cell) -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": 2,
        }
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(cell.node, soft=False)
        runner = ray.remote(RunnerActor).options(**options)
        config, wanted = self._resolved.config, dict(self._resolved.wanted)
        cell.runners = [
            runner.remote(
                config, wanted, cell.names, self._listing, self._folder, f"runner-{cell.node[:8]}-{i}"
            )
            for i in range(self._runners)
        ]
        return cell.runners

    def _wait_for_first(self) -> None:
        """Until one cell's networks are loaded. What goes wrong here goes wrong everywhere: it is raised."""
        said = time.monotonic()
        while not any(cell.is_loaded(0.5) for cell in self._cells.values()):
            if time.monotonic() - said > WAITING_S:
                say(f"waiting for room on the Ray cluster: {self._needs()}")
                said = time.monotonic()

    def _needs(self) -> str:
        kind = "GPU" if self._device == "cuda" else "CPU"
        return f"{len(self._resolved.groups())} actors on one node, and {kind}s may be taken by others"


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
