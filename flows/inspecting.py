"""`fourmill inspect`: says what a thing of fourmill's is, whichever it is, and what is in it.

A dataset, one sample of it, a shard file (.arrow or .tar), a receipt, recipe or snapshot (.json), a tokenizer's folder, a
training run. Names and captions are other people's text: they are shown, never interpreted.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from fourmill.errors import ConfigError, FourmillError
from fourmill.flows.inspecting_folders import describe_dataset, describe_model, describe_tokenizer, read_json
from fourmill.flows.inspecting_show import cells, fact_table, new_table, plain, short_text, title, token_text
from fourmill.flows.status import human_bytes
from fourmill.shards.arrow import Column, open_column, read_table
from fourmill.shards.dataset import Dataset
from fourmill.shards.receipts import Receipt, sha256
from fourmill.shards.samples import OK
from fourmill.shards.tar import Damage, scan_tar
from fourmill.storage import Store
from fourmill.tokenize.base import with_family

FIRST_ROWS = 5
Parts = list[Any]  # of rich renderables


def describe(target: str | Path, *, key: str | None = None, out: Path | str | None = None) -> Parts:
    """What ``target`` (a path or URL) is. With ``key``, everything of one sample of a dataset; ``out`` is a folder for its
    pictures. Raises ConfigError where there is nothing or nothing known, DatasetError or CheckpointError where it is damaged.
    """
    url = str(target).rstrip("/") or str(target)
    if out is not None and key is None:
        raise ConfigError("--out needs --key: pictures are written of one sample")
    if key is not None:
        from fourmill.flows.inspecting_sample import describe_sample

        return describe_sample(Dataset(url), key, Path(out) if out is not None else None)
    parent, _, name = url.rpartition("/")
    if name == "dataset.yaml":
        return describe_dataset(Dataset(parent or "."))
    if not Store(url).exists(""):
        raise ConfigError(f"{url}: there is nothing")
    for ending, describer in ((".arrow", _arrow), (".tar", _tar), (".json", _json)):
        if name.endswith(ending):
            return describer(Store(parent or ("/" if url.startswith("/") else ".")), name, url)
    return _folder(url)


def _folder(url: str) -> Parts:
    folder = Store(url)
    if folder.exists("dataset.yaml"):
        return describe_dataset(Dataset(url))
    if folder.exists("config.json") or folder.exists("checkpoints"):
        if not folder.is_local:
            raise ConfigError(
                f"{url}: tokenizers and models are read from this machine; copy the folder here"
            )
        config = read_json(folder.read("config.json"), url) if folder.exists("config.json") else {}
        config = with_family(dict(config))
        return describe_tokenizer(Path(url), config) if "family" in config else describe_model(Path(url))
    raise ConfigError(
        f"{url}: nothing that fourmill knows; give a dataset, a shard (.arrow, .tar), a receipt (.json), a tokenizer "
        "or a training run"
    )


def root_of(store: Store, levels: int) -> Dataset | None:
    """The dataset some levels above a folder, where there is one."""
    url = store.url
    for _ in range(levels):
        url = url.rpartition("/")[0] or "."
    return Dataset(url) if Store(url).exists("dataset.yaml") else None


# -- files --------------------------------------------------------------------------------------------


def _arrow(store: Store, name: str, url: str) -> Parts:
    local = store.local_path(name)
    table = read_table(str(local) if local else store.read(name), url)
    if "status" in table.schema.names:
        return _samples_file(table, url)
    if b"fourmill" not in (table.schema.metadata or {}):
        schema = fact_table({field.name: str(field.type) for field in table.schema})
        return [
            title("an Arrow file that is none of fourmill's"),
            fact_table({"file": url, "rows": table.num_rows}),
            schema,
        ]
    meta = json.loads(table.schema.metadata[b"fourmill"])
    column = open_column(table, url)
    reasons = Counter(str(r) for r in table.column("reason").to_pylist() if r is not None)
    types = {f"type of {field.name}": str(field.type) for field in table.schema}
    absent = {f"absent: {reason}": count for reason, count in reasons.most_common()}
    facts = {
        "file": url,
        **meta,
        **types,
        "rows": table.num_rows,
        "present": int(column.present.sum()),
        **absent,
    }
    return [
        title(f"a shard of {plain(meta['name'])} tokens"),
        fact_table(facts),
        _first_cells(store, meta, column),
    ]


def _first_cells(store: Store, meta: Mapping[str, Any], column: Column) -> Table:
    """The first rows: tokens, and what they stand for where the tokenizer is at hand."""
    codec = _codec_of(store, meta)
    table = new_table("row>", "tokens", "decoded")
    for row in range(min(FIRST_ROWS, len(column.present))):
        if not column.present[row]:
            table.add_row(*cells(row, "", f"absent: {column.reasons[row].as_py()}"))
            continue
        cell = column.cells(row)
        decoded = short_text(codec.modality, codec.decode([cell])[0]) if codec else ""
        table.add_row(*cells(row, token_text(cell), decoded))
    return table


def _codec_of(store: Store, meta: Mapping[str, Any]) -> Any:
    """The tokenizer of a column file inside a dataset; None elsewhere, and where the newest run has another one."""
    from fourmill.flows.report.view import View

    dataset = root_of(store, 2)
    if dataset is None:
        return None
    try:
        view = View.open(dataset.url, None, only=[meta["name"]])
    except FourmillError:
        return None  # the tokens are shown all the same
    same = str(meta.get("tokenizer", ""))[:12] == view.tokenizers.get(meta["name"])
    return view.codecs.get(meta["name"]) if same else None


def _samples_file(table: Any, url: str) -> Parts:
    states = Counter(table.column("status").to_pylist())
    splits = Counter(table.column("split").to_pylist())
    facts = {"file": url, "rows": table.num_rows, **{f"status: {k}": v for k, v in states.most_common()}}
    facts |= {f"split {name}": count for name, count in sorted(splits.items())}
    rows = new_table("row>", "key", "status", "split", "size", "captions")
    for row, one in enumerate(table.slice(0, FIRST_ROWS).to_pylist()):
        size = f"{one['width']} x {one['height']}" if one["status"] == OK else ""
        rows.add_row(
            *cells(row, one["key"], one["status"], one["split"], size, " | ".join(one["captions"])[:120])
        )
    return [title("a shard of samples"), fact_table(facts), rows]


def _tar(store: Store, name: str, url: str) -> Parts:
    data = store.read(name)
    endings: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    keys: dict[str, None] = {}
    shapes: dict[str, str] = {}
    damage = None
    for item in scan_tar(io.BytesIO(data), len(data)):
        if isinstance(item, Damage):
            damage = f"{item.reason}, at byte {item.at}"
            continue
        stem, _, ending = item.name.partition(".")
        endings[ending] += 1
        sizes[ending] += item.size
        keys.setdefault(stem)
        if ending not in shapes:
            shapes[ending] = _content_text(ending, data[item.offset : item.offset + item.size])
    table = new_table("ending", "members>", "bytes>", "the first one")
    for ending, count in endings.most_common():
        table.add_row(*cells(ending, count, sizes[ending], shapes[ending]))
    first = list(keys)[:FIRST_ROWS]
    facts = {"file": url, "samples": len(keys), "size": human_bytes(len(data)), "first": ", ".join(first)}
    if damage:
        facts["damaged"] = damage
    folder = re.search(r"/labels/([a-z0-9_]+)$", store.url)
    return [title(f"kept labels of {folder[1]}" if folder else "a WebDataset tar"), fact_table(facts), table]


def _content_text(ending: str, data: bytes) -> str:
    """dtype and shape of an array, size of a picture, the beginning of a text."""
    from PIL import Image, UnidentifiedImageError

    from fourmill.shards.tar import npy_array

    try:
        if ending.endswith("npy"):
            array = npy_array(data)
            return f"{array.dtype} {array.shape}"
        if ending in ("png", "jpg", "jpeg", "webp"):
            with Image.open(io.BytesIO(data)) as picture:
                return f"{picture.mode} {picture.width} x {picture.height}"
    except (ValueError, OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f"damaged: {error}"
    return data[:160].decode("utf-8", "replace")


def _json(store: Store, name: str, url: str) -> Parts:
    raw = store.read(name)
    content = read_json(raw, url)
    if {"column", "recipe", "digest"} <= content.keys():
        return _receipt(store, Receipt.from_json(raw, url), url)
    if {"shards", "modalities", "dataset"} <= content.keys():
        return _snapshot(content, sha256(raw) == name.removesuffix(".json"), url)
    if "kind" in content:
        sound = sha256(raw)[:12] == store.url.rsplit("/", 1)[-1]
        state = (
            "it hashes to the name of its folder"
            if sound
            else "damaged: it does not hash to its folder's name"
        )
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        return [
            title(f"a {plain(str(content['kind']))} recipe"),
            fact_table({"file": url, "digest": state}),
            Text(plain(text, "\n")),
        ]
    if content.keys() == {"error", "attempt"}:
        return [title("a parked shard"), fact_table({"file": url, **content})]
    raise ConfigError(f"{url}: JSON, but no receipt, recipe, snapshot or parked shard of fourmill's")


def _receipt(store: Store, receipt: Receipt, url: str) -> Parts:
    """Its own digest was checked on reading; the data file is checked too where the dataset is at hand."""
    facts: dict[str, Any] = {"file": url, "digest": "sound", "column": receipt.column, "shard": receipt.shard}
    facts |= {"rows": receipt.rows, "present": receipt.present}
    facts |= {f"absent: {reason}": count for reason, count in receipt.absent.items()}
    facts |= {"data": receipt.file, "size": human_bytes(receipt.bytes), "recipe": receipt.recipe}
    dataset = root_of(store, 3)
    if dataset is not None:
        data = dataset.store.read_if_exists(receipt.file)
        sound = data is not None and sha256(data) == receipt.sha256
        facts["data file"] = "sound" if sound else "missing" if data is None else "damaged: another sha256"
    for part in ("provenance", "environment", "timings", "source"):
        facts |= {f"{part}: {key}": value for key, value in getattr(receipt, part).items()}
    return [title("a receipt"), fact_table(facts)]


def _snapshot(content: Mapping[str, Any], sound: bool, url: str) -> Parts:
    rows = sum(shard["rows"] for shard in content["shards"])
    state = "it hashes to its name" if sound else "damaged: it does not hash to its name"
    facts = {"file": url, "digest": state, "shards": len(content["shards"]), "rows": rows}
    facts |= {"image_size": content.get("image_size"), "n_crops": content.get("n_crops")}
    table = new_table("modality", "kind", "codec", "vocabulary>", "tokens>", "recipe", "tokenizer")
    for name, one in content["modalities"].items():
        shown = [one.get(k, "") for k in ("kind", "codec", "vocab_size", "num_tokens", "recipe", "tokenizer")]
        table.add_row(*cells(name, *shown))
    return [title("a snapshot"), fact_table(facts), table]
