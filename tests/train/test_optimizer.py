"""Which optimizer has which parameter, and what Muon does to a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fourmill.train.model import FourMill, Stacked
from fourmill.train.optimizer import Muon, Optimizers, moments, orthogonal
from fourmill.train.presets import ModalitySpec, ModelConfig
from fourmill.train_config import TrainConfig

SPECS = (
    ModalitySpec("rgb", "grid", 16, 16, True, True),
    ModalitySpec("clip_global", "vector", 16, 4, True, True),
)
MUON = TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.5)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (8, 24), (24, 8)])
def test_singular_values_move_near_one(rows: int, columns: int) -> None:
    wide = torch.stack([matrix(rows, columns, seed) * 10.0**seed for seed in range(3)])
    values = torch.linalg.svdvals(orthogonal(wide))
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.allclose(orthogonal(wide)[1], orthogonal(wide[1:2])[0], atol=1e-5)


def test_an_update_keeps_directions_and_has_the_size_of_adamw() -> None:
    """The first update is the polar factor of the gradient; its root mean square is about 0.2 times the rate."""
    gradient = matrix(32, 64)
    weight = nn.Parameter(torch.zeros(32, 64))
    weight.grad = gradient
    Muon([weight], [1], lr=0.1, weight_decay=0.0).step()
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        (-weight.detach()).flatten(), (left @ right).flatten(), dim=0
    )
    assert cosine > 0.95
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.2)


def test_stacked_matrices_are_handled_one_by_one() -> None:
    gradients = [matrix(8, 8, seed) * 10.0**seed for seed in range(3)]
    stacked = nn.Parameter(torch.zeros(24, 8))
    stacked.grad = torch.cat(gradients)
    Muon([stacked], [3], lr=0.1, weight_decay=0.0).step()
    for part, gradient in zip(stacked.detach().chunk(3), gradients, strict=True):
        alone = nn.Parameter(torch.zeros(8, 8))
        alone.grad = gradient
        Muon([alone], [1], lr=0.1, weight_decay=0.0).step()
        assert torch.allclose(part, alone.detach(), atol=1e-6)


def test_momentum_remembers_and_weights_decay() -> None:
    weight = nn.Parameter(torch.eye(4))
    optimizer = Muon([weight], [1], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.eye(4) * 0.95)
    weight.grad = matrix(4, 4)
    optimizer.step()
    moved = weight.detach().clone()
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    assert not torch.allclose(weight.detach(), moved * 0.95, atol=1e-3)


def test_muon_has_the_matrices_and_adamw_the_rest() -> None:
    model = FourMill(ModelConfig(32, 1, 1, SPECS, head_dim=16))
    optimizers = Optimizers(model, MUON)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for parameter in model.parameters():
        owner = optimizers.owner(parameter)
        assert isinstance(owner, Muon) == (id(parameter) in linear)
        assert moments(owner) == (
            ("average",) if id(parameter) in linear else ("exp_avg", "exp_avg_sq", "step")
        )
    with pytest.raises(KeyError):
        optimizers.owner(nn.Parameter(torch.zeros(1)))
    muon, adamw = optimizers.parts
    assert [group["weight_decay"] for group in muon.param_groups] == [0.5]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0]
    assert isinstance(muon, Muon)
    stacked = [m.weight for m in model.modules() if isinstance(m, Stacked)]
    pieces = {id(weight): count for weight, count in muon._parts.items()}
    assert stacked and all(pieces[id(weight)] in (2, 3) for weight in stacked)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_moves_everything_at_the_given_rate(name: str) -> None:
    model = FourMill(ModelConfig(32, 1, 1, SPECS, head_dim=16))
    optimizers = Optimizers(model, TrainConfig(optimizer=name, lr=9.0, weight_decay=0.0))  # type: ignore[arg-type]

    def moved(rate: float) -> list[float]:
        before = [p.detach().clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers.step(rate)
        return [
            float((p.detach() - old).abs().max()) for p, old in zip(model.parameters(), before, strict=True)
        ]

    assert moved(0.0) == [0.0] * len(list(model.parameters()))
    assert all(0 < change < 0.1 for change in moved(0.01))
    optimizers.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
