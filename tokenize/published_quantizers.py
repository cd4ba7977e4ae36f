"""The two quantizers of the published 4M tokenizers, under the names of their released weights.

Both are `Quantizer`s; shapes as there. `EmaCodebook` differs from `CosineCodebook` in what it returns (the stored
code as it is, of any length, and the loss against the latent as it is) and in its update.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourmill.tokenize.quantizers import Quantizer, nearest_codes


class CodebookState(nn.Module):
    """``embed`` (K, D) codes, ``cluster_size`` (K,) average vectors per batch; ``initted`` is always 1 in a release."""

    embed: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(self, num_codes: int, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.zeros(num_codes, latent_dim))
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("initted", torch.ones(1))


class EmaCodebook(Quantizer):
    """Nearest code by cosine; the code's vector is returned as stored.

    In training mode each code moves towards the direction of its vectors' sum, by ``1 - decay``; one that got none
    moves towards its own direction, so its length tends to 1. With ``norm_latents`` the loss and the straight-through
    path take the normalised latent. A code whose average use has fallen under ``dead_below`` vectors per batch is
    replaced by a normalised latent and starts again at the fair share: with the old count, as the published
    training code leaves it, it would be replaced at every step.
    """

    def __init__(
        self,
        num_codes: int,
        latent_dim: int,
        decay: float = 0.99,
        commitment: float = 1.0,
        norm_latents: bool = False,
        dead_below: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_codes, self.latent_dim = num_codes, latent_dim
        self.decay, self.commitment, self.dead_below = decay, commitment, dead_below
        self.norm_latents = norm_latents
        self._codebook = CodebookState(num_codes, latent_dim)

    def quantize(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, height, width = latents.shape
        given = self.relax(latents).permute(0, 2, 3, 1).flatten(0, 2)
        unit = F.normalize(given.detach(), dim=1)
        ids = nearest_codes(unit, F.normalize(self._codebook.embed, dim=1))
        chosen = self._codebook.embed[ids]
        loss = self.commitment * F.mse_loss(given, chosen)
        if self.training:
            self._update(unit, ids, generator)
        straight = given + (chosen - given).detach() if given.requires_grad else chosen
        quantized = straight.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
        return quantized, ids.view(batch, height, width), loss

    def relax(self, latents: Tensor) -> Tensor:
        return F.normalize(latents.float(), dim=1) if self.norm_latents else latents.float()

    def lookup(self, ids: Tensor) -> Tensor:
        return self._codebook.embed[ids].permute(0, 3, 1, 2)

    @torch.no_grad()
    def _update(self, unit: Tensor, ids: Tensor, generator: torch.Generator | None) -> None:
        state = self._codebook
        counts = torch.bincount(ids, minlength=self.num_codes).to(unit.dtype)
        state.cluster_size.lerp_(counts, 1 - self.decay)
        sums = torch.zeros_like(state.embed).index_add_(0, ids, unit)
        aims = torch.where((counts > 0)[:, None], sums, state.embed)
        state.embed.lerp_(F.normalize(aims, dim=1), 1 - self.decay)
        dead = (state.cluster_size < self.dead_below).nonzero().flatten()
        if len(dead):
            state.embed[dead] = self._fresh(unit, len(dead), generator)
            state.cluster_size[dead] = max(self.dead_below, len(unit) / self.num_codes)

    def _fresh(self, unit: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """(count, D) of the batch's vectors, each once as long as there are enough."""
        draws = [
            torch.randperm(len(unit), generator=generator) for _ in range(count // max(len(unit), 1) + 1)
        ]
        return unit[torch.cat(draws)[:count].to(unit.device)]


class Memcodes(Quantizer):
    """Product quantization by attention: each of ``heads`` parts of a latent takes the value of its best key.

    Ids are (B, heads, h, w). Keys and values are learned projections of the codes; nothing is updated here, and in
    training mode the choice is the same as in evaluation (the published training draws it, by Gumbel softmax).
    """

    def __init__(self, num_codes: int, latent_dim: int, heads: int) -> None:
        super().__init__()
        self.num_codes, self.latent_dim, self.heads = num_codes, latent_dim, heads
        part = latent_dim // heads
        self.codes = nn.Parameter(torch.zeros(heads, num_codes, part))
        self.to_k, self.to_v = HeadProjection(heads, part), HeadProjection(heads, part)

    def quantize(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, height, width = latents.shape
        parts = latents.float().unflatten(1, (self.heads, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)
        keys = self.to_k(self.codes)
        chosen = [nearest_codes(part, key) for part, key in zip(parts, keys, strict=True)]
        ids = torch.stack(chosen).unflatten(1, (batch, height, width)).transpose(0, 1)
        return self.lookup(ids), ids, latents.new_zeros(())

    def relax(self, latents: Tensor) -> Tensor:
        return latents.float()

    def lookup(self, ids: Tensor) -> Tensor:
        values = self.to_v(self.codes)  # (heads, K, part)
        parts = [table[ids[:, head]] for head, table in enumerate(values)]  # each (B, h, w, part)
        return torch.cat(parts, dim=-1).permute(0, 3, 1, 2)


class HeadProjection(nn.Module):
    """(heads, K, d) to (heads, K, d), a matrix per head and no bias."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, dim, dim))

    def forward(self, codes: Tensor) -> Tensor:
        return codes @ self.weight
