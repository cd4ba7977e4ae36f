"""Semantic segmentation: SegFormer and kin (a logit per class and pixel), Mask2Former and kin (masks with classes)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.errors import CheckpointError
from fourmill.labelers.base import register
from fourmill.labelers.card import LETTERBOXED, Card, Weights
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

_UPERNET = (
    "Xiao et al., Unified Perceptual Parsing, ECCV 2018, arXiv:1807.10221; Liu et al., A ConvNet for the 2020s, "
    "CVPR 2022, arXiv:2201.03545"
)

CARD = Card(
    expects=LETTERBOXED,
    default=Weights(
        model="openmmlab/upernet-convnext-tiny",
        revision="876ffc56b819a829448f7e81e9f8606deef6fb65",
        license="MIT",
        note="150 classes of ADE20K",
        citation=_UPERNET,
    ),
    paper=Weights(
        model="facebook/mask2former-swin-base-coco-panoptic",
        revision="853c97b51d851289775a7fcc82208fe10167b8ed",
        license="CC-BY-NC-4.0",
        note="133 classes of COCO panoptic. The hub says `other`; the licence is that of the model zoo from which the "
        "weights came (the code is MIT)",
        citation="Cheng et al., Mask2Former, CVPR 2022, arXiv:2112.01527",
    ),
    others=(
        Weights(
            model="openmmlab/upernet-convnext-base",
            revision="13a9c410ff779f25236a8d24802d2742e4694e9c",
            license="MIT",
            note="150 classes of ADE20K",
            citation=_UPERNET,
        ),
        Weights(
            model="nvidia/segformer-b0-finetuned-ade-512-512",
            revision="489d5cd81a0b59fab9b7ea758d3548ebe99677da",
            license="NVIDIA Source Code License (non-commercial)",
            note="150 classes of ADE20K; the smallest of these. The hub says `other`",
            citation="Xie et al., SegFormer, NeurIPS 2021, arXiv:2105.15203",
        ),
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
    card: ClassVar[Card | None] = CARD
    default_model: ClassVar[str | None] = "shipped:semseg"
    expected: ClassVar[str] = "a semantic segmentation network"
    notes: ClassVar[tuple[str, ...]] = ("confidence",)
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
        self.note("confidence", _confidence(output))
        scores = _mask_scores if "masks_queries_logits" in output else _pixel_scores
        return [self._argmax(scores(output, row, at)) for row, at in enumerate(placements)]

    def _argmax(self, scores: Any) -> np.ndarray:
        if scores.shape[0] != self.num_classes:
            raise CheckpointError(
                f"{self.where}.model: the network scores {scores.shape[0]} classes, its config.json names {self.num_classes}"
            )
        return scores.argmax(dim=0).cpu().numpy().astype(np.uint8)


def _confidence(output: Any) -> list[float]:
    """Of each row: the probability of the likeliest class, on average over pixels, at the network's own resolution.

    For mask classifiers the best class's score, which does not add up to one over classes.
    """
    if "masks_queries_logits" not in output:
        best = output.logits.float().softmax(dim=1).amax(dim=1)
    else:
        classes = output.class_queries_logits.float().softmax(dim=-1)[..., :-1]  # (B, Q, classes)
        masks = output.masks_queries_logits.float().sigmoid()  # (B, Q, h, w)
        best = (classes.transpose(1, 2) @ masks.flatten(2)).amax(dim=1).clamp(max=1)
    return [float(value) for value in best.flatten(1).mean(dim=1).tolist()]


def _pixel_scores(output: Any, row: int, at: Placement) -> Any:
    """(classes, H, W) logits."""
    return map_to_frame(output.logits[row].float(), at)


def _mask_scores(output: Any, row: int, at: Placement) -> Any:
    """(classes, H, W) from queries: class probabilities without "no object" times mask probabilities."""
    classes = output.class_queries_logits[row].float().softmax(dim=-1)[:, :-1]  # (Q, classes)
    masks = map_to_frame(output.masks_queries_logits[row].float(), at).sigmoid()  # (Q, H, W)
    return (classes.T @ masks.flatten(1)).unflatten(1, masks.shape[1:])
