"""Whether the boxes of a detector and the classes of a segmentation network agree on what is where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fourmill.errors import ConfigError
from fourmill.labelers.base import LabelBatch, Labeler, register
from fourmill.labelers.card import Card
from fourmill.labels import NOT_APPLICABLE, Absent, Boxes, Label
from fourmill.modality import LabelContract, Modality

NOTHING = Absent(f"{NOT_APPLICABLE}nothing of a class that is both boxed and segmented")
#: an object fills about this share of its box, or more
FILLED = 0.5
#: a class that fewer of the image's pixels have is not looked for
SEEN = 0.005

DET_VS_SEMSEG = Modality(
    name="det_vs_semseg",
    kind="scalar",
    codec="scalar",
    doc="how far the labels det and semseg agree on what is where",
    contract=LabelContract(
        form="scalar",
        dtype="float32",
        units="share",
        low=0,
        high=1,
        flip="none",
        frame="harmonic mean of how much of the boxes is segmented and of the segments is boxed; larger is a better match",
    ),
)

_SUFFIX = re.compile(r"-(other-)?(merged|stuff)$")


@register("det_vs_semseg")
class DetVsSemseg(Labeler):
    """In [0, 1], from the labels "det" and "semseg", over the classes that both have by name.

    Of each box, the share of its pixels that have its class, over `FILLED` (at most 1), on average over boxes; and of the pixels
    of such classes, the share that lies in a box of its class. The label is the harmonic mean of both. Where there is neither a
    box nor a segment of at least `SEEN` of the image, there is nothing to compare, and no value. ``names`` maps names of
    det to names of semseg where they differ otherwise than in case and in COCO's endings (-merged, -stuff).
    """

    modality: ClassVar[Modality] = DET_VS_SEMSEG
    card: ClassVar[Card | None] = Card(
        expects="the labels `det` and `semseg`, with class names in common",
        note="no weights. 4M has no such modality: it is for filtering (`train.where`) and for `fourmill qa`",
    )
    inputs: ClassVar[tuple[str, ...]] = ("label:det", "label:semseg")
    options: ClassVar[Mapping[str, Any]] = {"names": {}, "min_score": 0.0}

    def describe(self) -> Modality:
        known = self.settings.upstream
        if {"det", "semseg"} <= known.keys() and not self._common():
            some = {name: ", ".join(known[name].contract.classes[:5]) for name in ("det", "semseg")}
            raise ConfigError(
                f"{self.where}: det ({some['det']}, ...) and semseg ({some['semseg']}, ...) have no class in common; map "
                f"names with {self.where}.names"
            )
        return DET_VS_SEMSEG

    def load(self) -> None:
        self.pairs = self._common()

    def _common(self) -> dict[int, int]:
        """Ids of det -> ids of semseg."""
        boxed, segmented = (
            self.settings.upstream[name].contract.classes if name in self.settings.upstream else ()
            for name in ("det", "semseg")
        )
        ids = {_plain(name): number for number, name in enumerate(segmented)}
        same = {_plain(a): _plain(b) for a, b in dict(self.params["names"]).items()}
        wanted = {number: same.get(_plain(name), _plain(name)) for number, name in enumerate(boxed)}
        return {number: ids[name] for number, name in wanted.items() if name in ids}

    def label(self, batch: LabelBatch) -> list[Label]:
        pairs = zip(batch.upstream["det"], batch.upstream["semseg"], strict=True)
        return [self._one(boxes, classes) for boxes, classes in pairs]

    def _one(self, boxes: Label, classes: Label) -> Label:
        for one in (boxes, classes):
            if isinstance(one, Absent):
                return one
        found = agreement(boxes.keep(boxes.scores >= float(self.params["min_score"])), classes, self.pairs)
        return NOTHING if found is None else found


def agreement(boxes: Boxes, classes: np.ndarray, pairs: Mapping[int, int]) -> float | None:
    """``classes`` uint8 (H, W); ``pairs``: ids of boxes -> ids of pixels. None where there is nothing to compare."""
    height, width = classes.shape
    inside = np.zeros(classes.shape, bool)  # pixels in a box of their class
    filled: list[float] = []
    for (x0, y0, x1, y1), box_class in zip(boxes.xyxy, boxes.class_ids, strict=True):
        if int(box_class) in pairs:
            rows = slice(int(y0 * height), max(int(y0 * height) + 1, round(float(y1) * height)))
            columns = slice(int(x0 * width), max(int(x0 * width) + 1, round(float(x1) * width)))
            its_own = classes[rows, columns] == pairs[int(box_class)]
            inside[rows, columns] |= its_own
            filled.append(min(1.0, float(its_own.mean()) / FILLED))
    ids, counts = np.unique(classes, return_counts=True)
    seen = [i for i, n in zip(ids, counts, strict=True) if i in pairs.values() and n >= SEEN * classes.size]
    if not filled and not seen:
        return None
    if not filled:
        return 0.0
    if not seen:
        return float(np.mean(filled))
    precision, recall = float(np.mean(filled)), float(inside[np.isin(classes, seen)].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _plain(name: str) -> str:
    return _SUFFIX.sub("", name.strip().lower())
