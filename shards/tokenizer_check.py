"""Whether a column's tokens are of the tokenizer that their reader has: the file itself says whose they are."""

from __future__ import annotations

import pyarrow as pa

from fourmill.errors import DatasetError
from fourmill.shards.arrow import metadata_of
from fourmill.shards.receipts import SHORT


def check_tokenizer(table: pa.Table, wanted: str | None, where: str) -> None:
    """DatasetError unless the table of `fourmill.shards.arrow.column_table` was made with the tokenizer ``wanted``.

    ``wanted``: a tokenizer's hash, or its first digits, as a snapshot has them; None: of a column without one. ``where``
    names the file. Reads the schema's metadata, and no row.
    """
    found = str(metadata_of(table, where).get("tokenizer") or "")
    expected = wanted or ""
    if found[: len(expected)] != expected or bool(found) != bool(expected):
        raise DatasetError(
            f"{where}: its tokens are of tokenizer {found[:SHORT] or '(none)'}, wanted are those of "
            f"{expected[:SHORT] or '(none)'}; build the column again with that one, or take a new snapshot"
        )
