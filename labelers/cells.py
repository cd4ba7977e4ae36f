"""Scores on a network's grid to a class for each pixel of a frame, without a full-size map of each class.

`map_to_frame` brings a map to a frame in two linear steps. Together they make of each pixel a weighted mean of a few
cells, with weights that are never negative and depend on the placement alone. So a pixel whose cells all have the same best
class has that class, and only for the others are scores added up, over their few cells: with 150 classes this takes a
twentieth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fourmill.labelers.letterbox import Placement, needs_antialias

if TYPE_CHECKING:
    import torch

PIXELS_AT_ONCE = 8192  # their scores stay within a processor's cache


class Taps(NamedTuple):
    """Along one axis, of each of P pixels: its T neighbouring cells int32 (T, P) and their weights float32 (T, P)."""

    cells: torch.Tensor
    weights: torch.Tensor


def taps(grid: tuple[int, int], at: Placement, device: str = "cpu") -> tuple[Taps, Taps]:
    """By row and by column: what `map_to_frame` makes of a map of ``grid`` = (h, w) cells."""
    smooth = needs_antialias(grid, (at.side, at.side)), needs_antialias((at.height, at.width), at.frame)
    rows = _taps(grid[0], at.side, at.top, at.height, at.frame[0], smooth, device)
    return rows, _taps(grid[1], at.side, at.left, at.width, at.frame[1], smooth, device)


@lru_cache(maxsize=512)
def _taps(
    cells: int, side: int, start: int, extent: int, pixels: int, smooth: tuple[bool, bool], device: str
) -> Taps:
    """Read off the interpolation itself, of maps that are one in one cell and zero elsewhere."""
    import torch
    import torch.nn.functional as F

    def resized(values: torch.Tensor, size: int, antialias: bool) -> torch.Tensor:
        if values.shape[3] == size:
            return values
        return F.interpolate(values, (1, size), mode="bilinear", align_corners=False, antialias=antialias)

    with torch.inference_mode(False), torch.no_grad():
        # lying, not standing: torch 2.13 takes the wrong weights for maps that are one pixel wide
        canvas = resized(torch.eye(cells)[None, :, None], side, smooth[0])  # (1, maps, 1, columns)
        frame = resized(canvas[..., start : start + extent], pixels, smooth[1])
        weights = frame[0, :, 0].T.contiguous()  # (pixels, cells)
        touched = weights != 0
        first = touched.int().argmax(dim=1)
        last = cells - 1 - touched.flip(1).int().argmax(dim=1)
        count = int((last - first).max()) + 1
        index = first.clamp(max=cells - count)[:, None] + torch.arange(count)
        both = index.int(), weights.gather(1, index)
        return Taps(*(one.T.contiguous().to(device) for one in both))


def best(scores: torch.Tensor) -> torch.Tensor:
    """uint8 (P): the index of the largest of (P, C) scores, C at most 256; of equal ones the first."""
    import torch

    if scores.is_cuda:
        return scores.argmax(dim=-1).to(torch.uint8)
    return torch.from_numpy(scores.numpy().argmax(axis=-1)).to(torch.uint8)  # three times as fast as torch's


def classes_of(cells: torch.Tensor, grid: tuple[int, int], at: Placement) -> torch.Tensor:
    """uint8 (H, W) of a frame: the class with the highest score, of scores (h * w, C) by cell."""
    rows, columns = taps(grid, at, str(cells.device))
    at_cells = best(cells).view(grid)
    low, high = at_cells, at_cells
    for axis, near in ((1, columns.cells), (0, rows.cells)):  # whole rows are copied faster
        low, high = _extreme(low, near, axis, "minimum"), _extreme(high, near, axis, "maximum")
    y, x = (low != high).nonzero(as_tuple=True)
    for part in _parts(len(y)):
        low[y[part], x[part]] = best(_mean(cells, grid[1], rows, columns, y[part], x[part]))
    return low


def finished_classes_of(
    cells: torch.Tensor,
    grid: tuple[int, int],
    at: Placement,
    finish: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """uint8 (H, W): the best class where ``finish``, not linear, makes class scores (P, C) of values (P, K) by pixel."""
    import torch

    rows, columns = taps(grid, at, str(cells.device))
    height, width = at.frame
    classes = torch.empty(height * width, dtype=torch.uint8, device=cells.device)
    for part in _parts(height * width):
        pixel = torch.arange(part.start, part.stop, device=cells.device)
        values = _mean(cells, grid[1], rows, columns, pixel // width, pixel % width)
        classes[part] = best(finish(values))
    return classes.view(height, width)


def _extreme(values: torch.Tensor, near: torch.Tensor, axis: int, which: str) -> torch.Tensor:
    """The smallest or largest of each pixel's cells along one axis."""
    import torch

    found = values.index_select(axis, near[0])
    for tap in near[1:]:
        found = getattr(torch, which)(found, values.index_select(axis, tap))
    return found


def _mean(
    cells: torch.Tensor, width: int, rows: Taps, columns: Taps, y: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """(P, C) of the pixels at ``y`` and ``x``: their cells' scores by weight."""
    import torch.nn.functional as F

    # (T, T, P): with the long axis as the inner one this takes a fifth of the time
    index = (rows.cells[:, y] * width)[:, None] + columns.cells[:, x]
    weights = rows.weights[:, y][:, None] * columns.weights[:, x]
    index, weights = (one.flatten(0, 1).T.contiguous() for one in (index, weights))
    return F.embedding_bag(index, cells, per_sample_weights=weights, mode="sum")


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, PIXELS_AT_ONCE):
        yield slice(start, min(start + PIXELS_AT_ONCE, count))
