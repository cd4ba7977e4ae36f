"""The engine: Ray actors around runners and specialists, and a driver that keeps them busy.

The driver hands out shards with `ray.wait` and sees only small reports; pixels and labels travel
between runner and specialists through the object store. It keeps no state: what is finished is what has a receipt.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fourmill.config import Config
from fourmill.errors import ConfigError, FourmillError, WorkMissing
from fourmill.flows.plan import Job, Plan
from fourmill.flows.resolve import Resolved, Wanted
from fourmill.flows.runner import Call, JobReport, Runner
from fourmill.flows.specialist import MicroBatch, MicroResult, Specialist

CALL_ATTEMPTS = 4  # of one micro-batch, when the actors that try it die
RUNNER_DEATHS = 4  # of runners that hold one shard, before it is parked
RAY_STARTS = 3  # before a machine that is too busy is given up
REVIVAL_POLL_S = 0.2
REVIVAL_S = 120.0  # an actor that died is back by then, or will not be

#: called with (rows done, rows in all)
OnProgress = Callable[[int, int], None]


@dataclass
class EngineReport:
    """What became of the jobs. ``parked``: (column, shard) -> why."""

    rows: int = 0
    committed: int = 0
    parked: dict[tuple[str, int], str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, report: JobReport) -> None:
        self.rows += report.rows
        self.committed += len(report.committed)
        for column, why in report.parked.items():
            self.parked[column, report.shard] = why
        for phase, seconds in report.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class _RunnerActor:
    """A Runner inside a Ray actor; its calls go to the specialists' actors, least busy first."""

    def __init__(
        self,
        config: Config,
        wanted: dict[str, Wanted],
        groups: list[list[str]],
        environment: dict[str, Any],
        listing: tuple[str, int],
    ) -> None:
        import ray

        # by name: a constructor that holds handles could not be run again after a restart
        self._groups = [[ray.get_actor(name) for name in group] for group in groups]
        self._busy: dict[Any, int] = {}
        self._runner = Runner(config, wanted, self._submit, environment)
        self._runner.set_listing(*listing)

    def run(self, job: Job) -> JobReport:
        self._runner.rows_done = 0
        return self._runner.run(job)

    def progress(self) -> int:
        return self._runner.rows_done

    def _submit(self, group: int, batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str]) -> Call:
        import ray

        reference = ray.put(batch)
        actor, future = self._send(group, reference, labels, tokens)

        def result() -> MicroResult:
            nonlocal actor, future
            for attempt in range(1, CALL_ATTEMPTS + 1):
                try:
                    return ray.get(future)
                except (
                    ray.exceptions.RayActorError
                ):  # it died or is restarting: another one takes the micro-batch
                    if attempt == CALL_ATTEMPTS:
                        raise
                finally:
                    self._busy[actor] -= 1
                actor, future = self._send(group, reference, labels, tokens, wait=True)
            raise AssertionError("unreachable")

        return Call(result)

    def _send(
        self, group: int, reference: Any, labels: Sequence[str], tokens: Sequence[str], wait: bool = False
    ) -> tuple[Any, Any]:
        """To the least busy specialist of the group; ``wait`` until it is up, where one has just died."""
        actor = min(self._groups[group], key=lambda a: self._busy.get(a, 0))
        if wait:
            wait_until_up(actor.ready)
        self._busy[actor] = self._busy.get(actor, 0) + 1
        return actor, actor.process.remote(reference, labels, tokens)


def wait_until_up(method: Any) -> None:
    """Call an actor's method until it answers. RayActorError where it is dead for good, or not back in time."""
    import ray

    end = time.monotonic() + REVIVAL_S
    while True:
        try:
            ray.get(method.remote())
            return
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(REVIVAL_POLL_S)


