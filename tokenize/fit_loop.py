"""The fit of one tokenizer network: batches, steps, checkpoints, on one worker or several.

Every random choice is a function of the seed and the step. Workers share each batch: worker r of n has every n-th label of
it from the r-th on, gradients are averaged and the codebook's sums are added up, so all of them hold the same network.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fourmill.errors import ConfigError, ContractError
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.seeds import generator
from fourmill.tokenize.diffusion_network import DiffusionNetwork, encoder_digest
from fourmill.tokenize.fit_state import collect, put_back, read_state, state_name, write_state
from fourmill.tokenize.peers import ALONE, Peers
from fourmill.tokenize.quantizers import CosineCodebook
from fourmill.tokenize.spaces import Features, Vector, space_name
from fourmill.tokenize.vqvae import VQVAE, VQConfig
from fourmill.tokenize.vqvae_network import VQNetwork

Progress = Callable[[int, int, dict[str, Any]], None]
#: steps between two reports of progress
_REPORT_EVERY = 20
#: PyTorch draws first weights from a generator that all threads share
_DRAWING = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class FitOptions:
    """How a network is fitted. ``steps`` or ``minutes``, whichever ends first; 0 minutes: steps alone."""

    preset: str = "4m"
    steps: int = 20_000
    minutes: float = 0.0  # wall-clock; a fit that ends by the clock is not reproducible
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the run in which the learning rate rises
    relaxed: float = (
        0.15  # share of the run before quantisation begins: codes start from latents that mean something
    )
    seed: int = 0
    device: str = "cpu"
    precision: str = "auto"  # "fp32" or "bf16": autocast, the quantizer excepted; auto: bf16 on a GPU
    ema: float = 0.0  # decay of the running mean of the weights, which is what is kept then; 0: none
    sizes: tuple[
        int, ...
    ] = ()  # image sizes beside the dataset's: each batch has one; labels come at the largest
    checkpoint_minutes: float = 5.0  # between two files that a killed fit goes on from
    checkpoint_steps: int = 0  # the same, by steps; 0: by minutes alone

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        half = self.precision == "bf16" or (self.precision == "auto" and self.device.startswith("cuda"))
        return torch.bfloat16 if half else torch.float32

    def sizes_at(self, image_size: int) -> tuple[int, ...]:
        """Image sizes that the tokenizer is fitted for, that of the dataset first."""
        return (image_size, *sorted({*self.sizes} - {image_size}))


def fit_vqvae(
    modality: Modality,
    labels: Sequence[Label],
    config: VQConfig,
    *,
    image_size: int,
    options: FitOptions,
    progress: Progress | None = None,
    scratch: Path | None = None,
    peers: Peers = ALONE,
    encoder: VQVAE | None = None,
) -> VQVAE:
    """Fit a tokenizer network on cropped labels; the same arguments and ``steps`` give the same weights on one CPU.

    AdamW with betas 0.9 and 0.99, linear warm-up, cosine to zero, gradients clipped at norm 1 (4M's recipe),
    horizontal flips by the modality's rule. Labels are of ``image_size``, or of the largest of ``sizes``.

    With a fitted ``encoder``, of which ``config`` has the sizes, a diffusion decoder alone is fitted: the tokens are those
    of that tokenizer.

    In the folder ``scratch`` the state is kept every now and then, and at the end; a fit with the same arguments goes on
    from there, with any number of ``peers``. Who has the tokenizer removes it.
    """
    if not len(labels):
        raise ContractError(f"tokenizer of {modality.name!r}: there are no labels to fit on")
    if options.batch_size % peers.world:
        raise ConfigError(
            f"fit.batch_size {options.batch_size} is no multiple of fit.workers ({peers.world})"
        )
    codec = _fresh_codec(modality, labels, config, image_size, options, encoder)
    codec.to(options.device).network.train().set_trainable()
    fit = _Fit(codec, options, peers)
    file = None if scratch is None else scratch / _state_name(codec, options, len(labels), encoder)
    fit.resume(file)
    with closing(_batches(codec, labels, options, peers, fit.step)) as batches:
        saved_at, saved_step = time.monotonic(), fit.step
        while fit.done < 1.0:
            losses = fit.advance(next(batches))
            is_over = fit.done >= 1.0
            minutes = (time.monotonic() - saved_at) / 60
            by_steps = 0 < options.checkpoint_steps <= fit.step - saved_step
            if file is not None and (by_steps or is_over or minutes >= options.checkpoint_minutes):
                fit.keep(file)
                saved_at, saved_step = time.monotonic(), fit.step
            if progress and peers.rank == 0 and (fit.step % _REPORT_EVERY == 0 or is_over):
                progress(fit.step, fit.steps_in_all(), losses.figures())
    fit.finish()
    codec.to("cpu").freeze()
    parameters = sum(p.numel() for p in codec.network.parameters())
    kept = {**asdict(options), "precision": str(options.dtype).removeprefix("torch."), "workers": peers.world}
    kept = {k: v for k, v in kept.items() if not k.startswith("checkpoint")}
    codec.card.update(
        parameters=parameters,
        fit={**kept, "sizes": list(options.sizes), "steps_done": fit.step, "num_labels": len(labels)},
    )
    return codec


@dataclass(frozen=True, slots=True)
class _Losses:
    """Of one step; asking for the figures waits for the device."""

    loss: Tensor
    commitment: Tensor
    ids: Tensor | None

    def figures(self) -> dict[str, float]:
        codes = 0 if self.ids is None else len(self.ids.unique())
        return {"loss": float(self.loss), "commitment": float(self.commitment), "codes": codes}


class _Fit:
    """A fit under way: the network, what it is optimised with, and how far it is."""

    def __init__(self, codec: VQVAE, options: FitOptions, peers: Peers) -> None:
        self.codec, self.network, self.options, self.peers = codec, codec.network, options, peers
        self.step = 0
        self.done = 0.0  # share of the fit
        self._minutes = 0.0  # of earlier runs
        self._started = time.monotonic()
        self._optimizer = _optimizer(self.network, options)
        self._parameters: list[Tensor] = [p for p in self.network.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._parameters] if options.ema else None
        if isinstance(self.network.quantizer, CosineCodebook):
            self.network.quantizer.peers = peers

    def advance(self, batch: Tensor) -> _Losses:
        """One step."""
        options, network = self.options, self.network
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * _schedule(self.done, options.warmup)
        is_relaxed = network.relaxes and self.done < options.relaxed
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=options.dtype == torch.bfloat16):
            if is_relaxed:
                output, ids, commitment = (
                    network.forward_relaxed(batch, self._generator()),
                    None,
                    torch.zeros((), device=batch.device),
                )
            else:
                output, ids, commitment = network(batch, self._generator())
        loss = network.loss(self.codec.space, output.float(), batch)
        self._optimizer.zero_grad(set_to_none=True)
        (loss + commitment).backward()
        self.peers.average_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._follow()
        self.step += 1
        self.done = self._share()
        return _Losses(loss.detach(), commitment.detach(), ids)

    def steps_in_all(self) -> int:
        """By the clock an estimate."""
        return (
            self.options.steps if not self.options.minutes else max(self.step, round(self.step / self.done))
        )

    def keep(self, file: Path) -> None:
        """Write the state, if this is the first worker: all have the same."""
        if self.peers.rank == 0:
            facts = {"step": str(self.step), "done": repr(self.done), "minutes": repr(self._minutes_so_far())}
            write_state(file, self._tensors(), facts)

    def resume(self, file: Path | None) -> None:
        """Go on from the first worker's file, if there is one; else all begin with the first worker's weights."""
        own = read_state(file) if self.peers.rank == 0 and file is not None and file.exists() else None
        if self.peers.world > 1:
            own = self.peers.share(own or (self._tensors(), {}) if self.peers.rank == 0 else None)
        if own is None:
            return
        tensors, facts = own
        put_back(tensors, self.network, self.network.quantizer, self._optimizer, self._average)
        self.step, self.done = int(facts.get("step", 0)), float(facts.get("done", 0))
        self._minutes = float(facts.get("minutes", 0))

    def _tensors(self) -> dict[str, Tensor]:
        state = collect(self.network, self.network.quantizer, self._optimizer, self._average)
        return {name: value.detach().cpu() for name, value in state.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """The running mean, where there is one, becomes the weights."""
        for parameter, mean in zip(self._parameters, self._average or (), strict=bool(self._average)):
            parameter.copy_(mean)

    @torch.no_grad()
    def _follow(self) -> None:
        """The running mean of the parameters alone: the codebook, itself one, has codes that are replaced."""
        if self._average is not None:
            decay = min(
                self.options.ema, (1 + self.step) / (10 + self.step)
            )  # the first weights are soon forgotten
            torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    def _generator(self) -> torch.Generator:
        seed = generator(self.options.seed, "fit-codes", self.step, self.peers.rank).integers(1 << 62)
        return torch.Generator().manual_seed(int(seed))

    def _share(self) -> float:
        by_steps = self.step / self.options.steps
        if not self.options.minutes:
            return by_steps
        return self.peers.share(max(by_steps, self._minutes_so_far() / self.options.minutes))

    def _minutes_so_far(self) -> float:
        return self._minutes + (time.monotonic() - self._started) / 60


def _state_name(codec: VQVAE, options: FitOptions, count: int, encoder: VQVAE | None) -> str:
    chosen = {k: v for k, v in asdict(options).items() if k != "device" and not k.startswith("checkpoint")}
    facts = {"modality": asdict(codec.modality), "network": codec.config.to_mapping(), "labels": count}
    if encoder is not None:
        assert isinstance(encoder.network, VQNetwork)
        facts["encoder"] = encoder_digest(encoder.network)
    return state_name({**facts, "options": chosen, "image_size": codec.image_size})


def _fresh_codec(
    modality: Modality,
    labels: Sequence[Label],
    config: VQConfig,
    image_size: int,
    options: FitOptions,
    encoder: VQVAE | None = None,
) -> VQVAE:
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        space = space_name(modality.contract)
        if space in (Features.name, Vector.name):
            if options.sizes:
                raise ConfigError(
                    f"modalities.{modality.name}: `sizes` are for maps; its labels set the grid"
                )
            shape = np.shape(labels[0])
            grid = (shape[0], shape[1]) if space == Features.name else None
            codec = VQVAE(modality, image_size, config, grid=grid, channels=shape[-1])
            _set_standardisation(codec, labels)
        else:
            sizes = options.sizes_at(image_size) if encoder is None else encoder.image_sizes
            codec = VQVAE(modality, image_size, config, image_sizes=sizes)
        for module in codec.network.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    if encoder is not None:
        _give_encoder(codec, encoder, options)
    return codec


def _give_encoder(codec: VQVAE, encoder: VQVAE, options: FitOptions) -> None:
    where = f"modalities.{codec.modality.name}.tokenizer"
    for size in options.sizes_at(codec.image_size):
        if size not in encoder.image_sizes:
            known = ", ".join(map(str, encoder.image_sizes))
            raise ConfigError(f"{where}.sizes: the given encoder was fitted at {known}, not at {size}")
    if not isinstance(codec.network, DiffusionNetwork) or not isinstance(encoder.network, VQNetwork):
        raise ConfigError(f"{where}.encoder: only a diffusion decoder is fitted to a given encoder")
    codec.network.take_encoder(encoder.network)


def _set_standardisation(codec: VQVAE, labels: Sequence[Label]) -> None:
    """Mean and deviation of every feature channel, over at most 256 labels spread over the set."""
    picked = np.linspace(0, len(labels) - 1, min(256, len(labels))).astype(int)
    sample = codec.to_network([labels[i] for i in picked])
    codec.network.shift.copy_(sample.mean((0, 2, 3)).view(-1, 1, 1))
    codec.network.scale.copy_(sample.std((0, 2, 3)).clamp_min(1e-3).view(-1, 1, 1))


def _optimizer(network: nn.Module, options: FitOptions) -> torch.optim.AdamW:
    """Matrices decay; biases, norms and embeddings do not."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    decay = [p for p in parameters if p.ndim >= 2]
    rest = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99))


