"""The part of an image's label that belongs to a crop, by the rule of each form of label."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fourmill.crops import crop_boxes, crop_instances, crop_map, crop_poses, draw_palette
from fourmill.labels import Boxes, Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import Modality

#: forms of which something is drawn when they are cropped
DRAWN = frozenset({"palette", "poses", "instances"})


def crop_label(
    modality: Modality,
    label: Label,
    index: int,
    crop: np.ndarray,
    size: np.ndarray,
    image_size: int,
    rng: np.random.Generator | None = None,
) -> Label:
    """The part of an image's label that belongs to its crop number ``index``.

    ``rng`` is for what 4M draws (which palette, where instances are asked for, in which order people are described);
    without it a fixed choice is made.
    """
    contract = modality.contract
    if contract.form in ("map", "image"):
        return crop_map(
            label, crop, hw(size), image_size, contract.resample, contract.flip, contract.unit_norm
        )
    if contract.form == "boxes":
        return crop_boxes(label, crop, hw(size))
    if contract.form == "features" or (contract.form == "vector" and np.ndim(label) == 2):  # by crop
        return label[index]
    if contract.form == "text":
        return label[index % len(label)]
    if contract.form == "palette":
        return draw_palette(label, rng)
    if contract.form == "poses":
        return crop_poses(label, crop, hw(size), rng)
    if contract.form == "instances":
        return crop_instances(label, crop, hw(size), rng)
    return label


_EMPTY: Mapping[str, Callable[[], Label]] = {
    "boxes": Boxes.empty,
    "metadata": lambda: Metadata({}),
    "palette": lambda: Palettes(()),
    "poses": Poses.empty,
    "instances": Instances.empty,
}


def blank_label(modality: Modality, image_size: int) -> Label:
    """What stands in the batch for a row without a label; its tokens are thrown away."""
    contract = modality.contract
    if contract.form in ("map", "image"):
        channels = () if contract.channels is None else (contract.channels,)
        blank = np.ones((image_size, image_size, *channels), np.dtype(contract.dtype))
        return blank / np.sqrt(np.float32(contract.channels or 1)) if contract.unit_norm else blank
    if contract.form in _EMPTY:
        return _EMPTY[contract.form]()
    if contract.form == "text":
        return ""
    if contract.form == "vector":
        return np.zeros(contract.channels or 1, np.float32)
    return 0.0


def hw(size: np.ndarray) -> tuple[int, int]:
    """(height, width) of a row of `MicroBatch.sizes`."""
    return int(size[0]), int(size[1])
