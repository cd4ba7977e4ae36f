"""The codebooks of the tokenizers of snapshots, from which a model's token tables can begin."""

from __future__ import annotations

from torch import Tensor

from fourmill.errors import ConfigError
from fourmill.tokenize.base import load_codec
from fourmill.tokenize.vqvae import VQVAE
from fourmill.train.presets import ModelConfig
from fourmill.train.sources import Sources


def read_codebooks(sources: Sources, model: ModelConfig) -> dict[str, Tensor]:
    """float32 (V, D) by modality, for the grids whose tokenizer is a VQ-VAE.

    Raises ConfigError where a tokenizer has another vocabulary than the model's table.
    """
    found = {}
    for spec in model.modalities:
        snapshot = sources.owner(spec.name)
        short = snapshot.tokenizer(spec.name) if spec.kind == "grid" else None
        if short is None:
            continue
        folder = snapshot.dataset.tokenizer_folder(spec.name, short)
        codec = load_codec(folder, snapshot.modalities[spec.name], snapshot.image_size)
        if not isinstance(codec, VQVAE):
            continue
        codes = codec.code_vectors()
        if len(codes) != spec.vocab_size:
            raise ConfigError(
                f"tokenizer {folder} has {len(codes)} codes, the snapshot's {spec.name!r} has {spec.vocab_size}"
            )
        found[spec.name] = codes
    return found
