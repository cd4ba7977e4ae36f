"""Export: a snapshot as the tars that the published 4M code trains from.

    OUT/<modality>/shard-00000.tar      members NNNNNN_NNNNNN.<ending>, equal names and order in every folder
    OUT/crop_settings/shard-00000.tar   int64 .npy [n_crops, 5]: top, left, height, width, flip (original pixels)
    OUT/key/shard-00000.tar             the sample's own key, as .txt
    OUT/size/shard-00000.tar            [width, height] of the original image, as .json
    OUT/export.json                     what this is; "complete" once everything is there
    OUT/written/shard-000012.json       of the dataset's shard 12: which tar it became, its rows and the tars' hashes
    OUT/tokenizers/<modality>/<hash12>/ vocabularies of what is written as texts, so that it can be imported again

Tokens are int16 .npy [n_crops, n_tokens] (int32 where a vocabulary is larger than int16 holds), embeddings float16
.npy, everything else .json as `fourmill.shards.exchange` says. That code zips the tars row by row, so a row with a null in
any exported modality is left out of all of them, and counted. Shards are numbered without gaps; a shard without rows is not
written. What is exported can be imported: `fourmill.shards.import_webdataset`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.errors import ConfigError, DatasetError, WorkMissing, nearest
from fourmill.shards.arrow import Column
from fourmill.shards.dataset import modality_json
from fourmill.shards.export_cells import (
    Cell,
    Decode,
    Maker,
    crop_cells,
    is_exportable,
    key_cells,
    maker,
    size_cells,
)  # fmt: skip
from fourmill.shards.samples import OK
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tar import write_tar
from fourmill.storage import Store

MARKER, WRITTEN, TOKENIZERS = "export.json", "written", "tokenizers"
CROPS, KEY, SIZE = "crop_settings", "key", "size"
#: how its ``dataset`` calls them in an export.json: what an import makes the same samples and tokens with
IDENTITY = ("seed", "val_fraction")
PINNED = ("recipe", "tokenizer")


@dataclass
class ExportReport:
    """``left_out``: rows that were not written, by the first reason that applied. ``written``: shards of this call."""

    shards: int = 0
    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    written: int = 0

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
    grow: bool = False,
) -> ExportReport:
    """Write ``modalities`` (None: all of the snapshot that can be) of one split below ``out_url``.

    Labels that the published code tokenizes itself come from kept ones; where none were kept, ``decode[name]`` (the
    codec's) makes them from tokens, if that can be. Raises ConfigError for what cannot be exported and for a folder that
    holds something else. Run again after an interruption, it writes the same bytes.

    With ``grow`` it adds to an export of the same dataset and recipes: what was written of a shard as it is now is left alone,
    what is new gets the next numbers, and no rows at all are no error. Only one process may do so at a time.
    """
    known = snapshot.modalities
    names = chosen_modalities(snapshot, modalities, [n for n, m in known.items() if is_exportable(m)])
    makers = {name: maker(snapshot, name, decode or {}) for name in names}
    out = Store(out_url)
    facts = _facts(snapshot, names, split, grow)
    claim(out, facts)
    _put_tokenizers(snapshot, names, out)
    notes = written_shards(out) if grow else {}
    report = ExportReport()
    for shard, ref in enumerate(snapshot.shards):
        pinned = _pinned(snapshot, shard, names)
        note = notes.get(ref.index)
        if note is None or note["pinned"] != pinned:
            number = note["number"] if note else None
            free = sum(n["number"] is not None for n in notes.values())
            note = _write(snapshot, shard, makers, out, split, free if number is None else number, number)
            notes[ref.index] = note = {**note, "pinned": pinned}
            out.put(f"{WRITTEN}/shard-{ref.index:06d}.json", json.dumps(note, sort_keys=True).encode())
            report.written += note["number"] is not None
        report.shards += note["number"] is not None
        report.rows += note["rows"]
        for reason, rows in note["left_out"].items():
            report.leave_out(reason, rows)
    if not report.rows and not grow:
        raise WorkMissing(
            f"{snapshot.dataset.url}: no row of split {split!r} has all of {', '.join(names)}: {report.left_out}"
        )
    made_by = {name: snapshot.content["modalities"][name].get("provenance", []) for name in names}
    done = {"complete": True, "shards": report.shards, "rows": report.rows, "left_out": report.left_out}
    done |= {"licenses": snapshot.licenses(names), "provenance": made_by}
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


def _facts(snapshot: Snapshot, names: Sequence[str], split: str, grow: bool) -> dict[str, Any]:
    """What makes this export this one, and what an import must know. One that grows is of no single snapshot."""
    size, identity = str(snapshot.image_size), snapshot.dataset.identity
    references = {name: snapshot.modalities[name].reference_name.replace("{size}", size) for name in names}
    entries = snapshot.content["modalities"]
    facts = {
        "format": 1,
        "split": split,
        "modality_name_map": {name: reference or name for name, reference in references.items()},
        "modalities": {
            name: {**modality_json(snapshot.modalities[name]), **{k: entries[name].get(k) for k in PINNED}}
            for name in names
        },
        "dataset": {
            **{key: identity[key] for key in IDENTITY if key in identity},
            "digest": snapshot.dataset.digest,
            "image_size": snapshot.image_size,
            "n_crops": snapshot.n_crops,
        },
        **({"grows": True} if grow else {"snapshot": snapshot.digest}),
        "complete": False,
    }
    return dict(json.loads(json.dumps(facts)))  # as it is read back


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


def written_shards(out: Store) -> dict[int, dict[str, Any]]:
    """By the dataset's shard, what an export noted of it: "number" of its tars (None: no row was left), "rows", "tars"."""
    names = [f"{WRITTEN}/{name}" for name in out.names(WRITTEN)]
    found = {}
    for name, raw in zip(names, out.map(out.read, names), strict=True):
        try:
            note = dict(json.loads(raw))
            found[int(note["index"])] = note
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{out.url}/{name} is damaged ({error}); remove it") from error
    return found


def _pinned(snapshot: Snapshot, shard: int, names: Sequence[str]) -> dict[str, Any]:
    """What the tars of a shard are a function of."""
    ref = snapshot.content["shards"][shard]
    files = {name: ref["columns"][name]["sha256"] for name in ("samples", *names)}
    return {"files": files, "kept": snapshot.shards[shard].kept}


def _put_tokenizers(snapshot: Snapshot, names: Sequence[str], out: Store) -> None:
    for name in names:
        short = snapshot.tokenizer(name)
        if short is not None and snapshot.modalities[name].kind == "sequence":
            folder = snapshot.dataset.tokenizer_folder(name, short)
            for file in sorted(folder.iterdir()):
                out.put_if_absent(f"{TOKENIZERS}/{name}/{short}/{file.name}", file.read_bytes())


def _write(
    snapshot: Snapshot, shard: int, makers: Mapping[str, Maker], out: Store, split: str, number: int, had: int | None
) -> dict[str, Any]:  # fmt: skip
    """Write one shard's tars as ``number``; the note of it. ``had``: a number that it has already, and keeps without rows."""
    report = ExportReport()
    samples = snapshot.dataset.table(snapshot.shards[shard].files["samples"])
    columns = {name: snapshot.column(shard, name) for name in makers}
    rows = _rows(samples, columns, split, snapshot.is_kept(shard), report)
    index = snapshot.shards[shard].index
    note: dict[str, Any] = {"index": index, "rows": len(rows), "left_out": report.left_out}
    if not len(rows) and had is None:
        return {**note, "number": None, "tars": {}}
    stems = [f"{index:06d}_{row:06d}" for row in rows]
    cells = {name: make(shard, columns[name], samples, rows) for name, make in makers.items()}
    cells |= {
        CROPS: crop_cells(samples, rows),
        KEY: key_cells(samples, rows),
        SIZE: size_cells(samples, rows),
    }
    tars = {folder: _put(out, f"{folder}/{tar_name(number)}", stems, made) for folder, made in cells.items()}
    return {**note, "number": number, "tars": tars}


def tar_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


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


def _put(out: Store, name: str, stems: Sequence[str], cells: Iterator[Cell]) -> dict[str, Any]:
    members = ((f"{stem}.{ending}", data) for stem, (ending, data) in zip(stems, cells, strict=True))
    data = write_tar(members)
    out.put(name, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
