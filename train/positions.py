"""Fixed sine-cosine position tables (Vaswani et al. 2017; in two dimensions as in MAE and 4M)."""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 10000.0


def sincos_1d(length: int, dim: int) -> Tensor:
    """float32 (length, dim): [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (dim/2)), k = 0 .. dim/2 - 1."""
    return _waves(torch.arange(length, dtype=torch.float64), dim // 2).float()


def sincos_2d(height: int, width: int, dim: int) -> Tensor:
    """float32 (height * width, dim), row-major: four blocks [sin row, cos row, sin column, cos column].

    w_k = 10000^(-k / (dim/4)). ``dim`` is a multiple of 4.
    """
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    return torch.cat([_waves(rows, dim // 4), _waves(columns, dim // 4)], dim=1).float()


def _waves(positions: Tensor, count: int) -> Tensor:
    frequencies = _BASE ** (-torch.arange(count, dtype=torch.float64) / count)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
