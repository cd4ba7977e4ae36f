"""Quantizers: continuous latents to discrete codes and back.

Legend of shapes: B images, D latent channels, h x w the token grid, N = B*h*w vectors, K codes.

Two of them, behind one interface: `CosineCodebook` (4M, supplement on tokenizers; EMA updates of VQ-VAE-2)
and `FiniteScalar` (FSQ, arXiv 2309.15505). Neither ever holds an N x K one-hot matrix: the nearest code is
found in blocks and the averages are summed by index.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SEARCH_CELLS = 1 << 22  # similarity values held at once: 16 MiB of float32


class Quantizer(nn.Module, ABC):
    """Maps latents (B, D, h, w) to the nearest of ``num_codes`` points."""

    num_codes: int
    latent_dim: int

    @abstractmethod
    def quantize(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(quantized (B, D, h, w), ids (B, h, w) int64, loss ()).

        The gradient of ``quantized`` passes straight through to ``latents``. In training mode a codebook
        also updates itself; ``generator`` (on the CPU) draws whatever it has to draw.
        """

    @abstractmethod
    def relax(self, latents: Tensor) -> Tensor:
        """The point (B, D, h, w) that `quantize` would round: a decoder can learn from it before there are codes."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) int64 in [0, num_codes) to latents (B, D, h, w); equals what `quantize` returned."""