def device_of(config: Config) -> str:
    if config.engine.device != "auto":
        return config.engine.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Ray for this run: the configured cluster, or a local one that ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    address = config.engine.address or "local"
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    if address == "local":
        options["object_store_memory"] = 512 * 2**20
    options |= {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    _start_ray(address, options)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(address: str, options: dict[str, Any]) -> None:
    import ray

    for attempt in range(1, RAY_STARTS + 1):
        try:
            ray.init(address=address, **options)
            return
        except (ConnectionError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"engine.address: cannot reach Ray at {address!r}: {why}") from error
        except (
            Exception
        ) as error:  # a bare one, where a busy machine needs more than 30 s for Ray's processes
            ray.shutdown()
            if attempt == RAY_STARTS:
                raise FourmillError(
                    f"Ray did not start in {RAY_STARTS} attempts: {_first_line(error)}; try again when this machine "
                    "is less busy, or give the address of a running cluster as engine.address"
                ) from error


class Pool:
    """Runners and specialists for one configuration, inside a Ray session."""

    def __init__(self, resolved: Resolved, runners: int, listing: tuple[str, int]) -> None:
        import ray

        config = resolved.config
        self._wanted = dict(resolved.wanted)
        self._device = device_of(config)
        groups = resolved.groups()
        replicas = config.engine.replicas or self._default_replicas(config, len(groups))
        gpus = config.engine.gpus_per_actor if self._device == "cuda" else 0
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 0}
        if self._device == "cpu":
            options |= {"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        specialist = ray.remote(Specialist)
        hosted = [[resolved.wanted[name] for name in resolved.closure(group)] for group in groups]
        prefix = f"fourmill-{secrets.token_hex(4)}"
        names = [[f"{prefix}-{g}-{i}" for i in range(replicas)] for g in range(len(groups))]
        self.specialists = [
            [
                specialist.options(name=name, **options).remote(
                    config.dataset, group, config.image_size, self._device
                )
                for name in row
            ]
            for row, group in zip(names, hosted, strict=True)
        ]
        environments = unwrapped(
            lambda: ray.get([a.ready.remote() for group in self.specialists for a in group])
        )
        runner = ray.remote(_RunnerActor).options(
            num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=2
        )
        self.runners = [
            runner.remote(config, self._wanted, names, environments[0], listing) for _ in range(runners)
        ]

    def _default_replicas(self, config: Config, groups: int) -> int:
        import ray

        resources = ray.cluster_resources()
        if self._device == "cuda":
            per_actor = max(config.engine.gpus_per_actor, 1e-3)
            return max(1, int(resources.get("GPU", 1) / per_actor) // groups)
        return max(1, int(resources.get("CPU", 1)) // groups)

    def close(self) -> None:
        import ray

        for actor in [*self.runners, *(a for group in self.specialists for a in group)]:
            ray.kill(actor)


def run_jobs(resolved: Resolved, plan: Plan, on_progress: OnProgress) -> EngineReport:
    """Run the plan's jobs; returns what was committed and what was given up. Stops cleanly on SIGTERM and Ctrl-C."""
    report = EngineReport()
    if not plan.jobs:
        return report
    with ray_session(resolved.config):
        pool = Pool(resolved, min(2, len(plan.jobs)), plan.listing)
        try:
            driver = _Driver(pool, resolved.config.engine.max_attempts, plan.jobs, report)
            total = sum(plan.shards[job.shard] for job in plan.jobs)
            while driver.step():
                on_progress(report.rows + _underway(driver.running), total)
            on_progress(report.rows, total)
        finally:
            pool.close()
    return report


class _Driver:
    """Hands shards to runners, one each, and takes back reports. What fails is tried again, then parked."""

    def __init__(self, pool: Pool, max_attempts: int, jobs: Sequence[Job], report: EngineReport) -> None:
        self._max_attempts, self._report = max_attempts, report
        self._queue = list(reversed(jobs))
        self._idle: list[Any] = list(pool.runners)
        self.running: dict[Any, tuple[Any, Job]] = {}  # what it will report -> (runner, job)
        self._reviving: dict[Any, Any] = {}  # the answer it will give once it is there again -> runner
        self._attempts: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()

    def step(self) -> bool:
        """Hand out what can be, wait a moment for what comes back; False once nothing is left."""
        import ray

        while self._queue and self._idle:
            job, runner = self._queue.pop(), self._idle.pop()
            self.running[runner.run.remote(job)] = (runner, job)
        waiting = [*self.running, *self._reviving]
        done, _ = ray.wait(waiting, timeout=0.5) if waiting else ([], [])
        for future in done:
            if future in self._reviving:
                self._revived(future, self._reviving.pop(future))
            else:
                self._finished(future, *self.running.pop(future))
        return bool(self._queue or self.running)

    def _finished(self, future: Any, runner: Any, job: Job) -> None:
        import ray

        try:
            self._report.add(ray.get(future))
            self._idle.append(runner)
        except ray.exceptions.RayActorError as error:
            self._deaths[job.shard] += 1
            count = self._deaths[job.shard]
            self._again(job, count >= RUNNER_DEATHS, f"its runner died {count} times: {_first_line(error)}")
            self._reviving[runner.progress.remote()] = runner
        except ray.exceptions.RayTaskError as error:
            cause = root_cause(error)
            self._attempts[job.shard] += 1
            final = self._attempts[job.shard] >= self._max_attempts or _is_final(cause)
            self._again(job, final, f"{type(cause).__name__}: {_first_line(cause)}")
            self._idle.append(runner)

    def _revived(self, future: Any, runner: Any) -> None:
        """A runner that died gets work again when it answers, not while Ray is still starting it."""
        import ray

        try:
            ray.get(future)
            self._idle.append(runner)
        except ray.exceptions.ActorUnavailableError:
            time.sleep(REVIVAL_POLL_S)
            self._reviving[runner.progress.remote()] = runner
        except ray.exceptions.RayActorError as error:  # for good
            if not (self._idle or self.running or self._reviving):
                while self._queue:
                    _park(self._report, self._queue.pop(), f"no runner is left: {_first_line(error)}")

    def _again(self, job: Job, final: bool, why: str) -> None:
        if final:
            _park(self._report, job, why)
        else:
            self._queue.append(job)


def _underway(running: dict[Any, tuple[Any, Job]]) -> int:
    """Rows that running jobs have decoded; 0 for a runner that does not answer at once."""
    import ray

    asked = [runner.progress.remote() for runner, _ in running.values()]
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=0.2) if asked else ([], [])
    rows = 0
    for future in done:
        try:
            rows += ray.get(future)
        except ray.exceptions.RayActorError:
            continue  # it died: its shard is handed out again by the driver's loop
    return rows


def _park(report: EngineReport, job: Job, why: str) -> None:
    for column in {*job.labels, *job.tokens} or {"samples"}:
        report.parked[column, job.shard] = why


def _is_final(cause: BaseException) -> bool:
    """Trying again cannot help: a broken contract or a damaged file."""
    return isinstance(cause, FourmillError) and not isinstance(cause, WorkMissing)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else "".join(traceback.format_exception_only(error)).strip()


def root_cause(error: BaseException) -> BaseException:
    """The exception that was raised first, however many actors passed it on."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


def unwrapped(call: Callable[[], Any]) -> Any:
    """Run ``call``; an error of ours that was raised in an actor comes out as itself."""
    import ray

    try:
        return call()
    except ray.exceptions.RayTaskError as error:
        cause = root_cause(error)
        if isinstance(cause, FourmillError):
            raise cause from None
        raise
