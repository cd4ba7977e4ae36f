"""Whether a dataset's files are what their receipts say, byte by byte and value by value.

Everything here is named by a hash, carries one, or is named by a receipt that does: flipping any byte of any file is found. What
is damaged is reported per file, with what must be set aside for the next build to make it again (`fourmill.shards.repair`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.errors import DatasetError
from fourmill.shards.arrow import Column, open_column, read_table
from fourmill.shards.dataset import SAMPLES, Dataset, absent_counts, check_keys
from fourmill.shards.receipts import SHORT, Receipt, receipt_name, sha256, shard_and_epoch
from fourmill.shards.tar import label_keys
from fourmill.shards.tokenizer_files import check_tokenizer

THREADS = 8
#: notes of runs, of parked shards and of take-downs: a name that holds the hash of the content
_NOTE = re.compile(rf"(?:runs/[^/]*-|parked/.*\.|tombstones/)(?P<hash>[0-9a-f]{{{SHORT}}})\.(?:yaml|json)")
OnChecked = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class Problem:
    """``file``: what is wrong; ``aside``: what a repair moves away, so that the next build makes it again."""

    file: str
    what: str
    column: str = ""
    shard: int | None = None
    aside: tuple[str, ...] = ()
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Committed:
    """A receipt and where it lies."""

    name: str
    short: str
    receipt: Receipt


@dataclass
class Verification:
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify(dataset: Dataset, on_checked: OnChecked = lambda done, total: None) -> Verification:
    """Read every file once. Whatever a build that is running at the same time has not committed is not looked at."""
    result = Verification()
    committed, recipes, problems = _receipts(dataset)
    result.problems += problems
    result.problems += _tokenizers(dataset)
    samples = {c.receipt.shard: c.receipt for c in committed if c.receipt.column == SAMPLES}
    total = sum(one.receipt.bytes for one in committed)

    def check(one: Committed) -> tuple[Committed, Problem | None]:
        recipe = recipes.get((one.receipt.column, one.short))
        return one, _data_file(dataset, one, samples.get(one.receipt.shard), recipe)

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for one, problem in pool.map(check, committed):
            result.files, result.bytes = result.files + 1, result.bytes + one.receipt.bytes
            if problem is not None:
                result.problems.append(problem)
            on_checked(result.bytes, total)
    result.problems += _snapshots(dataset, committed)
    result.problems += _notes(dataset)
    return result


# -- receipts -----------------------------------------------------------------------------------------


#: (column, short hash) -> content
Recipes = dict[tuple[str, str], dict[str, Any]]


def _receipts(dataset: Dataset) -> tuple[list[Committed], Recipes, list[Problem]]:
    """Every receipt of every column, recipe and epoch, from storage and not from any cache; and the recipes that are whole."""
    found: list[Committed] = []
    recipes: Recipes = {}
    problems: list[Problem] = []
    for column in dataset.columns():
        for short in dataset.store.names(f"receipts/{column}"):
            folder = f"receipts/{column}/{short}"
            names = [name for name in dataset.store.names(folder) if shard_and_epoch(name)]
            if names:
                recipe = _recipe(dataset, column, short)
                if isinstance(recipe, Problem):
                    problems.append(recipe)
                else:
                    recipes[column, short] = recipe
            for name, receipt in zip(names, _read_all(dataset, folder, names), strict=True):
                path = f"{folder}/{name}"
                if isinstance(receipt, Receipt):
                    found.append(Committed(path, short, receipt))
                else:
                    shard = shard_and_epoch(name)
                    problems.append(Problem(path, receipt, column, shard[0] if shard else None, (path,)))
    return found, recipes, problems


def _read_all(dataset: Dataset, folder: str, names: Sequence[str]) -> list[Receipt | str]:
    return dataset.store.map(lambda name: _read(dataset, folder, name), names)


def _read(dataset: Dataset, folder: str, name: str) -> Receipt | str:
    try:
        receipt = Receipt.from_json(dataset.store.read(f"{folder}/{name}"), f"{dataset.url}/{folder}/{name}")
    except DatasetError:
        return "is damaged: it does not hash to the digest that it carries"
    _, column, short = folder.split("/")
    expected = receipt_name(column, short, receipt.shard, receipt.epoch)
    if receipt.column != column or receipt.recipe[: len(short)] != short or expected != f"{folder}/{name}":
        return f"lies in the wrong place: it is of {receipt.column} shard {receipt.shard}"
    if receipt.dataset != dataset.digest:
        return "is of another dataset, or dataset.yaml was changed"
    return receipt


def _recipe(dataset: Dataset, column: str, short: str) -> dict[str, Any] | Problem:
    name = f"receipts/{column}/{short}/recipe.json"
    raw = dataset.store.read_if_exists(name)
    if raw is not None and sha256(raw)[: len(short)] == short:
        return dict(json.loads(raw))
    what = "is missing" if raw is None else "is damaged: it does not hash to the name of its folder"
    return Problem(
        name,
        what,
        column,
        None,
        (name,),
        "the next build whose configuration asks for this recipe writes it again",
    )


# -- data files ---------------------------------------------------------------------------------------


def _data_file(
    dataset: Dataset, one: Committed, samples: Receipt | None, recipe: Mapping[str, Any] | None
) -> Problem | None:
    receipt = one.receipt
    try:
        wrong = _wrong(dataset, receipt, samples, recipe)
    except (DatasetError, pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        wrong = " ".join(str(error).split())[:300] or type(error).__name__
    if wrong is None:
        return None
    return Problem(receipt.file, wrong, receipt.column, receipt.shard, (receipt.file, one.name))


def _wrong(
    dataset: Dataset, receipt: Receipt, samples: Receipt | None, recipe: Mapping[str, Any] | None
) -> str | None:
    data = dataset.store.read_if_exists(receipt.file)
    if data is None:
        return "is missing"
    if len(data) != receipt.bytes or sha256(data) != receipt.sha256:
        return (
            f"is damaged: {len(data)} bytes that do not hash to what its receipt says ({receipt.bytes} bytes)"
        )
    # where the samples are damaged, that is said of them
    aligned = samples is None or (samples.keys, samples.rows) == (receipt.keys, receipt.rows)
    if receipt.column != SAMPLES and not aligned:
        return "is not of the rows that its shard's samples hold"
    if receipt.file.endswith(".tar"):
        return (
            None
            if sorted(label_keys(data)) == list(range(receipt.rows))
            else "does not hold one label per row"
        )
    table = read_table(data, receipt.file)
    if table.num_rows != receipt.rows:
        return f"has {table.num_rows} rows, its receipt says {receipt.rows}"
    if receipt.column == SAMPLES:
        check_keys(table, receipt)
        reasons = [None if status == "ok" else status for status in table.column("status").to_pylist()]
        return _wrong_absences(receipt, reasons)
    return _wrong_values(receipt, table, recipe)


def _wrong_absences(receipt: Receipt, reasons: Sequence[str | None]) -> str | None:
    if absent_counts(reasons) != receipt.absent:
        return "has other absent rows than its receipt says"
    present = np.array([reason is None for reason in reasons], bool)
    return (
        None
        if np.array_equal(present, receipt.presence_mask())
        else "has other rows present than its receipt says"
    )


def _wrong_values(receipt: Receipt, table: pa.Table, recipe: Mapping[str, Any] | None) -> str | None:
    """``recipe``: None where it is damaged, which is said of it and not of the files that were made under it."""
    column, meta = open_column(table, receipt.file), column_metadata(table)
    wrong = _wrong_absences(receipt, column.reasons.to_pylist())
    if wrong is not None:
        return wrong
    if meta.get("recipe") != receipt.recipe:
        return "names another recipe than its receipt"
    if recipe is not None and meta.get("tokenizer", "") != (recipe.get("tokenizer") or ""):
        return "names another tokenizer than its recipe"
    return _out_of_range(column, meta)


def _out_of_range(column: Column, meta: dict[str, Any]) -> str | None:
    values = column.tokens if column.tokens is not None else column.flat
    if values is None or not values.size:
        return None
    if np.issubdtype(values.dtype, np.floating):
        return None if np.isfinite(values).all() else "holds values that are not finite"
    vocabulary = int(meta.get("vocab_size", 0))
    largest = int(values.max())
    return (
        None if largest < vocabulary else f"holds the token {largest}, beyond its vocabulary of {vocabulary}"
    )


def column_metadata(table: pa.Table) -> dict[str, Any]:
    """What `column_table` wrote beside the values."""
    return dict(json.loads(table.schema.metadata[b"fourmill"]))


# -- everything else ----------------------------------------------------------------------------------


def _tokenizers(dataset: Dataset) -> Iterator[Problem]:
    advice = "copy the folder back from where it was fitted or fetched; without it nothing can be decoded"
    for modality in dataset.store.names("tokenizers"):
        for short in dataset.tokenizers(modality):
            for file, what in check_tokenizer(dataset.store, f"tokenizers/{modality}/{short}", short):
                yield Problem(file, what, modality, None, (), advice)


def _snapshots(dataset: Dataset, committed: Sequence[Committed]) -> Iterator[Problem]:
    """A snapshot is damaged, or pins a file that is no longer there: one that was repaired may hash otherwise now."""
    now = {(c.receipt.column, c.short, c.receipt.shard): c.receipt.file for c in committed}
    there = set(dataset.store.walk("samples")) | set(dataset.store.walk("tokens"))
    for name in dataset.store.names("snapshots"):
        raw = dataset.store.read(f"snapshots/{name}")
        if sha256(raw) != name.removesuffix(".json"):
            yield Problem(
                f"snapshots/{name}", "is damaged: it does not hash to its name", aside=(f"snapshots/{name}",),
                advice="restore it from a copy, or make the snapshot again",
            )  # fmt: skip
            continue
        content = json.loads(raw)
        for shard in content["shards"]:
            for column, pinned in shard["columns"].items():
                if pinned["file"] not in there:
                    short = content["modalities"].get(column, {}).get("recipe")
                    instead = now.get((column, short, shard["index"]))
                    also = f"; made again it is {instead}" if instead and instead != pinned["file"] else ""
                    yield Problem(
                        f"snapshots/{name}", f"pins {pinned['file']}, which is not there{also}", column, shard["index"],
                        advice="a training run on this snapshot cannot go on; begin one on a new snapshot",
                    )  # fmt: skip


def _notes(dataset: Dataset) -> Iterator[Problem]:
    """What runs and parked shards say of themselves."""
    for name in sorted(n for folder in ("runs", "parked", "tombstones") for n in dataset.store.walk(folder)):
        match = _NOTE.fullmatch(name)
        raw = dataset.store.read_if_exists(name) if match else None
        if match and raw is not None and sha256(raw)[:SHORT] != match["hash"]:
            yield Problem(name, "is damaged: it does not hash to its name", aside=(name,))
