"""Crops: drawn once per sample, applied to every kind of label by its own rule.

A crop is (top, left, height, width, flip) in pixels of the original, orientation-corrected image.
Crop 0 is the centre square and never flipped; the others are random resized crops (4M, section 3.1 of
the supplement: scale 0.8 to 1, aspect 3/4 to 4/3, horizontal flip with probability 0.5).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image

from fourmill.labels import Boxes, Instances, Palettes, Poses
from fourmill.modality import FlipRule, Resample
from fourmill.seeds import generator

SCALE = (0.8, 1.0)
ASPECT = (3 / 4, 4 / 3)
#: Enters the token recipe: change it with any change to what `draw_crops` or the rules below return.
CROP_RULE_VERSION = 1

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def draw_crops(seed: int, key64: int, width: int, height: int, n_crops: int) -> np.ndarray:
    """int32 (n_crops, 5): top, left, height, width, flip; a pure function of its arguments."""
    side = min(width, height)
    crops = [((height - side) // 2, (width - side) // 2, side, side, 0)]
    for index in range(1, n_crops):
        crops.append(_random_crop(generator(seed, "crop", key64, index), width, height))
    return np.array(crops[:n_crops], dtype=np.int32)


def _random_crop(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int, int]:
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # a very wide or tall image: the largest box of a legal aspect
        w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return top, left, h, w, int(rng.random() < 0.5)


def resize_map(
    array: np.ndarray,
    size: tuple[int, int],
    resample: Resample,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize (H, W) or (H, W, C) to ``size`` = (height, width), reading only ``box`` = left, top, right, bottom.

    The dtype stays. Float and integer maps are resized channel by channel; a size and box that change
    nothing return the array itself.
    """
    height, width = array.shape[:2]
    if size == (height, width) and box in (None, (0, 0, width, height)):
        return array
    how = _FILTERS[resample]

    def plane(values: np.ndarray) -> np.ndarray:
        if values.dtype == np.uint8:
            image = Image.fromarray(np.ascontiguousarray(values))
        elif np.issubdtype(values.dtype, np.integer):
            image = Image.fromarray(np.ascontiguousarray(values, dtype=np.int32))
        else:
            image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
        return np.asarray(image.resize((size[1], size[0]), how, box=box))

    if array.ndim == 2 or (array.dtype == np.uint8 and array.shape[2] == 3):
        return plane(array).astype(array.dtype, copy=False)
    planes = [plane(array[:, :, channel]) for channel in range(array.shape[2])]
    return np.stack(planes, axis=-1).astype(array.dtype, copy=False)


def crop_map(
    array: np.ndarray,
    crop: np.ndarray,
    image_size: tuple[int, int],
    out_size: int,
    resample: Resample,
    flip: FlipRule = "mirror",
    unit_norm: bool = False,
) -> np.ndarray:
    """Cut ``crop`` out of a map that covers the whole image, at any resolution of the map.

    ``image_size`` is (height, width) of the original image that the crop's numbers refer to. Returns
    (out_size, out_size[, C]); ``unit_norm`` renormalises vectors that resampling shortened.
    """
    top, left, height, width, flipped = (int(v) for v in crop)
    sy, sx = array.shape[0] / image_size[0], array.shape[1] / image_size[1]
    right, bottom = min((left + width) * sx, array.shape[1]), min((top + height) * sy, array.shape[0])
    out = resize_map(array, (out_size, out_size), resample, box=(left * sx, top * sy, right, bottom))
    if flipped and flip != "none":
        out = out[:, ::-1]
        if flip == "mirror_negate_x":
            out = out * np.array([-1, 1, 1], dtype=out.dtype)
    if unit_norm and np.issubdtype(out.dtype, np.floating):
        out = out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-6).astype(out.dtype)
    return np.ascontiguousarray(out)


