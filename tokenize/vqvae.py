"""The codec family "vqvae": a ViT encoder, a quantizer and a ViT decoder for grid modalities.

After 4M's tokenizers (spec of the paper's supplement: ViT-B/ViT-B, patch 16, 32-d cosine codebook), at any
size: the demo's take about 1 ms per 128-px crop on one core. The space of the labels (spaces.py) follows from
the modality's contract.

Legend of shapes: B images, C channels, S image side, p patch, h x w the token grid, T = h*w tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourmill.errors import CheckpointError, ConfigError, ContractError, nearest
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Codec, Value, check_made_for, read_config, register
from fourmill.tokenize.quantizers import Quantizer, make_quantizer
from fourmill.tokenize.spaces import Bounded, Classes, Depth, Features, Space, Vector, space_name

MAX_CODES = 1 << 16  # ids are stored as uint16
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class VQConfig:
    """Sizes of a tokenizer network; the defaults are 4M's ViT-B."""

    dim: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16  # pixels; features are not patchified
    latent_dim: int = 32
    codebook_size: int = 8192
    quantizer: str = "cosine"  # or "fsq"
    levels: tuple[int, ...] = ()  # of fsq, where they replace latent_dim and codebook_size
    refine: int = (
        0  # channels of the convolutions behind the decoder, at a quarter of the resolution; 0: none
    )
    class_dim: int = 64  # of the learned embedding of a pixel's class
    normalisation: str = "log"  # of depth: "log" (metres) or "robust" (relative)
    depth_range: tuple[float, float] = (0.1, 200.0)  # metres, of "log"

    def __post_init__(self) -> None:
        if self.codes > MAX_CODES:
            raise ConfigError(
                f"codebook_size {self.codes} is more than {MAX_CODES}: token ids are stored as uint16"
            )
        if self.dim % (4 * self.heads):
            raise ConfigError(f"dim {self.dim} must be a multiple of 4 x heads ({self.heads})")
        if self.normalisation not in ("log", "robust"):
            raise ConfigError(f"normalisation {self.normalisation!r} is neither 'log' nor 'robust'")
        if self.quantizer not in ("cosine", "fsq") or (self.quantizer == "fsq" and not self.levels):
            raise ConfigError(
                f"quantizer {self.quantizer!r}: known are 'cosine' and 'fsq' (which needs `levels`)"
            )
        if self.refine and self.patch_size % 4:
            raise ConfigError(f"patch_size {self.patch_size} must be a multiple of 4 where `refine` is set")

    @property
    def codes(self) -> int:
        return int(np.prod(self.levels)) if self.quantizer == "fsq" else self.codebook_size

    @classmethod
    def from_mapping(cls, values: dict[str, Any], where: str) -> VQConfig:
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"{where}.{name}: unknown option of the vqvae codec{nearest(name, known)}")
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2D positions (height*width, dim): sin and cos of the row, then of the column."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * omega for axis in (rows, columns)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        hidden = int(dim * mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Head(nn.Module):
    """Decoder tokens (B, T, dim) to a map (B, out, h*p, w*p).

    With ``refine`` the tokens are first spread over a grid of a quarter of the resolution, where two residual
    convolutions join neighbouring patches: outlines get sharper for little work.
    """

    def __init__(self, dim: int, patch: int, out_channels: int, refine: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.coarse = grid, patch // 4 if refine else patch
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.spread = nn.Linear(dim, (refine or out_channels) * self.coarse**2)
        self.convs = nn.ModuleList(nn.Conv2d(refine, refine, 3, padding=1) for _ in range(2 if refine else 0))
        self.out = nn.Conv2d(refine, out_channels * 16, 3, padding=1) if refine else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.grid
        x = self.spread(self.norm(x)).transpose(1, 2).reshape(len(x), -1, height, width)
        x = F.pixel_shuffle(x, self.coarse)
        if self.out is None:
            return x
        for conv in self.convs:
            x = x + conv(F.gelu(x))
        return F.pixel_shuffle(self.out(F.gelu(x)), 4)


class VQNetwork(nn.Module):
    """The trainable part. Input and output are what the space gives and takes."""

    positions: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, config: VQConfig, space: Space, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.patch = 1 if isinstance(space, Features) else config.patch_size
        self.classes = (
            nn.Embedding(space.out_channels, space.channels) if isinstance(space, Classes) else None
        )
        self.embed = nn.Linear(space.channels * self.patch**2, config.dim)
        self.register_buffer("positions", sincos_positions(*grid, config.dim), persistent=False)
        standardised = space.channels if isinstance(space, Features) else 0
        self.register_buffer("shift", torch.zeros(standardised, 1, 1))
        self.register_buffer("scale", torch.ones(standardised, 1, 1))
        self.encoder = _blocks(config, config.encoder_depth)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.quantizer: Quantizer = make_quantizer(
            config.quantizer, config.codebook_size, config.latent_dim, config.levels
        )
        self.to_latent = nn.Linear(config.dim, self.quantizer.latent_dim)
        self.from_latent = nn.Linear(self.quantizer.latent_dim, config.dim)
        self.decoder = _blocks(config, config.decoder_depth)
        refine = 0 if self.patch == 1 else config.refine
        self.head = Head(config.dim, self.patch, space.out_channels, refine, grid)

    def encode(self, x: Tensor) -> Tensor:
        """Network input to latents (B, D, h, w)."""
        if self.classes is not None:
            x = self.classes(x).permute(0, 3, 1, 2)
        if len(self.shift):
            x = (x - self.shift) / self.scale
        tokens = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)  # (B, T, C*p*p)
        tokens = self.encoder(self.embed(tokens) + self.positions)
        return self.to_latent(self.norm(tokens)).transpose(1, 2).unflatten(2, self.grid)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, D, h, w) to the network's output (B, out, H, W)."""
        tokens = self.from_latent(latents.flatten(2).transpose(1, 2)) + self.positions
        output = self.head(self.decoder(tokens))
        return output * self.scale + self.shift if len(self.shift) else output

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(output, ids (B, h, w), quantizer loss)."""
        latents = self.encode(x)
        with torch.autocast(x.device.type, enabled=False):  # the nearest of thousands of codes needs float32
            quantized, ids, loss = self.quantizer.quantize(latents.float(), generator)
        return self.decode(quantized), ids, loss

    def forward_relaxed(self, x: Tensor) -> Tensor:
        """The output without quantisation, for the first part of a fit."""
        return self.decode(self.quantizer.relax(self.encode(x)))


def _blocks(config: VQConfig, depth: int) -> nn.Sequential:
    return nn.Sequential(*(Block(config.dim, config.heads, config.mlp_ratio) for _ in range(depth)))


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
        card: dict[str, Any] | None = None,
    ) -> None:
        """``grid`` and ``channels`` are needed for features alone (of vectors ``channels``), whose labels set them."""
        self.image_size, self.config, self.card = image_size, config, card or {}
        self.space = make_space(modality, config, channels)
        if isinstance(self.space, Vector):
            self.grid = (1, self.space.pieces)
        elif isinstance(self.space, Features):
            if grid is None:
                raise ConfigError(f"modality {modality.name!r}: a tokenizer of features needs their grid")
            self.grid = grid
        else:
            if image_size % config.patch_size:
                raise ConfigError(f"image_size {image_size} is no multiple of patch_size {config.patch_size}")
            self.grid = (image_size // config.patch_size,) * 2
        self.network = VQNetwork(config, self.space, self.grid).eval()
        self.modality = modality.resolved(vocab_size=config.codes, num_tokens=self.grid[0] * self.grid[1])

    @property
    def device(self) -> torch.device:
        return self.network.positions.device

    def to(self, device: str | torch.device) -> VQVAE:
        self.network.to(device)
        return self

    def to_network(self, labels: Sequence[Label]) -> Tensor:
        """Labels to the network's input, checked against the contract's shape."""
        shape = self.space.label_shape(self.image_size, self.grid)
        return self.space.to_network(self.space.check(labels, shape)).to(self.device)

    @torch.inference_mode()
    def encode(self, labels: Sequence[Label]) -> list[Value]:
        """All labels as one batch; on the CPU the same batch gives the same bits."""
        if not len(labels):
            return []
        self.network.eval()
        _, ids, _ = self.network.quantizer.quantize(self.network.encode(self.to_network(labels)))
        return list(ids.flatten(1).cpu().numpy().astype(np.uint16))

    @torch.inference_mode()
    def decode(self, values: Sequence[Value]) -> list[Label]:
        if not len(values):
            return []
        self.network.eval()
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
        latents = self.network.quantizer.lookup(torch.from_numpy(ids).view(-1, *self.grid).to(self.device))
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
        self.network.eval()
        codes = self.network.quantizer.lookup(
            torch.arange(weights.shape[2], device=self.device).view(1, 1, -1)
        )
        latents = (weights @ codes[0, :, 0].T).transpose(1, 2).unflatten(2, self.grid)  # codes (1, D, 1, K)
        return list(self.space.to_labels(self.network.decode(latents).float()))

    @torch.inference_mode()
    def code_vectors(self) -> Tensor:
        """float32 (K, D): the point in latent space that each token id stands for."""
        ids = torch.arange(self.modality.vocab_size, device=self.device).view(1, 1, -1)
        return self.network.quantizer.lookup(ids)[0, :, 0].T.clone()

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
            "image_size": self.image_size,
            "classes": list(self.modality.contract.classes),
            "vocab_size": self.modality.vocab_size,
            "num_tokens": self.modality.num_tokens,
            "space": self.space.name,
            "grid": list(self.grid),
            "channels": channels,
            "network": asdict(self.config),
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
                modality, image_size, network, grid=tuple(config["grid"]), channels=config["channels"]
            )
            if codec.space.name != config["space"]:
                raise ConfigError(
                    f"it was made for {config['space']} labels, {modality.name!r} has {codec.space.name}"
                )
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
    return Vector(modality, declared) if name == Vector.name else Features(modality, declared)
