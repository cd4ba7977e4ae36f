"""Export: a snapshot as Parquet with a dataset card, which `datasets.load_dataset(folder)` opens.

    OUT/README.md                               the card: splits, columns, tokenizers, licences, the snapshot's digest
    OUT/data/train-00000-of-00012.parquet       a file per shard and split
    OUT/data/validation-00000-of-00012.parquet

One row per readable sample that the snapshot chose. ``key``, ``captions``, ``width``, ``height``, ``crops`` (by crop: top, left,
height, width, flip in pixels of the original) and one column per modality: by crop a list of token ids uint16 (grid, vector,
sequence), bytes (pixels) or float32 (embedding); scalars float32. What has no value is null.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Template

from fourmill.errors import ConfigError, WorkMissing
from fourmill.modality import Modality
from fourmill.shards.dataset import SAMPLES
from fourmill.shards.export import MARKER, ExportReport, chosen_modalities, claim
from fourmill.shards.snapshot import Snapshot
from fourmill.storage import Store

CARD = "README.md"
#: split of the dataset -> name that the hub's tools know
SPLITS: Mapping[str, str] = {"train": "train", "val": "validation"}
LICENSE_IDS = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "CC-BY-4.0": "cc-by-4.0",
    "CC-BY-NC-4.0": "cc-by-nc-4.0",
}


def export_parquet(
    snapshot: Snapshot, out_url: str, modalities: Sequence[str] | None = None, *, split: str = "all"
) -> ExportReport:
    """Write ``modalities`` (None: all of the snapshot) of one split, or of ``all``, below ``out_url``.

    Raises ConfigError for a folder that holds something else, WorkMissing where no row is left. The same snapshot
    gives the same bytes.
    """
    names = chosen_modalities(snapshot, modalities, snapshot.modalities)
    splits = list(SPLITS) if split == "all" else [split]
    if not set(splits) <= set(SPLITS):
        raise ConfigError(f"--split {split}: train, val or all")
    out = Store(out_url)
    facts = {"format": 1, "kind": "parquet", "snapshot": snapshot.digest, "split": split, "modalities": names}
    claim(out, {**facts, "complete": False})
    report = ExportReport()
    rows = {name: 0 for name in splits}
    for name in splits:
        masks = [
            snapshot.is_train(s) if name == "train" else snapshot.is_val(s)
            for s in range(len(snapshot.shards))
        ]
        there = [shard for shard, mask in enumerate(masks) if mask.any()]
        for number, shard in enumerate(there):
            table = _table(snapshot, shard, np.flatnonzero(masks[shard]), names)
            file = f"data/{SPLITS[name]}-{number:05d}-of-{len(there):05d}.parquet"
            out.put(file, _bytes(table))
            report.shards, report.rows = report.shards + 1, report.rows + table.num_rows
            rows[name] += table.num_rows
    if not report.rows:
        raise WorkMissing(f"{snapshot.dataset.url}: no row of split {split!r} is left to export")
    kept = [snapshot.is_train(s) | snapshot.is_val(s) for s in range(len(snapshot.shards))]
    report.leave_out(
        "set aside, not chosen, or dropped", snapshot.rows - sum(int(mask.sum()) for mask in kept)
    )
    report.leave_out("of another split", sum(int(mask.sum()) for mask in kept) - report.rows)
    out.put(CARD, card(snapshot, names, rows).encode())
    out.put(MARKER, json.dumps({**facts, "complete": True, "rows": rows}, indent=1, sort_keys=True).encode())
    return report


def _table(snapshot: Snapshot, shard: int, rows: np.ndarray, names: Sequence[str]) -> pa.Table:
    samples = snapshot.dataset.table(snapshot.shards[shard].files[SAMPLES]).take(pa.array(rows))
    arrays: dict[str, Any] = {
        name: samples[name].combine_chunks() for name in ("key", "captions", "width", "height")
    }
    flat = (
        samples["crops"]
        .combine_chunks()
        .flatten()
        .to_numpy(zero_copy_only=False)
        .astype(np.int32)
        .reshape(-1, 5)
    )
    arrays["crops"] = _by_crop(
        pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), 5), len(rows), snapshot.n_crops
    )
    for name in names:
        arrays[name] = _column(snapshot, shard, rows, snapshot.modalities[name])
    return pa.table(arrays)


def _column(snapshot: Snapshot, shard: int, rows: np.ndarray, modality: Modality) -> pa.Array:
    table = snapshot.dataset.table(snapshot.shards[shard].files[modality.name]).combine_chunks()
    value = table.column("value").combine_chunks().take(pa.array(rows))
    if modality.kind in ("scalar", "sequence", "pixels"):
        return value
    width = value.type.list_size // snapshot.n_crops
    absent = np.asarray(value.is_null())
    numbers = value.fill_null(pa.scalar([0] * value.type.list_size, value.type)).flatten()
    if modality.kind == "embedding":
        numbers = numbers.cast(pa.float32())
    cells = pa.FixedSizeListArray.from_arrays(numbers, width)
    return _by_crop(cells.cast(pa.list_(numbers.type)), len(rows), snapshot.n_crops, absent)


def _by_crop(cells: pa.Array, rows: int, n_crops: int, absent: np.ndarray | None = None) -> pa.Array:
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * n_crops)
    return pa.ListArray.from_arrays(offsets, cells, mask=None if absent is None else pa.array(absent))


def _bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()


# -- the card -----------------------------------------------------------------------------------------


_CARD = Template(
    """---
license: {{ license }}
configs:
- config_name: default
  data_files:
{%- for split in splits %}
  - split: {{ split }}
    path: data/{{ split }}-*.parquet
{%- endfor %}
---

# A multimodal token dataset

{{ total }} samples; made with fourmill, snapshot `{{ digest }}`.
{%- if where %} Rows were chosen by {{ where | join(" and ") }}.{% endif %}

| column | what | kind | vocabulary | tokens per crop | tokenizer | made by | licences |
|---|---|---|---|---|---|---|---|
{%- for row in rows %}
| {{ row | join(" | ") }} |
{%- endfor %}

Columns of tokens are lists by crop ({{ n_crops }} each) of ids; what could not be made is null. `crops` gives top, left, height,
width and flip of each crop in pixels of the original.
"""
)


def card(snapshot: Snapshot, names: Sequence[str], rows: Mapping[str, int]) -> str:
    """A dataset card as the hub reads it: YAML between dashes, then text. ``rows``: by split of the dataset."""
    known = {LICENSE_IDS.get(license, "other") for license in snapshot.licenses(names)}
    return _CARD.render(
        license=known.pop() if len(known) == 1 else "other",
        splits=[SPLITS[split] for split, count in rows.items() if count],
        total=sum(rows.values()),
        digest=snapshot.digest,
        where=[f"`{text}`" for text in snapshot.where],
        rows=[[_cell(cell) for cell in _facts(snapshot, name)] for name in names],
        n_crops=snapshot.n_crops,
    )


def _facts(snapshot: Snapshot, name: str) -> list[Any]:
    """A row of the card's table."""
    modality = snapshot.modalities[name]
    ways = snapshot.content["modalities"][name].get("provenance", [])
    made_by = "; ".join(str(way.get("model") or way.get("labeler") or "") for way in ways) or "the source"
    sizes = [modality.vocab_size or "", modality.num_tokens or "", snapshot.tokenizer(name) or ""]
    licenses = ", ".join(snapshot.licenses([name]))
    return [f"`{name}`", modality.doc, modality.kind, *sizes, made_by, licenses]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
