"""Letterboxing there and back, against coordinates worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fourmill.labelers.letterbox import boxes_to_frame, letterbox, map_to_frame, place

FRAMES = [(37, 53), (128, 64), (64, 64), (53, 37), (20, 200), (1, 1)]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("side", [64, 96])
def test_placement(frame: tuple[int, int], side: int) -> None:
    at = place(frame, side)
    assert max(at.height, at.width) == side and min(at.height, at.width) >= 1
    assert abs(at.height / at.width * frame[1] / frame[0] - 1) < 0.5 / min(at.height, at.width) + 1e-9
    assert 0 <= at.top <= side - at.height and abs(at.top - (side - at.height - at.top)) <= 1
    assert 0 <= at.left <= side - at.width and abs(at.left - (side - at.width - at.left)) <= 1


def test_a_sliver_keeps_one_pixel() -> None:
    at = place((300, 2), 64)
    assert (at.height, at.width, at.left) == (64, 1, 31)
    canvas, _ = letterbox([np.full((300, 2, 3), 9, np.uint8)], 64)
    assert (canvas[0, :, 31] == 9).all() and canvas.sum() == 9 * 64 * 3


def test_fixed_shape_fill_and_no_needless_resampling() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(64, 64), (32, 64), (37, 53)]]
    canvas, placements = letterbox(frames, 64, (1, 2, 3))
    assert canvas.shape == (3, 64, 64, 3) and canvas.dtype == np.uint8 and len(placements) == 3
    assert np.array_equal(canvas[0], frames[0])
    assert np.array_equal(canvas[1, 16:48], frames[1])
    assert (canvas[1, :16] == (1, 2, 3)).all() and (canvas[1, 48:] == (1, 2, 3)).all()
    at = placements[2]
    assert (canvas[2, at.top + at.height :] == (1, 2, 3)).all() and (canvas[2, : at.top] == (1, 2, 3)).all()


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    (small,), _ = letterbox([stripes], 32)
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 2


def ramp(side: int, canvas: int) -> torch.Tensor:
    """(2, side, side): canvas x and y, in canvas pixels from its edge, at the centres of a map's cells."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) * canvas / side
    return torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])


@pytest.mark.parametrize("frame", [(37, 53), (53, 37), (128, 64), (48, 48), (64, 64), (150, 100)])
@pytest.mark.parametrize("resolution", [16, 32, 64, 128])
def test_a_map_comes_back_where_the_frame_was(frame: tuple[int, int], resolution: int) -> None:
    """A ramp is what bilinear interpolation reproduces exactly, away from the border."""
    at = place(frame, 64)
    x, y = map_to_frame(ramp(resolution, 64), at).numpy()
    assert x.shape == frame
    want_x = at.left + (np.arange(frame[1]) + 0.5) * at.width / frame[1]
    want_y = at.top + (np.arange(frame[0]) + 0.5) * at.height / frame[0]
    rim = int(np.ceil(frame[0] / at.height * max(1, 64 / resolution))) + 1
    inner = slice(rim, -rim)
    assert np.abs(x - want_x)[inner, inner].max() < 1e-3
    assert np.abs(y - want_y[:, None])[inner, inner].max() < 1e-3


def test_there_and_back_in_pixels() -> None:
    """A smooth picture through the canvas and back differs by less than rounding; half a pixel would be 2 levels."""
    y, x = np.mgrid[0:37, 0:53]
    frame = np.stack([4 * x, 2 * x + 3 * y, 6 * y], axis=-1).astype(np.uint8)
    canvas, (at,) = letterbox([frame], 64)
    back = (
        map_to_frame(torch.from_numpy(canvas[0].astype(np.float32)).permute(2, 0, 1), at)
        .permute(1, 2, 0)
        .numpy()
    )
    assert np.abs(back - frame)[2:-2, 2:-2].max() < 1.0


def test_unchanged_sizes_pass_through() -> None:
    values = torch.randn(3, 64, 64)
    assert map_to_frame(values, place((64, 64), 64)).data_ptr() == values.data_ptr()


def test_boxes() -> None:
    at = place((32, 64), 128)  # scaled by 2: 64 x 128 at top 32
    canvas = np.array([[0, 32, 128, 96], [64, 64, 128, 96], [10, 0, 20, 40], [0, 0, 10, 20]]) / 128
    want = np.array([[0, 0, 1, 1], [0.5, 0.5, 1, 1], [10 / 128, 0, 20 / 128, 8 / 64], [0, 0, 10 / 128, 0]])
    back = boxes_to_frame(canvas, at)
    assert back.dtype == np.float32 and np.allclose(back, want, atol=1e-6)
    tall = place((64, 32), 128)
    assert np.allclose(boxes_to_frame(canvas[:, [1, 0, 3, 2]], tall), want[:, [1, 0, 3, 2]], atol=1e-6)
