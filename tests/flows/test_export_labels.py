"""Kept labels as a COCO file and as a FiftyOne dataset."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_builds import ORACLES, call_main, small_config, without_ray, write_images

from fourmill.errors import ConfigError, WorkMissing
from fourmill.flows.build import build
from fourmill.flows.exporting import export_dataset, snapshot_of
from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, labelers
from fourmill.labelers.imported import ImportedDet
from fourmill.labels import Absent, Boxes, Instances, Label
from fourmill.modality import LabelContract, Modality
from fourmill.shards.dataset import Dataset
from fourmill.shards.export_cells import kept_labels
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tar import read_labels
from fourmill.storage import Store

MODALITIES: dict[str, Any] = {
    "caption": {},
    "det": {**ORACLES["det"], "keep_labels": True},
    "semseg": {**ORACLES["semseg"], "keep_labels": True},
    "rgb_pixels": {},
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = small_config(tmp_path_factory.mktemp("made") / "ds", MODALITIES, count=12)
    with without_ray():
        build(config)
    return config.dataset


def kept(snapshot: Snapshot, name: str) -> Iterator[tuple[dict[str, Any], Label]]:
    """Every sample with its kept label."""
    dataset, (short, _) = snapshot.dataset, kept_labels(snapshot, name)
    for ref in snapshot.shards:
        labels = read_labels(
            dataset.store.read(dataset.receipt(name, short, ref.index).file), snapshot.modalities[name]
        )
        rows = dataset.table(ref.files["samples"]).to_pylist()
        yield from ((sample, labels[row]) for row, sample in enumerate(rows))


def check_coco(content: Any) -> None:
    """What pycocotools relies on: it indexes by these ids, and reads these keys of an annotation."""
    for part in ("images", "annotations", "categories"):
        ids = [entry["id"] for entry in content[part]]
        assert len(set(ids)) == len(ids) and all(type(i) is int and 0 < i < 2**53 for i in ids), part
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    assert len({image["file_name"] for image in images.values()}) == len(images)
    for annotation in content["annotations"]:
        assert annotation["category_id"] in categories and annotation["iscrowd"] == 0
        image = images[annotation["image_id"]]
        left, top, width, height = annotation["bbox"]
        assert left >= 0 and top >= 0 and width > 0 and height > 0
        assert left + width <= image["width"] + 1e-3 and top + height <= image["height"] + 1e-3
        assert annotation["area"] > 0
        assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in annotation["segmentation"])


def test_boxes_as_coco(url: str, tmp_path: Path) -> None:
    assert call_main("export", url, tmp_path / "coco" / "boxes.json", "--format", "coco") == 0
    content = json.loads((tmp_path / "coco" / "boxes.json").read_text())
    check_coco(content)
    snapshot = snapshot_of(Dataset(url))
    classes = snapshot.modalities["det"].contract.classes
    assert [c["name"] for c in content["categories"]] == list(classes)
    by_key = {image["key"]: image for image in content["images"]}
    there = 0
    for sample, label in kept(snapshot, "det"):
        image = by_key.pop(sample["key"])
        assert (image["width"], image["height"]) == (sample["width"], sample["height"]) == (64, 64)
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        there += len(found)
        expected = label.xyxy.astype(np.float64) * 64
        boxes = np.array([a["bbox"] for a in found]).reshape(-1, 4)
        assert np.array_equal(
            boxes, np.concatenate([expected[:, :2], expected[:, 2:] - expected[:, :2]], axis=1)
        )
        assert [a["category_id"] - 1 for a in found] == label.class_ids.tolist()
        assert [a["score"] for a in found] == label.scores.astype(float).tolist()
    assert not by_key and there == len(content["annotations"]) > 12
    read = ImportedDet(LabelerSettings("det", options={"url": str(tmp_path / "coco" / "boxes.json")}))
    assert read.describe().contract.classes == classes
    frame = np.zeros((64, 64, 3), np.uint8)
    for sample, label in kept(snapshot, "det"):
        again = read.one(sample["key"], frame)
        assert isinstance(again, Boxes) and len(again) == len(label)


def test_ids_stay_and_take_downs_count(url: str, tmp_path: Path) -> None:
    export_dataset(url, str(tmp_path / "a.json"), layout="coco")
    content = json.loads((tmp_path / "a.json").read_text())
    export_dataset(url, "memory://coco/b.json", layout="coco")
    assert Store("memory://coco").read("b.json") == (tmp_path / "a.json").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        export_dataset(url, str(tmp_path / "a.json"), layout="coco")
    train = export_dataset(url, str(tmp_path / "train.json"), layout="coco", split="train")
    some = json.loads((tmp_path / "train.json").read_text())
    ids = {image["key"]: image["id"] for image in content["images"]}
    assert 0 < len(some["images"]) == train.rows < len(ids)
    assert all(ids[image["key"]] == image["id"] for image in some["images"])
    assert [a for a in content["annotations"] if a["image_id"] in {i["id"] for i in some["images"]}] == some[
        "annotations"
    ]
    shutil.copytree(url, tmp_path / "ds")
    (tmp_path / "gone.txt").write_text(content["images"][1]["key"] + "\n")
    assert call_main("drop-keys", tmp_path / "ds", tmp_path / "gone.txt") == 0
    report = export_dataset(str(tmp_path / "ds"), str(tmp_path / "less.json"), layout="coco")
    less = json.loads((tmp_path / "less.json").read_text())
    assert report.left_out == {"not chosen, or dropped": 1}
    assert less["images"] == content["images"][:1] + content["images"][2:]
    assert content["images"][1]["id"] not in {a["image_id"] for a in less["annotations"]}


def test_what_coco_cannot_hold_is_refused(url: str, tmp_path: Path) -> None:
    for out, names, split, words in (
        ("a.json", ["caption"], None, "'caption' holds no boxes or object instances"),
        ("a", None, None, "name a .json file"),
        ("a.json", None, "test", "--split test: train, val or all"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_dataset(url, str(tmp_path / out), names, split, "coco")
    config = small_config(tmp_path / "ds", {"det": ORACLES["det"]}, count=12)
    with without_ray():
        build(config)
    with pytest.raises(ConfigError, match="labels of 3 shards were not kept; set modalities.det.keep_labels"):
        export_dataset(config.dataset, str(tmp_path / "a.json"), layout="coco")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds"]


class Things(Labeler):
    """Triangles; nothing in the second picture of a batch, and no answer for the third."""

    modality = Modality(
        name="things", kind="sequence", codec="instances", contract=LabelContract(form="instances", dtype="")
    )

    def label(self, batch: LabelBatch) -> list[Label]:
        outline = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.5]]
        one = Instances.of([[0.25, 0.25, 0.75, 0.5]], [outline], np.ones((1, 16)))
        found: list[Label] = [one, Instances.empty(), Absent("n/a: too dark"), one]
        return [found[number % 4] for number in range(len(batch.frames))]


def test_instances_and_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own file names; two modalities in one file have categories of their own."""
    write_images(tmp_path / "photos", ["a.png", "b.c.png", "d.png", "e.png"], size=80)
    monkeypatch.setattr(labelers, "_known", {**dict(labelers.items()), "things": Things})
    source = {"kind": "folder", "path": str(tmp_path / "photos")}
    config = small_config(tmp_path / "ds", {"caption": {}, "things": {"keep_labels": True}}, source=source)
    with without_ray():
        build(config)
    report = export_dataset(config.dataset, str(tmp_path / "a.json"), layout="coco")
    content = json.loads((tmp_path / "a.json").read_text())
    check_coco(content)
    assert report.rows == 3 and report.left_out == {"without things": 1}
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.c.png", "e.png"]
    assert content["categories"] == [{"id": 1, "name": "instance", "supercategory": "things"}]
    assert [a["segmentation"] for a in content["annotations"]] == [[[20, 20, 60, 20, 20, 40]]] * 2
    assert {(*a["bbox"], a["area"]) for a in content["annotations"]} == {(20, 20, 40, 20, 400)}


