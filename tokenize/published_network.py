"""A published 4M tokenizer as one network: its config.json, its parts, and reading its weights.

The released form is config.json (the arguments of the published classes VQVAE and DiVAE) and model.safetensors, or one
safetensors file whose metadata holds the same keys as text.

Legend of shapes: B images, C channels, L latent channels, h x w the token grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fourmill.checkpoints import WEIGHTS
from fourmill.errors import CheckpointError, ConfigError
from fourmill.tokenize.base import read_config
from fourmill.tokenize.diffusion import PREDICTIONS, Prediction, Schedule, ddim, fixed_noise, trailing_steps
from fourmill.tokenize.published_quantizers import EmaCodebook, Memcodes
from fourmill.tokenize.published_vit import VIT_SIZES, Bottleneck, ViT, ViTDecoder, ViTEncoder
from fourmill.tokenize.quantizers import Quantizer
from fourmill.tokenize.unet import UNET_SIZES, PatchedUNet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DECODER = ("decoder.", "post_quant_proj.")
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "Prediction": (str,),
}
_MLP = re.compile(r"BottleneckMLP/B_(\d+)-Wi_(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedConfig:
    """The keys of a released config.json that change what the network computes, with the published defaults."""

    dec_type: str
    enc_type: str = "vit_b_enc"
    quant_type: str = "lucid"
    n_channels: int = 3
    codebook_size: int = 16384
    latent_dim: int = 32
    image_size: int = 224
    image_size_enc: int | None = None
    image_size_dec: int | None = None
    n_labels: int | None = None
    patch_size: int = 16
    patch_size_dec: int | None = None
    patch_proj: bool = True
    post_mlp: bool = False
    out_conv: bool = False
    undo_std: bool = False
    num_codebooks: int = 1
    norm_codes: bool = True
    norm_latents: bool = False
    ema_decay: float = 0.99
    commitment_weight: float = 1.0
    threshold_ema_dead_code: float = 0.25
    num_train_timesteps: int = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: Prediction = "v_prediction"
    clip_sample: bool = False
    thresholding: bool = True
    zero_terminal_snr: bool = True
    conditioning: str = "concat"

    def __post_init__(self) -> None:
        if self.quant_type not in ("lucid", "memcodes"):
            raise ConfigError(f"quant_type {self.quant_type!r}; known are lucid and memcodes")
        if not self.norm_codes:
            raise ConfigError("norm_codes false: the published tokenizers all look codes up by cosine")
        if self.quant_type == "memcodes" and self.latent_dim % self.num_codebooks:
            raise ConfigError(f"latent_dim {self.latent_dim} is no multiple of num_codebooks")
        if self.is_diffusion and self.conditioning != "concat":
            raise ConfigError(f"conditioning {self.conditioning!r}; the published decoders have concat")
        if self.is_diffusion and self.prediction_type not in PREDICTIONS:
            raise ConfigError(f"prediction_type {self.prediction_type!r}; known are {', '.join(PREDICTIONS)}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ReleasedConfig:
        """Keys that only training had a use for are passed over. Raises ConfigError."""
        given = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        if isinstance(size := given.get("codebook_size"), str) and size.replace("_", "").isdecimal():
            given["codebook_size"] = int(size)  # the published constructor takes text too
        for field in fields(cls):
            kinds = _KINDS[str(field.type)]
            value = given.get(field.name, field.default)
            if type(value) not in kinds or (
                type(value) is int and value < 1 and kinds is not _KINDS["float"]
            ):
                told = repr(value) if field.name in given else "missing"
                raise ConfigError(
                    f"{field.name} is {told}; expected is {' or '.join(k.__name__ for k in kinds)}"
                )
        return cls(**given)

    @property
    def is_diffusion(self) -> bool:
        return self.dec_type in UNET_SIZES

    @property
    def heads(self) -> int:
        """Tokens per place of the grid."""
        return self.num_codebooks if self.quant_type == "memcodes" else 1


class PublishedNetwork(nn.Module):
    """Input (B, C, H, W) float, or class ids (B, H, W) int64, to ids (B, [heads,] h, w) and back."""

    def __init__(self, config: ReleasedConfig) -> None:
        """Raises ConfigError for parts that no published tokenizer has."""
        super().__init__()
        self.config = config
        self.cls_emb = nn.Embedding(config.n_labels, config.n_channels) if config.n_labels else None
        self.encoder, width = make_encoder(config)
        self.quant_proj = nn.Conv2d(width, config.latent_dim, 1)
        self.quantize = make_quantizer(config)
        decoder, width = make_decoder(config)
        self.post_quant_proj = nn.Conv2d(config.latent_dim, width, 1) if width else None
        self.decoder = decoder  # None: of a kind that we do not have

    def encoded(self, x: Tensor) -> Tensor:
        """The encoder's output (B, D, h, w)."""
        if self.cls_emb is not None:
            x = self.cls_emb(x).movedim(-1, 1)
        if self.config.undo_std:  # the encoder wants [-1, 1]
            mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
            x = (x * std + mean) * 2 - 1
        return self.encoder(x)

    def latents(self, x: Tensor) -> Tensor:
        """(B, L, h, w), before the quantizer."""
        return self.quant_proj(self.encoded(x))

    def tokens(self, x: Tensor) -> Tensor:
        """Ids int64 (B, h, w); (B, heads, h, w) of Memcodes."""
        return self.quantize.quantize(self.latents(x))[1]

    def decode(self, quantized: Tensor, steps: int = 25, clip: bool | None = None) -> Tensor:
        """Code vectors (B, L, h, w) to the output (B, C, H, W), or logits of the classes.

        A diffusion decoder takes ``steps`` from one fixed noise, with ``clip`` as in `denoised`.
        """
        if self.decoder is None:
            raise ConfigError(
                f"there is no decoder of the type {self.config.dec_type!r} here, only its encoder"
            )
        if self.post_quant_proj is not None:
            return self.decoder(self.post_quant_proj(quantized))
        height, width = (side * self.config.patch_size for side in quantized.shape[2:])
        noise = fixed_noise(self.config.n_channels, height, width)
        noise = noise.to(quantized.device).expand(len(quantized), -1, -1, -1)
        return self.denoised(noise, quantized, steps, clip)[-1]

    def denoised(
        self, noise: Tensor, quantized: Tensor, steps: int, clip: bool | None = None
    ) -> list[Tensor]:
        """x after every DDIM step from ``noise`` (B, C, H, W); ``clip`` (x0 to [-1, 1]) as the config says."""
        config = self.config
        schedule = Schedule.named(config.beta_schedule, config.num_train_timesteps, config.zero_terminal_snr)
        along = trailing_steps(steps, config.num_train_timesteps)
        clip = config.thresholding or config.clip_sample if clip is None else clip
        assert isinstance(self.decoder, PatchedUNet)
        network = partial(self.decoder, condition=quantized)
        return [x for _, x in ddim(network, schedule, noise, along, config.prediction_type, clip)]


