"""Every sample once per epoch, in an order that is a function of (seed, step)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.errors import ConfigError
from fourmill.train.order import PERIOD, Order, Position, Refs, chunks_of_step, schedule


def _order(counts: list[int], batch_size: int = 8, seed: int = 0, **options: Any) -> Order:
    return Order([np.array(counts)], [1.0], seed, batch_size, **options)


def _samples(refs: Refs) -> list[tuple[int, int]]:
    return list(zip(refs.shard.tolist(), refs.place.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(sum),
    st.integers(1, 40),
    st.sampled_from([1, 4, 12, 64]),
    st.integers(1, 50),
    st.integers(0, 2**32),
)
def test_each_sample_comes_once_before_any_comes_again(
    counts: list[int], batch_size: int, lanes: int, window: int, seed: int
) -> None:
    order = _order(counts, batch_size, seed, lanes=lanes, window=window)
    everything = {(shard, place) for shard, count in enumerate(counts) for place in range(count)}
    visits: dict[tuple[int, int], list[int]] = {sample: [] for sample in everything}
    steps = 2 * len(everything) // batch_size + 2
    for step in range(steps):
        refs = order.step(step)
        assert len(refs.shard) == batch_size
        for sample, visit in zip(_samples(refs), refs.visit.tolist(), strict=True):
            visits[sample].append(visit)
    for seen in visits.values():
        assert seen == list(range(len(seen)))  # in order, none left out
    # Lanes differ by one sample and are read a chunk at a time, so they drift apart by very little.
    if order.lanes * order.chunk <= len(everything):
        rounds = steps * batch_size / len(everything)
        slack = 3 + rounds * order.lanes / len(everything)
        assert max(map(len, visits.values())) - min(map(len, visits.values())) <= slack
    else:
        assert order.lanes == 1


def test_every_lane_has_each_of_its_samples_once_per_epoch() -> None:
    order = _order([10, 0, 7, 12, 3], 4, lanes=4)
    lane = order._datasets[0].lane(2)
    first, second = (
        Refs(*(np.concatenate(column) for column in zip(*lane.take(start, lane.total), strict=True)))
        for start in (0, lane.total)
    )
    assert set(first.visit) == {0} and set(second.visit) == {1}
    assert sorted(_samples(first)) == sorted(_samples(second))
    assert len(set(_samples(first))) == lane.total == 8
    assert _samples(first) != _samples(second)


def test_any_step_costs_the_same_and_needs_no_history() -> None:
    counts = [50, 60, 70]
    walked = _order(counts, window=16)
    steps = [walked.step(step) for step in range(60)]
    for number in (59, 0, 31):
        fresh = _order(counts, window=16).step(number)
        assert all(np.array_equal(a, b) for a, b in zip(fresh, steps[number], strict=True))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_chunks_of_a_step_and_keep_to_their_lanes(world: int) -> None:
    order = _order([20] * 40, 64, lanes=16, window=16)
    assert order.chunks == 8
    shards = []
    for rank in range(world):
        mine: set[int] = set()
        for step in range(12):
            whole = np.array(_samples(order.step(step))).reshape(order.chunks, order.chunk, 2)
            part = order.step(step, rank, world)
            assert _samples(part) == [tuple(s) for s in whole[rank::world].reshape(-1, 2).tolist()]
            mine |= set(part.shard.tolist())
        lanes = [order.lane_shards(lane) for lane in range(rank, order.lanes, world)]
        assert mine <= set(np.concatenate(lanes).tolist())
        shards.append(mine)
    assert (
        max(map(len, shards)) <= 40 / world + order.lanes / world
    )  # each lane is cut out of at most one more


def test_ranks_that_cannot_share_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 chunks, which 3 ranks cannot share"):
        _order([100], 64).step(0, 0, 3)


@pytest.mark.parametrize(
    ("batch_size", "lanes", "chunks"),
    [
        (8192, 64, 64),
        (256, 64, 8),
        (32, 64, 8),
        (8, 64, 8),
        (6, 64, 2),
        (100, 64, 4),
        (7, 64, 1),
        (96, 48, 8),
    ],
)
def test_chunks_of_a_step(batch_size: int, lanes: int, chunks: int) -> None:
    assert chunks_of_step(batch_size, lanes) == chunks


def test_epochs_and_seeds_give_different_orders() -> None:
    def places(seed: int, step: int) -> list[tuple[int, int]]:
        return _samples(_order([1000], 1000, seed, lanes=1).step(step))

    first = places(0, 0)
    for other in (places(0, 1), places(1, 0), [(0, place) for place in range(1000)]):
        assert np.mean([a == b for a, b in zip(first, other, strict=True)]) < 0.02


def test_every_place_is_equally_likely() -> None:
    counts = np.zeros((6, 6))
    order = _order([6], 6, 11, lanes=1)
    for epoch in range(900):
        counts[np.arange(6), order.step(epoch).place] += 1
    chi_squared = ((counts - 150) ** 2 / 150).sum()
    assert chi_squared < 52.6  # 25 degrees of freedom, p = 0.001


def test_a_window_is_mixed_and_holds_few_shards() -> None:
    order = _order([100] * 64, 100, lanes=1, window=200)
    for step in range(0, 64, 2):
        refs = [order.step(step), order.step(step + 1)]
        assert len({shard for ref in refs for shard in ref.shard.tolist()}) == 2
        assert 20 < np.mean(refs[0].shard == refs[0].shard[0]) * 100 < 80


def test_datasets_are_mixed_by_weight_and_counted_by_themselves() -> None:
    order = Order([np.full(4, 64), np.full(2, 64)], [3.0, 1.0], 5, 64, lanes=16)
    shards: Counter[str] = Counter()
    seldom_one_sided = 0
    for step in range(500):
        refs = order.step(step)
        first = refs.shard < 4
        shards.update({"a": int(first.sum()), "b": int((~first).sum())})
        seldom_one_sided += not 0 < first.sum() < 64
    assert seldom_one_sided < 100  # of 500 steps, of eight chunks each
    assert shards["a"] / 32000 == pytest.approx(0.75, abs=0.002)
    position = order.position(500)
    assert position.samples == 32000
    assert position.epochs == pytest.approx((shards["a"] / 256, shards["b"] / 128), abs=1e-3)


def test_a_schedule_is_even_and_exact() -> None:
    turns = schedule([0.6, 0.2, 0.2])
    assert np.bincount(turns).tolist() == [600, 200, 200]
    for start in range(0, PERIOD, 50):
        assert np.abs(np.bincount(turns[start : start + 50], minlength=3) - [30, 10, 10]).max() <= 1
    with pytest.raises(ConfigError, match="below a thousandth"):
        schedule([1.0, 1e-5])


def test_the_order_is_pinned() -> None:
    """A change here would make every resumed run see other data than it began with."""
    refs = _order([30, 40, 50], 4, 7).step(998)
    assert (refs.shard.tolist(), refs.place.tolist(), refs.visit.tolist()) == PINNED


PINNED = ([2, 2, 2, 0], [45, 47, 49, 0], [62, 31, 31, 31])


def test_position_counts_what_was_delivered() -> None:
    assert _order([10], 5).position(8) == Position(40, (4.0,))


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        _order([0, 0])
