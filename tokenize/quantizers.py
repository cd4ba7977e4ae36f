"""Quantizers: continuous latents to discrete codes and back.

Legend of shapes: B images, D latent channels, h x w the token grid, N = B*h*w vectors, K codes.

Two of them, behind one interface: `CosineCodebook` (4M, supplement on tokenizers; EMA updates of VQ-VAE-2)
and `FiniteScalar` (FSQ, arXiv 2309.15505); a third is in memory_codes.py. None ever holds an N x K one-hot matrix: the
nearest code is found in blocks and the averages are summed by index.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourmill.tokenize.peers import ALONE, Peers

_SEARCH_CELLS = 1 << 22  # similarity values held at once: 16 MiB of float32
_GPU_CELLS = 1 << 25  # fewer, larger products: 128 MiB


class Quantizer(nn.Module, ABC):
    """Maps latents (B, D, h, w) to the nearest of ``num_codes`` points."""

    #: whether a decoder can learn from `relax` at first
    relaxes: ClassVar[bool] = True

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

    def ids(self, latents: Tensor) -> Tensor:
        """The ids (B, h, w) of `quantize`, without what only a decoder or a fit needs."""
        return self.quantize(latents)[1]

    @abstractmethod
    def relax(self, latents: Tensor) -> Tensor:
        """The point (B, D, h, w) that `quantize` would round: a decoder can learn from it before there are codes."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) int64 in [0, num_codes) to latents (B, D, h, w); equals what `quantize` returned."""

    def expected(self, probabilities: Tensor, grid: tuple[int, int]) -> Tensor:
        """The mean code (B, D, h, w) under the probabilities (B, h*w, K) of the codes at each place."""
        return (probabilities @ self.table()).transpose(1, 2).unflatten(2, grid)

    def table(self) -> Tensor:
        """(K, D): what each id stands for."""
        ids = torch.arange(self.num_codes, device=self.device).view(1, 1, -1)
        return self.lookup(ids)[0, :, 0].T

    @property
    def device(self) -> torch.device:
        return next(values.device for values in (*self.parameters(), *self.buffers()))

    def fit_state(self) -> dict[str, Tensor]:
        """What a fit has to remember beside the weights that are saved."""
        return {}

    def load_fit_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `fit_state` gave."""


def nearest_codes(vectors: Tensor, codes: Tensor, cells: int | None = None) -> Tensor:
    """Index (N,) int64 of the code with the largest inner product, ties to the lowest index.

    ``vectors`` (N, D), ``codes`` (K, D). At most ``cells`` similarities exist at a time.
    """
    cells = cells or (_GPU_CELLS if vectors.is_cuda else _SEARCH_CELLS)
    rows = max(1, cells // len(codes))
    vectors, codes = vectors.detach(), codes.detach()
    return torch.cat([_largest(block @ codes.T) for block in vectors.split(rows)])


def _largest(similarities: Tensor) -> Tensor:
    """Index of the largest value of each row. On the CPU NumPy finds it four to nine times as fast as PyTorch."""
    if similarities.device.type == "cpu":
        return torch.from_numpy(similarities.numpy().argmax(axis=1))
    return similarities.argmax(dim=1)


class CosineCodebook(Quantizer):
    """A codebook on the unit sphere, updated by exponential moving averages.

    ``latents`` are l2-normalised, the nearest code is the one of largest cosine, and the loss is the
    commitment term ``commitment * |normalised latent - code|^2 / D``. A code whose average use falls under
    ``dead_share`` of the fair share N/K is replaced by a latent of the batch and given the *fair share* as its
    cluster size, so it has log(1/dead_share) / (1 - decay) batches to find vectors of its own.

    Workers that fit together (``peers``) sum what they saw, and each gives its part of the fresh codes: the codebook
    is the same on all of them. On a GPU an update never waits for the device.
    """

    codes: Tensor
    cluster_size: Tensor
    code_sum: Tensor

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
        self.peers: Peers = ALONE
        self.started = False
        self.register_buffer("codes", torch.zeros(num_codes, latent_dim))
        # What only fitting needs is left out of the tokenizer.
        self.register_buffer("cluster_size", torch.zeros(num_codes), persistent=False)
        self.register_buffer("code_sum", torch.zeros(num_codes, latent_dim), persistent=False)

    def quantize(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, dim, height, width = latents.shape
        flat = self.relax(latents).permute(0, 2, 3, 1).reshape(-1, dim)
        if self.training and not self.started:
            self._start(flat.detach(), generator)
        ids = nearest_codes(flat.detach(), self.codes)
        chosen = self.codes[ids]
        loss = self.commitment * F.mse_loss(flat, chosen)
        if self.training:
            self._update(flat.detach(), ids, generator)
        straight = flat + (chosen - flat).detach()
        quantized = straight.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        return quantized, ids.reshape(batch, height, width), loss

    def ids(self, latents: Tensor) -> Tensor:
        flat = self.relax(latents).flatten(2).transpose(1, 2).flatten(0, 1)
        return nearest_codes(flat, self.codes).view(len(latents), *latents.shape[2:])

    def relax(self, latents: Tensor) -> Tensor:
        return F.normalize(latents.float(), dim=1)

    def lookup(self, ids: Tensor) -> Tensor:
        return self.codes[ids].permute(0, 3, 1, 2)

    def fit_state(self) -> dict[str, Tensor]:
        started = torch.tensor(self.started)
        return {"cluster_size": self.cluster_size, "code_sum": self.code_sum, "started": started}

    def load_fit_state(self, state: Mapping[str, Tensor]) -> None:
        self.cluster_size.copy_(state["cluster_size"])
        self.code_sum.copy_(state["code_sum"])
        self.started = bool(state["started"])

    @torch.no_grad()
    def _start(self, flat: Tensor, generator: torch.Generator | None) -> None:
        """Every code begins as a latent of the first batch, with a fair share of its vectors."""
        every = torch.ones(self.num_codes, dtype=torch.bool, device=flat.device)
        self._replace(every, flat, generator)
        self.started = True

    @torch.no_grad()
    def _update(self, flat: Tensor, ids: Tensor, generator: torch.Generator | None) -> None:
        # not bincount: on a GPU it waits for the largest id
        counts = torch.zeros_like(self.cluster_size).index_add_(0, ids, flat.new_ones(()).expand(len(ids)))
        sums = torch.zeros_like(self.code_sum).index_add_(0, ids, flat)
        self.cluster_size.lerp_(self.peers.sum_(counts), 1 - self.decay)
        self.code_sum.lerp_(self.peers.sum_(sums), 1 - self.decay)
        # A unit direction needs no division by the count, and a code unused in this batch stays where it is.
        norms = self.code_sum.norm(dim=1, keepdim=True)
        self.codes.copy_(torch.where(norms > 1e-12, self.code_sum / norms.clamp_min(1e-12), self.codes))
        dead = self.cluster_size < self.dead_share * self._fair(flat)
        if flat.is_cuda or bool(dead.any()):  # a GPU is not asked
            self._replace(dead, flat, generator)

    def _fair(self, flat: Tensor) -> float:
        """Vectors per code in a batch of all workers."""
        return len(flat) * self.peers.world / self.num_codes

    def _replace(self, which: Tensor, flat: Tensor, generator: torch.Generator | None) -> None:
        """Put latents of the batch where ``which`` (bool (K,)) says; some twice where there are fewer of them.

        The n-th replaced code takes one of worker n modulo ``world``.
        """
        rank, world = self.peers.rank, self.peers.world
        draw = torch.randperm(len(flat), generator=generator).to(flat.device, non_blocking=True)
        place = which.cumsum(0) - 1
        fresh = flat[draw[(place.clamp_min(0) // world) % len(flat)]]
        fresh = self.peers.sum_(fresh * (place % world == rank)[:, None])
        fair, column = self._fair(flat), which[:, None]
        self.codes.copy_(torch.where(column, fresh, self.codes))
        self.code_sum.copy_(torch.where(column, fresh * fair, self.code_sum))
        self.cluster_size.masked_fill_(which, fair)


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
