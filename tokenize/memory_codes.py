"""Memory codes (4M-21's tokenizers of global features): a vector as one token per head, between two MLPs.

The quantizer and the MLPs compute what the published ones do (published_quantizers.py, published_vit.py) under the same
names of weights; here they can be fitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fourmill.tokenize.published_quantizers import Memcodes
from fourmill.tokenize.published_vit import Bottleneck
from fourmill.tokenize.vqvae_network import TokenizerNetwork

if TYPE_CHECKING:
    from fourmill.tokenize.spaces import Vector
    from fourmill.tokenize.vqvae_network import VQConfig


class MemoryCodes(Memcodes):
    """Each of ``heads`` parts of a latent takes the value of its best key.

    In training mode the choice is drawn: hard Gumbel softmax at temperature 1 over the products of the part with all keys,
    divided by the root of the part's length. Keys, values and codes learn from the reconstruction alone.
    """

    relaxes: ClassVar[bool] = False

    def __init__(self, num_codes: int, latent_dim: int, heads: int) -> None:
        super().__init__(num_codes, latent_dim, heads)
        part = latent_dim // heads
        nn.init.normal_(self.codes)
        for projection in (self.to_k, self.to_v):
            nn.init.normal_(projection.weight, std=part**-0.5)

    def quantize(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return super().quantize(latents, generator)
        batch, _, height, width = latents.shape
        parts = latents.float().unflatten(1, (self.heads, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)
        keys, values = self.to_k(self.codes), self.to_v(self.codes)
        scores = parts @ keys.transpose(1, 2) * parts.shape[-1] ** -0.5  # (heads, N, K)
        soft = (scores + _gumbel(scores, generator)).softmax(-1)
        ids = soft.detach().argmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, ids[..., None], 1.0)
        chosen = (hard + soft - soft.detach()) @ values  # (heads, N, part)
        shaped = chosen.unflatten(1, (batch, height, width)).permute(1, 0, 4, 2, 3).flatten(1, 2)
        return shaped, ids.unflatten(1, (batch, height, width)).transpose(0, 1), latents.new_zeros(())

    def expected(self, probabilities: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, heads, K) to (B, D, 1, 1)."""
        values = self.to_v(self.codes)
        return torch.einsum("bhk,hkd->bhd", probabilities, values).flatten(1)[:, :, None, None]

    def table(self) -> Tensor:
        """(K, D): an id's values in all heads, side by side."""
        return self.to_v(self.codes).transpose(0, 1).flatten(1)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise of the shape and device of ``like``; the CPU's generator seeds that of a GPU, which draws faster."""
    if like.device.type != "cpu":
        seed = int(torch.randint(1 << 62, (), generator=generator))
        generator = torch.Generator(like.device).manual_seed(seed)
    exponential = torch.empty_like(like).exponential_(generator=generator)
    return -exponential.clamp_min(1e-20).log()


class VectorNetwork(TokenizerNetwork):
    """Vectors (B, C, 1, 1): standardised, an MLP, memory codes, an MLP. ``config.dim`` is the width of both."""

    def __init__(self, config: VQConfig, space: Vector) -> None:
        super().__init__()
        channels, width, heads = space.channels, config.dim, config.memory_heads
        self.tokens = (heads, 1, 1)
        self.register_buffer("shift", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.encoder = Bottleneck(channels, width, width, config.encoder_depth)
        self.quant_proj = nn.Conv2d(width, config.latent_dim, 1)
        self.quantizer = MemoryCodes(config.codebook_size, config.latent_dim, heads)
        self.post_quant_proj = nn.Conv2d(config.latent_dim, width, 1)
        self.decoder = Bottleneck(width, channels, width, config.decoder_depth)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_proj(self.encoder((x - self.shift) / self.scale))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_proj(latents)) * self.scale + self.shift
