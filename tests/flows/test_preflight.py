"""What cannot work at all is one line, before any shard is touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_builds import ORACLES, call_main, small_config, small_content, without_ray, write_config

from fourmill.checkpoints import shipped_folder
from fourmill.errors import FourmillError
from fourmill.flows.build import build
from fourmill.labelers.oracle import OracleDepth
from fourmill.shards.dataset import Dataset
from fourmill.tokenize.base import Codec

TOKENS = {"tokenizer": {"model": "shipped:scenes/depth"}}


def nothing_was_made(url: Path) -> bool:
    return not url.exists() or not Dataset(str(url)).columns()


def refused(url: Path, entry: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a build ends with, which has made nothing."""
    content = small_content(url, {"depth": entry}, count=8, image_size=128, decode={"shorter_side": 128})
    with without_ray():
        assert call_main("build", write_config(url.parent / "c.yaml", content), "--no-prefect") in (1, 2)
    assert nothing_was_made(url)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fourmill:")]
    assert len(lines) == 1
    return lines[0]


def broken(tmp_path: Path, *, without: str = "", name: str = "depth") -> dict[str, Any]:
    folder = tmp_path / "checkpoint"
    shutil.copytree(shipped_folder(name), folder)
    if without:
        (folder / without).unlink()
    return {**TOKENS, "model": str(folder)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: broken(path, without="preprocessor_config.json"), "lacks preprocessor_config.json"),
        (lambda path: broken(path, without="model.safetensors"), "cannot load a depth network from"),
        (lambda path: broken(path, name="semseg"), "a depth network is expected"),
        (lambda path: {**TOKENS, "model": "nobody/nothing"}, "'nobody/nothing' needs `revision:`"),
        (lambda path: {**TOKENS, "model": "nobody/nothing", "revision": "0" * 40}, "nobody/nothing"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(
    make: Any,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused(tmp_path / "ds", make(tmp_path), capsys)
    assert "modalities.depth.model" in line and message in line


def test_a_class_map_that_does_not_fit_its_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {
        "labeler": "oracle_semseg",
        "classes": ["sea", "sky"],
        "tokenizer": {"model": "shipped:scenes/semseg"},
    }
    content = small_content(tmp_path / "ds", {"semseg": entry}, count=8, image_size=128)
    with without_ray():
        assert call_main("build", write_config(tmp_path / "c.yaml", content), "--no-prefect") == 1
    assert "'semseg' here has sea, sky" in " ".join(capsys.readouterr().err.split())
    assert nothing_was_made(tmp_path / "ds")


def test_a_labeler_that_raises_on_any_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(self: OracleDepth, truth: Any, frame: Any) -> Any:
        raise ValueError("no depth today")

    monkeypatch.setattr(OracleDepth, "_one", raises)
    with (
        without_ray(),
        pytest.raises(FourmillError, match="modalities.depth: it cannot even label a test image: ValueError"),
    ):
        build(small_config(tmp_path / "ds", {"depth": ORACLES["depth"]}, count=8))
    assert nothing_was_made(tmp_path / "ds")


def test_a_network_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: OracleDepth, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(OracleDepth, "label", too_large)
    with (
        without_ray(),
        pytest.raises(
            FourmillError, match="modalities.depth: not even one image fits into the memory of cpu"
        ),
    ):
        build(small_config(tmp_path / "ds", {"depth": ORACLES["depth"]}, count=8))
    assert nothing_was_made(tmp_path / "ds")


def test_a_tokenizer_that_cannot_take_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fourmill.tokenize.vqvae import VQVAE

    def raises(self: Codec, labels: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    content = small_config(
        tmp_path / "ds",
        {"depth": {**ORACLES["depth"], **TOKENS}},
        count=8,
        image_size=128,
        decode={"shorter_side": 128},
    )
    monkeypatch.setattr(VQVAE, "encode", raises)
    with (
        without_ray(),
        pytest.raises(FourmillError, match="it cannot even label a test image: RuntimeError: mat1 and mat2"),
    ):
        build(content)
    assert nothing_was_made(tmp_path / "ds")
