"""What crashes and replaced work leave behind, and how it is removed.

Garbage is a data file, a tokenizer or a temporary file that no receipt (of any recipe and epoch) and no registered snapshot
names, what an unfinished fit of a tokenizer left, and a parking note of a shard that has a receipt since; all only if older than a limit by the store's own clock. A
running build writes data before it writes receipts, so the limit is long; and a build that finds its data left by a dead
attempt makes them young again before it commits. Receipts and snapshots are listed after the candidates, and once more before
each lot that is removed. Nothing else in the folder is ever touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fourmill.errors import DatasetError
from fourmill.shards.dataset import Dataset
from fourmill.shards.receipts import SHORT, sha256
from fourmill.storage import Entry

LOT = 1000  # files that are removed between two listings
TEMPORARY = "temporary"
PARKED = "parked"

_NAME = r"[a-z][a-z0-9_]*"
_HEX = rf"[0-9a-f]{{{SHORT}}}"
_DATA = re.compile(rf"(?P<what>samples|(?:tokens|labels)/{_NAME})/shard-\d{{6,}}\.{_HEX}\.(?:arrow|tar)")
_TOKENIZER = re.compile(rf"(?P<what>tokenizers/{_NAME})/(?P<short>{_HEX})/[^/]+")
_PARKED = re.compile(rf"parked/(?P<column>{_NAME})/(?P<short>{_HEX})/shard-(?P<shard>\d{{6,}})\.[^/]+\.json")
_FIT = re.compile(
    rf"(?P<what>fits/{_NAME})-[0-9a-f]+(?:/.+|\.lock)"
)  # the state and labels of a fit that nobody went on with
_TEMPORARY = re.compile(r"(?:[^/]+/)*\.(?:.+\.[0-9a-f]{12}\.tmp|(?:probe|clock)-[0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class Garbage:
    """A file that can go. ``what``: its folder, or what else it is; ``named``: what would keep it, if it were named."""

    name: str
    what: str
    entry: Entry
    named: str = ""


@dataclass(frozen=True)
class _Named:
    """What receipts and snapshots name: data files, tokenizers as `modality/hash`, and modalities that have tokens."""

    files: frozenset[str]
    tokenizers: frozenset[str]
    tokenized: frozenset[str]

    def keeps(self, garbage: Garbage) -> bool:
        if garbage.what.startswith("tokenizers/"):
            # one that was fitted, and has no successor in use, is a result and waits for its tokens
            unused = garbage.what.removeprefix("tokenizers/") not in self.tokenized
            return garbage.named in self.tokenizers or unused
        return garbage.name in self.files


def find_garbage(dataset: Dataset, older_than_s: float) -> list[Garbage]:
    """Everything that can go now, by name. Removes nothing. DatasetError: a receipt or snapshot cannot be read."""
    listed = dataset.store.walk("")
    found = [g for name, entry in sorted(listed.items()) if (g := _candidate(name, entry)) is not None]
    if not found:
        return []
    limit = dataset.store.now() - older_than_s
    young = {_whole(g) for g in found if g.entry.modified > limit}
    named = _named(dataset)
    found = [g for g in found if _whole(g) not in young and not named.keeps(g)]
    parked = {g.name for g in found if g.what == PARKED} - set(_settled(dataset, found))
    return [g for g in found if g.name not in parked]


def remove_garbage(dataset: Dataset, found: Sequence[Garbage]) -> Iterator[Garbage]:
    """Remove it lot by lot, and yield what was removed; what is named or was written again meanwhile stays."""
    for start in range(0, len(found), LOT):
        lot = found[start : start + LOT]
        named = _named(dataset)
        for garbage in lot:
            if named.keeps(garbage):
                continue
            try:
                if dataset.store.entry(garbage.name).stamp != garbage.entry.stamp:
                    continue
                dataset.store.remove(garbage.name)
            except FileNotFoundError:
                continue  # another one was quicker
            yield garbage


def _candidate(name: str, entry: Entry) -> Garbage | None:
    """A file of a kind that can be garbage; None for all others."""
    if _TEMPORARY.fullmatch(name):
        return Garbage(name, TEMPORARY, entry)
    if match := _DATA.fullmatch(name) or _FIT.fullmatch(name):
        return Garbage(name, match["what"], entry)
    if match := _TOKENIZER.fullmatch(name):
        modality = match["what"].removeprefix("tokenizers/")
        return Garbage(name, match["what"], entry, f"{modality}/{match['short']}")
    if match := _PARKED.fullmatch(name):
        return Garbage(name, PARKED, entry, f"{match['column']}/{match['short']}/{int(match['shard'])}")
    return None


def _whole(garbage: Garbage) -> str:
    """What is as young as its youngest file: a tokenizer goes whole."""
    return garbage.named if garbage.what.startswith("tokenizers/") else garbage.name


def _settled(dataset: Dataset, found: Sequence[Garbage]) -> Iterator[str]:
    """The parking notes of shards that have a receipt since."""
    finished: dict[tuple[str, str], set[int]] = {}
    for garbage in found:
        if garbage.what == PARKED:
            column, short, shard = garbage.named.split("/")
            if (column, short) not in finished:
                finished[column, short] = dataset.finished(column, short)
            if int(shard) in finished[column, short]:
                yield garbage.name


def _named(dataset: Dataset) -> _Named:
    files = {receipt.file for receipt in dataset.every_receipt()}
    tokenizers: set[str] = set()
    tokenized: set[str] = set()
    for column in dataset.columns():
        for short in dataset.recipes(column):
            tokenizer = dataset.recipe(column, short).get("tokenizer")
            if tokenizer:
                tokenizers.add(f"{column}/{str(tokenizer)[:SHORT]}")
                tokenized.add(column)
    for content in _snapshots(dataset):
        files |= {c["file"] for shard in content["shards"] for c in shard["columns"].values()}
        for name, modality in content["modalities"].items():
            if modality.get("tokenizer"):
                tokenizers.add(f"{name}/{modality['tokenizer'][:SHORT]}")
    return _Named(frozenset(files), frozenset(tokenizers), frozenset(tokenized))


def _snapshots(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for name in dataset.store.names("snapshots"):
        raw = dataset.store.read(f"snapshots/{name}")
        if sha256(raw) != name.removesuffix(".json"):
            raise DatasetError(f"{dataset.url}/snapshots/{name} is damaged: nothing is removed beside it")
        yield json.loads(raw)
