import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from handmade import ROWS, SHARDS, Built, build

from fourmill.errors import ConfigError, WorkMissing
from fourmill.labels import Absent, Boxes, Label
from fourmill.shards.export import export_webdataset
from fourmill.shards.samples import OK
from fourmill.storage import Store

DONE = ("shards", "rows", "left_out", "licenses", "provenance")  # what an export says of itself at its end


def read_export(url: str) -> dict[str, dict[str, dict[str, bytes]]]:
    """Folder -> tar -> member -> bytes, in the order of the files."""
    store = Store(url)
    found: dict[str, dict[str, dict[str, bytes]]] = {}
    for folder in store.names(""):
        for name in (n for n in store.names(folder) if n.endswith(".tar")) if "." not in folder else ():
            with tarfile.open(fileobj=io.BytesIO(store.read(f"{folder}/{name}"))) as tar:
                members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
            found.setdefault(folder, {})[name] = members
    return found


def expected_rows(built: Built, names: Sequence[str], split: str) -> list[list[int]]:
    def wanted(shard: int, row: int) -> bool:
        sample = built.samples[shard][row]
        present = all(not isinstance(built.cells[name][shard][row], Absent) for name in names)
        return sample["status"] == OK and sample["split"] == split and present

    return [[row for row in range(ROWS) if wanted(shard, row)] for shard in range(SHARDS)]


def load(data: bytes) -> np.ndarray:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    assert isinstance(array, np.ndarray)
    return array


NAMES = ["caption", "det", "feature", "rgb", "score"]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_an_export_is_aligned_and_complete(tmp_path: Path, where: str) -> None:
    built = build(str(tmp_path / "dataset"))
    out = str(tmp_path / "out") if where == "local" else "memory://exported/here"
    report = export_webdataset(built.snapshot, out)
    rows = expected_rows(built, NAMES, "train")
    found = read_export(out)
    assert set(found) == {*NAMES, "crop_settings", "key", "size"}
    assert report.rows == sum(map(len, rows)) > 0 and report.shards == len(found["rgb"])
    assert report.rows + sum(report.left_out.values()) == SHARDS * ROWS
    assert {"set aside", "without caption", "without score", "of another split"} == set(report.left_out)

    stems = {
        f: [(tar, [n.split(".")[0] for n in members]) for tar, members in tars.items()]
        for f, tars in found.items()
    }
    assert all(names == stems["rgb"] for names in stems.values())
    assert [tar for tar, _ in stems["rgb"]] == [f"shard-{i:05d}.tar" for i in range(report.shards)]

    for tar, names in stems["rgb"]:
        for stem in names:
            shard, row = map(int, stem.split("_"))
            assert row in rows[shard]
            sample = built.samples[shard][row]
            rgb = load(found["rgb"][tar][f"{stem}.npy"])
            assert rgb.dtype == np.int16 and np.array_equal(rgb, np.stack(built.cells["rgb"][shard][row]))
            crops = load(found["crop_settings"][tar][f"{stem}.npy"])
            assert (
                crops.dtype == np.int64
                and crops.reshape(-1).tolist() == sample["crops"]
                and crops.shape == (2, 5)
            )
            feature = load(found["feature"][tar][f"{stem}.npy"])
            assert feature.dtype == np.float16 and np.array_equal(
                feature, np.stack(built.cells["feature"][shard][row])
            )
            assert json.loads(found["caption"][tar][f"{stem}.json"]) == sample["captions"]
            assert json.loads(found["score"][tar][f"{stem}.json"]) == 0.25 * row
            assert found["key"][tar][f"{stem}.txt"].decode() == sample["key"]
            assert json.loads(found["size"][tar][f"{stem}.json"]) == [90, 60]
            boxes = built.boxes[shard][row]
            instances = json.loads(found["det"][tar][f"{stem}.json"])["instances"]
            assert [i["boxes"] for i in instances] == boxes.xyxy.tolist()
            assert [i["class_name"] for i in instances] == [("cat", "dog")[c] for c in boxes.class_ids]
            assert [i["score"] for i in instances] == boxes.scores.tolist()
    facts = json.loads(Store(out).read("export.json"))
    assert facts["complete"] and facts["modality_name_map"]["rgb"] == "tok_rgb@32"
    if where == "memory":
        Store(out).fs.rm("/exported", recursive=True)


def test_splits_do_not_mix_and_leave_no_gaps(tmp_path: Path) -> None:
    built = build(str(tmp_path / "dataset"))
    seen: list[str] = []
    for split in ("train", "val"):
        report = export_webdataset(built.snapshot, str(tmp_path / split), ["rgb"], split=split)
        tars = read_export(str(tmp_path / split))["key"]
        assert list(tars) == [f"shard-{i:05d}.tar" for i in range(report.shards)]
        assert report.rows == sum(map(len, expected_rows(built, ["rgb"], split)))
        seen += [data.decode() for members in tars.values() for data in members.values()]
    readable = [s["key"] for shard in built.samples for s in shard if s["status"] == OK]
    assert sorted(seen) == sorted(readable)
    with pytest.raises(WorkMissing, match="no row of split 'test'"):
        export_webdataset(built.snapshot, str(tmp_path / "test"), ["rgb"], split="test")


def test_an_interrupted_export_is_finished_with_the_same_bytes(tmp_path: Path) -> None:
    built = build(str(tmp_path / "dataset"))
    out = str(tmp_path / "out")
    export_webdataset(built.snapshot, out, ["rgb", "det"])
    before = read_export(out)
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    begun = {k: v for k, v in facts.items() if k not in DONE} | {"complete": False}
    (tmp_path / "out" / "export.json").write_text(json.dumps(begun))
    (tmp_path / "out" / "rgb" / "shard-00000.tar").unlink()
    export_webdataset(built.snapshot, out, ["rgb", "det"])
    assert read_export(out) == before
    for other in (["rgb"], ["rgb", "score"]):
        with pytest.raises(ConfigError, match="not empty"):
            export_webdataset(built.snapshot, out, other)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="not empty"):
        export_webdataset(built.snapshot, str(tmp_path / "photos"), ["rgb"])


def test_boxes_without_kept_labels_come_from_the_centre_crop(tmp_path: Path) -> None:
    built = build(str(tmp_path / "dataset"), n_crops=1, keep_labels=False, val_fraction=0)
    with pytest.raises(ConfigError, match=r"det.*not kept.*keep_labels"):
        export_webdataset(built.snapshot, str(tmp_path / "out"), ["det"])
    whole = Boxes(np.array([[0, 0, 1, 1]], np.float32), np.array([1]), np.ones(1, np.float32))

    def decode(values: Sequence[np.ndarray]) -> list[Label]:
        return [whole if len(value) else Boxes.empty() for value in values]

    export_webdataset(built.snapshot, str(tmp_path / "out"), ["det"], decode={"det": decode})
    found = read_export(str(tmp_path / "out"))["det"]
    all_instances = [json.loads(data)["instances"] for members in found.values() for data in members.values()]
    assert {len(instances) for instances in all_instances} == {0, 1}
    for instance in (i for instances in all_instances for i in instances):  # the middle square of 90 x 60
        assert np.allclose(instance["boxes"], [15 / 90, 0, 75 / 90, 1]) and instance["class_name"] == "dog"


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    built = build(str(tmp_path / "dataset"))
    for names, words in (
        (["rgb_pixels"], "leave it out"),
        (["rgbb"], "did you mean 'rgb'"),
        ([], "at least one"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_webdataset(built.snapshot, str(tmp_path / "out"), names)
    assert not (tmp_path / "out").exists()
