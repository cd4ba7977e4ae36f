"""Labelers and a codec that cost next to nothing, for `engine.py`; an entry point brings them into every process.

Each notes when it begins a batch where its option ``trace`` names a folder: from the first of these notes a run is
timed, so that starting processes and loading networks count on no side.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fourmill.flows.micro_batch import TEST_KEY
from fourmill.labelers.base import LabelBatch, Labeler, labelers
from fourmill.labelers.depth import Depth
from fourmill.labels import Label
from fourmill.modality import LabelContract, Modality
from fourmill.tokenize.base import Codec, Value, check_made_for, codecs, read_config

SIDE = 16
NUM_TOKENS = SIDE * SIDE  # of a trivial modality: as many as an image of 256 pixels has patches
WAIT_S = 0.020  # per image, of a network that only waits
TRIVIAL = tuple(f"bench_trivial_{i}" for i in range(5))
WAITING = ("bench_wait_0", "bench_wait_1")


def note(folder: str, batch: LabelBatch) -> None:
    """A line in this process's own file: when, and how many rows. Not of the image that the engine tries labelers on."""
    if folder and TEST_KEY not in batch.keys:
        with open(Path(folder) / str(os.getpid()), "a") as stream:
            stream.write(f"{time.time()} {len(batch)}\n")


def notes(folder: Path) -> list[tuple[float, int]]:
    """What all processes noted, in order: seconds since the epoch, rows."""
    lines = [line.split() for path in folder.iterdir() for line in path.read_text().splitlines()]
    return sorted((float(when), int(rows)) for when, rows in lines)


def _modality(name: str) -> Modality:
    contract = LabelContract(form="vector", dtype="float32", channels=NUM_TOKENS, low=0.0, high=255.0)
    return Modality(name=name, kind="vector", codec="bench_round", contract=contract, doc="for benchmarks")


class _Trivial(Labeler):
    """float32 (256,): a weighted sum of the channels on a grid of 16 x 16 pixels."""

    options: ClassVar[Mapping[str, Any]] = {"trace": ""}

    def label(self, batch: LabelBatch) -> list[Label]:
        note(self.params["trace"], batch)
        weights = np.roll(np.array([0.5, 0.3, 0.2], np.float32), TRIVIAL.index(self.modality.name))
        return [_sampled(frame) @ weights for frame in batch.frames]


class _Waiting(Labeler):
    """As a GPU would, while the CPU is free: 20 ms per image, whatever is in it."""

    options: ClassVar[Mapping[str, Any]] = {"trace": ""}

    def label(self, batch: LabelBatch) -> list[Label]:
        note(self.params["trace"], batch)
        time.sleep(WAIT_S * len(batch))
        return [np.zeros(NUM_TOKENS, np.float32) for _ in batch.frames]


def _sampled(frame: np.ndarray) -> np.ndarray:
    """float32 (256, 3) of uint8 (H, W, 3)"""
    rows, columns = ((np.arange(SIDE) + 0.5) * size / SIDE for size in frame.shape[:2])
    return frame[rows.astype(int)[:, None], columns.astype(int)].reshape(-1, 3).astype(np.float32)


for _base, _names in ((_Trivial, TRIVIAL), (_Waiting, WAITING)):
    for _name in _names:
        labelers.register(_name)(type(_name, (_base,), {"modality": _modality(_name)}))


@labelers.register("bench_depth")
class TracedDepth(Depth):
    """The depth network that ships, and a note when it begins."""

    options: ClassVar[Mapping[str, Any]] = {**Depth.options, "trace": ""}

    def label(self, batch: LabelBatch) -> list[Label]:
        note(self.params["trace"], batch)
        return super().label(batch)


@codecs.register("bench_round")
class RoundCodec(Codec):
    """float32 (256,) in [0, 255] <-> uint16 (256,). Nothing is fitted."""

    family = "bench_round"

    def __init__(self, modality: Modality, image_size: int) -> None:
        self.image_size = image_size
        self.modality = modality.resolved(vocab_size=256, num_tokens=NUM_TOKENS)

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return list(np.rint(np.stack(labels)).astype(np.uint16)) if len(labels) else []

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [np.asarray(value).astype(np.float32) for value in values]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        config = {"family": self.family, "modality": self.modality.name, "image_size": self.image_size}
        (folder / "config.json").write_text(json.dumps(config))

    @classmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> RoundCodec:
        check_made_for(folder, read_config(folder), modality, image_size)
        return cls(modality, image_size)
