"""How far labels and predictions are from the truth."""

from collections.abc import Sequence

import numpy as np

from fourmill.labels import Boxes


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x0 y0 x1 y1: (N, 4) and (M, 4) give float64 (N, M). Empty boxes give 0."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.clip(high - low, 0.0, None).prod(2)
    union = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def ap50(predicted: Sequence[Boxes], true: Sequence[Boxes]) -> float:
    """Mean over the true classes of the average precision at IoU 0.5 (area under the interpolated curve), in [0, 1].

    One `Boxes` per image in both. As in PASCAL VOC (Everingham et al. 2010, section 4.2): by falling score, a box is
    right if the true box of its class that it overlaps most does so by half and was not found before. nan without
    any true box.
    """
    classes = sorted({int(c) for boxes in true for c in boxes.class_ids})
    if not classes:
        return float("nan")
    return float(np.mean([_average_precision(predicted, true, c) for c in classes]))


def _average_precision(predicted: Sequence[Boxes], true: Sequence[Boxes], class_id: int) -> float:
    scores, right, count = [], [], 0
    for found, truth in zip(predicted, true, strict=True):
        found, truth = found.keep(found.class_ids == class_id), truth.keep(truth.class_ids == class_id)
        order = np.argsort(-found.scores, kind="stable")
        count += len(truth)
        scores.append(found.scores[order])
        right.append(_first_hits(box_iou(found.xyxy[order], truth.xyxy)))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits = np.cumsum(np.concatenate(right)[order])
    precision = hits / np.arange(1, len(hits) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(best_from_here * np.diff(hits, prepend=0)) / count)


def _first_hits(iou: np.ndarray) -> np.ndarray:
    """Which predictions (N, best first) of an image are right; ``iou`` (N, M) with its true boxes."""
    right, taken = np.zeros(len(iou), bool), np.zeros(iou.shape[1], bool)
    for k, row in enumerate(iou):
        best = int(row.argmax()) if len(row) else -1
        if best >= 0 and row[best] >= 0.5 and not taken[best]:
            right[k] = taken[best] = True
    return right


def abs_rel(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean of |predicted - true| / true over all elements; depths in one unit, any shape, true > 0."""
    predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    return float(np.mean(np.abs(predicted - true) / true))


def delta1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of elements whose ratio to the truth is below 1.25 either way, in [0, 1]; a depth <= 0 is outside."""
    predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    return float(np.mean((predicted < 1.25 * true) & (true < 1.25 * predicted)))


def mean_angular_error_deg(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean angle in degrees between vectors (..., 3), which need not be unit; a zero vector counts 90."""
    a, b = predicted.astype(np.float64), true.astype(np.float64)
    # atan2 is exact for small angles, where arccos of a rounded cosine is not
    sine, cosine = np.linalg.norm(np.cross(a, b), axis=-1), np.sum(a * b, axis=-1)
    angles = np.degrees(np.arctan2(sine, cosine))
    return float(np.mean(np.where((sine == 0) & (cosine == 0), 90.0, angles)))


def confusion(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (num_classes, num_classes + 1) int64 of integer maps of one shape: row = true, column = predicted.

    Elements whose truth is not below `num_classes` (255: void) are left out. The last column counts predictions
    that are not below it: wrong, and for no class.
    """
    valid = true < num_classes
    rows = true[valid].astype(np.int64)
    columns = np.minimum(predicted[valid].astype(np.int64), num_classes)
    counts = np.bincount(rows * (num_classes + 1) + columns, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1)


def mean_iou(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> float:
    """Mean over classes of intersection over union, counted over all pixels of all images together, in [0, 1].

    Classes that neither side has are left out; nan if there is none. See `confusion` for void.
    """
    counts = confusion(predicted, true, num_classes)
    hit = np.diagonal(counts).astype(np.float64)
    union = counts.sum(axis=1) + counts[:, :num_classes].sum(axis=0) - hit
    return float(np.mean(hit[union > 0] / union[union > 0])) if (union > 0).any() else float("nan")
