"""Listing the files of a source on any fsspec URL, and reading parts of them.

A file's *name* is its path below the part of the URL that is fixed (up to the last slash before the first brace or
star), so that it stays the same wherever the collection is mounted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand
from fsspec.implementations.local import LocalFileSystem

from fourmill.errors import ConfigError, SourceError

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

    def __init__(self, url: str) -> None:
        if not isinstance(url, str) or not url.strip():
            raise ConfigError(f"source.url: expected a path or URL, got {url!r}")
        self.url = url
        self.fixed, self.pattern = _split_url(url)
        try:
            self.fs, folder = fsspec.core.url_to_fs(self.fixed)
        except (ValueError, ImportError) as error:
            raise SourceError(f"source {url}: cannot be opened: {error}") from error
        self.folder = str(folder).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def __reduce__(self) -> tuple[type[Root], tuple[str]]:
        return Root, (self.url,)

    def path(self, name: str) -> str:
        """The path of a name that this source gave out; names that lead elsewhere are refused."""
        if not name or name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
            raise SourceError(f"source {self.url}: {name!r} is not a file of this source")
        return f"{self.folder}/{name}"

    def list_folder(self, folder: str, endings: Sequence[str]) -> list[SourceFile]:
        """Every file at any depth whose name ends so (lower case), hidden ones left out, sorted by name."""
        if self.is_local:
            found: Iterable[SourceFile] = self._walk(folder, endings)
        else:
            found = self._find(folder, endings)
        return sorted(found, key=lambda file: file.name)

    def list_pattern(self, endings: Sequence[str], what: str) -> list[SourceFile]:
        """The files that the URL stands for: a brace or star expression, one file, or a folder of such files.

        Raises SourceError where a file that the braces name is missing, or there is none at all.
        """
        try:
            self.fs.invalidate_cache()
            files = self._expand(endings)
        except (SourceError, ConfigError):
            raise
        except Exception as error:  # each kind of storage has errors of its own
            raise SourceError(
                f"source {self.url}: cannot be listed: {type(error).__name__}: {error}"
            ) from error
        if not files:
            raise SourceError(f"source {self.url}: no {what} there (looked for {', '.join(endings)})")
        return files

    def _expand(self, endings: Sequence[str]) -> list[SourceFile]:
        if "{" in self.pattern:
            return self._listed(_braces(self.url, self.pattern))
        if "*" in self.pattern:
            paths = self.fs.glob(f"{self.folder}/{self.pattern}")
            return self._listed(sorted(str(path)[len(self.folder) + 1 :] for path in paths))
        whole = f"{self.folder}/{self.pattern}" if self.pattern else self.folder
        if self.fs.isdir(whole):
            return self.list_folder(whole, endings)
        return self._listed([self.pattern])

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


def _split_url(url: str) -> tuple[str, str]:
    """(fixed folder, rest): the rest begins with the first path part that has a brace or a star."""
    wild = re.search(r"[{*]", url)
    if wild is None:
        return url.rstrip("/") or url, ""
    slash = url.rfind("/", 0, wild.start())
    return (url[:slash] or "/", url[slash + 1 :]) if slash >= 0 else (".", url)


def _braces(url: str, pattern: str) -> list[str]:
    names: list[str] = []
    try:
        for name in braceexpand(pattern):
            names.append(name)
            if len(names) > MAX_FILES:
                raise ConfigError(f"source.url: {url} stands for more than {MAX_FILES} files")
    except UnbalancedBracesError as error:
        raise ConfigError(f"source.url: {url}: {error}") from error
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
