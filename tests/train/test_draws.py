"""The counter-based generator against its published vectors, and what is drawn from it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fourmill.train.draws import GOLDEN, Draws, LogGamma, mix


def _draws(rows: int, seed: int = 0, visit: int = 0) -> Draws:
    return Draws(seed, np.arange(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), np.full(rows, visit))


def test_known_answers_of_splitmix64() -> None:
    """The first outputs of the published generator seeded with 0 and with 1234567: a counter that is mixed."""
    for seed, expected in (
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [0x599ED017FB08FC85, 0x2C73F08458540FA5, 0x883EBCE5A3F27C77]),
    ):
        counter = np.uint64(seed) + np.arange(1, 4, dtype=np.uint64) * GOLDEN
        assert mix(counter).tolist() == expected


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
    values = gammas.sample(np.ones(4000, np.int64), _draws(4000).words("gamma", 1)[:, 0])
    # In logarithms, where alpha = 0.01 has 43 % of its mass below the smallest double.
    expected = stats.loggamma(alpha) if alpha > 0.05 else None
    if expected is not None:
        assert stats.kstest(values, expected.cdf).pvalue > 1e-3
    else:  # alpha * log X tends to log U
        assert stats.kstest(np.exp(alpha * values), "uniform").statistic < 0.04


def test_alpha_zero_is_never() -> None:
    assert (
        LogGamma(np.zeros(1)).sample(np.zeros(3, np.int64), np.arange(3, dtype=np.uint64)).tolist()
        == [-np.inf] * 3
    )


def test_compiled_code_that_cannot_be_kept_is_said_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fourmill.train import compiled

    compiled._folder.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such/place")
    assert compiled._folder() is None and "compiled code cannot be kept" in caplog.text
    twice = compiled.compiled(lambda number: 2 * number)
    assert twice(21) == 42
    compiled._folder.cache_clear()
