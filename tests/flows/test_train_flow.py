"""From a finished dataset to a model and to tars, by the command line: default places, interruptions, exit statuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from small_builds import (
    ORACLES,
    call_main,
    kill_all,
    listing,
    small_content,
    started,
    wait_until,
    write_config,
)

from fourmill.shards.dataset import Dataset
from fourmill.train.checkpoint import newest, read_state

MODALITIES: dict[str, Any] = {
    "caption": {},
    "rgb_pixels": {},
    "rgb": {},
    **{name: ORACLES[name] for name in ("depth", "semseg")},
    "det": {**ORACLES["det"], "keep_labels": True},
}
STEPS = 60
TRAIN: dict[str, Any] = {
    "steps": STEPS, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2, "device": "cpu", "num_input_tokens": 24,
    "num_target_tokens": 24, "log_every": 1, "checkpoint_every": 5, "eval_every": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a finished dataset."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("train")
    made = small_content(root / "ds", MODALITIES, count=24, shard_size=8, train=TRAIN)
    assert call_main("build", write_config(root / "c.yaml", made), "--no-prefect") == 0
    return made


@pytest.fixture(scope="module")
def uninterrupted(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the first step to the last in one go."""
    root = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(root / "c.yaml", content)
    assert call_main("train", config, "--out", root / "run", "--no-prefect") == 0
    return root / "run"


@pytest.fixture
def config(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield write_config(tmp_path / "c.yaml", content)


def records(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def weights(run: Path) -> bytes:
    folder = newest(run)
    assert folder is not None
    return (folder / "model.safetensors").read_bytes()


def test_a_run_in_its_default_place(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main("train", config, "--no-prefect", "--set", "train.steps=3") == 0
    said = capsys.readouterr().out
    run = tmp_path / "runs" / "ds"
    folder = newest(run)
    assert folder is not None and read_state(folder).step == 3
    assert "step 3, loss" in said and "runs/ds" in said
    before = listing(folder)
    assert call_main("train", config, "--no-prefect", "--set", "train.steps=3") == 0, (
        "finished: nothing to do"
    )
    assert listing(folder) == before
    assert [record["step"] for record in records(run)] == [1, 2, 3]


def test_a_finished_run_of_other_settings_is_not_overwritten(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main("train", config, "--no-prefect", "--set", "train.steps=2") == 0
    before = listing(tmp_path / "runs")
    capsys.readouterr()
    assert call_main("train", config, "--no-prefect", "--set", "train.steps=2", "--set", "train.lr=0.5") in (
        1,
        2,
    )
    said = capsys.readouterr().err
    assert "lr" in said and len(said.strip().splitlines()) == 1
    assert listing(tmp_path / "runs") == before


def interrupted(config: Path, tmp_path: Path, number: int, steps: int) -> int:
    """Send a signal to a training process after so many steps; its exit status."""
    run = tmp_path / "runs" / "ds"

    def reached() -> bool:
        return (run / "metrics.jsonl").exists() and len(records(run)) >= steps

    with started("train", config, "--no-prefect", cwd=tmp_path) as process:
        wait_until(reached, 150, f"step {steps}", process)
        if number == signal.SIGKILL:
            kill_all(process.pid)
        else:
            process.send_signal(number)
        return process.wait(60)


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(
    config: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """Exit status 3 at once; the same command ends with the weights of a run that nobody disturbed."""
    run = tmp_path / "runs" / "ds"
    assert interrupted(config, tmp_path, signal.SIGTERM, 3) == 3
    folder = newest(run)
    assert folder is not None and 3 <= read_state(folder).step < STEPS
    output = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in output
    assert call_main("train", config, "--no-prefect") == 0
    assert weights(run) == weights(uninterrupted)
    steps = [record["step"] for record in records(run)]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.long
def test_sigkill_goes_back_to_the_last_checkpoint(config: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "runs" / "ds"
    assert interrupted(config, tmp_path, signal.SIGKILL, 7) == -signal.SIGKILL
    assert interrupted(config, tmp_path, signal.SIGKILL, 13) == -signal.SIGKILL
    assert call_main("train", config, "--no-prefect") == 0
    assert weights(run) == weights(uninterrupted)


def test_nothing_finished_yet(
    content: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training asks for a build first, and a dataset whose shards are not done in all modalities is work missing."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.yaml", content | {"dataset": str(tmp_path / "none")})
    assert call_main("train", config, "--no-prefect") == 2
    line = capsys.readouterr().err
    assert "not a dataset" in line and len(line.strip().splitlines()) == 1
    more = content["modalities"] | {"normal": ORACLES["normal"]}
    config = write_config(tmp_path / "c.yaml", content | {"modalities": more})
    assert call_main("train", config, "--no-prefect") == 2
    line = capsys.readouterr().err
    assert "normal" in line and "fourmill build" in line and len(line.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_an_export_is_what_webdataset_reads(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal member names in equal order in every modality; tokens as the columns hold them."""
    url, out = content["dataset"], tmp_path / "out"
    assert call_main("export", url, out) == 0
    assert "shards" in capsys.readouterr().out
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    notes = ["tokenizers", "written"]  # what else there is to know, for an import
    modalities = ["caption", "crop_settings", "depth", "det", "key", "rgb", "semseg", "size"]
    assert folders == sorted([*modalities, *notes])
    read: dict[str, list[dict[str, Any]]] = {}
    for name in modalities:
        tars = sorted(str(path) for path in (out / name).glob("shard-*.tar"))
        pipeline = wds.WebDataset(tars, shardshuffle=False, empty_check=False).decode()
        read[name] = list(pipeline)
    stems = {name: [sample["__key__"] for sample in samples] for name, samples in read.items()}
    assert all(found == stems["rgb"] for found in stems.values())
    assert 10 < len(stems["rgb"]) < 24, "the split train, and not val"
    dataset = Dataset(url)
    keys = {key: (s, r) for s in range(3) for r, key in enumerate(dataset.samples(s)["key"].to_pylist())}
    for name in ("rgb", "depth", "semseg"):
        (short,) = [r for r in dataset.recipes(name) if dataset.recipe(name, r)["kind"] == "token"]
        for sample, key in zip(read[name], read["key"], strict=True):
            shard, row = keys[key["txt"]]
            tokens = sample["npy"]
            assert tokens.dtype == np.int16 and tokens.shape == (1, 16)
            column = dataset.column(name, short, shard)
            assert np.array_equal(tokens[0], column.cells(row))
    for sample in read["crop_settings"]:
        assert sample["npy"].tolist() == [[0, 0, 64, 64, 0]]
    assert all(len(sample["json"]) == 1 for sample in read["caption"])
    found = [box for sample in read["det"] for box in sample["json"]["instances"]]
    assert found and {box["class_name"] for box in found} <= {"sphere", "box", "cylinder"}
    before = listing(out)
    assert call_main("export", url, out) == 0
    assert listing(out) == before


def test_an_export_does_not_overwrite_something_else(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert call_main("export", content["dataset"], out) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert call_main("export", content["dataset"], tmp_path / "new", "-m", "dept") == 2
    assert "did you mean 'depth'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
