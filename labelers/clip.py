"""CLIP's dense patch features: what 4M tokenizes as the modality "clip"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from fourmill.errors import CheckpointError, ConfigError
from fourmill.labelers.base import LabelBatch, register
from fourmill.labelers.card import Card, Weights
from fourmill.labelers.letterbox import Placement
from fourmill.labelers.network import NetworkLabeler
from fourmill.labels import Label
from fourmill.modality import LabelContract, Modality

CLIP = Modality(
    name="clip",
    kind="grid",
    codec="vqvae",
    reference_name="tok_clip@{size}",
    doc="features of a CLIP image encoder on its patch grid",
    contract=LabelContract(
        form="features",
        dtype="float32",
        channels=0,
        units="feature",
        frame="patch grid of the crop, rows from the top; a flip is already in the crop",
        flip="none",
    ),
)

_RADFORD = "Radford et al., Learning Transferable Visual Models, ICML 2021, arXiv:2103.00020"

CARD = Card(
    expects="the dataset's crops in RGB: letterboxed onto the square of the checkpoint's preprocessor (or `input_size`), "
    "normalised as its preprocessor_config.json says",
    default=Weights(
        model="openai/clip-vit-large-patch14",
        revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
        license="MIT",
        note="16 x 16 features of 768 channels at 224 px. Its page names no licence: this is that of openai/CLIP",
        citation=_RADFORD,
    ),
    paper=Weights(
        model="openai/clip-vit-base-patch16",
        revision="57c216476eefef5ab752ec549e440a49ae4ae5f3",
        license="MIT",
        loads=False,
        note="14 x 14 features of 512 channels at 224 px. This commit has no safetensors, and nothing else is read: "
        "saved again by transformers it loads from a folder. Its page names no licence: this is that of openai/CLIP",
        citation=_RADFORD,
    ),
)


@register("clip")
class Clip(NetworkLabeler):
    """float32 (h, w, C) per crop: the last layer's patch tokens after post_layernorm and visual_projection.

    The class token is dropped (4M-21, appendix D.1). The projection was trained on the class token alone, yet
    projected patches lie in the space of CLIP's text embeddings closely enough to be a useful target.
    """

    modality: ClassVar[Modality] = CLIP
    card: ClassVar[Card | None] = CARD
    sees: ClassVar[str] = "crops"
    inputs: ClassVar[tuple[str, ...]] = ("crops",)
    default_model: ClassVar[str | None] = "shipped:clip"
    expected: ClassVar[str] = "a CLIP image encoder with its projection"
    auto_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "CLIPVisionModelWithProjection": ("clip", "clip_vision_model")
    }

    def describe(self) -> Modality:
        config = self.config()
        part = config.get("vision_config") or config
        channels = part.get("projection_dim", config.get("projection_dim"))
        if not channels:
            raise CheckpointError(
                f"{self.where}.model: config.json of {self.weights.source} gives no projection_dim"
            )
        return replace(CLIP, contract=replace(CLIP.contract, channels=int(channels)))

    def label(self, batch: LabelBatch) -> list[Label]:
        import torch

        if batch.crops is None:
            raise ConfigError(f"{self.where}: the clip labeler sees crops, and this batch has none")
        crops = batch.crops.reshape(-1, *batch.crops.shape[2:])
        with torch.inference_mode():
            canvas, placements = self.canvas(list(crops))
            return self.read(self.run(canvas, interpolate_pos_encoding=self._resized), placements)

    @property
    def _resized(self) -> bool:
        return bool(self.side != self.network.config.image_size)

    def read(self, output: Any, placements: Sequence[Placement]) -> list[Label]:
        network = self.network
        patches = output.last_hidden_state[:, 1:].float()  # (B, h * w, hidden), without the class token
        features = network.visual_projection(network.vision_model.post_layernorm(patches))
        grid = self.side // network.config.patch_size
        maps: np.ndarray = features.float().unflatten(1, (grid, grid)).cpu().numpy()
        return list(maps)
