"""What is measured of every label: a few numbers per image, added up by shard.

They are taken of a whole micro-batch at a time (`fourmill.labelers.measure`), stored in receipts, and are what a shard is
judged by: against limits when it is committed, and against other shards by `fourmill qa`. A figure is one number per image (its sum and its sum of squares are
kept, so that a difference between shards can be held against the differences between images); shares say which part of an
image's pixels, boxes or vectors lies in which bin or class.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fourmill.modality import LabelContract, Modality

LOOKED_AT = 64  # at most so many pixels along each side of a map
_DIGITS = 6  # of sums that are stored

#: the figures of each form of label; a labeler may note others, and modalities that are tokenized have TOKEN_FIGURES too
FIGURES: Mapping[str, tuple[str, ...]] = {
    "map": ("mean", "spread", "constant"),
    "vectors": ("x", "y", "z", "spread", "constant"),  # maps of unit vectors
    "classes": ("classes", "largest", "constant"),  # maps of class ids
    "boxes": ("boxes", "empty", "score", "area"),
    "metadata": ("fields", "empty"),
    "palette": ("palettes", "empty"),
    "poses": ("people", "empty", "area"),
    "instances": ("instances", "empty", "area"),
    "features": ("norm", "spread", "constant"),
    "vector": ("mean", "norm", "constant"),
    "text": ("words", "empty"),
    "scalar": ("value",),
    "image": ("brightness", "contrast", "constant"),
}
TOKEN_FIGURES: Mapping[str, tuple[str, ...]] = {
    "grid": ("distinct tokens",),
    "vector": (),
    "sequence": ("tokens",),
}


def figure_names(modality: Modality, noted: Iterable[str] = ()) -> tuple[str, ...]:
    """Everything that can be asked of this modality's figures."""
    return (*FIGURES[form_of(modality.contract)], *TOKEN_FIGURES.get(modality.kind, ()), *noted)


def form_of(contract: LabelContract) -> str:
    if contract.form == "map":
        return "classes" if contract.classes else "vectors" if contract.unit_norm else "map"
    return contract.form


# -- of images ----------------------------------------------------------------------------------------


@dataclass
class Measures:
    """Of the labels of several images, by row. ``seen`` bool (rows,): False where there is no label.

    ``values`` float64 (rows, figures), NaN where a label has no such figure; ``shares`` float64 (rows, bins): of a row they
    add up to one, or all are zero.
    """

    figures: tuple[str, ...]
    values: np.ndarray
    bins: tuple[str, ...]
    shares: np.ndarray
    seen: np.ndarray

    def copy(self) -> Measures:
        """The same in arrays of its own."""
        return replace(self, values=self.values.copy(), shares=self.shares.copy(), seen=self.seen.copy())

    @classmethod
    def none(cls, rows: int) -> Measures:
        return cls((), np.zeros((rows, 0)), (), np.zeros((rows, 0)), np.zeros(rows, bool))

    @classmethod
    def of(
        cls,
        figures: Sequence[Mapping[str, float]],
        shares: Sequence[Mapping[str, float]] | None = None,
    ) -> Measures:
        """Of rows that were measured one by one."""
        made = cls.none(len(figures))
        made.seen[:] = True
        made.figures, made.values = _table(figures, np.nan)
        if shares is not None:
            made.bins, made.shares = _table(shares, 0.0)
        return made

    def add(self, figure: str, values: np.ndarray) -> None:
        """One more figure, float (rows,), NaN where a row has none."""
        self.figures = (*self.figures, figure)
        self.values = np.column_stack([self.values, values])

    def put(self, at: Sequence[int], other: Measures, rows: Sequence[int]) -> None:
        """Row for row, put ``rows`` of another in place of the ones ``at`` these indices."""
        here, there = np.asarray(at, np.intp), np.asarray(rows, np.intp)
        self.figures, self.values = _put(
            self.figures, self.values, here, other.figures, other.values[there], np.nan
        )
        self.bins, self.shares = _put(self.bins, self.shares, here, other.bins, other.shares[there], 0.0)
        self.seen[here] = other.seen[there]


def _table(rows: Sequence[Mapping[str, float]], blank: float) -> tuple[tuple[str, ...], np.ndarray]:
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    values = np.array([[row.get(name, blank) for name in names] for row in rows], np.float64)
    return names, values.reshape(len(rows), len(names))


def _put(
    names: tuple[str, ...], table: np.ndarray, at: np.ndarray, others: tuple[str, ...], rows: np.ndarray,
    blank: float,
) -> tuple[tuple[str, ...], np.ndarray]:  # fmt: skip
    """A table by named columns that it may not have yet."""
    known = names
    if others != names:
        known = (*names, *(name for name in dict.fromkeys(others) if name not in names))
        table = np.column_stack([table, np.full((len(table), len(known) - len(names)), blank)])
    table[at] = blank
    table[at[:, None], [known.index(name) for name in others]] = rows
    return known, table


