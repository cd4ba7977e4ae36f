"""Export: kept labels of objects as one COCO JSON file, written piece by piece.

    {"info": ..., "licenses": [], "categories": [{"id", "name", "supercategory": the modality}],
     "images": [{"id", "file_name", "width", "height", "key"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [left, top, width, height] in pixels of the original image,
                      "area", "iscrowd": 0, "segmentation", "score"}]}

Ids are functions of a row's place in the dataset, so an image keeps its id in every export: annotations can be compared by them.
``file_name`` is the image's own where the source is a folder, else the key with ``.jpg``: `fourmill import-labels det FILE` finds
the key again in both. Object instances without a class are annotations of the category "instance", with outlines and no score.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import pyarrow as pa

from fourmill.errors import ConfigError, DatasetError, WorkMissing
from fourmill.labels import Absent, Boxes, Instances, Label
from fourmill.shards.export import ExportReport, chosen_modalities
from fourmill.shards.export_cells import kept_labels, size_of
from fourmill.shards.samples import OK
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tar import read_labels
from fourmill.storage import Store

FORMS = ("boxes", "instances")
#: an image's id is (shard << ROW_BITS) + row + 1, an annotation's (image << OBJECT_BITS) + its number in the image
ROW_BITS, OBJECT_BITS = 20, 12
SPLITS = ("all", "train", "val")


@dataclass(frozen=True)
class _Column:
    """Kept labels of one modality. ``first``: the id of its first category."""

    name: str
    recipe: str
    classes: tuple[str, ...]
    first: int


def export_coco(
    snapshot: Snapshot, out_url: str, modalities: Sequence[str] | None = None, *, split: str = "all"
) -> ExportReport:
    """Write the kept labels of ``modalities`` (None: all of boxes and instances) to the file ``out_url``.

    Raises ConfigError where labels were not kept, for any other kind of modality and for a file that is there already,
    WorkMissing where no row is left. The same snapshot gives the same bytes.
    """
    if split not in SPLITS:
        raise ConfigError(f"--split {split}: train, val or all")
    folder, _, file = out_url.rpartition("/")
    if not file.endswith(".json"):
        raise ConfigError(f"{out_url}: name a .json file for a COCO export")
    store = Store(folder or ("/" if out_url.startswith("/") else "."))
    if store.exists(file):
        raise ConfigError(f"{out_url} is there already; remove it, or choose another name")
    columns = _columns(snapshot, modalities)
    report = ExportReport()
    with _placed(store, file) as stream:
        info = {"description": "fourmill", "snapshot": snapshot.digest, "split": split}
        stream.write(
            f'{{"info": {_line(info)}, "licenses": [],\n"categories": {_line(_categories(columns))},\n'
        )
        _write_list(
            stream, "images", (i for s in _shards(snapshot, columns, split, report) for i in s.images())
        )
        stream.write(",\n")
        again = _shards(snapshot, columns, split, ExportReport())
        _write_list(stream, "annotations", (a for s in again for a in s.annotations()))
        stream.write("}\n")
        if not report.rows:
            raise WorkMissing(f"{snapshot.dataset.url}: no row of split {split!r} is left to export")
    return report


def _columns(snapshot: Snapshot, modalities: Sequence[str] | None) -> list[_Column]:
    fitting = [n for n, m in snapshot.modalities.items() if m.contract.form in FORMS]
    names = chosen_modalities(snapshot, modalities, fitting)
    if not names:
        raise ConfigError(f"{snapshot.dataset.url} has no modality of boxes or object instances")
    found: list[_Column] = []
    for name in names:
        if name not in fitting:
            raise ConfigError(f"modality {name!r} holds no boxes or object instances; leave it out")
        contract = snapshot.modalities[name].contract
        label, kept = kept_labels(snapshot, name)
        lacking = [shard.index for shard in snapshot.shards if shard.index not in kept]
        if lacking:
            raise ConfigError(
                f"modality {name!r}: labels of {len(lacking)} shards were not kept; set modalities.{name}.keep_labels: "
                f"true and build, or leave {name} out"
            )
        classes = contract.classes if contract.form == "boxes" else ("instance",)
        found.append(_Column(name, label, classes, 1 + sum(len(column.classes) for column in found)))
    return found


def _categories(columns: Sequence[_Column]) -> list[dict[str, Any]]:
    return [
        {"id": column.first + number, "name": name, "supercategory": column.name}
        for column in columns
        for number, name in enumerate(column.classes)
    ]


# -- shards -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """The rows of one shard that are exported, with their labels by row and modality."""

    index: int
    samples: pa.Table
    rows: np.ndarray
    labels: Mapping[str, Mapping[int, Label]]
    columns: Sequence[_Column]

    def images(self) -> Iterator[dict[str, Any]]:
        for row in map(int, self.rows):
            width, height = size_of(self.samples, row)
            key = self.samples["key"][row].as_py()
            name = _file_name(key, self.samples["position"][row].as_py())
            yield {"id": self._id(row), "file_name": name, "width": width, "height": height, "key": key}

    def annotations(self) -> Iterator[dict[str, Any]]:
        for row in map(int, self.rows):
            image, number = self._id(row), 0
            size = size_of(self.samples, row)
            for column in self.columns:
                label = self.labels[column.name][row]
                for facts in () if isinstance(label, Absent) else _objects(label, column, size):
                    if number >> OBJECT_BITS:
                        raise DatasetError(
                            f"shard {self.index}, row {row}: more than {1 << OBJECT_BITS} objects"
                        )
                    yield {"id": (image << OBJECT_BITS) + number, "image_id": image, **facts}
                    number += 1

    def _id(self, row: int) -> int:
        return (self.index << ROW_BITS) + row + 1


def _shards(
    snapshot: Snapshot, columns: Sequence[_Column], split: str, report: ExportReport
) -> Iterator[_Shard]:
    """One at a time; rows without any of the labels are left out."""
    dataset = snapshot.dataset
    for shard, ref in enumerate(snapshot.shards):
        samples = dataset.table(ref.files["samples"])
        labels = {
            c.name: read_labels(
                dataset.store.read(dataset.receipt(c.name, c.recipe, ref.index).file),
                snapshot.modalities[c.name],
            )
            for c in columns
        }
        keep = np.array(samples["status"].to_pylist(), object) == OK
        report.leave_out("set aside", int((~keep).sum()))
        if split != "all":
            other = keep & (np.array(samples["split"].to_pylist(), object) != split)
            report.leave_out("of another split", int(other.sum()))
            keep &= ~other
        kept = snapshot.is_kept(shard)
        report.leave_out("not chosen, or dropped", int((keep & ~kept).sum()))
        keep &= kept
        known = [any(not isinstance(labels[c.name][row], Absent) for c in columns) for row in range(ref.rows)]
        there = np.array(known, bool)
        report.leave_out(f"without {' or '.join(c.name for c in columns)}", int((keep & ~there).sum()))
        rows = np.flatnonzero(keep & there)
        report.rows, report.shards = report.rows + len(rows), report.shards + bool(len(rows))
        yield _Shard(ref.index, samples, rows, labels, columns)


def _file_name(key: str, position: str) -> str:
    try:
        place = json.loads(position)
    except ValueError:
        place = {}
    file = place.get("file") if isinstance(place, dict) else None
    return file if isinstance(file, str) and file.rpartition(".")[0] == key else f"{key}.jpg"


def _objects(label: Boxes | Instances, column: _Column, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Without their ids."""
    corners = label.xyxy.astype(np.float64) * [*size, *size]
    for row, (left, top, right, bottom) in enumerate(corners.tolist()):
        bbox = [left, top, right - left, bottom - top]
        if isinstance(label, Boxes):
            yield {
                "category_id": column.first + int(label.class_ids[row]),
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
                "segmentation": [],
                "score": float(label.scores[row]),
            }
            continue
        outline = label.polygons[row] * size
        polygons = [outline.reshape(-1).tolist()] if len(outline) >= 3 else []
        area = _area(outline) if polygons else bbox[2] * bbox[3]
        yield {
            "category_id": column.first,
            "bbox": bbox,
            "area": area,
            "iscrowd": 0,
            "segmentation": polygons,
        }


def _area(outline: np.ndarray) -> float:
    """Of a polygon (K, 2), by the shoelace formula."""
    x, y = outline.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


# -- writing ------------------------------------------------------------------------------------------


@contextmanager
def _placed(store: Store, name: str) -> Iterator[IO[str]]:
    """An open text file that is put at its place as a whole when the block ends well."""
    folder = store.local_path("")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".fourmill-", dir=folder) as scratch:
        made = Path(scratch) / "file.json"
        with made.open("w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if folder is not None:
            os.replace(made, folder / name)
        else:
            store.fs.put_file(str(made), store.path(name))


def _write_list(stream: IO[str], name: str, items: Iterator[dict[str, Any]]) -> None:
    stream.write(f'"{name}": [')
    for number, item in enumerate(items):
        stream.write((",\n" if number else "\n") + _line(item))
    stream.write("]")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