def make_encoder(config: ReleasedConfig) -> tuple[nn.Module, int]:
    """The encoder and the width of what it gives."""
    if (sizes := _MLP.fullmatch(config.enc_type)) is not None:
        depth, width = map(int, sizes.groups())
        return Bottleneck(config.n_channels, width, width, depth), width
    name = config.enc_type.removesuffix("_enc")
    if name not in VIT_SIZES:
        raise ConfigError(f"enc_type {config.enc_type!r}; known are {_known('_enc')}")
    side = (config.image_size_enc or config.image_size) // config.patch_size
    patch = config.patch_size if config.patch_proj else 1
    encoder = ViTEncoder(name, config.n_channels, patch, side, config.post_mlp)
    return encoder, encoder.dim


def make_decoder(config: ReleasedConfig) -> tuple[nn.Module | None, int]:
    """The decoder and the width that it takes: 0 where the condition goes in as it is. None: a kind unknown here."""
    if config.is_diffusion:
        return PatchedUNet(UNET_SIZES[config.dec_type], config.n_channels, config.latent_dim), 0
    out = config.n_labels or config.n_channels
    if (sizes := _MLP.fullmatch(config.dec_type)) is not None:
        depth, width = map(int, sizes.groups())
        return Bottleneck(width, out, width, depth), width
    name = config.dec_type.removesuffix("_dec")
    if name not in VIT_SIZES:
        return None, 0
    patch = config.patch_size_dec or config.patch_size
    side = (config.image_size_dec or config.image_size) // patch
    decoder = ViTDecoder(name, out, patch if config.patch_proj else 1, side, config.post_mlp, config.out_conv)
    return decoder, decoder.dim


def make_quantizer(config: ReleasedConfig) -> Quantizer:
    if config.quant_type == "memcodes":
        return Memcodes(config.codebook_size, config.latent_dim, config.num_codebooks)
    return EmaCodebook(
        config.codebook_size,
        config.latent_dim,
        config.ema_decay,
        config.commitment_weight,
        config.norm_latents,
        config.threshold_ema_dead_code,
    )


def _known(ending: str) -> str:
    return ", ".join([name + ending for name in VIT_SIZES] + ["BottleneckMLP/B_n-Wi_n"])


def read_released(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights (float32) in ``folder``. Raises CheckpointError."""
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"tokenizer weights {file} are missing or damaged: {reason}") from error
    config = folder / "config.json"
    values = read_config(folder) if config.is_file() else metadata_config(metadata)
    return values, {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}


def metadata_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The config that a stand-alone file carries: a Python literal per key, as text."""
    texts = {key: "null" if text == "None" else text for key, text in metadata.items() if len(text) < 1000}
    try:
        return {key: yaml.safe_load(text) for key, text in texts.items()}
    except yaml.YAMLError as error:
        raise CheckpointError(f"the metadata of {WEIGHTS} cannot be read: {error}") from error


def build(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> PublishedNetwork:
    """The network with these weights, for evaluation. Raises ConfigError for a config or weights that do not fit."""
    with torch.device("meta"):  # every value comes from the file
        network = PublishedNetwork(ReleasedConfig.from_mapping(values))
    _fit_positions(network.encoder, weights.get("encoder.pos_emb"))
    _fit_positions(network.decoder, weights.get("decoder.pos_emb"))
    wanted = network.state_dict()
    given = {k: w for k, w in weights.items() if network.decoder is not None or not k.startswith(_DECODER)}
    wrong = next((k for k, w in wanted.items() if k in given and given[k].shape != w.shape), None)
    if wrong is not None:
        shapes = f"{tuple(given[wrong].shape)}, config.json asks for {tuple(wanted[wrong].shape)}"
        raise ConfigError(f"{wrong} has the shape {shapes}")
    for names, what in ((wanted.keys() - given.keys(), "lack"), (given.keys() - wanted.keys(), "also hold")):
        if names:
            raise ConfigError(f"the weights {what} {min(names)} and {len(names) - 1} others")
    network.load_state_dict(given, assign=True)
    return network.eval().requires_grad_(False)


def _fit_positions(part: nn.Module | None, table: Tensor | None) -> None:
    """Make room for a table of the resolution that was trained last, which the config need not say."""
    if isinstance(part, ViT) and table is not None and table.shape[:2] == part.pos_emb.shape[:2]:
        part.pos_emb = torch.empty(table.shape, device="meta")
