"""Listing the files of a source on any fsspec URL, and reading parts of them.

A file's *name* is its path below the part of the URL that is fixed (up to the last slash before the first brace or
star), so that it stays the same wherever the collection is mounted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from fourmill.errors import ConfigError, FourmillError, SourceError

MAX_FILES = 1_000_000  # of one brace expression


@dataclass(frozen=True, slots=True)
class SourceFile:
    """``name``: see above; ``path``: for the file system; ``etag``: "" where the store has none."""

    name: str
    path: str
    size: int
    etag: str


class Root:
    """The fixed part of a source's URL: a file system and a folder on it. Pickles as the URL."""

    def __init__(self, url: str, endings: Sequence[str] = ()) -> None:
        """A URL without braces or stars that ends in one of ``endings`` is one file, any other a folder."""
        if not isinstance(url, str) or not url.strip():
            raise ConfigError(f"source.url: expected a path or URL, got {url!r}")
        self.url = url
        self.endings = tuple(endings)
        self.fixed, self.pattern = _split_url(url, self.endings)
        try:
            self.fs, folder = fsspec.core.url_to_fs(self.fixed)
        except (ValueError, ImportError) as error:
            raise SourceError(f"source {url}: cannot be opened: {error}") from error
        self.folder = str(folder).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def __reduce__(self) -> tuple[type[Root], tuple[str, tuple[str, ...]]]:
        return Root, (self.url, self.endings)

    def path(self, name: str) -> str:
        """The path of a name that this source gave out; names that lead elsewhere are refused."""
        if not name or name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
            raise SourceError(f"source {self.url}: {name!r} is not a file of this source")
        return f"{self.folder}/{name}"

    def size(self, path: str) -> int:
        """The file's size in bytes now, whatever an earlier listing said."""
        if not self.is_local:
            self.fs.invalidate_cache()
        return int(self.fs.size(path))

    def files(self, what: str) -> list[SourceFile]:
        """The files that the URL stands for: those of a brace or star expression, one file, or all in a folder.

        Raises SourceError where one that the braces name is missing, or there is none at all.
        """
        with reported(self.url):
            self.fs.invalidate_cache()
            files = self._expand()
        if not files:
            raise SourceError(f"source {self.url}: no {what} there (looked for {', '.join(self.endings)})")
        return files

    def list_folder(self, folder: str, endings: Sequence[str]) -> list[SourceFile]:
        """Every file at any depth whose name ends so (lower case), hidden ones left out, sorted by name."""
        found = self._walk(folder, endings) if self.is_local else self._find(folder, endings)
        return sorted(found, key=lambda file: file.name)

    def _expand(self) -> list[SourceFile]:
        if "{" in self.pattern or "*" in self.pattern:
            names = [match for name in _braces(self.url, self.pattern) for match in self._glob(name)]
            return self._listed(list(dict.fromkeys(names)))
        whole = f"{self.folder}/{self.pattern}" if self.pattern else self.folder
        if self.fs.isdir(whole):
            return self.list_folder(whole, self.endings)
        if not self.pattern and self.fs.exists(whole):
            raise SourceError(
                f"source {self.url}: is neither a folder nor a {' or '.join(self.endings)} file"
            )
        if not self.pattern:
            raise FileNotFoundError(self.url)
        return self._listed([self.pattern])

    def _glob(self, name: str) -> list[str]:
        if "*" not in name:
            return [name]
        return sorted(str(path)[len(self.folder) + 1 :] for path in self.fs.glob(f"{self.folder}/{name}"))

    def _listed(self, names: Sequence[str]) -> list[SourceFile]:
        """Size and etag of each, one listing per folder where the store can list."""
        known: dict[str, dict[str, Any]] = {}
        for parent in sorted({self.path(name).rpartition("/")[0] for name in names}):
            try:
                entries = self.fs.ls(parent, detail=True)
            except (FileNotFoundError, NotADirectoryError, NotImplementedError):
                continue
            known |= {str(entry["name"]): entry for entry in entries}
        files, missing = [], []
        for name in names:
            info = known.get(self.path(name)) or self._info(self.path(name))
            if info is None or info.get("type") == "directory":
                missing.append(name)
            else:
                files.append(_file(name, self.path(name), info))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SourceError(
                f"source {self.url}: {missing[0]} is missing{more}; correct the URL or restore it"
            )
        return files

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            return dict(self.fs.info(path))
        except FileNotFoundError:
            return None

    def _find(self, folder: str, endings: Sequence[str]) -> Iterable[SourceFile]:
        for path, info in self.fs.find(folder, detail=True).items():
            name = str(path)[len(self.folder) + 1 :]
            parts = str(path)[len(folder) :].split("/")
            if name.lower().endswith(tuple(endings)) and not any(part.startswith(".") for part in parts):
                yield _file(name, str(path), info)

    def _walk(self, folder: str, endings: Sequence[str]) -> Iterable[SourceFile]:
        """Links to files inside the folder count as files; links to folders and out of the folder are passed over."""
        inside = os.path.realpath(folder) + os.sep
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = os.path.join(parent, name)
                if name.startswith(".") or not name.lower().endswith(tuple(endings)):
                    continue
                if os.path.islink(path) and not os.path.realpath(path).startswith(inside):
                    continue
                if os.path.isfile(path):
                    yield SourceFile(path[len(self.folder) + 1 :], path, os.path.getsize(path), "")


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def reported(url: str) -> Iterator[None]:
    """What goes wrong while a source is listed, as one SourceError that names the URL."""
    try:
        yield
    except FourmillError:
        raise
    except FileNotFoundError as error:
        raise SourceError(f"source {url}: {error.filename or error} does not exist") from error
    except Exception as error:  # each kind of storage has errors of its own
        raise SourceError(f"source {url}: cannot be listed: {type(error).__name__}: {error}") from error


