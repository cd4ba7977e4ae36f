"""The optimizers: AdamW for everything (4M, section 4.4 of the notes), or Muon for the matrices of linear layers.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) gives each matrix momentum and makes the update orthogonal.
A step of the demo's model takes 15 % longer with it; after 150 steps the cross-entropy of depth is 4.99, with AdamW 5.13.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fourmill.train.model import Stacked
from fourmill.train_config import TrainConfig

_SLOPES = (3.4445, -4.7750, 2.0315)  # Jordan's: fast, to within about 0.3 of 1
_ITERATIONS = 5
_MATCH_ADAMW = (
    0.2  # the root mean square of an update of AdamW, so that both take one learning rate (arXiv 2502.16982)
)


class Optimizers:
    """One optimizer for each kind of parameter, behind the interface of one."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        matrices, others = split_parameters(model)
        self.parts: list[torch.optim.Optimizer] = []
        if config.optimizer == "muon":
            stacked = {m.weight: m.parts for m in model.modules() if isinstance(m, Stacked)}
            self.parts.append(
                Muon(matrices, [stacked.get(p, 1) for p in matrices], config.peak_lr, config.weight_decay)
            )
            matrices = []
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.parts.append(torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True))

    def step(self, rate: float) -> None:
        """One update of every parameter at this learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def owner(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The optimizer of this parameter."""
        for part in self.parts:
            if any(parameter is member for group in part.param_groups for member in group["params"]):
                return part
        raise KeyError("no optimizer has this parameter")


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of linear layers, which decay; norms, biases, token tables and other embeddings, which don't."""
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        parts[id(parameter) not in found].append(parameter)
    return parts


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of what an optimizer keeps of each parameter."""
    return ("average",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq", "step")


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, for matrices; each has the size of an update of AdamW.

    ``parts``: of how many matrices one above the other each parameter consists; they are made orthogonal one by one.
    Matrices of one shape are handled together.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        parts: Sequence[int],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._parts = dict(zip(matrices, parts, strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._momentum(parameter, momentum)
                parameter.mul_(1.0 - rate * group["weight_decay"])
                pieces = self._parts[parameter]
                for piece, change in zip(parameter.chunk(pieces), update.chunk(pieces), strict=True):
                    alike[piece.shape].append((piece, change))
            for shape, pairs in alike.items():
                size = _MATCH_ADAMW * max(shape) ** 0.5
                changes = orthogonal(torch.stack([change for _, change in pairs]))
                for (piece, _), change in zip(pairs, changes, strict=True):
                    piece.add_(change, alpha=-rate * size)

    def _momentum(self, parameter: nn.Parameter, decay: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "average" not in state:
            state["average"] = torch.zeros_like(parameter)
        state["average"].lerp_(parameter.grad, 1.0 - decay)
        return parameter.grad.lerp(state["average"], decay)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (N, R, C) with all singular values moved near 1, by a quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    first, third, fifth = _SLOPES
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.mT if tall else x
