"""Snapshots by the command line: what they pin, what they leave out, and how they are let go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_builds import ORACLES, call_main, data_files, small_config, without_ray

from fourmill.errors import DatasetError
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.exporting import export_dataset
from fourmill.shards.dataset import Dataset
from fourmill.shards.garbage import find_garbage
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tombstones import dropped_rows
from fourmill.shards.verify import verify

MODALITIES: dict[str, Any] = {
    "caption": {},
    "depth": ORACLES["depth"],
    "normal": ORACLES["normal"],
    "normal_vs_depth": {},
}


@pytest.fixture
def url(tmp_path: Path) -> Path:
    with without_ray():
        build(small_config(tmp_path / "ds", MODALITIES, count=16), BuildOptions(limit=12))
    return tmp_path / "ds"


def taken(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert call_main("snapshot", *arguments, "--json") == 0
    return list(json.loads(capsys.readouterr().out))


def test_take_list_and_release(url: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DatasetError, match=f"no snapshot is registered; `fourmill snapshot {url}` takes one"):
        Snapshot.load(str(url))
    (whole,) = taken(capsys, url)
    assert (whole["shards"], whole["rows"], whole["chosen"]) == (3, 12, 12)
    assert taken(capsys, url) == [whole], "the same shards are the same snapshot"
    (some,) = taken(capsys, url, "-m", "depth", "--where", "normal_vs_depth < 90")
    assert some["modalities"] == ["depth", "normal_vs_depth"] and some["where"] == ["normal_vs_depth < 90"]
    assert {one["digest"] for one in taken(capsys, url, "--list")} == {whole["digest"], some["digest"]}
    for digest in (None, "0123"):
        with pytest.raises(DatasetError, match=f"name one of: .*{some['digest'][:12]}"):
            Snapshot.load(str(url), digest)
    assert call_main("snapshot", url, "--release", some["digest"][:8]) == 0
    assert taken(capsys, url, "--list") == [whole]
    assert call_main("snapshot", url, "--release", "0123") == 1


def test_what_was_released_is_garbage(url: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (before,) = taken(capsys, url)
    dataset = Dataset(str(url))
    for short in dataset.recipes("depth"):
        if dataset.recipe("depth", short)["kind"] == "token":
            for receipt in url.glob(f"receipts/depth/{short}/shard-*.json"):
                receipt.unlink()
    assert not [g for g in find_garbage(dataset, 0) if g.what == "tokens/depth"], "a snapshot pins it"
    assert call_main("snapshot", url, "--release", before["digest"]) == 0
    assert len([g for g in find_garbage(Dataset(str(url)), 0) if g.what == "tokens/depth"]) == 3


def test_dropped_keys(url: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (before,) = taken(capsys, url)
    bytes_before = data_files(url)
    keys = tmp_path / "keys.txt"
    keys.write_text("00000003\r\n00000007\n\n00000014\n")
    assert call_main("drop-keys", url, keys) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 keys dropped; 2 samples have them" in said
    assert "1 keys are of no sample yet" in said and before["digest"][:12] in said
    assert data_files(url) == bytes_before, "no shard is rewritten"
    (after,) = taken(capsys, url)
    assert after["digest"] != before["digest"] and after["chosen"] == 10
    assert Snapshot.load(str(url), before["digest"]).chosen == 12, "what was registered stays as it was"
    snapshot = Snapshot.load(str(url), after["digest"])
    used = [
        key for s in range(3) for key, kept in zip(snapshot.keys(s), snapshot.is_kept(s), strict=True) if kept
    ]
    assert "00000003" not in used and "00000007" not in used and len(used) == 10
    done = export_dataset(str(url), str(tmp_path / "out"), ["depth"])
    assert done.left_out["not chosen, or dropped"] >= 1
    with without_ray():  # and what comes later is left out too
        build(small_config(url, MODALITIES, count=16))
    (later,) = taken(capsys, url)
    assert (later["rows"], later["chosen"]) == (16, 13)
    assert {shard: rows.tolist() for shard, rows in dropped_rows(Dataset(str(url))).items()} == {
        0: [3],
        1: [3],
        3: [2],
    }
    assert call_main("drop-keys", url, keys) == 0
    assert verify(Dataset(str(url))).problems == []


def test_a_damaged_list_is_not_passed_over(url: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("00000003\n")
    assert call_main("drop-keys", url, tmp_path / "keys.txt") == 0
    (path,) = url.glob("tombstones/*.json")
    path.write_text(path.read_text().replace("00000003", "00000004"))
    assert call_main("snapshot", url) == 1
    assert [problem.file for problem in verify(Dataset(str(url))).problems] == [str(path.relative_to(url))]


@pytest.mark.parametrize("content", [b"\n\n", b"\xff\xfe\x00"])
def test_no_list_of_keys(
    url: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys.txt").write_bytes(content)
    assert call_main("drop-keys", url, tmp_path / "keys.txt") in (1, 2)
    assert "one key per line" in " ".join(capsys.readouterr().err.split())
    assert call_main("drop-keys", url, tmp_path / "nothing.txt") == 2
    assert not list(url.glob("tombstones/*"))
