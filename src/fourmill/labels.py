"""What labelers return and codecs take: one value per image, always in the frame of that image.

===========  =====================================================================================
value        is
===========  =====================================================================================
map          ``np.ndarray`` (H, W) or (H, W, C), as tall and wide as the image it labels
features     ``np.ndarray`` (h, w, C) float32 on a patch grid (per crop)
Boxes        object boxes, normalised to the image
text         ``list[str]``: the captions of an image (per image) or ``list[str]`` by crop
vector       ``np.ndarray`` (C,) float32
scalar       ``float``
===========  =====================================================================================
"""

from __future__ import annotations

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


Label = Any  # np.ndarray | Boxes | list[str] | float | Absent
