"""Flipping any byte of any file is found, repaired by exactly what it damaged, and remembered where a snapshot pins it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_builds import ORACLES, call_main, data_files, listing, small_config, without_ray

from fourmill.errors import FourmillError
from fourmill.flows.build import build
from fourmill.flows.training import make_snapshot
from fourmill.flows.verifying import verify_dataset
from fourmill.labelers.oracle import OracleDepth
from fourmill.labels import Absent
from fourmill.shards.dataset import Dataset
from fourmill.shards.verify import verify

MODALITIES: dict[str, Any] = {
    "caption": {},
    "rgb_pixels": {},
    "depth": {**ORACLES["depth"], "keep_labels": True},
    "det": ORACLES["det"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("whole") / "ds"
    config = small_config(url, MODALITIES, count=12)
    with without_ray():
        build(config)
    make_snapshot(config)
    Dataset(str(url)).park("depth", "0" * 12, 0, "attempt", "it was not in the mood")
    return url


@pytest.fixture
def url(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "ds"))


def files(url: Path) -> list[str]:
    return [name for name in sorted(listing(url)) if not name.startswith("reports/")]


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def wrong(url: Path) -> set[str]:
    return {problem.file for problem in verify(Dataset(str(url))).problems}


def test_a_whole_dataset(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(Dataset(str(whole)))
    assert found.problems == []
    assert found.files == 3 * (1 + 4 + 1), "samples, tokens and kept labels of three shards"
    assert call_main("verify", whole) == 0
    assert "all are what they were when they were committed" in " ".join(capsys.readouterr().out.split())


def test_flipping_any_byte_of_any_file_is_found(url: Path) -> None:
    draw = random.Random(3)
    for name in files(url):
        path = url / name
        size = path.stat().st_size
        for position in {0, size - 1, draw.randrange(size)}:
            bit = draw.randrange(8)
            flip(path, position, bit)
            try:
                found = wrong(url)
            except FourmillError as error:
                found = {name} if name in str(error) else set()
            assert found, f"{name}, byte {position} of {size}, bit {bit}"
            flip(path, position, bit)
    assert wrong(url) == set()


def test_a_missing_file_is_found(url: Path) -> None:
    for name in files(url):
        if name.startswith(("tokens/", "labels/", "samples/")):
            data = (url / name).read_bytes()
            (url / name).unlink()
            assert name in wrong(url)
            (url / name).write_bytes(data)


@pytest.mark.parametrize(
    "pattern",
    [
        "tokens/depth/*.arrow",
        "labels/depth/*.tar",
        "samples/*.arrow",
        "receipts/det/*/shard-*.json",
        "receipts/det/*/recipe.json",
    ],
)
def test_repair_sets_aside_what_is_damaged_and_the_next_build_makes_it_again(
    pattern: str, url: Path, whole: Path
) -> None:
    (name, *_) = [str(path.relative_to(url)) for path in sorted(url.glob(pattern))]
    flip(url / name, 100)
    before = data_files(url)
    done = verify_dataset(str(url), repair=True)
    assert name in done.moved and (url / done.aside / name).exists()
    assert len(done.moved) == (1 if name.startswith("receipts/") else 2), "and its receipt"
    after = data_files(url)
    kept = {other: digest for other, digest in before.items() if other != name}
    assert {other: after[other] for other in kept} == kept
    with without_ray():
        build(small_config(url, MODALITIES, count=12))
    assert data_files(url) == data_files(whole), "the same bytes as if nothing had happened"
    assert wrong(url) == set()


def test_a_snapshot_that_pins_what_was_made_otherwise(url: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path, *_) = sorted(url.glob("tokens/depth/*.arrow"))
    (labels, *_) = sorted(url.glob("labels/depth/*.tar"))
    flip(path, 200)
    flip(labels, 600)
    verify_dataset(str(url), repair=True)
    original = OracleDepth._one

    def farther(self: OracleDepth, truth: Any, frame: Any) -> Any:
        label = original(self, truth, frame)
        return label if isinstance(label, Absent) else label * 3

    monkeypatch.setattr(OracleDepth, "_one", farther)
    with without_ray():
        build(small_config(url, MODALITIES, count=12))
    (problem,) = verify(Dataset(str(url))).problems
    assert problem.file.startswith("snapshots/") and problem.column == "depth" and problem.shard == 0
    assert "; made again it is tokens/depth/shard-000000." in problem.what
    assert "begin one on a new snapshot" in problem.advice


def test_values_and_alignment_are_checked_where_hashes_hold(url: Path) -> None:
    """A writer with a fault commits files that hash to their names."""
    dataset = Dataset(str(url))
    (short,) = dataset.recipes("det")
    receipt = dataset.receipt("det", short, 0)
    from dataclasses import replace

    from fourmill.shards.receipts import receipt_name

    for changes, what in (
        ({"keys": "0" * 64}, "is not of the rows that its shard's samples hold"),
        ({"absent": {"det hung": 1}}, "has other absent rows than its receipt says"),
        ({"presence": "BA=="}, "has other rows present than its receipt says"),
    ):
        (url / receipt_name("det", short, 0)).write_text(replace(receipt, **changes).to_json())
        (problem,) = verify(dataset).problems
        assert (problem.file, problem.what) == (receipt.file, what)


def test_the_command(url: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path, *_) = sorted(url.glob("tokens/caption/*.arrow"))
    flip(path, 50)
    assert call_main("verify", url) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "caption" in shown and "--repair moves what is damaged aside" in shown
    assert call_main("verify", url, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["found"]["problems"][0]["file"] == str(path.relative_to(url)) and found["moved"] == []
    assert call_main("verify", url, "--repair") == 1
    assert "2 files were moved" in " ".join(capsys.readouterr().out.split())
    assert call_main("verify", url) == 1, "a snapshot pins it"
