"""The engine: Ray actors around runners and specialists, and a driver that keeps them busy.

The driver hands out shards with `ray.wait` and sees only small reports; pixels and labels travel between runner and
specialists through the object store. It keeps no state: what is finished is what has a receipt.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fourmill.config import Config
from fourmill.errors import ConfigError, FourmillError, first_line
from fourmill.flows.committing import JobReport
from fourmill.flows.driver import Driver
from fourmill.flows.interrupts import drainable
from fourmill.flows.plan import Job, Plan
from fourmill.flows.pool import Pool, device_of
from fourmill.flows.resolve import Resolved

RAY_STARTS = 3  # before a machine that is too busy is given up

#: called with (rows done, rows in all)
OnProgress = Callable[[int, int], None]


@dataclass
class EngineReport:
    """What became of the jobs. ``parked``: (column, shard) -> why. ``seconds``: phase, or "phase modality"."""

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

    def park(self, job: Job, why: str) -> None:
        """Every column of the job."""
        for column in dict.fromkeys([*job.labels, *job.tokens]) or {"samples": None}:
            self.parked[column, job.shard] = why


def run_jobs(resolved: Resolved, plan: Plan, on_progress: OnProgress) -> EngineReport:
    """Run the plan's jobs; returns what was committed and what was given up. Stops cleanly on SIGTERM and Ctrl-C."""
    report = EngineReport()
    if not plan.jobs:
        return report
    total = sum(plan.shards[job.shard] for job in plan.jobs)
    with drainable() as drain, ray_session(resolved.config):
        pool = Pool(resolved, len(plan.jobs), plan.listing)
        try:
            driver = Driver(pool, resolved.config.engine, plan.jobs, report, drain)
            while driver.step():
                on_progress(min(total, driver.rows_done()), total)
            on_progress(total, total)
        finally:
            pool.close()
    return report


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
        except Exception as error:  # bare ones, where a busy machine needs more than 30 s for Ray's processes
            ray.shutdown()
            if attempt == RAY_STARTS:
                raise FourmillError(
                    f"Ray did not start in {RAY_STARTS} attempts: {first_line(error)}; try again when this machine "
                    "is less busy, or give the address of a running cluster as engine.address"
                ) from error


__all__ = ["EngineReport", "OnProgress", "device_of", "ray_session", "run_jobs"]
