"""Random numbers for a whole batch at once, each row's a function of (seed, purpose, key64, visit) alone.

`fourmill.seeds.generator` makes one generator per choice; a batch needs thousands of choices, so here the
counter-based generator itself (Philox4x32-10, Salmon et al. 2011) is evaluated as array arithmetic. A row's
numbers do not depend on the other rows of the batch, nor on how many numbers anybody drew before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammaincinv

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four 32-bit outputs (as uint64 arrays) for four 32-bit counters (uint64 arrays, broadcast) and a key."""
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = (product1 >> _HALF) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


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

    def words(self, purpose: str, count: int) -> np.ndarray:
        """uint32 (B, count): ``count`` uniform words per row for one purpose."""
        digest = hashlib.blake2b(f"{self.seed}/{purpose}".encode(), digest_size=8).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        blocks = np.arange((count + 3) // 4, dtype=np.uint64)[None, :]
        visit = self.visit.astype(np.uint64)[:, None] & _LOW
        low, high = (self.key64 & _LOW)[:, None], (self.key64 >> _HALF)[:, None]
        out = np.stack(philox4x32((blocks, visit, low, high), key), axis=-1)
        return out.astype(np.uint32).reshape(len(self), -1)[:, :count]

    def uniform(self, purpose: str, count: int) -> np.ndarray:
        """float64 (B, count) strictly inside (0, 1)."""
        return (self.words(purpose, count) + 0.5) * 2.0**-32

    def integers(self, purpose: str, high: np.ndarray | int) -> np.ndarray:
        """int64 (B,): uniform on 0 .. high - 1 (``high`` at least 1, per row or for all)."""
        return np.floor(self.uniform(purpose, 1)[:, 0] * high).astype(np.int64)

    def permutations(self, purpose: str, count: int) -> np.ndarray:
        """int64 (B, count): a uniform random permutation of 0 .. count - 1 per row.

        The position is packed into the low bits of a random word and the words are sorted: sorting integers
        is several times faster than argsort.
        """
        bits = max(count - 1, 1).bit_length()
        mask = np.uint32((1 << bits) - 1)
        packed = (self.words(purpose, count) & ~mask) | np.arange(count, dtype=np.uint32)
        packed.sort(axis=1)
        return (packed & mask).astype(np.int64)


class LogGamma:
    """Logarithms of Gamma(alpha) variables by inversion, for a fixed set of alphas.

    Gamma(a) = Gamma(a + 1) * U^(1/a), so that alphas of 0.01 do not underflow; the quantiles of Gamma(a + 1) come
    from a table with linear interpolation between 4,096 points. Alpha 0 gives -inf: never.
    """

    _POINTS = 4096

    def __init__(self, alphas: np.ndarray) -> None:
        """``alphas`` float64, any shape: rows of indices into its flattened form are given to `sample`."""
        self.alphas = np.asarray(alphas, np.float64).reshape(-1)
        values, self._table_of = np.unique(self.alphas, return_inverse=True)
        grid = (np.arange(self._POINTS + 1) / self._POINTS).clip(0.25 / self._POINTS, 1 - 0.25 / self._POINTS)
        self._tables = np.log(np.stack([gammaincinv(value + 1, grid) for value in values]))

    def sample(self, index: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """float64 (...): log Gamma(alphas[index]); ``uniforms`` (..., 2) in (0, 1)."""
        scaled = uniforms[..., 0] * self._POINTS
        cell = scaled.astype(np.int64)
        table = self._table_of[index]
        low, high = self._tables[table, cell], self._tables[table, cell + 1]
        alpha = self.alphas[index]
        boost = np.log(uniforms[..., 1]) / np.where(alpha > 0, alpha, 1.0)
        return np.where(alpha > 0, low + (scaled - cell) * (high - low) + boost, -np.inf)