# -- of a shard ---------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over the images of a shard. ``sums``: figure -> [images, sum, sum of squares]; ``shares``: sums by bin or class."""

    rows: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, measures: Measures) -> Tally:
        """Rows are added in their order: how they were divided into micro-batches makes no difference."""
        seen = measures.seen
        total = cls(int(seen.sum()))
        for name, column in zip(measures.figures, measures.values[seen].T, strict=True):
            known = column[~np.isnan(column)]
            if len(known):
                total._add(name, [float(len(known)), float(known.sum()), float((known * known).sum())])
        for name, column in zip(measures.bins, measures.shares[seen].T, strict=True):
            if column.any():
                total.shares[name] = total.shares.get(name, 0.0) + float(column.sum())
        return total

    def merge(self, other: Tally) -> None:
        self.rows += other.rows
        for name, sums in other.sums.items():
            self._add(name, sums)
        for name, share in other.shares.items():
            self.shares[name] = self.shares.get(name, 0.0) + share

    def _add(self, name: str, sums: Sequence[float]) -> None:
        mine = self.sums.setdefault(name, [0.0, 0.0, 0.0])
        for i, value in enumerate(sums):
            mine[i] += value

    def mean(self, name: str) -> float | None:
        """Over the images that have this figure."""
        count, total, _ = self.sums.get(name, (0, 0, 0))
        return total / count if count else None

    def variance(self, name: str) -> float:
        """Between images."""
        count, total, squares = self.sums[name]
        return max(0.0, squares / count - (total / count) ** 2)

    def distribution(self) -> dict[str, float]:
        """The mean shares of an image: they add up to one, or are empty."""
        whole = sum(self.shares.values())
        return {name: share / whole for name, share in self.shares.items()} if whole else {}

    def to_text(self) -> str:
        """One line of JSON, sorted, numbers cut to what a comparison can use."""
        body = {
            "rows": self.rows,
            "figures": {name: [_cut(value) for value in sums] for name, sums in self.sums.items()},
            "shares": {name: _cut(share) for name, share in self.shares.items()},
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_text(cls, text: str) -> Tally:
        """What `to_text` wrote; an empty tally from an empty text (receipts from before there were figures)."""
        if not text:
            return cls()
        body = json.loads(text)
        return cls(int(body["rows"]), {n: list(s) for n, s in body["figures"].items()}, dict(body["shares"]))


def _cut(value: float) -> float:
    number = float(f"{value:.{_DIGITS}g}")
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


# -- limits -------------------------------------------------------------------------------------------

#: fewer images with a value say nothing about a labeler
JUDGED_ROWS = 10


@dataclass(frozen=True, slots=True)
class Limit:
    """What the mean of a figure over a shard may be. Beyond ``warn_*`` it is said, beyond ``refuse_*`` not committed."""

    warn_below: float | None = None
    warn_above: float | None = None
    refuse_below: float | None = None
    refuse_above: float | None = None


#: of every modality that has the figure, unless its configuration says otherwise
DEFAULT_LIMITS: Mapping[str, Mapping[str, Limit]] = {
    "map": {"constant": Limit(warn_above=0.2, refuse_above=0.9)},
    "vectors": {"constant": Limit(warn_above=0.2, refuse_above=0.9)},
    "classes": {"constant": Limit(warn_above=0.5)},
    "features": {"constant": Limit(warn_above=0.2, refuse_above=0.9)},
    "boxes": {"empty": Limit(warn_above=0.9)},
    "metadata": {"empty": Limit(warn_above=0.2)},
    "palette": {"empty": Limit(warn_above=0.2)},
    "instances": {"empty": Limit(warn_above=0.9)},
    "image": {"constant": Limit(warn_above=0.5)},
}


@dataclass(frozen=True, slots=True)
class Judgement:
    warnings: tuple[str, ...] = ()
    refusal: str | None = None


def judge(modality: Modality, tally: Tally, limits: Mapping[str, Limit]) -> Judgement:
    """Hold a shard's figures against ``limits`` (by figure) and the default ones that these leave."""
    if tally.rows < JUDGED_ROWS:
        return Judgement()
    warnings = []
    for name, limit in {**DEFAULT_LIMITS.get(form_of(modality.contract), {}), **limits}.items():
        mean = tally.mean(name)
        if mean is None:
            continue
        beyond = _beyond(mean, limit.refuse_below, limit.refuse_above)
        if beyond:
            return Judgement(refusal=f"{name} is {mean:.3g} on average over {tally.rows} images, {beyond}")
        beyond = _beyond(mean, limit.warn_below, limit.warn_above)
        if beyond:
            warnings.append(f"{name} is {mean:.3g} on average, {beyond}")
    return Judgement(tuple(warnings))


def _beyond(value: float, low: float | None, high: float | None) -> str:
    if low is not None and not value >= low:
        return f"below {low:g}"
    return f"above {high:g}" if high is not None and not value <= high else ""
