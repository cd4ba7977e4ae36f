"""The codec family "published": the tokenizers that EPFL and Apple released with 4M and 4M-21, read as they are.

A folder with the config.json and model.safetensors of such a repository is one of them; so is what somebody trained
with the published code. Nothing of it is fitted here, and nothing in it executes. What it takes and gives is the
modality's contract: `published_spaces` has the normalisation that each of them was trained with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fourmill.checkpoints import CONFIG, WEIGHTS
from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Codec, Value, register
from fourmill.tokenize.published_network import PublishedNetwork, ReleasedConfig, build, read_released
from fourmill.tokenize.published_releases import LICENSE, check_release, release_for
from fourmill.tokenize.published_spaces import MASK_SIDE, STANDARDISED, RelativeDepth, make_space

MAX_CODES = 1 << 16  # ids are stored as uint16
_DECODED_AT_ONCE = 16  # maps of a diffusion decoder
_shown: set[str] = set()


@register("published")
class PublishedCodec(Codec):
    """Labels of any of the twelve <-> uint16 (n,), row by row from the top left; of Memcodes a token per head.

    ``steps``: DDIM steps of a diffusion decoder. ``license`` is that of the published weights.
    """

    family = "published"
    license = LICENSE

    def __init__(
        self,
        modality: Modality,
        image_size: int,
        network: PublishedNetwork,
        values: dict[str, Any],
        steps: int = 25,
    ) -> None:
        """``values`` is the config.json that ``network`` was built from."""
        self.image_size, self.network, self.values, self.steps = image_size, network, values, steps
        config = network.config
        if config.codebook_size > MAX_CODES:
            raise ConfigError(
                f"its {config.codebook_size} codes are more than {MAX_CODES}: ids are stored as uint16"
            )
        release = release_for(modality)
        self.space = make_space(release, modality, config)
        side = MASK_SIDE if release.kind == "mask" else image_size
        if side % config.patch_size and release.kind != "vector":
            raise ConfigError(f"image_size {side} is no multiple of its patch_size {config.patch_size}")
        self.grid = (1, 1) if release.kind == "vector" else (side // config.patch_size,) * 2
        if isinstance(self.space, RelativeDepth) and modality.contract.units == "metres":
            modality = modality.resolved(contract=replace(modality.contract, units=STANDARDISED))
        self.modality = modality.resolved(
            vocab_size=config.codebook_size, num_tokens=config.heads * self.grid[0] * self.grid[1]
        )

    @property
    def device(self) -> torch.device:
        return self.network.quant_proj.weight.device

    def to(self, device: str | torch.device) -> PublishedCodec:
        self.network.to(device)
        return self

    @torch.inference_mode()
    def encode(self, labels: Sequence[Label]) -> list[Value]:
        """All labels as one batch; on the CPU the same batch gives the same bits."""
        if not len(labels):
            return []
        stacked = self.space.check([np.asarray(label) for label in labels], self._label_shape())
        ids = self.network.tokens(self.space.to_network(stacked).to(self.device))
        return list(ids.flatten(1).cpu().numpy().astype(np.uint16))

    @torch.inference_mode()
    def decode(self, values: Sequence[Value]) -> list[Label]:
        """Maps of a diffusion decoder start from one fixed noise: they depend on their tokens alone."""
        if not len(values):
            return []
        quantized = self.network.quantize.lookup(self._ids(values))
        parts = [self._decoded(part) for part in quantized.split(_DECODED_AT_ONCE)]
        return list(self.space.to_labels(torch.cat(parts).float()))

    def _decoded(self, quantized: Tensor) -> Tensor:
        # Every published decoder clips what it predicts to [-1, 1], which would flatten near and far of standardised
        # depth; it was not trained to stay inside.
        clip = False if isinstance(self.space, RelativeDepth) else None
        return self.network.decode(quantized, self.steps, clip)

    def _label_shape(self) -> tuple[int, ...]:
        return self.space.label_shape(self.image_size, self.grid)

    def _ids(self, values: Sequence[Value]) -> Tensor:
        ids = np.stack([np.asarray(value, dtype=np.int64) for value in values])
        vocabulary, count = self.modality.vocab_size, self.modality.num_tokens
        if ids.shape[1:] != (count,) or ids.min() < 0 or ids.max() >= vocabulary:
            raise ContractError(
                f"tokenizer of {self.modality.name!r}: tokens {ids.shape[1:]} up to {ids.max()} are not {count} ids "
                f"below {vocabulary}"
            )
        heads = (self.network.config.heads,) if self.network.config.quant_type == "memcodes" else ()
        return torch.from_numpy(ids).view(-1, *heads, *self.grid).to(self.device)

    def save(self, folder: Path) -> None:
        """The released form again, so that `load` takes it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.values, indent=1, sort_keys=True) + "\n")
        weights = {name: w.contiguous().cpu() for name, w in self.network.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> PublishedCodec:
        values, weights = read_released(folder)
        try:
            config = ReleasedConfig.from_mapping(values)
            check_release(release_for(modality), modality, config, folder.absolute())
            codec = cls(modality, image_size, build(values, weights), values)
        except ConfigError as error:
            raise CheckpointError(f"published tokenizer {folder}: {error}") from error
        _show_license()
        return codec


def _show_license() -> None:
    """Once per process."""
    if LICENSE not in _shown:
        _shown.add(LICENSE)
        print(
            f"the published 4M tokenizers are under the {LICENSE}: read it before tokens or models made with them are "
            "sold or served",
            file=sys.stderr,
            flush=True,
        )
