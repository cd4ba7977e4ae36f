"""Frames of any size on one fixed square, and what a network finds there back on the frame.

A network always sees (B, R, R, 3): the frame is scaled so that its longer side is R, centred, and
the rest is filled with a flat colour. One shape for every batch is what makes a row's label depend on
its own pixels alone. Coordinates are those of pixel *edges* throughout (half-pixel correct): a frame
pixel i covers [i, i + 1], so a map of any resolution covers exactly the same square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a frame lies on the canvas: ``frame`` is its (H, W), the rest are canvas pixels."""

    side: int
    frame: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


def place(frame: tuple[int, int], side: int) -> Placement:
    """The placement of an (H, W) frame on a square of ``side`` pixels; a thin side keeps one pixel."""
    scale = side / max(frame)
    height, width = (max(1, min(side, round(extent * scale))) for extent in frame)
    return Placement(side, frame, (side - height) // 2, (side - width) // 2, height, width)


def letterbox(
    frames: Sequence[np.ndarray], side: int, fill: tuple[int, int, int] = (0, 0, 0)
) -> tuple[np.ndarray, list[Placement]]:
    """uint8 (H, W, 3) frames -> uint8 (B, side, side, 3) and their placements.

    Resizing is Pillow's bicubic, antialiased when it shrinks; a side that already fits is not resampled.
    """
    canvas = np.empty((len(frames), side, side, 3), np.uint8)
    canvas[:] = fill
    placements = []
    for row, frame in zip(canvas, frames, strict=True):
        at = place((frame.shape[0], frame.shape[1]), side)
        row[at.top : at.top + at.height, at.left : at.left + at.width] = _resize(frame, at)
        placements.append(at)
    return canvas, placements


def _resize(frame: np.ndarray, at: Placement) -> np.ndarray:
    if (at.height, at.width) == at.frame:
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((at.width, at.height), Image.Resampling.BICUBIC))


def letterbox_on(
    device: torch.device | str,
    frames: Sequence[np.ndarray],
    side: int,
    fill: tuple[int, int, int] = (0, 0, 0),
) -> tuple[torch.Tensor, list[Placement]]:
    """`letterbox` on a device: uint8 (B, 3, side, side). Where it resamples, some values are off by one level, few by two."""
    import torch
    import torch.nn.functional as F

    colour = torch.tensor(fill, dtype=torch.uint8, device=device).view(1, 3, 1, 1)
    canvas = colour.repeat(len(frames), 1, side, side)
    placements = [place((frame.shape[0], frame.shape[1]), side) for frame in frames]
    for at in dict.fromkeys(placements):  # frames of one size together
        rows = [row for row, other in enumerate(placements) if other == at]
        pixels = torch.from_numpy(np.stack([frames[row] for row in rows])).to(device).permute(0, 3, 1, 2)
        size = (at.height, at.width)
        if size != at.frame:
            smooth = F.interpolate(pixels.float(), size, mode="bicubic", align_corners=False, antialias=True)
            pixels = smooth.round_().clamp_(0, 255).to(torch.uint8)
        canvas[rows, :, at.top : at.top + at.height, at.left : at.left + at.width] = pixels
    return canvas, placements


def map_to_frame(values: torch.Tensor, at: Placement) -> torch.Tensor:
    """Float (C, h, w) over the canvas, at any resolution -> (C, H, W) over the frame.

    Bilinear between pixel centres (``align_corners=False``), antialiased where it shrinks below
    half; the padding is cut away before the second step. Where nothing changes size the values are passed through.
    """
    full = _interpolate(values, (at.side, at.side))
    inside = full[:, at.top : at.top + at.height, at.left : at.left + at.width]
    return _interpolate(inside, at.frame)


def needs_antialias(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Below half size two neighbours no longer cover all pixels; above it plain interpolation is exact on ramps."""
    return 2 * new[0] < old[0] or 2 * new[1] < old[1]


def _interpolate(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    import torch.nn.functional as F

    old = (values.shape[-2], values.shape[-1])
    if old == size:
        return values
    antialias = needs_antialias(old, size)
    return F.interpolate(values[None], size, mode="bilinear", align_corners=False, antialias=antialias)[0]


def boxes_to_frame(xyxy: np.ndarray, at: Placement) -> np.ndarray:
    """Boxes (N, 4) normalised to the canvas -> float32 (N, 4) normalised to the frame, clipped to [0, 1]."""
    origin = np.array([at.left, at.top, at.left, at.top], np.float64)
    extent = np.array([at.width, at.height, at.width, at.height], np.float64)
    return np.clip((xyxy.astype(np.float64) * at.side - origin) / extent, 0.0, 1.0).astype(np.float32)
