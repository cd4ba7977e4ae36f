"""Measuring labels: the figures and shares of a micro-batch, arrays of one shape at a time.

Of a map every n-th row and column is looked at, so that what it costs does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fourmill.labelers.figures import FIGURES, LOOKED_AT, Measures, form_of
from fourmill.labels import Absent, Boxes, Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import LabelContract, Modality

BINS = 16
SMALLEST = 2.0**-20  # what is nearer to zero falls into one bin with it

#: names of bins, and float64 (rows, bins): the share of a row's values that lie there
Shares = tuple[tuple[str, ...], np.ndarray]


def measure(
    modality: Modality,
    labels: Sequence[Label],
    noted: Mapping[str, Sequence[float]] | None = None,
    present: Sequence[bool] | np.ndarray | None = None,
) -> Measures:
    """Of labels that keep their contract, one row each; rows that are absent, or not ``present``, are not seen.

    ``noted``: what a labeler said of its rows, by figure.
    """
    contract = modality.contract
    alike: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        if not isinstance(label, Absent) and (present is None or present[row]):
            alike.setdefault(getattr(label, "shape", None), []).append(row)
    found = Measures.none(len(labels))
    for rows in alike.values():
        made = _MEASURES[form_of(contract)]([labels[row] for row in rows], contract)
        if len(rows) == len(labels):
            found = made
        else:
            found.put(rows, made, range(len(rows)))
    for name, values in (noted or {}).items():
        given = np.full(len(labels), np.nan)
        given[: len(values)] = values[: len(labels)]
        found.add(name, given)
    return found


def measure_tokens(modality: Modality, cells: Sequence[Any], measures: Measures) -> None:
    """Add what is said of the token ids of each image's crops. A cell that is absent has none."""
    if modality.kind not in ("grid", "sequence"):
        return
    live = [row for row, cell in enumerate(cells) if not isinstance(cell, Absent) and measures.seen[row]]
    found = np.full(len(cells), np.nan)
    if live and modality.kind == "grid":
        ids = np.sort(np.stack([value for row in live for value in cells[row]]), axis=1)
        distinct = 1 + (ids[:, 1:] != ids[:, :-1]).sum(axis=1)
        found[live] = distinct.reshape(len(live), -1).mean(axis=1)
    elif live:
        found[live] = [np.mean([len(value) for value in cells[row]]) for row in live]
    measures.add("distinct tokens" if modality.kind == "grid" else "tokens", found)


# -- arrays of one shape ------------------------------------------------------------------------------


def _measures(contract: LabelContract, values: Sequence[Any], shares: Shares) -> Measures:
    """The figures of this form of label, each (rows,)."""
    table = np.array(values, np.float64).T
    return Measures(FIGURES[form_of(contract)], table, *shares, np.ones(len(table), bool))


