"""The runner: takes a shard, decodes each image once, has it labelled and tokenized, and commits.

It is a plain object that is given a function to reach specialists; `fourmill.flows.pool` puts it into a Ray actor, tests
use it in a loop. While specialists work on one micro-batch, the next ones are read and decoded; how far ahead is bounded by
bytes, so a slow network slows reading down, and nothing piles up.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from fourmill.config import Config
from fourmill.errors import DatasetError
from fourmill.flows.committing import Committer, JobReport, too_many_absent
from fourmill.flows.isolate import settle
from fourmill.flows.journal import Journal
from fourmill.flows.micro_batch import MicroBatch, MicroResult
from fourmill.flows.plan import Job
from fourmill.flows.reading import Decoded, Reader, positions_of
from fourmill.flows.resolve import Resolved, Wanted
from fourmill.flows.shard_content import Again, ShardContent, check_unchanged, warm_up
from fourmill.labels import DUPLICATE, Absent, Label
from fourmill.seeds import keys_digest
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.samples import OK
from fourmill.shards.sources.base import Row, make_source
from fourmill.shards.tar import read_labels

#: why a readable row is not decoded in this job
NOT_ASKED = "not asked for"


@dataclass(frozen=True, slots=True)
class Call:
    """A micro-batch under way at a specialist: ``result()`` waits for it. May raise `fourmill.flows.isolate.Died`."""

    result: Callable[[], MicroResult]


class Submit(Protocol):
    """Sends a micro-batch to a specialist of a group. ``alone``: it is to have that specialist for itself."""

    def __call__(
        self, group: int, batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str], alone: bool = False
    ) -> Call: ...


@dataclass(frozen=True, slots=True)
class _Pending:
    start: int
    group: int
    batch: MicroBatch
    labels: list[str]
    tokens: list[str]
    call: Call


@dataclass
class _Work:
    """A job under way."""

    job: Job
    rows: list[Row]
    frozen: pa.Table | None
    content: ShardContent
    report: JobReport
    batch_size: int
    limit: int
    redo: np.ndarray | None  # bool (rows,): the only rows that are made again; None: all
    seen: int = 0  # rows decoded so far, and
    no_image: Counter[str] = field(default_factory=Counter)  # rows by reason


class Runner:
    """Runs jobs one at a time."""

    def __init__(
        self,
        config: Config,
        wanted: Mapping[str, Wanted],
        submit: Submit,
        environment: dict[str, Any],
        listing: tuple[str, int],
        journal: Journal | None = None,
    ) -> None:
        source = make_source(config.source.kind, **config.source.options)
        self._resolved = Resolved(config, source, dict(wanted))
        self._dataset = Dataset(config.dataset)
        self._reader = Reader(self._resolved)
        self._committer = Committer(self._resolved, self._dataset, environment, listing)
        self._submit = submit
        self._groups = self._resolved.groups()
        self._journal = journal
        warm_up(config.n_crops)
        self.rows_done = 0  # read by the progress display while a job runs

    def run(self, job: Job) -> JobReport:
        """Make and commit the job's columns. Raises what failed the attempt; what is committed by then stays."""
        self.rows_done = 0
        report = JobReport(job.shard)
        work = self._begin(job, report)
        if work is None:
            return report
        given = self._kept_labels(work)
        window: deque[_Pending] = deque()
        under_way = 0
        bound = self._resolved.config.engine.inflight_mb * 2**20
        for start, batch in self._micro_batches(work, given):
            for group, names in enumerate(self._groups):
                labels, tokens = work.content.wanted(names)
                if (labels or tokens) and batch.present.any():
                    call = self._submit(group, batch, labels, tokens)
                    window.append(_Pending(start, group, batch, labels, tokens, call))
                    under_way += batch.nbytes
            while under_way > bound or len(window) > 3 * len(self._groups):
                under_way -= window[0].batch.nbytes
                self._take(work, window.popleft())
        while window:
            self._take(work, window.popleft())
        report.rows = len(work.rows)
        self._committer.commit(work.job, work.rows, work.frozen, work.content, work.batch_size, report)
        return report

    def _begin(self, job: Job, report: JobReport) -> _Work | None:
        """Look again what is missing: somebody else may have made it since. None where nothing is."""
        resolved, dataset = self._resolved, self._dataset
        tokens = {
            name: recipe.short for name, recipe in resolved.token_recipes().items() if name in job.tokens
        }
        missing = tuple(
            n for n in job.tokens if n in job.retry or not dataset.is_finished(n, tokens[n], job.shard)
        )
        labels = tuple(
            n for n in job.labels
            if not dataset.is_finished(n, resolved.wanted[n].label_recipe.short, job.shard)
        )  # fmt: skip
        fresh = job.rows is not None and not dataset.is_finished(
            SAMPLES, resolved.samples_recipe.short, job.shard
        )
        if not (missing or labels or fresh):
            report.lost_races += [*job.labels, *job.tokens]
            return None
        frozen = None if fresh else dataset.samples(job.shard)
        rows = list(job.rows or ()) if frozen is None else positions_of(frozen)
        job = replace(job, labels=labels, tokens=missing)
        content = ShardContent(len(rows), job)
        batch_size = max(1, resolved.config.engine.batch_size >> job.shrink)
        work = _Work(job, rows, frozen, content, report, batch_size, self._committer.limit(len(rows)), None)
        if job.retry:
            self._load_retried(work)
        return work

    # -- reading and decoding ------------------------------------------------------------------------

    def _micro_batches(
        self, work: _Work, given: Mapping[str, Mapping[int, Label]]
    ) -> Iterator[tuple[int, MicroBatch]]:
        """Read, decode, and fill up; the samples table is made on the way where the shard has none."""
        size, report, content = work.batch_size, work.report, work.content
        for start in range(0, len(work.rows), size):
            if work.frozen is not None and not content.absent:
                return  # every column was given up
            part = work.rows[start : start + size]
            skip = self._skipped(work, start, len(part))
            decoded = self._decoded(work, start, part, skip)
            if work.frozen is not None:
                check_unchanged(part, skip, decoded)
            else:
                content.add(decoded)
                if start + size >= len(work.rows):
                    content.make_samples(work.rows, self._resolved)
            work.seen += len(part)
            work.no_image.update(f for f, _ in decoded if isinstance(f, str) and f != NOT_ASKED)
            self._check_limit(work)
            began = time.perf_counter()
            kept = {
                name: [labels.get(start + i, Absent("blank")) for i in range(len(part))]
                for name, labels in given.items()
            }
            name = f"shard {work.job.shard} rows {start} to {start + len(part) - 1}"
            batch = self._reader.micro_batch(name, size, part, decoded, kept)
            report.spend("decode", time.perf_counter() - began)
            yield start, batch
            self.rows_done += len(part)

    def _skipped(self, work: _Work, start: int, count: int) -> list[str | None]:
        """Per row, why it is not read: set aside earlier, a second row with its key, or not to be made again."""
        if work.frozen is None:
            return [DUPLICATE if start + i in work.job.duplicates else None for i in range(count)]
        status = work.frozen.column("status").slice(start, count).to_pylist()
        redo = [True] * count if work.redo is None else work.redo[start : start + count]
        return [s if s != OK else None if again else NOT_ASKED for s, again in zip(status, redo, strict=True)]

    def _decoded(
        self, work: _Work, start: int, part: Sequence[Row], skip: Sequence[str | None]
    ) -> list[Decoded]:
        began = time.perf_counter()
        raw = self._reader.read([row for row, why in zip(part, skip, strict=True) if why is None])
        work.report.spend("read", time.perf_counter() - began)
        began = time.perf_counter()
        note = self._journal.entry(f"shard {work.job.shard}", str(start)) if self._journal else nullcontext()
        with note:
            decoded = self._reader.decode(raw, skip, apart=start in work.job.careful)
        work.report.spend("decode", time.perf_counter() - began)
        return decoded

    def _kept_labels(self, work: _Work) -> dict[str, dict[int, Label]]:
        """Labels of this shard that were kept earlier: no forward pass is spent on them again."""
        given: dict[str, dict[int, Label]] = {}
        for name in self._resolved.closure(list(work.content.values)):
            wanted = self._resolved.wanted[name]
            short = wanted.label_recipe.short
            if name not in work.job.retry and self._dataset.is_finished(name, short, work.job.shard):
                receipt = self._dataset.receipt(name, short, work.job.shard)
                if receipt.keys != keys_digest(row.key for row in work.rows):
                    raise DatasetError(
                        f"{receipt.file}: its keys are not those of the shard; remove its receipt"
                    )
                given[name] = read_labels(self._dataset.store.read(receipt.file), wanted.modality)
        return given

    def _load_retried(self, work: _Work) -> None:
        """Begin with the cells that are there; of these columns only null ones (of the asked reason) are made again.

        A kept label that is null is tried again with its tokens: they may be made from it another time.
        """
        content, shard = work.content, work.job.shard
        for name in work.job.retry:
            wanted = self._resolved.wanted[name]
            recipe = wanted.token_recipe()
            assert recipe is not None
            column = self._dataset.column(name, recipe.short, shard)
            reasons, crops = column.reasons.to_pylist(), range(column.n_crops)
            content.values[name] = [
                [column.cells(row, crop) for crop in crops] if reason is None else Absent(reason)
                for row, reason in enumerate(reasons)
            ]
            self._again(content.again, name, recipe.short, work, reasons)
            short = wanted.label_recipe.short
            if self._dataset.is_finished(name, short, shard):
                kept = read_labels(
                    self._dataset.store.read(self._dataset.receipt(name, short, shard).file), wanted.modality
                )
                labels = [kept[row] for row in range(len(work.rows))]
                absent = [label.reason if isinstance(label, Absent) else None for label in labels]
                if any(absent):
                    content.labels[name] = labels
                    self._again(content.labels_again, name, short, work, absent)
        if set(content.absent) == set(work.job.retry):
            work.redo = np.logical_or.reduce(
                [*content.again.redo.values(), *content.labels_again.redo.values()]
            )

    def _again(self, again: Again, name: str, short: str, work: _Work, reasons: Sequence[str | None]) -> None:
        again.epochs[name] = self._dataset.receipt(name, short, work.job.shard).epoch + 1
        again.redo[name] = np.array([r is not None and work.job.reason in (None, r) for r in reasons])

    # -- labelling -----------------------------------------------------------------------------------

    def _take(self, work: _Work, pending: _Pending) -> None:
        """Wait for a micro-batch, save what can be saved of it, and remember it."""
        labels, tokens = (
            [n for n in names if n in columns]
            for names, columns in (
                (pending.labels, work.content.labels),
                (pending.tokens, work.content.values),
            )
        )

        def again(batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str]) -> MicroResult:
            return self._submit(pending.group, batch, labels, tokens, alone=True).result()

        began = time.perf_counter()
        result, failed = settle(
            pending.call.result,
            pending.batch,
            labels,
            tokens,
            again=again,
            dependents=lambda step: [n for n in self._resolved.wanted if step in self._resolved.closure([n])],
            limit=work.limit,
        )
        work.report.spend("wait", time.perf_counter() - began)
        self._account(work.report, pending, result)
        count = min(len(work.rows) - pending.start, work.batch_size)
        rows = [i for i in range(count) if pending.batch.present[i]]
        work.content.fill(pending.start, result, rows)
        for error in failed:
            for name in error.names:
                self._give_up(work, name, str(error))
        self._check_limit(work)

    def _account(self, report: JobReport, pending: _Pending, result: MicroResult) -> None:
        """Forward and tokenize by modality; what a group's specialist worked and waited, by each modality of it."""
        busy = sum(s for phase, s in result.seconds.items() if phase != "starved")
        for phase, seconds in result.seconds.items():
            if phase != "starved":
                report.spend(phase, seconds)
        for name in dict.fromkeys([*pending.labels, *pending.tokens]):
            report.spend(f"busy {name}", busy)
            report.spend(f"starved {name}", result.seconds.get("starved", 0.0))

    def _check_limit(self, work: _Work) -> None:
        """Garbage is given up early, not after its last row."""
        for name, absent in list(work.content.absent.items()):
            why = too_many_absent(work.no_image + absent, len(work.rows), work.limit, work.seen)
            if why:
                self._give_up(work, name, why)

    def _give_up(self, work: _Work, name: str, why: str) -> None:
        work.report.parked[name] = why
        work.content.give_up(name)


__all__ = ["Call", "JobReport", "Runner", "Submit"]
