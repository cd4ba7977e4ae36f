"""What goes wrong inside a run: labelers that raise, hang or kill, images that kill their decoder, memory that runs out.

Each with real Ray actors and a labeler from somebody else's package. One run has them all: what comes out is what should.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from small_builds import environment, small_content, write_config

from fourmill.labels import Absent
from fourmill.modality import LabelContract, Modality
from fourmill.shards.dataset import Dataset
from fourmill.shards.sources.scenes import render
from fourmill.shards.tar import read_labels

PLUGIN = '''
import os, time
import numpy as np
from fourmill.labelers.base import Labeler
from fourmill.modality import LabelContract, Modality

def modality(name):
    return Modality(name=name, kind="grid", codec="vqvae",
                    contract=LabelContract(form="map", dtype="float32", low=0.0, high=255.0))

class Moody(Labeler):
    """Brightness, except where its options say otherwise: key -> what it does there."""
    modality = modality("mood")
    options = {"at": {}, "hungry": 0, "marker": ""}

    def label(self, batch):
        if self.params["hungry"] and len(batch) > self.params["hungry"]:
            import torch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        labels = [frame.mean(-1, dtype=np.float32) for frame in batch.frames]
        for row, key in enumerate(batch.keys):
            what = self.params["at"].get(key) if batch.present[row] else None
            if what == "raise":
                raise ValueError("not in the mood")
            elif what == "hang":
                time.sleep(3600)
            elif what == "kill":
                os.kill(os.getpid(), 9)
            elif what == "slow once" and not os.path.exists(self.params["marker"]):
                open(self.params["marker"], "w").close()
                time.sleep(3600)
            elif what == "nan":
                labels[row] = np.full_like(labels[row], np.nan)
            elif what == "short":
                return labels[:-1]
            elif what == "shape":
                labels[row] = labels[row][:, :-1]
        return labels

class Echo(Labeler):
    """Needs the mood."""
    modality = modality("echo")
    inputs = ("image", "label:mood")

    def label(self, batch):
        return [255 - label for label in batch.upstream["mood"]]

class Calm(Labeler):
    modality = modality("calm")

    def label(self, batch):
        return [frame[..., 0].astype(np.float32) for frame in batch.frames]
'''

#: in every process of the run: an image with a certain text kills whoever opens it
SITE = """
import io, os
from PIL import Image
_open = Image.open
def _deadly(stream, *arguments, **options):
    data = stream.read()
    if b"kills whoever opens it" in data:
        os.kill(os.getpid(), 9)
    return _open(io.BytesIO(data), *arguments, **options)
Image.open = _deadly
"""

DRIVER = """
import json, sys
from fourmill.config import load_config
from fourmill.errors import WorkMissing
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.engine import ray_session

said = []
with ray_session(load_config(sys.argv[1])):
    for path in sys.argv[1:]:
        config = load_config(path)
        try:
            build(config, BuildOptions(only_labels=tuple(config.modalities)))
            said.append("done")
        except WorkMissing as error:
            said.append(str(error))
print("SAID", json.dumps(said))
"""

CONTRACT = LabelContract(form="map", dtype="float32", low=0.0, high=255.0)


def run_driver(tmp_path: Path, *contents: dict[str, Any], timeout: int = 280) -> list[str]:
    """Build each configuration, all in one Ray session; what each said at its end."""
    packages = tmp_path / "packages"
    info = packages / "moody-1.0.dist-info"
    info.mkdir(parents=True)
    (packages / "moody.py").write_text(PLUGIN)
    (packages / "sitecustomize.py").write_text(SITE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moody\nVersion: 1.0\n")
    entries = ("mood = moody:Moody", "echo = moody:Echo", "calm = moody:Calm")
    (info / "entry_points.txt").write_text("\n".join(["[fourmill.labelers]", *entries, ""]))
    (tmp_path / "driver.py").write_text(DRIVER)
    paths = [write_config(tmp_path / f"{i}.yaml", content) for i, content in enumerate(contents)]
    done = subprocess.run(
        [sys.executable, tmp_path / "driver.py", *paths], env=environment(PYTHONPATH=str(packages)),
        cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("SAID "))
    return list(json.loads(said.removeprefix("SAID ")))


def reasons_of(url: Path, name: str) -> dict[str, str]:
    """Why rows have no label, by key, from the kept labels of finished shards."""
    dataset = Dataset(str(url))
    (short,) = dataset.recipes(name)
    modality = Modality(name=name, kind="grid", codec="vqvae", contract=CONTRACT)
    found: dict[str, str] = {}
    for shard, receipt in dataset.receipts(name, short).items():
        keys = dataset.samples(shard).column("key").to_pylist()
        labels = read_labels(dataset.store.read(receipt.file), modality)
        assert len(labels) == receipt.rows == len(keys)
        absent = {keys[row]: label.reason for row, label in labels.items() if isinstance(label, Absent)}
        assert sum(receipt.absent.values()) == len(absent)
        found |= absent
    return found


def data_of(url: Path, name: str) -> dict[str, bytes]:
    return {path.name.split(".")[0]: path.read_bytes() for path in (url / "labels" / name).iterdir()}


AT = {"00000001": "raise", "00000003": "nan", "00000006": "shape", "00000010": "short", "00000012": "kill"}
ENGINE = {"batch_size": 4, "device": "cpu", "batch_deadline_s": 2, "replicas": 1}
MODALITY = Modality(name="mood", kind="grid", codec="vqvae", contract=CONTRACT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(folder of the datasets, what each build said): several builds in one Ray session, since its start takes long."""
    root = tmp_path_factory.mktemp("failures")
    photos = root / "photos"
    photos.mkdir()
    for index in range(12):
        text = PngImagePlugin.PngInfo()
        if index == 5:
            text.add_text("comment", "kills whoever opens it")
        Image.fromarray(render(1, index, 64).image).save(photos / f"{index:02d}.png", pnginfo=text)
    everywhere = {f"{index:08d}": "raise" for index in range(4, 8)}
    contents = {
        "bad": small_content(
            root / "bad", {"mood": {"at": AT}, "echo": {}, "calm": {}}, count=16, shard_size=8, engine=ENGINE
        ),
        "good": small_content(
            root / "good", {"mood": {}, "echo": {}, "calm": {}}, count=16, shard_size=8, engine=ENGINE
        ),
        "everywhere": small_content(
            root / "everywhere", {"mood": {"at": everywhere}, "echo": {}, "calm": {}}, count=12,
            engine={**ENGINE, "max_absent_rows": 2},
        ),
        "deadly": small_content(
            root / "deadly", {"calm": {}}, source={"kind": "folder", "path": str(photos)}, engine=ENGINE
        ),
        "slow": small_content(
            root / "slow",
            {"mood": {"at": {"00000009": "slow once"}, "marker": str(root / "was slow")}},
            count=16,
            engine={"batch_size": 4, "device": "cpu", "replicas": 2, "straggler_s": 1},
        ),
        "hungry": small_content(root / "hungry", {"mood": {"hungry": 1}}, count=8, engine=ENGINE),
    }  # fmt: skip
    return root, dict(zip(contents, run_driver(root, *contents.values()), strict=True))


