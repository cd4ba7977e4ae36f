"""What folders hold: a dataset, a tokenizer, a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from fourmill.checkpoints import folder_hash
from fourmill.errors import CheckpointError, DatasetError
from fourmill.flows.inspecting_show import cells, fact_table, new_table, plain, title
from fourmill.flows.status import human_bytes
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import canonical, sha256
from fourmill.tokenize.base import with_family

RUNS_SHOWN = 5
Parts = list[Any]  # of rich renderables


def describe_dataset(dataset: Dataset) -> Parts:
    """Identity, columns by recipe, tokenizers, snapshots and runs. Reads listings and small files alone."""
    columns = new_table("column", "kind", "recipe", "shards>", "wanted")
    wanted = _wanted_recipes(dataset)
    for column in dataset.columns():
        for short in dataset.recipes(column):
            kind = _kind_of(dataset, column, short)
            mark = "yes" if short in wanted.get(column, ()) or column == SAMPLES else ""
            columns.add_row(*cells(column, kind, short, len(dataset.finished(column, short)), mark))
    tokenizers = new_table("tokenizer", "hash", "family", "vocabulary>", "tokens>")
    for name in dataset.store.names("tokenizers"):
        for short in dataset.tokenizers(name):
            raw = dataset.store.read_if_exists(f"tokenizers/{name}/{short}/config.json")
            config = (
                read_json(raw, f"tokenizers/{name}/{short}") if raw else {"family": "damaged: no config.json"}
            )
            config = with_family({"vocab_size": config.get("codebook_size", ""), **config})
            found = [config.get(k, "") for k in ("family", "vocab_size", "num_tokens")]
            tokenizers.add_row(*cells(name, short, *found))
    snapshots = new_table("snapshot", "rows>", "shards>", "modalities")
    for file in dataset.store.names("snapshots"):
        content = read_json(dataset.store.read(f"snapshots/{file}"), file)
        rows = sum(shard["rows"] for shard in content["shards"])
        snapshots.add_row(*cells(file[:12], rows, len(content["shards"]), ", ".join(content["modalities"])))
    runs = new_table("run", "fourmill", "modalities", "shards>")
    for file in dataset.store.names("runs")[-RUNS_SHOWN:]:
        run = yaml.safe_load(dataset.store.read(f"runs/{file}"))
        asked = ", ".join(run["recipes"])  # of an import there is no configuration
        runs.add_row(*cells(file.removesuffix(".yaml"), run["fourmill"], asked, len(run["shards"])))
    head = fact_table({"dataset": dataset.url, **dataset.identity, "digest": dataset.digest[:12]})
    return [title("a dataset"), head, *(t for t in (columns, tokenizers, snapshots, runs) if t.row_count)]


def _wanted_recipes(dataset: Dataset) -> dict[str, set[str]]:
    """Short hashes that the newest run asked for, by column: of tokens, and of the labels behind them."""
    names = dataset.store.names("runs")
    if not names:
        return {}
    recipes = yaml.safe_load(dataset.store.read(f"runs/{names[-1]}"))["recipes"]
    out: dict[str, set[str]] = {}
    for name, content in recipes.items():
        if content:
            hashes = {sha256(canonical(content))[:12]}
            if "label" in content:
                hashes.add(sha256(canonical({"kind": "label", **content["label"]}))[:12])
            out[name] = hashes
    return out


def _kind_of(dataset: Dataset, column: str, short: str) -> str:
    try:
        return str(dataset.recipe(column, short)["kind"])
    except (DatasetError, KeyError):
        return "damaged"


def describe_tokenizer(folder: Path, config: Mapping[str, Any]) -> Parts:
    facts = {"folder": folder, "hash": folder_hash(str(folder.resolve()))[:12]}
    facts |= {
        f"file {path.name}": human_bytes(path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    parts: Parts = [
        title(f"a tokenizer of {plain(str(config.get('modality', '4M')))}"),
        fact_table(facts),
        fact_table(config),
    ]
    card = folder / "card.yaml"
    if card.is_file():
        parts += [title("its card"), Text(plain(card.read_text(errors="replace"), "\n"))]
    return parts


def describe_model(folder: Path) -> Parts:
    from safetensors import SafetensorError, safe_open

    from fourmill.train.checkpoint import newest, read_state
    from fourmill.train.presets import ModelConfig

    at = folder if (folder / "config.json").is_file() else newest(folder)
    if at is None:
        raise CheckpointError(f"{folder} holds no complete checkpoint; has the run reached its first one?")
    config = ModelConfig.from_json((at / "config.json").read_text(), str(at / "config.json"))
    try:
        with safe_open(at / "model.safetensors", "np") as tensors:
            count = sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{at}/model.safetensors cannot be read: {error}") from error
    facts: dict[str, Any] = {
        "folder": folder,
        "checkpoint": at.name,
        "weights": f"{count:,}",
        "dim": config.dim,
    }
    facts |= {"encoder blocks": config.encoder_depth, "decoder blocks": config.decoder_depth}
    parts: Parts = [title("a model"), fact_table(facts)]
    table = new_table("modality", "kind", "vocabulary>", "tokens>", "input", "target")
    for one in config.modalities:
        flags = ["yes" if flag else "" for flag in (one.is_input, one.is_target)]
        table.add_row(*cells(one.name, one.kind, one.vocab_size, one.num_tokens, *flags))
    parts.append(table)
    if (at / "state.json").is_file():
        state = read_state(at)  # checks every file of the checkpoint
        run = {"step": state.step, "snapshot": state.snapshot[:12], "files": "sound", **state.versions}
        parts += [title("its training"), fact_table({**run, **state.config})]
    return [*parts, *_last_record(at)]


def _last_record(checkpoint: Path) -> Parts:
    from fourmill.flows.report.facts import read_records

    records = read_records(
        next(
            (
                p / "metrics.jsonl"
                for p in (checkpoint, *checkpoint.parents[:2])
                if (p / "metrics.jsonl").is_file()
            ),
            None,
        )
    )
    if not records:
        return []
    table = new_table("loss of", "train>", "held out>")
    held: dict[str, float] = next((r["val_losses"] for r in reversed(records) if "val_losses" in r), {})
    for name, value in records[-1]["losses"].items():
        table.add_row(*cells(name, f"{value:.3f}", f"{held[name]:.3f}" if name in held else ""))
    return [table]


def read_json(raw: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise DatasetError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{where}: expected a JSON object, found {type(content).__name__}")
    return content
