"""What `fourmill.labelers.contract` asks of a declaration, gives a labeler to see, and how far two labels are apart.

Pictures, truths and upstream labels are drawn from a seed, so that a process of its own can make the same ones.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, labelers, upstream_of
from fourmill.labels import Absent, Boxes, Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import LabelContract, Modality
from fourmill.seeds import generator

#: Which forms of label each kind of modality can be made of; forms that are not named go with any.
FORMS: dict[str, tuple[str, ...]] = {
    "grid": ("map", "features", "image"),
    "vector": ("vector",),
    "sequence": ("boxes", "text", "metadata", "palette", "poses", "instances"),
    "pixels": ("image",),
    "embedding": ("vector", "features"),
    "scalar": ("scalar",),
}
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_INPUTS = ("image", "crops", "caption", "truth")

BLANK = "blank"
N_CROPS = 2
#: (H, W) of the frames that most points look at, and of those that photographs have now and then
USUAL_SIZES = ((96, 128), (128, 96), (96, 96), (101, 173))
ODD_SIZES = ((1, 64), (64, 1), (1, 1), (37, 211), (768, 1024))


def wrong_declaration(cls: type[Labeler], modality: Modality) -> str:
    """What a class and its modality say that the flow could not use; "" where all is well."""
    contract = modality.contract
    if not _NAME.fullmatch(modality.name):
        return f"the modality's name {modality.name!r} is not lower case letters, digits and underscores"
    if modality.kind not in FORMS:
        return f"{modality.kind!r} is no kind of modality; known: {', '.join(FORMS)}"
    if contract.form not in FORMS[modality.kind] and any(contract.form in forms for forms in FORMS.values()):
        known = ", ".join(FORMS[modality.kind])
        return f"a {modality.kind} cannot be made of {contract.form} labels; known: {known}"
    if not modality.codec:
        return "the modality names no codec, so that it cannot be tokenized"
    if cls.sees not in ("image", "crops") or (cls.sees == "crops") != ("crops" in cls.inputs):
        return (
            f"sees is {cls.sees!r} and inputs are {', '.join(cls.inputs)}; 'crops' belongs in both or in none"
        )
    if cls.sees == "crops" and contract.form not in ("features", "vector"):
        return f"labels of form {contract.form} are cut out of the image's; set sees to 'image'"
    unknown = [n for n in cls.inputs if n not in _INPUTS and not n.startswith("label:")]
    if unknown:
        return f"inputs names {unknown[0]!r}; known are {', '.join(_INPUTS)} and label:MODALITY"
    return ""


def picture(size: tuple[int, int], number: int) -> np.ndarray:
    """uint8 (H, W, 3): a shaded ground, boxes and discs in colours, a little noise."""
    height, width = size
    rng = generator(0, "contract picture", number)
    y, x = np.mgrid[0:height, 0:width]
    ground = rng.uniform(40, 200, (2, 3))
    share = (y / max(1, height - 1))[..., None]
    image = ground[0] * share + ground[1] * (1 - share)
    for shape in range(5):
        colour, centre = rng.uniform(0, 255, 3), rng.uniform(0, 1, 2) * (height, width)
        radius = rng.uniform(0.08, 0.3) * min(height, width)
        away = np.maximum(abs(y - centre[0]), abs(x - centre[1]))
        distance = away if shape % 2 else np.hypot(y - centre[0], x - centre[1])
        image = np.where((distance < radius)[..., None], colour, image)
    return np.clip(image + rng.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)


def make_batch(labeler: Labeler, sizes: Sequence[tuple[int, int]], first: int = 0) -> LabelBatch:
    """A batch of one row per size, with everything that the labeler's inputs name. Arrays are writable."""
    frames = [picture(size, first + row) for row, size in enumerate(sizes)]
    side, crops = labeler.settings.image_size, None
    if "crops" in labeler.inputs:
        made = [picture((side, side), 1000 + first + i) for i in range(N_CROPS * len(sizes))]
        crops = np.stack(made).reshape(len(sizes), N_CROPS, side, side, 3)
    own = labeler.describe()
    return LabelBatch(
        keys=[f"picture/{first + row}" for row in range(len(sizes))],
        frames=frames,
        present=np.ones(len(sizes), bool),
        captions=[(f"picture number {first + row}",) for row in range(len(sizes))],
        crops=crops,
        truth=[
            {own.name: some_label(own.contract, f, first + row)} if "truth" in labeler.inputs else None
            for row, f in enumerate(frames)
        ],
        upstream={
            name: [some_label(modality.contract, f, first + row) for row, f in enumerate(frames)]
            for name, modality in labeler.settings.upstream.items()
        },
    )


def take(batch: LabelBatch, rows: Sequence[int]) -> LabelBatch:
    """Some rows, in this order; arrays are copies."""
    return LabelBatch(
        keys=[batch.keys[row] for row in rows],
        frames=[batch.frames[row].copy() for row in rows],
        present=batch.present[list(rows)],
        captions=[batch.captions[row] for row in rows],
        crops=None if batch.crops is None else batch.crops[list(rows)],
        truth=[batch.truth[row] for row in rows],
        upstream={name: [labels[row] for row in rows] for name, labels in batch.upstream.items()},
    )


def blanked(batch: LabelBatch, rows: Sequence[int]) -> LabelBatch:
    """The batch with these rows as if they had been set aside: black, not present, without caption or truth."""
    gone = np.isin(np.arange(len(batch)), list(rows))
    crops = None if batch.crops is None else batch.crops.copy()
    if crops is not None:
        crops[gone] = 0
    return replace(
        batch,
        frames=[np.zeros_like(f) if g else f for f, g in zip(batch.frames, gone, strict=True)],
        present=batch.present & ~gone,
        captions=[() if g else c for c, g in zip(batch.captions, gone, strict=True)],
        crops=crops,
        truth=[None if g else t for t, g in zip(batch.truth, gone, strict=True)],
        upstream={
            name: [Absent(BLANK) if g else label for label, g in zip(labels, gone, strict=True)]
            for name, labels in batch.upstream.items()
        },
    )


