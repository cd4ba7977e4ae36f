"""What CONTRIBUTING.md shows works as it stands there."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fourmill.labelers.base import LabelBatch, LabelerSettings, labelers
from fourmill.labelers.quality import check
from fourmill.shards.sources.scenes import render
from fourmill.tokenize.fit import fit_codec

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_example_labeler_labels_and_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelers, "_known", dict(labelers.items()))  # the example is gone after the test
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 1
    source = "\n".join(line.removeprefix("   ") for line in blocks[0].splitlines())
    module = ModuleType("chroma_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, str(GUIDE), "exec"), module.__dict__)

    labeler = labelers.get("chroma")(LabelerSettings("chroma", image_size=32))
    labeler.load()
    frames = [render(1, index, 32).image for index in range(24)]
    present = np.ones(len(frames), dtype=bool)
    keys = [str(i) for i in range(len(frames))]
    labels = labeler.label(LabelBatch(keys=keys, frames=frames, present=present))
    check(labeler.modality, labels, frames, keys)
    assert np.isclose(labels[0].max(), np.ptp(frames[0].astype(int), axis=-1).max() / 255)

    options = {"preset": "demo", "steps": 30, "batch_size": 8, "patch_size": 8, "codebook_size": 32}
    fit_codec(labeler.modality, labels, labels[:4], image_size=32, options=options, out=tmp_path / "chroma")
    assert (tmp_path / "chroma" / "config.json").is_file()
