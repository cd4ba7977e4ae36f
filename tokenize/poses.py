"""The codec family "poses": people <-> up to 39 tokens for each, as in 4M-21.

    human v0=<x0> v1=<y0> v2=<x1> v3=<y1> pose <8 ids> global <9 values> camera <3 values> shape <10 values>

The four parts stand in the order that the label names; it is drawn for each person when an image is cropped. No people: ``none``.
The body's joints are 8 tokens of a tokenizer of their own ("human-poses_1k_8"): labels bring them along, or it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fourmill.labels import NUM_BETAS, NUM_JOINTS, POSE_TOKENS, Label, Poses
from fourmill.modality import LabelContract, Modality
from fourmill.tokenize.base import Value, register
from fourmill.tokenize.published_releases import RELEASES
from fourmill.tokenize.text import WithInner
from fourmill.tokenize.vocabulary import NUM_BINS, NUM_CORNERS, Reader, halved

#: what is written: in the order of `Poses.orders`: rotations, camera and shape in these ranges, on 1000 steps
_PARTS: tuple[tuple[str, float, float, int], ...] = (
    ("pose", 0.0, 0.0, POSE_TOKENS),
    ("global", -1.0, 1.0, 9),
    ("camera", -1.0, 19.0, 3),
    ("shape", -3.0, 3.0, NUM_BETAS),
)
_LAST = NUM_BINS - 1

BODY_POSE = Modality(
    name="body_pose",
    kind="vector",
    codec="published",
    reference_name="tok_body_pose",
    contract=LabelContract(
        form="vector",
        dtype="float32",
        channels=9 * NUM_JOINTS,
        units="entries of rotation matrices",
        frame="SMPL's joints without the root, row by row",
    ),
    doc="the joints of one person",
)


@register("poses")
class PosesCodec(WithInner):
    """`Poses` <-> uint16 (39 N,), or the word "none". What lies beyond a range is taken as its end.

    ``max_tokens`` 275 holds seven people, a sentinel and EOS.
    """

    family = "poses"
    max_tokens: ClassVar[int] = 275
    options: ClassVar[tuple[str, ...]] = ("pose_tokenizer", "pose_tokenizer_revision")
    prefix, part, part_tokens = "pose_", BODY_POSE, POSE_TOKENS
    published: ClassVar[str] = RELEASES["tok_body_pose"].repository

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return [self._encode(label) for label in labels]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [self._decode(np.asarray(value).tolist()) for value in values]

    def _encode(self, poses: Poses) -> np.ndarray:
        word, at = self.vocabulary.word, self.vocabulary.coordinate
        ids = self.tokens_of_parts(poses.pose_ids, lambda row: poses.body_pose[row].reshape(-1))
        corners = np.rint(poses.xyxy.astype(np.float64).clip(0, 1) * _LAST).astype(np.int64)
        tokens: list[int] = [] if len(poses) else [*word("none")]
        for row in range(len(poses)):
            written = [halved(ids[row])]
            for (_, low, high, _), values in zip(
                _PARTS[1:], (poses.orient[row], poses.camera[row], poses.betas[row]), strict=True
            ):
                written.append([at(0, v) for v in _bins(values, low, high)])
            tokens += [*word("human"), *(at(corner, int(v)) for corner, v in enumerate(corners[row]))]
            for part in poses.orders[row]:
                tokens += [*word(_PARTS[part][0]), *written[part]]
        return np.array(tokens, dtype=np.uint16)

    def _decode(self, tokens: list[int]) -> Poses:
        reader = Reader(self.vocabulary, tokens)
        people = []
        while reader:
            start, person = reader.at, _person(reader)
            if person is None:
                reader.at = start + 1
            else:
                people.append(person)
        if not people:
            return Poses.empty()
        boxes, parts, orders = zip(*people, strict=True)
        values = [np.array([person[part] for person in parts]) for part in range(len(_PARTS))]
        scaled = [_values(bins, low, high) for bins, (_, low, high, _) in zip(values, _PARTS, strict=True)][
            1:
        ]
        known = dict(zip(("orient", "camera", "betas"), scaled, strict=True))
        known |= {"pose_ids": values[0], "orders": np.array(orders)}
        if self.inner is not None:
            known["body_pose"] = np.stack(self.inner.decode(list(values[0])))
        return Poses.of(np.array(boxes) / _LAST, **known)


def _bins(values: np.ndarray, low: float, high: float) -> list[int]:
    """Halves are rounded to even, as everywhere in 4M."""
    scale = _LAST / (high - low)
    bins = np.rint(scale * values.astype(np.float64).reshape(-1) - scale * low)
    return [int(v) for v in bins.clip(0, _LAST)]


def _values(bins: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + bins * ((high - low) / _LAST)


def _person(reader: Reader) -> tuple[tuple[int, ...], list[tuple[int, ...]], list[int]] | None:
    """(box, values of the four parts, their order), or None where no whole person stands."""
    box = reader.values(*range(NUM_CORNERS)) if reader.word("human") else None
    if box is None or box[0] > box[2] or box[1] > box[3]:
        return None
    found: dict[int, tuple[int, ...]] = {}
    for _ in _PARTS:
        part = next((i for i, (name, *_) in enumerate(_PARTS) if i not in found and reader.word(name)), None)
        if part is None:
            return None
        count = _PARTS[part][3]
        values = reader.values(*[0] * count) if part else reader.halves(count)
        if values is None:
            return None
        found[part] = values
    return box, [found[part] for part in range(len(_PARTS))], list(found)
