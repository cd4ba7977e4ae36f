"""The codec family "instances": points of an image and the object instances that are there <-> tokens, as in 4M-21.

    point v0=<y> v1=<x> polygon v0=<x0> v1=<y0> v2=<x1> v3=<y1> <16 ids> polygon ... point v0=<y> v1=<x> none

Coordinates are whole pixels of a frame of 224 x 224, whatever the crops' size; a point is written y first, a box x first, as the
published models know it. The published code draws seven points whenever it reads an image; here they are drawn for each crop
(`fourmill.crops.crop_instances`), from the dataset's seed and the sample's key. The 16 ids are tokens of the mask, stretched to
64 x 64, of a tokenizer of its own ("sam-instance_1k_64"): labels bring them along, or it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from fourmill.crops import INSTANCE_FRAME
from fourmill.labels import MASK_TOKENS, Instances, Label
from fourmill.modality import LabelContract, Modality
from fourmill.tokenize.base import Value, register
from fourmill.tokenize.published_releases import RELEASES
from fourmill.tokenize.text import WithInner
from fourmill.tokenize.vocabulary import NUM_CORNERS, Reader, halved

MASK_SIDE = 64
#: pixels are cut, not rounded; what float64 makes of a whole number must not fall below it
_SLACK = 1e-6

SAM_MASK = Modality(
    name="sam_mask",
    kind="grid",
    codec="published",
    reference_name="tok_sam_mask",
    contract=LabelContract(
        form="map",
        dtype="uint8",
        units="1 inside",
        low=0,
        high=1,
        resample="nearest",
        frame="the instance's box, stretched to 64 x 64",
    ),
    doc="the mask of one instance in its box",
)


@register("instances")
class InstancesCodec(WithInner):
    """`Instances` with points <-> uint16. Instances that no point hits are not written.

    Decoded boxes have corners in the middle of their pixel; an instance that several points hit comes back once.
    ``max_tokens`` 290 holds about 13 instances.
    """

    family = "instances"
    max_tokens: ClassVar[int] = 290
    options: ClassVar[tuple[str, ...]] = ("mask_tokenizer", "mask_tokenizer_revision")
    prefix, part, part_tokens = "mask_", SAM_MASK, MASK_TOKENS
    published: ClassVar[str] = RELEASES["tok_sam_mask"].repository

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return [self._encode(label) for label in labels]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [self._decode(np.asarray(value).tolist()) for value in values]

    def _encode(self, instances: Instances) -> np.ndarray:
        word, at = self.vocabulary.word, self.vocabulary.coordinate
        written = self._written(instances)
        tokens: list[int] = []
        for (x, y), hits in zip(_pixels(instances.points), instances.hits, strict=True):
            tokens += [*word("point"), at(0, min(y, INSTANCE_FRAME - 1)), at(1, min(x, INSTANCE_FRAME - 1))]
            for index in hits:
                tokens += written[int(index)]
            tokens += [] if len(hits) else word("none")
        return np.array(tokens, dtype=np.uint16)

    def _written(self, instances: Instances) -> dict[int, list[int]]:
        """The tokens of each instance that some point hits."""
        hit = sorted({int(index) for hits in instances.hits for index in hits})
        ids = self.tokens_of_parts(
            instances.mask_ids[hit],
            lambda row: stretched_mask(instances.polygons[hit[row]], instances.xyxy[hit[row]]),
        )
        word, at = self.vocabulary.word, self.vocabulary.coordinate
        boxes = _pixels(instances.xyxy)
        return {
            index: [*word("polygon"), *(at(c, v) for c, v in enumerate(boxes[index])), *halved(ids[row])]
            for row, index in enumerate(hit)
        }

    def _decode(self, tokens: list[int]) -> Instances:
        reader = Reader(self.vocabulary, tokens)
        found: dict[tuple[int, ...], int] = {}
        points: list[tuple[int, int]] = []
        hits: list[list[int]] = []
        while reader:
            start = reader.at
            point, instance = _point(reader), None
            if point is not None:
                points.append(point)
                hits.append([])
                continue
            instance = _instance(reader)
            if instance is None:
                reader.at = start + 1
                continue
            index = found.setdefault(instance, len(found))
            if hits and index not in hits[-1]:
                hits[-1].append(index)
        table = np.array(list(found), np.int64).reshape(-1, NUM_CORNERS + MASK_TOKENS)
        boxes = ((table[:, :NUM_CORNERS] + 0.5) / INSTANCE_FRAME).clip(0, 1)
        places = np.array(points, np.float64).reshape(-1, 2) / INSTANCE_FRAME
        return Instances.of(boxes, mask_ids=table[:, NUM_CORNERS:], points=places, hits=hits)


def _pixels(values: np.ndarray) -> list[list[int]]:
    """Of normalised coordinates (N, k)."""
    cut = np.floor(values.clip(0, 1) * INSTANCE_FRAME + _SLACK).astype(np.int64)
    return [[int(v) for v in row] for row in cut]


def _point(reader: Reader) -> tuple[int, int] | None:
    """x, y; "none" behind it is passed too."""
    start = reader.at
    yx = reader.values(0, 1) if reader.word("point") else None
    if yx is None or max(yx) >= INSTANCE_FRAME:
        reader.at = start
        return None
    reader.word("none")
    return yx[1], yx[0]


def _instance(reader: Reader) -> tuple[int, ...] | None:
    """Box and mask's ids."""
    box = reader.values(*range(NUM_CORNERS)) if reader.word("polygon") else None
    if box is None or max(box) > INSTANCE_FRAME or box[0] > box[2] or box[1] > box[3]:
        return None
    ids = reader.halves(MASK_TOKENS)
    return None if ids is None else (*box, *ids)


def stretched_mask(polygon: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
    """uint8 (64, 64) of 0 and 1: an outline (K, 2) in its box x0, y0, x1, y1."""
    extent = np.maximum(xyxy[2:] - xyxy[:2], 1e-9)
    corners = (polygon - xyxy[:2]) / extent * (MASK_SIDE - 1)
    image = Image.new("L", (MASK_SIDE, MASK_SIDE))
    if len(corners) >= 2:
        ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in corners], fill=1, outline=1)
    return np.asarray(image)
