"""`fourmill build --slice I/N`: independent parts of one dataset, on machines that share nothing but storage."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_builds
from small_builds import (
    ORACLES,
    call_main,
    data_files,
    environment,
    receipts,
    small_config,
    small_content,
    with_tokenizers,
    without_ray,
    write_config,
)

from fourmill.config import find_config
from fourmill.errors import WorkMissing
from fourmill.flows.build import BuildOptions, BuildResult, build
from fourmill.flows.status import latest_run, status
from fourmill.shards.dataset import Dataset

SCRIPT = find_config("demo").parent / "slurm_build.sh"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    modalities = {"caption": {}, "depth": ORACLES["depth"]}
    url = tmp_path_factory.mktemp("fitted") / "ds"
    with without_ray():
        build(small_config(url, modalities, count=8), BuildOptions())
    return with_tokenizers(url, modalities)


def make(url: Path, modalities: dict[str, Any], **options: Any) -> BuildResult:
    """Six shards, the last one short, unless the options say otherwise."""
    with without_ray():
        return build(small_config(url, modalities, count=22), BuildOptions(**options))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_slices_one_after_another_make_what_one_build_makes(
    tmp_path: Path, given: dict[str, Any], order: Sequence[int]
) -> None:
    url, whole = tmp_path / "ds", tmp_path / "whole"
    finished: set[int] = set()
    for index in order:
        found = make(url, given, slice=(index, 3)).status
        finished |= {shard for shard in range(6) if shard % 3 == index}
        dataset = Dataset(str(url))
        recipe = {name: dataset.recipes(name)[0] for name in given}
        assert all(dataset.finished(name, recipe[name]) == finished for name in given)
        assert (found.shards, found.samples) == (6, 22), "status speaks of the whole dataset"
        assert found.modalities["depth"].pending == 6 - len(finished)
        assert found.complete is (len(finished) == 6)
        assert len(latest_run(dataset)["shards"]) == 6
    assert make(url, given).rows_labelled == 0
    make(whole, given)
    assert data_files(url) == data_files(whole) and receipts(url) == receipts(whole)


def test_slices_at_once(tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All plan before any of them commits, and two are given the same part."""
    url, whole = tmp_path / "ds", tmp_path / "whole"
    parts = [(0, 2), (1, 2), (1, 2)]
    ready = threading.Barrier(len(parts))
    results: list[BuildResult] = []

    def run_jobs(*arguments: Any) -> Any:
        ready.wait(60)
        return small_builds.run_jobs_here(*arguments)

    def one(part: tuple[int, int]) -> None:
        results.append(build(small_config(url, given, count=22), BuildOptions(slice=part)))

    monkeypatch.setattr("fourmill.flows.build.run_jobs", run_jobs)
    threads = [threading.Thread(target=one, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 3 and status(Dataset(str(url))).complete
    make(whole, given)
    assert data_files(url) == data_files(whole) and receipts(url) == receipts(whole)


def test_a_slice_of_a_pilot(tmp_path: Path, given: dict[str, Any]) -> None:
    found = make(tmp_path / "ds", given, slice=(1, 2), limit=12).status
    assert (found.shards, found.modalities["depth"].finished) == (3, 1)


def test_a_slice_answers_for_its_own_shards(tmp_path: Path, given: dict[str, Any]) -> None:
    """Stale shards of other slices are theirs."""
    make(tmp_path / "ds", given)
    changed = {**given, "depth": {**given["depth"], "precision": "bf16"}}
    with pytest.raises(WorkMissing, match="2 column shards are stale"):
        make(tmp_path / "ds", changed, slice=(0, 3))
    assert make(tmp_path / "ds", changed, slice=(0, 3), redo_stale=True).status.modalities["depth"].stale == 4
    assert make(tmp_path / "ds", changed, slice=(0, 3)).rows_labelled == 0


def test_tokenizers_are_fitted_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = tmp_path / "ds"
    modalities = {"caption": {}, "depth": ORACLES["depth"]}
    path = write_config(tmp_path / "config.yaml", small_content(url, modalities, count=12))
    assert call_main("build", path, "--no-prefect", "--slice", "0/2") == 2
    said = capsys.readouterr().err
    assert "fourmill fit-tokenizers" in said and "caption, depth" in said and said.count("\n") == 1
    assert not url.exists()
    assert call_main("fit-tokenizers", path, "--no-prefect") == 0
    for part in ("0/2", "1/2"):
        assert call_main("build", path, "--no-prefect", "--slice", part) == 0
    assert status(Dataset(str(url))).complete


@pytest.mark.parametrize("text", ["3/3", "1", "/", "a/2", "-1/2", "0/0", "1.0/2", "1/2/3"])
def test_wrong_slices_are_wrong_usage(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main("build", "demo", "--set", f"dataset={tmp_path / 'ds'}", f"--slice={text}") == 2
    assert "0 <= I < N" in capsys.readouterr().err
    assert not (tmp_path / "ds").exists()


def test_the_script_for_slurm(tmp_path: Path) -> None:
    """What it runs in an array of three, with an `srun` that says what it was given."""
    for name in ("srun", "fourmill"):
        (tmp_path / name).write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = environment(
        PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_COUNT="3"
    )

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=env | more, capture_output=True, text=True, check=False
        )

    said = run("my config.yaml", "--limit", "5").stdout.rstrip("|").split("|")
    assert said[:5] == ["fourmill", "build", "my config.yaml", "--slice", "2/3"] and said[-2:] == [
        "--limit",
        "5",
    ]
    assert "2/8" in run("c.yaml", PARTS="8").stdout
    assert run().returncode == 2 and "usage" in run().stderr
