"""Semantic segmentation: SegFormer and kin (a logit per class and pixel), Mask2Former and kin (masks with classes)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from fourmill.errors import CheckpointError
from fourmill.labelers.base import register
from fourmill.labelers.card import LETTERBOXED, Card, Weights
from fourmill.labelers.cells import classes_of, finished_classes_of
from fourmill.labelers.figures import LOOKED_AT
from fourmill.labelers.letterbox import Placement
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

    def prepare(self, network: Any) -> Any:
        """UPerNet enlarges its scores to its input, and those of a second head that only training reads; neither here."""
        if network.config.model_type == "upernet":
            network.forward = partial(_upernet, network)
        return network

    def read(self, output: Any, placements: Sequence[Placement]) -> list[Label]:
        is_masks = "masks_queries_logits" in output
        found = len(output.class_queries_logits[0, 0]) - 1 if is_masks else output.logits.shape[1]
        if found != self.num_classes:
            raise CheckpointError(
                f"{self.where}.model: the network scores {found} classes, its config.json names {self.num_classes}"
            )
        one = _from_masks if is_masks else _from_scores
        made = [one(output, row, at) for row, at in enumerate(placements)]
        self.note("confidence", [float(confidence) for _, confidence in made])
        return [classes.cpu().numpy() for classes, _ in made]


def _upernet(network: Any, pixel_values: Any) -> Any:
    """The scores on their own grid, a quarter of the input's side."""
    from transformers.modeling_outputs import SemanticSegmenterOutput

    features = network.backbone.forward_with_filtered_kwargs(pixel_values).feature_maps
    return SemanticSegmenterOutput(logits=network.decode_head(features))


def _from_scores(output: Any, row: int, at: Placement) -> tuple[Any, Any]:
    """Class ids uint8 (H, W), and the probability of the likeliest class on average over places (see `_looked_at`)."""
    scores = output.logits[row].float()  # (classes, h, w)
    grid = (scores.shape[1], scores.shape[2])
    cells = scores.permute(1, 2, 0).contiguous()
    seen = _looked_at(cells).flatten(0, 1)
    likeliest = 1 / (seen - seen.amax(dim=1, keepdim=True)).exp().sum(dim=1)
    return classes_of(cells.flatten(0, 1), grid, at), likeliest.mean()


def _from_masks(output: Any, row: int, at: Placement) -> tuple[Any, Any]:
    """As `_from_scores`; a class scores the sum over queries, which is no probability: it can pass one and is cut there."""
    classes = output.class_queries_logits[row].float().softmax(dim=-1)[:, :-1].contiguous()  # (Q, classes)
    masks = output.masks_queries_logits[row].float()  # (Q, h, w)
    grid = (masks.shape[1], masks.shape[2])
    cells = masks.permute(1, 2, 0).contiguous()
    likeliest = (_looked_at(cells).sigmoid() @ classes).amax(dim=-1).clamp(max=1)
    ids = finished_classes_of(cells.flatten(0, 1), grid, at, lambda values: values.sigmoid_() @ classes)
    return ids, likeliest.mean()


def _looked_at(cells: Any) -> Any:
    """Every n-th row and column of (h, w, K), as figures of other labels look at maps."""
    step_y, step_x = (max(1, side // LOOKED_AT) for side in cells.shape[:2])
    return cells[step_y // 2 :: step_y, step_x // 2 :: step_x]
