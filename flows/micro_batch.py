"""What travels between a runner and its specialists."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from fourmill.labelers.figures import Measures
from fourmill.labels import Absent, Label, parts_of
from fourmill.shards.arrow import Cell


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B rows of one shard, decoded. B is the same for every micro-batch of a job; short ones hold blanks.

    ``frames`` uint8 (H, W, 3) per row; ``present`` bool (B,), False for blanks and for rows that were set aside;
    ``sizes`` int32 (B, 2) original height, width; ``crops`` int32 (B, n_crops, 5). ``given`` holds labels that were kept
    earlier, by modality. ``name`` says whose rows these are, to a journal.
    """

    name: str
    keys: Sequence[str]
    frames: Sequence[np.ndarray]
    present: np.ndarray
    sizes: np.ndarray
    crops: np.ndarray
    captions: Sequence[Sequence[str]]
    truth: Sequence[Mapping[str, Any] | None] = ()
    given: Mapping[str, Sequence[Label]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the pixels and of the labels that are given: what counts."""
        given = sum(_label_bytes(label) for labels in self.given.values() for label in labels)
        return sum(frame.nbytes for frame in self.frames) + given

    def blanked(self, rows: Collection[int]) -> MicroBatch:
        """The same shape, with every row but these as if it had been set aside."""
        keep = [i in rows for i in range(len(self.keys))]
        return replace(
            self,
            frames=[f if k else np.zeros_like(f) for f, k in zip(self.frames, keep, strict=True)],
            present=self.present & np.array(keep, bool),
            captions=[c if k else () for c, k in zip(self.captions, keep, strict=True)],
            truth=[t if k else None for t, k in zip(self.truth, keep, strict=True)] if self.truth else (),
            given={
                name: [label if k else Absent("blank") for label, k in zip(labels, keep, strict=True)]
                for name, labels in self.given.items()
            },
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a modality of a micro-batch could not be made."""

    step: str  # the modality whose labeler or codec was at fault: itself, or one that it needs
    reason: str  # for null cells, the same for every row of its kind, e.g. "depth raised ValueError"
    text: str  # for people, with the error's own words
    fatal: bool = False  # the process ended: once is no proof that the rows are to blame


@dataclass
class MicroResult:
    """``values``: one cell per row of a tokenized modality; ``labels``: one label per row of one to be kept."""

    values: dict[str, list[Cell]] = field(default_factory=dict)
    labels: dict[str, list[Label]] = field(default_factory=dict)
    measured: dict[str, Measures] = field(default_factory=dict)  # of each row's label and tokens
    failed: dict[str, Failure] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # phase, or "phase modality"

    def __reduce__(self) -> tuple[Any, ...]:
        """On its way between processes a column of equal arrays is one array: each by itself costs as much as a hundred kB."""
        values = {name: _packed(column) for name, column in self.values.items()}
        return _unpacked, (values, self.labels, self.measured, self.failed, self.seconds)

    def add(self, other: MicroResult) -> None:
        """Take over the modalities and the time of another call."""
        self.values |= other.values
        self.labels |= other.labels
        self.measured |= other.measured
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def take_rows(self, other: MicroResult, rows: Collection[int]) -> None:
        """Take over these rows of modalities that both have."""
        pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (self.values, other.values),
            (self.labels, other.labels),
        ]
        for mine, theirs in pairs:
            for name, column in theirs.items():
                for row in rows:
                    mine[name][row] = column[row]
        for name, measures in other.measured.items():
            self.measured[name].put(list(rows), measures, list(rows))

    def set_aside(self, row: int, reason: str) -> None:
        for columns in (self.values, self.labels):
            for column in columns.values():
                column[row] = Absent(reason)
        for measures in self.measured.values():
            measures.seen[row] = False


@dataclass(frozen=True, slots=True)
class _Packed:
    """A column of cells: ``parts`` (crops of all rows, ...), and of each row how many of them are its, or why it has none."""

    parts: np.ndarray
    rows: list[int | Absent]


def _packed(column: list[Cell]) -> list[Cell] | _Packed:
    """The column itself where its cells are something else than arrays of one shape and dtype."""
    parts = [part for cell in column if not isinstance(cell, Absent) for part in cell]
    first = parts[0] if parts else None
    if not isinstance(first, np.ndarray):
        return column
    for part in parts:
        if not isinstance(part, np.ndarray) or part.shape != first.shape or part.dtype != first.dtype:
            return column
    return _Packed(np.array(parts), [c if isinstance(c, Absent) else len(c) for c in column])


def _unpacked(values: Mapping[str, list[Cell] | _Packed], *others: Any) -> MicroResult:
    made: dict[str, list[Cell]] = {}
    for name, column in values.items():
        if isinstance(column, _Packed):
            parts = iter(column.parts)
            made[name] = [n if isinstance(n, Absent) else list(islice(parts, n)) for n in column.rows]
        else:
            made[name] = column
    result = MicroResult(made, *others)
    # Arrays from the object store may not be written to, and rows of these will be set aside.
    result.measured = {name: measures.copy() for name, measures in result.measured.items()}
    return result


#: the key of what specialists are tried on, which no source has
TEST_KEY = "(a test image)"


def sample_batch(size: int, n_crops: int) -> MicroBatch:
    """One row to try labelers on: a picture with some structure, and a caption."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    waves = 0.5 + 0.5 * np.stack([np.sin(9 * x), np.sin(7 * y), np.sin(11 * (x + y))], axis=-1)
    return MicroBatch(
        name="a test image",
        keys=[TEST_KEY],
        frames=[(255 * waves).astype(np.uint8)],
        present=np.ones(1, bool),
        sizes=np.full((1, 2), size, np.int32),
        crops=np.tile(np.array([0, 0, size, size, 0], np.int32), (1, n_crops, 1)),
        captions=[("a test image",)],
        truth=[None],
    )


def _label_bytes(label: Any) -> int:
    return sum(int(getattr(part, "nbytes", 64)) for part in parts_of(label))
