"""Every random choice is a function of (dataset seed, sample key, purpose).

The generator is NumPy's counter-based Philox, keyed by a hash, so that a choice does not depend
on what was drawn before, on which machine, or in which order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def key64(key: str) -> int:
    """The 64-bit hash of a sample's key (unsigned), by which it is known to every random choice."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def keys_digest(keys: Iterable[str]) -> str:
    """sha256 (hex) over the ordered keys of a shard: proves that two columns have the same rows."""
    digest = hashlib.sha256()
    for key in keys:
        raw = key.encode()
        digest.update(len(raw).to_bytes(4, "little"))
        digest.update(raw)
    return digest.hexdigest()


def generator(seed: int, purpose: str, *path: int) -> np.random.Generator:
    """A generator for one choice: ``purpose`` names it, ``path`` holds key64, epoch or shard numbers."""
    text = f"{seed}/{purpose}/{'/'.join(str(part) for part in path)}"
    words = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def split_of(seed: int, key: int, val_fraction: float) -> str:
    """``"val"`` or ``"train"`` for a sample, by its key64."""
    return "val" if generator(seed, "split", key).random() < val_fraction else "train"