def _look(label: np.ndarray) -> np.ndarray:
    """Every n-th row and column."""
    step_y, step_x = (max(1, side // LOOKED_AT) for side in label.shape[:2])
    return label[step_y // 2 :: step_y, step_x // 2 :: step_x]


def _looked_at(labels: Sequence[np.ndarray]) -> np.ndarray:
    """float64 (rows, values)"""
    return np.array([_look(label) for label in labels], np.float64).reshape(len(labels), -1)


def _is_constant(values: np.ndarray) -> np.ndarray:
    """bool (rows,) where everything is the same: a network that saw nothing, or does not work."""
    low, high = values.min(axis=1), values.max(axis=1)
    return np.asarray(high - low <= 1e-6 * np.maximum(np.abs(low), np.abs(high)))


def _map(labels: Sequence[np.ndarray], contract: LabelContract) -> Measures:
    seen = _looked_at(labels)
    return _measures(
        contract, [seen.mean(axis=1), seen.std(axis=1), _is_constant(seen)], _binned(seen, contract)
    )


def _vectors(labels: Sequence[np.ndarray], contract: LabelContract) -> Measures:
    looked = np.stack([_look(label) for label in labels])
    seen = np.stack([looked[..., i].reshape(len(labels), -1) for i in range(looked.shape[-1])], axis=1)
    mean = seen.mean(axis=-1, dtype=np.float64)
    xyz = np.full((len(labels), 3), np.nan)
    xyz[:, : mean.shape[1]] = mean[:, :3]
    spread = 1 - np.linalg.norm(mean, axis=1)
    constant = np.ptp(seen, axis=-1).max(axis=1) <= 1e-6
    return _measures(contract, [*xyz.T, spread, constant], _linear(seen[:, -1].astype(np.float64), -1.0, 1.0))


def _classes(labels: Sequence[np.ndarray], contract: LabelContract) -> Measures:
    seen = np.array([_look(label) for label in labels], np.intp).reshape(len(labels), -1)
    counts = _counts(seen, len(contract.classes))
    present = (counts > 0).sum(axis=1)
    shares = counts / seen.shape[1]
    there = np.flatnonzero(counts.any(axis=0))
    bins = tuple(contract.classes[i] for i in there)
    return _measures(contract, [present, shares.max(axis=1), present == 1], (bins, shares[:, there]))


def _vector(labels: Sequence[np.ndarray], contract: LabelContract) -> Measures:
    seen = np.array(labels, np.float64)
    constant = _is_constant(seen) & (seen.shape[1] > 1)
    values = [seen.mean(axis=1), np.linalg.norm(seen, axis=1), constant]
    return _measures(contract, values, _binned(seen, contract))


def _scalar(labels: Sequence[float], contract: LabelContract) -> Measures:
    seen = np.array(labels, np.float64).reshape(-1, 1)
    return _measures(contract, [seen[:, 0]], _binned(seen, contract))


def _image(labels: Sequence[np.ndarray], contract: LabelContract) -> Measures:
    looked = np.stack([_look(label) for label in labels])
    total = np.add.reduce([looked[..., i] for i in range(looked.shape[-1])], dtype=np.uint32)
    grey = total.reshape(len(labels), -1) / (255 * looked.shape[-1])
    values = [grey.mean(axis=1), grey.std(axis=1), _is_constant(grey)]
    return _measures(contract, values, _linear(grey, 0.0, 1.0))


# -- one by one ---------------------------------------------------------------------------------------


def _features(labels: Sequence[np.ndarray], contract: LabelContract) -> Measures:
    """A few MB each: together they would not fit into the processor's cache."""
    figures, norms = [], []
    for label in labels:
        vectors = label.reshape(-1, label.shape[-1]).astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        direction = (1 / np.maximum(lengths, 1e-12)) @ vectors / len(vectors)
        norms.append(lengths)
        figures.append(
            {
                "norm": float(lengths.mean()),
                "spread": float(1 - np.linalg.norm(direction)),
                "constant": float(len(vectors) > 1 and np.ptp(label, axis=(0, 1)).max() <= 1e-6),
            }
        )
    made = Measures.of(figures)
    made.bins, made.shares = _octaves(np.stack(norms))
    return made


def _boxes(labels: Sequence[Boxes], contract: LabelContract) -> Measures:
    figures, shares = [], []
    for label in labels:
        found: dict[str, float] = {"boxes": len(label), "empty": len(label) == 0}
        if len(label):
            found |= {"score": float(label.scores.mean()), "area": _area(label.xyxy)}
        names = [contract.classes[i] if contract.classes else str(i) for i in label.class_ids]
        figures.append(found)
        shares.append({name: names.count(name) / len(names) for name in set(names)})
    return Measures.of(figures, shares)


def _metadata(labels: Sequence[Metadata], contract: LabelContract) -> Measures:
    figures = [{"fields": len(label), "empty": len(label) == 0} for label in labels]
    return Measures.of(figures, [{name: 1 / len(label) for name in label.values} for label in labels])


def _palette(labels: Sequence[Palettes], contract: LabelContract) -> Measures:
    return Measures.of([{"palettes": len(label), "empty": len(label) == 0} for label in labels])


def _poses(labels: Sequence[Poses], contract: LabelContract) -> Measures:
    return Measures.of([_counted("people", label.xyxy) for label in labels])


def _instances(labels: Sequence[Instances], contract: LabelContract) -> Measures:
    return Measures.of([_counted("instances", label.xyxy) for label in labels])


def _counted(name: str, xyxy: np.ndarray) -> dict[str, float]:
    figures: dict[str, float] = {name: len(xyxy), "empty": len(xyxy) == 0}
    return figures | {"area": _area(xyxy)} if len(xyxy) else figures


def _area(xyxy: np.ndarray) -> float:
    width, height = (xyxy[:, 2:] - xyxy[:, :2]).T
    return float((width * height).mean())


def _text(labels: Sequence[Sequence[str]], contract: LabelContract) -> Measures:
    words = [[len(text.split()) for text in texts] for texts in labels]
    return Measures.of(
        [{"words": float(np.mean(counts)) if counts else 0.0, "empty": not any(counts)} for counts in words]
    )


_MEASURES: dict[str, Callable[[Any, LabelContract], Measures]] = {
    "map": _map,
    "vectors": _vectors,
    "classes": _classes,
    "boxes": _boxes,
    "metadata": _metadata,
    "palette": _palette,
    "poses": _poses,
    "instances": _instances,
    "features": _features,
    "vector": _vector,
    "text": _text,
    "scalar": _scalar,
    "image": _image,
}


# -- shares -------------------------------------------------------------------------------------------


def _binned(values: np.ndarray, contract: LabelContract) -> Shares:
    """Of float64 (rows, n): between known bounds in equal steps, else in half octaves."""
    if contract.low is not None and contract.high is not None:
        return _linear(values, contract.low, contract.high)
    return _octaves(values)


def _linear(values: np.ndarray, low: float, high: float) -> Shares:
    """A bin is named by its lower edge."""
    width = (high - low) / BINS or 1.0
    bins = np.minimum(np.maximum((values - low) * (1 / width), 0), BINS - 1).astype(np.intp)
    return _edges(low, high), _counts(bins, BINS) / values.shape[1]


@lru_cache(maxsize=64)
def _edges(low: float, high: float) -> tuple[str, ...]:
    return tuple(f"{low + i * (high - low) / BINS:.3g}" for i in range(BINS))


def _octaves(values: np.ndarray) -> Shares:
    """A bin is named by its edge nearer to zero."""
    octaves = np.floor(2 * np.log2(np.maximum(np.abs(values), SMALLEST))).astype(np.intp)
    codes = 2 * octaves + (values < 0)
    first = int(codes.min())
    counts = _counts(codes - first, int(codes.max()) - first + 1)
    there = np.flatnonzero(counts.any(axis=0))
    return tuple(_octave(int(code) + first) for code in there), counts[:, there] / values.shape[1]


@lru_cache(maxsize=4096)
def _octave(code: int) -> str:
    return f"{'-' if code % 2 else ''}{2 ** (code // 2 / 2):.3g}"


def _counts(ids: np.ndarray, size: int) -> np.ndarray:
    """int (rows, size): how often each of 0..size-1 is in each row of ``ids`` int (rows, n)."""
    rows = len(ids)
    offset = size * np.arange(rows)[:, None]
    return np.bincount((ids + offset).ravel(), minlength=rows * size).reshape(rows, size)
