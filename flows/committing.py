"""Committing a shard: samples first, then each column; data file, then receipt."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill import __version__
from fourmill.errors import WorkMissing
from fourmill.flows.plan import Job
from fourmill.flows.resolve import Resolved, Wanted
from fourmill.flows.shard_content import ShardContent
from fourmill.labelers.figures import Tally, judge
from fourmill.labels import Absent, is_fault
from fourmill.seeds import keys_digest
from fourmill.shards.arrow import column_table, write_table
from fourmill.shards.dataset import SAMPLES, Dataset, absent_counts
from fourmill.shards.receipts import Receipt, Recipe, pack_presence
from fourmill.shards.samples import OK
from fourmill.shards.sources.base import Row
from fourmill.shards.tar import write_labels


@dataclass
class JobReport:
    """What became of a job. ``parked``: column -> why it was not committed."""

    shard: int
    rows: int = 0
    committed: list[str] = field(default_factory=list)
    lost_races: list[str] = field(default_factory=list)
    parked: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # "phase", or "phase modality"

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class Committer:
    """Writes the columns of jobs into one dataset."""

    def __init__(
        self, resolved: Resolved, dataset: Dataset, environment: Mapping[str, Any], listing: tuple[str, int]
    ) -> None:
        """``listing``: the source as it was when the jobs were planned: its digest, and how many rows it listed."""
        self._resolved, self._dataset, self._listing = resolved, dataset, listing
        self._environment = {
            "fourmill": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            **environment,
        }

    def limit(self, rows: int) -> int:
        """How many rows of a shard may have no value for a reason that is a fault."""
        engine = self._resolved.config.engine
        return int(max(engine.max_absent_share * rows, engine.max_absent_rows))

    def commit(
        self, job: Job, rows: Sequence[Row], frozen: pa.Table | None, content: ShardContent, batch_size: int,
        report: JobReport,
    ) -> None:  # fmt: skip
        """Commit what ``content`` has. Raises OSError and DatasetError; what is committed by then stays."""
        shard = _Shard(job.shard, keys_digest(row.key for row in rows), batch_size)
        resolved = self._resolved
        if frozen is None:
            status = content.samples.column("status").to_pylist()
            reasons = [None if s == OK else s for s in status]
            data = write_table(content.samples)
            column = _Column(SAMPLES, resolved.samples_recipe, SAMPLES, "arrow", data, reasons)
            self._put(shard, column, report)
            committed = self._dataset.receipt(SAMPLES, resolved.samples_recipe.short, job.shard)
            if committed.keys != shard.keys:  # another flow listed the source at another time, and was first
                raise WorkMissing(
                    f"samples shard {job.shard} was committed with other rows by another run; run again"
                )
        else:
            status = frozen.column("status").to_pylist()
        for name, wanted in resolved.wanted.items():
            if name in content.labels:
                self._put_checked(shard, self._labels(wanted, rows, status, content), content, report)
        for name, wanted in resolved.wanted.items():
            if name in content.values:
                self._put_checked(shard, self._tokens(wanted, status, content), content, report)

    def _labels(
        self, wanted: Wanted, rows: Sequence[Row], status: Sequence[str], content: ShardContent
    ) -> _Column:
        name, recipe = wanted.name, wanted.label_recipe
        cells = _with_status(content.labels[name], status)
        data = write_labels([row.key for row in rows], cells, wanted.modality)
        epoch = content.labels_again.epochs.get(name, 0)
        return _Column(name, recipe, f"labels/{name}", "tar", data, _reasons(cells), wanted, epoch)

    def _tokens(self, wanted: Wanted, status: Sequence[str], content: ShardContent) -> _Column:
        name, recipe = wanted.name, wanted.token_recipe()
        assert recipe is not None
        cells = _with_status(content.values[name], status)
        meta = {"recipe": recipe.hash, "tokenizer": wanted.tokenizer or ""}
        data = write_table(column_table(wanted.modality, cells, self._resolved.config.n_crops, meta))
        epoch = content.again.epochs.get(name, 0)
        return _Column(name, recipe, f"tokens/{name}", "arrow", data, _reasons(cells), wanted, epoch)

    def _put_checked(self, shard: _Shard, column: _Column, content: ShardContent, report: JobReport) -> None:
        """Commit the column unless too many of its rows have no value, or its figures are beyond their limits."""
        wanted, rows = column.wanted, len(column.reasons)
        assert wanted is not None
        tally = content.tally(column.name)
        if column.epoch:  # what was measured of the rows that are not made again
            before = self._dataset.receipt(column.name, column.recipe.short, shard.number)
            tally.merge(Tally.from_text(before.figures))
        found = judge(wanted.modality, tally, wanted.limits)
        why = too_many_absent(absent_counts(column.reasons), rows, self.limit(rows)) or found.refusal
        if why:
            report.parked[column.name] = why
        else:
            self._put(shard, replace(column, figures=tally.to_text(), warnings=found.warnings), report)

    def _put(self, shard: _Shard, column: _Column, report: JobReport) -> None:
        began = time.perf_counter()
        recipe, data = column.recipe, column.data
        name = self._dataset.put_data(column.folder, shard.number, data, column.ending)
        report.spend(f"write {column.name}", time.perf_counter() - began)
        if column.epoch and name == self._dataset.receipt(column.name, recipe.short, shard.number).file:
            return  # tried again in vain: what is committed stays
        digest, rows_total = self._listing
        receipt = Receipt(
            column=column.name,
            recipe=recipe.hash,
            shard=shard.number,
            rows=len(column.reasons),
            absent=absent_counts(column.reasons),
            presence=pack_presence(np.array([r is None for r in column.reasons], bool)),
            keys=shard.keys,
            file=name,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            dataset=self._dataset.digest,
            source={"digest": digest, "rows_total": rows_total} if column.name == SAMPLES else {},
            provenance=_provenance(column.wanted, recipe.kind),
            environment={**self._environment, "batch_size": shard.batch_size},
            timings=_timings(report, column.name),
            epoch=column.epoch,
            figures=column.figures,
            warnings=list(column.warnings),
        )
        won = self._dataset.commit(recipe, receipt)
        (report.committed if won else report.lost_races).append(column.name)


@dataclass(frozen=True, slots=True)
class _Shard:
    number: int
    keys: str  # digest of the key column
    batch_size: int


@dataclass(frozen=True, slots=True)
class _Column:
    """A shard's samples, or kept labels or tokens of a modality, as they are to be committed."""

    name: str
    recipe: Recipe
    folder: str
    ending: str
    data: bytes
    reasons: Sequence[str | None]  # by row, why it has no value; None where it has one
    wanted: Wanted | None = None
    epoch: int = 0
    figures: str = ""
    warnings: tuple[str, ...] = ()


