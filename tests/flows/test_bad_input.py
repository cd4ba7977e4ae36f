"""Whatever a person gets wrong: one line that says what, where and what to do, an exit status, and nothing touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_builds import ORACLES, call_main, listing, small_config, small_content, without_ray, write_config

from fourmill.checkpoints import shipped_folder
from fourmill.flows.build import build

MODALITIES: dict[str, Any] = {"caption": {}, "rgb_pixels": {}}


@pytest.fixture(scope="module")
def existing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset that every one of these mistakes is pointed at."""
    url = tmp_path_factory.mktemp("existing") / "ds"
    with without_ray():
        build(small_config(url, MODALITIES, count=8))
    return url


Content = dict[str, Any]


def without(key: str) -> Callable[[Content], None]:
    return lambda content: content.pop(key)


def put(key: str, value: Any) -> Callable[[Content], None]:
    """Set a dotted key."""
    *parents, last = key.split(".")

    def change(content: Content) -> None:
        for parent in parents:
            content = content.setdefault(parent, {})
        content[last] = value

    return change


def both(*changes: Callable[[Content], Any]) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for one in changes:
            one(content)

    return change


BIG: dict[str, Any] = {"image_size": 128, "decode": {"shorter_side": 128}}

#: what is wrong -> (change of a good configuration, exit status, what the line says, each part of it)
MISTAKES: dict[str, tuple[Callable[[Content], Any], int, tuple[str, ...]]] = {
    "a key is missing": (without("source"), 2, ("source: missing", "required")),
    "a key is misspelt": (put("shard_sise", 4), 2, ("shard_sise", "did you mean 'shard_size'")),
    "a nested key is misspelt": (
        put("engine.batchsize", 4),
        2,
        ("engine.batchsize", "did you mean 'batch_size'"),
    ),
    "no modality": (put("modalities", {}), 2, ("modalities", "at least one")),
    "not a number": (put("shard_size", "many"), 2, ("shard_size", "'many'")),
    "out of range": (put("n_crops", 0), 2, ("n_crops", "greater than or equal to 1")),
    "unknown modality": (put("modalities.dept", {}), 2, ("modalities.dept", "did you mean 'depth'")),
    "unknown labeler": (
        put("modalities.depth", {"labeler": "oracle_deph"}),
        2,
        ("unknown labeler 'oracle_deph'", "oracle_depth"),
    ),
    "unknown option of a labeler": (
        put("modalities.det", {"min_scor": 0.5}),
        2,
        ("modalities.det.min_scor", "did you mean 'min_score'"),
    ),
    "labeler of another modality": (
        put("modalities.depth", {"labeler": "oracle_normal"}),
        2,
        ("modalities.depth.labeler", "makes 'normal'"),
    ),
    "upstream modality missing": (
        put("modalities.normal", {"labeler": "normal_from_depth"}),
        2,
        ("modalities.normal", "add `depth: {}`"),
    ),
    "unknown source": (put("source.kind", "scene"), 2, ("unknown source 'scene'", "did you mean 'scenes'")),
    "unknown option of a source": (put("source.cuont", 4), 2, ("source.cuont", "did you mean 'count'")),
    "option of a source missing": (put("source", {"kind": "webdataset"}), 2, ("source.url", "missing")),
    "group of an unknown modality": (
        put("engine.groups", [["captoin"]]),
        2,
        ("engine.groups", "did you mean 'caption'"),
    ),
    "checkpoint folder missing": (
        put("modalities.depth", {"model": "/nowhere/at/all"}),
        1,
        ("modalities.depth.model", "/nowhere/at/all", "does not exist"),
    ),
    "checkpoint that does not ship": (
        put("modalities.depth", {"model": "shipped:depht"}),
        2,
        ("shipped:depht", "depth"),
    ),
    "hub id without revision": (
        put("modalities.depth", {"model": "Intel/dpt-hybrid-midas"}),
        2,
        ("modalities.depth.model", "revision", "40-digit"),
    ),
    "hub id with a branch for a revision": (
        put("modalities.depth", {"model": "Intel/dpt-hybrid-midas", "revision": "main"}),
        2,
        ("revision", "'main'"),
    ),
    "tokenizer on the hub without a commit": (
        put("modalities.rgb", {"tokenizer": {"model": "a/b"}}),
        2,
        ("modalities.rgb.tokenizer.model", "revision", "40-digit"),
    ),
    "tokenizer of another image size": (
        put("modalities.rgb", {"tokenizer": {"model": "shipped:scenes/rgb"}}),
        1,
        ("128", "64"),
    ),
    "tokenizer of another modality": (
        both(
            lambda c: c.update(BIG), put("modalities.rgb", {"tokenizer": {"model": "shipped:scenes/normal"}})
        ),
        1,
        ("'normal'", "'rgb'"),
    ),
    "normals network for classes": (
        put("modalities.semseg", {"model": "shipped:normal"}),
        1,
        ("modalities.semseg.model", "x, y, z", "names its classes"),
    ),
    "class network for normals": (
        put("modalities.normal", {"model": "shipped:semseg"}),
        1,
        ("modalities.normal.model", "5 output channels", "normals network"),
    ),
    "CLIP for depth": (
        put("modalities.depth", {"model": "shipped:clip"}),
        1,
        ("modalities.depth.model", "clip"),
    ),
    "depth network for boxes": (
        put("modalities.det", {"model": "shipped:depth"}),
        1,
        ("modalities.det.model", "depth"),
    ),
    "detector for CLIP": (
        put("modalities.clip", {"model": "shipped:det"}),
        1,
        ("modalities.clip.model", "det"),
    ),
    "truth where there is none": (
        both(put("source", {"kind": "folder", "path": "."}), put("modalities.depth", ORACLES["depth"])),
        2,
        ("modalities.depth.labeler", "ground truth"),
    ),
    "another seed": (put("seed", 9), 2, ("seed = 0", "9", "can't change")),
    "another shard size": (put("shard_size", 5), 2, ("shard_size = 4", "5")),
    "another source": (put("source.size", 32), 2, ("source", "can't change")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_configuration(
    mistake: str, tmp_path: Path, existing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, status, words = MISTAKES[mistake]
    content = small_content(existing, MODALITIES, count=8)
    change(content)
    before = listing(existing)
    capsys.readouterr()
    code = call_main("build", write_config(tmp_path / "c.yaml", content), "--no-prefect")
    refused(capsys, code, status, words)
    assert listing(existing) == before


def refused(capsys: pytest.CaptureFixture[str], code: int, status: int, words: tuple[str, ...]) -> None:
    line = one_line(capsys)
    assert code == status, line
    assert all(word in line for word in words), f"{line!r} lacks one of {words}"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: a line, without a traceback."""
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert len(lines) == 1, said.err
    assert len(lines[0]) < 600
    return lines[0]


@pytest.mark.parametrize("mistake", ["CLIP for depth", "another seed", "unknown modality"])
def test_a_dataset_that_is_not_there_stays_so(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is refused before any work leaves no folder behind."""
    url = tmp_path / "ds"
    content = small_content(url, MODALITIES)
    MISTAKES[mistake][0](content)
    if mistake == "another seed":
        content["seed"] = -1
    assert call_main("build", write_config(tmp_path / "c.yaml", content), "--no-prefect") in (1, 2)
    one_line(capsys)
    assert not url.exists()


# -- checkpoints that are damaged ---------------------------------------------------------------------


def depth_copy(tmp_path: Path) -> Path:
    folder = tmp_path / "depth-copy"
    shutil.copytree(shipped_folder("depth"), folder)
    return folder


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def another_width(folder: Path) -> None:
    """The weights do not fit the network that the configuration describes."""
    config = json.loads((folder / "config.json").read_text())
    config["fusion_hidden_size"] = 2 * int(config.get("fusion_hidden_size", 64))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [lose_weights, cut_weights, lose_config, another_width])
def test_a_damaged_checkpoint(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = tmp_path / "ds", depth_copy(tmp_path)
    damage(folder)
    content = small_content(url, {"rgb_pixels": {}, "depth": {"model": str(folder)}}, count=4)
    before = listing(folder)
    code = call_main("build", write_config(tmp_path / "c.yaml", content), "--no-prefect")
    refused(capsys, code, 1, ("modalities.depth.model", str(folder)))
    assert listing(folder) == before
    assert not list(url.glob("tokens/*/*")) and not list(url.glob("receipts/*/*/shard-*"))


# -- sources ------------------------------------------------------------------------------------------


def folder_content(tmp_path: Path, url: Path) -> Content:
    (tmp_path / "images").mkdir(exist_ok=True)
    content = small_content(url, MODALITIES)
    return content | {"source": {"kind": "folder", "path": str(tmp_path / "images")}}


def test_an_empty_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", folder_content(tmp_path, url))
    (tmp_path / "images" / "notes.md").write_text("no image")
    code = call_main("build", config, "--no-prefect")
    refused(capsys, code, 2, (str(tmp_path / "images"), "no image"))
    assert not url.exists()


def test_a_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = tmp_path / "ds"
    content = folder_content(tmp_path, url) | {"source": {"kind": "folder", "path": str(tmp_path / "imgs")}}
    code = call_main("build", write_config(tmp_path / "c.yaml", content), "--no-prefect")
    refused(capsys, code, 2, (str(tmp_path / "imgs"),))
    assert not url.exists()


def test_a_source_without_a_readable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", folder_content(tmp_path, url))
    for index in range(5):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(b"not a picture")
    capsys.readouterr()
    code = call_main("build", config, "--no-prefect")
    refused(capsys, code, 2, (str(tmp_path / "images"), "no readable image"))


# -- the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "shard_size"], ("--set shard_size", "key=value")),
        (["--set", "=4"], ("--set =4", "key=value")),
        (["--set", "shard_sise=4"], ("shard_sise", "did you mean")),
        (["--set", "shard_size.deep=4"], ("--set shard_size.deep=4", "'shard_size'")),
        (["--set", "modalities=[unclosed"], ("--set", "not a YAML value")),
        (["--shards", "5"], ("--shards 5", "A:B")),
        (["--shards", "3:1"], ("--shards 3:1", "A < B")),
        (["--shards", "-1:2"], ("--shards -1:2", "A:B")),
        (["--shards", "90:95"], ("--shards 90:95", "shards 0 to 1")),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    words: tuple[str, ...],
    tmp_path: Path,
    existing: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path / "c.yaml", small_content(existing, MODALITIES, count=8))
    before = listing(existing)
    code = call_main("build", config, "--no-prefect", *arguments)
    refused(capsys, code, 2, words)
    assert listing(existing) == before


@pytest.mark.parametrize(
    "arguments",
    [["buidl", "demo"], ["build"], ["build", "demo", "--limit", "0"], ["build", "demo", "--fast"]],
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main(*arguments) == 2
    said = capsys.readouterr().err
    assert "Usage" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: [unclosed", ("not valid YAML",)),
        ("- a list", ("expected keys and values, found list",)),
        ("", ("expected keys and values",)),
        ("\x00\x01", ("YAML",)),
    ],
)
def test_a_file_that_is_no_configuration(
    text: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    code = call_main("build", config, "--no-prefect")
    refused(capsys, code, 2, (str(config), *words))


def test_no_such_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, call_main("build", "dmo"), 2, ("'dmo'", "did you mean 'demo'"))


@pytest.mark.parametrize("name", ["status", "export"])
def test_what_is_not_a_dataset(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.txt").write_text("mine")
    more = [tmp_path / "out"] if name == "export" else []
    code = call_main(name, tmp_path, *more)
    refused(capsys, code, 2, (str(tmp_path), "not a dataset"))
    assert [path.name for path in tmp_path.iterdir()] == ["some.txt"]


def test_a_dataset_of_another_format(
    tmp_path: Path, existing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = tmp_path / "ds"
    shutil.copytree(existing, url)
    identity = yaml.safe_load((url / "dataset.yaml").read_text())
    (url / "dataset.yaml").write_text(yaml.safe_dump({**identity, "format": 2}))
    refused(capsys, call_main("status", url), 1, (str(url), "format 2", "format 1"))


@pytest.mark.parametrize("victim", ["receipt", "samples receipt", "recipe"])
def test_a_damaged_receipt(
    victim: str, tmp_path: Path, existing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, with the way out; nobody trusts it."""
    url = tmp_path / "ds"
    shutil.copytree(existing, url)
    pattern = {
        "receipt": "receipts/caption/*/shard-000000.json",
        "samples receipt": "receipts/samples/*/shard-000000.json",
        "recipe": "receipts/caption/*/recipe.json",
    }[victim]
    (file,) = url.glob(pattern)
    file.write_text(file.read_text().replace('"', "'", 1) if victim == "recipe" else '{"rows": 4}')
    code = call_main("status", url)
    if victim == "recipe":  # of the recipe that is wanted nobody reads the text
        assert code in (0, 1)
        return
    refused(capsys, code, 1, (file.name, "remove it"))


def test_doctor_says_what_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", folder_content(tmp_path, url))
    (tmp_path / "images" / "0.jpg").write_bytes(b"not a picture")
    assert call_main("doctor", config) == 1
    assert "source" in one_line(capsys)
    assert not url.exists()
