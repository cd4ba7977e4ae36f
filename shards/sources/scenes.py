"""Scenes: a small world of rendered rooms with exact ground truth, so that every link of the chain can be measured.

`render(seed, index, size)` is a pure function: the scene is drawn from (seed, index) alone, and the size changes the
rasterisation only. Version 1 stays bit-identical for ever; the tests hold golden digests. About 150 images/s on one
core at 128 px.

Conventions: camera space is x right, y up, z towards the viewer. Boxes are x0, y0, x1, y1 in [0, 1] with pixel-edge
coordinates: a box around exactly the first pixel of S is (0, 0, 1/S, 1/S). The truth is that of the ray through each
pixel's centre; the image is the same, anti-aliased along the outlines.
"""

import math
from dataclasses import dataclass

import numpy as np

from fourmill.shards.sources.scene_caption import describe
from fourmill.shards.sources.scene_geometry import (
    FIRST_ITEM,
    FLOOR,
    Hits,
    cast,
    grid_rays,
    list_rays,
    shade,
)
from fourmill.shards.sources.scene_layout import KINDS, VERSION, Layout, draw_layout

__all__ = ["DET_CLASSES", "SCENE_CLASSES", "VERSION", "Scene", "render"]

SCENE_CLASSES = ("floor", "wall", "sphere", "box", "cylinder")  # semantic ids 0 to 4
DET_CLASSES = KINDS  # ids 0 to 2: the semantic id less 2

MIN_VISIBLE_SHARE = 0.002  # of the image; an object with fewer visible pixels gets no box and no mention
MIN_VISIBLE_PX = 10
_SUBPIXELS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))


@dataclass(frozen=True, slots=True)
class Scene:
    """One image of S x S pixels with its truth."""

    image: np.ndarray  # (S, S, 3) uint8, RGB
    depth: np.ndarray  # (S, S) float32, metres along the optical axis (not along the ray), about 0.5 to 15
    normal: np.ndarray  # (S, S, 3) float32, unit, camera space
    semseg: np.ndarray  # (S, S) uint8, index into SCENE_CLASSES
    instance: np.ndarray  # (S, S) uint8, 0 = none, k = the k-th of `boxes`
    boxes: np.ndarray  # (N, 4) float32, x0 y0 x1 y1 in [0, 1], tight around the visible pixels
    box_classes: np.ndarray  # (N,) uint8, index into DET_CLASSES
    caption: str
    focal_px: float  # the principal point is the middle of the image
    fov_deg: float  # horizontal and vertical


def render(seed: int, index: int, size: int) -> Scene:
    """The `index`-th scene of a seed, `size` pixels wide and high."""
    if size < 8:
        raise ValueError(f"size is {size}; a scene needs at least 8 pixels")
    layout = draw_layout(seed, index)
    rays = grid_rays(layout.camera, size)
    hits = cast(layout, rays, size)
    image = shade(layout, rays, hits, size)
    _smooth_outlines(layout, hits, image, size)
    semseg, owner = _semantics(layout, hits.surface)
    instance, boxes, classes, seen = _objects(layout, owner, size)
    return Scene(
        image=_quantise(image),
        depth=hits.depth.astype(np.float32),
        normal=_camera_normals(layout, hits),
        semseg=semseg,
        instance=instance,
        boxes=boxes,
        box_classes=classes,
        caption=describe(layout, seen, seed, index),
        focal_px=size / 2.0 / layout.camera.tan_half_fov,
        fov_deg=round(math.degrees(2.0 * math.atan(layout.camera.tan_half_fov)), 6),
    )


def _smooth_outlines(layout: Layout, hits: Hits, image: np.ndarray, size: int) -> None:
    """Replaces, in place, the colours of pixels on an outline by the mean of four rays each."""
    parts = hits.surface.astype(np.uint16) * 2 + hits.lit
    edge = np.zeros(parts.shape, bool)
    across, down = parts[:, 1:] != parts[:, :-1], parts[1:] != parts[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    rows, columns = np.nonzero(edge)
    px = np.concatenate([columns + (0.5 + dx) for dx, _ in _SUBPIXELS])
    py = np.concatenate([rows + (0.5 + dy) for _, dy in _SUBPIXELS])
    rays = list_rays(layout.camera, size, px, py)
    samples = np.clip(shade(layout, rays, cast(layout, rays, size), size), 0.0, 1.0).reshape(3, 4, -1)
    a, b, c, d = samples[:, 0], samples[:, 1], samples[:, 2], samples[:, 3]
    image[:, rows, columns] = ((a + b) + (c + d)) * np.float32(0.25)


def _quantise(image: np.ndarray) -> np.ndarray:
    """(3, S, S) float32 of 0 to 1, or more where overexposed, to (S, S, 3) uint8."""
    levels = np.minimum(image, np.float32(1.0)) * np.float32(255.0) + np.float32(0.5)
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 0))


def _semantics(layout: Layout, surface: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Semantic ids, and by pixel the object (its place in the layout plus one) or 0; both (S, S) uint8."""
    semantic, owner = np.ones(256, np.uint8), np.zeros(256, np.uint8)
    semantic[FLOOR] = 0
    for k, item in enumerate(layout.items):
        faces = slice(FIRST_ITEM + 4 * k, FIRST_ITEM + 4 * k + 4)
        semantic[faces] = SCENE_CLASSES.index(item.kind)
        owner[faces] = k + 1
    return semantic[surface], owner[surface]


def _objects(
    layout: Layout, owner: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Instance map, boxes and classes of the objects that are visible enough, and their places in the layout."""
    visible_px = np.bincount(owner.ravel(), minlength=len(layout.items) + 1)
    least = max(MIN_VISIBLE_PX, MIN_VISIBLE_SHARE * size * size)
    seen = [k for k in range(len(layout.items)) if visible_px[k + 1] >= least]
    number = np.zeros(len(layout.items) + 1, np.uint8)
    boxes = np.zeros((len(seen), 4), np.float32)
    for place, k in enumerate(seen):
        number[k + 1] = place + 1
        mask = owner == k + 1
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        boxes[place] = edges / size
    classes = np.array([DET_CLASSES.index(layout.items[k].kind) for k in seen], np.uint8)
    return number[owner], boxes, classes, seen


def _camera_normals(layout: Layout, hits: Hits) -> np.ndarray:
    """World normals in camera space, (S, S, 3) float32."""
    sin, cos = layout.camera.sin_pitch, layout.camera.cos_pitch
    normal = np.empty((*hits.depth.shape, 3), np.float32)
    normal[..., 0] = hits.nx
    normal[..., 1] = hits.ny * cos + hits.nz * sin
    normal[..., 2] = hits.ny * sin - hits.nz * cos
    return normal
