"""The source ``parquet``: images as bytes in a column, on any fsspec URL.

``url`` is a brace or star expression, one file, or a folder of files. The image column holds bytes, or the struct
``{bytes, path}`` that the Hugging Face datasets library writes (its path is never followed). Captions come from one
or several columns of strings or lists of strings. A key is the id column's value, or ``file/row`` without one.
Listing reads footers, and the id column if there is one; reading streams a row group in small batches and keeps its
place between calls, so that memory stays bounded whatever the size of a row group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from fourmill.errors import ConfigError, SourceError
from fourmill.shards.decode import RejectedImage
from fourmill.shards.listing import Root, SourceFile, files_digest, reported
from fourmill.shards.sources.base import RawSample, Row, Source, register

ENDINGS = (".parquet", ".pq")
BATCH_ROWS = 32


@register("parquet")
class Parquet(Source):
    """Options: ``url``; ``image`` (column); ``caption`` (a column or a list of them, None: ``caption`` or ``text`` if
    the files have it); ``id`` (column, None: keys are ``file/row``).
    """

    options: ClassVar[Mapping[str, Any]] = {"url": ..., "image": "image", "caption": None, "id": None}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.url = options["url"]
        self.image = str(options["image"])
        self.id = None if options["id"] is None else str(options["id"])
        self.captions = _names(options["caption"])
        self._root = Root(self.url, ENDINGS)
        self._cursor: _Cursor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursor": None}  # open files stay here

    def identity(self) -> dict[str, Any]:
        columns = {"image": self.image, "caption": self.captions, "id": self.id}
        return {"kind": "parquet", "url": self.url, **columns}

    def digest(self) -> str:
        return files_digest(self._root.files("Parquet file"))

    # -- listing --------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        files = self._root.files("Parquet file")
        empty = True
        for file in files:
            with self._opened(file) as table:
                self._check_columns(table.schema_arrow, file.name)
                for row in self._file_rows(file, table):
                    empty = False
                    yield row
        if empty:
            raise SourceError(f"source {self.url}: {len(files)} Parquet files without a row")

    def _file_rows(self, file: SourceFile, table: pq.ParquetFile) -> Iterator[Row]:
        stem, number = file.name.rpartition(".")[0], 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            ids = self._ids(table, group, file.name) if self.id else None
            for index in range(count):
                key = f"{stem}/{number}" if ids is None else ids[index]
                place = {"file": file.name, "bytes": file.size, "group": group, "row": index}
                yield Row(key, json.dumps(place))
                number += 1

    def _ids(self, table: pq.ParquetFile, group: int, name: str) -> list[str]:
        values: list[Any] = table.read_row_group(group, columns=[self.id]).column(self.id).to_pylist()
        if any(value is None for value in values):
            raise SourceError(
                f"source {self.url}: {name}: column {self.id!r} has nulls; a key is needed for every row"
            )
        return [str(value) for value in values]

    def _check_columns(self, schema: pa.Schema, name: str) -> None:
        wanted = [self.image, *(self.captions or ()), *([self.id] if self.id else ())]
        for column in wanted:
            if column not in schema.names:
                has = ", ".join(map(repr, schema.names))
                raise SourceError(f"source {self.url}: {name} has no column {column!r}; it has {has}")
        kind = schema.field(self.image).type
        if pa.types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise SourceError(
                f"source {self.url}: {name}: column {self.image!r} is {kind}; expected bytes, or a struct with `bytes`"
            )
        if self.id and not (pa.types.is_string(t := schema.field(self.id).type) or pa.types.is_large_string(t)
                            or pa.types.is_integer(t)):  # fmt: skip
            raise SourceError(
                f"source {self.url}: {name}: column {self.id!r} is {t}; a key is a string or an integer"
            )

    # -- reading --------------------------------------------------------------------------------------

    def read(self, rows: Sequence[Row]) -> Iterator[RawSample | Exception]:
        cursor, self._cursor = self._cursor, None  # lent to this call: threads do not share one
        try:
            for row in rows:
                place = json.loads(row.position)
                name, group, index = str(place["file"]), int(place["group"]), int(place["row"])
                if cursor is None or cursor.place != (name, group) or cursor.at > index:
                    if cursor is not None:
                        cursor.close()
                    cursor = self._seek(name, int(place["bytes"]), group)
                yield self._sample(cursor, index)
        finally:
            self._cursor = cursor

    def _sample(self, cursor: _Cursor, index: int) -> RawSample | Exception:
        try:
            with _damage_reported(f"{self.url}: {cursor.place[0]}"):
                record = cursor.take(index)
        except UnicodeDecodeError as error:
            return RejectedImage("unreadable", f"a caption that is not Unicode: {error.reason}")
        image = record[self.image]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not data:
            return RejectedImage("no image", "a null or empty cell")
        return RawSample(data, self._captions_of(record))

    def _captions_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        texts: list[str] = []
        for name in self.captions or ("caption", "text"):
            cell = record.get(name)
            texts += [text for text in (cell if isinstance(cell, list) else [cell]) if isinstance(text, str)]
            if texts and not self.captions:
                break
        return tuple(texts)

    def _seek(self, name: str, size: int, group: int) -> _Cursor:
        path = self._root.path(name)
        now = self._root.size(path)
        if now != size:
            raise SourceError(
                f"source {self.url}: {name} had {size} bytes when it was listed and has {now} now; "
                "restore it, or give the new one another name"
            )
        wanted = {self.image, *(self.captions or ("caption", "text"))}
        stream = self._root.fs.open(path, "rb")
        with _damage_reported(f"{self.url}: {name}"):
            table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
            columns = [column for column in table.schema_arrow.names if column in wanted]
            batches = table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
        return _Cursor((name, group), stream, batches)

    @contextmanager
    def _opened(self, file: SourceFile) -> Iterator[pq.ParquetFile]:
        with reported(f"{self.url}: {file.name}"), self._root.fs.open(file.path, "rb") as stream:
            with _damage_reported(f"{self.url}: {file.name}"):
                table = pq.ParquetFile(stream, pre_buffer=False)
            yield table


@dataclass
class _Cursor:
    """A row group that is being read from front to back."""

    place: tuple[str, int]
    stream: Any
    batches: Iterator[pa.RecordBatch]
    batch: pa.RecordBatch | None = None
    start: int = 0  # of the batch in the row group
    at: int = 0  # no row before this one can still be had

    def take(self, row: int) -> dict[str, Any]:
        while self.batch is None or row >= self.start + len(self.batch):
            self.start += 0 if self.batch is None else len(self.batch)
            self.at = self.start
            self.batch = next(self.batches, None)
            if self.batch is None:
                raise pa.ArrowInvalid(f"row group {self.place[1]} has no row {row}")
        found: dict[str, Any] = self.batch.slice(row - self.start, 1).to_pylist()[0]
        return found

    def close(self) -> None:
        self.stream.close()


@contextmanager
def _damage_reported(where: str) -> Iterator[None]:
    """pyarrow's complaints about a file, most of them ValueErrors, as an error of the file and not of a row."""
    try:
        yield
    except pa.ArrowException as error:
        text = " ".join(str(error).split())
        raise SourceError(f"source {where}: cannot be read: {text[:300]}") from error


def _names(value: Any) -> list[str] | None:
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
        return list(value)
    raise ConfigError(f"source.caption: expected a column or a list of columns, got {value!r}")
