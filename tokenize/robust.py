"""Relative depth on a scale of its own: each map by its middle values, which outliers do not move."""

from __future__ import annotations

import numpy as np


def standardise_robustly(depth: np.ndarray) -> np.ndarray:
    """(B, H, W) by the mean and deviation of each map's middle 80 % (4M: the rest is cut off on both sides)."""
    mean, deviation = middle(depth)
    return ((depth - mean) / deviation).astype(np.float32)


def middle(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (B, 1, 1) of the middle 80 % of each map's values."""
    ordered = np.sort(depth.reshape(len(depth), -1).astype(np.float64), axis=1)
    cut = int(0.1 * ordered.shape[1])
    middle = ordered[:, cut : ordered.shape[1] - cut]
    return middle.mean(1)[:, None, None], np.sqrt(middle.var(1) + 1e-6)[:, None, None]
