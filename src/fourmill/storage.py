"""Files on any fsspec URL, with the two writes that the commit protocol needs.

``put`` makes a whole file visible at once; ``put_if_absent`` does so only if nothing has that name,
whoever else is writing. Locally that is a temporary file, fsync and a hard link; on S3 a conditional
put (If-None-Match). No file is ever seen half written, and a listing never shows a temporary name.
"""

from __future__ import annotations

import inspect
import os
import secrets
import threading
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from fourmill.errors import DatasetError

_MEMORY_LOCK = threading.Lock()


class Store:
    """A folder on a file system. Paths are relative, with forward slashes. Pickles as its URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or url
        try:
            self.fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise DatasetError(f"cannot open storage {url!r}: {error}") from error
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._lists_by_prefix = "prefix" in inspect.signature(self.fs.find).parameters
        if not self.is_local:
            self.fs.use_listings_cache = False

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def path(self, name: str) -> str:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise DatasetError(f"{name!r} is not a path inside {self.url}")
        return f"{self.root}/{name}" if name else self.root

    def local_path(self, name: str) -> Path | None:
        """The file's path on this machine, to be memory-mapped; None on remote storage."""
        return Path(self.path(name)) if self.is_local else None

    def exists(self, name: str) -> bool:
        if not self.is_local:
            self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except FileNotFoundError as error:
            raise DatasetError(f"{self.url}/{name} is missing") from error

    def read_if_exists(self, name: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except FileNotFoundError:
            return None

    def names(self, folder: str, prefix: str = "") -> list[str]:
        """Sorted names of the files and folders directly in ``folder``; [] where it does not exist.

        With a ``prefix`` only those that begin with it; object stores then list no others.
        """
        try:
            entries = self._local_names(folder) if self.is_local else self._remote_names(folder, prefix)
        except FileNotFoundError:
            return []
        return sorted(name for name in entries if _is_shown(name) and name.startswith(prefix))

    def _local_names(self, folder: str) -> list[str]:
        return os.listdir(self.path(folder))

    def _remote_names(self, folder: str, prefix: str) -> list[str]:
        self.fs.invalidate_cache()
        if prefix and self._lists_by_prefix:
            found = self.fs.find(self.path(folder), prefix=prefix, maxdepth=1, withdirs=True)
        else:
            found = self.fs.ls(self.path(folder), detail=False)
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]

    def size(self, name: str) -> int:
        return int(self.fs.size(self.path(name)))

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file, replacing what was there (reports, cards; never data or receipts)."""
        if self.is_local:
            temporary = self._temporary(name, data)
            os.replace(temporary, self.path(name))
            _sync_folder(Path(self.path(name)).parent)
        else:
            self.fs.pipe_file(self.path(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a whole file unless the name is taken. True if this call's bytes are what is there now."""
        target = self.path(name)
        if self.is_local:
            temporary = self._temporary(name, data)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return self.read(name) == data
            finally:
                os.unlink(temporary)
            _sync_folder(Path(target).parent)
            return True
        if isinstance(self.fs, MemoryFileSystem):
            with _MEMORY_LOCK:
                if self.fs.exists(target):
                    return self.read(name) == data
                self.fs.pipe_file(target, data)
                return True
        try:
            self.fs.pipe_file(target, data, mode="create")
        except FileExistsError:
            return self.read(name) == data  # a retried request may have met its own first attempt
        finally:
            self.fs.invalidate_cache()
        return True

    def remove(self, name: str) -> None:
        self.fs.rm_file(self.path(name))

    def probe_conditional_put(self) -> bool:
        """Whether the store really refuses a second conditional put of one name."""
        name = f".probe-{secrets.token_hex(8)}"
        try:
            return self.put_if_absent(name, b"first") and not self.put_if_absent(name, b"second")
        finally:
            if self.fs.exists(self.path(name)):
                self.remove(name)

    def _temporary(self, name: str, data: bytes) -> str:
        """Write and fsync ``data`` beside its final place, under a hidden name."""
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = str(final.parent / f".{final.name}.{secrets.token_hex(6)}.tmp")
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return temporary


def _is_shown(name: str) -> bool:
    """Temporary and probe files are hidden."""
    return bool(name) and not name.startswith(".")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
