"""A number for each link: how far labels are from other labels of their modality, and the trivial baseline.

Which figures a modality has follows from its label contract, so a new modality is measured without being named here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fourmill.labels import Boxes, Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import LabelContract, Modality
from fourmill.train.metrics import abs_rel, ap50, confusion, delta1, mean_angular_error_deg

Family = Literal[
    "image", "depth", "relative", "normal", "classes", "boxes", "text", "features", "map", "vector", "scalar",
    "metadata", "palette", "poses", "instances",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """How one number is called and shown. ``better``: lower or higher."""

    name: str
    title: str
    better: Literal["lower", "higher"]
    unit: str = ""
    digits: int = 3

    def text(self, value: float) -> str:
        return "–" if math.isnan(value) else f"{value:.{self.digits}f}{self.unit}"


def family_of(contract: LabelContract) -> Family:
    """What a contract's labels are, as far as drawing and measuring go."""
    if contract.form == "map":
        if contract.classes or contract.units == "class id":
            return "classes"
        if contract.unit_norm and contract.channels == 3:
            return "normal"
        if contract.channels is None and contract.units == "metres":
            return "depth"
        return "relative" if contract.channels is None and contract.units.startswith("relative") else "map"
    return contract.form


class Measure(ABC):
    """Adds up over pairs of labels; holds sums, never maps."""

    figures: ClassVar[tuple[Figure, ...]]

    def __init__(self, modality: Modality) -> None:
        self.contract = modality.contract
        self.pairs = 0

    def add(self, made: Label, reference: Label) -> None:
        self.pairs += 1
        self._add(made, reference)

    def values(self) -> dict[str, float]:
        """Figure by name; {} while nothing was added."""
        if not self.pairs:
            return {}
        return dict(zip((f.name for f in self.figures), (float(v) for v in self._values()), strict=True))

    @abstractmethod
    def _add(self, made: Label, reference: Label) -> None: ...

    @abstractmethod
    def _values(self) -> Iterable[float]: ...


class Mean(Measure):
    """The mean over labels of functions of a pair; all maps of a dataset have one size."""

    functions: ClassVar[tuple[Callable[[Any, Any, LabelContract], float], ...]]

    def __init__(self, modality: Modality) -> None:
        super().__init__(modality)
        self._sums = np.zeros(len(self.functions))

    def _add(self, made: Label, reference: Label) -> None:
        self._sums += [function(made, reference, self.contract) for function in self.functions]

    def _values(self) -> Iterable[float]:
        return self._sums / self.pairs


def _psnr(made: np.ndarray, reference: np.ndarray, contract: LabelContract) -> float:
    square = np.mean((made.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(255**2 / max(float(square), 1e-3)))


def _cosine(made: np.ndarray, reference: np.ndarray, contract: LabelContract) -> float:
    a, b = made.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(norms, 1e-12)).mean())


def _absolute(made: Any, reference: Any, contract: LabelContract) -> float:
    return float(np.mean(np.abs(np.asarray(made, np.float64) - np.asarray(reference, np.float64))))


def _standardised(made: np.ndarray, reference: np.ndarray, contract: LabelContract) -> float:
    """Depth of unknown scale and shift: each map by its own mean and deviation."""

    def standard(values: np.ndarray) -> np.ndarray:
        wide = values.astype(np.float64)
        return (wide - wide.mean()) / max(float(wide.std()), 1e-6)

    return float(np.abs(standard(made) - standard(reference)).mean())


def _hex(colours: np.ndarray) -> str:
    return " ".join(f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours.tolist())


_WORDS: dict[type, Callable[[Any], str]] = {
    Metadata: lambda label: ", ".join(f"{name} {value:.4g}" for name, value in label.values.items()),
    Palettes: lambda label: "; ".join(_hex(colours) for colours in label.colours),
    Poses: lambda label: f"{len(label)} people",
    Instances: lambda label: f"{len(label)} instances",
}


def first_text(label: Label) -> str:
    """A caption, or the first of several; what is in a structure."""
    if type(label) in _WORDS:
        return _WORDS[type(label)](label)
    return label if isinstance(label, str) else next(iter(label), "")


def _exact(made: Label, reference: Label, contract: LabelContract) -> float:
    return float(_words(made) == _words(reference))


def _token_f1(made: Label, reference: Label, contract: LabelContract) -> float:
    a, b = Counter(_words(made)), Counter(_words(reference))
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values())) if a or b else 1.0


def _words(label: Label) -> list[str]:
    """Lower case, punctuation apart from its word."""
    text = first_text(label).lower()
    return "".join(c if c.isalnum() else f" {c} " for c in text).split()


class ImageMeasure(Mean):
    figures = (Figure("psnr_db", "PSNR", "higher", " dB", 1),)
    functions = (_psnr,)


class DepthMeasure(Mean):
    figures = (Figure("abs_rel", "AbsRel", "lower"), Figure("delta1", "δ < 1.25", "higher"))
    functions = (lambda a, b, _: abs_rel(a, b), lambda a, b, _: delta1(a, b))


class RelativeMeasure(Mean):
    figures = (Figure("standardised_error", "standardised error", "lower"),)
    functions = (_standardised,)


class NormalMeasure(Mean):
    figures = (Figure("mean_degrees", "mean angle", "lower", "°", 1),)
    functions = (lambda a, b, _: mean_angular_error_deg(a, b),)


