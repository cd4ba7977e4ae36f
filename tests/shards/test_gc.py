"""`fourmill gc`: what nobody names goes when it is old; everything else stays as it is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from small_builds import ORACLES, call_main, data_files, listing, small_config, with_tokenizers, without_ray

from fourmill.errors import ConfigError, DatasetError
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.cleaning import clean
from fourmill.flows.training import make_snapshot
from fourmill.shards import garbage
from fourmill.shards.dataset import Dataset
from fourmill.shards.garbage import find_garbage, remove_garbage
from fourmill.shards.receipts import Receipt, Recipe, receipt_name, sha256
from fourmill.shards.snapshot import Snapshot
from fourmill.storage import Store

WEEK_S = 7 * 86_400.0
DEPTH = Recipe("token", {"label": {"labeler": "depth"}, "tokenizer": "f" * 64})
OLDER = Recipe("token", {"label": {"labeler": "depth", "version": 0}, "tokenizer": "e" * 64})


@pytest.fixture(params=["folder", "memory"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    url = str(tmp_path / "ds") if request.param == "folder" else f"memory://{tmp_path.name}"
    return Dataset.create(url, {"shard_size": 4})


@pytest.fixture
def next_week(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the store's clock, everything that was written is eight days old."""
    real = Store.now
    monkeypatch.setattr(Store, "now", lambda self: real(self) + WEEK_S + 86_400)


def put_shard(
    dataset: Dataset, shard: int, data: bytes, recipe: Recipe = DEPTH, epoch: int = 0, commit: bool = True
) -> str:
    """A data file and its receipt; the file's name."""
    name = dataset.put_data("tokens/depth", shard, data, "arrow")
    receipt = Receipt(
        column="depth", recipe=recipe.hash, shard=shard, rows=4, absent={}, presence="Dw==", keys="k", file=name,
        sha256=sha256(data.decode()), bytes=len(data), dataset=dataset.digest, epoch=epoch,
    )  # fmt: skip
    assert not commit or dataset.commit(recipe, receipt)
    return name


def names(dataset: Dataset, age: float = WEEK_S) -> set[str]:
    return {found.name for found in find_garbage(dataset, age)}


def removed(dataset: Dataset) -> set[str]:
    return {found.name for found in remove_garbage(dataset, find_garbage(dataset, WEEK_S))}


def test_orphans_go_and_nothing_else(dataset: Dataset, next_week: None) -> None:
    kept = {
        put_shard(dataset, 0, b"first"), put_shard(dataset, 0, b"again", epoch=1),
        put_shard(dataset, 1, b"stale", recipe=OLDER),
    }  # fmt: skip
    orphans = {
        put_shard(dataset, 2, b"no receipt", commit=False),
        dataset.put_data("samples", 0, b"x", "arrow"),
        dataset.put_data("labels/depth", 0, b"x", "tar"),
        "fits/depth-0123456789abcdef.lock",
        "fits/depth-0123456789abcdef/state.safetensors",
        "fits/depth-0123456789abcdef/labels/00.npy",
        ".probe-0123456789abcdef",
        "tokens/depth/.shard-000000.0123456789ab.arrow.0123456789ab.tmp",
        "receipts/depth/.recipe.json.0123456789ab.tmp",
    }
    orphans.add(dataset.park("depth", DEPTH.short, 0, "abcd", "an error, with a receipt since"))
    for name in sorted(orphans):
        dataset.store.put_if_absent(name, b"x")
    dataset.park("depth", DEPTH.short, 9, "abcd", "still parked")
    others = [
        "reports/index.html", "notes.txt", "tokens/depth/README", "tokens/depth/shard-000000.arrow", ".writer.json",
        "mine/tokens/depth/shard-000000.0123456789ab.arrow", "tokens/.hidden", "models/.x.tmp",
    ]  # fmt: skip
    for name in others:
        dataset.store.put(name, b"somebody's")
    before = dataset.store.walk("")
    assert names(dataset) == orphans
    assert dataset.store.walk("") == before, "a look touches nothing"
    assert removed(dataset) == orphans
    after = dataset.store.walk("")
    assert after == {name: entry for name, entry in before.items() if name not in orphans}
    assert kept <= set(after)
    assert names(dataset) == set()


