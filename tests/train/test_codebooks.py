"""Token tables that begin from the codebooks of a dataset's tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fourmill.errors import ConfigError
from fourmill.modality import Modality
from fourmill.tokenize.vqvae import VQVAE, VQConfig
from fourmill.train.checkpoint import load_model
from fourmill.train.codebooks import read_codebooks
from fourmill.train.presets import model_config
from fourmill.train.sources import Sources
from fourmill.train.trainer import train_on
from fourmill.train_config import MixtureComponent, TrainConfig

SIZE = 64


def _codec(modality: Modality, codes: int) -> VQVAE:
    config = VQConfig(dim=32, encoder_depth=1, decoder_depth=1, heads=2, latent_dim=6, codebook_size=codes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = VQVAE(modality, SIZE, config)
        codec.network.state_dict()["quantizer.codes"].copy_(torch.randn(codes, 6))
    return codec.freeze()


@pytest.fixture
def snapshot(snapshot_of: Callable[..., Any], tmp_path: Path) -> Any:
    """A toy snapshot whose rgb and depth have tokenizers."""
    made = snapshot_of(rows=30)
    folders = {name: tmp_path / "tokenizers" / name for name in ("rgb", "depth")}
    for name, folder in folders.items():
        _codec(made.modalities[name], 16).save(folder)

    class Dataset:
        def tokenizer_folder(self, modality: str, short: str) -> Path:
            assert short == f"hash of {modality}"
            return folders[modality]

    made.dataset = Dataset()
    made.tokenizer = lambda name: f"hash of {name}" if name in folders else None
    return made


@pytest.fixture
def config(tiny_preset: str) -> TrainConfig:
    return TrainConfig(
        preset=tiny_preset, steps=2, batch_size=6, lr=1e-9, warmup_steps=1, num_input_tokens=16, num_target_tokens=20,
        mixture=(MixtureComponent(),), checkpoint_every=1, device="cpu", token_init="codebook", weight_decay=0.0,
    )  # fmt: skip


def test_codebooks_are_those_of_the_tokenizers(snapshot: Any, config: TrainConfig) -> None:
    shape = model_config(config, snapshot.modalities, SIZE)
    found = read_codebooks(Sources([snapshot], [1.0]), shape)
    assert found.keys() == {"rgb", "depth"}
    codes = _codec(snapshot.modalities["rgb"], 16).code_vectors()
    assert codes.shape == (16, 6) and torch.equal(found["rgb"], codes)


def test_training_begins_there_once(snapshot: Any, config: TrainConfig, tmp_path: Path) -> None:
    """At a rate of nearly nought the tables still have the rank of the codes. A resumed run begins from its checkpoint."""
    train_on(snapshot, tmp_path / "run", config)
    model = load_model(tmp_path / "run")
    rgb, vector = model.config.index("rgb"), model.config.index("clip_global")
    assert torch.linalg.matrix_rank(model.heads()[rgb], rtol=1e-3) == 6
    assert torch.linalg.matrix_rank(model.heads()[vector], rtol=1e-3) == 16
    fast = TrainConfig(**{**config.model_dump(), "lr": 0.1})
    whole = train_on(snapshot, tmp_path / "whole", fast)
    with pytest.raises(KeyboardInterrupt):
        train_on(snapshot, tmp_path / "parts", fast, _interrupt_at_2)
    parts = train_on(snapshot, tmp_path / "parts", fast)
    assert (whole.resumed_from, parts.resumed_from) == (None, 1)
    one, two = (load_model(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def _interrupt_at_2(record: dict[str, Any]) -> None:
    if record["step"] == 2:
        raise KeyboardInterrupt


def test_a_codebook_of_another_size_is_refused(snapshot: Any, config: TrainConfig) -> None:
    _codec(snapshot.modalities["depth"], 8).save(snapshot.dataset.tokenizer_folder("depth", "hash of depth"))
    shape = model_config(config, snapshot.modalities, SIZE)
    with pytest.raises(ConfigError, match="has 8 codes, the snapshot's 'depth' has 16"):
        read_codebooks(Sources([snapshot], [1.0]), shape)
