"""Labels that lie in files already: matched by key, held to the contract, and hostile files set aside by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from fourmill.errors import ConfigError, SourceError
from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, labelers
from fourmill.labelers.contract import check_labeler, failures
from fourmill.labelers.contract_inputs import USUAL_SIZES
from fourmill.labels import Absent, Boxes

FRAME = np.zeros((20, 30, 3), np.uint8)


def importer(kind: str, url: Path | str, **options: Any) -> Labeler:
    options["url"] = str(url)
    return labelers.get(f"imported_{kind}")(LabelerSettings(kind, options=options))


def label_of(labeler: Labeler, *keys: str, frame: np.ndarray = FRAME) -> Any:
    """The label of one key, or of several a list."""
    batch = LabelBatch(keys=keys, frames=[frame] * len(keys), present=np.ones(len(keys), bool))
    labels = labeler.label(batch)
    return labels[0] if len(keys) == 1 else labels


def png(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "PNG")
    return sink.getvalue()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=allow_pickle)
    return sink.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# -- what files become --------------------------------------------------------------------------------


def test_masks_in_a_folder_by_relative_path(tmp_path: Path) -> None:
    ids = np.repeat(np.arange(3, dtype=np.uint8), 10)[None].repeat(20, 0)  # three stripes
    put(tmp_path / "a" / "one.two.png", png(ids))
    put(tmp_path / "large.png", png(np.kron(ids, np.ones((3, 3), np.uint8))))
    palette = Image.fromarray(ids, "P")
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    labeler = importer("semseg", tmp_path, classes=["floor", "wall", "box"])
    assert labeler.describe().contract.classes == ("floor", "wall", "box")
    for label in label_of(labeler, "a/one.two", "large", "palette"):
        assert label.dtype == np.uint8 and np.array_equal(label, ids), "a large one is resized to the frame"
    assert label_of(labeler, "a/one") == Absent("n/a: no imported label")


def test_void_becomes_a_class_of_its_own(tmp_path: Path) -> None:
    put(tmp_path / "x.png", png(np.full((20, 30), 255, np.uint8)))
    labeler = importer("semseg", tmp_path, classes=["floor"], void=255)
    assert labeler.describe().contract.classes == ("floor", "void")
    assert (label_of(labeler, "x") == 1).all()
    without = label_of(importer("semseg", tmp_path, classes=["floor"]), "x")
    assert without == Absent("imported label: x.png has class ids 255..255; there are 1 classes")


def test_depth_in_millimetres_and_its_holes(tmp_path: Path) -> None:
    depth_mm = np.full((20, 30), 2500, np.uint16)
    depth_mm[:, 20:] = 4000
    depth_mm[5, 5] = 0
    put(tmp_path / "0001_depth.png", png(depth_mm))
    put(tmp_path / "0001_rgb.png", png(FRAME))
    put(tmp_path / "0002_depth.png", png(np.zeros((20, 30), np.uint16)))
    labeler = importer("depth", tmp_path, scale=0.001, suffix="_depth")
    label = label_of(labeler, "0001")
    assert label.dtype == np.float32
    assert label[5, 5] == label[0, 0] == np.float32(2.5) and label[0, 29] == np.float32(4)
    assert label_of(labeler, "0002") == Absent(
        "imported label: 0002_depth.png: 100% of its pixels have no depth"
    )
    with pytest.raises(ConfigError, match=r"modalities\.depth\.scale: PNGs hold integers"):
        importer("depth", tmp_path, suffix="_depth").describe()


def test_depth_in_metres_from_npy(tmp_path: Path) -> None:
    """float64 in another order of bytes and of axes."""
    depth_m = np.linspace(1, 2, 600).reshape(20, 30)
    put(tmp_path / "x.npy", npy(np.asfortranarray(depth_m.astype(">f8"))[..., None]))
    assert np.allclose(label_of(importer("depth", tmp_path), "x"), depth_m)


def test_normals_are_turned_and_have_length_one(tmp_path: Path) -> None:
    """(0, 0.6, 0.8) as a picture whose y and z point the other way; a pixel that says nothing looks at the viewer."""
    picture = np.full((20, 30, 3), (128, round(127.5 * 0.4), round(127.5 * 0.2)), np.uint8)
    picture[0, 0] = (128, 128, 128)
    put(tmp_path / "x.png", png(picture))
    label = label_of(importer("normal", tmp_path, negate="yz"), "x")
    assert np.allclose(label[10, 10], (0, 0.6, 0.8), atol=0.01) and np.allclose(label[0, 0], (0, 0, 1))
    assert np.allclose(np.linalg.norm(label, axis=-1), 1, atol=1e-5)
    with pytest.raises(ConfigError, match="negate"):
        importer("normal", tmp_path, negate="w")


def test_members_of_tars_answer_to_two_keys(tmp_path: Path) -> None:
    """As the source `webdataset` names its rows, and alone where no other tar has one of that name."""
    maps = [np.full((20, 30), value, np.float32) for value in (1, 2, 3)]
    write_tar(tmp_path / "000.tar", {"./cat.depth.npy": npy(maps[0]), "dog.npy": npy(maps[1])})
    write_tar(tmp_path / "001.tar", {"cat.npy": npy(maps[2]), "notes.txt": b"no label"})
    for url in (tmp_path, f"{tmp_path}/{{000..001}}.tar", f"{tmp_path}/*.tar"):
        labeler = importer("depth", url)
        one, three, two = label_of(labeler, "000/cat", "001/cat", "dog")
        assert (one.max(), two.max(), three.max()) == (1, 2, 3)
        assert label_of(labeler, "cat") == Absent("n/a: no imported label"), "two labels claim it"
    with pytest.raises(SourceError, match=r"002\.tar is missing"):
        _ = importer("depth", f"{tmp_path}/{{000..002}}.tar").recipe()


def coco(**changes: Any) -> dict[str, Any]:
    content = {
        "images": [
            {"id": 7, "file_name": "train/one.jpg", "width": 200, "height": 100},
            {"id": 8, "file_name": "none.jpg", "width": 10, "height": 10},
            {"id": 9, "file_name": "bad.jpg", "width": 0, "height": 10},
        ],
        "categories": [{"id": 30, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 30, "bbox": [20, 10, 100, 50]},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [150, 50, 500, 50], "score": 0.5},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"id": 4, "image_id": 7, "category_id": 2, "bbox": [300, 0, 9, 9]},
            {"id": 5, "image_id": 9, "category_id": 2, "bbox": [0, 0, 5, 5]},
            {"id": 6, "image_id": 99, "category_id": 2, "bbox": [0, 0, 5, 5]},
        ],
    }
    return content | changes


def test_boxes_of_a_coco_file(tmp_path: Path) -> None:
    file = put(tmp_path / "instances.json", json.dumps(coco()).encode())
    labeler = importer("det", file)
    assert labeler.describe().contract.classes == ("cat", "dog")
    found, none, bad, missing = label_of(labeler, "train/one", "none", "bad", "two")
    assert isinstance(found, Boxes) and found.class_ids.tolist() == [1, 0], "best first"
    assert np.allclose(found.xyxy, [[0.1, 0.1, 0.6, 0.6], [0.75, 0.5, 1, 1]]), "cut off at the border"
    assert isinstance(none, Boxes) and len(none) == 0, "nothing is there, and somebody looked"
    assert isinstance(bad, Absent) and "annotation 5 of bad.jpg" in bad.reason
    assert missing == Absent("n/a: no imported label")
    assert len(label_of(importer("det", file, min_score=0.6), "train/one")) == 1
    put(file, b"{")
    with pytest.raises(SourceError, match="is no JSON"):
        importer("det", file).describe()
    put(file, b"[]")
    with pytest.raises(SourceError, match="no COCO file"):
        importer("det", file).describe()
    with pytest.raises(ConfigError, match=r"expected a COCO file \(\.json\)"):
        importer("det", tmp_path).describe()


# -- hostile files ------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_files_that_are_no_labels_are_set_aside_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    header = npy(np.zeros((4, 4), np.float32))
    bad = {
        "pickled.npy": npy(np.array([Evil()], object), allow_pickle=True),
        "bare.npy": pickle.dumps(Evil()),
        "huge.npy": header[:128].replace(b"(4, 4)", b"(9999999, 9)")[:128],
        "short.npy": header[:-4],
        "words.npy": npy(np.array(["a", "b"])),
        "empty.npy": b"",
        "flat.npy": npy(np.zeros(5, np.float32)),
        "nothing.npy": npy(np.zeros((0, 4), np.float32)),
        "other.png": b"GIF89a",
        "cut.png": png(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))[:600],
        "bomb.png": png(np.zeros((1, 1), np.uint8)).replace(
            b"IHDR\0\0\0\1\0\0\0\1", b"IHDR\0\1\x86\xa0\0\1\x86\xa0"
        ),
    }
    for name, data in bad.items():
        put(tmp_path / "labels" / name, data)
    labeler = importer("depth", tmp_path / "labels", scale=1)
    for name in bad:
        label = label_of(labeler, name.rpartition(".")[0])
        assert isinstance(label, Absent) and label.reason.startswith(f"imported label: {name}"), (name, label)
    assert not (tmp_path / "executed").exists()


def test_keys_never_become_paths(tmp_path: Path) -> None:
    """What lies beside the folder, behind a link out of it, or in a member with a path is not reached by any key."""
    label = npy(np.ones((20, 30), np.float32))
    folder = tmp_path / "labels"
    put(folder / "inside.npy", label)
    put(tmp_path / "outside.npy", label)
    (folder / "link.npy").symlink_to(tmp_path / "outside.npy")
    (folder / ".hidden.npy").write_bytes(label)
    write_tar(folder / "t.tar", {"../../outside.npy": label, "/etc/absolute.npy": label})
    with tarfile.open(folder / "links.tar", "w") as archive:
        info = tarfile.TarInfo("linked.npy")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "outside.npy")
        archive.addfile(info)
    labeler = importer("depth", folder)
    hostile = (
        "../outside",
        str(tmp_path / "outside"),
        "link",
        ".hidden",
        "linked",
        "inside/../inside",
        "",
        "etc/passwd",
    )
    assert all(label_of(labeler, key) == Absent("n/a: no imported label") for key in hostile)
    assert isinstance(label_of(labeler, "inside"), np.ndarray)
    assert isinstance(label_of(labeler, "../../outside"), np.ndarray), (
        "a member's name is data: its bytes are the tar's"
    )


def test_a_damaged_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(SourceError, match=r"modalities\.depth\.url: bad\.tar of .* is no readable tar"):
        label_of(importer("depth", tmp_path), "x")


# -- identity -----------------------------------------------------------------------------------------


def test_the_recipe_follows_the_labels_and_not_their_place(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        put(tmp_path / folder / "x.npy", npy(np.ones((20, 30), np.float32)))
    here, there = (importer("depth", tmp_path / folder).recipe() for folder in ("here", "there"))
    assert here == there and str(tmp_path) not in json.dumps(here)
    put(tmp_path / "there" / "x.npy", npy(np.full((20, 30), 2, np.float32)))
    assert importer("depth", tmp_path / "there").recipe() != here, "of the same size, with other values"
    put(tmp_path / "here" / "y.npy", npy(np.ones((20, 30), np.float32)))
    assert importer("depth", tmp_path / "here").recipe() != here
    assert importer("depth", tmp_path / "here", scale=2).recipe()["params"]["scale"] == 2


def test_any_file_system_and_any_name(tmp_path: Path) -> None:
    """A second set of masks under a name of its own, in the memory of this process."""
    with fsspec.open("memory://masks/x.png", "wb") as sink:
        sink.write(png(np.ones((20, 30), np.uint8)))
    settings = LabelerSettings("parts", options={"url": "memory://masks", "classes": ["head", "tail"]})
    labeler = labelers.get("imported_semseg")(settings)
    assert labeler.describe().name == "parts" and (label_of(labeler, "x") == 1).all()


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("depth", {"url": None}, r"modalities\.depth\.url: say where"),
        ("depth", {"url": "nowhere/at/all"}, "no .png, .npy, .tar or .json there"),
        ("semseg", {"url": "."}, r"modalities\.semseg\.classes: list the names"),
        ("depth", {"url": ".", "scael": 1}, "did you mean 'scale'"),
    ],
)
def test_wrong_options_are_one_line(
    kind: str, options: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, SourceError), match=says):
        labeler = labelers.get(f"imported_{kind}")(LabelerSettings(kind, options=options))
        labeler.describe()
        labeler.recipe()


def test_they_keep_the_contract_of_labelers(tmp_path: Path) -> None:
    for number, (height, width) in enumerate(USUAL_SIZES):
        ids = np.random.default_rng(number).integers(0, 2, (height, width)).astype(np.uint8)
        put(tmp_path / "picture" / f"{number}.png", png(ids))
    settings = LabelerSettings("semseg", options={"url": str(tmp_path), "classes": ["a", "b"]})
    verdicts = check_labeler("imported_semseg", settings)
    assert failures(verdicts) == [] and all(verdict.state == "ok" for verdict in verdicts)
