"""Data files of a remote dataset on this machine's disk, up to a number of bytes: fetched once, verified once, memory-mapped.

    with FileCache(dataset.store, limit_bytes=100 << 30) as cache:
        cache.prefetch([(name, sha256), ...])      # what will be asked for soon
        table = cache.table(name, sha256)

A file here is named by the sha256 of its content and by nothing else, and has that name only when all of it is there and hashes
to it. Any number of processes of a machine may use one folder, with datasets as different as they like: each file is fetched
once. Whoever fetches holds a lock (flock) on ``<sha256>.part``, which the system lets go when its holder dies; the next one
takes the part over. Files that were not used for the longest time make room for new ones; those that somebody has mapped stay
readable to him. The cache is no state: any file in its folder may be removed at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Self

import pyarrow as pa

from fourmill.errors import ConfigError, DatasetError
from fourmill.shards.arrow import read_table
from fourmill.shards.receipt_cache import cache_folder
from fourmill.storage import Store

PART, LEDGER = ".part", ".bytes"
TOUCH_S = 60.0  # a use is noted at most so often
_DEAD_S = 600.0  # a part that nobody holds and that did not grow for so long; its holder might be on another machine
_SLACK = 0.1  # of the limit becomes free when there is no room, so that the folder is seldom listed
_TRIES = 3  # to map a file that others may push out between its arrival and that
_HASH = re.compile("[0-9a-f]{64}")
_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """`close` was called."""


class FileCache:
    """Files of ``store`` in ``folder`` ($XDG_CACHE_HOME/fourmill/shards by default). Pickles, and survives a fork, without its
    threads. ``prefetch`` runs at most ``threads`` downloads at a time."""

    def __init__(
        self, store: Store, limit_bytes: int, folder: Path | str | None = None, threads: int = 4
    ) -> None:
        if limit_bytes < 0 or threads < 1:
            raise ConfigError(
                f"a cache of {limit_bytes} bytes filled by {threads} threads; give at least 0 bytes and 1 thread"
            )
        self.store, self.limit_bytes, self.num_threads = store, limit_bytes, threads
        self.folder = Path(folder) if folder is not None else cache_folder() / "shards"
        self._start()
        _caches.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._waiting: dict[str, str] = {}  # name by hash, first come first
        self._threads: set[threading.Thread] = set()

    def __reduce__(self) -> tuple[type[FileCache], tuple[Store, int, Path, int]]:
        return FileCache, (self.store, self.limit_bytes, self.folder, self.num_threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget what was to be fetched ahead, and come back when no thread is left. Files can be asked for as before."""
        with self._lock:
            self._waiting.clear()
            threads = list(self._threads)
            self._stop.set()
        for thread in threads:
            thread.join()
        self._stop.clear()

    # -- what readers call ----------------------------------------------------------------------------

    def get(self, name: str, sha256: str) -> Path:
        """The path of the store's file ``name`` on this machine, fetched unless it is here.

        DatasetError where the store lacks it, where it does not hash to ``sha256``, or where this disk refuses it. Another
        process may push it out of the cache at any time: what is open or mapped by then stays so (see `table`).
        """
        final = self._final(sha256)
        with self._lock:
            self._waiting.pop(sha256, None)
        if not _use(final):
            self._fetch(name, final)
        return final

    def table(self, name: str, sha256: str) -> pa.Table:
        """The file as a memory-mapped Arrow table. A copy that this disk has lost or damaged since is fetched again."""
        for attempt in range(1, _TRIES + 1):
            path = self.get(name, sha256)
            try:
                return read_table(str(path), f"{self.store.url}/{name}")
            except DatasetError:
                if attempt == _TRIES:
                    raise
                path.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def prefetch(self, files: Iterable[tuple[str, str]]) -> None:
        """Begin to fetch (name, sha256) in this order, and come back at once. What goes wrong is said by `get`.

        Have less on its way than the limit: what nobody has read yet is pushed out like everything else.
        """
        wanted = {sha256: name for name, sha256 in files if not _use(self._final(sha256))}
        with self._lock:
            self._waiting.update(wanted)
            for _ in range(min(self.num_threads - len(self._threads), len(self._waiting))):
                thread = threading.Thread(target=self._fetch_ahead, name="fourmill-cache", daemon=True)
                self._threads.add(thread)
                thread.start()

    def _fetch_ahead(self) -> None:
        """A thread's life: until nothing is waiting."""
        while True:
            with self._lock:
                if not self._waiting or self._stop.is_set():
                    self._threads.discard(threading.current_thread())
                    return
                sha256 = next(iter(self._waiting))
                name = self._waiting.pop(sha256)
            try:
                self._fetch(name, self._final(sha256), ahead=True)
            except _Stopped:
                continue
            except Exception:  # noqa: BLE001 - whatever it is, `get` meets it again, and raises it
                _log.debug("%s/%s was not fetched ahead", self.store.url, name, exc_info=True)

    def _final(self, sha256: str) -> Path:
        if not _HASH.fullmatch(sha256):
            raise DatasetError(f"{sha256[:80]!r} is no sha256 of a file in {self.store.url}")
        return self.folder / sha256

    # -- downloads ------------------------------------------------------------------------------------

    def _fetch(self, name: str, final: Path, ahead: bool = False) -> None:
        """Returns when the file is there, or, with ``ahead``, when somebody else is at it."""
        part = final.with_name(final.name + PART)
        while True:
            with self._disk():
                self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(part, wait=not ahead) as stream:
                if stream is None:
                    return
                if _is_at(stream, part):  # else the part that we waited for was renamed, or removed
                    if final.exists():
                        part.unlink()
                    else:
                        self._download(name, stream, part, final, ahead)
                    return
            if final.exists():
                return

    def _download(self, name: str, stream: FileIO, part: Path, final: Path, ahead: bool) -> None:
        """Fill the part, whose lock we hold, and put it in place; nothing is left where that fails."""
        where = f"{self.store.url}/{name}"
        digest = hashlib.sha256()
        try:
            size = self.store.size(name)
            with self._disk():
                self._make_room(stream, size)
            for data in self.store.parts(name, size):
                if ahead and self._stop.is_set():
                    raise _Stopped
                digest.update(data)
                with self._disk():
                    _write(stream, data)
            if digest.hexdigest() != final.name:
                raise DatasetError(
                    f"{where} is damaged: its sha256 is {digest.hexdigest()}, wanted is {final.name}; "
                    "run `fourmill verify` on the dataset"
                )
            with self._disk():
                _touch(part)
                os.replace(part, final)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):
                raise DatasetError(f"{where} is missing; run `fourmill verify` on the dataset") from error
            raise

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Faults of this machine's disk, told from those of the store."""
        try:
            yield
        except OSError as error:
            raise DatasetError(
                f"the cache {self.folder} cannot be written: {error}; give it less, or another folder on a local disk"
            ) from error

    @contextmanager
    def _locked(self, path: Path, wait: bool = True) -> Iterator[FileIO | None]:
        """The file, open and locked; None where somebody else has it and we do not ``wait``."""
        with self._disk():
            stream = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        with stream:
            if not self._try_lock(stream, wait):
                yield None
                return
            _held.add(stream.fileno())
            try:
                yield stream
            finally:
                _held.discard(stream.fileno())
                fcntl.flock(
                    stream, fcntl.LOCK_UN
                )  # closing would not do: a forked child may have it open too

    def _try_lock(self, stream: FileIO, wait: bool) -> bool:
        try:
            with self._disk():
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except DatasetError as error:
            if isinstance(error.__cause__, BlockingIOError):
                return False
            raise
        return True

    # -- room -----------------------------------------------------------------------------------------

    def _make_room(self, stream: FileIO, size: int) -> None:
        """Give the part its ``size`` bytes, at the cost of the files that were not used for the longest time.

        The ledger says how much is here, or more than that, but never less; where it says too much, files are counted.
        """
        stream.seek(0)
        stream.truncate(0)
        with self._locked(self.folder / LEDGER) as ledger:
            assert ledger is not None
            text = ledger.read(32)
            used = int(text) if text.isdigit() else None
            if used is None or used + size > self.limit_bytes:
                used = self._evict(size)
            ledger.seek(0)
            ledger.truncate(0)
            _write(ledger, b"%d" % (used + size))
            stream.truncate(size)

    def _evict(self, size: int) -> int:
        """Remove the oldest files until there is room for ``size`` bytes; the bytes of those that stay."""
        files, total = self._listed()
        if total + size <= self.limit_bytes:
            return total
        goal = max(0, int(self.limit_bytes * (1 - _SLACK)) - size)
        for _, bytes_, path in sorted(files):
            if total <= goal:
                break
            path.unlink(missing_ok=True)
            total -= bytes_
        return total

    def _listed(self) -> tuple[list[tuple[int, int, Path]], int]:
        """Whole files as (last use in ns, bytes, path), and the bytes of all, parts too. Dead parts are removed."""
        files, total = [], 0
        with os.scandir(self.folder) as scan:
            for entry in scan:
                with suppress(FileNotFoundError):  # a part that was renamed or removed just now
                    stat, path = entry.stat(), self.folder / entry.name
                    if _HASH.fullmatch(entry.name):
                        files.append((stat.st_mtime_ns, stat.st_size, path))
                        total += stat.st_size
                    elif entry.name.endswith(PART) and not self._bury(path, stat.st_mtime):
                        total += stat.st_size
        return files, total

    def _bury(self, part: Path, modified: float) -> bool:
        """Remove a part whose download was killed long ago."""
        if time.time() - modified < _DEAD_S:
            return False
        with self._locked(part, wait=False) as stream:
            if stream is None or not _is_at(stream, part):
                return False
            part.unlink()
            return True


def _write(stream: FileIO, data: bytes) -> None:
    """All of it: without a buffer, of which closing would write what a full disk refused, a write may be a short one."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _use(path: Path) -> bool:
    """Note that a file is used; False where there is none. What else is wrong here is said when it is fetched."""
    try:
        if time.time() - path.stat().st_mtime >= TOUCH_S:
            with suppress(PermissionError):  # another user's file can be read all the same
                _touch(path)
    except OSError:
        return False
    return True


def _touch(path: Path) -> None:
    now = time.time_ns()  # the file system's own clock ticks some milliseconds apart
    os.utime(path, ns=(now, now))


def _is_at(stream: FileIO, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


# -- forks ------------------------------------------------------------------------------------------------

_caches: weakref.WeakSet[FileCache] = weakref.WeakSet()
_held: set[int] = set()  # file descriptors with a lock


def _after_fork() -> None:
    """The child has none of the threads, must not keep their locks alive, and needs connections of its own."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()
    for cache in _caches:
        cache._start()
        if cache.store.is_remote:
            cache.store = Store(cache.store.url)


os.register_at_fork(after_in_child=_after_fork)
