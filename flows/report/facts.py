"""What a report says beside its pictures: set-aside samples, where the time went, the environment, the training run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourmill.flows.report.view import View
from fourmill.labels import is_fault
from fourmill.shards.dataset import SAMPLES
from fourmill.shards.receipts import Receipt
from fourmill.shards.samples import OK

#: of a job; while a runner waits, its specialists are in `forward` and `tokenize`, so waiting is not counted again
PHASES = ("decode", "forward", "tokenize", "write")


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row without a value. ``column`` is "samples" for one that has no image."""

    key: str
    column: str
    reason: str
    shard: int
    row: int


def set_aside(view: View, limit: int) -> list[SetAside]:
    """The first rows that have no image or no value in some modality, a share for each column."""
    found = list(_few(_no_image(view), limit))
    for name in view.names:
        found += _few(_no_value(view, name), limit)
    return found


def _few(rows: Iterator[SetAside], limit: int) -> Iterator[SetAside]:
    """At most ``limit``, and no more than half of them for one reason."""
    reasons: dict[str, int] = {}
    for number, one in enumerate(rows):
        if sum(reasons.values()) >= limit or number >= 100 * limit:
            return
        reasons[one.reason] = reasons.get(one.reason, 0) + 1
        if reasons[one.reason] <= max(1, limit // 2):
            yield one


def _receipts(view: View, column: str) -> dict[int, Receipt]:
    short = view.dataset.samples_recipe() if column == SAMPLES else view.recipes[column]
    return view.dataset.receipts(column, str(short))


def _no_image(view: View) -> Iterator[SetAside]:
    for receipt in _receipts(view, SAMPLES).values():
        if receipt.absent:
            table = view.dataset.table(receipt.file).select(["key", "status"])
            for row, (key, status) in enumerate(zip(*(c.to_pylist() for c in table.columns), strict=True)):
                if status != OK:
                    yield SetAside(key, SAMPLES, status, receipt.shard, row)


def _no_value(view: View, name: str) -> Iterator[SetAside]:
    all_samples = _receipts(view, SAMPLES)
    for receipt in _receipts(view, name).values():
        samples = all_samples[receipt.shard]
        if sum(receipt.absent.values()) <= sum(samples.absent.values()):
            continue  # nothing but the rows that have no image
        reasons = view.dataset.table(receipt.file).column("reason").to_pylist()
        table = view.dataset.table(samples.file).select(["key", "status"])
        for row, (key, status) in enumerate(zip(*(c.to_pylist() for c in table.columns), strict=True)):
            if status == OK and reasons[row] is not None and is_fault(reasons[row]):
                yield SetAside(key, name, reasons[row], receipt.shard, row)


@dataclass(frozen=True)
class Work:
    """``seconds`` by phase, added up over jobs (they run side by side); ``environment``: key -> values that occur."""

    seconds: dict[str, float]
    jobs: int
    rows: int
    environment: dict[str, list[str]]


def work_of(view: View) -> Work:
    """From the receipts. The columns of a shard that were made together carry the same timings: they count once."""
    jobs: dict[tuple[int, float], dict[str, float]] = {}
    rows: dict[tuple[int, float], int] = {}
    environment: dict[str, set[str]] = {}
    for column in (SAMPLES, *view.names):
        for receipt in _receipts(view, column).values():
            job = (receipt.shard, receipt.timings.get("total", 0.0))
            known = jobs.setdefault(job, {})
            rows[job] = receipt.rows
            for phase in PHASES:
                known[phase] = max(known.get(phase, 0.0), receipt.timings.get(phase, 0.0))
            for key, value in receipt.environment.items():
                environment.setdefault(key, set()).add(str(value))
    seconds = {phase: sum(job.get(phase, 0.0) for job in jobs.values()) for phase in PHASES}
    return Work(
        seconds, len(jobs), sum(rows.values()), {k: sorted(v) for k, v in sorted(environment.items())}
    )


def read_records(path: Path | None) -> list[dict[str, Any]]:
    """The whole records of a training run; lines that a kill cut short are passed over."""
    records = []
    for line in path.read_text().splitlines() if path else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "losses" in record:
            records.append(record)
    return records
