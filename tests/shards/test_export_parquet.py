"""Parquet that `datasets` and plain pyarrow open: the same values as the dataset's, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from small_builds import ORACLES, call_main, small_config, without_ray

from fourmill.errors import ConfigError
from fourmill.flows.build import build
from fourmill.flows.exporting import export_dataset
from fourmill.flows.training import make_snapshot

MODALITIES: dict[str, Any] = {
    "caption": {},
    "rgb_pixels": {},
    "depth": ORACLES["depth"],
    "normal": ORACLES["normal"],
    "normal_vs_depth": {},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = small_config(tmp_path_factory.mktemp("made") / "ds", MODALITIES, count=16, n_crops=2)
    with without_ray():
        build(made)
    return made


@pytest.fixture(scope="module")
def out(config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "parquet"
    assert call_main("export", config.dataset, folder, "--format", "parquet") == 0
    return folder


def test_datasets_opens_it(out: Path, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    opened = datasets.load_dataset(str(out), cache_dir=str(tmp_path))
    assert set(opened) == {"train", "validation"}
    assert sum(len(part) for part in opened.values()) == 16
    row = opened["train"][0]
    assert set(row) == {"key", "captions", "width", "height", "crops", *MODALITIES}
    assert len(row["depth"]) == 2 and len(row["depth"][0]) == 16 and len(row["crops"][1]) == 5


def test_the_values_are_those_of_the_dataset(out: Path, config: Any) -> None:
    snapshot = make_snapshot(config)
    found = {
        row["key"]: row
        for file in sorted(out.glob("data/*.parquet"))
        for row in pq.read_table(file).to_pylist()
    }
    for shard in range(len(snapshot.shards)):
        columns = {name: snapshot.column(shard, name) for name in MODALITIES}
        for number, key in enumerate(snapshot.keys(shard)):
            row = found[key]
            for name in ("depth", "normal", "caption"):
                for crop in range(2):
                    assert row[name][crop] == np.asarray(columns[name].cells(number, crop)).tolist()
            assert row["rgb_pixels"] == [columns["rgb_pixels"].cells(number, crop) for crop in range(2)]
            assert row["normal_vs_depth"] == pytest.approx(float(columns["normal_vs_depth"].cells(number)[0]))


def test_the_card(out: Path, config: Any) -> None:
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"},
        {"split": "validation", "path": "data/validation-*.parquet"},
    ]
    assert said["license"] == "other", "nothing here names one"
    assert make_snapshot(config).digest in text
    assert "| `depth` | distance of each pixel's surface from the camera | grid |" in text


def test_null_cells_and_chosen_rows(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fourmill.labelers.oracle import OracleDepth
    from fourmill.labels import Absent

    original = OracleDepth._one

    def sometimes(self: OracleDepth, truth: Any, frame: Any) -> Any:
        label = original(self, truth, frame)
        return Absent("too dark") if isinstance(label, Absent) or label.mean() < 4 else label

    monkeypatch.setattr(OracleDepth, "_one", sometimes)
    engine = {"batch_size": 4, "device": "cpu", "max_absent_rows": 4}
    with without_ray():
        build(small_config(tmp_path / "ds", {"depth": ORACLES["depth"]}, count=12, engine=engine))
    report = export_dataset(str(tmp_path / "ds"), str(tmp_path / "out"), layout="parquet", split="train")
    found = [
        row
        for file in sorted((tmp_path / "out").glob("data/*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    assert report.rows == len(found) and {row["depth"] is None for row in found} == {True, False}
    assert report.left_out == {"of another split": 12 - len(found)}
    assert not list((tmp_path / "out").glob("data/validation-*"))


def test_again_it_is_the_same_and_another_one_is_refused(out: Path, config: Any, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in out.glob("data/*")}
    export_dataset(config.dataset, str(out), layout="parquet")
    assert {path.name: path.read_bytes() for path in out.glob("data/*")} == before
    with pytest.raises(
        ConfigError, match="is not empty and holds no export like this one; choose another folder"
    ):
        export_dataset(config.dataset, str(out), layout="parquet", split="val")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no export like this one"):
        export_dataset(config.dataset, str(tmp_path), layout="parquet")
    with pytest.raises(ConfigError, match="--format parket: unknown; did you mean 'parquet'"):
        export_dataset(config.dataset, str(tmp_path / "x"), layout="parket")
    with pytest.raises(ConfigError, match="--split test: train, val or all"):
        export_dataset(config.dataset, str(tmp_path / "y"), layout="parquet", split="test")
