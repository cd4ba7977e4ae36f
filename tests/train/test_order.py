"""Every sample once per epoch, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.train.order import Position, SampleOrder


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 5))
def test_each_epoch_visits_every_sample_once(count: int, seed: int, epoch: int) -> None:
    index, epochs = SampleOrder(count, seed).samples(epoch * count, count)
    assert sorted(index) == list(range(count))
    assert set(epochs) == {epoch}


def test_any_split_of_the_sequence_gives_the_same_sequence() -> None:
    order = SampleOrder(37, 5)
    whole, epochs = order.samples(0, 120)
    parts = [order.samples(start, 8) for start in range(0, 120, 8)]
    assert np.array_equal(whole, np.concatenate([index for index, _ in parts]))
    assert np.array_equal(epochs, np.arange(120) // 37)


def test_epochs_and_seeds_give_different_orders() -> None:
    order = SampleOrder(1000, 0)
    first, second = order.samples(0, 1000)[0], order.samples(1000, 1000)[0]
    other = SampleOrder(1000, 1).samples(0, 1000)[0]
    assert (first == second).mean() < 0.02
    assert (first == other).mean() < 0.02
    assert (np.diff(first) == 1).mean() < 0.02


def test_every_place_is_equally_likely() -> None:
    counts = np.zeros((6, 6))
    order = SampleOrder(6, 11)
    for epoch in range(900):
        counts[np.arange(6), order.samples(epoch * 6, 6)[0]] += 1
    chi_squared = ((counts - 150) ** 2 / 150).sum()
    assert chi_squared < 52.6  # 25 degrees of freedom, p = 0.001


def test_the_order_is_pinned() -> None:
    """A change here would make every resumed run see other data than it began with."""
    index, _ = SampleOrder(1000, 7).samples(998, 4)
    assert index.tolist() == PINNED


PINNED = [548, 613, 589, 404]


def test_position_counts_what_was_delivered() -> None:
    order = SampleOrder(10, 0)
    assert order.position(37) == Position(epoch=3, position=7)
    assert order.delivered(Position(3, 7)) == 37


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0, 0)
