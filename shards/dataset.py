"""A dataset on storage: its identity, its columns and their receipts.

    DATASET/
      dataset.yaml                                   what can never change
      runs/<id>.yaml                                 the configuration of each run
      samples/shard-000000.<hash12>.arrow            one row per source row
      tokens/<modality>/shard-000000.<hash12>.arrow
      labels/<modality>/shard-000000.<hash12>.tar    where kept
      receipts/<column>/<recipe12>/{recipe.json, shard-000000.json, shard-000000.e1.json}
      parked/<column>/<recipe12>/shard-000000.<attempt>.json
      tokenizers/<modality>/<hash12>/
      snapshots/<digest>.json

Nothing else is state. A shard of a column is finished if there is a receipt under the wanted recipe; of several, the one
of the highest epoch counts.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from fourmill.checkpoints import folder_hash
from fourmill.errors import ConfigError, DatasetError
from fourmill.modality import Modality
from fourmill.seeds import keys_digest
from fourmill.shards.arrow import Column, open_column, read_table
from fourmill.shards.receipt_cache import ReceiptCache
from fourmill.shards.receipts import (
    SHORT,
    Receipt,
    Recipe,
    canonical,
    data_name,
    newest,
    receipt_name,
    receipt_prefix,
    sha256,
    shard_and_epoch,
    shard_number,
)
from fourmill.shards.tokenizer_files import write_sums
from fourmill.storage import Entry, Store

FORMAT = 1
SAMPLES = "samples"
#: the file in a fitted tokenizer's folder that says what it was fitted on, and how
ORIGIN = "origin.json"
#: endings of weights that nothing here reads
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ColumnListing:
    """What one listing showed of a column's receipts. ``folders``: by recipe, the newest receipt's file name by shard;
    ``entries``: by recipe, how the files looked, where the listing says so (on remote storage)."""

    folders: dict[str, dict[int, str]]
    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def finished(self, short: str | None) -> set[int]:
        return set(self.folders.get(short or "", ()))


class Dataset:
    """An existing dataset. Cheap to open: reads ``dataset.yaml`` alone."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store(url)
        raw = self.store.read_if_exists("dataset.yaml")
        if raw is None:
            raise ConfigError(f"{url} is not a dataset (no dataset.yaml); build it first, or check the path")
        self._open(raw)

    def _open(self, raw: bytes) -> None:
        try:
            self.identity: dict[str, Any] = yaml.safe_load(raw)
            version = self.identity["format"]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise DatasetError(f"{self.url}/dataset.yaml is damaged: {error}") from error
        if version != FORMAT:
            raise DatasetError(f"{self.url} has format {version}; this fourmill reads format {FORMAT}")
        self.digest = sha256(raw)
        self._with_recipe: set[str] = set()  # receipts' folders that are known to hold their recipe
        self._cache = ReceiptCache(self.store, self.digest)

    @classmethod
    def create(cls, url: str, identity: dict[str, Any]) -> Dataset:
        """Open the dataset, creating it if there is none; refuse one that was built otherwise."""
        store = Store(url)
        raw = yaml.safe_dump({"format": FORMAT, **identity}, sort_keys=True).encode()
        if store.read_if_exists("dataset.yaml") is None:
            store.put_if_absent("dataset.yaml", raw)
        dataset = cls(url)
        dataset.check_identity(identity)
        return dataset

    def check_identity(self, identity: dict[str, Any]) -> None:
        """ConfigError where the dataset was built otherwise."""
        for key, value in {"format": FORMAT, **identity}.items():
            there = self.identity.get(key)
            if there != value:
                raise ConfigError(
                    f"{self.url} was built with {key} = {json.dumps(there)}, the configuration says "
                    f"{json.dumps(value)}; that can't change: choose another `dataset:` or restore the value"
                )

    # -- recipes and receipts -------------------------------------------------------------------------

    def columns(self) -> list[str]:
        return self.store.names("receipts")

    def recipes(self, column: str) -> list[str]:
        """Short hashes. A folder without a recipe (its first writer was killed) holds no receipt either."""
        folder = f"receipts/{column}"
        return [
            name for name in self.store.names(folder) if self.store.exists(f"{folder}/{name}/recipe.json")
        ]

    def recipe(self, column: str, short: str) -> dict[str, Any]:
        """The canonical content of a recipe, with its ``kind``."""
        name = f"receipts/{column}/{short}/recipe.json"
        raw = self.store.read(name)
        try:
            content = dict(json.loads(raw))
        except ValueError as error:
            raise DatasetError(f"{self.url}/{name} is damaged: {error}") from error
        if sha256(raw)[:SHORT] != short:
            raise DatasetError(f"{self.url}/{name} does not hash to the name of its folder; it is damaged")
        return content

    def restore_recipe(self, column: str, recipe: Recipe) -> None:
        """Write a recipe again whose receipts are there and whose text is not: it was damaged, and set aside."""
        folder = f"receipts/{column}/{recipe.short}"
        if not self.store.exists(f"{folder}/recipe.json") and self.store.names(folder):
            self.store.put_if_absent(f"{folder}/recipe.json", recipe.text.encode())

    def listing(self, column: str) -> ColumnListing:
        """The column's receipts under every recipe: one listing on object stores, no file's content or time locally."""
        top = f"receipts/{column}"
        names: dict[str, list[str]] = {}
        entries: dict[str, dict[str, Entry]] = {}
        if self.store.is_remote:
            for path, entry in self.store.walk(top).items():
                short, _, file = path.removeprefix(f"{top}/").partition("/")
                names.setdefault(short, []).append(file)
                entries.setdefault(short, {})[file] = entry
        else:
            names = {short: self.store.names(f"{top}/{short}") for short in self.store.names(top)}
        return ColumnListing({short: newest(files) for short, files in names.items()}, entries)

    def listings(self, columns: Iterable[str]) -> dict[str, ColumnListing]:
        """Of several columns, at the same time on remote storage."""
        wanted = list(columns)
        return dict(zip(wanted, self.store.map(self.listing, wanted), strict=True))

    def finished(self, column: str, short: str) -> set[int]:
        """The shards with a receipt: one listing."""
        return set(newest(self.store.names(f"receipts/{column}/{short}")))

    def is_finished(self, column: str, short: str, shard: int) -> bool:
        """Whether the shard has a receipt of any epoch: one request."""
        return bool(self._receipts_of(column, short, shard))

    def receipt(self, column: str, short: str, shard: int) -> Receipt:
        """The shard's receipt of the highest epoch, as it is now."""
        found = self._receipts_of(column, short, shard)
        name = f"receipts/{column}/{short}/{found.get(shard, f'{receipt_prefix(shard)}json')}"
        return Receipt.from_json(self.store.read(name), f"{self.url}/{name}")

    def receipts(self, column: str, short: str, listing: ColumnListing | None = None) -> dict[int, Receipt]:
        """By shard, in order, the receipts of the highest epoch. Each is read once (see `receipt_cache`)."""
        folder = f"receipts/{column}/{short}"
        entries = listing.entries.get(short) if listing is not None else None
        if entries is None:
            entries = self.store.entries(folder)
        found = newest(entries)
        known = self._cache.read(folder, {name: entries[name] for name in found.values()})
        return {shard: known[found[shard]] for shard in sorted(found)}

    def every_receipt(self) -> Iterator[Receipt]:
        """Of every column, recipe and epoch, stale ones too."""
        for column in self.columns():
            for short in self.store.names(f"receipts/{column}"):
                folder = f"receipts/{column}/{short}"
                entries = {n: e for n, e in self.store.entries(folder).items() if shard_and_epoch(n)}
                yield from self._cache.read(folder, entries).values()

    def _receipts_of(self, column: str, short: str, shard: int) -> dict[int, str]:
        return newest(self.store.names(f"receipts/{column}/{short}", receipt_prefix(shard)))

    def put_data(self, folder: str, shard: int, data: bytes, ending: str) -> str:
        """Write a content-named data file. One that is there is verified, and replaced if it is damaged.

        What a dead attempt left a long time ago becomes young again: its receipt is about to be written.
        """
        name = data_name(folder, shard, data, ending)
        there = self.store.put_or_compare(name, data)
        if there == "other":
            self.store.put(name, data)
        elif there == "same":
            self.store.refresh(name, data)
        return name

    def commit(self, recipe: Recipe, receipt: Receipt) -> bool:
        """Write the receipt unless there is one of its epoch. False: somebody else was first, and theirs stands."""
        folder = f"receipts/{receipt.column}/{recipe.short}"
        if folder not in self._with_recipe:
            if not self.store.put_if_absent(f"{folder}/recipe.json", recipe.text.encode()):
                raise DatasetError(
                    f"{self.url}/{folder}/recipe.json is damaged; remove it and run the build again"
                )
            self._with_recipe.add(folder)
        return self.store.put_if_absent(
            receipt_name(receipt.column, recipe.short, receipt.shard, receipt.epoch),
            receipt.to_json().encode(),
        )

    # -- parked shards --------------------------------------------------------------------------------

    def park(self, column: str, short: str, shard: int, attempt: str, error: str) -> str:
        """Note why a shard is set aside; the note's name."""
        note = canonical({"error": error, "attempt": attempt})
        name = f"parked/{column}/{short}/shard-{shard:06d}.{sha256(note)[:SHORT]}.json"
        self.store.put_if_absent(name, note.encode())
        return name

    def parked(self, column: str, short: str) -> dict[int, str]:
        """Parked shards that have no receipt since, with the name of the newest parking file."""
        done = self.finished(column, short)
        return {
            shard: name
            for name in self.store.names(f"parked/{column}/{short}")
            if (shard := shard_number(name)) is not None and shard not in done
        }

    def all_parked(self) -> dict[tuple[str, str], set[int]]:
        """(column, recipe) -> shards that were parked at some time, with a receipt since or without: one listing."""
        found: dict[tuple[str, str], set[int]] = {}
        for path in self.store.walk("parked"):
            _, column, short, name = path.split("/", 3)
            if (shard := shard_number(name)) is not None:
                found.setdefault((column, short), set()).add(shard)
        return found

    def parked_error(self, column: str, short: str, name: str) -> str:
        return str(json.loads(self.store.read(f"parked/{column}/{short}/{name}"))["error"])

    # -- reading --------------------------------------------------------------------------------------

    def table(self, name: str) -> pa.Table:
        local = self.store.local_path(name)
        return read_table(str(local) if local else self.store.read(name), f"{self.url}/{name}")

    def samples_recipe(self) -> str | None:
        """The short hash of the samples recipe (a dataset has one), None before the first shard."""
        shorts = self.recipes(SAMPLES)
        if len(shorts) > 1:
            raise DatasetError(f"{self.url} has {len(shorts)} samples recipes; a dataset has one")
        return shorts[0] if shorts else None

    def samples(self, shard: int) -> pa.Table:
        short = self.samples_recipe()
        if short is None:
            raise DatasetError(f"{self.url} has no samples yet")
        return self.table(self.receipt(SAMPLES, short, shard).file)

    def column(self, modality: str, short: str, shard: int) -> Column:
        """One shard of a modality, checked against the keys of its samples."""
        receipt = self.receipt(modality, short, shard)
        samples = self.receipt(SAMPLES, str(self.samples_recipe()), shard)
        if receipt.keys != samples.keys:
            raise DatasetError(
                f"{receipt.file}: its keys are not those of {samples.file}; rebuild that shard"
            )
        return open_column(self.table(receipt.file), f"{self.url}/{receipt.file}")

    # -- tokenizers -----------------------------------------------------------------------------------

    def add_tokenizer(self, modality: str, folder: Path) -> str:
        """Copy a tokenizer's folder into the dataset under its hash (immutable); returns the short hash.

        By its origin a fitted one is found again, so that file comes last: where it is, the others are. Pickles,
        which published repositories hold beside the same weights as safetensors, stay behind.
        """
        short = folder_hash(str(folder.resolve()))[:SHORT]
        name = f"tokenizers/{modality}/{short}"
        files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix not in PICKLES]
        for file in files:
            if file.name != ORIGIN:
                self.store.put_if_absent(f"{name}/{file.name}", file.read_bytes())
        origin = folder / ORIGIN
        write_sums(self.store, name, [origin] if origin.exists() else [])
        if origin.exists():
            self.store.put_if_absent(f"{name}/{ORIGIN}", origin.read_bytes())
        return short

    def tokenizers(self, modality: str) -> list[str]:
        return self.store.names(f"tokenizers/{modality}")

    def tokenizer_folder(self, modality: str, short: str) -> Path:
        """The tokenizer's folder on this machine; copied to a temporary one from remote storage."""
        name = f"tokenizers/{modality}/{short}"
        local = self.store.local_path(name)
        folder = local if local else Path(tempfile.mkdtemp(prefix=f"fourmill-{modality}-"))
        if local is None:
            for file in self.store.names(name):
                (folder / file).write_bytes(self.store.read(f"{name}/{file}"))
        if not folder.is_dir() or folder_hash(str(folder.resolve()))[:SHORT] != short:
            raise DatasetError(f"{self.url}/{name} is missing or damaged: its files do not hash to its name")
        return folder


