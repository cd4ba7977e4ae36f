"""`fourmill qa`: which shards of a dataset are unlike the others, or unlike the first ones, from what receipts measured.

A labeler that broke on one machine, a source whose second half is of another kind, a network that was exchanged without anybody
saying so: labels keep their contract, and are wrong. Every figure of a shard is held against the median shard, and against
the shards that were made first; a shard is odd where the difference is both certain (many times what sampling images and the
usual differences between shards explain) and large (compared with the differences between images).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from fourmill.flows.status import latest_run, recipe_of, warnings_of
from fourmill.labelers.figures import Tally
from fourmill.labels import is_fault
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Receipt

CERTAIN = 6.0  # standard errors
LARGE = 0.5  # standard deviations between images
FIRST_SHARE, FIRST_MOST = 0.1, 10  # of the shards are the first ones, and no more than so many
FEWEST = 3  # shards that say what is usual
MOVED = 0.2  # of a distribution's mass, to be odd
ABSENT = "absent"
#: figures that are shares of images: a difference of less than this is small whatever the usual differences are
_SHARES: Mapping[str, float] = {"constant": 0.1, "empty": 0.1, ABSENT: 0.02}
OTHERS, FIRST = "the other shards", "the first shards"


@dataclass(frozen=True, slots=True)
class Odd:
    """``value`` of a shard where ``usual`` is usual; ``size`` in standard deviations between images (of shares: the moved mass)."""

    column: str
    shard: int
    figure: str
    value: float
    usual: float
    size: float
    against: str
    note: str = ""


@dataclass(frozen=True)
class ColumnQuality:
    """``figures``: name -> (mean over images, standard deviation between images)."""

    shards: int
    measured: int  # shards whose receipts have figures
    images: int
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)  # what commits warned of -> shards
    environments: dict[str, list[str]] = field(default_factory=dict)  # what differs between shards -> values


@dataclass(frozen=True)
class Quality:
    url: str
    columns: dict[str, ColumnQuality]
    odd: list[Odd]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(dataset: Dataset) -> Quality:
    """Of the recipes that the newest run asked for. Reads receipts, no data."""
    run = latest_run(dataset)
    short = dataset.samples_recipe()
    samples = dataset.receipts(SAMPLES, short) if short else {}
    columns: dict[str, ColumnQuality] = {}
    odd: list[Odd] = []
    for name, content in run["recipes"].items():
        recipe = recipe_of(content)
        receipts = dataset.receipts(name, recipe.short) if recipe else {}
        tallies = {shard: _tally(receipt, samples.get(shard)) for shard, receipt in receipts.items()}
        columns[name] = _column(receipts, tallies)
        odd += _odd_ones(name, receipts, tallies)
    return Quality(dataset.url, columns, odd)


def _tally(receipt: Receipt, samples: Receipt | None) -> Tally:
    """With the rows that have no value, though there is an image."""
    tally = Tally.from_text(receipt.figures)
    none = samples.absent if samples is not None else {}
    bad = sum(n - none.get(reason, 0) for reason, n in receipt.absent.items() if is_fault(reason))
    tally.sums[ABSENT] = [float(receipt.rows), float(bad), float(bad)]
    return tally


def _column(receipts: Mapping[int, Receipt], tallies: Mapping[int, Tally]) -> ColumnQuality:
    total = Tally()
    for tally in tallies.values():
        total.merge(tally)
    figures = {
        name: (total.mean(name) or 0.0, math.sqrt(total.variance(name)))
        for name in sorted(total.sums)
        if total.sums[name][0]
    }
    values: dict[str, set[str]] = {}
    for receipt in receipts.values():
        for key, value in receipt.environment.items():
            values.setdefault(key, set()).add(str(value))
    mixed = {key: sorted(found) for key, found in values.items() if len(found) > 1}
    measured = sum(bool(receipt.figures) for receipt in receipts.values())
    return ColumnQuality(len(receipts), measured, total.rows, figures, warnings_of(receipts.values()), mixed)


@dataclass(frozen=True, slots=True)
class _Usual:
    """What a figure usually is: of the median shard. ``scatter``: between shards, as a standard deviation."""

    mean: float
    variance: float  # between images
    scatter: float
    images: float

    @classmethod
    def of(cls, name: str, tallies: Iterable[Tally]) -> _Usual | None:
        with_it = [tally for tally in tallies if tally.sums.get(name, (0,))[0]]
        if not with_it:
            return None
        means = [float(tally.mean(name) or 0.0) for tally in with_it]
        mean = median(means)
        scatter = 1.4826 * median(
            abs(one - mean) for one in means
        )  # of normal deviates: their standard deviation
        variance = median(tally.variance(name) for tally in with_it)
        return cls(mean, variance, scatter, sum(tally.sums[name][0] for tally in with_it))


def _odd_ones(column: str, receipts: Mapping[int, Receipt], tallies: Mapping[int, Tally]) -> Iterator[Odd]:
    measured = {shard: tally for shard, tally in tallies.items() if receipts[shard].figures}
    if len(measured) < FEWEST:
        return
    note = _environment_notes(receipts)
    first = frozenset(_first(receipts, list(measured)))
    for name in sorted({name for tally in measured.values() for name in tally.sums}):
        usual = _Usual.of(name, measured.values())
        at_first = _Usual.of(name, (measured[shard] for shard in first))
        for shard, tally in measured.items():
            for against, reference in ((OTHERS, usual), (FIRST, None if shard in first else at_first)):
                found = None if reference is None else _compare(name, tally, reference)
                if found is not None:
                    yield Odd(column, shard, name, *found, against, note(shard))
                    break
    yield from _odd_distributions(column, measured, note)


def _first(receipts: Mapping[int, Receipt], shards: Sequence[int]) -> list[int]:
    """Those that were committed first."""
    count = min(FIRST_MOST, max(1, math.ceil(FIRST_SHARE * len(shards))))
    return sorted(shards, key=lambda shard: (receipts[shard].timings.get("committed", 0.0), shard))[:count]


def _compare(name: str, one: Tally, usual: _Usual) -> tuple[float, float, float] | None:
    """(value, usual, size) of a figure that is certainly and largely another one than usual."""
    value = one.mean(name)
    if value is None:
        return None
    error = math.sqrt(usual.variance * (1 / one.sums[name][0] + 1 / usual.images) + usual.scatter**2)
    deviation = max(math.sqrt(usual.variance), 0.02 * abs(usual.mean), 2 * _SHARES.get(name, 0.0), 1e-9)
    far = abs(value - usual.mean)
    if far < CERTAIN * error or far < LARGE * deviation:
        return None
    return value, usual.mean, far / deviation


def _odd_distributions(
    column: str, tallies: Mapping[int, Tally], note: Callable[[int], str]
) -> Iterator[Odd]:
    """Half the sum of absolute differences between a shard's distribution and that of all others together."""
    total = Tally()
    for tally in tallies.values():
        total.merge(tally)
    if not total.shares:
        return
    moved = {shard: _moved(tally, total) for shard, tally in tallies.items()}
    usual = median(moved.values())
    scatter = 1.4826 * median(abs(value - usual) for value in moved.values())
    for shard, value in moved.items():
        if value - usual > max(MOVED, CERTAIN * scatter):
            yield Odd(column, shard, "distribution", value, usual, value, OTHERS, note(shard))


def _moved(one: Tally, total: Tally) -> float:
    rest = Tally(shares={name: share - one.shares.get(name, 0.0) for name, share in total.shares.items()})
    mine, theirs = one.distribution(), rest.distribution()
    if not mine or not theirs:
        return 0.0
    return 0.5 * sum(abs(mine.get(name, 0.0) - theirs.get(name, 0.0)) for name in {*mine, *theirs})


def _environment_notes(receipts: Mapping[int, Receipt]) -> Callable[[int], str]:
    """Of a shard: where it was made otherwise than most, which is the first thing to look at."""
    usual = {}
    for key in sorted({key for receipt in receipts.values() for key in receipt.environment}):
        value, count = Counter(str(r.environment.get(key)) for r in receipts.values()).most_common(1)[0]
        if count > len(receipts) / 2:
            usual[key] = value

    def note(shard: int) -> str:
        mine = receipts[shard].environment
        others = (key for key in usual if key in mine and str(mine[key]) != usual[key])
        return next((f"{key} {mine[key]}, mostly {usual[key]}" for key in others), "")

    return note
