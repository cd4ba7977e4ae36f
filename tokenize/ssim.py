"""Structural similarity of two images (Wang, Bovik, Sheikh, Simoncelli 2004), with their Gaussian window."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

_RADIUS, _SIGMA = 5, 1.5
_OFFSETS = np.arange(-_RADIUS, _RADIUS + 1)
_WEIGHTS = np.exp(-0.5 * (_OFFSETS / _SIGMA) ** 2)
_WINDOW = _WEIGHTS / _WEIGHTS.sum()


def ssim(a: np.ndarray, b: np.ndarray, span: float) -> float:
    """Mean over the places where the window of 11 x 11 lies inside, and over channels: 1 for equal images.

    ``a`` and ``b`` are (H, W) or (H, W, C); ``span`` is the range that values can have. NaN where an image is smaller than
    the window.
    """
    if min(a.shape[:2]) < len(_WINDOW):
        return float("nan")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _blurred(image: np.ndarray) -> np.ndarray:
    """By the window along rows and columns, without a border."""
    rows = sliding_window_view(image, len(_WINDOW), axis=0) @ _WINDOW
    return np.asarray(sliding_window_view(rows, len(_WINDOW), axis=1) @ _WINDOW)