@pytest.mark.ray
def test_rows_that_a_labeler_cannot_take(built: tuple[Path, dict[str, str]]) -> None:
    """One row raises, one is NaN, one has a wrong shape, one loses a label, one kills its process."""
    root, said = built
    bad, good = root / "bad", root / "good"
    assert said["bad"] == said["good"] == "done"
    expected = {
        "00000001": "mood raised ValueError", "00000003": "mood broke its contract",
        "00000006": "mood broke its contract", "00000010": "mood broke its contract",
        "00000012": "mood killed its process",
    }  # fmt: skip
    assert reasons_of(bad, "mood") == reasons_of(bad, "echo") == expected
    assert reasons_of(bad, "calm") == {}
    check_the_rest(bad, good)


def check_the_rest(bad: Path, good: Path) -> None:
    assert data_of(bad, "calm") == data_of(good, "calm"), "other modalities notice nothing"
    for shard, content in data_of(good, "mood").items():
        whole, rest = read_labels(content, MODALITY), read_labels(data_of(bad, "mood")[shard], MODALITY)
        for row, label in rest.items():
            assert isinstance(label, Absent) or (label == whole[row]).all(), "other rows notice nothing"


@pytest.mark.ray
@pytest.mark.long
def test_a_row_that_hangs(tmp_path: Path, built: tuple[Path, dict[str, str]]) -> None:
    modalities = {"mood": {"at": {"00000012": "hang"}}, "echo": {}, "calm": {}}
    content = small_content(tmp_path / "bad", modalities, count=16, shard_size=8, engine=ENGINE)
    assert run_driver(tmp_path, content) == ["done"]
    assert reasons_of(tmp_path / "bad", "mood") == {"00000012": "mood hung"}
    check_the_rest(tmp_path / "bad", built[0] / "good")


@pytest.mark.ray
def test_an_image_that_kills_its_decoder(built: tuple[Path, dict[str, str]]) -> None:
    root, said = built
    assert said["deadly"] == "done"
    assert reasons_of(root / "deadly", "calm") == {"05": "kills its decoder"}


@pytest.mark.ray
def test_memory_that_runs_out_halves_the_batch(built: tuple[Path, dict[str, str]]) -> None:
    """A labeler that takes one image at a time: from four by two to one, as the receipts say."""
    root, said = built
    assert said["hungry"] == "done"
    dataset = Dataset(str(root / "hungry"))
    (short,) = dataset.recipes("mood")
    receipts = dataset.receipts("mood", short)
    assert len(receipts) == 2
    assert {receipt.environment["batch_size"] for receipt in receipts.values()} == {1}
    assert all(receipt.present == receipt.rows == 4 for receipt in receipts.values())


@pytest.mark.ray
def test_the_slowest_shard_runs_twice(built: tuple[Path, dict[str, str]]) -> None:
    """One micro-batch would take an hour: another runner makes its shard, and nobody waits for the first."""
    root, said = built
    assert (root / "was slow").exists()
    assert said["slow"] == "done"
    assert reasons_of(root / "slow", "mood") == {}
    assert len(data_of(root / "slow", "mood")) == 4


@pytest.mark.ray
def test_a_labeler_that_fails_everywhere_parks_its_column_alone(built: tuple[Path, dict[str, str]]) -> None:
    root, said = built
    assert "mood shard 1: more than 2 rows are set aside" in said["everywhere"]
    assert "ValueError: not in the mood" in said["everywhere"]
    dataset = Dataset(str(root / "everywhere"))
    finished = {name: dataset.finished(name, dataset.recipes(name)[0]) for name in ("mood", "echo", "calm")}
    assert finished == {"mood": {0, 2}, "echo": {0, 2}, "calm": {0, 1, 2}}
