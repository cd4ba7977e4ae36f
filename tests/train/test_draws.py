"""The counter-based generator against its published vectors, and what is drawn from it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fourmill.train.draws import Draws, LogGamma, philox4x32


def _draws(rows: int, seed: int = 0, visit: int = 0) -> Draws:
    return Draws(seed, np.arange(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), np.full(rows, visit))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers_of_philox(word: int, expected: tuple[int, ...]) -> None:
    """The test vectors that come with Random123."""
    counter = np.full(1, word, np.uint64)
    out = philox4x32((counter,) * 4, (word, word))
    assert tuple(int(value[0]) for value in out) == expected


def test_a_row_does_not_depend_on_the_others_or_on_how_much_is_drawn() -> None:
    whole = _draws(9).words("mask", 21)
    assert np.array_equal(_draws(9).rows(np.array([4, 7])).words("mask", 21), whole[[4, 7]])
    assert np.array_equal(_draws(9).words("mask", 6), whole[:, :6])


def test_seed_visit_purpose_and_row_change_the_numbers() -> None:
    base = _draws(2).words("mask", 8)
    for other in (
        _draws(2, seed=1).words("mask", 8),
        _draws(2, visit=1).words("mask", 8),
        _draws(2).words("crop", 8),
    ):
        assert not (base == other).any()
    assert not (base[0] == base[1]).any()


def test_permutations_are_permutations_and_uniform() -> None:
    drawn = _draws(6000).permutations("order", 5)
    assert (np.sort(drawn, axis=1) == np.arange(5)).all()
    counts = np.array([np.bincount(drawn[:, place], minlength=5) for place in range(5)])
    assert ((counts - 1200) ** 2 / 1200).sum() < 45  # 16 degrees of freedom, p < 0.001
    assert np.array_equal(_draws(3).permutations("one", 1), np.zeros((3, 1)))


def test_integers_cover_their_range() -> None:
    assert set(_draws(500).integers("crop", 3)) == {0, 1, 2}
    assert set(_draws(500).integers("crop", np.full(500, 1))) == {0}


@pytest.mark.parametrize("alpha", [0.01, 0.5, 5.0, 1000.0])
def test_log_gamma_has_the_distribution(alpha: float) -> None:
    gammas = LogGamma(np.array([0.0, alpha]))
    uniforms = _draws(4000).uniform("gamma", 2)[:, None, :]
    values = gammas.sample(np.ones((4000, 1), np.int64), uniforms)[:, 0]
    # In logarithms, where alpha = 0.01 has 43 % of its mass below the smallest double.
    expected = stats.loggamma(alpha) if alpha > 0.05 else None
    if expected is not None:
        assert stats.kstest(values, expected.cdf).pvalue > 1e-3
    else:  # alpha * log X tends to log U
        assert stats.kstest(np.exp(alpha * values), "uniform").statistic < 0.04


def test_alpha_zero_is_never() -> None:
    assert LogGamma(np.zeros(1)).sample(np.zeros(3, np.int64), np.full((3, 2), 0.5)).tolist() == [-np.inf] * 3
