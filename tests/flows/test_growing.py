"""A build that also writes its finished shards as tars: each once, and again only where it is another one now."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from small_builds import ORACLES, call_main, listing, small_config, small_content, without_ray, write_config

from fourmill.config import Config
from fourmill.errors import ConfigError
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.importing_datasets import import_webdataset
from fourmill.flows.status import status
from fourmill.labelers.oracle import OracleDepth
from fourmill.labels import Absent
from fourmill.lease import Lease
from fourmill.shards.dataset import Dataset
from fourmill.storage import Store

DET: dict[str, Any] = {"caption": {}, "det": ORACLES["det"], "rgb_pixels": {}}


def config_of(root: Path, **changes: Any) -> Config:
    changes = {"webdataset": str(root / "tars"), **changes}
    return small_config(root / "ds", DET, count=16, **changes)


def run(config: Config, **options: Any) -> None:
    with without_ray():
        build(config, BuildOptions(**options))


def keys(tars: Path) -> dict[str, list[str]]:
    found = {}
    for tar in sorted((tars / "key").glob("*.tar")):
        with tarfile.open(tar) as opened:
            found[tar.name] = [opened.extractfile(info).read().decode() for info in opened]  # type: ignore[union-attr]
    return found


def train_keys(url: str) -> list[str]:
    dataset = Dataset(url)
    short = str(dataset.samples_recipe())
    rows = [
        row
        for shard in sorted(dataset.finished("samples", short))
        for row in dataset.samples(shard).to_pylist()
    ]
    return [row["key"] for row in rows if row["split"] == "train"]


def test_finished_shards_are_written_once(tmp_path: Path) -> None:
    config, tars = config_of(tmp_path), tmp_path / "tars"
    run(config, limit=8)
    first = listing(tars / "det")
    assert list(first) == ["shard-00000.tar", "shard-00001.tar"]
    facts = json.loads((tars / "export.json").read_text())
    assert facts["complete"] and facts["shards"] == 2 and facts["rows"] == sum(map(len, keys(tars).values()))
    assert {path.name for path in tars.iterdir() if any(path.glob("*.tar"))} == {
        "caption", "det", "crop_settings", "key", "size",
    }  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in tars.rglob("*.tar")}
    run(config)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "what was written is left alone"
    assert list(keys(tars)) == [f"shard-{number:05d}.tar" for number in range(4)]
    assert [key for found in keys(tars).values() for key in found] == train_keys(config.dataset)
    again = {path: path.stat().st_mtime_ns for path in tars.rglob("*.tar")}
    run(config)
    assert {path: path.stat().st_mtime_ns for path in tars.rglob("*.tar")} == again
    imported = import_webdataset(str(tars), str(tmp_path / "imported"))
    assert imported.rows == len(train_keys(config.dataset))


def test_shards_that_come_in_another_order_leave_no_gap(tmp_path: Path) -> None:
    config, tars = config_of(tmp_path), tmp_path / "tars"
    run(config, limit=8)  # fits, so that slices may
    run(config, slice=(1, 2))
    run(config, slice=(0, 2))
    found = keys(tars)
    assert list(found) == [f"shard-{number:05d}.tar" for number in range(4)]
    notes = [json.loads(path.read_text()) for path in sorted((tars / "written").glob("*.json"))]
    assert [note["number"] for note in notes] == [0, 1, 3, 2], "shard 3 was finished before shard 2"
    assert sorted(key for part in found.values() for key in part) == sorted(train_keys(config.dataset))


def test_take_downs_and_second_attempts_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OracleDepth._one
    dark = [True]

    def sometimes(self: OracleDepth, truth: Any, frame: Any) -> Any:
        label = original(self, truth, frame)
        return Absent("too dark") if dark[0] and not isinstance(label, Absent) and label.mean() < 4 else label

    monkeypatch.setattr(OracleDepth, "_one", sometimes)
    engine = {"batch_size": 4, "device": "cpu", "max_absent_rows": 4}
    config = small_config(
        tmp_path / "ds",
        {"depth": ORACLES["depth"]},
        count=12,
        engine=engine,
        webdataset=str(tmp_path / "tars"),
    )
    run(config)
    before = keys(tmp_path / "tars")
    some = sum(map(len, before.values()))
    assert 0 < some < len(train_keys(config.dataset))
    dark[0] = False
    run(config, retry_rejects=True)
    whole = keys(tmp_path / "tars")
    assert sorted(key for found in whole.values() for key in found) == train_keys(config.dataset)
    gone = whole["shard-00000.tar"]
    (tmp_path / "gone.txt").write_text("\n".join(gone))
    assert call_main("drop-keys", config.dataset, tmp_path / "gone.txt") == 0
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "tars" / "depth").glob("*.tar")}
    run(config)
    assert keys(tmp_path / "tars") == {**whole, "shard-00000.tar": []}, "taken down, with no gap"
    changed = [path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == ["shard-00000.tar"]
    options = tmp_path / "m.yaml"  # without the tokenizer it is imported all the same
    options.write_text("modalities: {depth: {}}")
    imported = import_webdataset(str(tmp_path / "tars"), str(tmp_path / "imported"), str(options))
    assert imported.rows == len(train_keys(config.dataset)) - len(gone) and imported.shards == 2
    assert status(imported.snapshot.dataset).complete


def test_what_could_not_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"webdataset: det is written .* modalities\.det\.keep_labels: true"
    ):
        run(config_of(tmp_path, n_crops=2))
    content = small_content(tmp_path / "ds", {"rgb_pixels": {}}, webdataset=str(tmp_path / "tars"))
    assert call_main("build", write_config(tmp_path / "c.yaml", content), "--no-prefect") == 2
    assert not (tmp_path / "ds").exists() and not (tmp_path / "tars").exists()


def test_another_writer_is_waited_for_by_the_next_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Lease(Store(str(tmp_path / "tars")))
    other.acquire()
    run(config_of(tmp_path))
    assert "the next build adds what is missing" in capsys.readouterr().out
    assert not keys(tmp_path / "tars")
    (tmp_path / "tars" / ".writer.json").unlink()
    run(config_of(tmp_path))
    assert len(keys(tmp_path / "tars")) == 4
    (tmp_path / "tars" / "mine.txt").write_text("mine")
    run(config_of(tmp_path))
    with pytest.raises(ConfigError, match="holds no export like this one"):
        run(small_config(tmp_path / "ds", {"caption": {}}, count=16, webdataset=str(tmp_path / "tars")))
