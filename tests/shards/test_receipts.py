"""Receipts: what they commit, their epochs, and that an old one still holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourmill.errors import DatasetError
from fourmill.shards.dataset import Dataset
from fourmill.shards.receipts import (
    Receipt,
    Recipe,
    canonical,
    newest,
    receipt_name,
    sha256,
    shard_and_epoch,
)

RECIPE = Recipe("token", {"labeler": "depth"})


def make_receipt(shard: int = 0, epoch: int = 0, **changes: Any) -> Receipt:
    values: dict[str, Any] = {
        "column": "depth", "recipe": RECIPE.hash, "shard": shard, "rows": 4, "absent": {}, "presence": "Dw==",
        "keys": "k", "file": f"tokens/depth/shard-{shard:06d}.{epoch:012d}.arrow", "sha256": "s", "bytes": 1,
        "dataset": "d", "epoch": epoch,
    }  # fmt: skip
    return Receipt(**{**values, **changes})


@pytest.fixture(params=["folder", "memory"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    url = str(tmp_path / "ds") if request.param == "folder" else f"memory://{tmp_path.name}"
    return Dataset.create(url, {"shard_size": 4})


def test_a_receipt_of_before_there_were_epochs_still_holds() -> None:
    body = {name: getattr(make_receipt(), name) for name in Receipt.__slots__ if name != "epoch"}
    old = canonical({**body, "format": 1, "digest": sha256(canonical(body))})
    assert Receipt.from_json(old, "x") == make_receipt()
    assert make_receipt().to_json() == old


def test_an_epoch_is_part_of_what_the_digest_covers() -> None:
    text = make_receipt(epoch=2).to_json()
    assert Receipt.from_json(text, "x").epoch == 2
    with pytest.raises(DatasetError, match="damaged"):
        Receipt.from_json(json.dumps(json.loads(text) | {"epoch": 3}), "x")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shard-000012.json", (12, 0)), ("shard-000012.e1.json", (12, 1)), ("shard-1234567.e10.json", (1234567, 10)),
        ("recipe.json", None), ("shard-000012.e0.json", None), ("shard-000012.e01.json", None),
        ("shard-12.json", None), ("shard-000012.json.tmp", None), (".shard-000012.json.ab.tmp", None),
    ],
)  # fmt: skip
def test_names(name: str, expected: tuple[int, int] | None) -> None:
    assert shard_and_epoch(name) == expected
    if expected is not None:
        assert receipt_name("depth", "r", *expected) == f"receipts/depth/r/{name}"


def test_the_highest_epoch_by_number_counts() -> None:
    names = [f"shard-000007.e{epoch}.json" for epoch in range(1, 12)]
    assert newest([*names, "shard-000007.json", "recipe.json"]) == {7: "shard-000007.e11.json"}


def test_the_dataset_goes_by_the_highest_epoch(dataset: Dataset) -> None:
    short = RECIPE.short
    assert not dataset.is_finished("depth", short, 0)
    assert dataset.commit(RECIPE, make_receipt(0))
    assert dataset.commit(RECIPE, make_receipt(10))
    first = dataset.receipt("depth", short, 0)
    assert dataset.commit(RECIPE, make_receipt(0, epoch=1))
    assert not dataset.commit(RECIPE, make_receipt(0, epoch=1, bytes=2)), "the first of an epoch stands"
    assert dataset.finished("depth", short) == {0, 10}
    assert dataset.is_finished("depth", short, 0) and not dataset.is_finished("depth", short, 1)
    assert first.epoch == 0 and dataset.receipt("depth", short, 0) == make_receipt(0, epoch=1)
    assert {s: r.epoch for s, r in dataset.receipts("depth", short).items()} == {0: 1, 10: 0}
    with pytest.raises(DatasetError, match=r"shard-000001\.json is missing"):
        dataset.receipt("depth", short, 1)
