"""Crops: drawn once per sample, applied to every kind of label by its own rule.

A crop is (top, left, height, width, flip) in pixels of the original, orientation-corrected image.
Crop 0 is the centre square and never flipped; the others are random resized crops (4M, section 3.1 of
the supplement: scale 0.8 to 1, aspect 3/4 to 4/3, horizontal flip with probability 0.5).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from fourmill.labels import Boxes
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


def crop_boxes(boxes: Boxes, crop: np.ndarray, image_size: tuple[int, int]) -> Boxes:
    """Boxes of the whole image, as boxes of the crop; those with no area left are dropped."""
    top, left, height, width, flipped = (int(v) for v in crop)
    scale = np.array([image_size[1], image_size[0]] * 2, dtype=np.float64)
    origin = np.array([left, top] * 2, dtype=np.float64)
    extent = np.array([width, height] * 2, dtype=np.float64)
    xyxy = np.clip((boxes.xyxy.astype(np.float64) * scale - origin) / extent, 0.0, 1.0)
    if flipped:
        xyxy = np.stack([1 - xyxy[:, 2], xyxy[:, 1], 1 - xyxy[:, 0], xyxy[:, 3]], axis=1)
    keep = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
    return Boxes(xyxy.astype(np.float32), boxes.class_ids, boxes.scores).keep(keep)
