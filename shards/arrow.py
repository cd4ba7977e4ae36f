"""Arrow files of one column: values and reasons, byte-reproducible and memory-mappable.

===================  ==================================================================
kind                 type of ``value``
===================  ==================================================================
grid, vector         FixedSizeList<uint16>[n_crops * n_tokens]
sequence             List<List<uint16>>: by crop, whole and without EOS
pixels               List<Binary>: by crop
embedding            FixedSizeList<float16>[n_crops * n]
scalar               float32
===================  ==================================================================

Null slots are zero-filled, so a column can be read as one flat array without looking at validity.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.errors import DatasetError
from fourmill.labels import Absent
from fourmill.modality import Modality

_WITH_FOOTER = b"ARROW1"  # how a file of the other Arrow IPC format begins
Cell = Sequence[Any] | Absent  # one value per crop, or the reason why there is none


def write_table(table: pa.Table) -> bytes:
    """Bytes of the Arrow IPC stream format, one record batch, uncompressed: the same table gives the same bytes.

    It is what `datasets.Dataset.from_file` opens, polars' ``read_ipc_stream`` and ``pyarrow.ipc.open_stream`` (and through
    that DuckDB and pandas), and it is memory-mapped as well as the format with a footer.
    """
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return sink.getvalue()


def read_table(source: bytes | str, where: str) -> pa.Table:
    """From bytes, or memory-mapped from a local path. Files of before 0.2 have a footer, and are read too."""
    try:
        if isinstance(source, bytes):
            return _read(pa.BufferReader(source))
        with pa.memory_map(source) as stream:
            return _read(stream)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{where} is missing, though a receipt names it; remove that receipt and build"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{where} is damaged ({error}); remove it and its receipt, then build") from error


def _read(stream: pa.NativeFile) -> pa.Table:
    has_footer = stream.read_at(len(_WITH_FOOTER), 0) == _WITH_FOOTER
    return (pa.ipc.open_file if has_footer else pa.ipc.open_stream)(stream).read_all()


def column_table(
    modality: Modality, cells: Sequence[Cell], n_crops: int, metadata: dict[str, str]
) -> pa.Table:
    """The table of one shard of a modality: rows in shard order, nulls with reasons."""
    absent = np.array([isinstance(cell, Absent) for cell in cells], dtype=bool)
    mask = pa.array(absent)
    reasons = _reasons([cell.reason if isinstance(cell, Absent) else None for cell in cells])
    value = _value_array(modality, cells, absent, mask, n_crops)
    meta = {
        "name": modality.name,
        "kind": modality.kind,
        "n_crops": n_crops,
        "num_tokens": modality.num_tokens,
    }
    schema = pa.schema(
        [pa.field("value", value.type), pa.field("reason", reasons.type)],
        metadata={
            "fourmill": json.dumps({**meta, "vocab_size": modality.vocab_size, **metadata}, sort_keys=True)
        },
    )
    return pa.Table.from_arrays([value, reasons], schema=schema)


def _reasons(texts: Sequence[str | None]) -> pa.DictionaryArray:
    """A byte per row rather than four: there is one in every column."""
    known = list(dict.fromkeys(text for text in texts if text is not None))
    number = {text: i for i, text in enumerate(known)}
    index = pa.int8() if len(known) < 128 else pa.int32()
    codes = pa.array([None if text is None else number[text] for text in texts], index)
    return pa.DictionaryArray.from_arrays(codes, pa.array(known, pa.string()))


def _value_array(
    modality: Modality, cells: Sequence[Cell], absent: np.ndarray, mask: pa.Array, n_crops: int
) -> pa.Array:
    if modality.kind in ("grid", "vector", "embedding"):
        dtype = np.float16 if modality.kind == "embedding" else np.uint16
        width = modality.num_tokens * n_crops
        flat = np.zeros((len(cells), width), dtype)
        for row, cell in enumerate(cells):
            if not isinstance(cell, Absent):
                flat[row] = np.concatenate([np.asarray(value, dtype) for value in cell])
        return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width, mask=mask)
    if modality.kind == "scalar":
        values = np.array([0.0 if isinstance(c, Absent) else c[0] for c in cells], np.float32)
        return pa.array(values, mask=absent)
    blank: Any = b"" if modality.kind == "pixels" else np.zeros(0, np.uint16)
    by_crop = [value for cell in cells for value in ([blank] * n_crops if isinstance(cell, Absent) else cell)]
    if modality.kind == "pixels":
        inner: pa.Array = pa.array(by_crop, pa.binary())
    else:
        lengths = np.array([len(value) for value in by_crop], np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = (
            np.concatenate([np.asarray(v, np.uint16) for v in by_crop]) if by_crop else np.zeros(0, np.uint16)
        )
        inner = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.uint16()))
    outer = pa.array(np.arange(len(cells) + 1, dtype=np.int32) * n_crops)
    return pa.ListArray.from_arrays(outer, inner, mask=mask)


@dataclass(frozen=True, slots=True)
class Column:
    """One shard of one modality, memory-mapped where storage is local.

    ``present`` bool (rows,). ``tokens`` uint16 (rows, n_crops, num_tokens) for grid and vector (float16
    for embedding, float32 (rows, 1, 1) for scalar, whatever the number of crops), zeros where absent. For sequences ``flat`` uint16 and
    ``offsets`` int32 (rows * n_crops + 1,): the cell of (row, crop) is flat[offsets[i]:offsets[i + 1]], i = row *
    n_crops + crop. For pixels ``blobs`` holds Arrow binary values in the same order.
    """

    present: np.ndarray
    reasons: pa.ChunkedArray
    n_crops: int
    tokens: np.ndarray | None = None
    flat: np.ndarray | None = None
    offsets: np.ndarray | None = None
    blobs: pa.Array | None = None

    def cells(self, row: int, crop: int = 0) -> Any:
        """The value of one (row, crop): tokens uint16 (n,), or the bytes of a picture."""
        index = row * self.n_crops + crop
        if self.tokens is not None:
            return self.tokens[row, crop]
        if self.blobs is not None:
            return self.blobs[index].as_py()
        assert self.flat is not None and self.offsets is not None
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


def metadata_of(table: pa.Table, where: str) -> dict[str, Any]:
    """What a column's file says of itself. To be read only: all files of a column share it."""
    raw = (table.schema.metadata or {}).get(b"fourmill", b"")
    try:
        return _parse(raw)
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{where}: has no fourmill metadata; was it written by another program?"
        ) from error


