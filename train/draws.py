"""Random numbers for a whole batch at once, each row's a function of (seed, purpose, key64, visit) alone.

`fourmill.seeds.generator` makes one generator per choice; a batch needs thousands of choices, so here a counter is
mixed directly: word i of a row is mix(key + (i + 1) * odd constant), which is SplitMix64 (Steele et al. 2014) at an
arbitrary place, with a key that is itself a mix of seed, purpose, key64 and visit. A row's numbers depend neither on
the other rows of the batch nor on how many numbers anybody drew before. `fourmill.train.kernel` draws the same ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.special import gammaincinv

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
VISIT = np.uint64(0xD1B54A32D192ED03)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
TO_UNIT = 2.0**-32


def mix(values: np.ndarray) -> np.ndarray:
    """A bijective 64-bit mixer whose low bits depend on every input bit (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def purpose_key(seed: int, purpose: str) -> int:
    """64 bits that stand for a purpose of a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Draws:
    """A source of numbers for B rows. ``key64`` uint64 (B,), ``visit`` int64 (B,): how often a row was seen before."""

    seed: int
    key64: np.ndarray
    visit: np.ndarray

    def __len__(self) -> int:
        return len(self.key64)

    def rows(self, index: np.ndarray) -> Draws:
        """The same numbers for the rows that ``index`` selects."""
        return replace(self, key64=self.key64[index], visit=self.visit[index])

    def words(self, purpose: str, count: int, start: int = 0) -> np.ndarray:
        """uint64 (B, count): uniform words ``start .. start + count`` of each row for one purpose."""
        base = mix(mix(self.key64) + self.visit.astype(np.uint64) * VISIT)
        key = mix(base ^ np.uint64(purpose_key(self.seed, purpose)))
        return mix(key[:, None] + np.arange(start + 1, start + count + 1, dtype=np.uint64) * GOLDEN)

    def halves(self, purpose: str, count: int, start: int = 0) -> np.ndarray:
        """uint64 (B, count), of 32 bits each: the upper and the lower half of one word after the other, from ``start`` on."""
        words = self.words(purpose, (count + 1) // 2, start)
        return np.stack([words >> _HALF, words & _LOW], axis=-1).reshape(len(self), -1)[:, :count]

    def uniform(self, purpose: str, count: int) -> np.ndarray:
        """float64 (B, count) strictly inside (0, 1)."""
        return to_unit(self.words(purpose, count) >> _HALF)

    def integers(self, purpose: str, high: np.ndarray | int) -> np.ndarray:
        """int64 (B,): uniform on 0 .. high - 1 (``high`` at least 1 and below 2**32, per row or for all)."""
        return below(self.words(purpose, 1)[:, 0] >> _HALF, high)

    def permutations(self, purpose: str, count: int, depth: int | None = None) -> np.ndarray:
        """int64 (B, count): a permutation of 0 .. count - 1 per row, uniform in its first ``depth`` (None: all) places.

        Fisher and Yates's shuffle, stopped early: place i is exchanged with one that is not before it.
        """
        depth = count if depth is None else min(depth, count)
        order = np.tile(np.arange(count), (len(self), 1))
        halves = self.halves(purpose, depth)
        rows = np.arange(len(self))
        for place in range(depth):
            other = place + below(halves[:, place], count - place)
            chosen = order[rows, other]
            order[rows, other] = order[:, place]
            order[:, place] = chosen
        return order


def to_unit(halves: np.ndarray) -> np.ndarray:
    """float64 strictly inside (0, 1), of words of 32 bits."""
    unit: np.ndarray = (halves + 0.5) * TO_UNIT
    return unit


def below(halves: np.ndarray, high: np.ndarray | int) -> np.ndarray:
    """int64 on 0 .. high - 1, of words of 32 bits: high * word / 2**32."""
    return ((halves * np.asarray(high).astype(np.uint64)) >> _HALF).astype(np.int64)


class LogGamma:
    """Logarithms of Gamma(alpha) variables by inversion, for a fixed set of alphas.

    Gamma(a) = Gamma(a + 1) * U^(1/a), so that alphas of 0.01 do not underflow; the quantiles of Gamma(a + 1) come
    from a table with linear interpolation between 4,096 points. Alpha 0 gives -inf: never.
    """

    POINTS = 4096

    def __init__(self, alphas: np.ndarray) -> None:
        """``alphas`` float64, any shape: rows of indices into its flattened form are given to `sample`."""
        self.alphas = np.asarray(alphas, np.float64).reshape(-1)
        values, self.table_of = np.unique(self.alphas, return_inverse=True)
        self.tables = np.stack([_quantiles(float(value), self.POINTS) for value in values])

    def sample(self, index: np.ndarray, words: np.ndarray) -> np.ndarray:
        """float64 (...): log Gamma(alphas[index]), of one uint64 word each."""
        scaled = to_unit(words >> _HALF) * self.POINTS
        cell = scaled.astype(np.int64)
        table = self.table_of[index]
        low, high = self.tables[table, cell], self.tables[table, cell + 1]
        alpha = self.alphas[index]
        boost = np.log(to_unit(words & _LOW)) / np.where(alpha > 0, alpha, 1.0)
        return np.where(alpha > 0, low + (scaled - cell) * (high - low) + boost, -np.inf)


@lru_cache(64)
def _quantiles(alpha: float, points: int) -> np.ndarray:
    """float64 (points + 1,): logarithms of the quantiles of Gamma(alpha + 1). Takes milliseconds, so it is kept."""
    grid = (np.arange(points + 1) / points).clip(0.25 / points, 1 - 0.25 / points)
    return np.asarray(np.log(gammaincinv(alpha + 1, grid)))
