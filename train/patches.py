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
_STRIP = f"V{3 * PATCH_SIZE}"  # a row of a patch's pixels
_Picture = tuple[
    int, int, ModalitySpec, tuple[int, int, int]
]  # its slots' begin and end, what, (shard, row, crop)


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
    where, whose = positions[slots], sample[first]
    cells = zip(shard[whose].tolist(), rows[whose].tolist(), crops[whose].tolist(), strict=True)
    named = [specs[m] for m in modality[slots[first]].tolist()]
    ends = [*first[1:].tolist(), len(slots)] if len(slots) else []
    todo: list[_Picture] = list(zip(first.tolist(), ends, named, cells, strict=True))

    def read(picture: _Picture) -> None:
        begin, end, spec, (number, row, crop) = picture
        try:
            image = decode_crop(shards.blob(number, spec.name, row, crop), spec.side * PATCH_SIZE)
        except ContractError as error:
            raise shards.damaged(number, f"row {row} of {spec.name}: {error}") from error
        copy_patches(image, where[begin:end], out[begin:end])

    def read_all(some: Iterable[_Picture]) -> None:
        for picture in some:
            read(picture)

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
    strips = _strips(image.shape[0] // PATCH_SIZE)
    return image.reshape(-1).view(_STRIP)[strips].view(np.uint8)


def copy_patches(image: np.ndarray, positions: np.ndarray, out: np.ndarray) -> None:
    """Rows ``positions`` (N,) of `cut_patches`, into ``out`` uint8 (N, 768), without making the others."""
    strips = _strips(image.shape[0] // PATCH_SIZE)[positions]
    np.take(image.reshape(-1).view(_STRIP), strips, out=out.view(_STRIP), mode="clip")


@cache
def _strips(side: int) -> np.ndarray:
    """int64 (side * side, 16): where in a picture the strips of each patch are."""
    corners = np.arange(side)[:, None] * PATCH_SIZE * side + np.arange(side)
    return corners.reshape(-1, 1) + np.arange(PATCH_SIZE) * side


@cache
def _threads() -> ThreadPoolExecutor | None:
    """Decoders release the interpreter's lock. One pool for all loaders of a process; None where there is one core."""
    cores = len(os.sched_getaffinity(0))
    return ThreadPoolExecutor(min(_MOST_THREADS, cores), "decode") if cores > 1 else None
