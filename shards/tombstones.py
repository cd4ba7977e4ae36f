"""Samples that are not to be used any more: take-downs. No shard is rewritten; every new snapshot and export leaves them out.

A list of keys is looked up once, when it is dropped, and remembered with where its samples lie, so a new snapshot reads only
the samples of shards that came later. A key that the dataset does not have stays on the list: its sample may come yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fourmill.errors import DatasetError
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import SHORT, Receipt, canonical, sha256

FOLDER = "tombstones"


@dataclass(frozen=True, slots=True)
class Tombstone:
    """One list of keys. ``rows``: by shard, the rows that hold them; ``seen``: the shards that were looked at."""

    name: str
    keys: tuple[str, ...]
    rows: dict[int, tuple[int, ...]]
    seen: frozenset[int]

    @property
    def found(self) -> int:
        return sum(len(rows) for rows in self.rows.values())


def drop_keys(dataset: Dataset, keys: Iterable[str]) -> Tombstone:
    """Remember these keys for ever. DatasetError where there are none."""
    wanted = tuple(sorted(set(keys)))
    if not wanted:
        raise DatasetError("there is no key to drop; the file holds one key per line")
    samples = _samples(dataset)
    rows = _look_up(dataset, samples, frozenset(wanted))
    body = {
        "format": 1,
        "keys": list(wanted),
        "rows": {str(shard): list(found) for shard, found in sorted(rows.items())},
        "seen": sorted(samples),
    }
    text = canonical(body)
    name = f"{FOLDER}/{sha256(text)[:SHORT]}.json"
    dataset.store.put_if_absent(name, text.encode())
    return Tombstone(name, wanted, rows, frozenset(samples))


def tombstones(dataset: Dataset) -> list[Tombstone]:
    found = []
    for file in dataset.store.names(FOLDER):
        name = f"{FOLDER}/{file}"
        raw = dataset.store.read(name)
        if sha256(raw)[:SHORT] != file.removesuffix(".json"):
            raise DatasetError(
                f"{dataset.url}/{name} is damaged: it does not hash to its name; drop its keys again"
            )
        body = json.loads(raw)
        rows = {int(shard): tuple(numbers) for shard, numbers in body["rows"].items()}
        found.append(Tombstone(name, tuple(body["keys"]), rows, frozenset(body["seen"])))
    return found


def dropped_rows(dataset: Dataset) -> dict[int, np.ndarray]:
    """By shard, the rows int64 that were dropped, each once; shards without any are left out."""
    rows: dict[int, set[int]] = {}
    found = tombstones(dataset)
    samples = _samples(dataset) if found else {}
    for tombstone in found:
        later = {shard: receipt for shard, receipt in samples.items() if shard not in tombstone.seen}
        for shard, numbers in {
            **tombstone.rows,
            **_look_up(dataset, later, frozenset(tombstone.keys)),
        }.items():
            rows.setdefault(shard, set()).update(numbers)
    return {shard: np.array(sorted(numbers), np.int64) for shard, numbers in rows.items() if numbers}


def _samples(dataset: Dataset) -> dict[int, Receipt]:
    short = dataset.samples_recipe()
    return dataset.receipts(SAMPLES, short) if short else {}


def _look_up(
    dataset: Dataset, samples: dict[int, Receipt], keys: frozenset[str]
) -> dict[int, tuple[int, ...]]:
    """Second rows with a key have no values and need no dropping, and do no harm here."""

    def rows_of(shard: int) -> tuple[int, ...]:
        there = dataset.table(samples[shard].file).column("key").to_pylist()
        return tuple(row for row, key in enumerate(there) if key in keys)

    found = dict(zip(samples, dataset.store.map(rows_of, samples), strict=True))
    return {shard: rows for shard, rows in found.items() if rows}
