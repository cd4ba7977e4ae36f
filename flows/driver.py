"""The driver: hands shards to runners, one each, and takes back reports.

What fails is tried again, a little later each time, then parked. Near the end the slowest shards run twice, and the first
commit wins. After SIGTERM nothing new is begun, and what is under way has a while to finish.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fourmill.config import EngineConfig
from fourmill.errors import FourmillError, WorkMissing, first_line
from fourmill.flows.cell import REVIVAL_POLL_S
from fourmill.flows.committing import JobReport
from fourmill.flows.interrupts import Drain
from fourmill.flows.plan import Job
from fourmill.flows.pool import Pool
from fourmill.flows.ray_errors import lost_errors, root_cause

RUNNER_DEATHS = 4  # of runners that hold one shard, before it is parked
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0  # before a shard is tried again: doubled each time
GROW_EVERY_S = 10.0  # how often nodes that joined are looked for
STRAGGLER = 2.0  # times the usual duration, before a shard is given to a second runner too
WAIT_S = 0.5


class Tally(Protocol):
    """What the driver tells what became of jobs."""

    rows: int

    def add(self, report: JobReport) -> None: ...
    def park(self, job: Job, why: str) -> None: ...


@dataclass
class Run:
    """A job at a runner."""

    job: Job
    runner: Any
    started: float
    seen: tuple[int, int] = (-1, -1)  # the runner's last progress, and
    seen_at: float = 0.0  # when it was another


class Driver:
    def __init__(
        self, pool: Pool, engine: EngineConfig, jobs: Sequence[Job], report: Tally, drain: Drain
    ) -> None:
        self._pool, self._engine, self._report, self._drain = pool, engine, report, drain
        # two flows on one dataset begin with different shards, and hardly ever meet at one
        self._queue = random.SystemRandom().sample(list(jobs), len(jobs))
        self._later: list[tuple[float, Job]] = []  # (not before, job)
        self._left = {job.shard for job in jobs}
        self._idle: list[Any] = []
        self._running: dict[Any, Run] = {}  # what it will report -> run
        # what it will answer once it is back -> (runner, its job)
        self._reviving: dict[Any, tuple[Any, Job]] = {}
        self._attempts: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()
        self._durations: list[float] = []  # of finished shards, in s
        self._grown = time.monotonic()
        self._stall_s = 2 * engine.batch_deadline_s + 60

    def step(self) -> bool:
        """Hand out what can be, wait a moment for what comes back; False once nothing is left."""
        import ray

        if self._drain.asked is not None:
            self._drained(time.monotonic() - self._drain.asked)
        self._idle += self._pool.arrivals()
        self._hand_out()
        waiting = [*self._running, *self._reviving]
        done, _ = ray.wait(waiting, timeout=WAIT_S) if waiting else ([], [])
        for future in done:
            if future in self._reviving:
                self._revived(future, *self._reviving.pop(future))
            else:
                self._finished(future, self._running.pop(future))
        if not waiting and self._left:
            self._wait_for_runners()
        self._look_around()
        return bool(self._left)

    def rows_done(self) -> int:
        """Rows of finished jobs, and those that running ones have decoded."""
        rows = {run.job.shard: 0 for run in self._running.values()}
        for run in self._running.values():
            rows[run.job.shard] = max(rows[run.job.shard], run.seen[0])
        return self._report.rows + sum(max(0, count) for count in rows.values())

    # -- handing out ----------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        now = time.monotonic()
        self._queue += [job for when, job in self._later if when <= now]
        self._later = [(when, job) for when, job in self._later if when > now]
        if self._drain.asked is not None:
            return
        while self._idle and (job := self._next()) is not None:
            self._start(self._idle.pop(), job)

    def _start(self, runner: Any, job: Job) -> None:
        now = time.monotonic()
        self._running[runner.run.remote(job)] = Run(job, runner, now, seen_at=now)

    def _next(self) -> Job | None:
        while self._queue:
            job = self._queue.pop(0)
            if job.shard in self._left:
                return job
        return self._straggler() if not self._later else None

    def _straggler(self) -> Job | None:
        """The slowest shard that runs once and takes far longer than the others did."""
        if not self._durations:
            return None
        copies = Counter(run.job.shard for run in self._running.values())
        now, usual = time.monotonic(), statistics.median(self._durations)
        slow = [
            (now - run.started, run.job)
            for run in self._running.values()
            if copies[run.job.shard] == 1
            and now - run.started > max(STRAGGLER * usual, self._engine.straggler_s)
        ]
        return max(slow, key=lambda pair: pair[0])[1] if slow else None

    def _drained(self, seconds: float) -> None:
        if not self._running or seconds > self._engine.drain_s:
            raise KeyboardInterrupt

    # -- taking back ----------------------------------------------------------------------------------

    def _finished(self, future: Any, run: Run) -> None:
        import ray

        job = run.job
        try:
            report = ray.get(future)
        except lost_errors() as error:
            self._deaths[job.shard] += 1
            self._reviving[run.runner.died_decoding.remote(job.shard)] = (run.runner, job)
            if self._deaths[job.shard] >= RUNNER_DEATHS:
                self._park(job, f"its runner died {self._deaths[job.shard]} times: {first_line(error)}")
        except ray.exceptions.RayTaskError as error:
            self._idle.append(run.runner)
            self._failed(job, root_cause(error))
        else:
            self._idle.append(run.runner)
            if job.shard in self._left:  # else its other copy was first
                self._left.remove(job.shard)
                self._report.add(report)
                self._durations.append(time.monotonic() - run.started)

    def _failed(self, job: Job, cause: BaseException) -> None:
        import torch

        if isinstance(cause, torch.OutOfMemoryError) and self._engine.batch_size >> (job.shrink + 1):
            self._again(replace(job, shrink=job.shrink + 1), 0)
            return
        self._attempts[job.shard] += 1
        count = self._attempts[job.shard]
        if count >= self._engine.max_attempts or _is_final(cause):
            self._park(job, f"{type(cause).__name__}: {first_line(cause)}")
        else:
            self._again(job, min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (count - 1)))

    def _revived(self, future: Any, runner: Any, job: Job) -> None:
        """A runner that died gets work again when it answers, not while Ray is still starting it.

        Where it died while it decoded, that micro-batch is decoded with more care from then on.
        """
        import ray

        try:
            suspects = frozenset(ray.get(future))
            self._idle.append(runner)
            self._again(replace(job, careful=job.careful | suspects), 0)
        except lost_errors() as error:
            if isinstance(error, ray.exceptions.ActorUnavailableError) and self._pool.node_is_alive(runner):
                time.sleep(REVIVAL_POLL_S)
                self._reviving[runner.died_decoding.remote(job.shard)] = (runner, job)
            else:  # it is gone for good: another one takes the shard
                self._again(job, 0)

    def _again(self, job: Job, seconds: float) -> None:
        if job.shard in self._left and not any(r.job.shard == job.shard for r in self._running.values()):
            self._later.append((time.monotonic() + seconds, job))

    def _park(self, job: Job, why: str) -> None:
        if job.shard in self._left and not any(r.job.shard == job.shard for r in self._running.values()):
            self._left.remove(job.shard)
            self._report.park(job, why)

    # -- looking around -------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """Runners that stand still are ended, and nodes that joined get a cell."""
        import ray

        asked = {run.runner.progress.remote(): run for run in self._running.values()}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0.2) if asked else ([], [])
        now = time.monotonic()
        for future in done:
            try:
                progress = ray.get(future)
            except lost_errors():
                continue  # it died: that comes back as its job's failure
            if progress != asked[future].seen:
                asked[future].seen, asked[future].seen_at = progress, now
        for run in self._running.values():
            if now - run.seen_at > self._stall_s:
                run.seen_at = now
                ray.kill(run.runner, no_restart=False)
        if now - self._grown > GROW_EVERY_S:
            self._grown = now
            self._pool.grow()

    def _wait_for_runners(self) -> None:
        """Nothing runs: shards wait for their next attempt, for a node, or in vain."""
        time.sleep(WAIT_S)
        if self._later or self._idle or self._drain.asked is not None:
            return
        self._pool.grow()
        if not self._pool.has_hope():
            for job in [job for job in self._queue if job.shard in self._left]:
                self._park(job, "no node is left that has room for its networks")


def _is_final(cause: BaseException) -> bool:
    """Trying again cannot help: a broken contract or a damaged file."""
    return isinstance(cause, FourmillError) and not isinstance(cause, WorkMissing)
