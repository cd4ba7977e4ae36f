"""How labels that are no tokens are written in the layout that the published 4M code reads; and read back, with suspicion.

==========  ==========================================================================================
form        JSON of one image
==========  ==========================================================================================
text        a list of strings; read: a string, an object with "caption", or a list of those
boxes       {"instances": [{"boxes": [x0, y0, x1, y1] in shares of the image, "class_name", "score"}]}
metadata    {field: number}; what is not known is left out
palette     [{"1": [[r, g, b]], ..., "7": [...]}]: that code draws one of the seven sizes
poses       {"bbox_xyxy": pixels, "pred_cam", "pose_tokenized", "pred_smpl_params": {...}}; {} where nobody is
scalar      a number
==========  ==========================================================================================

What is read raises ValueError with words about the value; whoever calls names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.labels import (
    MAX_COLOURS,
    MAX_TOKEN_ID,
    METADATA,
    NUM_BETAS,
    NUM_JOINTS,
    POSE_TOKENS,
    Boxes,
    Label,
    Metadata,
    Palettes,
    Poses,
)  # fmt: skip

MAX_ITEMS = 10_000  # boxes, people or captions of one image; more are damage
Size = tuple[int, int]  # (width, height) of the original image


def label_json(form: str, label: Label, classes: Sequence[str], size: Size) -> Any:
    """The JSON value of a label of the whole image. ValueError where the published code could not read it."""
    if form == "boxes":
        return {"instances": list(_instances(label, classes))}
    if form == "metadata":
        return {k: v if isinstance(v, int) else float(v) for k, v in label.values.items()}
    if form == "palette":
        return [_palettes_json(label)]
    if form == "poses":
        return _poses_json(label, size)
    return list(label) if form == "text" else float(label)


def label_of(form: str, value: Any, classes: Sequence[str], size: Size) -> Label:
    """The inverse of `label_json`. ValueError says what is wrong with the value."""
    try:
        return _READERS[form](value, classes, size)
    except (KeyError, TypeError, IndexError, OverflowError, AttributeError) as error:
        raise ValueError(f"is no {form}: {type(error).__name__} {error}") from error


# -- boxes and texts ----------------------------------------------------------------------------------


def _instances(boxes: Boxes, classes: Sequence[str]) -> Iterable[dict[str, Any]]:
    rows = zip(boxes.xyxy.tolist(), boxes.class_ids.tolist(), boxes.scores.tolist(), strict=True)
    for xyxy, class_id, score in rows:
        yield {"boxes": xyxy, "class_name": classes[class_id] if classes else str(class_id), "score": score}


def _boxes(value: Any, classes: Sequence[str], size: Size) -> Boxes:
    instances = _items(value["instances"])
    number = {name: index for index, name in enumerate(classes)}
    unknown = sorted({str(i["class_name"]) for i in instances} - set(number))
    if unknown:
        raise ValueError(f"has a box of class {unknown[0]!r}, which the class map does not have")
    xyxy = _numbers([i["boxes"] for i in instances], (4,), "boxes")
    scores = _numbers([i.get("score", 1.0) for i in instances], (), "score")
    if xyxy.size and not (0 <= xyxy.min() and xyxy.max() <= 1 and 0 <= scores.min() and scores.max() <= 1):
        raise ValueError("has a box or a score beyond 0 to 1")
    ids = np.array([number[str(i["class_name"])] for i in instances], np.int64)
    return Boxes(xyxy.astype(np.float32), ids, scores.astype(np.float32))


def captions_of(value: Any) -> list[str]:
    """The texts of a caption member, as the published code takes them."""
    items = value if isinstance(value, list) else [value]
    texts = [item["caption"] if isinstance(item, dict) else item for item in _items(items)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("holds a caption that is no text")
    return texts


# -- numbers ------------------------------------------------------------------------------------------


def _metadata(value: Any, classes: Sequence[str], size: Size) -> Metadata:
    if not isinstance(value, dict) or set(value) - set(METADATA):
        extra = sorted(set(value) - set(METADATA))[:1] if isinstance(value, dict) else "no object"
        raise ValueError(f"is no metadata ({extra})")
    _numbers(list(value.values()), (), "metadata")
    return Metadata(value)


def _scalar(value: Any, classes: Sequence[str], size: Size) -> float:
    return float(_numbers([value], (), "number")[0])


def _palettes_json(palettes: Palettes) -> dict[str, Any]:
    found = {str(len(colours)): colours.tolist() for colours in palettes.colours}
    lacking = [str(n) for n in range(1, MAX_COLOURS + 1) if str(n) not in found]
    if lacking:
        raise ValueError(
            f"has no palette of {', '.join(lacking)} colours, and the published code draws each size from 1 to "
            f"{MAX_COLOURS}"
        )
    return found


def _palettes(value: Any, classes: Sequence[str], size: Size) -> Palettes:
    colours = []
    for number, palette in _items(value)[0].items():
        if number not in map(str, range(1, MAX_COLOURS + 1)):
            raise ValueError(f"has a palette of {number!r} colours")
        table = _numbers(palette, (3,), "palette")
        if len(table) != int(number) or table.min() < 0 or table.max() > 255:
            raise ValueError(f"has a palette of {number} colours that are not so many triples of 0 to 255")
        colours.append(np.rint(table).astype(np.uint8))  # as that code writes them
    return Palettes(tuple(colours))


# -- people -------------------------------------------------------------------------------------------


def _poses_json(poses: Poses, size: Size) -> dict[str, Any]:
    if not len(poses):
        return {}
    if (poses.pose_ids < 0).any():
        raise ValueError("has people without tokens of their body pose, which the published code reads")
    body: dict[str, Any] = {}
    if np.isfinite(poses.body_pose).all():  # that code's training does not read it
        body["body_pose"] = poses.body_pose.astype(float).tolist()
    return {
        "bbox_xyxy": (poses.xyxy.astype(np.float64) * [*size, *size]).tolist(),
        "pred_cam": poses.camera.astype(float).tolist(),
        "pose_tokenized": poses.pose_ids.tolist(),
        "pred_smpl_params": {
            "global_orient": poses.orient.astype(float).tolist(),
            "betas": poses.betas.astype(float).tolist(),
            **body,
        },
    }


def _poses(value: Any, classes: Sequence[str], size: Size) -> Poses:
    if value in ({}, []):
        return Poses.empty()
    if not isinstance(value, dict):
        raise TypeError("no object of people")
    smpl, count = value["pred_smpl_params"], len(_items(value["bbox_xyxy"]))
    ids = _numbers(value["pose_tokenized"], (POSE_TOKENS,), "pose_tokenized")
    if len(ids) != count or ids.min() < 0 or ids.max() >= MAX_TOKEN_ID or (ids % 1).any():
        raise ValueError(f"has tokens of {len(ids)} of {count} people, or beyond 0 to {MAX_TOKEN_ID - 1}")
    known: dict[str, Any] = {
        "orient": _numbers(smpl["global_orient"], (3, 3), "global_orient"),
        "betas": _numbers(smpl["betas"], (NUM_BETAS,), "betas"),
        "camera": _numbers(value["pred_cam"], (3,), "pred_cam"),
    }
    if "body_pose" in smpl:
        known["body_pose"] = _numbers(smpl["body_pose"], (NUM_JOINTS, 3, 3), "body_pose")
    if any(len(values) != count for values in known.values()):
        raise ValueError(f"does not say everything of its {count} people")
    xyxy = _numbers(value["bbox_xyxy"], (4,), "bbox_xyxy") / [*size, *size]
    return Poses.of(xyxy, pose_ids=ids.astype(np.int64), **known)


# -- shared -------------------------------------------------------------------------------------------


def _items(value: Any) -> Sequence[Any]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise ValueError(f"is no list of at most {MAX_ITEMS} items")
    return value


def _numbers(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """float64 (n, *shape) of finite numbers."""
    array = np.asarray(_items(value))
    if array.size and array.dtype.kind not in "iuf":
        raise ValueError(f"{what}: not numbers alone")
    table = array.astype(np.float64).reshape(len(array), *shape)
    if not np.isfinite(table).all():
        raise ValueError(f"{what}: a number that is not finite")
    return table


_READERS: Mapping[str, Callable[[Any, Sequence[str], Size], Label]] = {
    "boxes": _boxes,
    "text": lambda value, classes, size: captions_of(value),
    "metadata": _metadata,
    "palette": _palettes,
    "poses": _poses,
    "scalar": _scalar,
}
