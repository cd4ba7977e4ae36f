"""What is measured of every label: a few numbers per image, added up by shard.

They cost a fraction of a millisecond per image, are stored in receipts, and are what a shard is judged by: against limits
when it is committed, and against other shards by `fourmill qa`. A figure is one number per image (its sum and its sum of squares are
kept, so that a difference between shards can be held against the differences between images); shares say which part of an
image's pixels, boxes or vectors lies in which bin or class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from fourmill.labels import Absent, Boxes, Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import LabelContract, Modality

LOOKED_AT = 64  # at most so many pixels along each side of a map
BINS = 16
SMALLEST = 2.0**-20  # what is nearer to zero falls into one bin with it
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


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one label. ``shares`` add up to one, or are empty."""

    figures: Mapping[str, float]
    shares: Mapping[str, float] = field(default_factory=dict)


def figure_names(modality: Modality, noted: Iterable[str] = ()) -> tuple[str, ...]:
    """Everything that can be asked of this modality's figures."""
    return (*FIGURES[_form(modality.contract)], *TOKEN_FIGURES.get(modality.kind, ()), *noted)


def measure(modality: Modality, label: Label, noted: Mapping[str, float] | None = None) -> Measured | None:
    """A label that keeps its contract; None for one that is absent. ``noted``: what its labeler said of it."""
    if isinstance(label, Absent):
        return None
    contract = modality.contract
    found = _MEASURES[_form(contract)](label, contract)
    return Measured({**found.figures, **noted}, found.shares) if noted else found


def measure_tokens(modality: Modality, values: Sequence[Any]) -> dict[str, float]:
    """Of the token ids of an image's crops."""
    if modality.kind == "grid":
        return {"distinct tokens": float(np.mean([len(np.unique(value)) for value in values]))}
    if modality.kind == "sequence":
        return {"tokens": float(np.mean([len(value) for value in values]))}
    return {}


def _form(contract: LabelContract) -> str:
    if contract.form == "map":
        return "classes" if contract.classes else "vectors" if contract.unit_norm else "map"
    return contract.form


