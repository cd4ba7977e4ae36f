"""The gate behind every labeler: each label of each batch against its modality's contract.

Cheap (a few passes over each array), and the only thing that stands between a labeler that somebody
else wrote and a dataset. A violation is a fault of the labeler, not of the sample: it is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.errors import ContractError, nearest
from fourmill.labels import (
    MASK_TOKENS,
    MAX_COLOURS,
    MAX_TOKEN_ID,
    METADATA,
    POSE_FIELDS,
    Absent,
    Boxes,
    Instances,
    Label,
    Metadata,
    Palettes,
    Poses,
)
from fourmill.modality import LabelContract, Modality

#: Lengths of unit vectors may differ from one by this much (float16 storage and resampling included).
UNIT_TOLERANCE = 1e-3

#: Arrays of at most so many values are looked at together: of tiny ones the calls cost more than the values.
TOGETHER = 4096

#: What a check returns: None, or what is wrong in a few words.
Verdict = str | None


def check(
    modality: Modality,
    labels: Sequence[Label],
    frames: Sequence[np.ndarray],
    keys: Sequence[str] = (),
    labeler: str = "",
) -> None:
    """Raise `ContractError` for the first label that breaks ``modality.contract``; `Absent` passes.

    ``frames``: uint8 (H, W, 3), the image or crop that each label is of; maps must be as tall and wide. Leave out
    rows that were set aside. ``keys`` (one per label) and ``labeler`` name the culprit in the message.
    """
    who = f"labeler {labeler!r} of {modality.name!r}" if labeler else f"labels of {modality.name!r}"
    if len(labels) != len(frames):
        raise ContractError(f"{who}: {len(labels)} labels for {len(frames)} images; one for each is expected")
    verdict = _CHECKS[modality.contract.form]
    if _all_well(labels, frames, modality.contract, verdict):
        return
    for row, (label, frame) in enumerate(zip(labels, frames, strict=True)):
        wrong = None if isinstance(label, Absent) else verdict(label, modality.contract, frame.shape[:2])
        if wrong:
            name = keys[row] if len(keys) else f"row {row}"
            raise ContractError(f"{who}, {name}: {wrong}; the contract is {_prose(modality.contract)}")


def _all_well(
    labels: Sequence[Label],
    frames: Sequence[np.ndarray],
    contract: LabelContract,
    verdict: Callable[[Any, LabelContract, tuple[int, ...]], Verdict],
) -> bool:
    """Whether tiny arrays of one shape and dtype keep the contract, all at once. False may mean that they cannot be."""
    first = labels[0] if labels else None
    if not isinstance(first, np.ndarray) or first.size > TOGETHER:
        return False
    size, shape, dtype = frames[0].shape[:2], first.shape, first.dtype
    for label, frame in zip(labels, frames, strict=True):
        if not isinstance(label, np.ndarray) or label.shape != shape or label.dtype != dtype:
            return False
        if frame.shape[:2] != size:
            return False
    if verdict(first, contract, size):
        return False
    together = np.array(labels)
    if contract.classes and together.max() >= len(contract.classes):
        return False
    return _values(together, contract) is None


def _prose(contract: LabelContract) -> str:
    parts = [contract.form, contract.dtype, contract.units, contract.frame]
    return ", ".join(part for part in parts if part)


def _array(label: Any, contract: LabelContract, ndim: int) -> Verdict:
    if not isinstance(label, np.ndarray):
        return f"is a {type(label).__name__}, not an array"
    if label.dtype != np.dtype(contract.dtype):
        return f"has dtype {label.dtype}, not {contract.dtype}"
    if label.ndim != ndim:
        return f"has shape {label.shape}, not {ndim} axes"
    if contract.channels and label.shape[-1] != contract.channels:
        return f"has {label.shape[-1]} channels, not {contract.channels}"
    if label.size == 0:
        return f"is empty, shape {label.shape}"
    return _values(label, contract)


def _values(label: np.ndarray, contract: LabelContract) -> Verdict:
    if np.issubdtype(label.dtype, np.floating) and not np.isfinite(label).all():
        return f"has {int((~np.isfinite(label)).sum())} values that are not finite"
    low, high = label.min(), label.max()
    if contract.low is not None and low < contract.low:
        return f"has the value {low:g}, below {contract.low:g}"
    if contract.high is not None and high > contract.high:
        return f"has the value {high:g}, above {contract.high:g}"
    if contract.unit_norm:
        off = np.abs(np.linalg.norm(label.astype(np.float32, copy=False), axis=-1) - 1).max()
        if off > UNIT_TOLERANCE:
            return f"has vectors whose length is off one by {off:.3g}"
    return None


def _check_map(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    wrong = _array(label, contract, 2 if contract.channels is None else 3)
    if wrong:
        return wrong
    if label.shape[:2] != size:
        return f"is {label.shape[0]} x {label.shape[1]}, the image is {size[0]} x {size[1]} (height x width)"
    if contract.classes and label.max() >= len(contract.classes):
        return f"has class id {label.max()}, but there are {len(contract.classes)} classes"
    return None


def _check_features(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    return _array(label, contract, 3)


def _check_vector(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    return _array(label, contract, 1)


def _check_image(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    return _array(label, contract, 3)


def _check_scalar(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    if isinstance(label, bool) or not isinstance(label, (int, float, np.floating, np.integer)):
        return f"is a {type(label).__name__}, not a number"
    return _values(np.array([label], dtype=np.float64), contract)


def _check_text(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    if not isinstance(label, list) or not all(isinstance(text, str) for text in label):
        return f"is a {type(label).__name__}, not a list of strings"
    return None


def _check_boxes(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    if not isinstance(label, Boxes):
        return f"is a {type(label).__name__}, not Boxes"
    count = len(label.class_ids)
    for name, array, shape, dtype in (
        ("xyxy", label.xyxy, (count, 4), np.float32),
        ("class_ids", label.class_ids, (count,), np.int64),
        ("scores", label.scores, (count,), np.float32),
    ):
        if array.shape != shape or array.dtype != dtype:
            return f"has {name} {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}"
    return None if count == 0 else _box_values(label, contract)


def _box_values(boxes: Boxes, contract: LabelContract) -> Verdict:
    xyxy, scores, ids = boxes.xyxy, boxes.scores, boxes.class_ids
    if not (np.isfinite(xyxy).all() and xyxy.min() >= 0 and xyxy.max() <= 1):
        return "has a box outside [0, 1]; boxes are normalised to the image"
    if not ((xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])).all():
        return "has a box with x1 <= x0 or y1 <= y0; the order is x0, y0, x1, y1"
    if not (np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1):
        return "has a score outside [0, 1]"
    if ids.min() < 0 or (contract.classes and ids.max() >= len(contract.classes)):
        return f"has class ids {ids.min()}..{ids.max()}, but there are {len(contract.classes)} classes"
    return None


def _check_metadata(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    if not isinstance(label, Metadata):
        return f"is a {type(label).__name__}, not Metadata"
    for name, value in label.values.items():
        if name not in METADATA:
            return f"has the field {name!r}{nearest(str(name), METADATA)}"
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
            return f"has a {type(value).__name__} as {name}, not a number"
        if not np.isfinite(value):
            return f"has {value} as {name}"
    return None


def _check_palette(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    if not isinstance(label, Palettes):
        return f"is a {type(label).__name__}, not Palettes"
    for colours in label.colours:
        if not isinstance(colours, np.ndarray) or colours.dtype != np.uint8 or colours.ndim != 2:
            return "has a palette that is no uint8 (n, 3) array"
        if colours.shape[1] != 3 or not 1 <= len(colours) <= MAX_COLOURS:
            return (
                f"has a palette of shape {colours.shape}; 1 to {MAX_COLOURS} colours of 3 values are expected"
            )
    return None


def _check_poses(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    if not isinstance(label, Poses):
        return f"is a {type(label).__name__}, not Poses"
    wrong = _fields(
        label, {name: ((len(label), *shape), dtype) for name, (shape, dtype) in POSE_FIELDS.items()}
    )
    if wrong or not len(label):
        return wrong
    for name in ("xyxy", "orient", "betas", "camera"):
        if not np.isfinite(getattr(label, name)).all():
            return f"has {name} that is not finite"
    if not (label.xyxy[:, 2:] > label.xyxy[:, :2]).all():
        return "has a box with x1 <= x0 or y1 <= y0; the order is x0, y0, x1, y1"
    known = np.isfinite(label.body_pose).all((1, 2, 3)) | (label.pose_ids >= 0).all(1)
    if not known.all():
        return "has somebody with neither body_pose nor pose_ids"
    if (np.sort(label.orders, axis=1) != np.arange(4)).any():
        return "has orders that are no permutations of 0 to 3"
    return _ids(label.pose_ids, "pose_ids")


def _check_instances(label: Any, contract: LabelContract, size: tuple[int, ...]) -> Verdict:
    if not isinstance(label, Instances):
        return f"is an {type(label).__name__}, not Instances"
    count = len(label)
    wrong = _fields(label, {"xyxy": ((count, 4), np.float64), "mask_ids": ((count, MASK_TOKENS), np.int64)})
    if wrong:
        return wrong
    if len(label.polygons) != count:
        return f"has {len(label.polygons)} polygons for {count} boxes"
    for values in (label.xyxy, *label.polygons):
        if values.size and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            return "has a box or polygon outside [0, 1]; they are normalised to the image"
    for polygon in label.polygons:
        if polygon.shape[1:] != (2,) or polygon.dtype != np.float64 or len(polygon) < 3:
            return f"has a polygon {polygon.dtype} {polygon.shape}, not float64 (3 or more, 2)"
    if not ((label.xyxy[:, 2] >= label.xyxy[:, 0]) & (label.xyxy[:, 3] >= label.xyxy[:, 1])).all():
        return "has a box with x1 < x0 or y1 < y0; the order is x0, y0, x1, y1"
    return _ids(label.mask_ids, "mask_ids")


def _fields(label: Any, expected: Mapping[str, tuple[tuple[int, ...], Any]]) -> Verdict:
    for name, (shape, dtype) in expected.items():
        array = getattr(label, name)
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            return f"has {name} {found}, not {np.dtype(dtype)} {shape}"
    return None


def _ids(ids: np.ndarray, name: str) -> Verdict:
    known = (ids >= 0).all(1) & (ids < MAX_TOKEN_ID).all(1)
    if not (known | (ids == -1).all(1)).all():
        return f"has {name} that are neither below {MAX_TOKEN_ID} nor -1 throughout a row"
    return None


_CHECKS: dict[str, Callable[[Any, LabelContract, tuple[int, ...]], Verdict]] = {
    "map": _check_map,
    "features": _check_features,
    "vector": _check_vector,
    "image": _check_image,
    "scalar": _check_scalar,
    "text": _check_text,
    "boxes": _check_boxes,
    "metadata": _check_metadata,
    "palette": _check_palette,
    "poses": _check_poses,
    "instances": _check_instances,
}
