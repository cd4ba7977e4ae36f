"""A snapshot as a map: sample by number, for looking at single samples (training reads by `fourmill.train.loader`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fourmill.errors import ConfigError, nearest
from fourmill.shards.arrow import Column
from fourmill.shards.snapshot import Snapshot

_MOST_OPEN = 256  # columns


class SnapshotView(Sequence[dict[str, Any]]):
    """The samples of a split in the order of shards and rows; a map-style dataset of PyTorch too.

    A sample is a dictionary: ``key``, and of each modality its crops, None where it is absent: uint16 (n_crops, n) of grids and
    vectors (float16 of embeddings), a list of uint16 (n,) of sequences, a list of bytes of pixels, a float of scalars.
    """

    def __init__(
        self, snapshot: Snapshot, modalities: Sequence[str] | None = None, split: str = "train"
    ) -> None:
        for name in modalities or ():
            if name not in snapshot.modalities:
                raise ConfigError(
                    f"snapshot {snapshot.digest[:12]} has no modality {name!r}{nearest(name, snapshot.modalities)}"
                )
        self.snapshot, self.split = snapshot, split
        self.modalities = list(snapshot.modalities if modalities is None else modalities)
        self._ends = np.cumsum(snapshot.split_sizes(split))
        self._column = lru_cache(_MOST_OPEN)(snapshot.column)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_column": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._column = lru_cache(_MOST_OPEN)(self.snapshot.column)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = int(index) + len(self) * (index < 0)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        place = number - (int(self._ends[shard - 1]) if shard else 0)
        row = int(np.flatnonzero(self.snapshot.in_split(shard, self.split))[place])
        values = {name: self._value(self._column(shard, name), row) for name in self.modalities}
        return {"key": self.snapshot.keys(shard)[row], **values}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def _value(self, column: Column, row: int) -> Any:
        if not column.present[row]:
            return None
        if column.tokens is None:
            return [column.cells(row, crop) for crop in range(column.n_crops)]
        if column.tokens.dtype == np.float32:
            return float(column.tokens[row, 0, 0])
        return np.array(column.tokens[row])