class NothingToShow(Exception):
    """No input can be made up that this labeler would understand."""


def with_upstream(cls: type[Labeler], settings: LabelerSettings) -> LabelerSettings:
    """The settings with what the flow adds: the modalities whose labels the labeler asks for, with their classes."""
    names = [name for name in upstream_of(cls.inputs) if name not in settings.upstream]
    return replace(settings, upstream={**settings.upstream, **{name: _described(name) for name in names}})


def _described(name: str) -> Modality:
    """A modality as the labeler of its name describes it, or another that makes it declares it."""
    found = [cls for _, cls in labelers.items() if cls.modality.name == name]
    if name in labelers:
        found.insert(0, labelers.get(name))
    if not found:
        raise NothingToShow(f"its input label:{name} is a modality that no labeler makes")
    return found[0](with_upstream(found[0], LabelerSettings(name))).describe()


_SOME: Mapping[str, Callable[[np.random.Generator], Label]] = {
    "metadata": lambda rng: Metadata({"brightness": rng.uniform(0, 255), "n_humans": int(rng.integers(9))}),
    "palette": lambda rng: Palettes((rng.integers(0, 256, (3, 3)).astype(np.uint8),)),
    "poses": lambda rng: Poses.of([[0.1, 0.2, 0.5, 0.9]], pose_ids=rng.integers(0, 1024, (1, 8))),
    "instances": lambda rng: Instances.of(
        [[0.1, 0.2, 0.5, 0.9]], [[[0.1, 0.2], [0.5, 0.2], [0.3, 0.9]]], rng.integers(0, 1024, (1, 16))
    ),
}


def some_label(contract: LabelContract, frame: np.ndarray, number: int) -> Label:
    """A label that keeps the contract and means nothing, of a frame uint8 (H, W, 3)."""
    rng = generator(0, "contract label", number)
    count = len(contract.classes) or 2
    if contract.form == "boxes":
        corner, extent = rng.uniform(0, 0.6, (3, 2)), rng.uniform(0.1, 0.4, (3, 2))
        xyxy = np.concatenate([corner, corner + extent], axis=1).astype(np.float32)
        return Boxes(xyxy, rng.integers(0, count, 3), np.ones(3, np.float32))
    if contract.form == "text":
        return [f"something number {number}"]
    if contract.form in _SOME:
        return _SOME[contract.form](rng)
    low = 0.5 if contract.low is None else contract.low
    high = low + 10 if contract.high is None else contract.high
    if contract.form not in ("map", "image", "features", "vector", "scalar"):
        raise NothingToShow(f"labels of form {contract.form} cannot be made up")
    if contract.form == "scalar":
        return float(rng.uniform(low, high))
    if contract.classes or contract.units == "class id":
        return rng.integers(0, count, frame.shape[:2]).astype(contract.dtype)
    channels = () if contract.channels is None else (contract.channels or 8,)
    shape = {"vector": (), "features": (8, 8)}.get(contract.form, frame.shape[:2])
    values = rng.uniform(low, high, (*shape, *channels))
    if contract.unit_norm:
        values /= np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-6)
    return values.astype(contract.dtype)


# -- comparing ----------------------------------------------------------------------------------------


def digest_of(values: Sequence[Any]) -> str:
    """sha256 over labels or arrays, to the last bit."""
    digest = hashlib.sha256()
    for value in values:
        for part in _parts(value):
            if isinstance(part, np.ndarray):
                digest.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
            else:
                digest.update(f"{type(part).__name__}{part!r}".encode())
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """A label as arrays and plain values, in a fixed order."""
    if is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for entry in value:
            yield from _parts(entry)
    elif isinstance(value, Mapping):
        yield from _parts(sorted(value.items()))
    else:
        yield value


def apart(a: Label, b: Label) -> float:
    """0: the same to the last bit; 1 and more: another thing altogether.

    Between them: the largest difference as a share of the label's range (arrays, scores, normalised boxes), or the
    share of pixels that have another class.
    """
    if digest_of([a]) == digest_of([b]):
        return 0.0
    ours, theirs = list(_parts(a)), list(_parts(b))
    if len(ours) != len(theirs):
        return math.inf
    return max(_part_apart(x, y) for x, y in zip(ours, theirs, strict=True))


def _part_apart(a: Any, b: Any) -> float:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if not np.issubdtype(a.dtype, np.floating):
            share = float((a != b).mean()) if a.size else 0.0
            # class maps by their pixels; ids and pictures are right or wrong
            return share if a.ndim == 2 or not share else math.inf
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            return math.inf
        known = np.nan_to_num(a.astype(np.float64))
        scale = max(float(np.ptp(known)), 1e-3 * float(abs(known).max()), 1e-12) if a.size else 1.0
        return float(abs(known - np.nan_to_num(b.astype(np.float64))).max(initial=0)) / scale
    if isinstance(a, (float, np.floating)) and isinstance(b, (float, np.floating)):
        return abs(float(a) - float(b)) / max(1.0, abs(float(a)))
    return 0.0 if type(a) is type(b) and a == b else math.inf


def furthest(a: Sequence[Label], b: Sequence[Label]) -> float:
    """The largest `apart` of two lists of labels; infinite where they are not equally long."""
    if len(a) != len(b):
        return math.inf
    return max((apart(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
