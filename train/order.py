"""The order in which training sees its samples: one deterministic sequence, whatever the workers and ranks.

The samples of a dataset are dealt to a fixed number of *lanes*: its shards, shuffled once, laid end to end and cut into
equal parts, so that lanes differ by one sample at most and share a shard only where it was cut. A lane is read over and
over; each time (its *epoch*) its shards are shuffled, and samples are shuffled within windows of the lane. A step
takes equal chunks of some lanes, the next step those of the next lanes, round and round. So

- what a step reads is a function of (seed, step), and costs the same for any step: a run resumes at once;
- a rank that reads every R-th chunk of a step reads every R-th lane, and no rank reads every shard;
- no sample is seen again before every other sample of its lane, and lanes keep pace with each other.

Several datasets are mixed by their weights: each lane follows a fixed schedule of the datasets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fourmill.errors import ConfigError
from fourmill.train.draws import GOLDEN, mix, purpose_key

#: turns of a lane in which each dataset has its exact share, to a thousandth
PERIOD = 1000
_FEWEST_CHUNKS = 8  # of a step, where they divide it: that many ranks can share it
_LARGE_CHUNK = 32  # samples; larger chunks are divided among more lanes, for the sake of variety


class Refs(NamedTuple):
    """Samples of a batch: number of the shard (over all datasets), place among the shard's samples of the split, and how
    often the sample was seen before. int64 (B,) each."""

    shard: np.ndarray
    place: np.ndarray
    visit: np.ndarray


@dataclass(frozen=True, slots=True)
class Position:
    """What the first steps of a run delivered: ``samples`` in all, and how many ``epochs`` of each dataset."""

    samples: int
    epochs: tuple[float, ...]


class Order:
    """The endless sequence of a run's steps."""

    def __init__(
        self,
        counts: Sequence[np.ndarray],
        weights: Sequence[float],
        seed: int,
        batch_size: int,
        lanes: int = 64,
        window: int = 8192,
    ) -> None:
        """``counts``: for each dataset, how many samples each of its shards has. ``window``: samples."""
        totals = [int(np.sum(count)) for count in counts]
        if not counts or min(totals) < 1:
            raise ValueError(f"an order needs at least one sample of each dataset, got {totals}")
        self.batch_size = batch_size
        self.lanes = _lanes(lanes, batch_size, min(totals))
        self.chunks = chunks_of_step(batch_size, self.lanes)
        self.chunk = batch_size // self.chunks
        first_shard = np.concatenate([[0], np.cumsum([len(count) for count in counts])])
        self._datasets = [
            _Dataset(np.asarray(count, np.int64), int(first), f"{number}", seed, self.lanes, window)
            for number, (count, first) in enumerate(zip(counts, first_shard[:-1], strict=True))
        ]
        self._soon: list[np.ndarray] = []
        for dataset in self._datasets:
            dataset.soon = self._soon
        self._schedule = schedule(weights)  # (PERIOD,): a dataset's number for each turn of a lane
        turns = np.eye(len(counts), dtype=np.int64)[self._schedule]
        self._turns_before = np.concatenate([np.zeros((1, len(counts)), np.int64), turns.cumsum(0)])

    def step(self, number: int, rank: int = 0, world: int = 1) -> Refs:
        """What a rank reads in step ``number`` (from 0): batch_size / world samples, in the order of their chunks.

        Raises ConfigError where the ranks cannot share a step's chunks evenly.
        """
        if self.chunks % world:
            raise ConfigError(
                f"train.batch_size: {self.batch_size} samples of {self.lanes} lanes make {self.chunks} chunks, which "
                f"{world} ranks cannot share; choose train.lanes and train.batch_size as multiples of the ranks"
            )
        first = number * self.chunks
        pieces = [piece for chunk in range(rank, self.chunks, world) for piece in self._chunk(first + chunk)]
        return Refs(*(np.concatenate(column) for column in zip(*pieces, strict=True)))

    def take_soon(self) -> np.ndarray:
        """int64: shards of the windows that were entered since the last call and of those after them, to be fetched ahead."""
        found = np.unique(np.concatenate(self._soon)) if self._soon else np.zeros(0, np.int64)
        self._soon.clear()
        return found

    def position(self, steps: int) -> Position:
        """The state after ``steps`` steps."""
        turns, rest = divmod(steps * self.chunks, self.lanes)
        read = np.zeros(len(self._datasets), np.int64)
        for lane in range(self.lanes):
            read += self._turns(lane, turns + (lane < rest)) * self.chunk
        epochs = tuple(
            round(float(n / dataset.total), 4) for n, dataset in zip(read, self._datasets, strict=True)
        )
        return Position(steps * self.batch_size, epochs)

    def lane_shards(self, lane: int) -> np.ndarray:
        """int64: the shards that a lane reads from, of all datasets."""
        return np.unique(np.concatenate([dataset.parts[lane].shard for dataset in self._datasets]))

    def _chunk(self, number: int) -> list[tuple[np.ndarray, ...]]:
        turn, lane = divmod(number, self.lanes)
        if len(self._datasets) == 1:
            return self._datasets[0].lane(lane).take(turn * self.chunk, self.chunk)
        place = (turn + _offset(lane)) % PERIOD
        dataset = int(self._schedule[place])
        before = int(self._turns(lane, turn)[dataset])
        return self._datasets[dataset].lane(lane).take(before * self.chunk, self.chunk)

    def _turns(self, lane: int, turn: int) -> np.ndarray:
        """int64 (datasets,): how many of the first ``turn`` turns of a lane each dataset had."""
        start = _offset(lane)
        periods, rest = divmod(start + turn, PERIOD)
        counts: np.ndarray = periods * self._turns_before[-1] + self._turns_before[rest]
        return counts - self._turns_before[start]


