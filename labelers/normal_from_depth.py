"""Surface normals by geometry from metric depth: no network, and a check on the one that has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fourmill.errors import ConfigError
from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, register
from fourmill.labelers.card import Card
from fourmill.labelers.normal import NORMAL
from fourmill.labels import Absent, Label
from fourmill.modality import Modality

#: A second difference of inverse depth above this part of it is an edge between two surfaces.
EDGE = 0.01


@register("normal_from_depth")
class NormalFromDepth(Labeler):
    """float32 (H, W, 3) unit vectors from the label "depth", which should be metric.

    Pixels are back-projected through a pinhole with a vertical field of view of ``fov_deg`` degrees and the
    principal point in the centre; the normal is the cross product of the surface's tangents. Photographs rarely say
    their field of view: with a wrong one, slanted surfaces tilt, fronto-parallel ones do not.
    """

    modality: ClassVar[Modality] = NORMAL
    card: ClassVar[Card | None] = Card(
        expects="the label `depth`, in metres; of relative depth the normals are bent",
        note="no weights: its labels are as free as those of `depth`. 4M used a network (see the card of `normal`)",
    )
    inputs: ClassVar[tuple[str, ...]] = ("label:depth",)
    options: ClassVar[Mapping[str, Any]] = {"fov_deg": 60.0}

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        check_field_of_view(self.params["fov_deg"], self.where)

    def label(self, batch: LabelBatch) -> list[Label]:
        fov_deg = float(self.params["fov_deg"])
        return [
            depth if isinstance(depth, Absent) else normals_from_depth(depth, fov_deg)
            for depth in batch.upstream["depth"]
        ]


def check_field_of_view(fov_deg: Any, where: str) -> None:
    if not 1 <= float(fov_deg) <= 170:
        raise ConfigError(f"{where}.fov_deg: {fov_deg} is not between 1 and 170 degrees")


def normals_from_depth(depth: np.ndarray, fov_deg: float) -> np.ndarray:
    """z-depth float (H, W), > 0 -> float32 (H, W, 3): x right, y up, z toward the viewer.

    A plane a x + b y + c z = 1 (x right, y down, z away) has the inverse depth a u + b v + c at the ray (u, v, 1):
    affine, so its differences are exact on planes and tell edges from slopes. Solved for (a, b, c) per pixel.
    """
    height, width = depth.shape
    focal = height / 2 / math.tan(math.radians(fov_deg) / 2)  # pixels
    inverse = 1 / np.maximum(depth.astype(np.float64), 1e-6)
    u = (np.arange(width) + 0.5 - width / 2) / focal
    v = (np.arange(height) + 0.5 - height / 2)[:, None] / focal
    du, dv = _slope(inverse, axis=1) * focal, _slope(inverse, axis=0) * focal
    away = np.stack([du, dv, inverse - u * du - v * dv], axis=-1)
    normal = away * np.array([-1.0, 1.0, 1.0])  # turned toward the viewer, with y up and z toward the viewer
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    return normal.astype(np.float32)


def _slope(values: np.ndarray, axis: int) -> np.ndarray:
    """Central difference per pixel; at an edge, the smaller of the forward and the backward one."""
    if values.shape[axis] < 2:
        return np.zeros_like(values)
    steps = np.diff(values, axis=axis)
    first, last = np.take(steps, [0], axis=axis), np.take(steps, [-1], axis=axis)
    forward, backward = np.concatenate([steps, last], axis), np.concatenate([first, steps], axis)
    smaller = np.where(np.abs(forward) < np.abs(backward), forward, backward)
    edge = np.abs(forward - backward) > EDGE * values
    return np.where(edge, smaller, (forward + backward) / 2)
