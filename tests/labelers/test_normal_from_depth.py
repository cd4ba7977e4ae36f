"""Normals by geometry, against planes and spheres in closed form and against the scenes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fourmill.errors import ConfigError
from fourmill.labelers.normal_from_depth import normals_from_depth
from fourmill.labelers.quality import check
from fourmill.labels import Absent
from fourmill.shards.sources.scenes import render

FOV = 50.0


def rays(shape: tuple[int, int], fov_deg: float = FOV) -> np.ndarray:
    """(H, W, 3): x right, y up, z toward the viewer, with z = -1; pixels are square, the angle is the vertical one."""
    height, width = shape
    tan = math.tan(math.radians(fov_deg) / 2)
    y = tan * (1 - (np.arange(height) + 0.5) / height * 2)
    x = tan * ((np.arange(width) + 0.5) * 2 - width) / height
    return np.stack([*np.meshgrid(x, y), -np.ones(shape)], axis=-1)


def angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((a.astype(np.float64) * b).sum(-1), -1, 1)))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (32, 32)])
@pytest.mark.parametrize(
    "normal",
    [
        (0, 0, 1),
        (0.6, 0, 0.8),
        (-0.6, 0, 0.8),
        (0, 0.6, 0.8),
        (0, -0.6, 0.8),
        (0.48, 0.36, 0.8),
        (0.3, 0.9, 0.1),
    ],
)
def test_planes_are_exact(shape: tuple[int, int], normal: tuple[float, float, float]) -> None:
    n = np.array(normal) / np.linalg.norm(normal)
    facing = rays(shape) @ n  # negative where the plane through (0, 0, -5) is in front
    depth = -5 * n[2] / facing
    seen = (facing < -0.05) & (depth < 50)
    assert seen.mean() > 0.3
    got = normals_from_depth(np.where(seen, depth, 50).astype(np.float32), FOV)
    inner = seen.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(seen, step, axis)
    inner[[0, -1]] = inner[:, [0, -1]] = False
    assert angle_deg(got, n)[inner].max() < 0.1
    if normal == (0, 0, 1):
        assert angle_deg(got, n).max() < 0.1  # up to the rim


def test_a_sphere_in_front_of_a_wall() -> None:
    shape = (96, 128)
    r, centre, radius = rays(shape), np.array([0.3, -0.2, -4.0]), 1.0
    a, b, c = (r * r).sum(-1), r @ centre, centre @ centre - radius**2
    root = b * b - a * c
    hit = root > 0
    depth = np.where(hit, (b - np.sqrt(np.maximum(root, 0))) / a, 7.0)
    truth = np.where(hit[..., None], (r * depth[..., None] - centre) / radius, [0, 0, 1])
    off = angle_deg(normals_from_depth(depth.astype(np.float32), FOV), truth)
    frontal = hit & (root > 0.25 * np.quantile(root[hit], 0.99))
    assert off[frontal].max() < 3 and off[frontal].mean() < 0.5
    assert off[~hit].mean() < 1.5  # the sphere's outline costs a pixel here and there
    assert np.median(off[hit & ~frontal]) < 8


def test_a_step_between_two_walls_tilts_no_pixel() -> None:
    depth = np.full((20, 30), 4, np.float32)
    depth[5:12, 9:22] = 2
    assert angle_deg(normals_from_depth(depth, FOV), np.array([0, 0, 1])).max() < 0.1


def test_scenes_with_their_own_field_of_view() -> None:
    errors = []
    for index in range(6):
        scene = render(1000, index, 128)
        off = angle_deg(normals_from_depth(scene.depth, scene.fov_deg), scene.normal)
        errors.append((np.median(off), off.mean()))
    median, mean = np.mean(errors, axis=0)
    assert median < 0.05 and mean < 1.5


def test_the_labeler(kit: Any) -> None:
    scene = render(1000, 1, 64)
    labeler = kit.labeler("normal_from_depth", fov_deg=scene.fov_deg)
    labeler.load()
    assert labeler.upstream_modalities() == ("depth",) and labeler.checkpoint is None
    upstream = {"depth": [scene.depth, Absent("no depth")]}
    batch = kit.as_batch([scene.image, scene.image.copy()], upstream=upstream)
    labels = labeler.label(batch)
    check(labeler.describe(), labels, batch.frames)
    assert labels[1] == Absent("no depth")
    assert np.median(angle_deg(labels[0], scene.normal)) < 1
    with pytest.raises(ConfigError, match=r"modalities.normal_from_depth.fov_deg: 190 is not between"):
        kit.labeler("normal_from_depth", fov_deg=190)


def test_degenerate_sizes() -> None:
    assert np.allclose(normals_from_depth(np.full((1, 1), 2, np.float32), 60), [[[0, 0, 1]]])
    assert normals_from_depth(np.full((1, 7), 2, np.float32), 60).shape == (1, 7, 3)
