"""How labels enter the published tokenizers and leave them again: the contract's labels <-> what they were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fourmill.errors import ConfigError
from fourmill.modality import Modality
from fourmill.tokenize.published_network import IMAGENET_MEAN, IMAGENET_STD, ReleasedConfig
from fourmill.tokenize.published_releases import COCO_PANOPTIC, Release, plain_class
from fourmill.tokenize.spaces import Bounded, Classes, Depth, Features, Space

#: Our normals have y up. Omnidata's, which the tokenizer was trained on, are stored as 2D-3D-S stores them: x right,
#: y down, z toward the viewer.
NORMAL_SIGNS = (1.0, -1.0, 1.0)
#: units of decoded depth, where the labels were metres
STANDARDISED = "relative: standardised by the map's middle 80 %"
MASK_SIDE = 64
NONE_CLASS = 255  # an id that says "no class"; class 0 of the published tokenizer


class Picture(Bounded):
    """Pixels, edges and normals in [-1, 1]. A grey map goes to all channels, and their mean comes back."""

    def __init__(
        self, modality: Modality, config: ReleasedConfig, signs: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> None:
        super().__init__(modality)
        if self.channels not in (1, config.n_channels):
            raise ConfigError(
                f"it takes {config.n_channels} channels, the labels of {modality.name!r} have {self.channels}"
            )
        self.taken, self.undo_std = config.n_channels, config.undo_std
        self.signs = torch.tensor(list(signs)[: self.taken]).view(1, -1, 1, 1)

    def to_network(self, labels: np.ndarray) -> Tensor:
        values = super().to_network(labels).expand(-1, self.taken, -1, -1) * self.signs
        if not self.undo_std:
            return values
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return ((values + 1) / 2 - mean) / std  # the network makes [-1, 1] of it again

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        output = output * self.signs.to(output.device)
        return super().to_labels(output if self.channels == self.taken else output.mean(1, keepdim=True))


class RelativeDepth(Depth):
    """Depth standardised by the mean and deviation of its middle 80 %: the tokens know neither scale nor shift.

    Decoded are standardised values. Where the contract has a smallest depth, each map is shifted so that its nearest
    surface lies at 1, as that of relative depth does, or at the smallest depth if that is more.
    """

    def __init__(self, modality: Modality) -> None:
        super().__init__(modality, "robust", (0.1, 200.0))

    def to_network(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(standardise(labels))[:, None]

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        maps, low, high = output[:, 0].float(), self.contract.low, self.contract.high
        if low is not None:
            maps = maps - maps.amin((1, 2), keepdim=True) + max(low, 1.0)
        if high is not None:
            maps = maps.clamp_max(high)
        return list(maps.cpu().numpy().astype(self.contract.dtype))


def standardise(maps: np.ndarray) -> np.ndarray:
    """(B, H, W) as the published tokenizer's training did it: mean, unbiased variance + 1e-6 of the middle 80 %.

    Maps are scaled to at most 1 first, which is what they were there: 1e-6 matters to flat ones alone.
    """
    values = maps.astype(np.float64)
    values /= np.maximum(np.abs(values).max((1, 2), keepdims=True), 1e-12)
    ordered = np.sort(values.reshape(len(values), -1), axis=1)
    count = ordered.shape[1]
    middle = ordered[:, int(0.1 * count) : max(int(0.9 * count), 1)]
    spread = np.sqrt(middle.var(1, ddof=min(1, middle.shape[1] - 1)) + 1e-6)
    return ((values - middle.mean(1)[:, None, None]) / spread[:, None, None]).astype(np.float32)


class NumberedClasses(Classes):
    """Class ids one higher than ours, behind "none": 255 goes in as 0. What comes back is always one of our classes."""

    def __init__(self, modality: Modality, config: ReleasedConfig) -> None:
        super().__init__(modality, config.n_channels)
        labels = config.n_labels or 0
        if self.num_classes != labels - 1:
            raise ConfigError(f"it knows {labels - 1} classes, {modality.name!r} here has {self.num_classes}")
        self.out_channels = labels
        if self.num_classes == len(COCO_PANOPTIC):
            for index, (ours, theirs) in enumerate(
                zip(modality.contract.classes, COCO_PANOPTIC, strict=True)
            ):
                if plain_class(ours) != plain_class(theirs):
                    raise ConfigError(
                        f"its classes are COCO's panoptic ones, with {theirs!r} at {index}; {modality.name!r} here "
                        f"has {ours!r} there"
                    )

    def to_network(self, labels: np.ndarray) -> Tensor:
        ids = labels.astype(np.int64)
        shifted = super().to_network(np.where(ids == NONE_CLASS, 0, ids)) + 1
        return torch.where(torch.from_numpy(ids == NONE_CLASS), 0, shifted)

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        return super().to_labels(output[:, 1:])


class Vector(Space):
    """One vector (C,) per image: a global feature, a body's pose."""

    name = "vector"

    def __init__(self, modality: Modality, channels: int) -> None:
        super().__init__(modality)
        self.channels = self.out_channels = channels

    def label_shape(self, image_size: int, grid: tuple[int, int]) -> tuple[int, ...]:
        return (self.channels,)

    def to_network(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels.astype(np.float32))[:, :, None, None]

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        vectors = output[:, :, 0, 0].float()
        vectors = F.normalize(vectors, dim=1) if self.contract.unit_norm else vectors
        return list(vectors.cpu().numpy().astype(self.contract.dtype))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(output, target, dim=1)).mean()

    def figures(self, labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> dict[str, float]:
        truth, made = (torch.from_numpy(np.stack(values).astype(np.float64)) for values in (labels, decoded))
        return {"cosine": float(F.cosine_similarity(truth, made, dim=1).mean())}


class Mask(Space):
    """The mask of one instance in its box, (64, 64) of 0 and 1, whatever the image's size."""

    name = "mask"
    channels = out_channels = 1

    def label_shape(self, image_size: int, grid: tuple[int, int]) -> tuple[int, ...]:
        return (MASK_SIDE, MASK_SIDE)

    def to_network(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy((labels > 0).astype(np.float32))[:, None]

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        return list((output[:, 0] > 0).cpu().numpy().astype(self.contract.dtype))  # logits

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target)

    def figures(self, labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> dict[str, float]:
        truth, made = np.stack(labels) > 0, np.stack(decoded) > 0
        return {"iou": float((truth & made).sum() / max(int((truth | made).sum()), 1))}


def make_space(release: Release, modality: Modality, config: ReleasedConfig) -> Space:
    """Raises ConfigError where the contract's labels are not of the kind that the tokenizer takes."""
    form = {"features": "features", "vector": "vector"}.get(release.kind, "map")
    if modality.contract.form != form and not (form == "map" and modality.contract.form == "image"):
        raise ConfigError(
            f"it takes labels of the form {form!r}, those of {modality.name!r} are {modality.contract.form!r}"
        )
    if release.kind == "depth":
        return RelativeDepth(modality)
    if release.kind == "classes":
        return NumberedClasses(modality, config)
    if release.kind == "mask":
        return Mask(modality)
    if release.kind in ("picture", "normal"):
        signs = NORMAL_SIGNS if release.kind == "normal" else (1.0, 1.0, 1.0)
        return Picture(modality, config, signs)
    if modality.contract.channels not in (None, 0, config.n_channels):
        raise ConfigError(
            f"it takes {config.n_channels} channels, the labels of {modality.name!r} have {modality.contract.channels}"
        )
    return (Vector if release.kind == "vector" else Features)(modality, config.n_channels)