def _look(label: np.ndarray) -> np.ndarray:
    """Every n-th row and column."""
    step_y, step_x = (max(1, side // LOOKED_AT) for side in label.shape[:2])
    return label[step_y // 2 :: step_y, step_x // 2 :: step_x]


def _is_constant(values: np.ndarray) -> float:
    """1.0 where everything is the same: a network that saw nothing, or does not work."""
    low, high = float(values.min()), float(values.max())
    return float(high - low <= 1e-6 * max(abs(low), abs(high)))


def _map(label: np.ndarray, contract: LabelContract) -> Measured:
    seen = _look(label).astype(np.float64)
    figures = {"mean": seen.mean(), "spread": seen.std(), "constant": _is_constant(seen)}
    return Measured(_floats(figures), _binned(seen, contract))


def _vectors(label: np.ndarray, contract: LabelContract) -> Measured:
    seen = _look(label).reshape(-1, label.shape[-1]).astype(np.float64)
    mean = seen.mean(axis=0)
    figures = dict(zip("xyz", mean, strict=False))  # unit vectors have three channels
    figures |= {"spread": 1 - np.linalg.norm(mean), "constant": _is_constant_vectors(seen)}
    return Measured(_floats(figures), _linear(seen[:, -1], -1.0, 1.0))


def _is_constant_vectors(vectors: np.ndarray) -> float:
    return float(np.ptp(vectors, axis=0).max() <= 1e-6)


def _classes(label: np.ndarray, contract: LabelContract) -> Measured:
    ids, counts = np.unique(_look(label), return_counts=True)
    shares = counts / counts.sum()
    figures = {"classes": len(ids), "largest": shares.max(), "constant": len(ids) == 1}
    return Measured(
        _floats(figures), {contract.classes[i]: float(s) for i, s in zip(ids, shares, strict=True)}
    )


def _boxes(label: Boxes, contract: LabelContract) -> Measured:
    figures: dict[str, float] = {"boxes": len(label), "empty": len(label) == 0}
    if len(label):
        width, height = (label.xyxy[:, 2:] - label.xyxy[:, :2]).T
        figures |= {"score": label.scores.mean(), "area": (width * height).mean()}
    names = [contract.classes[i] if contract.classes else str(i) for i in label.class_ids]
    return Measured(_floats(figures), {name: names.count(name) / len(names) for name in set(names)})


def _metadata(label: Metadata, contract: LabelContract) -> Measured:
    shares = {name: 1 / len(label) for name in label.values}
    return Measured(_floats({"fields": len(label), "empty": len(label) == 0}), shares)


def _palette(label: Palettes, contract: LabelContract) -> Measured:
    return Measured(_floats({"palettes": len(label), "empty": len(label) == 0}))


def _poses(label: Poses, contract: LabelContract) -> Measured:
    return _counted("people", label.xyxy)


def _instances(label: Instances, contract: LabelContract) -> Measured:
    return _counted("instances", label.xyxy)


def _counted(name: str, xyxy: np.ndarray) -> Measured:
    figures: dict[str, float] = {name: len(xyxy), "empty": len(xyxy) == 0}
    if len(xyxy):
        width, height = (xyxy[:, 2:] - xyxy[:, :2]).T
        figures["area"] = (width * height).mean()
    return Measured(_floats(figures))


def _features(label: np.ndarray, contract: LabelContract) -> Measured:
    vectors = label.reshape(-1, label.shape[-1]).astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1)
    directions = vectors / np.maximum(norms, 1e-12)[:, None]
    spread = 1 - np.linalg.norm(directions.mean(axis=0))
    figures = {
        "norm": norms.mean(),
        "spread": spread,
        "constant": len(vectors) > 1 and np.ptp(vectors, axis=0).max() <= 1e-6,
    }
    return Measured(_floats(figures), _binned(norms, LabelContract(form="vector", dtype="float32")))


def _vector(label: np.ndarray, contract: LabelContract) -> Measured:
    seen = label.astype(np.float64)
    figures = {
        "mean": seen.mean(),
        "norm": math.sqrt(float(seen @ seen)),
        "constant": len(seen) > 1 and _is_constant(seen),
    }
    return Measured(_floats(figures), _binned(seen, contract))


def _text(label: Sequence[str], contract: LabelContract) -> Measured:
    words = [len(text.split()) for text in label]
    return Measured(_floats({"words": np.mean(words) if words else 0, "empty": not any(words)}))


def _scalar(label: float, contract: LabelContract) -> Measured:
    return Measured({"value": float(label)}, _binned(np.array([float(label)]), contract))


def _image(label: np.ndarray, contract: LabelContract) -> Measured:
    seen = _look(label).mean(axis=-1) / 255
    figures = {"brightness": seen.mean(), "contrast": seen.std(), "constant": _is_constant(seen)}
    return Measured(_floats(figures), _linear(seen, 0.0, 1.0))


_MEASURES: dict[str, Callable[[Any, LabelContract], Measured]] = {
    "map": _map,
    "vectors": _vectors,
    "classes": _classes,
    "boxes": _boxes,
    "metadata": _metadata,
    "palette": _palette,
    "poses": _poses,
    "instances": _instances,
    "features": _features,
    "vector": _vector,
    "text": _text,
    "scalar": _scalar,
    "image": _image,
}


def _floats(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _binned(values: np.ndarray, contract: LabelContract) -> dict[str, float]:
    """Between known bounds in equal steps, else in half octaves; a bin is named by its lower edge."""
    if contract.low is not None and contract.high is not None:
        return _linear(values, contract.low, contract.high)
    octaves = np.floor(2 * np.log2(np.maximum(np.abs(values), SMALLEST))).astype(int)
    found, counts = np.unique(2 * octaves + (values < 0), return_counts=True)
    return {
        f"{'-' if code % 2 else ''}{2 ** (code // 2 / 2):.3g}": float(count) / values.size
        for code, count in zip(found, counts, strict=True)
    }


def _linear(values: np.ndarray, low: float, high: float) -> dict[str, float]:
    width = (high - low) / BINS or 1.0
    bins = np.minimum(np.maximum((values.ravel() - low) * (1 / width), 0), BINS - 1).astype(np.intp)
    counts = np.bincount(bins, minlength=BINS).tolist()
    return {name: count / values.size for name, count in zip(_edges(low, high), counts, strict=True) if count}


@lru_cache(maxsize=64)
def _edges(low: float, high: float) -> tuple[str, ...]:
    return tuple(f"{low + i * (high - low) / BINS:.3g}" for i in range(BINS))


# -- of a shard ---------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over the images of a shard. ``sums``: figure -> [images, sum, sum of squares]; ``shares``: sums by bin or class."""

    rows: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def add(self, measured: Measured) -> None:
        self.rows += 1
        for name, value in measured.figures.items():
            self._add(name, [1.0, value, value * value])
        for name, share in measured.shares.items():
            self.shares[name] = self.shares.get(name, 0.0) + share

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
    for name, limit in {**DEFAULT_LIMITS.get(_form(modality.contract), {}), **limits}.items():
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
