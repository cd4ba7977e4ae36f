"""Export: a snapshot as the tars that the published 4M code trains from.

    OUT/<modality>/shard-00000.tar      members NNNNNN_NNNNNN.<ending>, equal names and order in every folder
    OUT/crop_settings/shard-00000.tar   int64 .npy [n_crops, 5]: top, left, height, width, flip (original pixels)
    OUT/key/shard-00000.tar             the sample's own key, as .txt
    OUT/export.json                     what this is; "complete" once everything is there

Tokens are int16 .npy [n_crops, n_tokens] (int32 where a vocabulary is larger than int16 holds), embeddings float16
.npy, captions a .json list of strings, boxes .json {"instances": [{"boxes", "class_name", "score"}]} in the frame of
the whole image, scalars .json. That code zips the tars row by row, so a row with a null in any exported modality is
left out of all of them, and counted. Shards are numbered without gaps; a shard without rows is not written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.errors import ConfigError, DatasetError, WorkMissing, nearest
from fourmill.labels import Absent, Boxes, Label
from fourmill.modality import CAPTION, Modality
from fourmill.shards.arrow import Column
from fourmill.shards.receipts import Recipe
from fourmill.shards.samples import OK
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tar import npy_bytes, read_labels, write_tar
from fourmill.storage import Store

MARKER = "export.json"

Decode = Callable[[Sequence[np.ndarray]], Sequence[Label]]
Cell = tuple[str, bytes]  # file ending and content


@dataclass
class ExportReport:
    """``left_out``: rows that were not written, by the first reason that applied."""

    shards: int = 0
    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str, rows: int) -> None:
        if rows:
            self.left_out[reason] = self.left_out.get(reason, 0) + rows


def export_webdataset(
    snapshot: Snapshot,
    out_url: str,
    modalities: Sequence[str] | None = None,
    *,
    split: str = "train",
    decode: Mapping[str, Decode] | None = None,
) -> ExportReport:
    """Write ``modalities`` (None: all of the snapshot but pixels) of one split below ``out_url``.

    Boxes come from kept labels; where none were kept and there is one crop, ``decode[name]`` (the codec's) makes them
    from tokens. Raises ConfigError for what cannot be exported and for a folder that holds something else. Run
    again after an interruption, it writes the same bytes.
    """
    known = snapshot.modalities
    names = chosen_modalities(snapshot, modalities, [n for n, m in known.items() if m.kind != "pixels"])
    makers = {name: _maker(snapshot, name, decode or {}) for name in names}
    out = Store(out_url)
    facts = _facts(snapshot, names, split)
    claim(out, facts)
    report = ExportReport()
    for shard in range(len(snapshot.shards)):
        samples = snapshot.dataset.table(snapshot.shards[shard].files["samples"])
        columns = {name: snapshot.column(shard, name) for name in names}
        rows = _rows(samples, columns, split, snapshot.is_kept(shard), report)
        if not len(rows):
            continue
        index = snapshot.shards[shard].index
        stems = [f"{index:06d}_{row:06d}" for row in rows]
        for name in names:
            _put(out, name, report.shards, stems, makers[name](shard, columns[name], samples, rows))
        _put(out, "crop_settings", report.shards, stems, _crop_cells(samples, rows))
        keys = samples["key"].to_pylist()
        _put(out, "key", report.shards, stems, (("txt", keys[row].encode()) for row in rows))
        report.shards += 1
        report.rows += len(rows)
    if not report.rows:
        raise WorkMissing(
            f"{snapshot.dataset.url}: no row of split {split!r} has all of {', '.join(names)}: {report.left_out}"
        )
    done = {"complete": True, "shards": report.shards, "rows": report.rows, "left_out": report.left_out}
    out.put(MARKER, json.dumps(facts | done, indent=1, sort_keys=True).encode())
    return report


def chosen_modalities(
    snapshot: Snapshot, modalities: Sequence[str] | None, default: Iterable[str]
) -> list[str]:
    """What is to be exported: those that were named, or the default ones."""
    known = snapshot.modalities
    if modalities is None:
        return list(default)
    for name in modalities:
        if name not in known:
            raise ConfigError(
                f"modality {name!r} is not in snapshot {snapshot.digest[:12]}{nearest(name, known)}"
            )
    if not modalities:
        raise ConfigError("name at least one modality to export")
    return sorted(set(modalities))


def _facts(snapshot: Snapshot, names: Sequence[str], split: str) -> dict[str, Any]:
    size = str(snapshot.image_size)
    references = {name: snapshot.modalities[name].reference_name.replace("{size}", size) for name in names}
    return {
        "format": 1,
        "snapshot": snapshot.digest,
        "split": split,
        "modality_name_map": {name: reference or name for name, reference in references.items()},
        "complete": False,
    }


def claim(out: Store, facts: Mapping[str, Any]) -> None:
    """Only an empty folder, or one in which this very export was begun."""
    if out.names(""):
        raw = out.read_if_exists(MARKER)
        begun = json.loads(raw) if raw else {}
        if not isinstance(begun, dict) or any(begun.get(k) != v for k, v in facts.items() if k != "complete"):
            raise ConfigError(
                f"{out.url} is not empty and holds no export like this one; choose another folder"
            )
    out.put(MARKER, json.dumps(facts, indent=1, sort_keys=True).encode())


def _rows(
    samples: pa.Table, columns: Mapping[str, Column], split: str, kept: np.ndarray, report: ExportReport
) -> np.ndarray:
    """The rows that are exported, in order. ``kept``: those that the snapshot's conditions chose and nobody dropped."""
    status = np.array(samples["status"].to_pylist(), dtype=object)
    keep = status == OK
    report.leave_out("set aside", int((~keep).sum()))
    other = keep & (np.array(samples["split"].to_pylist(), dtype=object) != split)
    report.leave_out("of another split", int(other.sum()))
    keep &= ~other
    report.leave_out("not chosen, or dropped", int((keep & ~kept).sum()))
    keep &= kept
    for name, column in columns.items():
        report.leave_out(f"without {name}", int((keep & ~column.present).sum()))
        keep &= column.present
    return np.flatnonzero(keep)


def _put(out: Store, folder: str, shard: int, stems: Sequence[str], cells: Iterator[Cell]) -> None:
    members = ((f"{stem}.{ending}", data) for stem, (ending, data) in zip(stems, cells, strict=True))
    out.put(f"{folder}/shard-{shard:05d}.tar", write_tar(members))


# -- cells by modality --------------------------------------------------------------------------------

Maker = Callable[[int, Column, pa.Table, np.ndarray], Iterator[Cell]]


def _maker(snapshot: Snapshot, name: str, decode: Mapping[str, Decode]) -> Maker:
    """What makes the cells of one modality, or ConfigError where that can't be done."""
    modality = snapshot.modalities[name]
    if modality.kind in ("grid", "vector", "embedding"):
        return lambda shard, column, samples, rows: _array_cells(column, rows, modality)
    if modality.kind == "scalar":
        return lambda shard, column, samples, rows: (_json(float(column.cells(row)[0])) for row in rows)
    if name == CAPTION.name:
        return lambda shard, column, samples, rows: (_json(samples["captions"][row].as_py()) for row in rows)
    if modality.contract.form == "boxes":
        return _box_maker(snapshot, name, decode.get(name))
    raise ConfigError(
        f"modality {name!r} ({modality.kind} of {modality.contract.form}) has no place in the exported layout: that code "
        "crops pixels from the original images and tokenizes texts itself; leave it out"
    )


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


def _crop_cells(samples: pa.Table, rows: np.ndarray) -> Iterator[Cell]:
    for row in rows:
        yield "npy", npy_bytes(np.array(samples["crops"][row].as_py(), np.int64).reshape(-1, 5))


def _json(value: Any) -> Cell:
    return "json", json.dumps(value, ensure_ascii=False).encode()


def _box_maker(snapshot: Snapshot, name: str, decode: Decode | None) -> Maker:
    modality, dataset = snapshot.modalities[name], snapshot.dataset
    recipe = dataset.recipe(name, snapshot.content["modalities"][name]["recipe"])
    label = Recipe("label", recipe["label"]).short if "label" in recipe else ""
    kept = dataset.finished(name, label) if label else set()
    lacking = [shard.index for shard in snapshot.shards if shard.index not in kept]
    if lacking and (decode is None or snapshot.n_crops != 1):
        raise ConfigError(
            f"modality {name!r}: labels of {len(lacking)} shards were not kept, and boxes of whole images can't be made "
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
            found = [_in_image(boxes, samples, int(row)) for boxes, row in zip(decoded, rows, strict=True)]
        for boxes, row in zip(found, rows, strict=True):
            if isinstance(boxes, Absent):
                raise DatasetError(
                    f"{name!r}, shard {index}, row {row}: has tokens, but its kept label is absent"
                )
            yield _json({"instances": list(_instances(boxes, modality.contract.classes))})

    return make


def _instances(boxes: Boxes, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    for xyxy, class_id, score in zip(
        boxes.xyxy.tolist(), boxes.class_ids.tolist(), boxes.scores.tolist(), strict=True
    ):
        yield {"boxes": xyxy, "class_name": classes[class_id] if classes else str(class_id), "score": score}


def _in_image(boxes: Boxes, samples: pa.Table, row: int) -> Boxes:
    """Boxes of crop 0 (never flipped), as boxes of the image."""
    top, left, height, width, _ = samples["crops"][row].as_py()[:5]
    image = np.array([samples["width"][row].as_py(), samples["height"][row].as_py()] * 2, np.float64)
    xyxy = boxes.xyxy.astype(np.float64) * [width, height, width, height] + [left, top, left, top]
    return Boxes((xyxy / image).astype(np.float32), boxes.class_ids, boxes.scores)
