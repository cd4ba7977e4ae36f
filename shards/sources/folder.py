"""The source ``folder``: photographs at any depth of a folder, local or on any fsspec URL.

A key is the relative path without its ending. Captions come from ``photo.txt`` beside ``photo.jpg`` (one on each
line), or from one table for all: CSV, JSONL or Parquet, with a row per caption or a list of captions per row.
Hidden files are passed over, and so are links that lead out of the folder or to another folder.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from fourmill.errors import ConfigError, SourceError
from fourmill.shards.decode import MAX_BYTES, RejectedImage
from fourmill.shards.listing import Root, SourceFile, files_digest, reported, valid_text
from fourmill.shards.sources.base import RawSample, Row, Source, register

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".avif"
)  # fmt: skip
PORTION_ROWS = 32  # files that are requested at once
MAX_TEXT_BYTES = 1 << 20  # of one caption file
TABLE_ENDINGS = (".csv", ".jsonl", ".parquet")
_FILE_COLUMNS = ("file", "file_name", "filename", "path", "image", "key")
_CAPTION_COLUMNS = ("caption", "captions", "text")


@register("folder")
class Folder(Source):
    """Options: ``path`` or ``url``; ``captions`` (None: same-named .txt; a table, relative to the folder or a URL);
    ``file_column`` and ``caption_column`` of that table (None: the first usual name that it has); ``extensions``.
    """

    options: ClassVar[Mapping[str, Any]] = {
        "path": None,
        "url": None,
        "captions": None,
        "file_column": None,
        "caption_column": None,
        "extensions": IMAGE_ENDINGS,
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if (options["path"] is None) == (options["url"] is None):
            raise ConfigError("source.path: give the folder as `path` or as `url`, and only one of them")
        self.url = str(options["path"] if options["url"] is None else options["url"])
        self.extensions = _endings(options["extensions"])
        self.table = options["captions"]
        if self.table is not None and not str(self.table).lower().endswith(TABLE_ENDINGS):
            raise ConfigError(f"source.captions: {self.table!r} is not a {', '.join(TABLE_ENDINGS)} table")
        self._root = Root(self.url)
        if self._root.pattern:
            raise ConfigError(f"source.path: {self.url}: a folder, without braces or stars")
        self._captions: dict[str, list[str]] | None = None

    def identity(self) -> dict[str, Any]:
        given = {"captions": self.table, "extensions": sorted(self.extensions)}
        columns = {name: self.given[name] for name in ("file_column", "caption_column")}
        return {"kind": "folder", "url": self.url, **given, **columns}

    def digest(self) -> str:
        texts = () if self.table else (".txt",)
        files = self._files(self.extensions + texts)
        table = None
        if self.table:
            with reported(str(self.table)):
                fs, path = self._table_place()
                info = fs.info(path)
                table = [info.get("size"), info.get("ETag", "")]
        return files_digest(files, table)

    def rows(self) -> Iterator[Row]:
        texts = () if self.table else (".txt",)
        files = self._files(self.extensions + texts)
        images = [file for file in files if file.name.lower().endswith(self.extensions)]
        images.sort(key=lambda file: (file.name.rpartition(".")[0], file.name))
        if not images:
            raise SourceError(
                f"source {self.url}: no image there (looked for {', '.join(self.extensions)} at any depth)"
            )
        texts_bytes = {file.name: file.size for file in files if file.name.endswith(".txt")}
        for file in images:
            stem = file.name.rpartition(".")[0]
            place: dict[str, Any] = {"file": file.name, "bytes": file.size}
            if texts_bytes.get(f"{stem}.txt"):
                place["text_bytes"] = texts_bytes[f"{stem}.txt"]
            yield Row(valid_text(stem), json.dumps(place))

    def read(self, rows: Sequence[Row]) -> Iterator[RawSample | Exception]:
        if self.table is not None and self._captions is None:
            self._captions = self._load_table()
        for part in _portions([(row, json.loads(row.position)) for row in rows]):
            wanted: dict[str, int] = {}  # one byte more than there was: a file that has grown is noticed
            for _, place in part:
                if 0 < place["bytes"] <= MAX_BYTES:
                    wanted[place["file"]] = place["bytes"] + 1
                if place.get("text_bytes"):
                    wanted[_beside(place["file"])] = min(place["text_bytes"], MAX_TEXT_BYTES)
            found = self._read_files(wanted)
            for row, place in part:
                yield self._sample(row, place, found)

    def _sample(
        self, row: Row, place: Mapping[str, Any], found: Mapping[str, bytes]
    ) -> RawSample | Exception:
        name, size = place["file"], place["bytes"]
        if size > MAX_BYTES:
            return RejectedImage("too large", f"{size} bytes; the limit is {MAX_BYTES}")
        image = found.get(name, b"")
        if len(image) != size:
            raise SourceError(
                f"source {self.url}: {name} had {size} bytes when it was listed, and has fewer or more now; "
                "restore it, or give the new one another name"
            )
        if self.table is not None:
            captions = self._captions or {}
            return RawSample(image, tuple(captions.get(valid_text(name)) or captions.get(row.key) or ()))
        lines = found.get(_beside(name), b"").decode("utf-8-sig", "replace").splitlines()
        return RawSample(image, tuple(line.strip() for line in lines if line.strip()))

    # -- files ----------------------------------------------------------------------------------------

    def _files(self, endings: tuple[str, ...]) -> list[SourceFile]:
        with reported(self.url):
            self._root.fs.invalidate_cache()
            return self._root.list_folder(self._root.folder, endings)

    def _read_files(self, wanted: Mapping[str, int]) -> dict[str, bytes]:
        """The first bytes of files of this source. I/O errors are raised as they are."""
        paths = [self._root.path(name) for name in wanted]
        if not self._root.is_local:  # all requests at once
            found = self._root.fs.cat_ranges(paths, [0] * len(paths), list(wanted.values()), on_error="raise")
            return dict(zip(wanted, map(bytes, found), strict=True))
        local: dict[str, bytes] = {}
        inside = os.path.realpath(self._root.folder) + os.sep
        folders = {
            folder: os.path.realpath(folder) + os.sep for folder in {os.path.dirname(p) for p in paths}
        }
        for (name, most), path in zip(wanted.items(), paths, strict=True):
            real = os.path.realpath(path) if os.path.islink(path) else folders[os.path.dirname(path)]
            if not real.startswith(inside):
                raise SourceError(f"source {self.url}: {name} leads out of the folder")
            with open(path, "rb") as stream:
                local[name] = stream.read(most)
        return local

    # -- captions -------------------------------------------------------------------------------------

    def _table_place(self) -> tuple[Any, str]:
        text = str(self.table)
        if "://" in text or text.startswith("/"):
            place = Root(text, TABLE_ENDINGS)
            return place.fs, place.path(place.pattern)
        return self._root.fs, self._root.path(text)

    def _load_table(self) -> dict[str, list[str]]:
        """Captions by file name (or key), in the table's order."""
        fs, path = self._table_place()
        records = _records(bytes(fs.cat_file(path)), path.lower(), str(self.table))
        file_column = self._column("file_column", _FILE_COLUMNS, records)
        caption_column = self._column("caption_column", _CAPTION_COLUMNS, records)
        found: dict[str, list[str]] = {}
        for record in records:
            cell = record.get(caption_column)
            texts = cell if isinstance(cell, list) else [cell]
            found.setdefault(str(record.get(file_column)), []).extend(str(t) for t in texts if t is not None)
        return found

    def _column(self, option: str, usual: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
        present = list(records[0]) if records else []
        wanted = [self.given[option]] if self.given[option] else list(usual)
        for name in wanted:
            if name in present:
                return str(name)
        raise SourceError(
            f"caption table {self.table}: no column {' or '.join(map(repr, wanted))}; it has "
            f"{', '.join(map(repr, present)) or 'no rows'}; set source.{option}"
        )


def _beside(name: str) -> str:
    return f"{name.rpartition('.')[0]}.txt"


def _portions(rows: Sequence[tuple[Row, dict[str, Any]]]) -> Iterator[list[tuple[Row, dict[str, Any]]]]:
    """Runs of rows that are fetched together and fit in memory."""
    part: list[tuple[Row, dict[str, Any]]] = []
    size = 0
    for row, place in rows:
        if part and (len(part) == PORTION_ROWS or size + place["bytes"] > MAX_BYTES):
            yield part
            part, size = [], 0
        part.append((row, place))
        size += place["bytes"]
    if part:
        yield part


def _endings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(ending, str) and ending for ending in value) or not value:
        raise ConfigError(f"source.extensions: expected a list such as [.jpg, .png], got {value!r}")
    return tuple(f".{ending.lower().lstrip('.')}" for ending in value)


def _records(data: bytes, path: str, table: str) -> list[dict[str, Any]]:
    """The rows of a caption table."""
    try:
        if path.endswith(".parquet"):
            return list(pq.read_table(pa.BufferReader(data)).to_pylist())
        text = data.decode("utf-8-sig")
        if path.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text, newline="")))
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        raise SourceError(f"caption table {table} cannot be read: {error}") from error
    if not all(isinstance(record, dict) for record in records):
        raise SourceError(f"caption table {table} cannot be read: each line must be a JSON object")
    return records
