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
                time.sleep(0.5 * attempt)
                actor, future = self._send(group, reference, labels, tokens)
            raise AssertionError("unreachable")

        return Call(result)

    def _send(
        self, group: int, reference: Any, labels: Sequence[str], tokens: Sequence[str]
    ) -> tuple[Any, Any]:
        """To the least busy specialist of the group."""
        actor = min(self._groups[group], key=lambda a: self._busy.get(a, 0))
        self._busy[actor] = self._busy.get(actor, 0) + 1
        return actor, actor.process.remote(reference, labels, tokens)


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
    try:
        ray.init(
            address=address, logging_level="ERROR", log_to_driver=False, configure_logging=False, **options
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"engine.address: cannot reach Ray at {address!r}: {' '.join(str(error).split())}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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
            _drive(pool, resolved.config, plan.jobs, plan.shards, report, on_progress)
        finally:
            pool.close()
    return report


def _drive(
    pool: Pool,
    config: Config,
    jobs: list[Job],
    rows_of: dict[int, int],
    report: EngineReport,
    on_progress: OnProgress,
) -> None:
    import ray

    total = sum(rows_of[job.shard] for job in jobs)
    queue = list(reversed(jobs))
    attempts: dict[int, int] = {}
    deaths: dict[int, int] = {}
    idle = list(pool.runners)
    running: dict[Any, tuple[Any, Job]] = {}
    while queue or running:
        while queue and idle:
            job, runner = queue.pop(), idle.pop()
            running[runner.run.remote(job)] = (runner, job)
        done, _ = ray.wait(list(running), timeout=0.5)
        for future in done:
            runner, job = running.pop(future)
            idle.append(runner)
            try:
                report.add(ray.get(future))
            except ray.exceptions.RayActorError as error:
                deaths[job.shard] = deaths.get(job.shard, 0) + 1
                if deaths[job.shard] >= RUNNER_DEATHS:
                    _park(report, job, f"its runner died {RUNNER_DEATHS} times: {_first_line(error)}")
                else:
                    queue.append(job)
            except ray.exceptions.RayTaskError as error:
                cause = root_cause(error)
                attempts[job.shard] = attempts.get(job.shard, 0) + 1
                if attempts[job.shard] >= config.engine.max_attempts or _is_final(cause):
                    _park(report, job, f"{type(cause).__name__}: {_first_line(cause)}")
                else:
                    queue.append(job)
        on_progress(report.rows + _underway(running), total)


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
