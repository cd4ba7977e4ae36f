"""Receipts are read once: what they say is kept in memory, and in a file of this user's cache folder.

A receipt is known again by its name, its size and its stamp (time and inode, or the object's tag), all from a listing; one
that was replaced is read anew. Only receipts whose digest held are kept. The cache is no state: without it, or with a damaged
one, everything works and takes longer. Its file is named by a hash, since an URL may hold a secret.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourmill.shards.receipts import Receipt, canonical, sha256
from fourmill.storage import Entry, Store

WORTH = 32  # receipts: for fewer the file is left alone
_WAIT_S = 5.0  # for another process that is writing
#: parts that the receipts of a column share: stored once, and one object in memory
_SHARED = ("column", "recipe", "dataset", "source", "provenance", "environment")
_OWN = tuple(name for name in Receipt.__slots__ if name not in _SHARED)
_TABLES = """
CREATE TABLE IF NOT EXISTS shared (id INTEGER PRIMARY KEY, digest TEXT UNIQUE, body TEXT);
CREATE TABLE IF NOT EXISTS receipts (folder TEXT, file TEXT, size INTEGER, stamp TEXT, shared INTEGER, body TEXT,
  sum INTEGER, PRIMARY KEY (folder, file)) WITHOUT ROWID;
"""
_log = logging.getLogger(__name__)
_said: set[str] = set()

#: by file name: how it was listed, and what it says
Known = dict[str, tuple[Entry, Receipt]]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fourmill, by default ~/.cache/fourmill."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fourmill"


class ReceiptCache:
    """Of one dataset. Pickles empty."""

    def __init__(self, store: Store, dataset: str) -> None:
        """``dataset``: the sha256 of its dataset.yaml."""
        self._store, self._dataset = store, dataset
        self._memory: dict[str, Known] = {}
        self._file: Path | None = None
        try:
            place = str(Path(store.root).resolve()) if store.is_local else store.url
            of = canonical([place, dataset, list(Receipt.__slots__)])  # another layout is another file
            self._file = cache_folder() / "receipts" / f"{sha256(of)[:32]}.sqlite3"
        except (OSError, RuntimeError) as error:  # a user without a home
            _say(str(error))

    def __reduce__(self) -> tuple[type[ReceiptCache], tuple[Store, str]]:
        return ReceiptCache, (self._store, self._dataset)

    def read(self, folder: str, listed: Mapping[str, Entry]) -> dict[str, Receipt]:
        """The receipts of a folder by file name; ``listed`` says which, and how they look in a listing."""
        known = self._memory.setdefault(folder, {})
        missing = {n: e for n, e in listed.items() if n not in known or known[n][0] != e}
        if len(missing) >= WORTH:
            known.update(self._load(folder, missing))
            missing = {n: e for n, e in missing.items() if n not in known or known[n][0] != e}
        if missing:
            fresh = {n: (missing[n], receipt) for n, receipt in self._read_all(folder, missing)}
            known.update(fresh)
            if len(fresh) >= WORTH:
                self._save(folder, fresh)
        return {name: known[name][1] for name in listed}

    def _read_all(self, folder: str, names: Iterable[str]) -> list[tuple[str, Receipt]]:
        def one(name: str) -> tuple[str, Receipt]:
            path = f"{folder}/{name}"
            return name, Receipt.from_json(self._store.read(path), f"{self._store.url}/{path}")

        return self._store.map(one, names)

    # -- the file -------------------------------------------------------------------------------------

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection | None]:
        """The database, or None where there can be none; what goes wrong with it ends the block and no more."""
        database = self._connect()
        try:
            yield database
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            self._give_up(error)
        finally:
            if database is not None:
                database.close()

    def _connect(self) -> sqlite3.Connection | None:
        if self._file is None:
            return None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            database = sqlite3.connect(self._file, timeout=_WAIT_S)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return None
        try:
            database.executescript(_TABLES)
        except sqlite3.Error as error:
            database.close()
            self._give_up(error)
            return None
        return database

    def _give_up(self, error: Exception) -> None:
        """Work without; a file that is no database (any more) makes room for a new one."""
        _say(f"{self._file}: {error}")
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            try:
                assert self._file is not None
                self._file.unlink(missing_ok=True)
            except OSError as second:
                _say(str(second))
        self._file = None

    def _load(self, folder: str, wanted: Mapping[str, Entry]) -> Known:
        found: Known = {}
        with self._open() as database:
            if database is None:
                return {}
            query = "SELECT file, size, stamp, shared, body, sum FROM receipts WHERE folder = ?"
            shared: dict[int, Any] = {}
            for file, size, stamp, common, body, checksum in database.execute(query, (folder,)):
                entry = wanted.get(file)
                if entry is None or entry.size != size or entry.stamp != stamp:
                    continue
                if common not in shared:
                    shared[common] = _shared_of(database, common)
                if shared[common] is not None and zlib.crc32(body.encode()) == checksum:
                    own = dict(zip(_OWN, json.loads(body), strict=True))
                    found[file] = entry, Receipt(**shared[common], **own)
        return found

    def _save(self, folder: str, fresh: Known) -> None:
        with self._open() as database:
            if database is None:
                return
            with database:
                ids: dict[str, int] = {}
                rows = []
                for file, (entry, receipt) in fresh.items():
                    common = canonical({name: getattr(receipt, name) for name in _SHARED})
                    if common not in ids:
                        ids[common] = _shared_id(database, common)
                    body = json.dumps([getattr(receipt, name) for name in _OWN], separators=(",", ":"))
                    checksum = zlib.crc32(body.encode())
                    rows.append((folder, file, entry.size, entry.stamp, ids[common], body, checksum))
                database.executemany("INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _shared_of(database: sqlite3.Connection, number: int) -> dict[str, Any] | None:
    row = database.execute("SELECT digest, body FROM shared WHERE id = ?", (number,)).fetchone()
    return dict(json.loads(row[1])) if row is not None and sha256(row[1]) == row[0] else None


def _shared_id(database: sqlite3.Connection, body: str) -> int:
    digest = sha256(body)
    database.execute("INSERT OR IGNORE INTO shared (digest, body) VALUES (?, ?)", (digest, body))
    return int(database.execute("SELECT id FROM shared WHERE digest = ?", (digest,)).fetchone()[0])


def _say(why: str) -> None:
    """Once per reason."""
    if why not in _said:
        _said.add(why)
        _log.debug("no cache of receipts: %s", why)
