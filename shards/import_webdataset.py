"""Import: tars in the layout of `fourmill.shards.export`, whoever wrote them, as columns of a dataset.

A shard is read whole and checked in every modality before anything of it is committed: equal members in equal order, one number
of crops, the expected number of tokens, all of them inside their vocabulary. What is wrong is a DatasetError of one line that
names the tar and the member. Shards that have receipts are not read again.

A recipe says "imported", with the identities of the tars: their content hashes where they can be had, size and etag on remote
storage. Names of members are compared and shown, never used as paths; arrays of objects are refused, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill import __version__
from fourmill.crops import CROP_RULE_VERSION
from fourmill.errors import ConfigError
from fourmill.labels import NO_CAPTION, Absent, Label
from fourmill.modality import CAPTION, Modality
from fourmill.seeds import keys_digest
from fourmill.shards.arrow import Cell, column_table, write_table
from fourmill.shards.dataset import SAMPLES, Dataset, absent_counts
from fourmill.shards.exported_tree import Tree
from fourmill.shards.receipts import Receipt, Recipe, canonical, pack_presence, sha256
from fourmill.shards.samples import sample_table
from fourmill.shards.sources.base import Row
from fourmill.shards.tar import write_labels


@dataclass(frozen=True)
class Rows:
    """The samples of one shard. ``crops`` int32 (rows, n_crops, 5); ``sizes`` int32 (rows, 2): width, height."""

    stems: list[str]
    keys: list[str]
    crops: np.ndarray
    sizes: np.ndarray


#: labels of whole images -> one cell each: their crops' tokens
Encode = Callable[[Sequence[Label], Rows], list[Cell]]


@dataclass(frozen=True)
class Wanted:
    """A modality to be imported from ``folder``. ``encode`` makes tokens of what is written as JSON or text;
    ``tokenizer`` is the full hash of the one that the dataset has, "" where there is none."""

    modality: Modality
    folder: str
    tokenizer: str = ""
    encode: Encode | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is imported, and under which recipes."""

    tree: Tree
    wanted: dict[str, Wanted]
    seed: int
    val_fraction: float
    image_size: int

    @property
    def identity(self) -> dict[str, Any]:
        """What dataset.yaml says: the rows and their crops never change; a modality may be added to the tree."""
        tars = {name: self.tree.identities[name] for name in self.tree.row_folders}
        source = {"kind": "imported", "layout": "webdataset", "tars": _digest(tars)}
        return {
            "seed": self.seed,
            "n_crops": self.tree.n_crops,
            "val_fraction": self.val_fraction,
            "source": source,
        }

    @property
    def samples_recipe(self) -> Recipe:
        """Captions are part of the samples."""
        captions = next((w.folder for w in self.wanted.values() if w.modality.name == CAPTION.name), None)
        more = {"captions": _digest(self.tree.identities[captions])} if captions else {}
        return Recipe("samples", {"imported": "webdataset", **self.identity, **more})

    def label_recipe(self, name: str) -> Recipe:
        wanted = self.wanted[name]
        tars = _digest(self.tree.identities[wanted.folder])
        content = {
            "imported": "webdataset",
            "labeler": "imported",
            "modality": name,
            "version": 1,
            "tars": tars,
        }
        if wanted.modality.contract.classes and wanted.encode is not None:
            content["classes"] = list(wanted.modality.contract.classes)
        return Recipe("label", content)

    def token_recipe(self, name: str) -> Recipe:
        wanted = self.wanted[name]
        crops = {"version": CROP_RULE_VERSION, "n_crops": self.tree.n_crops, "image_size": self.image_size}
        tokens = {
            "kind": wanted.modality.kind,
            "vocab_size": wanted.modality.vocab_size,
            "num_tokens": wanted.modality.num_tokens,
        }
        label = self.label_recipe(name).content
        return Recipe(
            "token", {"label": label, "tokenizer": wanted.tokenizer or None, "crops": crops, "tokens": tokens}
        )

    def recipes(self) -> dict[str, Recipe]:
        return {name: self.token_recipe(name) for name in self.wanted}


def import_shards(
    plan: Plan, dataset: Dataset, on_shard: Callable[[int, int], None] = lambda done, total: None
) -> dict[int, int]:
    """Import what has no receipts yet; the rows of every shard that has any. Raises DatasetError where a shard is not what it should be."""
    recipes = {SAMPLES: plan.samples_recipe, **plan.recipes()}
    there = dataset.samples_recipe()
    if there is not None and there != recipes[SAMPLES].short:
        raise ConfigError(
            f"{dataset.url} was imported with other captions, or without; choose another dataset for this tree"
        )
    finished = {name: dataset.finished(name, recipe.short) for name, recipe in recipes.items()}
    committed = dataset.receipts(SAMPLES, recipes[SAMPLES].short)
    rows: dict[int, int] = {}
    for shard, tar in enumerate(plan.tree.tars):
        missing = [name for name in recipes if shard not in finished[name]]
        if missing:
            rows[shard] = _import_shard(plan, dataset, shard, tar, missing)
        else:
            rows[shard] = committed[shard].rows
        on_shard(shard + 1, len(plan.tree.tars))
    return {shard: count for shard, count in rows.items() if count}


