"""Labelers that know the answer: the ground truth of a source that has it.

With them a dataset's labels are perfect, and what is left of the error is what tokenization costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fourmill.crops import resize_map
from fourmill.labelers.base import LabelBatch, Labeler, register
from fourmill.labelers.card import Card
from fourmill.labelers.depth import DEPTH
from fourmill.labelers.det import DET
from fourmill.labelers.normal import NORMAL
from fourmill.labelers.semseg import SEMSEG
from fourmill.labels import Absent, Label
from fourmill.modality import Modality

NO_TRUTH = Absent("source has no truth")


class Oracle(Labeler):
    """The source's truth, resized to the frame where the dataset decodes at another size."""

    inputs: ClassVar[tuple[str, ...]] = ("truth",)
    card: ClassVar[Card | None] = Card(
        expects="a source with ground truth, such as `scenes`", note="no weights: the truth itself"
    )

    def describe(self) -> Modality:
        classes = self.params.get("classes")
        return self.modality.with_classes(tuple(classes)) if classes else self.modality

    def label(self, batch: LabelBatch) -> list[Label]:
        truths = batch.truth or [None] * len(batch)
        return [self._one(truth, frame) for truth, frame in zip(truths, batch.frames, strict=True)]

    def _one(self, truth: Mapping[str, Any] | None, frame: np.ndarray) -> Label:
        label = None if truth is None else truth.get(self.modality.name)
        if label is None:
            return NO_TRUTH
        return self._fit(label, (frame.shape[0], frame.shape[1]))

    def _fit(self, label: Label, size: tuple[int, int]) -> Label:
        contract = self.modality.contract
        if contract.form != "map":
            return label
        fitted = resize_map(label, size, contract.resample)
        if contract.unit_norm and fitted is not label:
            fitted = fitted / np.maximum(np.linalg.norm(fitted, axis=-1, keepdims=True), 1e-6)
        return fitted.astype(contract.dtype, copy=False)


@register("oracle_depth")
class OracleDepth(Oracle):
    """True z-depth, float32 (H, W) metres."""

    modality: ClassVar[Modality] = DEPTH


@register("oracle_normal")
class OracleNormal(Oracle):
    """True normals, float32 (H, W, 3)."""

    modality: ClassVar[Modality] = NORMAL


@register("oracle_semseg")
class OracleSemseg(Oracle):
    """True classes, uint8 (H, W). ``classes`` names the source's ids in order; the default is that of scenes."""

    modality: ClassVar[Modality] = SEMSEG
    options: ClassVar[Mapping[str, Any]] = {"classes": ("floor", "wall", "sphere", "box", "cylinder")}


@register("oracle_det")
class OracleDet(Oracle):
    """True boxes with score 1. ``classes`` names the source's ids in order; the default is that of scenes."""

    modality: ClassVar[Modality] = DET
    options: ClassVar[Mapping[str, Any]] = {"classes": ("sphere", "box", "cylinder")}
