"""The order in which training sees its samples: one deterministic sequence, whatever the workers and ranks.

Each epoch visits every sample exactly once, in an order that is a closed-form function of (seed, epoch): a
Feistel network with cycle walking (Black and Rogaway 2002). Any position is computed directly, so nothing is stored
and a resumed run starts at once; and integer arithmetic cannot change with a library's version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Position:
    """What was delivered so far: ``epoch`` whole epochs and ``position`` samples of the next one."""

    epoch: int
    position: int


class SampleOrder:
    """The endless sequence of training samples: epoch after epoch, numbered 0, 1, 2, ..."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)

    def position(self, delivered: int) -> Position:
        """The state after ``delivered`` samples."""
        return Position(*divmod(delivered, self.num_samples))

    def delivered(self, position: Position) -> int:
        """The inverse of `position`."""
        return position.epoch * self.num_samples + position.position

    def samples(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples ``start .. start + count`` of the sequence: their indices and epochs, both int64 (count,).

        A batch may reach over the end of an epoch; the epoch is how often the sample was visited before.
        """
        numbers = np.arange(start, start + count, dtype=np.int64)
        epochs, places = np.divmod(numbers, self.num_samples)
        indices = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permute(places[here], int(epoch))
        return indices, epochs

    def _permute(self, places: np.ndarray, epoch: int) -> np.ndarray:
        keys = self._round_keys(epoch)
        out = self._feistel(places.astype(np.uint64), keys)
        outside = out >= self.num_samples
        while outside.any():  # the network permutes a power of four; walk the cycle until inside
            out[outside] = self._feistel(out[outside], keys)
            outside = out >= self.num_samples
        return out.astype(np.int64)

    def _round_keys(self, epoch: int) -> np.ndarray:
        text = f"{self.seed}/order/{epoch}".encode()
        digests = [hashlib.blake2b(text, digest_size=64, salt=bytes([part])).digest() for part in range(2)]
        return np.frombuffer(b"".join(digests), np.uint64)[:_ROUNDS]

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijective 64-bit mixer whose low bits depend on every input bit (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
