"""What labelers return and codecs take: one value per image, always in the frame of that image.

===========  =====================================================================================
value        is
===========  =====================================================================================
map          ``np.ndarray`` (H, W) or (H, W, C), as tall and wide as the image it labels
features     ``np.ndarray`` (h, w, C) float32 on a patch grid (per crop)
Boxes        object boxes, normalised to the image
text         ``list[str]``: the captions of an image (per image) or ``list[str]`` by crop
Metadata     numbers about the image, by name
Palettes     colour palettes of the image
Poses        people: boxes, body poses, shapes, cameras
Instances    object instances without a class: outlines, boxes, mask tokens
vector       ``np.ndarray`` (C,) float32
scalar       ``float``
===========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Boxes:
    """Object boxes of one image.

    ``xyxy`` float32 (N, 4): x0, y0, x1, y1 of the box's edges, normalised to [0, 1] (0 is the left or
    top edge of the first pixel, 1 the right or bottom edge of the last). ``class_ids`` int64 (N,) into
    the modality's class names. ``scores`` float32 (N,) in [0, 1]. N = 0 says that nothing was found.
    """

    xyxy: np.ndarray
    class_ids: np.ndarray
    scores: np.ndarray

    @classmethod
    def empty(cls) -> Boxes:
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))

    def keep(self, mask: np.ndarray) -> Boxes:
        """The boxes where ``mask`` (bool (N,) or an index array) selects them."""
        return Boxes(self.xyxy[mask], self.class_ids[mask], self.scores[mask])

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True, slots=True)
class Metadata:
    """Numbers about an image by name, those of `METADATA`; what is not known is left out. {} says that nothing is."""

    values: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.values)


#: What metadata may say (4M-21, section D.1), in the order of 4M's type ids, and in which units.
METADATA: Mapping[str, str] = {
    "original_width": "pixels",
    "original_height": "pixels",
    "caption_n_chars": "count",
    "caption_n_words": "count",
    "caption_n_sentences": "count",
    "n_humans": "count",
    "n_sam_instances": "count",
    "n_coco_instances": "count",
    "coco_instance_diversity": "count of classes that have a box",
    "colorfulness": "of Hasler and Suesstrunk, 0 to 150",
    "brightness": "0 to 255",
    "contrast": "0 to 127",
    "saturation": "0 to 255",
    "entropy": "bits, 0 to 10",
    "walkability": "share of pixels of ground that one can walk on",
    "objectness": "share of pixels of countable things",
    "semantic_diversity": "count of classes that are segmented",
    "geometric_complexity": "angular variance of the normals, 0 to 0.75",
    "occlusion_score": "share of pixels at a depth edge, 0 to 0.25",
    "watermark_score": "probability",
    "aesthetic_score": "of LAION's predictor, 0 to 10",
}


@dataclass(frozen=True, slots=True)
class Palettes:
    """Colour palettes of one image, each uint8 (n, 3): n = 1 to `MAX_COLOURS` colours in sRGB.

    An image has one or more, of a crop one is drawn. () says that there is none.
    """

    colours: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.colours)


MAX_COLOURS = 7
POSE_TOKENS, NUM_JOINTS, NUM_BETAS = 8, 23, 10
MASK_TOKENS = 16
MAX_TOKEN_ID = 1024  # tokens of body poses and masks are below


@dataclass(frozen=True, slots=True)
class Poses:
    """People of one image, as SMPL bodies seen by a weak-perspective camera (what HMR2 predicts).

    ``xyxy`` float32 (N, 4): boxes normalised to the image as those of `Boxes`; a body that the image's edge cuts may
    reach beyond it. ``pose_ids`` int64 (N, 8): tokens of the body pose, below 1024; rows of -1 where they are not known.
    ``body_pose`` float32 (N, 23, 3, 3): rotations of the joints; NaN where they are not known. ``orient`` float32 (N, 3,
    3): rotation of the whole body. ``betas`` float32 (N, 10): shape, mostly in [-3, 3]. ``camera`` float32 (N, 3): scale,
    and shift to the right and down. ``orders`` int64 (N, 4): in which order pose, orientation, camera and shape (0 to 3)
    are written.
    """

    xyxy: np.ndarray
    pose_ids: np.ndarray
    body_pose: np.ndarray
    orient: np.ndarray
    betas: np.ndarray
    camera: np.ndarray
    orders: np.ndarray

    @classmethod
    def empty(cls) -> Poses:
        return cls.of(np.zeros((0, 4)))

    @classmethod
    def of(cls, xyxy: Any, **known: Any) -> Poses:
        """Anything array-like in the right dtypes; what is not said is not known, or at rest."""
        count = len(xyxy)
        values = {
            "xyxy": xyxy,
            "pose_ids": np.full((count, POSE_TOKENS), -1),
            "body_pose": np.full((count, NUM_JOINTS, 3, 3), np.nan),
            "orient": np.tile(np.eye(3), (count, 1, 1)),
            "betas": np.zeros((count, NUM_BETAS)),
            "camera": np.tile([1.0, 0.0, 0.0], (count, 1)),
            "orders": np.tile(np.arange(4), (count, 1)),
            **known,
        }
        return cls(
            *(
                np.asarray(values[n], POSE_FIELDS[n][1]).reshape(count, *POSE_FIELDS[n][0])
                for n in POSE_FIELDS
            )
        )

    def keep(self, mask: np.ndarray) -> Poses:
        """The people where ``mask`` (bool (N,) or an index array) selects them."""
        return Poses(*(getattr(self, name)[mask] for name in POSE_FIELDS))

    def __len__(self) -> int:
        return len(self.xyxy)


#: of each field of `Poses`, per person: shape and dtype
POSE_FIELDS: Mapping[str, tuple[tuple[int, ...], type]] = {
    "xyxy": ((4,), np.float32),
    "pose_ids": ((POSE_TOKENS,), np.int64),
    "body_pose": ((NUM_JOINTS, 3, 3), np.float32),
    "orient": ((3, 3), np.float32),
    "betas": ((NUM_BETAS,), np.float32),
    "camera": ((3,), np.float32),
    "orders": ((4,), np.int64),
}


@dataclass(frozen=True, slots=True)
class Instances:
    """Object instances of one image, without classes (what SAM finds), and points at which one asks for them.

    ``xyxy`` float64 (N, 4): boxes normalised to the image; float64, as they are cut to whole pixels. ``polygons``: N
    outlines, float64 (K, 2) of x, y normalised likewise, inside by the even-odd rule; (0, 2) where not known. ``mask_ids``
    int64 (N, 16): tokens of the mask in its box, below 1024; rows of -1 where not known. ``points`` float64 (Q, 2): x, y;
    ``hits``: at each point int64 (n,), the instances that are there. Points are drawn when the image is cropped:
    labelers leave them out.
    """

    xyxy: np.ndarray
    polygons: tuple[np.ndarray, ...]
    mask_ids: np.ndarray
    points: np.ndarray
    hits: tuple[np.ndarray, ...]

    @classmethod
    def empty(cls) -> Instances:
        return cls.of(np.zeros((0, 4)))

    @classmethod
    def of(
        cls,
        xyxy: Any,
        polygons: Any = None,
        mask_ids: Any = None,
        points: Any = (),
        hits: Any = (),
    ) -> Instances:
        """Anything array-like in the right dtypes; what is not said is not known."""
        count = len(xyxy)
        outlines = [()] * count if polygons is None else polygons
        ids = np.full((count, MASK_TOKENS), -1) if mask_ids is None else mask_ids
        return cls(
            np.asarray(xyxy, np.float64).reshape(count, 4),
            tuple(np.asarray(outline, np.float64).reshape(-1, 2) for outline in outlines),
            np.asarray(ids, np.int64).reshape(count, MASK_TOKENS),
            np.asarray(points, np.float64).reshape(-1, 2),
            tuple(np.asarray(hit, np.int64).reshape(-1) for hit in hits),
        )

    def __len__(self) -> int:
        return len(self.xyxy)


def parts_of(label: Any) -> list[Any]:
    """A label as arrays and plain values in a fixed order, to be hashed, counted or compared."""
    if isinstance(label, Metadata):
        return [name for item in sorted(label.values.items()) for name in item]
    if isinstance(label, tuple):
        return [len(label), *label]
    if isinstance(label, (Boxes, Palettes, Poses, Instances)):
        return [part for name in label.__slots__ for part in parts_of(getattr(label, name))]
    return [label]


DUPLICATE = "duplicate key"
NO_CAPTION = "no caption"
#: how a reason begins that says that there is nothing here to label: "n/a: no box of a class that is segmented"
NOT_APPLICABLE = "n/a: "


@dataclass(frozen=True, slots=True)
class Absent:
    """Stands where a label could not be made; ``reason`` is stored beside the null cell.

    Begin it with `NOT_APPLICABLE` where that is a fact about the sample and no fault of anybody's (see `is_fault`).
    """

    reason: str


def is_fault(reason: str) -> bool:
    """Whether a reason counts as a reject, toward a shard's limit, and is worth another attempt."""
    return reason not in (DUPLICATE, NO_CAPTION) and not reason.startswith(NOT_APPLICABLE)


Label = Any  # np.ndarray | Boxes | Metadata | Palettes | Poses | Instances | list[str] | float | Absent
