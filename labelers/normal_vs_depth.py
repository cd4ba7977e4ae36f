"""Whether the normals of one network and the depth of another describe the same surfaces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, register
from fourmill.labelers.card import Card
from fourmill.labelers.normal_from_depth import check_field_of_view, normals_from_depth
from fourmill.labels import Absent, Label
from fourmill.modality import LabelContract, Modality

NORMAL_VS_DEPTH = Modality(
    name="normal_vs_depth",
    kind="scalar",
    codec="scalar",
    doc="how far the labels normal and depth are from describing the same surfaces",
    contract=LabelContract(
        form="scalar",
        dtype="float32",
        units="degrees",
        low=0,
        high=180,
        flip="none",
        frame="the median angle between `normal` and the normals of `depth`'s surfaces; smaller is a better match",
    ),
)


@register("normal_vs_depth")
class NormalVsDepth(Labeler):
    """The median over pixels of the angle between the label "normal" and the normals by geometry of the label "depth".

    The median, since at every outline one of the two has an edge that the other lacks. Depth should be metric; ``fov_deg``
    as in `normal_from_depth`, and with a wrong one every image is off by the same kind of angle: compare images with each
    other, not with zero. A network whose axes point another way is off by far more.
    """

    modality: ClassVar[Modality] = NORMAL_VS_DEPTH
    card: ClassVar[Card | None] = Card(
        expects="the labels `normal`, and `depth` in metres",
        note="no weights. 4M has no such modality: it is for filtering (`train.where`) and for `fourmill qa`",
    )
    inputs: ClassVar[tuple[str, ...]] = ("label:depth", "label:normal")
    options: ClassVar[Mapping[str, Any]] = {"fov_deg": 60.0}

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        check_field_of_view(self.params["fov_deg"], self.where)

    def label(self, batch: LabelBatch) -> list[Label]:
        pairs = zip(batch.upstream["depth"], batch.upstream["normal"], strict=True)
        return [self._one(depth, normal) for depth, normal in pairs]

    def _one(self, depth: Label, normal: Label) -> Label:
        for one in (depth, normal):
            if isinstance(one, Absent):
                return one
        cosine = (normals_from_depth(depth, float(self.params["fov_deg"])) * normal).sum(axis=-1)
        return math.degrees(math.acos(float(np.clip(np.median(cosine), -1.0, 1.0))))