@lru_cache(256)
def _parse(raw: bytes) -> dict[str, Any]:
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise TypeError("not a map")
    return found


def open_column(table: pa.Table, where: str) -> Column:
    """A table of `column_table`, as arrays that share its memory."""
    meta = metadata_of(table, where)
    if table.column("value").num_chunks > 1:
        table = table.combine_chunks()
    value = (
        table.column("value").chunk(0) if table.num_rows else pa.array([], table.schema.field("value").type)
    )
    present = np.asarray(value.is_valid()).astype(bool) if value.null_count else np.ones(len(value), bool)
    n_crops, reasons = int(meta["n_crops"]), table.column("reason")
    if meta["kind"] in ("grid", "vector", "embedding"):
        flat = value.values.slice(value.offset * value.type.list_size, len(value) * value.type.list_size)
        tokens = flat.to_numpy(zero_copy_only=True).reshape(table.num_rows, n_crops, meta["num_tokens"])
        return Column(present, reasons, n_crops, tokens=tokens)
    if meta["kind"] == "scalar":
        scores = np.nan_to_num(value.to_numpy(zero_copy_only=False).astype(np.float32))
        return Column(present, reasons, 1, tokens=scores.reshape(-1, 1, 1))
    inner = value.values
    if meta["kind"] == "pixels":
        return Column(present, reasons, n_crops, blobs=inner)
    offsets = inner.offsets.to_numpy()
    return Column(present, reasons, n_crops, flat=inner.values.to_numpy(zero_copy_only=True), offsets=offsets)
