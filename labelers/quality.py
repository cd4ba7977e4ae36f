"""The gate behind every labeler: each label of each batch against its modality's contract.

Cheap (a few passes over each array), and the only thing that stands between a labeler that somebody
else wrote and a dataset. A violation is a fault of the labeler, not of the sample: it is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fourmill.errors import ContractError
from fourmill.labels import Absent, Boxes, Label
from fourmill.modality import LabelContract, Modality

#: Lengths of unit vectors may differ from one by this much (float16 storage and resampling included).
UNIT_TOLERANCE = 1e-3

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
    for row, (label, frame) in enumerate(zip(labels, frames, strict=True)):
        wrong = None if isinstance(label, Absent) else verdict(label, modality.contract, frame.shape[:2])
        if wrong:
            name = keys[row] if len(keys) else f"row {row}"
            raise ContractError(f"{who}, {name}: {wrong}; the contract is {_prose(modality.contract)}")


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


_CHECKS: dict[str, Callable[[Any, LabelContract, tuple[int, ...]], Verdict]] = {
    "map": _check_map,
    "features": _check_features,
    "vector": _check_vector,
    "image": _check_image,
    "scalar": _check_scalar,
    "text": _check_text,
    "boxes": _check_boxes,
}