def _lanes(most: int, batch_size: int, samples: int) -> int:
    """Fewer lanes for a small dataset: a chunk must not see a sample of its lane twice."""
    fitting = [
        n
        for n in range(1, most + 1)
        if most % n == 0 and n * (batch_size // chunks_of_step(batch_size, n)) <= samples
    ]
    return max(fitting, default=1)


def chunks_of_step(batch_size: int, lanes: int) -> int:
    """Into how many chunks, each of one lane, a step is divided: a divisor of both numbers."""
    most = max(_FEWEST_CHUNKS, batch_size // _LARGE_CHUNK)
    common = math.gcd(batch_size, lanes)
    return max(n for n in range(1, min(most, common) + 1) if common % n == 0)


def schedule(weights: Sequence[float]) -> np.ndarray:
    """int64 (PERIOD,): which dataset has each turn; shares to a thousandth, spread as evenly as can be."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * PERIOD
    counts = np.floor(shares).astype(np.int64)
    short = np.argsort(counts - shares, kind="stable")[: PERIOD - int(counts.sum())]
    counts[short] += 1
    if (counts == 0).any():
        raise ConfigError(f"train.datasets: a weight is below a thousandth of all: {list(weights)}")
    ideal = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(ideal, kind="stable")]


def _offset(lane: int) -> int:
    """Lanes begin at different places of the schedule, so that a step mixes datasets as the whole run does."""
    return lane * 619 % PERIOD  # a prime, so that the pattern of no simple ratio repeats from lane to lane


class _Parts(NamedTuple):
    """Stretches of shards, int64 (parts,) each."""

    shard: np.ndarray
    first: np.ndarray
    length: np.ndarray


class _Dataset:
    def __init__(
        self, counts: np.ndarray, first_shard: int, name: str, seed: int, lanes: int, window: int
    ) -> None:
        self.total = int(counts.sum())
        self.name, self.seed, self.window = name, seed, window
        self.parts = _deal(counts, first_shard, lanes, purpose_key(seed, f"order/{name}/shards"))
        self._lanes: dict[int, _Lane] = {}
        self.soon: list[np.ndarray] = []

    def lane(self, number: int) -> _Lane:
        if number not in self._lanes:
            key = purpose_key(self.seed, f"order/{self.name}/lane/{number}")
            self._lanes[number] = _Lane(self.parts[number], self.window, key, self.soon)
        return self._lanes[number]


def _deal(counts: np.ndarray, first_shard: int, lanes: int, key: int) -> list[_Parts]:
    """The shards in random order, end to end, cut into equal parts."""
    shards = _shuffle(len(counts), key)
    ends = np.cumsum(counts[shards])
    starts = ends - counts[shards]
    total = int(ends[-1])
    dealt = []
    for lane in range(lanes):
        low, high = lane * total // lanes, (lane + 1) * total // lanes
        here = np.flatnonzero((ends > low) & (starts < high))
        first = np.maximum(low - starts[here], 0)
        count = np.minimum(ends[here], high) - starts[here] - first
        dealt.append(_Parts(shards[here] + first_shard, first, count))
    return dealt


class _Lane:
    """Reads its parts over and over, shuffled. Keeps one window at a time."""

    def __init__(self, parts: _Parts, window: int, key: int, soon: list[np.ndarray]) -> None:
        self.parts, self.window, self.key, self.soon = parts, window, key, soon
        self.total = int(parts.length.sum())
        self._at = (-1, -1)  # epoch and window of what follows
        self._shard = self._place = self._visit = np.zeros(0, np.int64)

    def take(self, start: int, count: int) -> list[tuple[np.ndarray, ...]]:
        """Samples ``start .. start + count`` of the lane's endless sequence: shards, places and visits, piece by piece."""
        pieces: list[tuple[np.ndarray, ...]] = []
        while count:
            epoch, place = divmod(start, self.total)
            window, begin = divmod(place, self.window)
            if self._at != (epoch, window):
                self._enter(epoch, window)
            end = min(begin + count, len(self._shard))
            pieces.append((self._shard[begin:end], self._place[begin:end], self._visit[begin:end]))
            start, count = start + end - begin, count - (end - begin)
        return pieces

    def _enter(self, epoch: int, window: int) -> None:
        key = int(mix(np.array([(self.key + epoch) % 2**64], np.uint64))[0])
        parts = _Parts(*(column[_shuffle(len(self.parts.shard), key)] for column in self.parts))
        ends = np.cumsum(parts.length)
        low, high = window * self.window, min((window + 1) * self.window, self.total)
        place = low + _shuffle(high - low, (key + 1 + window) % 2**64)
        part = np.searchsorted(ends, place, side="right")
        self._shard = parts.shard[part]
        self._place = parts.first[part] + place - (ends - parts.length)[part]
        self._visit = np.full(high - low, epoch, np.int64)
        self._at = (epoch, window)
        until = np.searchsorted(ends, min(high + self.window, self.total) - 1, side="right")
        self.soon.append(parts.shard[np.searchsorted(ends, low, side="right") : until + 1])


def _shuffle(count: int, key: int) -> np.ndarray:
    """int64 (count,): a random permutation. Integers alone, so that no library's version changes it."""
    start = mix(np.array([key], np.uint64))
    return np.argsort(mix(start + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN), kind="stable")
