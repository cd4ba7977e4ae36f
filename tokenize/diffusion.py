"""Noise schedules and DDIM sampling (arXiv 2010.02502), as far as the published diffusion decoders need them.

Legend: x is a noisy image (B, C, H, W), x0 the clean one, t a step in [0, T), a the share of the signal's variance
at t (alphas, falling from nearly 1 at t = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fourmill.errors import ConfigError

Prediction = Literal["sample", "epsilon", "v_prediction"]
PREDICTIONS: tuple[Prediction, ...] = ("sample", "epsilon", "v_prediction")
#: gives the network's output (B, C, H, W) for x and steps (B,)
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Schedule:
    """``alphas`` float64 (T,): product of the steps' signal shares."""

    alphas: Tensor

    @classmethod
    def named(cls, name: str, steps: int = 1000, zero_terminal_snr: bool = False) -> Schedule:
        """``linear`` (1e-4 to 0.02), ``scaled_linear`` (the same ends, linear in the roots) or ``squaredcos_cap_v2``
        (arXiv 2102.09672). ``zero_terminal_snr`` stretches it until the last step holds no signal at all
        (arXiv 2305.08891).
        """
        alphas = (1 - _betas(name, steps)).cumprod(0)
        if zero_terminal_snr:
            roots = alphas.sqrt()
            alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        return cls(alphas)

    def betas(self) -> Tensor:
        """Share of the variance that each step takes away, float64 (T,)."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas[:-1]])
        return 1 - self.alphas / before

    def add_noise(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        signal, spread = self._weights(clean, steps)
        return signal * clean + spread * noise

    def velocity(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """What a network with ``v_prediction`` is to say (arXiv 2202.00512)."""
        signal, spread = self._weights(clean, steps)
        return signal * noise - spread * clean

    def _weights(self, like: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        at = self.alphas.to(like.device)[steps].view(-1, 1, 1, 1)
        return at.sqrt().to(like.dtype), (1 - at).sqrt().to(like.dtype)


def _betas(kind: str, steps: int) -> Tensor:
    if kind == "linear":
        return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(1e-4**0.5, 0.02**0.5, steps, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        shares = ((times + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
        return (1 - shares[1:] / shares[:-1]).clamp_max(0.999)
    raise ConfigError(f"beta_schedule {kind!r}: known are linear, scaled_linear and squaredcos_cap_v2")


def fixed_noise(channels: int, height: int, width: int) -> Tensor:
    """(1, channels, height, width), always the same: maps that begin there depend on their tokens alone."""
    return torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(0))


def trailing_steps(count: int, total: int = 1000) -> list[int]:
    """``count`` steps from the last one down, evenly spaced (arXiv 2305.08891, "trailing").

    Always as many as asked. Where ``count`` divides ``total`` they are those of the published code, which takes
    more steps than asked elsewhere.
    """
    if not 1 <= count <= total:
        raise ConfigError(f"{count} sampling steps; there must be 1 to {total}")
    return [round(total * left / count) - 1 for left in range(count, 0, -1)]


def ddim_step(
    schedule: Schedule,
    output: Tensor,
    x: Tensor,
    step: int,
    before: int,
    prediction: Prediction = "sample",
    clip: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """From ``step`` to the less noisy step ``before`` (negative: the clean image).

    ``output`` is what the network said of ``x``. ``clip`` holds x0 to [-1, 1]; the noise is inferred from the
    unclipped x0, as in the published decoders. With ``noise`` the step is stochastic (eta = 1, as DDPM's).
    """
    here = float(schedule.alphas[step])
    there = float(schedule.alphas[before]) if before >= 0 else 1.0
    signal, spread = math.sqrt(here), math.sqrt(1 - here)
    if prediction == "sample":
        clean, inferred = output, (x - signal * output) / spread
    elif prediction == "v_prediction":
        clean, inferred = signal * x - spread * output, signal * output + spread * x
    else:
        if here == 0:
            raise ConfigError("a network that predicts noise cannot start where there is no signal at all")
        clean, inferred = (x - spread * output) / signal, output
    if clip:
        clean = clean.clamp(-1, 1)
    variance = (1 - there) / (1 - here) * (1 - here / there) if noise is not None else 0.0
    result = math.sqrt(there) * clean + math.sqrt(max(1 - there - variance, 0.0)) * inferred
    return result if noise is None else result + math.sqrt(variance) * noise


def ddim(
    network: Network,
    schedule: Schedule,
    noise: Tensor,
    steps: Sequence[int],
    prediction: Prediction = "sample",
    clip: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Deterministic sampling from ``noise`` (B, C, H, W) along ``steps`` (falling).

    Yields (what the network said, the next x) of every step; the last x is the image.
    """
    x = noise
    for step, before in zip(steps, [*steps[1:], -1], strict=True):
        output = network(x, torch.full((len(x),), step, device=x.device))
        x = ddim_step(schedule, output, x, step, before, prediction, clip)
        yield output, x
