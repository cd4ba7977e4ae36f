from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fourmill.crops import draw_crops
from fourmill.labels import DUPLICATE
from fourmill.seeds import key64, split_of
from fourmill.shards.arrow import write_table
from fourmill.shards.decode import Frame, RejectedImage
from fourmill.shards.samples import (
    MAX_CAPTION_CHARS,
    MAX_CAPTIONS,
    OK,
    Outcome,
    clean_captions,
    sample_table,
    samples_schema,
)
from fourmill.shards.sources.base import Row

ROWS = [
    Row("a/1", '{"file": "a/1.jpg"}'),
    Row("b", "{}"),
    Row("c", "{}"),
    Row("a/1", '{"file": "a/1.png"}'),
    Row("d", "{}"),
]
OUTCOMES: list[Outcome] = [
    (640, 427),
    RejectedImage("too small", "1x1"),
    Frame(np.zeros((64, 96, 3), np.uint8), 300, 200),
    (9, 9),
    "no image",
]
CAPTIONS = [["first", "second"], ["lost"], [], ["twin"], []]


def table(n_crops: int = 3, **changes: Any) -> pa.Table:
    options: dict[str, Any] = {"seed": 7, "n_crops": n_crops, "val_fraction": 0.5} | changes
    return sample_table(ROWS, OUTCOMES, CAPTIONS, **options)


def test_one_row_per_source_row_with_a_status() -> None:
    samples = table()
    assert samples.schema == samples_schema(3) and samples.num_rows == len(ROWS)
    assert samples["key"].to_pylist() == [row.key for row in ROWS]
    assert samples["position"].to_pylist() == [row.position for row in ROWS]
    assert samples["key64"].to_pylist() == [key64(row.key) for row in ROWS]
    assert samples["status"].to_pylist() == [OK, "too small", OK, DUPLICATE, "no image"]
    assert samples["width"].to_pylist() == [640, None, 300, None, None]
    assert samples["height"].to_pylist() == [427, None, 200, None, None]
    assert samples["captions"].to_pylist() == [["first", "second"], [], [], [], []]


def test_crops_and_split_are_those_of_the_key() -> None:
    samples = table()
    for index, (width, height) in ((0, (640, 427)), (2, (300, 200))):
        drawn = draw_crops(7, key64(ROWS[index].key), width, height, 3)
        assert samples["crops"][index].as_py() == drawn.reshape(-1).tolist()
    assert samples["crops"].is_null().to_pylist() == [False, True, False, True, True]
    assert samples["split"].to_pylist() == [split_of(7, key64(row.key), 0.5) for row in ROWS]
    assert {split for seed in range(9) for split in table(seed=seed)["split"].to_pylist()} == {"train", "val"}
    flat = samples["crops"].chunk(0).values.to_numpy(zero_copy_only=True).reshape(5, 15)
    assert not flat[[1, 3, 4]].any()  # null slots are zero-filled


def test_a_key_of_an_earlier_shard_is_a_duplicate() -> None:
    assert table(taken={"c", "elsewhere"})["status"].to_pylist() == [
        OK,
        "too small",
        DUPLICATE,
        DUPLICATE,
        "no image",
    ]


def test_the_same_arguments_give_the_same_bytes() -> None:
    assert write_table(table()) == write_table(table())
    assert write_table(table()) != write_table(table(seed=8))


def test_no_rows() -> None:
    samples = sample_table([], [], [], seed=0, n_crops=2, val_fraction=0.1)
    assert samples.num_rows == 0 and samples.schema == samples_schema(2)


def test_rows_and_outcomes_must_match() -> None:
    with pytest.raises(ValueError):
        sample_table(ROWS, OUTCOMES[:-1], CAPTIONS, seed=0, n_crops=1, val_fraction=0)


def test_captions_are_made_fit_to_be_stored() -> None:
    hostile = [
        "nul\0byte",
        " tab\tand\r\nline ",
        "lone \ud800 surrogate",
        "",
        "\0\n",
        "x" * 50_000,
        "ünïcode 猫 🐈",
    ]
    cleaned = clean_captions(hostile)
    assert cleaned[:3] == ["nul byte", "tab and line", "lone ? surrogate"]
    assert len(cleaned[3]) == MAX_CAPTION_CHARS and cleaned[4] == "ünïcode 猫 🐈" and len(cleaned) == 5
    assert pa.array(cleaned, pa.string()).to_pylist() == cleaned
    assert len(clean_captions(["again"] * 1000)) == MAX_CAPTIONS
