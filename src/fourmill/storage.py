"""Files on any fsspec URL, with the two writes that the commit protocol needs.

``put`` makes a whole file visible at once; ``put_if_absent`` does so only if nothing has that name,
whoever else is writing. Locally that is a temporary file, fsync and a hard link; on S3 a conditional
put (If-None-Match). No file is ever seen half written, and a listing never shows a temporary name.

Listings and reads of remote storage bypass every cache, and what meets bad luck there is tried again (`retries`).
"""

from __future__ import annotations

import inspect
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from fourmill.errors import DatasetError
from fourmill.retries import http_status, with_retries

A = TypeVar("A")
T = TypeVar("T")

PRECONDITION_FAILED = 412
PART_BYTES = 8 << 20  # per request
_MEMORY_LOCK = threading.Lock()
_CONNECTIONS = 32  # at a time
_OLD_S = 86_400.0  # an object is not written again to look younger than this
_CLAIMS = 3  # of a name that is taken when it is written and free when it is read


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a listing: its size, when it was written (seconds, by the store's clock), and a text that is another
    one whenever the file is."""

    size: int
    modified: float
    stamp: str


class Store:
    """A folder on a file system. Paths are relative, with forward slashes. Pickles as its URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or url
        try:
            self.fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise DatasetError(f"cannot open storage {url!r}: {error}") from error
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.is_remote = not isinstance(self.fs, LocalFileSystem | MemoryFileSystem)
        self._reads_in_parts = "max_concurrency" in inspect.signature(self.fs.cat_file).parameters
        self._lists_by_prefix = "prefix" in inspect.signature(self.fs.find).parameters

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def path(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise DatasetError(f"{name!r} is not a path inside {self.url}")
        return f"{self.root}/{name}" if name else self.root

    def local_path(self, name: str) -> Path | None:
        """The file's path on this machine, to be memory-mapped; None on remote storage."""
        return Path(self.path(name)) if self.is_local else None

    # -- reading --------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        if self.is_local:
            return os.path.exists(self.path(name))
        return bool(self._try(lambda: self.fs.exists(self.path(name)), name))

    def read(self, name: str) -> bytes:
        data = self.read_if_exists(name)
        if data is None:
            raise DatasetError(f"{self.url}/{name} is missing")
        return data

    def read_if_exists(self, name: str) -> bytes | None:
        try:
            if self.is_local:
                with open(self.path(name), "rb") as stream:
                    return stream.read()
            # s3fs asks for the size of every file first, to read a large one in parts: not for receipts
            whole = {"max_concurrency": 1} if self._reads_in_parts and name.endswith(".json") else {}
            return bytes(self._try(lambda: self.fs.cat_file(self.path(name), **whole), name))
        except FileNotFoundError:
            return None

    def parts(self, name: str, size: int) -> Iterator[bytes]:
        """The first ``size`` bytes of a file, some megabytes at a time. FileNotFoundError where there is no such file."""
        path = self.path(name)
        if self.is_local:
            with open(path, "rb") as stream:
                while size > 0 and (data := stream.read(min(size, PART_BYTES))):
                    size -= len(data)
                    yield data
            return
        for start in range(0, size, PART_BYTES):
            end = min(start + PART_BYTES, size)
            yield bytes(self._try(partial(self.fs.cat_file, path, start=start, end=end), name))

    def size(self, name: str) -> int:
        return self.entry(name).size

    def entry(self, name: str) -> Entry:
        """FileNotFoundError where there is no such file."""
        if self.is_local:
            return _local_entry(os.stat(self.path(name)))
        return _remote_entry(self._try(lambda: self.fs.info(self.path(name)), name))

    def now(self) -> float:
        """The store's own time (seconds): when it says that something was written just now."""
        name = f".clock-{secrets.token_hex(8)}"
        self.put(name, b"")
        try:
            return self.entry(name).modified
        finally:
            self.remove(name)

    # -- listing --------------------------------------------------------------------------------------

    def names(self, folder: str, prefix: str = "") -> list[str]:
        """Sorted names of the files and folders directly in ``folder``; [] where it does not exist.

        With a ``prefix`` only those that begin with it; object stores then list no others.
        """
        try:
            entries = os.listdir(self.path(folder)) if self.is_local else self._remote_names(folder, prefix)
        except FileNotFoundError:
            return []
        return sorted([name for name in entries if name[:1] not in ("", ".") and name.startswith(prefix)])

    def _remote_names(self, folder: str, prefix: str) -> set[str]:
        path = self.path(folder)
        if prefix and self._lists_by_prefix:
            found = self._try(lambda: self.fs.find(path, prefix=prefix), folder)
        else:
            found = self._try(lambda: self.fs.ls(path, detail=False), folder)
        start = len(path.strip("/")) + 1
        return {str(name).strip("/")[start:].split("/")[0] for name in found}

    def entries(self, folder: str) -> dict[str, Entry]:
        """The files directly in ``folder``, by name; {} where it does not exist."""
        path = self.path(folder)
        try:
            if self.is_local:
                with os.scandir(path) as scan:
                    return {e.name: _local_entry(e.stat()) for e in scan if _is_shown(e.name) and e.is_file()}
            found = self._try(lambda: self.fs.ls(path, detail=True), folder)
        except FileNotFoundError:
            return {}
        files = {str(info["name"]).rsplit("/", 1)[-1]: info for info in found if info["type"] == "file"}
        return {name: _remote_entry(info) for name, info in files.items() if _is_shown(name)}

    def walk(self, folder: str) -> dict[str, Entry]:
        """Every file below ``folder``, hidden ones too, by its name in the store: one listing on object stores."""
        if self.is_local:
            return self._local_walk(folder)
        found = self._try(lambda: self.fs.find(self.path(folder), detail=True), folder)
        start = len(self.root) + 1
        return {str(path)[start:]: _remote_entry(info) for path, info in found.items()}

    def _local_walk(self, folder: str) -> dict[str, Entry]:
        found = {}
        for parent, _, files in os.walk(self.path(folder)):
            for file in files:
                path = f"{parent}/{file}"
                try:
                    found[path[len(self.root) + 1 :]] = _local_entry(os.lstat(path))
                except FileNotFoundError:
                    continue  # it was a temporary file
        return found

    # -- writing --------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file, replacing what was there (reports, cards; never data or receipts)."""
        if self.is_local:
            temporary = self._temporary(name, data)
            os.replace(temporary, self.path(name))
            _sync_folder(Path(self.path(name)).parent)
        else:
            self._try(lambda: self.fs.pipe_file(self.path(name), data), name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a whole file unless the name is taken. True if this call's bytes are what is there now."""
        return self.put_or_compare(name, data) != "other"

    def put_or_compare(self, name: str, data: bytes) -> Literal["written", "same", "other"]:
        """Write a whole file unless the name is taken; in that case say whether its content is this one."""
        for _ in range(_CLAIMS):
            if self._claim(name, data):
                return "written"
            there = self.read_if_exists(name)
            if there is not None:  # a request that was tried again may have met its own first attempt
                return "same" if there == data else "other"
        raise DatasetError(
            f"{self.url}/{name} vanishes while it is written; is somebody removing files there?"
        )

    def refresh(self, name: str, data: bytes) -> None:
        """Make a file whose content is ``data`` as young as one that is written now."""
        if self.is_local:
            os.utime(self.path(name))
        elif time.time() - self.entry(name).modified > _OLD_S:
            self.put(name, data)

    def _claim(self, name: str, data: bytes) -> bool:
        """False: the name is taken."""
        target = self.path(name)
        if self.is_local:
            return self._link(name, data)
        if not self.is_remote:
            with _MEMORY_LOCK:
                if self.fs.exists(target):
                    return False
                self.fs.pipe_file(target, data)
                return True
        try:
            self._try(lambda: self.fs.pipe_file(target, data, mode="create"), name)
        except FileExistsError:
            return False
        except OSError as error:  # as which some stores' 412 arrives
            if http_status(error) == PRECONDITION_FAILED:
                return False
            raise
        return True

    def _link(self, name: str, data: bytes) -> bool:
        temporary = self._temporary(name, data)
        try:
            os.link(temporary, self.path(name))
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        _sync_folder(Path(self.path(name)).parent)
        return True

    def remove(self, name: str) -> None:
        """FileNotFoundError where there is none (object stores may say nothing)."""
        self._try(lambda: self.fs.rm_file(self.path(name)), name)

    def move(self, name: str, to: str) -> bool:
        """Give a file another name in this store; False where there is none. On remote storage it is copied first."""
        if self.is_local:
            Path(self.path(to)).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(self.path(name), self.path(to))
            except FileNotFoundError:
                return False
            _sync_folder(Path(self.path(to)).parent)
            _sync_folder(Path(self.path(name)).parent)
            return True
        data = self.read_if_exists(name)
        if data is None:
            return False
        self.put(to, data)
        self.remove(name)
        return True

    def probe_conditional_put(self) -> bool:
        """Whether the store really refuses a second conditional put of one name."""
        name = f".probe-{secrets.token_hex(8)}"
        try:
            return self.put_if_absent(name, b"first") and not self.put_if_absent(name, b"second")
        finally:
            if self.exists(name):
                self.remove(name)

    def map(self, call: Callable[[A], T], items: Iterable[A]) -> list[T]:
        """``call`` of each item, in order; on remote storage many at a time."""
        if not self.is_remote:
            return [call(item) for item in items]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return list(pool.map(call, items))

    def _try(self, call: Callable[[], T], name: str) -> T:
        return with_retries(call, f"{self.url}/{name}") if self.is_remote else call()

    def _temporary(self, name: str, data: bytes) -> str:
        """Write and fsync ``data`` beside its final place, under a hidden name."""
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = str(final.parent / f".{final.name}.{secrets.token_hex(6)}.tmp")
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:  # such as a full disk, which must not stay full for our sake
            Path(temporary).unlink(missing_ok=True)
            raise
        return temporary


def _is_shown(name: str) -> bool:
    """Temporary and probe files are hidden."""
    return bool(name) and not name.startswith(".")


def _local_entry(stat: os.stat_result) -> Entry:
    return Entry(stat.st_size, stat.st_mtime, f"{stat.st_mtime_ns}-{stat.st_ino}")


def _remote_entry(info: Mapping[str, Any]) -> Entry:
    """From what fsspec's file systems say of a file, each in its own words."""
    when = next(
        (
            info[key]
            for key in ("LastModified", "mtime", "updated", "created", "last_modified")
            if info.get(key)
        ),
        0,
    )
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    modified = when.timestamp() if isinstance(when, datetime) else float(when)
    tag = next((str(info[key]) for key in ("ETag", "etag", "md5Hash", "generation") if info.get(key)), "")
    exact = (
        "" if tag else modified
    )  # with a tag to the second: listings know fractions, single answers do not
    return Entry(int(info["size"] or 0), modified, f"{exact or int(modified)}-{tag}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