# -- FiftyOne: a stand-in of the little that is used of it --------------------------------------------


class FakeDataset:
    known: dict[str, FakeDataset] = {}  # noqa: RUF012 a stand-in

    def __init__(self, name: str, persistent: bool = False) -> None:
        assert persistent
        self.samples: list[Any] = []
        self.mask_targets: dict[str, dict[int, str]] = {}
        self.known[name] = self

    def delete(self) -> None:
        FakeDataset.known.pop(next(n for n, one in FakeDataset.known.items() if one is self))

    def add_samples(self, samples: list[Any]) -> None:
        self.samples += samples


class FakeSample(dict[str, Any]):
    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)


@pytest.fixture
def fiftyone(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("fiftyone")
    FakeDataset.known = {}
    parts = {name: FakeSample for name in ("Sample", "Detection", "Detections", "Segmentation")}
    for name, value in {
        **parts,
        "Dataset": FakeDataset,
        "dataset_exists": FakeDataset.known.__contains__,
    }.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "fiftyone", module)
    return module


def test_a_fiftyone_dataset(url: str, tmp_path: Path, fiftyone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    report = export_dataset(url, str(tmp_path / "scenes"), layout="fiftyone")
    made = FakeDataset.known["scenes"]
    assert report.rows == len(made.samples) == 12
    snapshot = snapshot_of(Dataset(url))
    assert made.mask_targets == {"semseg": dict(enumerate(snapshot.modalities["semseg"].contract.classes))}
    maps = {sample["key"]: label for sample, label in kept(snapshot, "semseg")}
    for entry, (sample, label) in zip(made.samples, kept(snapshot, "det"), strict=True):
        assert entry["key"] == sample["key"] and entry["tags"] == [sample["split"]]
        assert entry["captions"] == sample["captions"]
        with Image.open(entry["filepath"]) as image:
            assert image.size == (64, 64)
        assert np.array_equal(entry["semseg"]["mask"], maps[sample["key"]])
        found = entry["det"]["detections"]
        corners = [[*d["bounding_box"][:2], d["bounding_box"][0] + d["bounding_box"][2]] for d in found]
        assert np.allclose(np.array(corners).reshape(-1, 3), label.xyxy[:, :3])
        assert [d["confidence"] for d in found] == label.scores.astype(float).tolist()
    with pytest.raises(ConfigError, match="there is a FiftyOne dataset 'scenes' already"):
        export_dataset(url, str(tmp_path / "scenes"), layout="fiftyone")
    with pytest.raises(ConfigError, match="--split test: train, val or all"):
        export_dataset(url, str(tmp_path / "none"), split="test", layout="fiftyone")
    with pytest.raises(ConfigError, match="'rgb_pixels': it is not shown there"):
        export_dataset(url, str(tmp_path / "other"), ["rgb_pixels"], layout="fiftyone")
    config_free = export_dataset(url, str(tmp_path / "held"), ["det"], "val", "fiftyone")
    assert 0 < config_free.rows < 12 and "captions" not in FakeDataset.known["held"].samples[0]
    monkeypatch.setattr(FakeDataset, "add_samples", lambda self, samples: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_dataset(url, str(tmp_path / "half"), layout="fiftyone")
    assert set(FakeDataset.known) == {"scenes", "held"}


def test_without_fiftyone_one_line_says_so(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(ConfigError, match="install it with: pip install fiftyone") as caught:
        export_dataset(url, str(tmp_path / "x"), layout="fiftyone")
    assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()


def test_nothing_left_is_said(url: str, tmp_path: Path) -> None:
    shutil.copytree(url, tmp_path / "ds")
    keys = [key for shard in range(3) for key in snapshot_of(Dataset(url)).keys(shard)]
    (tmp_path / "gone.txt").write_text("\n".join(keys))
    assert call_main("drop-keys", tmp_path / "ds", tmp_path / "gone.txt") == 0
    with pytest.raises(WorkMissing, match="no row of split 'all' is left to export"):
        export_dataset(str(tmp_path / "ds"), str(tmp_path / "a.json"), layout="coco")
    assert not (tmp_path / "a.json").exists()
