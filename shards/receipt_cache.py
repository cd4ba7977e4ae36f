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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
            fresh, shared = self._read_all(folder, missing)
            known.update(fresh)
            if len(fresh) >= WORTH:
                self._save(folder, fresh, shared)
        return {name: known[name][1] for name in listed}

    def _read_all(self, folder: str, listed: Mapping[str, Entry]) -> tuple[Known, dict[str, str]]:
        """The receipts from storage, and by file name the text of the parts that it shares with others."""

        def one(name: str) -> Receipt:
            path = f"{folder}/{name}"
            return Receipt.from_json(self._store.read(path), f"{self._store.url}/{path}")

        fresh: Known = {}
        texts: dict[str, str] = {}
        first: dict[str, Receipt] = {}
        for name, receipt in zip(listed, self._store.map(one, listed), strict=True):
            text = json.dumps([getattr(receipt, part) for part in _SHARED], sort_keys=True)
            like = first.setdefault(text, receipt)
            if like is not receipt:
                receipt = replace(receipt, **{part: getattr(like, part) for part in _SHARED})
            fresh[name], texts[name] = (listed[name], receipt), text
        return fresh, texts

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
            rows = [
                row
                for row in database.execute(query, (folder,))
                if (e := wanted.get(row[0])) is not None
                and (e.size, e.stamp) == row[1:3]
                and zlib.crc32(row[4].encode()) == row[5]
            ]
            shared = {number: _shared_of(database, number) for number in {row[3] for row in rows}}
            bodies = json.loads(f"[{','.join([row[4] for row in rows])}]")  # one text is quicker than many
            for row, body in zip(rows, bodies, strict=True):
                common = shared[row[3]]
                if common is not None:
                    own = dict(zip(_OWN, body, strict=True))
                    found[row[0]] = wanted[row[0]], Receipt(**common, **own)
        return found

    def _save(self, folder: str, fresh: Known, shared: Mapping[str, str]) -> None:
        with self._open() as database:
            if database is None:
                return
            with database:
                ids = {text: _shared_id(database, text) for text in set(shared.values())}
                rows = []
                for file, (entry, receipt) in fresh.items():
                    body = json.dumps([getattr(receipt, name) for name in _OWN], separators=(",", ":"))
                    checksum = zlib.crc32(body.encode())
                    rows.append((folder, file, entry.size, entry.stamp, ids[shared[file]], body, checksum))
                database.executemany("INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _shared_of(database: sqlite3.Connection, number: int) -> dict[str, Any] | None:
    row = database.execute("SELECT digest, body FROM shared WHERE id = ?", (number,)).fetchone()
    if row is None or sha256(row[1]) != row[0]:
        return None
    return dict(zip(_SHARED, json.loads(row[1]), strict=True))


def _shared_id(database: sqlite3.Connection, body: str) -> int:
    digest = sha256(body)
    database.execute("INSERT OR IGNORE INTO shared (digest, body) VALUES (?, ?)", (digest, body))
    return int(database.execute("SELECT id FROM shared WHERE digest = ?", (digest,)).fetchone()[0])


def _say(why: str) -> None:
    """Once per reason."""
    if why not in _said:
        _said.add(why)
        _log.debug("no cache of receipts: %s", why)
