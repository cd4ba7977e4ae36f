"""Semantic segmentation: SegFormer and kin (a logit per class and pixel), Mask2Former and kin (masks with classes)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.errors import CheckpointError
from fourmill.labelers.base import register
from fourmill.labelers.letterbox import Placement, map_to_frame
from fourmill.labelers.network import NetworkLabeler, class_names
from fourmill.labels import Label
from fourmill.modality import LabelContract, Modality

SEMSEG = Modality(
    name="semseg",
    kind="grid",
    codec="vqvae",
    reference_name="tok_semseg@{size}",
    doc="the class of each pixel",
    contract=LabelContract(
        form="map",
        dtype="uint8",
        units="class id",
        low=0,
        high=255,
        resample="nearest",
        frame="id into the class names",
    ),
)

#: what the channels of a normals network are called, and what transformers calls classes without a name
AXES = {"x", "y", "z"}
_NO_NAME = re.compile(r"LABEL_\d+")


@register("semseg")
class Semseg(NetworkLabeler):
    """uint8 (H, W) class ids: the argmax of logits that were brought to the frame's resolution first.

    For mask classifiers the score of a class is the sum over queries of its probability times the mask's
    (Cheng et al. 2022, section 3.1); "no object" takes part in neither.
    """

    modality: ClassVar[Modality] = SEMSEG
    default_model: ClassVar[str | None] = "shipped:semseg"
    expected: ClassVar[str] = "a semantic segmentation network"
    auto_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "AutoModelForSemanticSegmentation": (
            "segformer",
            "dpt",
            "upernet",
            "beit",
            "mobilevit",
            "mobilevitv2",
        ),
        "AutoModelForUniversalSegmentation": ("mask2former", "maskformer"),
    }

    def describe(self) -> Modality:
        return SEMSEG.with_classes(self._classes())

    def _classes(self) -> tuple[str, ...]:
        where = f"{self.where}.model"
        names = class_names(self.config(), self.weights.source, where)
        if list(names) != list(range(len(names))) or len(names) > 256:
            raise CheckpointError(
                f"{where}: {self.weights.source} has {len(names)} classes with ids up to {max(names)}; "
                "ids must run from 0 without gaps and fit 8 bits"
            )
        if set(names.values()) == AXES or all(_NO_NAME.fullmatch(name) for name in names.values()):
            raise CheckpointError(
                f"{where}: {self.weights.source} has no classes but the channels {', '.join(names.values())[:80]}; "
                f"{self.expected} whose config.json names its classes (id2label) is expected"
            )
        return tuple(names.values())

    def load(self) -> None:
        self.num_classes = len(self._classes())
        super().load()

    def read(self, output: Any, placements: Sequence[Placement]) -> list[Label]:
        scores = _mask_scores if "masks_queries_logits" in output else _pixel_scores
        return [self._argmax(scores(output, row, at)) for row, at in enumerate(placements)]

    def _argmax(self, scores: Any) -> np.ndarray:
        if scores.shape[0] != self.num_classes:
            raise CheckpointError(
                f"{self.where}.model: the network scores {scores.shape[0]} classes, its config.json names {self.num_classes}"
            )
        return scores.argmax(dim=0).cpu().numpy().astype(np.uint8)


def _pixel_scores(output: Any, row: int, at: Placement) -> Any:
    """(classes, H, W) logits."""
    return map_to_frame(output.logits[row].float(), at)


def _mask_scores(output: Any, row: int, at: Placement) -> Any:
    """(classes, H, W) from queries: class probabilities without "no object" times mask probabilities."""
    classes = output.class_queries_logits[row].float().softmax(dim=-1)[:, :-1]  # (Q, classes)
    masks = map_to_frame(output.masks_queries_logits[row].float(), at).sigmoid()  # (Q, H, W)
    return (classes.T @ masks.flatten(1)).unflatten(1, masks.shape[1:])
