"""The members of exported tars, by kind of modality."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.errors import ConfigError, DatasetError
from fourmill.labels import Absent, Boxes, Label, Poses
from fourmill.modality import CAPTION, Modality
from fourmill.shards.arrow import Column
from fourmill.shards.exchange import label_json
from fourmill.shards.receipts import Recipe
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tar import npy_bytes, read_labels

Decode = Callable[[Sequence[np.ndarray]], Sequence[Label]]
Cell = tuple[str, bytes]  # file ending and content
Maker = Callable[[int, Column, pa.Table, np.ndarray], Iterator[Cell]]
#: forms that tokens alone give back: what was said of the whole image, whichever crop was tokenized, or of the centre square
WHOLE, CENTRE = ("metadata",), ("boxes", "poses")
LABELLED = (*WHOLE, *CENTRE, "palette")  # the published code makes tokens of these itself


def is_exportable(modality: Modality) -> bool:
    """Whether the layout has a place for it."""
    if modality.kind in ("grid", "vector", "embedding", "scalar") or modality.name == CAPTION.name:
        return True
    return modality.kind == "sequence" and modality.contract.form in LABELLED


def needs_labels(modality: Modality, n_crops: int) -> bool:
    """Whether it can only be exported where its labels are kept."""
    form = modality.contract.form
    return modality.kind == "sequence" and (form == "palette" or (form in CENTRE and n_crops != 1))


def maker(snapshot: Snapshot, name: str, decode: Mapping[str, Decode]) -> Maker:
    """What makes the cells of one modality, or ConfigError where that can't be done."""
    modality = snapshot.modalities[name]
    if modality.kind in ("grid", "vector", "embedding"):
        return lambda shard, column, samples, rows: _array_cells(column, rows, modality)
    if modality.kind == "scalar":
        return lambda shard, column, samples, rows: (as_json(float(column.cells(row)[0])) for row in rows)
    if name == CAPTION.name:
        return lambda shard, column, samples, rows: (
            as_json(samples["captions"][row].as_py()) for row in rows
        )
    if is_exportable(modality):
        return _label_maker(snapshot, name, decode.get(name))
    if modality.contract.form == "instances":
        raise ConfigError(
            f"modality {name!r}: the published code reads object instances from pickled arrays alone, and fourmill writes "
            "no pickle; leave it out"
        )
    raise ConfigError(
        f"modality {name!r} ({modality.kind} of {modality.contract.form}) has no place in the exported layout: that code "
        "crops pixels from the original images; leave it out"
    )


def crop_cells(samples: pa.Table, rows: np.ndarray) -> Iterator[Cell]:
    for row in rows:
        yield "npy", npy_bytes(np.array(samples["crops"][row].as_py(), np.int64).reshape(-1, 5))


def key_cells(samples: pa.Table, rows: np.ndarray) -> Iterator[Cell]:
    return (("txt", samples["key"][row].as_py().encode()) for row in rows)


def size_cells(samples: pa.Table, rows: np.ndarray) -> Iterator[Cell]:
    return (as_json(size_of(samples, row)) for row in rows)


def size_of(samples: pa.Table, row: int) -> tuple[int, int]:
    """(width, height) of the original image."""
    return samples["width"][row].as_py(), samples["height"][row].as_py()


def as_json(value: Any) -> Cell:
    return "json", json.dumps(value, ensure_ascii=False).encode()


def _array_cells(column: Column, rows: np.ndarray, modality: Modality) -> Iterator[Cell]:
    assert column.tokens is not None
    dtype: type = np.float16
    if modality.kind != "embedding":
        dtype = np.int16 if modality.vocab_size <= np.iinfo(np.int16).max + 1 else np.int32
    for row in rows:
        tokens = column.tokens[row]
        if dtype is np.int16 and tokens.max(initial=0) > np.iinfo(np.int16).max:
            raise DatasetError(
                f"{modality.name!r} has token {tokens.max()}, outside its vocabulary of {modality.vocab_size}"
            )
        yield "npy", npy_bytes(tokens.astype(dtype))


# -- labels -------------------------------------------------------------------------------------------


def kept_labels(snapshot: Snapshot, name: str) -> tuple[str, set[int]]:
    """The short hash of a modality's label recipe ("": it has none), and the shards whose labels were kept."""
    recipe = snapshot.dataset.recipe(name, snapshot.content["modalities"][name]["recipe"])
    label = Recipe("label", recipe["label"]).short if "label" in recipe else ""
    return label, snapshot.dataset.finished(name, label) if label else set()


def _label_maker(snapshot: Snapshot, name: str, decode: Decode | None) -> Maker:
    modality, dataset = snapshot.modalities[name], snapshot.dataset
    form = modality.contract.form
    label, kept = kept_labels(snapshot, name)
    lacking = [shard.index for shard in snapshot.shards if shard.index not in kept]
    if lacking and (decode is None or needs_labels(modality, snapshot.n_crops)):
        why = "each image's palettes" if form == "palette" else f"{form} of whole images"
        raise ConfigError(
            f"modality {name!r}: labels of {len(lacking)} shards were not kept, and {why} can't be made "
            f"from crops; set modalities.{name}.keep_labels: true and build, or leave {name} out"
        )

    def make(shard: int, column: Column, samples: pa.Table, rows: np.ndarray) -> Iterator[Cell]:
        index = snapshot.shards[shard].index
        if index not in lacking:
            labels = read_labels(dataset.store.read(dataset.receipt(name, label, index).file), modality)
            found = [labels[int(row)] for row in rows]
        else:
            assert decode is not None
            decoded = decode([column.cells(int(row)) for row in rows])
            found = [_in_image(one, samples, int(row)) for one, row in zip(decoded, rows, strict=True)]
        for one, row in zip(found, rows, strict=True):
            where = f"{name!r}, shard {index}, row {row} ({samples['key'][int(row)].as_py()!r})"
            if isinstance(one, Absent):
                raise DatasetError(f"{where}: has tokens, but its kept label is absent")
            try:
                value = label_json(form, one, modality.contract.classes, size_of(samples, int(row)))
            except ValueError as error:
                raise DatasetError(f"{where}: {error}; leave {name} out") from error
            yield as_json(value)

    return make


def _in_image(label: Label, samples: pa.Table, row: int) -> Label:
    """Boxes and people of crop 0 (never flipped), as those of the image; anything else is of the image already."""
    if not isinstance(label, Boxes | Poses):
        return label
    top, left, height, width, _ = samples["crops"][row].as_py()[:5]
    image = np.array(size_of(samples, row) * 2, np.float64)
    xyxy = label.xyxy.astype(np.float64) * [width, height, width, height] + [left, top, left, top]
    boxes = (xyxy / image).astype(np.float32)
    if isinstance(label, Boxes):
        return Boxes(boxes, label.class_ids, label.scores)
    return Poses.of(boxes, **{n: getattr(label, n) for n in Poses.__slots__ if n != "xyxy"})
