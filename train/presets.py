"""Sizes of the model by name, and the description of one model that is saved beside its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fourmill.errors import CheckpointError, ConfigError, nearest
from fourmill.modality import Kind, Modality
from fourmill.tokenize.metadata import CHUNK as METADATA_CHUNK
from fourmill.train_config import TrainConfig

#: Special tokens of every text-like vocabulary (4M's WordPiece, ids 0 to 203).
PAD, EOS = 0, 3
FIRST_SENTINEL = 5  # [S_1]; [S_0] = 4 is never used
NUM_SENTINELS = 199  # [S_1] .. [S_199]
#: A sequence of n tokens can need (n + 1) // 2 spans and a closing sentinel.
MAX_SEQUENCE = 2 * (NUM_SENTINELS - 1)

PATCH_SIZE = 16  # of rgb_pixels
INPUT_KINDS = ("grid", "vector", "sequence", "pixels")
TARGET_KINDS = ("grid", "vector", "sequence")


@dataclass(frozen=True, slots=True)
class Size:
    """``dim`` model width; blocks in the encoder and in the decoder; width of a head; and how training begins.

    The defaults are 4M's, for long runs: token and modality embeddings of spread 0.02 are drowned by positions of spread
    0.7 at first. With ``token_std`` 1 and cross-attention that begins by looking at a slot's own place (``look_in_place``)
    the toy task of the tests (a token is a function of another one at its place) reached a loss of 0.6 in 240 steps,
    with 4M's beginning 2.7, where the marginal is 2.77.
    """

    dim: int
    encoder_depth: int
    decoder_depth: int
    head_dim: int = 64
    token_std: float = 0.02
    modality_std: float = 0.02
    look_in_place: bool = False


#: 4M's sizes (section 4 of the paper; parameter counts of the blocks in tests), and the demo's.
PRESETS: dict[str, Size] = {
    "demo": Size(128, 2, 1, token_std=1.0, modality_std=0.5, look_in_place=True),
    "4m-t": Size(384, 6, 6),
    "4m-s": Size(512, 8, 8),
    "4m-b": Size(768, 12, 12),
    "4m-l": Size(1024, 24, 24),
    "4m-xl": Size(2048, 24, 24),
}


@dataclass(frozen=True, slots=True)
class ModalitySpec:
    """What the model knows of a modality. ``num_tokens``: per crop, or the longest sequence that is kept."""

    name: str
    kind: Kind  # grid, vector, sequence or pixels
    vocab_size: int  # 0 for pixels
    num_tokens: int
    is_input: bool
    is_target: bool
    chunk: int = 1  # tokens of a sequence that are shuffled and masked as one; 1: not shuffled

    @property
    def is_sequence(self) -> bool:
        return self.kind == "sequence"

    @property
    def side(self) -> int:
        """Tokens along one side of the grid (grids and pixels are square)."""
        return math.isqrt(self.num_tokens)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that fixes the shapes of a model's weights. Saved as config.json."""

    dim: int
    encoder_depth: int
    decoder_depth: int
    modalities: tuple[ModalitySpec, ...]
    head_dim: int = 64
    token_std: float = 0.02  # these three: see `Size`
    modality_std: float = 0.02
    look_in_place: bool = False

    @property
    def num_heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of SwiGLU: two thirds of 4 * dim."""
        return int(2 * 4 * self.dim / 3)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.modalities)

    def spec(self, name: str) -> ModalitySpec:
        return self.modalities[self.index(name)]

    def index(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError(f"the model has no modality {name!r}{nearest(name, self.names)}")
        return self.names.index(name)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelConfig:
        try:
            data: dict[str, Any] = json.loads(text)
            specs = tuple(ModalitySpec(**entry) for entry in data.pop("modalities"))
            return cls(modalities=specs, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{where}: not the configuration of a model: {error}") from error


def model_config(config: TrainConfig, modalities: Mapping[str, Modality], image_size: int) -> ModelConfig:
    """The model that ``config`` asks for on a snapshot's modalities, in order of their names."""
    if config.preset not in PRESETS:
        raise ConfigError(f"train.preset: unknown preset {config.preset!r}{nearest(config.preset, PRESETS)}")
    size = PRESETS[config.preset]
    inputs = _chosen("inputs", config.inputs, modalities, INPUT_KINDS)
    targets = _chosen("targets", config.targets, modalities, TARGET_KINDS)
    _check_mixture(config, modalities)
    specs = tuple(
        _spec(modalities[name], name in inputs, name in targets, image_size)
        for name in sorted(inputs | targets)
    )
    return ModelConfig(
        size.dim,
        size.encoder_depth,
        size.decoder_depth,
        specs,
        size.head_dim,
        size.token_std,
        size.modality_std,
        size.look_in_place,
    )


def _chosen(
    what: str, names: Iterable[str] | None, modalities: Mapping[str, Modality], kinds: tuple[str, ...]
) -> set[str]:
    """The modalities that are inputs or targets: those named, or all whose kind can be."""
    for name in names or ():
        if name not in modalities:
            raise ConfigError(
                f"train.{what}: the snapshot has no modality {name!r}{nearest(name, modalities)}"
            )
        if modalities[name].kind not in kinds:
            raise ConfigError(
                f"train.{what}: {name!r} is of kind {modalities[name].kind!r}, which cannot be among the {what}; "
                f"these kinds can: {', '.join(kinds)}"
            )
    chosen = {n for n, m in modalities.items() if m.kind in kinds} if names is None else set(names)
    if not chosen:
        raise ConfigError(f"train.{what}: no modality of the snapshot can be among the {what}")
    return chosen


def _check_mixture(config: TrainConfig, modalities: Mapping[str, Modality]) -> None:
    """A misspelt name in a mixture would silently get the default alpha. Names of the default mixture may be absent."""
    if config.mixture == type(config).model_fields["mixture"].get_default(call_default_factory=True):
        return
    for number, part in enumerate(config.mixture):
        for table in (part.input_alphas, part.target_alphas, part.keep):
            for name in table:
                if name not in modalities:
                    where = f"train.mixture.{number}"
                    raise ConfigError(
                        f"{where}: the snapshot has no modality {name!r}{nearest(name, modalities)}"
                    )


def _spec(modality: Modality, is_input: bool, is_target: bool, image_size: int) -> ModalitySpec:
    count, kind = modality.num_tokens, modality.kind
    where = f"modality {modality.name!r}"
    if kind == "pixels":
        if image_size % PATCH_SIZE:
            raise ConfigError(
                f"{where}: image_size {image_size} is not a multiple of the patch size {PATCH_SIZE}"
            )
        count = (image_size // PATCH_SIZE) ** 2
    elif modality.vocab_size < 1 or count < 1:
        raise ConfigError(
            f"{where} is not resolved in this snapshot: vocabulary {modality.vocab_size}, {count} tokens"
        )
    if kind == "grid" and math.isqrt(count) ** 2 != count:
        raise ConfigError(f"{where}: a grid of {count} tokens is not square")
    if kind == "sequence" and not 1 <= count <= MAX_SEQUENCE:
        raise ConfigError(
            f"{where}: sequences of {count} tokens need more than the {NUM_SENTINELS} sentinels there are"
        )
    vocab_size = 0 if kind == "pixels" else modality.vocab_size
    chunk = METADATA_CHUNK if modality.codec == "metadata" else 1
    return ModalitySpec(modality.name, kind, vocab_size, count, is_input, is_target, chunk)
