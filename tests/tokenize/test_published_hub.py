"""Released tokenizers by hub id and from a folder: configuration, dataset, tokens."""

import io
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_hub import COMMIT, Hub, local_hub
from rich.console import Console
from small_builds import ORACLES, small_config, small_content, without_ray
from tokenize_released import write_released

from fourmill.config import check_config
from fourmill.errors import CheckpointError, ConfigError
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.inspecting import describe
from fourmill.flows.inspecting_folders import Parts
from fourmill.flows.resolve import Wanted, resolve
from fourmill.shards.dataset import Dataset
from fourmill.tokenize.base import codec_hash, load_codec

DEPTH_ID = "EPFL-VILAB/4M_tokenizers_depth_8k_224-448"
NEEDED = Counter(["config.json", "model.safetensors"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with local_hub(tmp_path, monkeypatch) as hub:
        folder = write_released("depth", tmp_path / "repo")
        (folder / "pytorch_model.bin").write_text("never read")
        hub.repos[DEPTH_ID] = folder
        yield hub


def depth_with(tmp_path: Path, **tokenizer: Any) -> Wanted:
    entry = {**ORACLES["depth"], "tokenizer": tokenizer}
    return resolve(small_config(tmp_path / "ds", {"depth": entry})).wanted["depth"]


def test_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    wanted = depth_with(tmp_path, model=DEPTH_ID, revision=COMMIT)
    assert hub.gets() == NEEDED, "no preprocessor, no pickle"
    assert (wanted.modality.vocab_size, wanted.modality.num_tokens) == (128, 64)
    assert wanted.tokenizer_provenance["tokenizer"] == DEPTH_ID
    assert "non-commercial" in wanted.tokenizer_provenance["tokenizer_license"]
    local = depth_with(tmp_path, model=str(write_released("depth", tmp_path / "copy")))
    assert local.token_recipe() == wanted.token_recipe(), "a local copy is the same tokenizer"
    hub.stop()
    assert depth_with(tmp_path, model=DEPTH_ID, revision=COMMIT) == wanted


def test_a_hub_id_must_be_pinned(hub: Hub, tmp_path: Path) -> None:
    for revision in (None, "main"):
        with pytest.raises(
            ConfigError, match=r"modalities\.depth\.tokenizer\.model: hub id .* 40-digit commit"
        ):
            depth_with(tmp_path, model=DEPTH_ID, revision=revision)
    assert not hub.requests


def test_another_modality_s_id_is_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    name = "EPFL-VILAB/4M_tokenizers_normal_8k_224-448"
    hub.repos[name] = hub.repos[DEPTH_ID]
    with pytest.raises(CheckpointError, match=f"is the tokenizer of normal; for 'depth' take {DEPTH_ID}"):
        depth_with(tmp_path, model=name, revision=COMMIT)


def test_a_repository_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    (hub.repos[DEPTH_ID] / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"^modalities\.depth\.tokenizer\.model: .* has no model.safetensors"
    ):
        depth_with(tmp_path, model=DEPTH_ID, revision=COMMIT)
    assert hub.gets() == Counter(["config.json"])


def test_a_dataset_of_published_tokens(hub: Hub, tmp_path: Path) -> None:
    """The tokenizer is copied into the dataset, which then needs neither the hub nor its cache."""
    entry = {**ORACLES["depth"], "keep_labels": True, "tokenizer": {"model": DEPTH_ID, "revision": COMMIT}}
    config = check_config(small_content(tmp_path / "ds", {"depth": entry}, count=8), "test")
    with without_ray():
        assert build(config, BuildOptions()).status.complete
    hub.stop()
    shutil.rmtree(tmp_path / "home")
    dataset = Dataset(str(tmp_path / "ds"))
    (short,) = dataset.tokenizers("depth")
    folder = dataset.tokenizer_folder("depth", short)
    assert codec_hash(folder)[:12] == short == codec_hash(tmp_path / "repo")[:12]
    modality = resolve(small_config(tmp_path / "other", {"depth": ORACLES["depth"]})).wanted["depth"].modality
    codec = load_codec(folder, modality, 64)
    assert np.shape(codec.decode([np.arange(64, dtype=np.uint16)])[0]) == (64, 64)
    assert "published" in text_of(describe(tmp_path / "ds"))
    assert text_of(describe(folder)).startswith("a tokenizer of 4M")


def test_pickles_of_a_local_copy_stay_behind(tmp_path: Path) -> None:
    folder = write_released("depth", tmp_path / "copy")
    for name in ("pytorch_model.bin", "README.md"):
        (folder / name).write_text("of the repository")
    with without_ray():
        content = small_content(
            tmp_path / "ds", {"depth": {**ORACLES["depth"], "tokenizer": {"model": str(folder)}}}, count=4
        )
        assert build(check_config(content, "test"), BuildOptions()).status.complete
    dataset = Dataset(str(tmp_path / "ds"))
    (short,) = dataset.tokenizers("depth")
    kept = dataset.store.names(f"tokenizers/depth/{short}")
    assert sorted(kept) == ["README.md", "SHA256SUMS", "config.json", "model.safetensors"]


def text_of(parts: Parts) -> str:
    console = Console(width=200, file=io.StringIO())
    for part in parts:
        console.print(part)
    return str(console.file.getvalue()).strip()  # type: ignore[attr-defined]