class FeatureMeasure(Mean):
    figures = (Figure("cosine", "mean cosine", "higher"),)
    functions = (_cosine,)


class MapMeasure(Mean):
    figures = (Figure("absolute_error", "mean absolute error", "lower"),)
    functions = (_absolute,)


class TextMeasure(Mean):
    figures = (Figure("token_f1", "token F1", "higher"), Figure("exact", "exact match", "higher", "", 2))
    functions = (_token_f1, _exact)


def _off_by(made: Label, reference: Label, contract: LabelContract) -> float:
    return float(abs(len(made) - len(reference)))


class CountMeasure(Mean):
    """Of structures that are sets of something: how many there are too few or too many."""

    figures = (Figure("off_by", "off by", "lower", "", 2),)
    functions = (_off_by,)


class ClassMeasure(Measure):
    """Counts over the pixels of all images, of which the mean IoU is made."""

    figures = (Figure("miou", "mIoU", "higher"), Figure("pixel_accuracy", "pixel accuracy", "higher"))

    def __init__(self, modality: Modality) -> None:
        super().__init__(modality)
        self.classes = max(1, len(self.contract.classes)) if self.contract.classes else 256
        self._counts = np.zeros((self.classes, self.classes + 1), np.int64)

    def _add(self, made: Label, reference: Label) -> None:
        self._counts += confusion(made, reference, self.classes)

    def _values(self) -> Iterable[float]:
        counts = self._counts
        hit = np.diagonal(counts).astype(np.float64)
        union = counts.sum(1) + counts[:, : self.classes].sum(0) - hit
        seen = union > 0
        yield float(np.mean(hit[seen] / union[seen])) if seen.any() else float("nan")
        yield float(hit.sum() / max(1, counts.sum()))


class BoxMeasure(Measure):
    figures = (Figure("ap50", "AP50", "higher"),)

    def __init__(self, modality: Modality) -> None:
        super().__init__(modality)
        self._made: list[Boxes] = []
        self._reference: list[Boxes] = []

    def _add(self, made: Label, reference: Label) -> None:
        self._made.append(made)
        self._reference.append(reference)

    def _values(self) -> Iterable[float]:
        yield ap50(self._made, self._reference)


_MEASURES: dict[Family, type[Measure]] = {
    "image": ImageMeasure,
    "depth": DepthMeasure,
    "relative": RelativeMeasure,
    "normal": NormalMeasure,
    "classes": ClassMeasure,
    "boxes": BoxMeasure,
    "text": TextMeasure,
    "features": FeatureMeasure,
    "map": MapMeasure,
    "vector": FeatureMeasure,
    "scalar": MapMeasure,
    "metadata": CountMeasure,
    "palette": CountMeasure,
    "poses": CountMeasure,
    "instances": CountMeasure,
}


def measure_class(modality: Modality) -> type[Measure]:
    return _MEASURES[family_of(modality.contract)]


class Baseline:
    """What can be said of every image alike: per pixel the training labels' mean, or their most frequent class."""

    FAMILIES: ClassVar[frozenset[Family]] = frozenset({"depth", "relative", "normal", "classes", "features"})

    def __init__(self, modality: Modality) -> None:
        self.family = family_of(modality.contract)
        self.dtype = np.dtype(modality.contract.dtype)
        self._classes = len(modality.contract.classes) or 256
        self._sum: Any = 0
        self.labels = 0

    def add(self, labels: Sequence[np.ndarray]) -> None:
        for label in labels:
            if self.family == "classes":
                self._count(label)
            else:
                self._sum = self._sum + label.astype(np.float64)
            self.labels += 1

    def _count(self, label: np.ndarray) -> None:
        if not self.labels:
            self._sum = np.zeros((*label.shape, self._classes), np.int32)
        flat = label.reshape(-1).astype(np.int64)
        known = np.flatnonzero(flat < self._classes)  # 255 is void
        self._sum.reshape(-1, self._classes)[known, flat[known]] += 1

    def label(self) -> np.ndarray | None:
        """The one label that the baseline gives to everything; None where it saw none."""
        if not self.labels:
            return None
        if self.family == "classes":
            return self._sum.argmax(-1).astype(self.dtype)
        mean = self._sum / self.labels
        if self.family == "normal":
            mean /= np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
        return mean.astype(self.dtype)


@dataclass(frozen=True, slots=True)
class Target:
    """What a model has to beat the baseline by: ``value`` against ``limit``."""

    modality: str
    says: str
    value: float
    limit: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def targets_of(
    name: str, family: Family, model: dict[str, float], baseline: dict[str, float]
) -> list[Target]:
    """Depth: AbsRel at most 0.7 of the baseline's; normals: 0.8 of its angle; classes: mIoU 0.15 above it."""
    if not model or not baseline:
        return []
    if family in ("depth", "normal"):
        figure, share = ("abs_rel", 0.7) if family == "depth" else ("mean_degrees", 0.8)
        title = "AbsRel" if family == "depth" else "mean angle"
        limit = share * baseline[figure]
        says = f"{title} at most {share} of the baseline's"
        return [Target(name, says, model[figure], limit, model[figure] <= limit)]
    if family == "classes":
        limit = baseline["miou"] + 0.15
        return [
            Target(
                name, "mIoU at least 0.15 above the baseline's", model["miou"], limit, model["miou"] >= limit
            )
        ]
    return []


#: every figure by name
FIGURES: dict[str, Figure] = {
    figure.name: figure for measure in _MEASURES.values() for figure in measure.figures
}
