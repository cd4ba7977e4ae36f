"""Pixels as inputs: only the pictures that a mask shows something of are decoded, by a few threads at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from fourmill.errors import ContractError
from fourmill.tokenize.pixels import decode_crop
from fourmill.train.presets import PATCH_SIZE, ModalitySpec

if TYPE_CHECKING:
    from fourmill.train.reading import Shards

_MOST_THREADS = 8
_PORTION = 8  # pictures that a thread takes at a time


def read_patches(
    shards: Shards,
    specs: Sequence[ModalitySpec],
    shard: np.ndarray,
    rows: np.ndarray,
    crops: np.ndarray,
    modality: np.ndarray,
    positions: np.ndarray,
    lengths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The visible patches uint8 (P, 768) and their input slots int64 (P,).

    ``shard``, ``rows``, ``crops`` and ``lengths`` are by sample (B,), ``modality`` and ``positions`` by slot (I,).
    Raises DatasetError for a picture that cannot be decoded.
    """
    is_pixels = np.array([spec.kind == "pixels" for spec in specs])
    slots = np.flatnonzero(is_pixels[modality])
    out = np.empty((len(slots), 3 * PATCH_SIZE**2), np.uint8)
    sample = np.searchsorted(np.cumsum(lengths), slots, side="right")
    # Slots of one picture follow each other.
    first = np.flatnonzero(np.diff(sample * len(specs) + modality[slots], prepend=-1))
    stretches = zip(first.tolist(), [*first[1:].tolist(), len(slots)], strict=False)

    def read(stretch: tuple[int, int]) -> None:
        begin, end = stretch
        b, spec = int(sample[begin]), specs[int(modality[slots[begin]])]
        blob = shards.blob(int(shard[b]), spec.name, int(rows[b]), int(crops[b]))
        try:
            image = decode_crop(blob, spec.side * PATCH_SIZE)
        except ContractError as error:
            raise shards.damaged(int(shard[b]), f"row {rows[b]} of {spec.name}: {error}") from error
        np.take(cut_patches(image), positions[slots[begin:end]], axis=0, out=out[begin:end], mode="clip")

    def read_all(some: Iterable[tuple[int, int]]) -> None:
        for stretch in some:
            read(stretch)

    todo = list(stretches)
    pool = _threads()
    if pool is None:
        read_all(todo)
    else:
        portions = [todo[at : at + _PORTION] for at in range(0, len(todo), _PORTION)]
        for _ in pool.map(read_all, portions):
            pass  # raises what a thread raised
    return out, slots


def cut_patches(image: np.ndarray) -> np.ndarray:
    """All patches uint8 (P, 768) of a picture uint8 (S, S, 3), row by row."""
    side = image.shape[0] // PATCH_SIZE
    grid = image.reshape(side, PATCH_SIZE, side, PATCH_SIZE * 3)
    return grid.swapaxes(1, 2).reshape(side * side, -1)


@cache
def _threads() -> ThreadPoolExecutor | None:
    """Decoders release the interpreter's lock. One pool for all loaders of a process; None where there is one core."""
    cores = len(os.sched_getaffinity(0))
    return ThreadPoolExecutor(min(_MOST_THREADS, cores), "decode") if cores > 1 else None
