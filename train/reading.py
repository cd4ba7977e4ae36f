"""Reading samples from the shards of one or several snapshots: opened when they are needed, a bounded number at a time.

A shard's columns stay memory-mapped while it is open; what the mapping does not hold is an index of the split's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.errors import DatasetError
from fourmill.shards.arrow import Column
from fourmill.train.order import Refs
from fourmill.train.presets import ModalitySpec
from fourmill.train.rules import EVERYWHERE, Pointers

#: the kernel of Linux allows a process 65,530 maps; other parts of it need some too
MOST_MAPS = 16_384


@dataclass(slots=True)
class OpenShard:
    """``rows`` int64: those of the split; ``keys64`` uint64, by row of the shard."""

    rows: np.ndarray
    keys64: np.ndarray
    columns: list[Column | None]  # by modality; None: its dataset does not have it
    crops: int
    pictures: dict[str, tuple[np.ndarray, memoryview]]  # of pixels: where they begin, and their bytes


class Shards:
    """The samples of one split, by number of the shard (over all snapshots) and place among the shard's rows of the split."""

    def __init__(
        self,
        snapshots: Sequence[Any],
        specs: Sequence[ModalitySpec],
        split: str = "train",
        most_maps: int = MOST_MAPS,
    ) -> None:
        self.snapshots, self.specs, self.split = tuple(snapshots), tuple(specs), split
        self.counts = [snapshot.split_sizes(split) for snapshot in snapshots]
        for snapshot, count in zip(snapshots, self.counts, strict=True):
            if not count.sum():
                raise DatasetError(
                    f"snapshot {snapshot.digest[:12]} has no {split} sample; see val_fraction and the build's report"
                )
        owners = [np.full(len(count), number) for number, count in enumerate(self.counts)]
        self._owner = np.concatenate(owners)
        self._number = np.concatenate([np.arange(len(count)) for count in self.counts])
        self._most = max(1, most_maps // (len(specs) + 1))
        self._reset()

    def _reset(self) -> None:
        self.pointers = Pointers.closed(len(self._owner), len(self.specs))
        self._open: dict[int, OpenShard] = {}
        self._used = np.full(len(self._owner), -1, np.int64)  # when a shard was last needed; -1: it is closed
        self._clock = 0

    def __getstate__(self) -> dict[str, Any]:
        hidden: dict[str, Any] = {"pointers": None, "_open": None, "_used": None}
        return {**self.__dict__, **hidden}  # memory maps are opened anew in each process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return sum(int(count.sum()) for count in self.counts)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def refs(self, index: np.ndarray) -> Refs:
        """The samples ``index`` (B,) in the order of shards and rows, as seen for the first time."""
        ends = np.cumsum(np.concatenate(self.counts))
        shard = np.searchsorted(ends, index, side="right")
        return Refs(shard, index - (ends - np.concatenate(self.counts))[shard], np.zeros_like(index))

    def open(self, shards: np.ndarray) -> None:
        """Open the shards of a batch (B,), and close those that were not needed for longest, if there are too many."""
        self._clock += 1
        for number in np.unique(shards[self._used[shards] < 0]).tolist():
            self._open_one(number)
        self._used[shards] = self._clock
        excess = len(self._open) - self._most
        if excess > 0:
            numbers = np.fromiter(self._open, np.int64)
            old = numbers[self._used[numbers] < self._clock]
            for number in old[np.argsort(self._used[old], kind="stable")][:excess].tolist():
                self._close_one(number)

    def prefetch(self, shards: np.ndarray) -> None:
        """Have the files of shards (any number) fetched that will be read soon, where that makes sense."""
        for owner in np.unique(self._owner[shards]).tolist():
            snapshot = self.snapshots[owner]
            names = [spec.name for spec in self.specs if spec.name in snapshot.modalities]
            snapshot.prefetch(self._number[shards[self._owner[shards] == owner]].tolist(), names)

    def _open_one(self, number: int) -> None:
        snapshot, index = self.snapshots[self._owner[number]], int(self._number[number])
        rows, keys64 = snapshot.split_rows(index, self.split)
        columns = [
            snapshot.column(index, spec.name) if spec.name in snapshot.modalities else None
            for spec in self.specs
        ]
        opened = OpenShard(rows, keys64, columns, int(snapshot.n_crops), {})
        self._check(number, opened)
        for spec, column in zip(self.specs, columns, strict=True):
            if column is not None and column.blobs is not None:
                opened.pictures[spec.name] = _pictures(column.blobs)
        self._open[number] = opened
        pointers = self.pointers
        pointers.rows[number], pointers.keys64[number] = _address(rows), _address(keys64)
        pointers.crops[number] = opened.crops
        for m, column in enumerate(columns):
            if column is not None:
                everywhere = bool(column.present.all())
                pointers.present[number, m] = EVERYWHERE if everywhere else _address(column.present)
                values = column.flat if column.tokens is None else column.tokens
                pointers.values[number, m] = _address(values)
                pointers.offsets[number, m] = _address(column.offsets)

    def _close_one(self, number: int) -> None:
        del self._open[number]
        self._used[number] = -1
        for array in self.pointers:
            array[number] = 0

    def _check(self, number: int, opened: OpenShard) -> None:
        """The kernel trusts what is open: whatever would lead it astray is refused here."""
        keys = len(opened.keys64)
        if len(opened.rows) != self._size(number):
            raise self.damaged(
                number,
                f"it has {len(opened.rows)} samples of {self.split}, its snapshot says {self._size(number)}",
            )
        for spec, column in zip(self.specs, opened.columns, strict=True):
            if column is None:
                continue
            cells = keys * opened.crops
            fits = len(column.present) == keys and column.n_crops == opened.crops
            if spec.is_sequence:
                flat, offsets = column.flat, column.offsets
                fits &= flat is not None and offsets is not None and len(offsets) == cells + 1
                if fits:
                    assert flat is not None and offsets is not None
                    fits &= flat.dtype == np.uint16 and offsets.dtype == np.int32
                    fits &= bool(
                        (np.diff(offsets) >= 0).all() and offsets[0] >= 0 and offsets[-1] <= len(flat)
                    )
            elif spec.kind == "pixels":
                fits &= column.blobs is not None and len(column.blobs) == cells
            else:
                tokens = column.tokens
                fits &= tokens is not None and tokens.shape == (keys, opened.crops, spec.num_tokens)
                fits &= tokens is not None and tokens.dtype == np.uint16 and tokens.flags.c_contiguous
            if not fits:
                raise self.damaged(number, f"{spec.name} does not have the shape that its snapshot says")

    def _size(self, number: int) -> int:
        return int(self.counts[self._owner[number]][self._number[number]])

    def damaged(self, number: int, what: str) -> DatasetError:
        snapshot = self.snapshots[self._owner[number]]
        index = snapshot.shards[int(self._number[number])].index
        return DatasetError(f"shard {index}: {what}; the file is damaged: run `fourmill verify`")

    # -- whole arrays: the plain form of what the kernel does -------------------------------------------

    def groups(self, shard: np.ndarray) -> Iterator[tuple[OpenShard, np.ndarray]]:
        """Each open shard that a batch (B,) touches, and the places in the batch that do."""
        order = np.argsort(shard, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            yield self._open[int(shard[places[0]])], places

    def look_up(self, refs: Refs) -> tuple[np.ndarray, np.ndarray]:
        """Rows in their shards int64 (B,), and keys uint64 (B,)."""
        rows, keys64 = np.zeros(len(refs.shard), np.int64), np.zeros(len(refs.shard), np.uint64)
        for opened, at in self.groups(refs.shard):
            rows[at] = opened.rows[refs.place[at]]
            keys64[at] = opened.keys64[rows[at]]
        return rows, keys64

    def crops(self, shard: np.ndarray) -> np.ndarray:
        """int64 (B,): how many crops the samples have."""
        return self.pointers.crops[shard]

    def _column(self, opened: OpenShard, name: str) -> Column | None:
        return opened.columns[next(m for m, spec in enumerate(self.specs) if spec.name == name)]

    def present(self, name: str, shard: np.ndarray, rows: np.ndarray) -> np.ndarray:
        out = np.zeros(len(rows), bool)
        for opened, at in self.groups(shard):
            column = self._column(opened, name)
            if column is not None:
                out[at] = column.present[rows[at]]
        return out

    def tokens(
        self, spec: ModalitySpec, shard: np.ndarray, rows: np.ndarray, crops: np.ndarray
    ) -> np.ndarray:
        """uint16 (B, n), zeros where absent. Raises DatasetError for a token beyond the vocabulary."""
        out = np.zeros((len(rows), spec.num_tokens), np.uint16)
        for opened, at in self.groups(shard):
            column = self._column(opened, spec.name)
            if column is not None:
                assert column.tokens is not None
                out[at] = column.tokens[rows[at], crops[at]]
        if int(out.max(initial=0)) >= spec.vocab_size:
            row, column_ = np.argwhere(out >= spec.vocab_size)[0]
            raise self.damaged(
                int(shard[row]),
                f"{spec.name} holds the token {out[row, column_]}, beyond its vocabulary of {spec.vocab_size}",
            )
        return out

    def sequences(
        self, spec: ModalitySpec, shard: np.ndarray, rows: np.ndarray, crops: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int64 (B, L + 1) behind which there is room for one, their true lengths and presence (B,)."""
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        present = self.present(spec.name, shard, rows)
        for opened, at in self.groups(shard):
            column = self._column(opened, spec.name)
            if column is not None:
                assert column.offsets is not None
                cell = rows[at] * opened.crops + crops[at]
                starts[at] = column.offsets[cell]
                lengths[at] = (column.offsets[cell + 1] - starts[at]) * present[at]
        kept = np.minimum(lengths, spec.num_tokens)
        ids = np.zeros((len(rows), int(kept.max(initial=0)) + 1), np.int64)
        for opened, at in self.groups(shard):
            column = self._column(opened, spec.name)
            if column is not None:
                assert column.flat is not None
                row, token = np.nonzero(np.arange(ids.shape[1]) < kept[at][:, None])
                ids[at[row], token] = column.flat[starts[at[row]] + token]
        return ids, lengths, present

    def blob(self, shard: int, name: str, row: int, crop: int) -> memoryview:
        """The bytes of one picture, where they lie."""
        opened = self._open[shard]
        offsets, data = opened.pictures[name]
        cell = row * opened.crops + crop
        return data[offsets[cell] : offsets[cell + 1]]


def _pictures(blobs: Any) -> tuple[np.ndarray, memoryview]:
    """Where the pictures of an Arrow binary array begin and end, and all their bytes."""
    _, offsets, data = blobs.buffers()
    where = np.frombuffer(offsets, np.int32)[blobs.offset : blobs.offset + len(blobs) + 1]
    return where, memoryview(data if data is not None else b"")


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else int(array.__array_interface__["data"][0])
