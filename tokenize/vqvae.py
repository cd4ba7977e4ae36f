"""The codec family "vqvae": grids and vectors to tokens and back, by a network that is fitted here (vqvae_network.py).

The space of the labels (spaces.py) follows from the modality's contract.

Legend of shapes: B images, C channels, S image side, h x w the token grid, T = h*w tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Codec, Value, check_made_for, read_config, register
from fourmill.tokenize.diffusion_network import DiffusionNetwork
from fourmill.tokenize.memory_codes import VectorNetwork
from fourmill.tokenize.spaces import Bounded, Classes, Depth, Features, Space, Vector, space_name
from fourmill.tokenize.vqvae_network import (
    MAX_CODES,
    Block,
    TokenizerNetwork,
    VQConfig,
    VQNetwork,
    sincos_positions,
)

__all__ = ["MAX_CODES", "VQVAE", "Block", "TokenizerNetwork", "VQConfig", "VQNetwork", "sincos_positions"]

_WEIGHTS = "model.safetensors"


@register("vqvae")
class VQVAE(Codec):
    """Maps of shape (S, S[, C]) or features (h, w, C) <-> uint16 (h*w,), row by row from the top left; vectors (C,)
    <-> uint16 (n,), piece by piece.
    """

    family = "vqvae"
    needs_fit = True

    def __init__(
        self,
        modality: Modality,
        image_size: int,
        config: VQConfig,
        *,
        grid: tuple[int, int] | None = None,
        channels: int | None = None,
        image_sizes: Sequence[int] = (),
        card: dict[str, Any] | None = None,
    ) -> None:
        """``grid`` and ``channels`` are needed for features alone (of vectors ``channels``), whose labels set them.

        ``image_sizes``: where it is fitted for several, with the size first that position tables are made for.
        """
        self.image_size, self.config, self.card = image_size, config, card or {}
        self.image_sizes = tuple(image_sizes) or (image_size,)
        self.space = make_space(modality, config, channels)
        self.network = self._make_network(grid).eval()
        tokens = math.prod(self.network.tokens)
        self.modality = modality.resolved(vocab_size=config.codes, num_tokens=tokens)

    def _make_network(self, grid: tuple[int, int] | None) -> TokenizerNetwork:
        space, config = self.space, self.config
        name = space.modality_name
        is_diffusion = config.decoder == "diffusion"
        if is_diffusion and isinstance(space, Features):
            raise ConfigError(
                f"modalities.{name}.tokenizer.decoder: 'diffusion' is for maps; labels of the kind {space.name!r} "
                "take 'vit'"
            )
        if isinstance(space, Vector) and space.is_whole:
            return VectorNetwork(config, space)
        if config.quantizer == "memory":
            raise ConfigError(f"modality {name!r}: the quantizer 'memory' is for vectors")
        if isinstance(space, Vector):
            return VQNetwork(config, space, (1, space.pieces))
        if isinstance(space, Features):
            if grid is None:
                raise ConfigError(f"modality {name!r}: a tokenizer of features needs their grid")
            return VQNetwork(config, space, grid)
        for size in (self.image_size, *self.image_sizes):
            if size % config.patch_size:
                raise ConfigError(f"image_size {size} is no multiple of patch_size {config.patch_size}")
            if is_diffusion and size % config.unet_patch:
                raise ConfigError(f"image_size {size} is no multiple of unet_patch {config.unet_patch}")
        own, base = ((size // config.patch_size,) * 2 for size in (self.image_size, self.image_sizes[0]))
        made = DiffusionNetwork if is_diffusion else VQNetwork
        return made(config, space, (own[0], own[1]), (base[0], base[1]))

    @property
    def device(self) -> torch.device:
        return self.network.shift.device

    @property
    def codebooks(self) -> int:
        """How many there are, in turn along the tokens."""
        return self.config.memory_heads if self.config.quantizer == "memory" else 1

    def to(self, device: str | torch.device) -> VQVAE:
        self.network.to(device)
        return self

    def to_network(self, labels: Sequence[Label]) -> Tensor:
        """Labels to the network's input, checked against the contract's shape."""
        shape = self.space.label_shape(self.image_size, self.label_grid)
        return self.space.to_network(self.space.check(labels, shape)).to(self.device)

    @property
    def label_grid(self) -> tuple[int, int]:
        """The token grid of maps and features; of no meaning for vectors."""
        return (self.network.tokens[0], self.network.tokens[1])

    def _grid_at(self, size: int) -> tuple[int, int]:
        """Of images of this size, where the labels do not set it."""
        if isinstance(self.space, Features):
            return self.label_grid
        return (size // self.config.patch_size, size // self.config.patch_size)

    def _tokens_at(self, size: int) -> int:
        return (
            self.modality.num_tokens if isinstance(self.space, Features) else math.prod(self._grid_at(size))
        )

    def _ready(self) -> None:
        """Out of a fit. Going through the whole network for nothing takes 1% of an encoding at the demo's size."""
        if self.network.training:
            self.network.eval()

    @torch.inference_mode()
    def encode(self, labels: Sequence[Label]) -> list[Value]:
        """All labels as one batch; on the CPU the same batch gives the same bits."""
        if not len(labels):
            return []
        self._ready()
        ids = self.network.quantizer.ids(self.network.encode(self.to_network(labels)))
        return list(ids.flatten(1).cpu().numpy().astype(np.uint16))

    @torch.inference_mode()
    def decode(self, values: Sequence[Value]) -> list[Label]:
        if not len(values):
            return []
        self._ready()
        ids = np.stack([np.asarray(value, dtype=np.int64) for value in values])
        if (
            ids.shape[1:] != (self.modality.num_tokens,)
            or ids.min() < 0
            or ids.max() >= self.modality.vocab_size
        ):
            raise ContractError(
                f"tokenizer of {self.modality.name!r}: tokens {ids.shape[1:]} up to {ids.max()} are not "
                f"{self.modality.num_tokens} ids below {self.modality.vocab_size}"
            )
        latents = self.network.quantizer.lookup(
            torch.from_numpy(ids).view(-1, *self.network.tokens).to(self.device)
        )
        return list(self.space.to_labels(self.network.decode(latents).float()))

    @torch.inference_mode()
    def decode_expected(self, probabilities: np.ndarray) -> list[Label]:
        """Labels of the expected codes: float (B, T, K), the probability of each code at each place, sums to 1.

        The decoder gets the mean of the codebook's vectors. For an uncertain predictor this comes closer to the truth
        than the labels of the most probable codes, as a posterior mean does; with certainty it equals `decode`.
        """
        weights = torch.from_numpy(np.ascontiguousarray(probabilities, dtype=np.float32)).to(self.device)
        if weights.shape[1:] != (self.modality.num_tokens, self.modality.vocab_size):
            raise ContractError(
                f"tokenizer of {self.modality.name!r}: probabilities {tuple(weights.shape[1:])} are not "
                f"{self.modality.num_tokens} places x {self.modality.vocab_size} codes"
            )
        if not len(weights):
            return []
        self._ready()
        latents = self.network.quantizer.expected(weights, self.label_grid)
        return list(self.space.to_labels(self.network.decode(latents).float()))

    @torch.inference_mode()
    def code_vectors(self) -> Tensor:
        """float32 (K, D): the point in latent space that each token id stands for."""
        return self.network.quantizer.table().clone()

    def freeze(self) -> VQVAE:
        """Round the weights to what `save` stores, so that this codec and its saved copy give the same bits."""
        self.network.half().float().eval().requires_grad_(False)
        return self

    def save(self, folder: Path) -> None:
        import yaml

        folder.mkdir(parents=True, exist_ok=True)
        channels = self.space.label_channels if isinstance(self.space, Features) else None
        config = {
            "family": self.family,
            "modality": self.modality.name,
            "image_size": self.image_sizes[0],
            **({"image_sizes": list(self.image_sizes)} if len(self.image_sizes) > 1 else {}),
            "contract": self.space.contract_facts(),
            "classes": list(self.modality.contract.classes),
            "vocab_size": self.modality.vocab_size,
            "num_tokens": self._tokens_at(self.image_sizes[0]),
            "space": self.space.name,
            "grid": list(self._grid_at(self.image_sizes[0])),
            "channels": channels,
            "network": self.config.to_mapping(),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = {k: v.half().contiguous().cpu() for k, v in self.network.state_dict().items()}
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
        (folder / "card.yaml").write_text(
            yaml.safe_dump({"modality": self.modality.name, **self.card}, sort_keys=False)
        )

    @classmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> VQVAE:
        config = read_config(folder)
        check_made_for(folder, config, modality, image_size)
        try:
            network = VQConfig.from_mapping(dict(config["network"]), f"{folder}/config.json: network")
            codec = cls(
                modality,
                image_size,
                network,
                grid=tuple(config["grid"]),
                channels=config["channels"],
                image_sizes=config.get("image_sizes", [config["image_size"]]),
            )
            _check_contract(codec.space, config)
        except (ConfigError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"tokenizer {folder}: config.json does not describe a vqvae codec: {error}"
            ) from error
        codec._read_weights(folder / _WEIGHTS)
        return codec

    def _read_weights(self, file: Path) -> None:
        try:
            weights = {k: v.float() for k, v in load_file(file).items()}
            self.network.load_state_dict(weights, strict=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"tokenizer weights {file} are missing or damaged: {reason}") from error
        self.freeze()


def _check_contract(space: Space, config: dict[str, Any]) -> None:
    """Refuse labels of another meaning than those it was fitted on, as far as its config.json says."""
    if space.name != config["space"]:
        raise ConfigError(
            f"it was made for {config['space']} labels, {space.modality_name!r} has {space.name}"
        )
    facts = space.contract_facts()
    for key, made_for in config.get("contract", facts).items():
        if facts.get(key) != made_for:
            raise ConfigError(
                f"it was made for labels whose {key} is {made_for!r}, that of {space.modality_name!r} is "
                f"{facts.get(key)!r}"
            )


def make_space(modality: Modality, config: VQConfig, channels: int | None) -> Space:
    """The space that the modality's contract asks for."""
    name = space_name(modality.contract)
    if name == Depth.name:
        return Depth(modality, config.normalisation, config.depth_range)
    if name == Classes.name:
        return Classes(modality, config.class_dim)
    if name == Bounded.name:
        return Bounded(modality)
    declared = modality.contract.channels or channels
    if not declared or (channels and declared != channels):
        raise ConfigError(
            f"modality {modality.name!r}: its features have {channels} channels, declared are {declared}"
        )
    if name == Vector.name:
        return Vector(modality, declared, is_whole=config.quantizer == "memory")
    return Features(modality, declared)
