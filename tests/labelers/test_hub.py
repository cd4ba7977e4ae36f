"""Weights from the hub, fetched from a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from local_hub import COMMIT, Hub, local_hub
from safetensors.numpy import load_file, save_file

from fourmill.checkpoints import Checkpoint, fetch, read_json, shipped_folder
from fourmill.errors import CheckpointError
from fourmill.labelers.base import LabelBatch, LabelerSettings, labelers

Kit = SimpleNamespace
WHERE = "modalities.depth.model"
NEEDED = {"config.json", "preprocessor_config.json", "model.safetensors"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with local_hub(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def repo(hub: Hub, kit: Kit, tmp_path: Path) -> Path:
    """The folder that is acme/depth on the hub: a tiny DPT, and what a labeler must not touch."""
    folder = tmp_path / "repo"
    shutil.copytree(kit.checkpoint("dpt_metric"), folder)
    for name in ("pytorch_model.bin", "model.pt", "modeling_depth.py", "README.md"):
        (folder / name).write_text("never read")
    hub.repos["acme/depth"] = folder
    return folder


def acme(name: str = "acme/depth", revision: str = COMMIT) -> Checkpoint:
    return Checkpoint(name, revision, revision)


def shard(folder: Path) -> dict[str, str]:
    """Two weights files and an index in place of one; returns the index's map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for number in (0, 1):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = {key: weights[key] for key in sorted(weights)[number::2]}
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    write_index(folder, where)
    return where


def write_index(folder: Path, weight_map: Any) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def refused(checkpoint: Checkpoint, *words: str) -> None:
    """One line that names the key, the id, and these words."""
    with pytest.raises(CheckpointError) as raised:
        fetch(checkpoint, WHERE)
    message = str(raised.value)
    assert message.startswith(f"{WHERE}: ") and checkpoint.source in message, message
    assert "\n" not in message and len(message) < 600
    assert all(word in message for word in words), message


def no_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept between attempts."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


# -- what is fetched ----------------------------------------------------------------------------------


