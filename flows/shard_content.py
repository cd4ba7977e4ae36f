"""What was made of one shard so far, between its micro-batches and its commit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.errors import DatasetError
from fourmill.flows.micro_batch import MicroResult
from fourmill.flows.plan import Job
from fourmill.flows.reading import Decoded
from fourmill.flows.resolve import Resolved
from fourmill.labelers.figures import Measures, Tally
from fourmill.labels import Absent, Label
from fourmill.shards.samples import sample_table
from fourmill.shards.sources.base import Row


@dataclass
class Again:
    """Columns of which null cells alone are made again. ``epochs``: what they are committed under, by name."""

    epochs: dict[str, int] = field(default_factory=dict)
    redo: dict[str, np.ndarray] = field(default_factory=dict)  # bool (rows,): these cells are

    def rows(self, name: str, start: int, rows: Sequence[int]) -> Sequence[int]:
        """Those of a micro-batch's rows that are made in this job."""
        redo = self.redo.get(name)
        return rows if redo is None else [i for i in rows if redo[start + i]]


class ShardContent:
    """What was made of one shard so far, by row. Columns that were given up are gone."""

    def __init__(self, rows: int, job: Job) -> None:
        self.labels: dict[str, list[Label]] = {name: [Absent("not made")] * rows for name in job.labels}
        self.values: dict[str, list[Any]] = {name: [Absent("not made")] * rows for name in job.tokens}
        self.measured = {name: Measures.none(rows) for name in (*job.labels, *job.tokens)}
        self.again = Again()
        self.labels_again = Again()
        self.samples: pa.Table = None
        self.absent: dict[str, Counter[str]] = {n: Counter() for n in [*job.labels, *job.tokens]}  # by reason
        self._decoded: list[tuple[Any, tuple[str, ...]]] = []

    def add(self, decoded: Iterable[Decoded]) -> None:
        """Remember sizes and captions for the samples table, not pixels."""
        for frame, captions in decoded:
            self._decoded.append((frame if isinstance(frame, str) else (frame.width, frame.height), captions))

    def make_samples(self, rows: Sequence[Row], resolved: Resolved) -> None:
        config = resolved.config
        sizes = [size for size, _ in self._decoded]
        captions = [texts for _, texts in self._decoded]
        self.samples = sample_table(
            rows, sizes, captions, seed=config.seed, n_crops=config.n_crops, val_fraction=config.val_fraction
        )

    def wanted(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Of these modalities, the ones whose labels and the ones whose tokens are still to be made."""
        names = list(names)
        return [n for n in names if n in self.labels], [n for n in names if n in self.values]

    def fill(self, start: int, result: MicroResult, rows: Sequence[int]) -> None:
        """Take over ``rows`` (within the micro-batch that begins at row ``start``) of what a specialist made."""
        sides: list[tuple[dict[str, list[Any]], Mapping[str, Sequence[Any]], Again]] = [
            (self.labels, result.labels, self.labels_again),
            (self.values, result.values, self.again),
        ]
        for target, made, again in sides:
            for name, values in made.items():
                if name in target:
                    for i in again.rows(name, start, rows):
                        target[name][start + i] = values[i]
        for name, measures in result.measured.items():
            if name in self.measured:
                taken = self.again.rows(name, start, rows)
                self.measured[name].put([start + i for i in taken], measures, taken)
        for name in {*result.labels, *result.values} & set(self.absent):
            cells: list[Any] = result.values.get(name) or result.labels[name]
            self.absent[name].update(cells[i].reason for i in rows if isinstance(cells[i], Absent))

    def give_up(self, name: str) -> None:
        for columns in (self.labels, self.values, self.measured, self.absent):
            columns.pop(name, None)

    def tally(self, name: str) -> Tally:
        """What was measured of the column's rows."""
        return Tally.of(self.measured[name])


def warm_up(n_crops: int) -> None:
    """Make a table of no rows: the first array makes pyarrow import pandas, half a second that no shard needs to wait for."""
    sample_table([], [], [], seed=0, n_crops=n_crops, val_fraction=0.0)


def check_unchanged(part: Sequence[Row], skip: Sequence[str | None], decoded: Sequence[Decoded]) -> None:
    """A row that was readable when its shard was frozen must still be: otherwise the source has changed."""
    for row, why, (frame, _) in zip(part, skip, decoded, strict=True):
        if why is None and isinstance(frame, str):
            raise DatasetError(
                f"source row {row.key!r} was readable when its shard was made and is now {frame!r}; restore it"
            )
