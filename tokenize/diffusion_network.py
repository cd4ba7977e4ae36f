"""A tokenizer network whose decoder is a diffusion model (4M's DiVAE): the encoder and codes of `VQNetwork`, and a U-Net.

The U-Net (unet.py) sees an image with noise in it, the step, and the codes of the image spread over its pixels, and says what
the image is without the noise. It is fitted on steps drawn uniformly out of 1,000 (arXiv 2006.11239: linear betas of 1e-4 to
0.02; arXiv 2305.08891: stretched until the last step holds no signal). Decoding begins at one fixed noise and takes a few DDIM
steps.

Legend of shapes: B images, C channels, D latent channels, h x w the token grid, S image side.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourmill.errors import ConfigError
from fourmill.tokenize.diffusion import Schedule, ddim, fixed_noise, trailing_steps
from fourmill.tokenize.spaces import Bounded, Depth, Space
from fourmill.tokenize.unet import GridAttention, PatchedUNet, ResBlock
from fourmill.tokenize.vqvae_network import VQConfig, VQNetwork

_DECODED_AT_ONCE = 16
_UNET = "unet."


class DiffusionNetwork(VQNetwork):
    """Maps in [-1, 1], or standardised. Classes have no noise between them: their decoder is a ViT.

    ``frozen``: the encoder and its codes are another tokenizer's, and stay so to the last bit.
    """

    def __init__(
        self, config: VQConfig, space: Space, grid: tuple[int, int], base: tuple[int, int] | None = None
    ) -> None:
        if type(space) not in (Bounded, Depth):
            raise ConfigError(
                f"modalities.{space.modality_name}.tokenizer.decoder: 'diffusion' is for images, normals, edges and "
                f"depth; labels of the kind {space.name!r} take 'vit'"
            )
        super().__init__(config, space, grid, base)
        self.frozen = False
        self.schedule = Schedule.named("linear", zero_terminal_snr=True)
        self.along = trailing_steps(config.ddim_steps)
        # Standardised depth has no bounds: clipping would flatten near and far.
        self.clip = not (isinstance(space, Depth) and space.normalisation == "robust")
        self.is_smooth = space.contract.channels is None  # 4M's loss of depth and edges

    def _make_decoder(self, config: VQConfig, space: Space) -> None:
        self.unet = PatchedUNet(config.unet, space.channels, self.quantizer.latent_dim)
        _start_at_nothing(self.unet)

    @property
    def relaxes(self) -> bool:
        return not self.frozen and super().relaxes

    def quantized(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.frozen:
            return super().quantized(x, generator)
        # As `VQVAE.encode` does it, so that the decoder learns from the very tokens that it will be given.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            ids = self.quantizer.ids(self.encode(x))
            return self.quantizer.lookup(ids), ids, x.new_zeros(())

    def reconstruct(self, x: Tensor, quantized: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the U-Net makes of ``x`` with noise of a random step; ``generator`` (on the CPU) draws both."""
        steps = torch.randint(len(self.schedule.alphas), (len(x),), generator=generator).to(x.device)
        noisy = self.schedule.add_noise(x, _normal_like(x, generator), steps)
        return self.unet(noisy, steps, quantized)

    def loss(self, space: Space, output: Tensor, target: Tensor) -> Tensor:
        """As 4M's: smooth L1 of depth and edges, squares elsewhere."""
        return F.smooth_l1_loss(output, target) if self.is_smooth else F.mse_loss(output, target)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Every image begins at the same noise: it depends on its codes alone."""
        size = (latents.shape[2] * self.patch, latents.shape[3] * self.patch)
        noise = fixed_noise(self.unet.channels, *size).to(latents.device)
        return torch.cat([self._sampled(noise, part) for part in latents.split(_DECODED_AT_ONCE)])

    def _sampled(self, noise: Tensor, latents: Tensor) -> Tensor:
        x = noise.expand(len(latents), -1, -1, -1)
        for _, after in ddim(
            partial(self.unet, condition=latents), self.schedule, x, self.along, clip=self.clip
        ):
            x = after
        return x

    def take_encoder(self, other: VQNetwork) -> None:
        """The encoder and the codes of ``other``, for good. ConfigError where they are of other sizes."""
        given = {k: v for k, v in other.state_dict().items() if k in self.state_dict() and not _is_decoder(k)}
        wanted = {k: v for k, v in self.state_dict().items() if not _is_decoder(k)}
        wrong = next((k for k, v in wanted.items() if k not in given or given[k].shape != v.shape), None)
        if wrong is not None:
            raise ConfigError(f"the encoder that is given has no {wrong} of the wanted shape")
        self.load_state_dict({**self.state_dict(), **given})
        self.frozen = True

    def set_trainable(self) -> None:
        """Gradients for what a fit is to change."""
        self.requires_grad_(True)
        if self.frozen:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(_is_decoder(name))


def encoder_digest(network: VQNetwork) -> str:
    """sha256 of the encoder and the codes: networks with the same one give the same tokens."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not _is_decoder(name) and not name.startswith(("from_latent.", "decoder.", "head.")):
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _is_decoder(name: str) -> bool:
    return name.startswith(_UNET)


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """On a GPU drawn there, which is faster; the CPU's generator gives the seed."""
    if x.device.type == "cpu":
        return torch.randn(x.shape, generator=generator)
    seed = int(torch.randint(1 << 62, (), generator=generator))
    own = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=own, device=x.device)


def _start_at_nothing(unet: PatchedUNet) -> None:
    """Residual parts add nothing at first, and the first prediction is the middle of the range (arXiv 2105.05233)."""
    for module in unet.modules():
        if isinstance(module, ResBlock):
            _zero(module.out_layers[-1])
        elif isinstance(module, GridAttention):
            _zero(module.proj_out)
    _zero(unet.out[-1])


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
