"""Metadata, palettes and people leave as the published code reads them, and come back token for token."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_builds import call_main, small_config, without_ray

from fourmill.errors import ConfigError
from fourmill.flows.build import build
from fourmill.flows.exporting import export_dataset, snapshot_of
from fourmill.flows.importing_datasets import import_webdataset
from fourmill.labelers.base import LabelBatch, Labeler, labelers
from fourmill.labels import Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import LabelContract, Modality
from fourmill.shards.dataset import Dataset
from fourmill.shards.snapshot import Snapshot

FORMS = ("metadata", "palette", "poses", "instances")


def labeler(form: Any) -> type[Labeler]:
    class Made(Labeler):
        modality = Modality(
            name=form, kind="sequence", codec=form, reference_name=form, contract=LabelContract(form=form, dtype="")
        )  # fmt: skip

        def label(self, batch: LabelBatch) -> list[Label]:
            return [made(form, frame) for frame in batch.frames]

    return Made


def made(form: str, frame: np.ndarray) -> Label:
    mean = float(frame.mean())
    if form == "metadata":
        return Metadata({"brightness": mean, "original_width": 64, "n_humans": int(mean) % 5})
    if form == "palette":
        pixels = np.resize(frame.reshape(-1, 3), (7, 3)).astype(np.uint8)
        return Palettes(tuple(pixels[:n] for n in range(7, 0, -1)))
    if form == "poses":
        count = int(mean) % 3
        boxes = [[0.1 + 0.2 * n, 0.2, 0.5 + 0.2 * n, 0.9] for n in range(count)]
        ids = (np.arange(8 * count).reshape(-1, 8) * 37 + int(mean)) % 1024
        return Poses.of(boxes, pose_ids=ids, betas=np.full((count, 10), mean / 100))
    return Instances.of([[0.05, 0.1, 0.95, 0.9]], [[[0.05, 0.1], [0.95, 0.1], [0.05, 0.9]]], np.ones((1, 16)))


@pytest.fixture(scope="module", params=[True, False], ids=["kept", "tokens alone"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bool]:
    url = tmp_path_factory.mktemp("structures") / "ds"
    modalities = {form: {"keep_labels": request.param} for form in FORMS}
    config = small_config(url, {"caption": {}, **modalities}, count=8, val_fraction=0.2)
    with pytest.MonkeyPatch.context() as patch, without_ray():
        patch.setattr(
            labelers, "_known", {**dict(labelers.items()), **{form: labeler(form) for form in FORMS}}
        )
        build(config)
    return str(url), request.param


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        labelers, "_known", {**dict(labelers.items()), **{form: labeler(form) for form in FORMS}}
    )


def members(folder: Path) -> list[Any]:
    found = []
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as opened:
            found += [json.load(opened.extractfile(info)) for info in opened]  # type: ignore[arg-type]
    return found


def values(snapshot: Snapshot, name: str, split: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for shard, ref in enumerate(snapshot.shards):
        column = snapshot.column(shard, name)
        splits = snapshot.dataset.table(ref.files["samples"])["split"].to_pylist()
        keys = zip(snapshot.keys(shard), splits, strict=True)
        found |= {key: column.cells(row).tolist() for row, (key, s) in enumerate(keys) if s == split}
    return found


def test_they_come_back_token_for_token(built: tuple[str, bool], tmp_path: Path) -> None:
    url, kept = built
    names = ["caption", "metadata", "poses", *(["palette"] if kept else [])]
    report = export_dataset(url, str(tmp_path / "out"), names)
    assert report.rows
    before = snapshot_of(Dataset(url))
    after = import_webdataset(str(tmp_path / "out"), str(tmp_path / "ds")).snapshot
    for name in names:
        assert values(after, name, "train") == values(before, name, "train"), name
    people = members(tmp_path / "out" / "poses")
    assert {len(value.get("bbox_xyxy", [])) for value in people} > {0}
    assert all(len(v["pose_tokenized"][0]) == 8 for v in people if v)
    assert all(
        set(v) == {"brightness", "original_width", "n_humans"} for v in members(tmp_path / "out" / "metadata")
    )
    if kept:
        assert all(set(value[0]) == set("1234567") for value in members(tmp_path / "out" / "palette"))
        assert call_main("export", url, tmp_path / "all") == 0
        folders = {path.name for path in (tmp_path / "all").iterdir() if any(path.glob("*.tar"))}
        assert folders == {*names, "crop_settings", "key", "size"}, "all that can be, by default"


def test_what_cannot_be_known_is_refused_in_one_line(built: tuple[str, bool], tmp_path: Path) -> None:
    url, kept = built
    with pytest.raises(
        ConfigError, match="instances.* from pickled arrays alone, and fourmill writes no pickle"
    ):
        export_dataset(url, str(tmp_path / "out"), ["instances"])
    if not kept:
        with pytest.raises(
            ConfigError, match="palette.*not kept, and each image's palettes can't be made.*keep_labels"
        ):
            export_dataset(url, str(tmp_path / "out"), ["palette"])
    assert not (tmp_path / "out").exists()


def test_an_imported_dataset_is_exported_again(built: tuple[str, bool], tmp_path: Path) -> None:
    url, _ = built
    export_dataset(url, str(tmp_path / "out"), ["caption", "metadata", "poses"])
    assert call_main("import-webdataset", tmp_path / "out", tmp_path / "ds") == 0
    for command in (["status"], ["status", "--licenses"], ["inspect"], ["qa"], ["gc"], ["verify"]):
        assert call_main(command[0], tmp_path / "ds", *command[1:]) == 0
    assert call_main("report", tmp_path / "ds") == 2, "it has no source whose pictures it could show"
    assert call_main("export", tmp_path / "ds", tmp_path / "again") == 0
    for name in ("metadata", "poses", "caption"):
        assert members(tmp_path / "again" / name) == members(tmp_path / "out" / name)
    assert call_main("export", tmp_path / "ds", tmp_path / "parquet", "--format", "parquet") == 0
    (tmp_path / "gone.txt").write_text(snapshot_of(Dataset(str(tmp_path / "ds"))).keys(0)[0] + "\n")
    assert call_main("drop-keys", tmp_path / "ds", tmp_path / "gone.txt") == 0
    assert call_main("snapshot", tmp_path / "ds") == 0
    report = export_dataset(str(tmp_path / "ds"), str(tmp_path / "less"))
    assert report.left_out["not chosen, or dropped"] == 1