def test_what_is_young_stays(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_shard(dataset, 2, b"no receipt yet", commit=False)
    dataset.store.put(f"tokens/depth/.{'a' * 12}.{'b' * 12}.tmp", b"x")
    assert names(dataset) == set() and len(names(dataset, -60)) == 2
    real = Store.now
    monkeypatch.setattr(Store, "now", lambda self: real(self) + WEEK_S - 3600)
    assert names(dataset) == set()
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert names(dataset) == set(), "by the store's clock, not by this machine's"


def test_a_receipt_that_appears_meanwhile_saves_its_file(dataset: Dataset, next_week: None) -> None:
    orphan, late = (put_shard(dataset, s, b"%d" % s, commit=False) for s in (1, 2))
    found = find_garbage(dataset, WEEK_S)
    put_shard(dataset, 2, b"2")
    assert {g.name for g in found} == {orphan, late}
    assert [g.name for g in remove_garbage(dataset, found)] == [orphan]
    assert dataset.store.read(late) == b"2"


def test_a_file_that_is_written_again_meanwhile_stays(tmp_path: Path) -> None:
    """A build found what a dead attempt had left: its receipt is about to be written."""
    dataset = Dataset.create(str(tmp_path / "ds"), {"shard_size": 4})
    name = put_shard(dataset, 2, b"x", commit=False)
    old = time.time() - WEEK_S - 60
    os.utime(dataset.store.path(name), (old, old))
    found = find_garbage(dataset, WEEK_S)
    assert [g.name for g in found] == [name]
    assert dataset.put_data("tokens/depth", 2, b"x", "arrow") == name
    assert list(remove_garbage(dataset, found)) == [] and dataset.store.read(name) == b"x"


def test_receipts_are_listed_before_every_lot(
    dataset: Dataset, next_week: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "LOT", 1)
    orphans = sorted(put_shard(dataset, s, b"%d" % s, commit=False) for s in range(3))
    removing = remove_garbage(dataset, find_garbage(dataset, WEEK_S))
    assert next(removing).name == orphans[0]
    put_shard(dataset, 2, b"2")
    assert [g.name for g in removing] == orphans[1:2]


def test_a_damaged_receipt_or_snapshot_stops_it(dataset: Dataset, next_week: None) -> None:
    """Who knows what it named."""
    orphan = put_shard(dataset, 2, b"no receipt", commit=False)
    put_shard(dataset, 0, b"x")
    name = receipt_name("depth", DEPTH.short, 0)
    good = dataset.store.read(name)
    dataset.store.put(name, good[:-20])
    with pytest.raises(DatasetError, match="not a receipt"):
        names(dataset)
    dataset.store.put(name, good)
    dataset.store.put(f"snapshots/{'0' * 64}.json", b"{}")
    with pytest.raises(DatasetError, match="damaged"):
        names(dataset)
    assert dataset.store.exists(orphan)


def test_tokenizers(dataset: Dataset, next_week: None) -> None:
    """One that tokens were made with stays, and so does one that was just fitted; the loser of two fits goes."""
    for short in ("f" * 12, "0" * 12):
        for file in ("config.json", "origin.json"):
            dataset.store.put(f"tokenizers/depth/{short}/{file}", b"{}")
    dataset.store.put("tokenizers/normal/000000000000/origin.json", b"{}")
    assert names(dataset) == set(), "no tokens yet: they are what `fit-tokenizers` made"
    put_shard(dataset, 0, b"x")
    assert removed(dataset) == {f"tokenizers/depth/{'0' * 12}/{f}" for f in ("config.json", "origin.json")}


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    modalities: dict[str, Any] = {"rgb_pixels": {}, "depth": {**ORACLES["depth"], "keep_labels": True}}
    fitted, url = tmp_path / "fitted", tmp_path / "ds"
    with without_ray():
        build(small_config(fitted, modalities, count=8))
        modalities = with_tokenizers(fitted, modalities)
        build(small_config(url, modalities, count=8))
    return url, modalities


def test_a_snapshot_keeps_its_files(
    built: tuple[Path, dict[str, Any]], next_week: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where their receipts are gone; the build then makes them again, byte by byte, and nothing is left over."""
    url, modalities = built
    config = small_config(url, modalities, count=8)
    snapshot = make_snapshot(config)
    files, before = data_files(url), listing(url)
    for receipt in url.glob("receipts/depth/*/shard-000001.json"):
        receipt.unlink()
    assert call_main("gc", url) == 0
    said = capsys.readouterr().out
    assert "labels/depth" in said and "--delete" in said and "tokens/depth" not in said
    assert {k: v for k, v in before.items() if not k.startswith("receipts")}.items() <= listing(url).items()
    assert call_main("gc", url, "--delete") == 0
    left = data_files(url)
    assert [n for n in files if n not in left] == [
        n for n in files if n.startswith("labels/depth/shard-000001")
    ]
    assert Snapshot.load(str(url), snapshot.digest).column(1, "depth") is not None
    with without_ray():
        assert build(config, BuildOptions()).status.complete
    assert data_files(url) == files
    capsys.readouterr()
    assert call_main("gc", url) == 0 and "nothing here" in capsys.readouterr().out


@pytest.mark.parametrize("age", ["7", "d", "-1d", "7 days", "59m", "0d", ""])
def test_an_age_that_is_none(tmp_path: Path, age: str) -> None:
    with pytest.raises(ConfigError, match="--older-than"):
        clean(str(tmp_path), True, age)
