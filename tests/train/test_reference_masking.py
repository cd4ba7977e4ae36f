"""``masking: reference`` draws budgets as 4M's own code does: against statistics of 20,000 draws of that code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourmill.train.draws import Draws
from fourmill.train.masking import Masker
from fourmill.train.presets import ModalitySpec
from fourmill.train_config import MixtureComponent, TrainConfig

STATISTICS = json.loads((Path(__file__).parent / "data" / "budget_statistics.json").read_text())
DRAWS = 20_000


def _budgets(
    name: str, masking: str = "reference"
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    found = STATISTICS[name]
    size = int(name.rpartition("_")[2])
    specs = [
        ModalitySpec(domain, "grid" if kind == "img" else "sequence", 16, tokens, True, True)
        for domain, kind, tokens in zip(found["domains"], found["types"], found["max_tokens"], strict=True)
    ]
    weights = found["sampling_weights"] or [1.0] * len(found["input_alphas"][0])
    mixture = tuple(
        MixtureComponent(
            weight=weight,
            input_alphas={d: row[j] for d, row in zip(found["domains"], found["input_alphas"], strict=True)},
            target_alphas={
                d: row[j] for d, row in zip(found["domains"], found["target_alphas"], strict=True)
            },
        )
        for j, weight in enumerate(weights)
    )
    config = TrainConfig(
        num_input_tokens=size,
        num_target_tokens=size,
        mixture=mixture,
        masking=masking,  # type: ignore[arg-type]
    )
    draws = Draws(5, np.arange(DRAWS, dtype=np.uint64) * np.uint64(977), np.zeros(DRAWS, np.int64))
    return found, *Masker(specs, config).published_budgets(draws)


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_budgets_have_the_published_distribution(name: str) -> None:
    found, component, *sides = _budgets(name)
    expected = np.array(found["component_frequency"])
    assert np.abs(np.bincount(component, minlength=len(expected)) / DRAWS - expected).max() < 0.018
    for side, budget in zip(("input", "target"), sides, strict=True):
        figures = found[side]
        error = np.maximum(np.hypot(figures["sem"], figures["sem"]), 1e-3)
        assert (np.abs(budget.mean(0) - figures["mean"]) < 5 * error).all()
        assert budget.std(0) == pytest.approx(np.array(figures["std"]), rel=0.12, abs=0.05)  # heavy tails
        assert np.abs((budget == 0).mean(0) - figures["fraction_zero"]).max() < 0.025
        assert budget.sum(1).mean() == pytest.approx(figures["sum_mean"], abs=3.0)
        levels = np.array([0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
        quantiles = np.array(figures["quantiles_5_25_50_75_95_99"])[
            :, None, :
        ]  # between two values where many are equal
        assert ((budget.T[:, :, None] < quantiles).mean(1) < levels + 0.02).all()
        assert ((budget.T[:, :, None] <= quantiles).mean(1) > levels - 0.02).all()
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = np.nan_to_num(np.corrcoef(budget.T))
        known = np.nan_to_num(np.array(found[f"{side}_correlation"], np.float64))
        assert np.abs(correlation - known).max() < 0.05


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_the_formula_gives_the_mean_where_nothing_is_clamped(name: str) -> None:
    """A Dirichlet's means are alpha / sum of alphas; only clamping by the number of tokens takes from them."""
    found, component, budget, _ = _budgets(name)
    size = int(name.rpartition("_")[2])
    for j in range(len(found["input_alphas"][0])):
        alphas = np.array([row[j] for row in found["input_alphas"]])
        here = budget[component == j].mean(0)
        wide = np.array(found["max_tokens"]) >= size
        mean = alphas / alphas.sum() * size
        spread = budget[component == j].std(0) / np.sqrt((component == j).sum())
        assert (np.abs(here - mean)[wide] < 5 * spread[wide] + 0.02).all()
        assert (here <= mean + 5 * spread + 0.02).all()
