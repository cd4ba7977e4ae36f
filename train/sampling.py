"""Choosing tokens from logits, and how many of them at a step (section 7 of the 4M notes)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fourmill.errors import ConfigError

Schedule = Literal["cosine", "linear"]


def token_counts(schedule: Schedule, num_tokens: int, steps: int) -> list[int]:
    """How many tokens each step makes: positive numbers that add up to ``num_tokens``.

    cosine: few at first and at the end, by the differences of (1 + cos(pi i / steps)) / 2. linear: as equal as possible,
    the larger ones first. There are never more steps than tokens.
    """
    steps = min(steps, num_tokens)
    if steps < 1:
        return []
    if schedule == "linear":
        return [num_tokens // steps + (i < num_tokens % steps) for i in range(steps)]
    done, counts = 0, []
    for i in range(1, steps + 1):
        aim = round(num_tokens * 0.5 * (1 - math.cos(math.pi * i / steps)))
        aim = min(
            max(aim, done + 1), num_tokens - (steps - i)
        )  # at least one now, and one for each later step
        counts.append(aim - done)
        done = aim
    return counts


def filter_logits(logits: Tensor, top_k: float | None, top_p: float | None) -> Tensor:
    """Logits (N, V) with -inf at what is not to be drawn. At least the best token stays.

    ``top_k``: so many of the best, or as a float up to 1.0 that share of the vocabulary. ``top_p``: the fewest of the
    best whose probabilities reach p.
    """
    if top_k:
        count = int(top_k * logits.shape[-1] if isinstance(top_k, float) and top_k <= 1 else top_k)
        count = min(max(1, count), logits.shape[-1])
        worst = logits.topk(count, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < worst, -math.inf)
    if top_p:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(dim=-1)
        beyond = shares.cumsum(dim=-1) - shares >= top_p  # what comes before already reaches p
        beyond[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    return logits


def draw(
    logits: Tensor,
    uniforms: np.ndarray,
    temperature: float | np.ndarray,
    top_k: float | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens int64 (N,) and their probabilities float32 (N,), by inversion of ``uniforms`` (N,) in (0, 1).

    ``temperature`` is one for all or (N,). Filters come before it, as in 4M. Temperature 0 takes the most probable
    token, whose confidence is its probability at temperature 1.
    """
    logits = logits.float()
    if not np.any(temperature):
        shares = logits.softmax(dim=-1)
        best = shares.max(dim=-1)
        return best.indices, best.values
    divisor = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).reshape(-1, 1)
    shares = (filter_logits(logits, top_k, top_p) / divisor).softmax(dim=-1)
    cumulative = shares.double().cumsum(dim=-1)
    point = torch.from_numpy(uniforms).to(cumulative) * cumulative[..., -1]
    tokens = torch.searchsorted(cumulative, point.unsqueeze(-1), right=True).squeeze(-1)
    # A token without probability can be hit only through rounding at the very end.
    last = shares.shape[-1] - 1 - (shares > 0).flip(-1).int().argmax(dim=-1)
    tokens = torch.minimum(tokens, last)
    return tokens, shares.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def check_sampling(temperature: float, top_k: float | None, top_p: float | None) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature is {temperature}; it must be 0 (greedy) or positive")
    if top_k is not None and top_k < 0:
        raise ConfigError(f"top_k is {top_k}; give a number of tokens, a share up to 1.0, or none")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must lie between 0 and 1")
