"""Pixels as inputs: only the pictures that a mask shows something of are decoded, by a few threads at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
        out[begin:end] = cut_patches(image, positions[slots[begin:end]])

    for _ in _threads().map(read, stretches):
        pass  # raises what a thread raised
    return out, slots


def cut_patches(image: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """The patches uint8 (P, 768) at ``positions`` (None: all) of a picture uint8 (S, S, 3), row by row."""
    side = image.shape[0] // PATCH_SIZE
    places = np.arange(side * side) if positions is None else positions
    down, across = np.divmod(places, side)
    grid = image.reshape(side, PATCH_SIZE, side, PATCH_SIZE, 3)
    return grid[down, :, across].reshape(len(places), -1)


@cache
def _threads() -> ThreadPoolExecutor:
    """Decoders release the interpreter's lock. One pool for all loaders of a process."""
    return ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))), "decode")
