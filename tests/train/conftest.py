"""A small snapshot in memory, with the interface of `fourmill.shards.snapshot.Snapshot`."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fourmill.modality import CAPTION, RGB, RGB_PIXELS, LabelContract, Modality
from fourmill.shards.arrow import Column
from fourmill.shards.snapshot import ShardRef
from fourmill.train import presets

FIRST_WORD = 204  # ids below are special tokens and sentinels
SIZE = 64  # of a crop in pixels: 4 x 4 tokens
DEPTH = Modality(name="depth", kind="grid", contract=LabelContract(form="map", dtype="float32"))
GLOBAL = Modality(name="clip_global", kind="vector", contract=LabelContract(form="vector", dtype="float32"))


@dataclass
class FakeSnapshot:
    """Rows spread over shards; every fifth sample is held out for validation."""

    modalities: dict[str, Modality]
    columns: dict[str, list[Column]]
    keys: list[np.ndarray]
    n_crops: int = 1
    digest: str = "f" * 64
    image_size: int = SIZE

    @property
    def shards(self) -> list[ShardRef]:
        return [ShardRef(i, len(keys), {}) for i, keys in enumerate(self.keys)]

    def column(self, shard: int, modality: str) -> Column:
        return self.columns[modality][shard]

    def keys64(self, shard: int) -> np.ndarray:
        return self.keys[shard]

    def in_split(self, shard: int, split: str) -> np.ndarray:
        held_out = np.arange(len(self.keys[shard])) % 5 == 4
        return held_out if split == "val" else ~held_out

    def tokenizer(self, modality: str) -> str | None:
        return None

    def prefetch(self, shards: list[int], modalities: list[str]) -> None:
        """Nothing of it is remote."""

    def split_rows(self, shard: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        return np.flatnonzero(self.in_split(shard, split)).astype(np.int64), self.keys64(shard)

    def split_sizes(self, split: str) -> np.ndarray:
        return np.array([self.in_split(shard, split).sum() for shard in range(len(self.keys))])


def sequence_column(cells: list[np.ndarray], present: np.ndarray, n_crops: int) -> Column:
    """``cells`` by row, then crop."""
    offsets = np.concatenate([[0], np.cumsum([len(c) for c in cells])]).astype(np.int32)
    flat = np.concatenate([np.zeros(0, np.uint16), *cells]).astype(np.uint16)
    return Column(present, _NO_REASONS, n_crops, flat=flat, offsets=offsets)


_NO_REASONS = pa.chunked_array([pa.array([], pa.string())])


def _picture(rng: np.random.Generator) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def make_snapshot(
    rows: int = 60,
    shards: int = 3,
    n_crops: int = 1,
    absent: float = 0.0,
    pixels: bool = False,
    seed: int = 0,
) -> FakeSnapshot:
    """rgb and depth grids of 16 tokens, a vector of 4, captions of 0 to 12 words; all functions of rgb.

    depth = (3 * rgb + 5) mod 16 at the same place; clip_global: the first four tokens of rgb; a caption spells them.
    """
    rng = np.random.default_rng(seed)
    per_shard = rows // shards
    columns: dict[str, list[Column]] = {"rgb": [], "depth": [], "clip_global": [], "caption": []}
    keys = []
    for shard in range(shards):
        rgb = rng.integers(0, 16, (per_shard, n_crops, 16)).astype(np.uint16)
        present = {name: rng.random(per_shard) >= absent for name in (*columns, "rgb_pixels")}
        keys.append(rng.integers(0, 2**63, per_shard).astype(np.uint64) + np.uint64(shard))
        tokens = {"rgb": rgb, "depth": (3 * rgb + 5) % 16, "clip_global": rgb[:, :, :4]}
        for name, values in tokens.items():
            values = np.where(present[name][:, None, None], values, 0).astype(np.uint16)
            columns[name].append(Column(present[name], _NO_REASONS, n_crops, tokens=values))
        lengths = rng.integers(0, 13, per_shard * n_crops)
        flat_rgb = rgb.reshape(-1, 16)
        words = [FIRST_WORD + flat_rgb[i, :n] for i, n in enumerate(lengths)]
        words = [w if present["caption"][i // n_crops] else w[:0] for i, w in enumerate(words)]
        columns["caption"].append(sequence_column(words, present["caption"], n_crops))
        if pixels:
            blobs = pa.array([_picture(rng) for _ in range(per_shard * n_crops)], pa.binary())
            columns.setdefault("rgb_pixels", []).append(
                Column(present["rgb_pixels"], _NO_REASONS, n_crops, blobs=blobs)
            )
    modalities = {
        "rgb": RGB.resolved(vocab_size=16, num_tokens=16),
        "depth": DEPTH.resolved(vocab_size=16, num_tokens=16),
        "clip_global": GLOBAL.resolved(vocab_size=16, num_tokens=4),
        "caption": CAPTION.resolved(vocab_size=FIRST_WORD + 16, num_tokens=14),
    }
    if pixels:
        modalities["rgb_pixels"] = RGB_PIXELS
    return FakeSnapshot(modalities, columns, keys, n_crops)


@pytest.fixture
def snapshot_of() -> Callable[..., Any]:
    """`make_snapshot`: a toy snapshot in memory."""
    return make_snapshot


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a preset that takes milliseconds a step."""
    monkeypatch.setitem(presets.PRESETS, "tiny", presets.Size(64, 1, 1))
    return "tiny"


@pytest.fixture(scope="session")
def toy() -> Callable[..., Any]:
    """`make_snapshot`, for fixtures that live longer than a test."""
    return make_snapshot
