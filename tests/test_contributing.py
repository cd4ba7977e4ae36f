"""What CONTRIBUTING.md shows works as it stands there."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import typer

from fourmill.flows import cli
from fourmill.labelers.base import LabelBatch, LabelerSettings, labelers
from fourmill.labelers.contract import check_labeler, failures
from fourmill.labelers.quality import check
from fourmill.shards.sources.scenes import render
from fourmill.tokenize.fit import fit_codec

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_example_labeler_labels_and_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelers, "_known", dict(labelers.items()))  # the example is gone after the test
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 1
    source = "\n".join(line.removeprefix("   ") for line in blocks[0].splitlines())
    (tmp_path / "chroma_example.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("chroma_example")

    labeler = labelers.get("chroma")(LabelerSettings("chroma", image_size=32))
    labeler.load()
    frames = [render(1, index, 32).image for index in range(24)]
    present = np.ones(len(frames), dtype=bool)
    keys = [str(i) for i in range(len(frames))]
    labels = labeler.label(LabelBatch(keys=keys, frames=frames, present=present))
    check(labeler.modality, labels, frames, keys)
    assert np.isclose(labels[0].max(), np.ptp(frames[0].astype(int), axis=-1).max() / 255)

    assert failures(check_labeler("chroma", alone=False)) == []

    options = {"preset": "demo", "steps": 30, "batch_size": 8, "patch_size": 8, "codebook_size": 32}
    fit_codec(labeler.modality, labels, labels[:4], image_size=32, options=options, out=tmp_path / "chroma")
    assert (tmp_path / "chroma" / "config.json").is_file()


def test_commands_that_the_guide_names_exist() -> None:
    """With the options that it gives them."""
    lines = re.findall(r"fourmill ((?:[a-z]+-)*[a-z]+)((?: [^`#\n]*)?)", GUIDE.read_text())
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    named = {name for name, _ in lines if name in commands or "-" in name}
    assert {"new-labeler", "check-labeler", "import-labels", "tokenize"} <= named <= set(commands)
    for name, rest in lines:
        known = (
            {option for parameter in commands[name].params for option in parameter.opts}
            if name in commands
            else set()
        )
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (name, rest)
