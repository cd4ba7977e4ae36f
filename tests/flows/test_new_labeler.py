"""A new labeler is one file: what `new-labeler` writes is labelled, tokenized, trained on, generated and reported as it is."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_builds import call_main, environment, small_content, write_config

from fourmill.errors import ConfigError
from fourmill.flows.new_labeler import KINDS, new_labeler
from fourmill.flows.report.view import View, open_model
from fourmill.labelers.base import labelers
from fourmill.labelers.quality import check
from fourmill.shards.dataset import Dataset
from fourmill.shards.tar import read_labels
from fourmill.train.predict import predict

TRAIN: dict[str, Any] = {
    "steps": 3, "batch_size": 4, "lr": 1e-3, "warmup_steps": 1, "device": "cpu", "num_input_tokens": 24,
    "num_target_tokens": 24, "log_every": 1, "eval_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package of each kind, imported; forgotten after these tests."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelers, "_known", dict(labelers.items()))
        for kind in KINDS:
            new_labeler(f"my_{kind}", kind, folder)
            patch.syspath_prepend(folder / f"my_{kind}")
            importlib.import_module(f"my_{kind}_labeler")
        yield folder


@pytest.fixture(scope="module")
def chain(written: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One dataset with all four, a model that was trained on it for three steps, and the report, by the command line."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("chain")
    modalities: dict[str, Any] = {"caption": {}, "rgb": {}, **{f"my_{kind}": {} for kind in KINDS}}
    modalities |= {"my_vector": {"keep_labels": True}, "my_features": {"keep_labels": True}}
    content = small_content(root / "ds", modalities, count=16, n_crops=2, val_fraction=0.3, train=TRAIN)
    config = write_config(root / "c.yaml", content)
    assert call_main("build", config, "--no-prefect") == 0
    assert call_main("train", config, "--out", root / "run", "--no-prefect") == 0
    assert call_main("report", root / "ds", "--model", root / "run", "--samples", "2") == 0
    numbers = json.loads((root / "ds" / "reports" / "report.json").read_text())
    return SimpleNamespace(url=str(root / "ds"), run=root / "run", config=config, numbers=numbers)


#: kind -> tokens of a crop of 64 pixels; sequences have as many as there are
TOKENS = {"image": 16, "features": 16, "vector": 12, "sequence": None}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_all_the_way(chain: SimpleNamespace, kind: str) -> None:
    name = f"my_{kind}"
    view, trained = View.open(chain.url, None), open_model(chain.run)
    column = view.column(name, 0)
    assert column is not None and column.present.all(), "stored"
    if TOKENS[kind] is not None:
        assert column.tokens is not None and column.tokens.shape == (4, 2, TOKENS[kind])
    assert trained.model.config.spec(name).is_input and trained.model.config.spec(name).is_target, (
        "trained on"
    )
    (sample,) = view.choose("val", 1)
    given = {"rgb": np.asarray(view.cell("rgb", sample)).astype(np.int64)[None]}
    (label,) = predict(trained.model, given, name, view.codecs[name])
    frame = np.zeros((64, 64, 3), np.uint8)
    check(view.modalities[name], [label], [frame])
    figures = chain.numbers["modalities"][name]["figures"]
    assert figures and all({"round_trip", "model"} <= set(links) for links in figures.values()), "measured"
    page = Path(chain.url, "reports", "index.html").read_text()
    assert name in page, "shown"


@pytest.mark.parametrize(("name", "shape"), [("my_vector", (2, 24)), ("my_features", (2, 4, 4, 6))])
def test_kept_labels_by_crop_are_those_of_the_crop(
    chain: SimpleNamespace, name: str, shape: tuple[int, ...]
) -> None:
    """Two crops of a row are two pictures, of which the second is crop number 1 in tokens too."""
    dataset, view = Dataset(chain.url), View.open(chain.url, None)
    wanted = view.resolved.wanted[name]
    receipt = dataset.receipt(name, wanted.label_recipe.short, 0)
    kept = read_labels(dataset.store.read(receipt.file), wanted.modality)
    assert len(kept) == 4
    column = view.column(name, 0)
    assert column is not None and column.tokens is not None
    for row, label in kept.items():
        assert label.shape == shape and not np.array_equal(label[0], label[1])
        again = np.stack([np.asarray(t) for t in view.codecs[name].encode(list(label))])
        assert np.array_equal(column.tokens[row], again)


def pytest_of(folder: Path, *packages: Path) -> subprocess.CompletedProcess[str]:
    """The tests of packages, in a process of its own that has not installed them."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *packages],
        cwd=folder, env=environment(PYTHONPATH=os.pathsep.join(map(str, packages))), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kinds", [["image"], pytest.param([k for k in KINDS if k != "image"], marks=pytest.mark.long)]
)
def test_the_written_tests_pass(written: Path, kinds: list[str]) -> None:
    done = pytest_of(written, *(written / f"my_{kind}" for kind in kinds))
    assert done.returncode == 0 and f"{2 * len(kinds)} passed" in done.stdout, done.stdout


@pytest.mark.long
def test_the_written_test_fails_where_the_labeler_is_spoiled(tmp_path: Path) -> None:
    folder = tmp_path / "spoiled"
    new_labeler("spoiled", "image", tmp_path)
    file = folder / "spoiled_labeler.py"
    whole = file.read_text()
    file.write_text(
        whole.replace("np.minimum(np.hypot(down, right) * np.float32(2), np.float32(1))", "down + right")
    )
    assert file.read_text() != whole
    done = pytest_of(tmp_path, folder)
    assert (
        done.returncode == 1 and "2 failed" in done.stdout and "labels keep the contract: FAIL" in done.stdout
    )


def test_one_file_into_a_checkout(tmp_path: Path) -> None:
    """Nothing but the file and its test, formatted as everything here is."""
    (tmp_path / "labelers").mkdir()
    for module in ("__init__", "base"):
        (tmp_path / "labelers" / f"{module}.py").write_text("")
    (tmp_path / "tests" / "labelers").mkdir(parents=True)
    for kind in KINDS:
        made = new_labeler(f"own_{kind}", kind, tmp_path, tmp_path / "labelers")
        assert sorted(p.relative_to(tmp_path).as_posix() for p in made.files) == [
            f"labelers/own_{kind}.py",
            f"tests/labelers/test_own_{kind}.py",
        ]
    config = Path(__file__).parents[2] / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", config, "labelers", "tests"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    with pytest.raises(ConfigError, match="not the folder `labelers` of a checkout"):
        new_labeler("another", "image", tmp_path, tmp_path / "tests")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Shiny-Things", "'shiny_things' is one"),
        ("2d", "not a name"),
        ("class", "not a name"),
        ("../up", "'up' is one"),
        ("depth", "there is a labeler 'depth' already"),
        ("caption", "there is a modality 'caption' already"),
        ("", "not a name"),
    ],
)
def test_names_that_will_not_do(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        new_labeler(name, "image", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_comes_next_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call_main("new-labeler", "shiny", "--kind", "vector") == 0
    said = capsys.readouterr().out
    assert "pip install -e shiny\n" in said and "pytest shiny\n" in said and "{shiny: {}}" in said
    before = {path: path.read_bytes() for path in (tmp_path / "shiny").iterdir()}
    assert len(before) == 3
    assert call_main("new-labeler", "shiny") == 2
    assert "shiny exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "shiny").iterdir()} == before