def check_keys(table: pa.Table, receipt: Receipt) -> None:
    """The key column of a samples table is the one that the receipt speaks of."""
    if keys_digest(table.column("key").to_pylist()) != receipt.keys:
        raise DatasetError(
            f"{receipt.file}: the key column is not the one in its receipt; the file is damaged"
        )


def safe_name(name: str) -> str:
    """A modality or tokenizer name as a path part."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DatasetError(f"{name!r} is not a modality name")
    return name


def absent_counts(reasons: Iterable[str | None]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))


def modality_json(modality: Modality) -> dict[str, Any]:
    """What a snapshot remembers of a resolved modality."""
    contract = modality.contract
    return {
        "name": modality.name,
        "kind": modality.kind,
        "codec": modality.codec,
        "vocab_size": modality.vocab_size,
        "num_tokens": modality.num_tokens,
        "reference_name": modality.reference_name,
        "doc": modality.doc,
        "contract": {name: getattr(contract, name) for name in contract.__slots__},
    }


def presence_of(receipts: Iterable[Receipt]) -> np.ndarray:
    """bool (rows,): rows present in every one of the receipts' columns."""
    masks = [receipt.presence_mask() for receipt in receipts]
    return np.logical_and.reduce(masks) if masks else np.zeros(0, bool)
