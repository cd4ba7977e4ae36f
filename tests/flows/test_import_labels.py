"""Labels that people have: looked at, written into the configuration, and built as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from small_builds import call_main, small_content, write_config, write_images

from fourmill.config import load_config
from fourmill.flows.resolve import resolve
from fourmill.labels import Absent
from fourmill.shards.dataset import Dataset
from fourmill.shards.tar import read_labels

COUNT = 12


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Images with and without masks, a mask that is none, and a mask without an image."""
    write_images(tmp_path / "images", [f"{i:02d}.png" for i in range(COUNT)])
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in (*range(8), 40):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 3, (32, 32), np.uint8)).save(masks / f"{number:02d}_mask.png")
    (masks / "07_mask.png").write_bytes(b"not a picture")
    source = {"kind": "folder", "path": str(tmp_path / "images")}
    content = small_content(tmp_path / "ds", {"caption": {}, "rgb_pixels": {}}, source=source)
    write_config(tmp_path / "c.yaml", content)
    return tmp_path


ASKED = ("import-labels", "semseg", "masks", "--set", "suffix=_mask", "--set", "classes=[floor, wall, box]")


def test_looked_at_written_and_built(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    before = (world / "c.yaml").read_text()
    assert call_main(*ASKED, "--config", "c.yaml") == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "files 9", "labels in them 9", "images of the source 12", "images with a label 8 (66.7%)",
        "images without one, such as 08, 09, 10", "labels without an image, such as 40_mask.png",
        "labels that were decoded 8, 1 of them faulty", "07_mask.png cannot be decoded",
        "semseg: labeler: imported_semseg url: masks",
    ):  # fmt: skip
        assert part in said, (part, said)
    assert (world / "c.yaml").read_text() == before
    assert call_main(*ASKED, "--config", "c.yaml", "--write") == 0
    after = (world / "c.yaml").read_text()
    assert [line for line in after.splitlines() if line in before.splitlines()] == before.splitlines()
    config = load_config(world / "c.yaml")
    assert config.modalities["semseg"].options == {
        "url": "masks", "suffix": "_mask", "classes": ["floor", "wall", "box"],
    }  # fmt: skip
    keep = ("--set", "modalities.semseg.keep_labels=true")
    strict = (
        "--set",
        "engine.max_absent_rows=1",
        "--set",
        "engine.max_absent_share=0",
    )  # one fault in a shard
    assert call_main("build", "c.yaml", *keep, *strict, "--no-prefect") == 0, (
        "to have no label is nobody's fault"
    )
    _check_built(world)


def _check_built(world: Path) -> None:
    dataset = Dataset(str(world / "ds"))
    wanted = resolve(load_config(world / "c.yaml")).wanted["semseg"]
    found: dict[str, Any] = {}
    for shard in sorted(dataset.finished("semseg", wanted.label_recipe.short)):
        receipt = dataset.receipt("semseg", wanted.label_recipe.short, shard)
        labels = read_labels(dataset.store.read(receipt.file), wanted.modality)
        found |= {key: labels[row] for row, key in enumerate(dataset.samples(shard)["key"].to_pylist())}
    assert len(found) == COUNT
    with Image.open(world / "masks" / "03_mask.png") as mask:
        assert np.array_equal(found["03"][::2, ::2], np.asarray(mask)), "twice as large, by its nearest pixel"
    assert found["09"] == Absent("n/a: no imported label")
    assert isinstance(found["07"], Absent) and "07_mask.png cannot be decoded" in found["07"].reason
    assert wanted.token_recipe() is not None, "its tokenizer was fitted"


def test_what_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)

    def refused(*arguments: str) -> str:
        before = (world / "c.yaml").read_text()
        assert call_main(*arguments) == 2
        assert (world / "c.yaml").read_text() == before
        line = capsys.readouterr().err
        assert len(line.strip().splitlines()) == 1
        return line

    config = ("--config", "c.yaml")
    assert "known: depth, det, normal, semseg" in refused("import-labels", "edges", "masks", *config)
    assert "did you mean 'semseg'" in refused(
        "import-labels", "x", "masks", "--modality-kind", "semsg", *config
    )
    assert "did you mean 'classes'" in refused(
        "import-labels", "semseg", "masks", "--set", "clases=[a]", *config
    )
    assert "comes from the source itself" in refused("import-labels", "caption", "masks", *config)
    assert "list the names" in refused("import-labels", "semseg", "masks", *config)
    assert "no label at masks answers" in refused(
        "import-labels", "semseg", "masks", "--set", "classes=[a]", *config
    )


def test_lines_are_added_where_they_belong_or_not_at_all(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    content = yaml.safe_load((world / "c.yaml").read_text())
    rest = {key: value for key, value in content.items() if key != "modalities"}
    block = "modalities: # what is wanted\n    # four spaces here\n    caption: {}   # as it came\n"
    (world / "block.yaml").write_text(block + yaml.safe_dump(rest))
    assert call_main(*ASKED, "--config", "block.yaml", "--write") == 0
    written = (world / "block.yaml").read_text()
    assert (
        written.startswith("modalities: # what is wanted\n    semseg:\n") and "{}   # as it came" in written
    )
    assert call_main(*ASKED, "--config", "block.yaml", "--write") == 2
    assert "modalities.semseg is there already" in capsys.readouterr().err
    (world / "flow.yaml").write_text(yaml.safe_dump(rest) + "modalities: {caption: {}}\n")
    assert call_main(*ASKED, "--config", "flow.yaml", "--write") == 2
    assert "add the lines by hand" in capsys.readouterr().err
    assert not list(world.glob(".*.tmp"))


def test_a_second_set_under_a_name_of_its_own(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    arguments = [("parts" if a == "semseg" else a) for a in ASKED]
    assert call_main(*arguments, "--modality-kind", "semseg", "--config", "c.yaml", "--write") == 0
    wanted = resolve(load_config(world / "c.yaml")).wanted["parts"]
    assert (wanted.labeler, wanted.modality.name) == ("imported_semseg", "parts")
