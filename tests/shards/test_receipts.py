"""Receipts: what they commit, their epochs, and that an old one still holds."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from fourmill.storage import Store

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


def test_a_receipt_of_before_there_were_epochs_and_figures_still_holds() -> None:
    later = ("epoch", "figures", "warnings")
    body = {name: getattr(make_receipt(), name) for name in Receipt.__slots__ if name not in later}
    old = canonical({**body, "format": 1, "digest": sha256(canonical(body))})
    assert Receipt.from_json(old, "x") == make_receipt()
    assert make_receipt().to_json() == old


def test_figures_are_an_object_in_the_file_and_text_in_memory() -> None:
    figures = '{"figures":{"mean":[4,1.5,2]},"rows":4,"shares":{}}'
    receipt = make_receipt(figures=figures, warnings=["mean is 0.375"])
    assert json.loads(receipt.to_json())["figures"]["figures"] == {"mean": [4, 1.5, 2]}
    assert Receipt.from_json(receipt.to_json(), "x") == receipt
    with pytest.raises(DatasetError, match="damaged"):
        Receipt.from_json(receipt.to_json().replace("1.5", "1.6"), "x")


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


# -- the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def counted(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[], tuple[dict[int, Receipt], int]]:
    """Opens the dataset anew, reads 40 receipts, and says how many files of receipts that took."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for shard in range(40):
        dataset.commit(RECIPE, make_receipt(shard, timings={"read": 1.5}, source={"digest": "x"}))

    def read() -> tuple[dict[int, Receipt], int]:
        fresh, names = Dataset(dataset.url), []
        original = Store.read_if_exists

        def noted(self: Store, name: str) -> bytes | None:
            names.append(name)
            return original(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "read_if_exists", noted)
            return fresh.receipts("depth", RECIPE.short), len(names)

    return read


def cache_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "fourmill" / "receipts").iterdir()
    return file


def test_receipts_are_read_once(
    counted: Callable[[], tuple[dict[int, Receipt], int]], dataset: Dataset, tmp_path: Path
) -> None:
    first, files = counted()
    assert files == 40 and list(first) == list(range(40))
    again, files = counted()
    assert files == 0 and again == first
    dataset.receipts("depth", RECIPE.short)
    assert dataset.receipts("depth", RECIPE.short) == first
    dataset.commit(RECIPE, make_receipt(7, epoch=1))
    later, files = counted()
    assert files == 1 and later == first | {7: make_receipt(7, epoch=1)}
    assert tmp_path.name not in cache_file(tmp_path).name, "an URL may hold a secret"


def test_a_receipt_that_was_replaced_is_read_anew(
    counted: Callable[[], tuple[dict[int, Receipt], int]], dataset: Dataset
) -> None:
    first, _ = counted()
    assert dataset.receipts("depth", RECIPE.short) == first
    name = receipt_name("depth", RECIPE.short, 3)
    dataset.store.remove(name)
    time.sleep(0.01)  # memory:// knows nothing but the time
    other = make_receipt(3, bytes=2)
    dataset.commit(RECIPE, other)
    assert counted() == (first | {3: other}, 1)
    assert dataset.receipts("depth", RECIPE.short) == first | {3: other}, "in memory too"
    dataset.store.remove(name)
    assert 3 not in counted()[0]


def test_a_damaged_receipt_is_never_believed(
    counted: Callable[[], tuple[dict[int, Receipt], int]], dataset: Dataset
) -> None:
    counted()
    name = receipt_name("depth", RECIPE.short, 3)
    dataset.store.put(name, dataset.store.read(name).replace(b'"rows": 4', b'"rows": 5'))
    with pytest.raises(DatasetError, match=r"shard-000003\.json: the receipt is damaged"):
        counted()


@pytest.mark.parametrize("damage", ["no database", "cut off", "another row", "a folder", "read only"])
def test_a_cache_that_cannot_be_used_is_no_error(
    counted: Callable[[], tuple[dict[int, Receipt], int]],
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = counted()
    file = cache_file(tmp_path)
    with caplog.at_level("DEBUG", "fourmill.shards.receipt_cache"):
        if damage == "no database":
            file.write_bytes(b"x" * 9999)
        elif damage == "cut off":
            file.write_bytes(file.read_bytes()[:5000])
        elif damage == "another row":
            with sqlite3.connect(file) as database:
                database.execute("UPDATE receipts SET body = replace(body, 'Dw==', 'Cw==')")
        elif damage == "a folder":
            file.unlink()
            file.mkdir()
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such/place")
        assert counted() == (first, 40)
        assert counted()[0] == first
    said = [r for r in caplog.records if r.levelname == "DEBUG"]
    assert len(said) == (0 if damage == "another row" else 1), caplog.text
    if damage in ("no database", "cut off", "another row"):
        assert counted() == (first, 0), "it is made again"


def test_processes_share_a_cache(
    counted: Callable[[], tuple[dict[int, Receipt], int]], dataset: Dataset
) -> None:
    """Many at once, some of them holding the file: each gets the receipts."""
    expected, _ = counted()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Dataset(dataset.url).receipts("depth", RECIPE.short), range(32)))
    assert all(receipts == expected for receipts in found)
