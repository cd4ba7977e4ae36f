"""Compiling: the decorator of the kernel's functions, and the random numbers that they draw (as `Draws` does).

Compiled code is kept between processes, in a folder that is named by the sources it was made of: what numba itself keeps
beside a file is not renewed when another file changes that the code was inlined from.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, njit

from fourmill.shards.receipt_cache import cache_folder
from fourmill.train.draws import GOLDEN, TO_UNIT, LogGamma

_log = logging.getLogger("fourmill.train")

HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_ONE, _POINTS = np.uint64(1), LogGamma.POINTS
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code that holds no lock; it is compiled when it is first called."""
    folder = _folder()
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder or "")
    try:
        return njit(nogil=True, cache=folder is not None, error_model="numpy")(function)
    finally:
        config.CACHE_DIR = before


@cache
def _folder() -> Path | None:
    """None where this machine has no place for it: the code is then compiled in each process."""
    sources = sorted(Path(__file__).resolve().parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    folder = cache_folder() / "compiled" / digest[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.warning("compiled code cannot be kept, every process compiles for itself: %s", error)
        return None
    return folder


@compiled
def mix(value):
    value = (value ^ (value >> _S30)) * _M1
    value = (value ^ (value >> _S27)) * _M2
    return value ^ (value >> _S31)


@compiled
def word_at(key, number):
    return mix(key + (np.uint64(number) + _ONE) * GOLDEN)


@compiled
def first_half(base, purpose):
    """The upper half of a purpose's first word."""
    return word_at(mix(base ^ purpose), 0) >> HALF


@compiled
def half_at(key, number):
    word = word_at(key, number >> 1)
    return word & LOW if number & 1 else word >> HALF


@compiled
def unit_of(half):
    return (np.float64(half) + 0.5) * TO_UNIT


@compiled
def below(half, high):
    return np.int64((half * np.uint64(high)) >> HALF)


@compiled
def log_gamma(alpha, tables, table, word):
    if alpha <= 0.0:
        return -np.inf
    scaled = unit_of(word >> HALF) * _POINTS
    cell = np.int64(scaled)
    low, high = tables[table, cell], tables[table, cell + 1]
    return low + (scaled - cell) * (high - low) + math.log(unit_of(word & LOW)) / alpha


@compiled
def shuffle(key, width, depth, order):
    """A permutation of ``width`` places that is random in its first ``depth`` ones."""
    for i in range(width):
        order[i] = i
    for i in range(0, depth, 2):
        word = word_at(key, i >> 1)
        other = i + below(word >> HALF, width - i)
        chosen = order[other]
        order[other] = order[i]
        order[i] = chosen
        if i + 1 < depth:
            other = i + 1 + below(word & LOW, width - i - 1)
            chosen = order[other]
            order[other] = order[i + 1]
            order[i + 1] = chosen
