"""A pool of scenes, rendered once and memory-mapped, so that rendering does not dominate training.

The folder is named after what determines its content (scene version, seed, size, count) and put in place whole: an
interrupted rendering leaves nothing behind that looks finished.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fourmill.labels import Boxes
from fourmill.shards.sources.scenes import SCENE_CLASSES, VERSION, render

TRAIN_SEED, HELD_OUT_SEED, HELD_OUT_COUNT = 1000, 2000, 256
CELL_PX = 8
MAX_BOXES = 8


@dataclass(frozen=True, slots=True)
class Pool:
    """N scenes of S x S pixels; arrays may be memory-mapped.

    ``cells`` is the geometry averaged over squares of ``CELL_PX`` pixels: shares of the 5 scene classes, the log of
    the mean depth in metres, and the mean normal.
    """

    image: np.ndarray  # (N, S, S, 3) uint8
    instance: np.ndarray  # (N, S, S) uint8, 0 = none, k = the k-th box
    cells: np.ndarray  # (N, S / 8, S / 8, 9) float16
    boxes: np.ndarray  # (N, MAX_BOXES, 4) float32 x0 y0 x1 y1 in [0, 1], zeros after the last
    box_classes: np.ndarray  # (N, MAX_BOXES) int64, -1 after the last
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def truth_boxes(self) -> list[Boxes]:
        """Each scene's boxes, with score 1."""
        truth = []
        for xyxy, classes in zip(self.boxes, self.box_classes, strict=True):
            here = classes >= 0
            truth.append(Boxes(xyxy[here], classes[here], np.ones(here.sum(), np.float32)))
        return truth

    def first(self, count: int) -> Pool:
        """The first scenes alone."""
        return Pool(
            image=self.image[:count],
            instance=self.instance[:count],
            cells=self.cells[:count],
            boxes=self.boxes[:count],
            box_classes=self.box_classes[:count],
            captions=self.captions[:count],
        )


def open_pool(seed: int, count: int, size: int, cache: Path | None = None) -> Pool:
    """The pool of scenes 0 to ``count`` - 1 of a seed, from ``cache`` (default: the temporary folder) or rendered."""
    root = cache or Path(tempfile.gettempdir()) / "fourmill-scenes"
    folder = root / f"v{VERSION}-seed{seed}-{size}px-{count}"
    if not folder.is_dir():
        _write_pool(folder, seed, count, size)

    def array(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    return Pool(
        image=array("image"),
        instance=array("instance"),
        cells=array("cells"),
        boxes=array("boxes"),
        box_classes=array("box_classes"),
        captions=json.loads((folder / "captions.json").read_text()),
    )


def _write_pool(folder: Path, seed: int, count: int, size: int) -> None:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    grid = size // CELL_PX
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "image": (np.uint8, (size, size, 3)),
        "instance": (np.uint8, (size, size)),
        "cells": (np.float16, (grid, grid, 9)),
        "boxes": (np.float32, (MAX_BOXES, 4)),
        "box_classes": (np.int64, (MAX_BOXES,)),
    }
    arrays = {
        name: np.lib.format.open_memmap(part / f"{name}.npy", "w+", dtype, (count, *shape))
        for name, (dtype, shape) in shapes.items()
    }
    captions, clock = [], Progress("render", count)
    for i in range(count):
        scene = render(seed, i, size)
        arrays["image"][i], arrays["instance"][i] = scene.image, scene.instance
        arrays["cells"][i] = _cells(scene.semseg, scene.depth, scene.normal)
        arrays["boxes"][i, : len(scene.boxes)] = scene.boxes
        arrays["box_classes"][i] = -1
        arrays["box_classes"][i, : len(scene.boxes)] = scene.box_classes
        captions.append(scene.caption)
        clock.tick(i + 1)
    for array in arrays.values():
        array.flush()
    (part / "captions.json").write_text(json.dumps(captions))
    part.rename(folder)


def _cells(semseg: np.ndarray, depth: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Maps (S, S[, C]) to means over the cells (S / 8, S / 8, 9), float32."""
    shares = np.eye(len(SCENE_CLASSES), dtype=np.float32)[semseg]
    stack = np.concatenate([shares, depth[..., None], normal], axis=2)
    grid = semseg.shape[0] // CELL_PX
    means = stack.reshape(grid, CELL_PX, grid, CELL_PX, -1).mean((1, 3))
    means[..., 5] = np.log(means[..., 5])
    return means


@dataclass(slots=True)
class Progress:
    """Prints rate and time left, at most every ten seconds."""

    what: str
    total: float
    say: Callable[[str], None] = print
    started: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def tick(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self.said < 10.0 and done < self.total:
            return
        self.said = now
        spent = now - self.started
        left = spent / max(done, 1e-9) * (self.total - done)
        self.say(
            f"{self.what}: {done:.0f}/{self.total:.0f} {done / spent:.0f}/s, {left:.0f} s left {note}".rstrip()
        )