def nearest_codes(vectors: Tensor, codes: Tensor, cells: int = _SEARCH_CELLS) -> Tensor:
    """Index (N,) int64 of the code with the largest inner product, ties to the lowest index.

    ``vectors`` (N, D), ``codes`` (K, D). At most ``cells`` similarities exist at a time.
    """
    rows = max(1, cells // len(codes))
    return torch.cat([(block @ codes.T).argmax(dim=1) for block in vectors.split(rows)])


class CosineCodebook(Quantizer):
    """A codebook on the unit sphere, updated by exponential moving averages.

    ``latents`` are l2-normalised, the nearest code is the one of largest cosine, and the loss is the
    commitment term ``commitment * |normalised latent - code|^2 / D``. A code whose average use falls under
    ``dead_share`` of the fair share N/K is replaced by a latent of the batch and given the *fair share* as its
    cluster size, so it has log(1/dead_share) / (1 - decay) batches to find vectors of its own.
    """

    codes: Tensor
    cluster_size: Tensor
    code_sum: Tensor
    is_started: Tensor

    def __init__(
        self,
        num_codes: int,
        latent_dim: int,
        decay: float = 0.99,
        commitment: float = 1.0,
        dead_share: float = 1 / 32,
    ) -> None:
        super().__init__()
        self.num_codes, self.latent_dim = num_codes, latent_dim
        self.decay, self.commitment, self.dead_share = decay, commitment, dead_share
        self.register_buffer("codes", torch.zeros(num_codes, latent_dim))
        # What only fitting needs is left out of the checkpoint.
        self.register_buffer("cluster_size", torch.zeros(num_codes), persistent=False)
        self.register_buffer("code_sum", torch.zeros(num_codes, latent_dim), persistent=False)
        self.register_buffer("is_started", torch.zeros((), dtype=torch.bool), persistent=False)

    def quantize(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, dim, height, width = latents.shape
        flat = self.relax(latents).permute(0, 2, 3, 1).reshape(-1, dim)
        if self.training and not self.is_started:
            self._start(flat.detach(), generator)
        ids = nearest_codes(flat.detach(), self.codes)
        chosen = self.codes[ids]
        loss = self.commitment * F.mse_loss(flat, chosen)
        if self.training:
            self._update(flat.detach(), ids, generator)
        straight = flat + (chosen - flat).detach()
        quantized = straight.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        return quantized, ids.reshape(batch, height, width), loss

    def relax(self, latents: Tensor) -> Tensor:
        return F.normalize(latents.float(), dim=1)

    def lookup(self, ids: Tensor) -> Tensor:
        return self.codes[ids].permute(0, 3, 1, 2)

    @torch.no_grad()
    def _start(self, flat: Tensor, generator: torch.Generator | None) -> None:
        """Every code begins as a latent of the first batch, with a fair share of its vectors."""
        self._replace(torch.arange(self.num_codes, device=flat.device), flat, generator)
        self.is_started.fill_(True)

    @torch.no_grad()
    def _update(self, flat: Tensor, ids: Tensor, generator: torch.Generator | None) -> None:
        counts = torch.bincount(ids, minlength=self.num_codes).to(flat.dtype)
        sums = torch.zeros_like(self.code_sum).index_add_(0, ids, flat)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.code_sum.lerp_(sums, 1 - self.decay)
        # A unit direction needs no division by the count, and a code unused in this batch stays where it is.
        norms = self.code_sum.norm(dim=1, keepdim=True)
        self.codes.copy_(torch.where(norms > 1e-12, self.code_sum / norms.clamp_min(1e-12), self.codes))
        dead = (self.cluster_size < self.dead_share * len(flat) / self.num_codes).nonzero().flatten()
        if len(dead):
            self._replace(dead, flat, generator)

    def _replace(self, which: Tensor, flat: Tensor, generator: torch.Generator | None) -> None:
        draw = torch.randperm(len(flat), generator=generator)[: len(which)]
        if len(draw) < len(which):  # fewer latents than codes to fill: some are taken twice
            more = torch.randint(len(flat), (len(which) - len(draw),), generator=generator)
            draw = torch.cat([draw, more])
        fresh = flat[draw.to(flat.device)]
        fair = len(flat) / self.num_codes
        self.codes[which] = fresh
        self.cluster_size[which] = fair
        self.code_sum[which] = fresh * fair


class FiniteScalar(Quantizer):
    """FSQ: every latent channel is bounded and rounded to one of a few levels; the code is their combination.

    ``levels`` (8, 5, 5, 5) gives 1,000 codes and D = 4. No codebook, no loss, nothing can die (arXiv 2309.15505, section 3).
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ levels are {tuple(levels)}; each must be at least 2")
        self.num_codes, self.latent_dim = math.prod(levels), len(levels)
        sizes = torch.tensor(list(levels), dtype=torch.int64)
        strides = torch.cat([torch.ones(1, dtype=torch.int64), sizes.cumprod(0)[:-1]])
        self.register_buffer("levels", sizes, persistent=False)
        self.register_buffer("strides", strides, persistent=False)

    def quantize(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        bounded = self._bound(latents.permute(0, 2, 3, 1))  # (B, h, w, D), each about [0, levels - 1]
        digits = bounded.round().clamp(torch.zeros_like(self.levels), self.levels - 1)
        ids = (digits.detach().long() * self.strides).sum(-1)
        straight = bounded + (digits - bounded).detach()
        return self._scale(straight).permute(0, 3, 1, 2), ids, latents.new_zeros(())

    def relax(self, latents: Tensor) -> Tensor:
        return self._scale(self._bound(latents.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def lookup(self, ids: Tensor) -> Tensor:
        digits = ids.unsqueeze(-1) // self.strides % self.levels
        return self._scale(digits.float()).permute(0, 3, 1, 2)

    def _bound(self, values: Tensor) -> Tensor:
        # 0.49 rather than 0.5 keeps the rounding of a saturated channel inside the outermost level.
        half = (self.levels - 1) / 2
        return half + torch.tanh(values.float()) * (half + 0.49)

    def _scale(self, digits: Tensor) -> Tensor:
        """Levels 0 .. L-1 to [-1, 1]."""
        return digits * (2 / (self.levels - 1)) - 1


def make_quantizer(kind: str, num_codes: int, latent_dim: int, levels: Sequence[int] = ()) -> Quantizer:
    """``cosine`` (codebook of ``num_codes`` x ``latent_dim``) or ``fsq`` (``levels`` say everything)."""
    if kind == "cosine":
        return CosineCodebook(num_codes, latent_dim)
    if kind == "fsq":
        return FiniteScalar(levels)
    raise ValueError(f"unknown quantizer {kind!r}; known: cosine, fsq")