def _split_url(url: str, endings: tuple[str, ...]) -> tuple[str, str]:
    """(fixed folder, rest): the rest begins with the first path part that has a brace or a star, or is a file."""
    wild = re.search(r"[{*]", url)
    if wild is None and not (endings and url.lower().endswith(endings)):
        return url.rstrip("/") or url, ""
    slash = url.rfind("/", 0, wild.start() if wild else len(url))
    if slash <= url.find("://") + 2 and "://" in url:
        raise ConfigError(f"source.url: {url}: braces and stars can't stand for the bucket or host")
    return (url[:slash] or "/", url[slash + 1 :]) if slash >= 0 else (".", url)


def _braces(url: str, pattern: str) -> list[str]:
    count = 1  # braceexpand builds a whole range before it returns the first name
    for first, last, step in re.findall(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", pattern):
        count *= abs(int(last) - int(first)) // max(1, int(step or 1)) + 1
    try:
        names = list(islice(braceexpand(pattern), MAX_FILES + 1)) if count <= MAX_FILES else []
    except ValueError as error:
        raise ConfigError(f"source.url: {url}: {error}") from error
    if not 0 < len(names) <= MAX_FILES:
        raise ConfigError(f"source.url: {url} stands for more than {MAX_FILES} files")
    return names


def _file(name: str, path: str, info: dict[str, Any]) -> SourceFile:
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("content_md5") or ""
    return SourceFile(name, path, int(info.get("size") or 0), str(etag).strip('"'))


def files_digest(files: Iterable[SourceFile], extra: object = None) -> str:
    """sha256 (hex) over names, sizes and etags, and ``extra`` (JSON)."""
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for file in files:
        digest.update(json.dumps([file.name, file.size, file.etag]).encode())
    return digest.hexdigest()


def valid_text(text: str) -> str:
    """A name as valid Unicode: bytes that are not UTF-8 are spelled out as \\xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
