"""Real photographs of every usual kind, with broken files among them, from a folder and a tar to a finished dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photographs import Written, write_photo_folder, write_photo_tar
from small_builds import call_main, small_content, without_ray, write_config

from fourmill.config import Config, check_config
from fourmill.errors import WorkMissing
from fourmill.flows.build import build
from fourmill.flows.resolve import resolve
from fourmill.flows.training import codec_of, make_snapshot
from fourmill.shards.dataset import Dataset

MODALITIES: dict[str, Any] = {
    name: {} for name in ("rgb", "caption", "rgb_pixels", "depth", "normal", "semseg", "det", "clip")
}


def photo_content(url: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Specialists that ship (they have seen nothing but scenes), tokenizers fitted on these photographs."""
    return small_content(
        url, MODALITIES, source=source, shard_size=10, val_fraction=0.1,
        decode={"shorter_side": 128}, image_size=128, engine={"batch_size": 5, "device": "cpu"},
        fit={"preset": "demo", "steps": 2, "samples": 10, "batch_size": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Written]:
    root = tmp_path_factory.mktemp("folder")
    written = write_photo_folder(root / "photos")
    content = photo_content(root / "ds", {"kind": "folder", "path": str(root / "photos")})
    assert call_main("build", write_config(root / "c.yaml", content), "--no-prefect") == 0
    return check_config(content, "test"), written


def states(dataset: Dataset, shards: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for shard in range(shards):
        table = dataset.samples(shard)
        found |= dict(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True))
    return found


def check_states(config: Config, written: Written) -> None:
    total = len(written["ok"]) + len(written["broken"])
    found = states(Dataset(config.dataset), -(-total // config.shard_size))
    assert found == {key: "ok" for key in written["ok"]} | written["broken"]


def test_every_file_is_used_or_set_aside_with_a_reason(folder: tuple[Config, Written]) -> None:
    check_states(*folder)
    assert len(folder[1]["broken"]) == 8


def test_status_counts_them(folder: tuple[Config, Written], capsys: pytest.CaptureFixture[str]) -> None:
    config, written = folder
    capsys.readouterr()
    assert call_main("status", config.dataset, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    total = len(written["ok"]) + len(written["broken"])
    assert found["complete"] and found["samples"] == total
    assert found["rejected"] == len(written["broken"])
    for name, column in found["modalities"].items():
        assert column["rows"] == total
        without_caption = sum(key.startswith("motorcycle 2") for key in written["ok"])
        assert column["absent"] == len(written["broken"]) + (without_caption if name == "caption" else 0)
    assert call_main("status", config.dataset) == 0
    said = " ".join(capsys.readouterr().out.split())  # a terminal of 80 columns breaks lines anywhere
    for reason in set(written["broken"].values()):
        assert reason in said


def test_the_reason_stands_in_every_file(folder: tuple[Config, Written]) -> None:
    """Null with a reason where a row was set aside; a value where it was not."""
    config, written = folder
    dataset = Dataset(config.dataset)
    for name, recipe in resolve(config).token_recipes().items():
        for shard in sorted(dataset.finished(name, recipe.short)):
            keys = dataset.samples(shard)["key"].to_pylist()
            table = dataset.table(dataset.receipt(name, recipe.short, shard).file)
            for key, value, reason in zip(
                keys, table["value"].to_pylist(), table["reason"].to_pylist(), strict=True
            ):
                if key in written["broken"]:
                    assert value is None and reason == written["broken"][key]
                elif name == "caption" and key == "motorcycle 2":
                    assert value is None and reason == "no caption"
                else:
                    assert value is not None and reason is None, (name, key)


def test_pictures_come_out_upright_and_square(folder: tuple[Config, Written]) -> None:
    """Whatever the file was (grey, palette, CMYK, 16 bits, turned by EXIF): the centre square, in colour."""
    config, written = folder
    snapshot, resolved = make_snapshot(config), resolve(config)
    codec = codec_of(resolved, snapshot.dataset, "rgb_pixels")
    pictures: dict[str, np.ndarray] = {}
    for index in range(len(snapshot.shards)):
        column = snapshot.column(index, "rgb_pixels")
        for row, key in enumerate(snapshot.keys(index)):
            if column.present[row]:
                (pictures[key],) = codec.decode([column.cells(row)])
    assert set(pictures) == set(written["ok"])
    for picture in pictures.values():
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert picture.std() > 5, "a flat picture is no photograph"
    for key in ("grey/camera", "grey/coins", "grey/moon16", "grey/page"):
        spread = pictures[key].astype(int).max(-1) - pictures[key].astype(int).min(-1)
        assert spread.mean() < 3, key
    chelsea, turned = pictures["animals/chelsea"].astype(int), pictures["animals/turned"].astype(int)
    errors = [np.abs(np.rot90(chelsea, quarter) - turned).mean() for quarter in range(4)]
    assert np.argmin(errors) == 3, "orientation 6 is a quarter turn clockwise"
    coffee, printed = pictures["coffee"].astype(int), pictures["coffee.print"].astype(int)
    assert np.abs(coffee - printed).mean() < 25


def test_a_tar_of_them(tmp_path: Path) -> None:
    written = write_photo_tar(tmp_path / "photos" / "00000.tar")
    source = {"kind": "webdataset", "url": str(tmp_path / "photos" / "{00000..00000}.tar")}
    content = photo_content(tmp_path / "ds", source)
    content["modalities"] = {name: {} for name in ("caption", "rgb_pixels", "depth", "det")}
    config = check_config(content, "test")
    with without_ray():
        result = build(config)
    assert result.status.complete and result.status.rejected == len(written["broken"])
    check_states(config, written)


def test_more_broken_files_than_the_limit_park_the_shard(tmp_path: Path) -> None:
    """A source that goes bad is noticed: the shard waits until somebody has looked and raised the limit."""
    folder = tmp_path / "photos"
    written = write_photo_folder(folder)
    for index in range(20):
        (folder / f"zz{index:02d}.jpg").write_bytes(b"text, whatever the name says")
    content = photo_content(tmp_path / "ds", {"kind": "folder", "path": str(folder)})
    content |= {"modalities": {"rgb_pixels": {}}, "shard_size": 100}
    with without_ray():
        with pytest.raises(
            WorkMissing, match=r"\d\d of (the first )?\d+ rows .* 'no image'; .*engine\.max_absent_share"
        ):
            build(check_config(content, "test"))
        content["engine"] |= {"max_absent_share": 0.7}
        result = build(check_config(content, "test"))
    assert result.status.complete
    assert result.status.rejected == len(written["broken"]) + 20
