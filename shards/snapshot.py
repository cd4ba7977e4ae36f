"""A snapshot pins what a training run reads: shards, recipes and hashes, under one digest.

It is registered in the dataset before anyone reads it, and refers to nothing by an absolute path, so a dataset can move.
By modality it also says whose weights its values are made with, and under which licences.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fourmill.errors import DatasetError, WorkMissing
from fourmill.modality import LabelContract, Modality
from fourmill.shards.arrow import Column, open_column
from fourmill.shards.cache import FileCache
from fourmill.shards.dataset import SAMPLES, Dataset, modality_json
from fourmill.shards.filters import Condition
from fourmill.shards.receipts import Receipt, canonical, pack_presence, sha256, unpack_presence
from fourmill.shards.samples import OK
from fourmill.shards.tokenizer_check import check_tokenizer
from fourmill.shards.tombstones import dropped_rows

SPLITS = ("train", "val")


@dataclass(frozen=True, slots=True)
class ShardRef:
    """One shard of a snapshot: data files by column name (``samples`` among them), relative to the dataset."""

    index: int
    rows: int
    files: Mapping[str, str]
    kept: str | None = None  # bitmap of the rows that its conditions chose and nobody dropped; None: all
    sizes: Mapping[str, int] | None = None  # samples by split; None in snapshots of before 0.2
    hashes: Mapping[str, str] = field(default_factory=dict)  # sha256 of the files, by column name


@dataclass(frozen=True)
class Snapshot:
    """Read-only view of finished shards. Columns are opened on demand and not cached."""

    dataset: Dataset
    digest: str
    content: dict[str, Any]
    modalities: dict[str, Modality] = field(default_factory=dict)
    shards: list[ShardRef] = field(default_factory=list)
    cache: FileCache | None = None

    @property
    def image_size(self) -> int:
        return int(self.content["image_size"])

    @property
    def n_crops(self) -> int:
        return int(self.content["n_crops"])

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def where(self) -> list[str]:
        """The conditions that chose its rows."""
        return list(self.content.get("where", []))

    @property
    def chosen(self) -> int:
        """How many rows the conditions chose and nobody dropped, readable or not."""
        return sum(int(self.is_kept(shard).sum()) for shard in range(len(self.shards)))

    def is_kept(self, shard: int) -> np.ndarray:
        """bool (rows,): what the snapshot's conditions chose, less what was dropped."""
        ref = self.shards[shard]
        return np.ones(ref.rows, bool) if ref.kept is None else unpack_presence(ref.kept, ref.rows)

    def tokenizer(self, modality: str) -> str | None:
        """The short hash of the modality's tokenizer in the dataset."""
        short = self.content["modalities"][modality].get("tokenizer")
        return str(short) if short else None

    def licenses(self, names: Iterable[str] | None = None) -> list[str]:
        """Of all weights that the values of these modalities (None: of all) were made with."""
        entries = self.content["modalities"]
        ways = [
            way
            for name in (entries if names is None else names)
            for way in entries[name].get("provenance", [])
        ]
        return sorted(
            {str(way[key]) for way in ways for key in ("license", "tokenizer_license") if way.get(key)}
        )

    def column(self, shard: int, modality: str) -> Column:
        """``shard`` counts in this snapshot's list of shards."""
        ref = self.shards[shard]
        if modality not in ref.files:
            raise DatasetError(f"snapshot {self.digest[:12]} has no modality {modality!r}")
        name = ref.files[modality]
        where = f"{self.dataset.url}/{name}"
        table = self._table(name, ref.hashes.get(modality))
        check_tokenizer(table, self.tokenizer(modality), where)
        return open_column(table, where)

    def _table(self, name: str, sha256: str | None) -> pa.Table:
        """A file of the dataset, through the cache if there is one."""
        if self.cache is None or sha256 is None:
            return self.dataset.table(name)
        return self.cache.table(name, sha256)

    def cached(self, limit_bytes: int, folder: str | None = None) -> Snapshot:
        """The same, with files of remote storage kept on this machine, checked against their hashes."""
        some = self.shards[0].files[SAMPLES]
        if self.dataset.store.local_path(some) is not None:
            return self
        return replace(self, cache=FileCache(self.dataset.store, limit_bytes, folder))

    def prefetch(self, shards: Iterable[int], modalities: Iterable[str]) -> None:
        """Have the cache fetch files that will be read soon."""
        if self.cache is not None:
            names = [SAMPLES, *modalities]
            refs = [self.shards[shard] for shard in shards]
            self.cache.prefetch([(r.files[n], r.hashes[n]) for r in refs for n in names if n in r.hashes])

    def keys64(self, shard: int) -> np.ndarray:
        """uint64 (rows,)"""
        return self._samples(shard, ["key64"])["key64"].to_numpy()

    def keys(self, shard: int) -> list[str]:
        return list(self._samples(shard, ["key"])["key"].to_pylist())

    def is_train(self, shard: int) -> np.ndarray:
        """bool (rows,): readable, chosen, and not held out."""
        return self.in_split(shard, "train")

    def is_val(self, shard: int) -> np.ndarray:
        """bool (rows,): readable, chosen, and held out from fitting and training."""
        return self.in_split(shard, "val")

    def in_split(self, shard: int, split: str) -> np.ndarray:
        """bool (rows,): readable, chosen, and of a split."""
        table = self._samples(shard, ["split", "status"])
        return _in_split(table, split) & self.is_kept(shard)

    def split_rows(self, shard: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a split, int64 (n,), and the keys of all rows, uint64 (rows,)."""
        table = self._samples(shard, ["split", "status", "key64"])
        rows = np.flatnonzero(_in_split(table, split) & self.is_kept(shard))
        return rows.astype(np.int64), np.ascontiguousarray(table["key64"].to_numpy(), np.uint64)

    def split_sizes(self, split: str) -> np.ndarray:
        """int64 (shards,): how many samples of a split each shard has. Reads no shard."""
        return np.array(
            [
                int(self.in_split(index, split).sum()) if ref.sizes is None else ref.sizes.get(split, 0)
                for index, ref in enumerate(self.shards)
            ],
            np.int64,
        )

    def _samples(self, shard: int, columns: list[str]) -> Any:
        ref = self.shards[shard]
        return self._table(ref.files[SAMPLES], ref.hashes.get(SAMPLES)).select(columns)

    @classmethod
    def create(
        cls,
        dataset: Dataset,
        recipes: Mapping[str, str],
        modalities: Mapping[str, Modality],
        tokenizers: Mapping[str, str],
        image_size: int,
        where: Sequence[Condition] = (),
    ) -> Snapshot:
        """Pin the shards that are finished in every modality, and register the snapshot.

        ``recipes``: short token recipe by modality; ``where``: conditions on some of them, which choose rows. Raises WorkMissing when no shard is finished in all of them,
        DatasetError when a modality's receipts disagree on the keys of a shard.
        """
        samples_short = dataset.samples_recipe()
        if samples_short is None:
            raise WorkMissing(f"{dataset.url} has no finished shard yet; run `fourmill build` first")
        samples = dataset.receipts(SAMPLES, samples_short)
        columns = {name: dataset.receipts(name, short) for name, short in recipes.items()}
        dropped = dropped_rows(dataset)
        shards: list[dict[str, Any]] = []
        for index, receipt in samples.items():
            if not all(index in column for column in columns.values()):
                continue
            for name, column in columns.items():
                if column[index].keys != receipt.keys:
                    raise DatasetError(
                        f"shard {index}: {name} and samples disagree on the keys; rebuild {name}"
                    )
            files = {SAMPLES: receipt, **{name: column[index] for name, column in columns.items()}}
            pinned = {name: {"file": r.file, "sha256": r.sha256} for name, r in files.items()}
            gone = dropped.get(index)
            more: dict[str, Any] = {}
            kept = np.ones(receipt.rows, bool)
            if where or gone is not None:
                kept = _kept(dataset, columns, index, receipt.rows, where, gone)
                more["kept"] = pack_presence(kept)
            table = dataset.table(receipt.file).select(["split", "status"])
            more["sizes"] = {split: int((_in_split(table, split) & kept).sum()) for split in SPLITS}
            shards.append({"index": index, "rows": receipt.rows, "columns": pinned, **more})
        if not shards:
            raise WorkMissing(
                f"{dataset.url} has no shard that is finished in {', '.join(recipes)}; run the build again"
            )
        content = {
            "format": 1,
            "dataset": dataset.digest,
            "image_size": image_size,
            "n_crops": dataset.identity["n_crops"],
            "modalities": {
                name: {
                    **modality_json(modalities[name]),
                    "recipe": recipes[name],
                    "tokenizer": tokenizers.get(name),
                    "provenance": provenances(columns[name][shard["index"]] for shard in shards),
                }
                for name in sorted(recipes)
            },
            "shards": shards,
            **({"where": [str(condition) for condition in where]} if where else {}),
        }
        text = canonical(content)
        digest = sha256(text)
        dataset.store.put_if_absent(f"snapshots/{digest}.json", text.encode())
        return cls._of(dataset, digest, json.loads(text))

    @classmethod
    def load(cls, url: str, digest: str | None = None) -> Snapshot:
        """A registered snapshot, by its digest or the first digits of it; the only one if None."""
        dataset = Dataset(url)
        names = [n for n in dataset.store.names("snapshots") if n.startswith(digest or "")]
        if not names and not digest:
            raise DatasetError(f"{url}: no snapshot is registered; `fourmill snapshot {url}` takes one")
        if len(names) != 1:
            what = f"{len(names)} snapshots match {digest!r}" if digest else f"it has {len(names)} snapshots"
            shown = names or dataset.store.names("snapshots")
            raise DatasetError(
                f"{url}: {what}; name one of: {', '.join(n[:12] for n in shown) or 'none is registered'}"
            )
        raw = dataset.store.read(f"snapshots/{names[0]}")
        if sha256(raw) != names[0].removesuffix(".json"):
            raise DatasetError(f"{url}/snapshots/{names[0]} is damaged: it does not hash to its name")
        content = json.loads(raw)
        if content["dataset"] != dataset.digest:
            raise DatasetError(f"snapshot {names[0][:12]} was made of another dataset than {url}")
        return cls._of(dataset, names[0].removesuffix(".json"), content)

    @classmethod
    def _of(cls, dataset: Dataset, digest: str, content: dict[str, Any]) -> Snapshot:
        modalities = {name: _modality(entry) for name, entry in content["modalities"].items()}
        shards = [
            ShardRef(
                s["index"],
                s["rows"],
                {n: c["file"] for n, c in s["columns"].items()},
                s.get("kept"),
                s.get("sizes"),
                {n: c["sha256"] for n, c in s["columns"].items()},
            )
            for s in content["shards"]
        ]
        return cls(dataset, digest, content, modalities, shards)


def _kept(
    dataset: Dataset,
    columns: Mapping[str, Mapping[int, Receipt]],
    shard: int,
    rows: int,
    where: Sequence[Condition],
    dropped: np.ndarray | None,
) -> np.ndarray:
    """bool (rows,): those that fulfil all conditions and were not dropped."""
    kept = np.ones(rows, bool)
    if dropped is not None:
        kept[dropped] = False
    for condition in where:
        file = columns[condition.name][shard].file
        kept &= condition.keeps(open_column(dataset.table(file), f"{dataset.url}/{file}"))
    return kept


def _in_split(table: pa.Table, split: str) -> np.ndarray:
    """bool (rows,): readable and of a split, of the columns split and status."""
    found = pc.and_(pc.equal(table["split"], split), pc.equal(table["status"], OK))
    return np.asarray(found.to_numpy(), bool)


def provenances(receipts: Iterable[Receipt]) -> list[dict[str, Any]]:
    """How the receipts' columns were made: labeler, model, weights, licences; each way once, in one order."""
    found = {canonical(receipt.provenance): receipt.provenance for receipt in receipts}
    return [found[text] for text in sorted(found) if found[text]]


def _modality(entry: dict[str, Any]) -> Modality:
    contract = {**entry["contract"], "classes": tuple(entry["contract"]["classes"])}
    fields = ("name", "kind", "codec", "vocab_size", "num_tokens", "reference_name", "doc")
    return Modality(contract=LabelContract(**contract), **{name: entry[name] for name in fields})