def _import_shard(plan: Plan, dataset: Dataset, shard: int, tar: str, missing: Sequence[str]) -> int:
    began = time.perf_counter()
    tree, there = plan.tree, {}
    rows = read_rows(tree, tar)
    for name, wanted in plan.wanted.items():
        if name in missing or SAMPLES in missing:
            there[name] = tree.read_column(tar, wanted.folder, wanted.modality, rows.stems, rows.sizes)
    if not rows.stems:
        return 0
    samples = _samples(plan, tar, rows, there)
    labels = {name: there[name] for name, w in plan.wanted.items() if w.encode is not None and name in there}
    if CAPTION.name in labels:
        labels[CAPTION.name] = [texts or Absent(NO_CAPTION) for texts in samples["captions"].to_pylist()]
    cells = {name: _cells(plan.wanted[name], there[name], labels.get(name), rows) for name in there}
    commit = _Commit(dataset, shard, keys_digest(rows.keys), tree, tar, began)
    if SAMPLES in missing:
        commit(plan.samples_recipe, SAMPLES, SAMPLES, write_table(samples), "arrow", [None] * len(rows.keys))
    for name in (name for name in plan.wanted if name in missing):
        wanted, recipe = plan.wanted[name], plan.token_recipe(name)
        if name in labels and name != CAPTION.name:
            data = write_labels(rows.keys, labels[name], wanted.modality)
            commit(
                plan.label_recipe(name), name, f"labels/{name}", data, "tar", _reasons(labels[name]), wanted
            )
        meta = {"recipe": recipe.hash, "tokenizer": wanted.tokenizer}
        data = write_table(column_table(wanted.modality, cells[name], tree.n_crops, meta))
        commit(recipe, name, f"tokens/{name}", data, "arrow", _reasons(cells[name]), wanted)
    return len(rows.keys)


def read_rows(tree: Tree, tar: str) -> Rows:
    """Members, keys, crops and sizes of a shard."""
    stems, crops = tree.read_crops(tar)
    keys = tree.read_keys(tar, stems)
    return Rows(stems, keys, crops, tree.read_sizes(tar, stems, crops))


def _samples(plan: Plan, tar: str, rows: Rows, there: dict[str, Any]) -> pa.Table:
    """As a build makes them, with the crops that were imported."""
    positions = [canonical({"tar": tar, "member": stem}) for stem in rows.stems]
    table = sample_table(
        [Row(key, position) for key, position in zip(rows.keys, positions, strict=True)],
        [(int(width), int(height)) for width, height in rows.sizes],
        there.get(CAPTION.name, [[]] * len(rows.keys)),
        seed=plan.seed,
        n_crops=plan.tree.n_crops,
        val_fraction=plan.val_fraction,
    )
    at = table.schema.get_field_index("crops")
    flat = pa.array(rows.crops.astype(np.int32).reshape(-1))
    crops = pa.FixedSizeListArray.from_arrays(flat, plan.tree.n_crops * 5)
    return table.set_column(at, table.schema.field(at), crops)


def _cells(wanted: Wanted, values: Any, labels: Sequence[Label] | None, rows: Rows) -> list[Cell]:
    if labels is not None:
        assert wanted.encode is not None
        return wanted.encode(labels, rows)
    return [[value] for value in values] if wanted.modality.kind == "scalar" else list(values)


def _reasons(cells: Sequence[Any]) -> list[str | None]:
    return [cell.reason if isinstance(cell, Absent) else None for cell in cells]


def _digest(tars: Any) -> str:
    return sha256(canonical(tars))


@dataclass(frozen=True)
class _Commit:
    """Puts one column's data file and receipt."""

    dataset: Dataset
    shard: int
    keys: str
    tree: Tree
    tar: str
    began: float

    def __call__(
        self, recipe: Recipe, column: str, folder: str, data: bytes, ending: str, reasons: Sequence[str | None],
        wanted: Wanted | None = None,
    ) -> None:  # fmt: skip
        tars = {wanted.folder} if wanted else set(self.tree.row_folders)
        receipt = Receipt(
            column=column,
            recipe=recipe.hash,
            shard=self.shard,
            rows=len(reasons),
            absent=absent_counts(reasons),
            presence=pack_presence(np.array([reason is None for reason in reasons], bool)),
            keys=self.keys,
            file=self.dataset.put_data(folder, self.shard, data, ending),
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            dataset=self.dataset.digest,
            source={f"{name}/{self.tar}": self.tree.identities[name][self.tar] for name in sorted(tars)},
            provenance=dict(wanted.provenance) if wanted else {},
            environment={"fourmill": __version__, "python": platform.python_version()},
            timings={
                "import": round(time.perf_counter() - self.began, 4),
                "committed": round(time.time(), 3),
            },
        )
        self.dataset.commit(recipe, receipt)