def test_exactly_the_needed_files_once(hub: Hub, repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = fetch(acme(), WHERE)
    assert hub.gets() == Counter(NEEDED)
    assert local.folder is not None and {f.name for f in local.folder.iterdir()} == NEEDED
    assert all((local.folder / name).read_bytes() == (repo / name).read_bytes() for name in NEEDED)
    assert local.identity == COMMIT
    size = (repo / "model.safetensors").stat().st_size / 1e6
    assert capsys.readouterr().err == f"fetching acme/depth ({size:.1f} MB)\n"
    hub.requests.clear()
    assert fetch(acme(), WHERE) == local
    assert not hub.requests
    hub.stop()
    assert fetch(acme(), WHERE) == local
    assert read_json(acme(), "config.json", WHERE)["model_type"] == "dpt"
    assert capsys.readouterr().err == ""


def test_a_folder_is_not_fetched(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(tmp_path), None, "sha256:0")
    assert fetch(checkpoint, WHERE) is checkpoint


def test_weights_in_shards(hub: Hub, repo: Path, kit: Kit) -> None:
    shards = set(shard(repo).values())
    labeler = labelers.get("depth")(LabelerSettings("depth", "acme/depth", COMMIT))
    labeler.load()
    assert hub.gets() == Counter(
        {"config.json", "preprocessor_config.json", "model.safetensors.index.json"} | shards
    )
    whole = kit.labeler("depth", kit.checkpoint("dpt_metric"))
    whole.load()
    batch = kit.batch_of((64, 64))
    assert np.array_equal(labeler.label(batch)[0], whole.label(batch)[0])


def test_the_config_alone_fetches_no_weights(hub: Hub, repo: Path) -> None:
    """What a driver reads to describe a modality."""
    assert read_json(acme(), "config.json", WHERE)["model_type"] == "dpt"
    assert hub.gets() == Counter(["config.json"])
    fetch(acme(), WHERE)
    assert hub.gets() == Counter(NEEDED)


def test_an_absent_preprocessor_is_remembered(hub: Hub, repo: Path) -> None:
    inner = json.loads((repo / "preprocessor_config.json").read_text())
    (repo / "preprocessor_config.json").unlink()
    (repo / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    fetch(acme(), WHERE)
    hub.stop()
    fetch(acme(), WHERE)
    assert read_json(acme(), "processor_config.json", WHERE)["image_processor"] == inner
    with pytest.raises(CheckpointError, match=f"{WHERE}: acme/depth has no preprocessor_config.json"):
        read_json(acme(), "preprocessor_config.json", WHERE)


def test_a_snapshot_with_a_file_missing_is_completed(hub: Hub, repo: Path) -> None:
    shards = sorted(set(shard(repo).values()))
    folder = fetch(acme(), WHERE).folder
    assert folder is not None
    blob = (folder / shards[1]).resolve()
    (folder / shards[1]).unlink()
    blob.unlink()
    hub.requests.clear()
    fetch(acme(), WHERE)
    assert hub.gets() == Counter(shards[1:]) and (folder / shards[1]).is_file()


# -- what a repository may not do ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../config.safetensors", "/etc/w.safetensors", "a/b.safetensors", "a\\b.safetensors", "..safetensors",
     "a..safetensors", ".w.safetensors", "pytorch_model.bin", "modeling_depth.py", "w.safetensors\n", "", 7, None],
)  # fmt: skip
def test_hostile_names_in_an_index(hub: Hub, repo: Path, name: Any) -> None:
    good = shard(repo)
    write_index(repo, {**good, "extra": name})
    refused(acme(), "model.safetensors.index.json", "do not use this repository")
    assert set(hub.gets()) == {"config.json", "preprocessor_config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_names(hub: Hub, repo: Path, content: str) -> None:
    shard(repo)
    (repo / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{WHERE}: .*model\.safetensors\.index\.json"):
        fetch(acme(), WHERE)


# -- what goes wrong ----------------------------------------------------------------------------------


def test_unknown_repository_commit_and_files(hub: Hub, repo: Path) -> None:
    refused(acme("acme/dept"), "the hub has no acme/dept", "check the id")
    refused(acme(revision="f" * 40), f"has no commit {'f' * 40}", "`revision:`")
    hub.errors = {
        "acme/gated": (403, "GatedRepo"),
        "acme/private": (401, "RepoNotFound"),
        "acme/no": (403, ""),
    }
    refused(acme("acme/gated"), "is gated", "HF_TOKEN")
    refused(acme("acme/private"), "the hub has no acme/private that you may read", "HF_TOKEN")
    refused(acme("acme/no"), hub.url, "403")
    refused(acme("acme/-bad-"), "no hub id")
    (repo / "model.safetensors").unlink()
    refused(acme(), "has no model.safetensors", COMMIT, "convert")
    assert set(hub.gets()) == {"config.json", "preprocessor_config.json"}


def test_a_shard_or_the_config_is_not_there(hub: Hub, repo: Path) -> None:
    lost = sorted(set(shard(repo).values()))[1]
    (repo / lost).unlink()
    refused(acme(), f"has no {lost}", "choose another commit")
    hub.repos["acme/empty"] = repo.parent / "empty"
    refused(acme("acme/empty"), "has no config.json")


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stop()
    pauses = no_pause(monkeypatch)
    refused(acme(), "not in the local cache", hub.url, "cannot be reached", "check the connection")
    with pytest.raises(CheckpointError, match=f"^{WHERE}: acme/depth is not in the local cache"):
        read_json(acme(), "config.json", WHERE)
    assert not pauses, "a refused connection is final"


def test_offline_mode(hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(acme(), "not in the local cache", "HF_HUB_OFFLINE")
    assert not hub.requests


def test_a_moment_of_unavailability_is_waited_for(
    hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses, hub.unavailable = no_pause(monkeypatch), 3
    fetch(acme(), WHERE)
    assert hub.gets() == Counter(NEEDED) and pauses


def test_a_download_that_breaks_off_leaves_no_snapshot(
    hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    hub.cut = True
    refused(acme())
    hub.cut = False
    folder = fetch(acme(), WHERE).folder
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()


def test_an_answer_for_another_commit(hub: Hub, repo: Path) -> None:
    hub.commit = "f" * 40
    refused(acme(), f"answers with commit {'f' * 40}")


def test_a_cache_that_cannot_be_made(hub: Hub, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the cache's folder would be")
    refused(acme(), "cannot fetch acme/depth into", "HF_HOME")


# -- several processes --------------------------------------------------------------------------------

FETCH = f"""
import sys, huggingface_hub
from fourmill.checkpoints import Checkpoint, fetch
print("ready", flush=True)
sys.stdin.readline()
print(fetch(Checkpoint("acme/depth", "{COMMIT}", "{COMMIT}"), "{WHERE}").source)
"""


def start(hub: Hub, home: Path) -> subprocess.Popen[str]:
    """A process that imported what it needs, told by its environment alone, and waits for a line."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", FETCH]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_fetch_once_and_a_killed_one_frees_the_lock(
    hub: Hub, repo: Path, tmp_path: Path
) -> None:
    processes = [start(hub, tmp_path / "home") for _ in range(3)]
    try:
        hub.weights_free.clear()
        go(processes[0])
        assert hub.weights_asked.wait(60)  # it holds the lock, half-way through
        processes[0].kill()
        processes[0].wait()
        hub.requests.clear()
        hub.weights_asked.clear()
        for process in processes[1:]:
            go(process)
        assert hub.weights_asked.wait(60)
        hub.weights_free.set()
        said = [process.communicate(timeout=60) for process in processes[1:]]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes[1:]] == [0, 0], said
    assert hub.gets() == Counter(["model.safetensors"])  # the small ones had come before
    assert hub.requests.count(("HEAD", "config.json")) == 1, "the other one asks nothing"
    folders = {out.strip() for out, _ in said}
    assert len(folders) == 1 and {f.name for f in Path(folders.pop()).iterdir()} == NEEDED
    assert sorted(bool(err) for _, err in said) == [False, True], "one of the two says that it fetches"


# -- the whole way ------------------------------------------------------------------------------------


def test_a_configuration_with_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    """The shipped depth network, from the hub and from its folder: the same labels, then without the hub."""
    from small_builds import small_config

    from fourmill.flows.resolve import resolve
    from fourmill.shards.sources.scenes import render

    hub.repos["acme/depth"] = shipped_folder("depth")
    frame = render(7, 0, 64).image
    batch = LabelBatch(keys=["a"], frames=[frame], present=np.ones(1, bool))

    def label(**entry: str) -> tuple[Any, np.ndarray]:
        wanted = resolve(small_config(tmp_path / "ds", {"depth": entry})).wanted["depth"]
        labeler = wanted.make_labeler()
        labeler.load()
        return wanted.label_recipe.content["weights"], np.asarray(labeler.label(batch)[0])

    identity, first = label(model="acme/depth", revision=COMMIT)
    assert identity == COMMIT
    assert hub.gets() == Counter(NEEDED)
    assert np.array_equal(first, label(model="shipped:depth")[1])
    hub.stop()
    again, offline = label(model="acme/depth", revision=COMMIT)
    assert again == COMMIT and np.array_equal(offline, first)