def _schedule(done: float, warmup: float) -> float:
    """Learning-rate factor at the share ``done`` of the run."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@dataclass(frozen=True, slots=True)
class _Draw:
    """What the batch of a step is made of, on all workers together."""

    rows: np.ndarray  # int64 (B,)
    flipped: np.ndarray  # bool (B,)
    size: int | None  # of the images; None: as they come

    @classmethod
    def of(cls, options: FitOptions, count: int, step: int, sizes: Sequence[int]) -> _Draw:
        rng = generator(options.seed, "fit-batch", step)
        rows, chance = rng.integers(count, size=options.batch_size), rng.random(options.batch_size)
        size = int(rng.choice(sizes)) if len(sizes) > 1 else None
        return cls(rows, chance < 0.5, size)


def _batches(
    codec: VQVAE, labels: Sequence[Label], options: FitOptions, peers: Peers, first: int
) -> Generator[Tensor, None, None]:
    """The batches of step ``first`` and all after it; another thread reads one ahead, as labels may come from storage."""
    sizes = options.sizes_at(codec.image_size)
    shape = codec.space.label_shape(max(sizes), codec.label_grid)

    def read(step: int) -> Tensor:
        drawn = _Draw.of(options, len(labels), step, sizes)
        mine = slice(peers.rank, None, peers.world)
        chosen = codec.space.check([labels[row] for row in drawn.rows[mine].tolist()], shape)
        batch = codec.space.to_network(chosen).to(options.device)
        if drawn.size is not None and drawn.size != batch.shape[-1]:
            batch = codec.space.resize(batch, drawn.size)
        return codec.space.flip(batch, torch.from_numpy(drawn.flipped[mine]).to(batch.device))

    with ThreadPoolExecutor(1, thread_name_prefix="fit-labels") as pool:
        ahead: Future[Tensor] = pool.submit(read, first)
        step = first
        while True:
            batch = ahead.result()
            step += 1
            ahead = pool.submit(read, step)
            yield batch