def _reasons(cells: Sequence[Any]) -> list[str | None]:
    return [cell.reason if isinstance(cell, Absent) else None for cell in cells]


def too_many_absent(absent: Mapping[str, int], rows: int, limit: int, seen: int | None = None) -> str | None:
    """What to say of a column with so many rows without a value, by reason; None where they are within ``limit``.

    ``seen``: how many of the shard's rows the counts are of, where they are not of all.
    """
    faults = {reason: count for reason, count in absent.items() if is_fault(reason)}
    if sum(faults.values()) <= limit:
        return None
    among = rows if seen in (None, rows) else f"the first {seen}"
    most = max(faults, key=lambda reason: faults[reason])
    return (
        f"{sum(faults.values())} of {among} rows have no value (limit {limit}), most often {most!r}; "
        "look at the source, or raise engine.max_absent_share"
    )


def _with_status(cells: Sequence[Any], status: Sequence[str]) -> list[Any]:
    """A row without an image has no value in any column, and the same reason in all."""
    return [Absent(s) if s != OK else cell for s, cell in zip(status, cells, strict=True)]


def _timings(report: JobReport, column: str) -> dict[str, float]:
    """Seconds that the shard took so far, and when it was committed (s since 1970).

    ``read``, ``decode``, ``wait`` (the runner for specialists) are of the shard; ``forward``, ``tokenize``, ``write`` of this
    column; ``busy`` and ``starved`` (of input) of the specialists that made it.
    """
    spent = {p: report.seconds.get(p, 0.0) for p in ("read", "decode", "wait")}
    for phase in ("forward", "tokenize", "write", "busy", "starved"):
        spent[phase] = report.seconds.get(f"{phase} {column}", 0.0)
    return {
        **{phase: round(seconds, 4) for phase, seconds in spent.items()},
        "committed": round(time.time(), 3),
    }


def _provenance(wanted: Wanted | None, kind: str) -> dict[str, Any]:
    """Whose weights a column is made with, and under which licence; None where a labeler has none.

    ``tokenizer`` and its licence are there where one was given; one that was fitted on the dataset is nobody else's.
    """
    if wanted is None:
        return {}
    tokenizer = wanted.tokenizer_provenance if kind == "token" else {}
    if wanted.settings is None:
        return dict(tokenizer)
    labeler = wanted.make_labeler()
    checkpoint = labeler.checkpoint
    return {
        "labeler": wanted.labeler,
        "model": wanted.settings.model or labeler.default_model,
        "weights": checkpoint.identity if checkpoint else None,
        "license": wanted.license,
        **tokenizer,
    }
