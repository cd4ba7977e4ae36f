"""How the labels of a grid modality enter the tokenizer network and leave it again.

A *space* is chosen by the modality's label contract: ``bounded`` maps (images, normals, edges), ``depth``,
``classes`` (semantic segmentation), ``features`` (dense patch features). It knows the network's input and
output, the reconstruction loss, the flip, and the figures by which a round trip is judged. A *vector* is features
without a place: its space lays pieces of it side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fourmill.errors import ConfigError, ContractError
from fourmill.modality import LabelContract, Modality
from fourmill.tokenize.robust import middle, standardise_robustly
from fourmill.tokenize.ssim import ssim

_IMAGE_AXES = (0, 3, 1, 2)
MOST_PIECES = 16  # tokens of a vector; 4M-21 gives its global features as many


class Space(ABC):
    """``channels`` is C of the network's input; its output has ``out_channels``."""

    name: ClassVar[str]
    channels: int
    out_channels: int

    def __init__(self, modality: Modality) -> None:
        self.modality_name = modality.name
        self.contract: LabelContract = modality.contract

    def check(self, labels: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """The labels stacked, or a ContractError if one has another shape."""
        for label in labels:
            if np.shape(label) != shape:
                raise ContractError(
                    f"tokenizer of {self.modality_name!r}: a label has shape {np.shape(label)}, "
                    f"this tokenizer takes {shape}; was it fitted for these labels?"
                )
        stacked = np.stack(labels) if len(labels) else np.zeros((0, *shape), self.contract.dtype)
        if np.issubdtype(stacked.dtype, np.floating) and not np.isfinite(stacked).all():
            raise ContractError(
                f"tokenizer of {self.modality_name!r}: a label has values that are not finite; the labeler is at fault"
            )
        return stacked

    def contract_facts(self) -> dict[str, Any]:
        """What the labels mean to the network: a tokenizer fitted for others is of no use."""
        contract = self.contract
        return {"form": contract.form, "units": contract.units, "unit_norm": contract.unit_norm}

    @abstractmethod
    def label_shape(self, image_size: int, grid: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one label."""

    @abstractmethod
    def to_network(self, labels: np.ndarray) -> Tensor:
        """Stacked labels to float32 (B, C, H, W), or int64 (B, H, W) class ids."""

    @abstractmethod
    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        """The network's output (B, out_channels, H, W) to labels that keep the contract."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Reconstruction loss, a mean over the batch; ``target`` is what `to_network` gave."""

    @abstractmethod
    def figures(self, labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> dict[str, float]:
        """How close the round trip comes, by the measure that people know for this kind of label."""

    def resize(self, batch: Tensor, size: int) -> Tensor:
        """Network input (B, C, H, W), or ids (B, H, W), at another size, by the contract's rule. ConfigError: no map."""
        ids = not batch.is_floating_point()
        values = batch[:, None].float() if ids else batch
        if self.contract.resample == "nearest":
            return F.interpolate(values, size, mode="nearest-exact")[:, 0 if ids else slice(None)].to(
                batch.dtype
            )
        resized = F.interpolate(values, size, mode="bilinear", antialias=True)
        return _unit(resized) if self.contract.unit_norm else resized

    def flip(self, batch: Tensor, chosen: Tensor) -> Tensor:
        """Mirror the rows where ``chosen`` (bool (B,)) by the contract's rule."""
        rule = self.contract.flip
        if rule == "none":
            return batch
        mirrored = batch.flip(-1)
        if rule == "mirror_negate_x":
            mirrored = mirrored * mirrored.new_tensor([-1.0, 1.0, 1.0]).view(1, 3, 1, 1)
        return torch.where(chosen.view(-1, *[1] * (batch.ndim - 1)), mirrored, batch)


class Bounded(Space):
    """Maps with a known range: images (uint8), unit normals, edges. The network sees [-1, 1]."""

    name = "bounded"

    def __init__(self, modality: Modality) -> None:
        super().__init__(modality)
        contract = modality.contract
        if contract.low is None or contract.high is None:
            raise ConfigError(
                f"modality {modality.name!r}: a map of several channels needs `low` and `high` in its "
                "contract to be tokenized"
            )
        # Contracts of unit vectors leave a little room for rounding; the vectors themselves need none.
        self.low, self.high = (
            (-1.0, 1.0) if contract.unit_norm else (float(contract.low), float(contract.high))
        )
        self.channels = self.out_channels = contract.channels or 1

    def contract_facts(self) -> dict[str, Any]:
        return {**super().contract_facts(), "low": self.low, "high": self.high}

    def label_shape(self, image_size: int, grid: tuple[int, int]) -> tuple[int, ...]:
        axis = () if self.contract.channels is None else (self.channels,)
        return (image_size, image_size, *axis)

    def to_network(self, labels: np.ndarray) -> Tensor:
        values = torch.from_numpy(labels if labels.ndim == 4 else labels[..., None]).permute(_IMAGE_AXES)
        scaled = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        shifted = scaled.sub_(self.low) if self.low else scaled
        return shifted.mul_(2 / (self.high - self.low)).sub_(1)

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        if self.contract.unit_norm:
            output = _unit(output)
        values = (output.clamp(-1, 1) + 1) * ((self.high - self.low) / 2) + self.low
        array = values.permute(0, 2, 3, 1).cpu().numpy()
        if np.issubdtype(np.dtype(self.contract.dtype), np.integer):
            array = np.rint(array)
        array = array if self.contract.channels is not None else array[..., 0]
        return list(array.astype(self.contract.dtype))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        error = F.mse_loss(output, target)
        if self.contract.unit_norm:
            error = error + (1 - F.cosine_similarity(output, target, dim=1)).mean()
        return error

    def figures(self, labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> dict[str, float]:
        if self.contract.unit_norm:
            cosine = [np.clip((a * b).sum(-1), -1, 1) for a, b in zip(labels, decoded, strict=True)]
            angles = np.degrees(np.arccos(np.stack(cosine)))
            return {
                "mean_degrees": float(angles.mean()),
                "median_degrees": float(np.median(angles)),
                "within_11.25_degrees": float((angles < 11.25).mean()),
            }
        squares = [((a.astype(np.float64) - b) ** 2).mean() for a, b in zip(labels, decoded, strict=True)]
        span = self.high - self.low
        psnr = [10 * math.log10(span**2 / max(square, 1e-12)) for square in squares]
        likeness = [ssim(a, b, span) for a, b in zip(labels, decoded, strict=True)]
        return {"psnr_db": float(np.mean(psnr)), "ssim": float(np.mean(likeness))}


class Depth(Space):
    """Depth maps (H, W) float32.

    ``log``: metric depth; log(metres) mapped affinely from ``depth_range`` to [-1, 1]; decoding gives metres
    within that range. ``robust``: relative depth; each map is standardised by the mean and deviation of its
    middle 80 % (4M's rule), and decoding gives standardised values.
    """

    name = "depth"

    def __init__(self, modality: Modality, normalisation: str, depth_range: tuple[float, float]) -> None:
        super().__init__(modality)
        self.normalisation = normalisation
        self.low, self.high = math.log(depth_range[0]), math.log(depth_range[1])
        self.channels = self.out_channels = 1

    def label_shape(self, image_size: int, grid: tuple[int, int]) -> tuple[int, ...]:
        return (image_size, image_size)

    def to_network(self, labels: np.ndarray) -> Tensor:
        depth = labels.astype(np.float32)
        if self.normalisation == "log":
            logs = np.clip(np.log(np.maximum(depth, 1e-6)), self.low, self.high)
            scaled = (logs - self.low) * (2 / (self.high - self.low)) - 1
        else:
            scaled = standardise_robustly(depth)
        return torch.from_numpy(scaled.astype(np.float32))[:, None]

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        values = output[:, 0]
        if self.normalisation == "log":
            values = ((values.clamp(-1, 1) + 1) * ((self.high - self.low) / 2) + self.low).exp()
        return list(values.float().cpu().numpy())

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        # Nearly an absolute error: a depth edge that is a pixel off must not outweigh everything else.
        return F.smooth_l1_loss(output, target, beta=0.05)

    def figures(self, labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> dict[str, float]:
        truth, made = np.stack(labels).astype(np.float64), np.stack(decoded).astype(np.float64)
        figures = {}
        if self.normalisation == "robust":
            mean, deviation = middle(truth)
            figures["mean_absolute_error"] = float(np.abs((truth - mean) / deviation - made).mean())
            made = made * deviation + mean  # each map on its own label's scale
        positive = truth > 1e-6
        truth, made = truth[positive], np.maximum(made[positive], 1e-6)
        if not len(truth):
            return figures
        ratio = np.maximum(made / truth, truth / made)
        return {
            "abs_rel": float((np.abs(made - truth) / truth).mean()),
            "delta1": float((ratio < 1.25).mean()),
            **figures,
        }


class Classes(Space):
    """Class-id maps (H, W). The network embeds every pixel's class and gives logits per pixel."""

    name = "classes"

    def __init__(self, modality: Modality, class_dim: int) -> None:
        super().__init__(modality)
        self.num_classes = len(modality.contract.classes)
        if self.num_classes < 1:
            raise ConfigError(f"modality {modality.name!r}: its class names are not known; resolve it first")
        self.channels, self.out_channels = class_dim, self.num_classes

    def label_shape(self, image_size: int, grid: tuple[int, int]) -> tuple[int, ...]:
        return (image_size, image_size)

    def to_network(self, labels: np.ndarray) -> Tensor:
        if labels.size and int(labels.max()) >= self.num_classes:
            raise ContractError(
                f"tokenizer of {self.modality_name!r}: a label holds class {int(labels.max())}, "
                f"there are {self.num_classes}"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        return list(output.argmax(1).cpu().numpy().astype(self.contract.dtype))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def figures(self, labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> dict[str, float]:
        n = self.num_classes
        pairs = np.stack(labels).astype(np.int64).ravel() * n + np.stack(decoded).astype(np.int64).ravel()
        table = np.bincount(pairs, minlength=n * n).reshape(n, n)
        union = table.sum(0) + table.sum(1) - np.diag(table)
        seen = union > 0
        return {
            "miou": float((np.diag(table)[seen] / union[seen]).mean()),
            "pixel_accuracy": float(np.diag(table).sum() / table.sum()),
        }


class Features(Space):
    """Dense features (h, w, C) float32. Standardisation by channel is part of the network (fitted, stored)."""

    name = "features"

    def __init__(self, modality: Modality, channels: int) -> None:
        super().__init__(modality)
        self.channels = self.out_channels = channels

    @property
    def label_channels(self) -> int:
        """C of a label."""
        return self.channels

    def resize(self, batch: Tensor, size: int) -> Tensor:
        raise ConfigError(
            f"modality {self.modality_name!r}: `sizes` are for maps; of features the labels set the grid"
        )

    def label_shape(self, image_size: int, grid: tuple[int, int]) -> tuple[int, ...]:
        return (*grid, self.channels)

    def to_network(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(labels.transpose(_IMAGE_AXES), dtype=np.float32))

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        if self.contract.unit_norm:
            output = _unit(output)
        return list(output.permute(0, 2, 3, 1).float().cpu().numpy().astype(self.contract.dtype))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        scale = target.std().clamp_min(1e-6)
        near = F.smooth_l1_loss(output / scale, target / scale)
        return near + (1 - F.cosine_similarity(output, target, dim=1)).mean()

    def figures(self, labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> dict[str, float]:
        a, b = np.stack(labels).astype(np.float64), np.stack(decoded).astype(np.float64)
        # features of one network share much of their direction: away with it
        mean = a.mean(tuple(range(a.ndim - 1)))
        return {"cosine": _cosine(a, b), "centred_cosine": _cosine(a - mean, b - mean)}


class Vector(Features):
    """One vector (C,) float32 per crop, as up to `MOST_PIECES` tokens.

    The vector is cut into equal pieces, the last filled up with zeros, that stand in a grid of one row: the network
    (B, C / pieces, 1, pieces) mixes them before it quantizes each. ``is_whole``: one piece, for a network that makes
    several tokens of it (memory_codes.py).
    """

    name = "vector"

    def __init__(self, modality: Modality, length: int, is_whole: bool = False) -> None:
        width = length if is_whole else -(-length // MOST_PIECES)
        self.length, self.pieces, self.is_whole = length, -(-length // width), is_whole
        super().__init__(modality, width)

    def contract_facts(self) -> dict[str, Any]:
        return {**super().contract_facts(), "low": self.contract.low, "high": self.contract.high}

    @property
    def label_channels(self) -> int:
        return self.length

    def label_shape(self, image_size: int, grid: tuple[int, int]) -> tuple[int, ...]:
        return (self.length,)

    def to_network(self, labels: np.ndarray) -> Tensor:
        filled = np.zeros((len(labels), self.pieces * self.channels), np.float32)
        filled[:, : self.length] = labels
        return torch.from_numpy(filled).unflatten(1, (self.pieces, self.channels)).transpose(1, 2)[:, :, None]

    def to_labels(self, output: Tensor) -> list[np.ndarray]:
        values = self._flat(output)
        if self.contract.unit_norm:
            values = _unit(values)
        values = values.clamp(self.contract.low, self.contract.high) if self._is_bounded else values
        return list(values.float().cpu().numpy().astype(self.contract.dtype))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        scale = target.std().clamp_min(1e-6)
        near = F.smooth_l1_loss(output / scale, target / scale)
        return near + (1 - F.cosine_similarity(self._flat(output), self._flat(target), dim=1)).mean()

    def flip(self, batch: Tensor, chosen: Tensor) -> Tensor:
        return batch

    @property
    def _is_bounded(self) -> bool:
        return self.contract.low is not None or self.contract.high is not None

    def _flat(self, values: Tensor) -> Tensor:
        """(B, C / pieces, 1, pieces) to (B, C)."""
        return values[:, :, 0].transpose(1, 2).flatten(1)[:, : self.length]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(norms, 1e-12)).mean())


def space_name(contract: LabelContract) -> str:
    """Which space a contract asks for."""
    if contract.form == "features":
        return Features.name
    if contract.form == "vector":
        return Vector.name
    if contract.form not in ("map", "image"):
        raise ConfigError(f"labels of form {contract.form!r} are not grids; the vqvae codec cannot take them")
    if contract.classes or contract.units == "class id":
        return Classes.name
    if contract.channels is None and (
        contract.units == "metres" or contract.low is None or contract.high is None
    ):
        return Depth.name
    return Bounded.name


def _unit(values: Tensor) -> Tensor:
    """Vectors (B, C, H, W) of length one; a vector of length nought becomes the last axis (toward the viewer)."""
    fallback = torch.zeros_like(values)
    fallback[:, -1] = 1
    norms = values.norm(dim=1, keepdim=True)
    return torch.where(norms > 1e-6, values / norms.clamp_min(1e-6), fallback)
