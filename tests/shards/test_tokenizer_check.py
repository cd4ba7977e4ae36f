"""Tokens of another tokenizer than the reader's are refused, by name of the file and of both."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fourmill.errors import DatasetError
from fourmill.labels import Absent
from fourmill.modality import LabelContract, Modality
from fourmill.shards.arrow import column_table, read_table, write_table
from fourmill.shards.tokenizer_check import check_tokenizer

OURS, THEIRS = "ab" * 32, "cd" * 32
DEPTH = Modality(
    name="depth", kind="grid", codec="vqvae", vocab_size=8, num_tokens=4,
    contract=LabelContract(form="map", dtype="float32"),
)  # fmt: skip
WHERE = "data/tokens/depth/shard-000003.0123456789ab.arrow"


def table_of(tokenizer: str | None, folder: Path | None = None) -> pa.Table:
    metadata: dict[str, Any] = {} if tokenizer is None else {"recipe": "ef" * 32, "tokenizer": tokenizer}
    cells: list[Any] = [[np.zeros(4, np.uint16)], Absent("unreadable")]
    raw = write_table(column_table(DEPTH, cells, 1, metadata))
    if folder is None:
        return read_table(raw, WHERE)
    (folder / "x.arrow").write_bytes(raw)
    return read_table(str(folder / "x.arrow"), WHERE)


@pytest.mark.parametrize("wanted", [OURS, OURS[:12]])
def test_the_right_one_passes(wanted: str, tmp_path: Path) -> None:
    check_tokenizer(table_of(OURS), wanted, WHERE)
    check_tokenizer(table_of(OURS, tmp_path), wanted, WHERE)
    check_tokenizer(table_of(""), None, WHERE)
    check_tokenizer(table_of(None), None, WHERE)


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (THEIRS, OURS[:12], "of tokenizer cdcdcdcdcdcd, wanted are those of abababababab"),
        (THEIRS, OURS, "of tokenizer cdcdcdcdcdcd, wanted are those of abababababab"),
        ("", OURS[:12], r"of tokenizer \(none\), wanted are those of abababababab"),
        (None, OURS[:12], r"of tokenizer \(none\), wanted are those of abababababab"),
        (THEIRS, None, r"of tokenizer cdcdcdcdcdcd, wanted are those of \(none\)"),
    ],
)
def test_another_one_is_refused_in_one_line(found: str | None, wanted: str | None, said: str) -> None:
    with pytest.raises(DatasetError, match=said) as caught:
        check_tokenizer(table_of(found), wanted, WHERE)
    assert str(caught.value).startswith(WHERE) and "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {b"fourmill": b"{"}, {b"fourmill": b"[]"}, {b"other": b"{}"}])
def test_a_file_of_another_program(metadata: dict[bytes, bytes] | None) -> None:
    with pytest.raises(DatasetError, match="no fourmill metadata"):
        check_tokenizer(pa.table({"value": [1]}).replace_schema_metadata(metadata), OURS, WHERE)