def crop_boxes(
    boxes: Boxes, crop: np.ndarray, image_size: tuple[int, int], min_visibility: float = 0.0
) -> Boxes:
    """Boxes of the whole image, as boxes of the crop; those of whose area no more than ``min_visibility`` is left
    (by default nothing) are dropped."""
    whole = _in_crop(boxes.xyxy, crop, image_size)
    xyxy = whole.clip(0.0, 1.0)
    keep = (_area(xyxy) > 0) & (_area(xyxy) > min_visibility * _area(whole))
    return Boxes(xyxy.astype(np.float32), boxes.class_ids, boxes.scores).keep(keep)


def _in_crop(xyxy: np.ndarray, crop: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """float64 (N, 4): boxes of the image in the crop's coordinates, mirrored with it, not cut at its edges."""
    out = _points_in_crop(xyxy.reshape(-1, 2), crop, image_size).reshape(-1, 4)
    return out[:, [2, 1, 0, 3]] if crop[4] else out


def _points_in_crop(xy: np.ndarray, crop: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """float64 (N, 2): like `_in_crop`, of points x, y."""
    top, left, height, width, flipped = (int(v) for v in crop)
    pixels = xy.astype(np.float64) * np.array(image_size[::-1], np.float64)
    out = (pixels - np.array([left, top], np.float64)) / np.array([width, height], np.float64)
    if flipped:
        out[:, 0] = 1 - out[:, 0]
    return out


def _area(xyxy: np.ndarray) -> np.ndarray:
    """Zero where there is nothing, however the corners lie."""
    width, height = (xyxy[:, 2:] - xyxy[:, :2]).clip(0.0).T
    return width * height


# -- palettes -----------------------------------------------------------------------------------------


def draw_palette(palettes: Palettes, rng: np.random.Generator | None) -> Palettes:
    """One of an image's palettes, each as likely; without ``rng`` the last, which is the largest."""
    if len(palettes) <= 1:
        return palettes
    return Palettes((palettes.colours[-1 if rng is None else int(rng.integers(len(palettes)))],))


# -- people -------------------------------------------------------------------------------------------

#: joints of SMPL's body pose that change places in a mirror: hips, knees, ankles, feet, collars, shoulders, elbows,
#: wrists, hands
_MIRRORED_JOINTS = [1, 0, 2, 4, 3, 5, 7, 6, 8, 10, 9, 11, 13, 12, 14, 16, 15, 18, 17, 20, 19, 22, 21]
_MIRROR = np.array([-1, 1, 1], np.float32)
_MIRRORED_ROTATION = _MIRROR[:, None] * _MIRROR


def crop_poses(
    poses: Poses, crop: np.ndarray, image_size: tuple[int, int], rng: np.random.Generator | None = None
) -> Poses:
    """The people of whose box something is in the crop; mirrored bodies where it is mirrored.

    ``rng`` draws the order in which the parts of each person are written. Of a mirrored body the tokens are not known
    any more: its joints must be tokenized again.
    """
    xyxy = _in_crop(poses.xyxy, crop, image_size).clip(0.0, 1.0)
    body = mirror_poses(poses) if crop[4] else poses
    orders = (
        body.orders
        if rng is None
        else np.stack([rng.permutation(4) for _ in range(len(body))] or [body.orders])
    )
    orders = orders.reshape(-1, 4)
    return replace(body, xyxy=xyxy.astype(np.float32), orders=orders).keep(_area(xyxy) > 0)


def mirror_poses(poses: Poses) -> Poses:
    """The bodies that a mirror shows, left joints for right ones; boxes as they were."""
    return replace(
        poses,
        pose_ids=np.full_like(poses.pose_ids, -1),
        body_pose=poses.body_pose[:, _MIRRORED_JOINTS] * _MIRRORED_ROTATION,
        orient=poses.orient * _MIRRORED_ROTATION,
        camera=poses.camera * np.array([1, -1, 1], np.float32),
    )


# -- instances ----------------------------------------------------------------------------------------

#: as a share of the crop: instances with smaller boxes are left out (4M-21)
MIN_INSTANCE_AREA = 0.0005
#: points are pixels of a frame of this size, as the published models know it
INSTANCE_FRAME = 224
NUM_POINTS = 7


def crop_instances(
    instances: Instances,
    crop: np.ndarray,
    image_size: tuple[int, int],
    rng: np.random.Generator | None = None,
) -> Instances:
    """What is left of each instance in the crop, and what is at `NUM_POINTS` random points of it.

    Without ``rng`` the points are a grid of 7 x 7. Of an instance that was cut or mirrored the mask's tokens are not
    known any more.
    """
    whole = _in_crop(instances.xyxy, crop, image_size)
    inside: np.ndarray = np.all((whole >= -1e-9) & (whole <= 1 + 1e-9), axis=1)
    xyxy = whole.clip(0.0, 1.0)
    polygons = [_points_in_crop(polygon, crop, image_size) for polygon in instances.polygons]
    for i in np.flatnonzero(~inside):
        polygons[i] = _clipped(polygons[i])
        if len(polygons[i]):
            xyxy[i] = [*polygons[i].min(0), *polygons[i].max(0)]
        elif len(instances.polygons[i]):
            xyxy[i] = 0.0
    ids = np.where(inside[:, None] & (not crop[4]), instances.mask_ids, -1)
    kept = np.flatnonzero(_area(xyxy) >= MIN_INSTANCE_AREA)
    found = Instances.of(xyxy[kept], [polygons[i] for i in kept], ids[kept])
    pixels = grid_points() if rng is None else rng.integers(INSTANCE_FRAME, size=(NUM_POINTS, 2))
    return ask(found, pixels, rng)


def grid_points() -> np.ndarray:
    """int64 (49, 2): pixels x, y of `INSTANCE_FRAME`, column by column."""
    ticks = np.arange(1, 8) * (INSTANCE_FRAME // 8)
    return np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2)


def ask(instances: Instances, pixels: np.ndarray, rng: np.random.Generator | None = None) -> Instances:
    """The instances at each of ``pixels``, int (Q, 2) of x, y in `INSTANCE_FRAME`; in random order with ``rng``.

    A pixel that comes twice is asked once.
    """
    once = list(dict.fromkeys((int(x), int(y)) for x, y in np.asarray(pixels).reshape(-1, 2)))
    points = np.array(once, np.float64).reshape(-1, 2) / INSTANCE_FRAME
    hits = [
        np.array([i for i, polygon in enumerate(instances.polygons) if _contains(polygon, point)], np.int64)
        for point in points
    ]
    if rng is not None:
        hits = [rng.permutation(hit) for hit in hits]
    return replace(instances, points=points, hits=tuple(hits))


def _contains(polygon: np.ndarray, point: np.ndarray) -> bool:
    """By the even-odd rule; the outline belongs to it."""
    if not len(polygon):
        return False
    a, b = polygon - point, np.roll(polygon, -1, axis=0) - point
    cross = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    if ((np.abs(cross) <= 1e-12) & ((a * b).sum(1) <= 1e-12)).any():
        return True
    crossed = (a[:, 1] > 0) != (b[:, 1] > 0)
    to_the_right = (cross > 0) == (b[:, 1] > a[:, 1])
    return bool((crossed & to_the_right).sum() % 2)


def _clipped(polygon: np.ndarray) -> np.ndarray:
    """What of an outline lies in the unit square (Sutherland and Hodgman 1974); (0, 2) where nothing does."""
    for axis, limit, sign in ((0, 0.0, 1), (0, 1.0, -1), (1, 0.0, 1), (1, 1.0, -1)):
        kept: list[np.ndarray] = []
        for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            inside, stays = (sign * (p[axis] - limit) >= 0 for p in (start, end))
            if inside:
                kept.append(start)
            if inside != stays:
                kept.append(start + (end - start) * (limit - start[axis]) / (end[axis] - start[axis]))
        polygon = np.array(kept).reshape(-1, 2)
    return polygon.clip(0.0, 1.0)
