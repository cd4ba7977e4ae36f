"""Labels of text-like modalities for tests: made up, and compared."""

from __future__ import annotations

from typing import Any

import numpy as np

from fourmill.crops import INSTANCE_FRAME, ask
from fourmill.labels import Instances, Poses, parts_of
from fourmill.modality import LabelContract, Modality


def modality(form: Any) -> Modality:
    return Modality(name=form, kind="sequence", codec=form, contract=LabelContract(form=form, dtype=""))


def same(a: Any, b: Any) -> bool:
    return len(parts_of(a)) == len(parts_of(b)) and all(
        np.array_equal(x, y, equal_nan=isinstance(x, np.ndarray) and x.dtype.kind == "f")
        for x, y in zip(parts_of(a), parts_of(b), strict=True)
    )


def some_poses(rng: np.random.Generator, count: int) -> Poses:
    corner = rng.uniform(0, 0.8, (count, 2))
    return Poses.of(
        np.concatenate([corner, corner + rng.uniform(0.01, 0.2, (count, 2))], axis=1),
        pose_ids=rng.integers(0, 1024, (count, 8)),
        orient=rng.uniform(-1, 1, (count, 3, 3)),
        betas=rng.uniform(-3, 3, (count, 10)),
        camera=rng.uniform(-1, 19, (count, 3)),
        orders=[rng.permutation(4) for _ in range(count)],
    )


def some_instances(rng: np.random.Generator, count: int) -> Instances:
    """Triangles in their boxes, and points at the corners of a few."""
    outlines = rng.uniform(0, 1, (count, 3, 2))
    boxes = np.concatenate([outlines.min(1), outlines.max(1)], axis=1).reshape(-1, 4)
    label = Instances.of(boxes, outlines, rng.integers(0, 1024, (count, 16)))
    return ask(label, rng.integers(0, INSTANCE_FRAME, (7, 2)))


def triangle(*xy: tuple[float, float], ids: int = 3) -> Instances:
    outline = np.array(xy)
    return Instances.of([[*outline.min(0), *outline.max(0)]], [outline], np.full((1, 16), ids))
