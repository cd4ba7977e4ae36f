"""The codec family "boxes": detections <-> a sequence of five tokens per box, as in 4M.

``v0=round(999 x0) v1=round(999 y0) v2=round(999 x1) v3=round(999 y1) <class name>``, the box whose top left
corner is nearest to the image's first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.errors import CheckpointError, ConfigError, ContractError, nearest
from fourmill.labels import Boxes, Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Value, register
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vocabulary import NUM_BINS, NUM_CORNERS, Vocabulary

TOKENS_PER_BOX = NUM_CORNERS + 1

#: by what boxes are ordered, smallest first; xyxy float64 (N, 4), scores (N,)
ORDERS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "distance": lambda xyxy, scores: (xyxy[:, :2] ** 2).sum(1),
    "area": lambda xyxy, scores: -(xyxy[:, 2:] - xyxy[:, :2]).prod(1),
    "score": lambda xyxy, scores: -scores,
}


@register("boxes")
class BoxesCodec(VocabularyCodec):
    """Boxes <-> uint16 (5 N,), without EOS. Scores are not tokenized; decoded boxes have score 1.

    ``order``: one of `ORDERS`. ``max_boxes``: of more, those with the highest scores are kept; 0 keeps all.
    """

    family = "boxes"
    options: ClassVar[tuple[str, ...]] = ("order", "max_boxes")

    def __init__(
        self,
        modality: Modality,
        image_size: int,
        vocabulary: Vocabulary,
        order: str = "distance",
        max_boxes: int = 0,
    ) -> None:
        super().__init__(modality, image_size, vocabulary)
        where = f"modalities.{modality.name}.tokenizer"
        if order not in ORDERS:
            raise ConfigError(f"{where}.order: {order!r}{nearest(str(order), ORDERS)}")
        if type(max_boxes) is not int or max_boxes < 0:
            raise ConfigError(f"{where}.max_boxes: {max_boxes!r} is no number of boxes")
        self.order, self.max_boxes = order, max_boxes
        names = modality.contract.classes
        missing = [name for name in names if name.strip().lower() not in vocabulary.classes]
        if missing:
            raise CheckpointError(
                f"the vocabulary has no token for the classes {', '.join(missing)} of {modality.name!r}; "
                "train it with them"
            )
        self._tokens = [vocabulary.classes[name.strip().lower()] for name in names]
        self._class_of = {token: index for index, token in enumerate(self._tokens)}

    def stored(self) -> dict[str, Any]:
        """What is as in 4M is not written: tokenizers from before there was a choice keep their hash."""
        chosen: dict[str, Any] = {} if self.order == "distance" else {"order": self.order}
        return {**chosen, "max_boxes": self.max_boxes} if self.max_boxes else chosen

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return [self._encode(label) for label in labels]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [self._decode(np.asarray(value).tolist()) for value in values]

    def _encode(self, boxes: Boxes) -> np.ndarray:
        xyxy, class_ids = (
            np.asarray(boxes.xyxy, np.float64).reshape(-1, NUM_CORNERS),
            np.asarray(boxes.class_ids),
        )
        if len(class_ids) and not 0 <= class_ids.min() <= class_ids.max() < len(self._tokens):
            raise ContractError(
                f"{self.modality.name!r}: a box has class {class_ids.max()} of {len(self._tokens)}"
            )
        scores = np.asarray(boxes.scores, np.float64)
        kept = np.sort(np.argsort(-scores, kind="stable")[: self.max_boxes or None])
        order = kept[np.argsort(ORDERS[self.order](xyxy[kept], scores[kept]), kind="stable")]
        bins = np.rint(xyxy.clip(0, 1) * (NUM_BINS - 1)).astype(np.int64)
        tokens: list[int] = []
        for index in order:
            tokens += [self.vocabulary.coordinate(corner, int(v)) for corner, v in enumerate(bins[index])]
            tokens.append(self._tokens[int(class_ids[index])])
        return np.array(tokens, dtype=np.uint16)

    def _decode(self, tokens: list[int]) -> Boxes:
        found = [box for box in self._boxes(tokens) if box[0] <= box[2] and box[1] <= box[3]]
        if not found:
            return Boxes.empty()
        table = np.array(found, dtype=np.int64)
        xyxy = (table[:, :NUM_CORNERS] / (NUM_BINS - 1)).astype(np.float32)
        return Boxes(xyxy, table[:, NUM_CORNERS], np.ones(len(table), np.float32))

    def _boxes(self, tokens: list[int]) -> Iterator[tuple[int, ...]]:
        """Every run of v0 v1 v2 v3 and a class, wherever it stands; what does not fit is passed over."""
        corners: list[int] = []
        for token in tokens:
            place = self.vocabulary.coordinate_of(token)
            if place is None:
                if len(corners) == NUM_CORNERS and token in self._class_of:
                    yield (*corners, self._class_of[token])
                corners = []
            elif place[0] == len(corners):
                corners.append(place[1])
            else:
                corners = [place[1]] if place[0] == 0 else []
