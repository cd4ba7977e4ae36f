"""Object detection: DETR and its descendants, which predict a fixed set of boxes without suppression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.errors import ConfigError
from fourmill.labelers.base import LabelerSettings, register
from fourmill.labelers.card import LETTERBOXED, Card, Weights
from fourmill.labelers.letterbox import Placement, boxes_to_frame
from fourmill.labelers.network import NETWORK_OPTIONS, NetworkLabeler, class_names
from fourmill.labels import Boxes, Label
from fourmill.modality import LabelContract, Modality

DET = Modality(
    name="det",
    kind="sequence",
    codec="boxes",
    num_tokens=256,
    reference_name="det",
    doc="objects as boxes with class names",
    contract=LabelContract(
        form="boxes",
        dtype="float32",
        units="fraction of the image",
        low=0,
        high=1,
        frame="x0, y0, x1, y1 of the box's edges; x from the left, y from the top",
    ),
)

CARD = Card(
    expects=LETTERBOXED,
    default=Weights(
        model="PekingU/rtdetr_v2_r50vd",
        revision="282494075698cab9faa1096ae26856890030c817",
        license="Apache-2.0",
        note="80 classes of COCO",
        citation="Lv et al., RT-DETRv2, 2024, arXiv:2407.17140",
    ),
    paper=Weights(
        model="ViTDet ViT-H, Cascade Mask R-CNN",
        license="unknown",
        loads=False,
        note="COCO, from an MAE; pickled weights for detectron2, whose page of the project names no licence for them. "
        "4M kept boxes that score at least 0.6",
        citation="Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022, "
        "arXiv:2203.16527",
    ),
    others=(
        Weights(
            model="ustc-community/dfine-large-coco",
            revision="aa8f8211545e4cff5adf52ea512f9ac74a9824ec",
            license="Apache-2.0",
            note="80 classes of COCO",
            citation="Peng et al., D-FINE, ICLR 2025, arXiv:2410.13842",
        ),
        Weights(
            model="PekingU/rtdetr_r50vd",
            revision="df939e661d8c52e80608d1ec566561aabd25a4e7",
            license="Apache-2.0",
            note="80 classes of COCO",
            citation="Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024, arXiv:2304.08069",
        ),
    ),
)

_SOFTMAX = ("detr", "table-transformer", "yolos")
_SIGMOID = (
    "rt_detr", "rt_detr_v2", "d_fine", "conditional_detr", "deformable_detr", "dab-detr", "rf_detr",
)  # fmt: skip
#: Labels that stand for nothing: gaps in COCO's numbering, and "no object".
_NOTHING = frozenset(
    {"n/a", "na", "none", "no object", "no-object", "no_object", "background", "__background__"}
)


@register("det")
class Det(NetworkLabeler):
    """`Boxes`, best first: one per query whose best class scores at least ``min_score``.

    The network is given the whole canvas without a mask, so that its boxes refer to the canvas in every
    family (with a mask some would refer to the part that is valid).
    """

    modality: ClassVar[Modality] = DET
    card: ClassVar[Card | None] = CARD
    default_model: ClassVar[str | None] = "shipped:det"
    expected: ClassVar[str] = "an object detector"
    options: ClassVar[Mapping[str, Any]] = {**NETWORK_OPTIONS, "min_score": 0.5}
    auto_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "AutoModelForObjectDetection": (*_SOFTMAX, *_SIGMOID)
    }

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        if not 0 <= float(self.params["min_score"]) <= 1:
            raise ConfigError(f"{self.where}.min_score: {self.params['min_score']} is not between 0 and 1")

    def describe(self) -> Modality:
        return DET.with_classes(self._classes()[1])

    def _classes(self) -> tuple[dict[int, int], tuple[str, ...]]:
        """The network's ids -> ours, and the names by our id: in the network's order, without what means nothing."""
        names = class_names(self.config(), self.weights.source, f"{self.where}.model")
        kept = {one: name for one, name in names.items() if name.lower() not in _NOTHING}
        order = tuple(dict.fromkeys(kept.values()))
        return {one: order.index(name) for one, name in kept.items()}, order

    def load(self) -> None:
        ids, _ = self._classes()
        self.network_ids = np.array(list(ids), np.int64)
        self.class_ids = np.array(list(ids.values()), np.int64)
        super().load()
        config = self.network.config
        self.softmax = config.model_type in _SOFTMAX or not getattr(config, "use_focal_loss", True)

    def read(self, output: Any, placements: Sequence[Placement]) -> list[Label]:
        logits = output.logits.float()  # (B, queries, classes), with "no object" last where softmax is used
        scores = logits.softmax(dim=-1)[..., :-1] if self.softmax else logits.sigmoid()
        scores_BQC, boxes_BQ4 = scores.cpu().numpy(), output.pred_boxes.float().cpu().numpy()
        return [
            self._boxes(scores_QC, boxes_Q4, at)
            for scores_QC, boxes_Q4, at in zip(scores_BQC, boxes_BQ4, placements, strict=True)
        ]

    def _boxes(self, scores_QC: np.ndarray, cxcywh_Q4: np.ndarray, at: Placement) -> Boxes:
        real = scores_QC[:, self.network_ids]
        best = real.argmax(axis=1)
        score = real[np.arange(len(real)), best].astype(np.float32)
        centre, half = cxcywh_Q4[:, :2], cxcywh_Q4[:, 2:] / 2
        xyxy = boxes_to_frame(np.concatenate([centre - half, centre + half], axis=1), at)
        found = Boxes(xyxy, self.class_ids[best], score)
        area = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
        found = found.keep(area & (score >= self.params["min_score"]))
        return found.keep(np.argsort(-found.scores, kind="stable"))
