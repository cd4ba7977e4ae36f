"""What was made of one shard so far, between its micro-batches and its commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from fourmill.errors import DatasetError
from fourmill.flows.plan import Job
from fourmill.flows.resolve import Resolved
from fourmill.flows.specialist import MicroResult
from fourmill.labels import Absent, Label
from fourmill.shards.decode import Frame
from fourmill.shards.samples import sample_table
from fourmill.shards.sources.base import Row


class ShardContent:
    """What was made of one shard so far, by row."""

    def __init__(self, rows: int, job: Job) -> None:
        self.decoded: list[tuple[Any, tuple[str, ...]]] = []
        self.labels: dict[str, list[Label]] = {name: [Absent("not made")] * rows for name in job.labels}
        self.values: dict[str, list[Any]] = {name: [Absent("not made")] * rows for name in job.tokens}
        self.samples: pa.Table = None

    def add(self, start: int, decoded: Sequence[tuple[Frame | str, tuple[str, ...]]], keep: bool) -> None:
        """Remember sizes and captions for the samples table, not pixels."""
        if keep:
            for frame, captions in decoded:
                self.decoded.append(
                    (frame if isinstance(frame, str) else (frame.width, frame.height), captions)
                )

    def make_samples(self, rows: Sequence[Row], resolved: Resolved) -> None:
        config = resolved.config
        sizes = [size for size, _ in self.decoded]
        captions = [texts for _, texts in self.decoded]
        self.samples = sample_table(
            rows, sizes, captions, seed=config.seed, n_crops=config.n_crops, val_fraction=config.val_fraction
        )

    def fill(self, start: int, result: MicroResult) -> None:
        for target, made in ((self.labels, result.labels), (self.values, result.values)):
            for name, values in made.items():
                column = target[name]
                for i, value in enumerate(values[: len(column) - start]):
                    column[start + i] = value


def check_unchanged(
    part: Sequence[Row], skip: Sequence[str | None], decoded: Sequence[tuple[Frame | str, tuple[str, ...]]]
) -> None:
    """A row that was readable when its shard was frozen must still be: otherwise the source has changed."""
    for row, why, (frame, _) in zip(part, skip, decoded, strict=bool(decoded)):
        if why is None and isinstance(frame, str):
            raise DatasetError(
                f"source row {row.key!r} was readable when its shard was made and is now {frame!r}; restore it"
            )


def rows_of(samples: pa.Table) -> list[Row]:
    return [
        Row(k, p) for k, p in zip(samples["key"].to_pylist(), samples["position"].to_pylist(), strict=True)
    ]


def reasons_of(cells: Sequence[Any]) -> list[str | None]:
    return [cell.reason if isinstance(cell, Absent) else None for cell in cells]
