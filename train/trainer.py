"""Training: from a snapshot to a model, step by step, stoppable and resumable at any time.

A step's batch is a function of the step's number alone, the model has no dropout, and nothing else is random: a run
that was interrupted and resumed gives, on the CPU, the bits of one that was not.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fourmill.errors import FourmillError, WorkMissing
from fourmill.shards.snapshot import Snapshot
from fourmill.train import checkpoint
from fourmill.train.batches import Batch
from fourmill.train.codebooks import read_codebooks
from fourmill.train.loader import Loader
from fourmill.train.loss import loss_weights
from fourmill.train.model import FourMill
from fourmill.train.optimizer import Optimizers
from fourmill.train.presets import model_config
from fourmill.train.ranks import Ranks, autocast, join
from fourmill.train.records import OnStep, Records, StepOutcome, means
from fourmill.train.sources import Sources
from fourmill.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run. ``losses``: mean cross-entropy in nats by modality over the last logged steps."""

    step: int
    checkpoint: Path
    loss: float
    losses: dict[str, float]
    seconds: float  # of this call
    resumed_from: int | None  # the step at which this call went on
    parameters: int


def train(
    dataset_url: str,
    out_dir: Path | str,
    config: TrainConfig,
    on_step: OnStep | None = None,
    *,
    snapshot: str | None = None,
    stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train on a dataset's snapshot (by digest; None: the only one), or go on where ``out_dir`` left off.

    ``on_step`` gets a dictionary after every step: step, steps, loss, lr, samples_per_s, and every ``log_every`` steps the
    whole record that is also appended to metrics.jsonl. ``stop`` is asked between steps. When it says so, or on
    SIGTERM or Ctrl-C, a checkpoint is written and WorkMissing raised.
    """
    return train_on(Snapshot.load(dataset_url, snapshot), out_dir, config, on_step, stop=stop)


def train_on(
    snapshot: Any,
    out_dir: Path | str,
    config: TrainConfig,
    on_step: OnStep | None = None,
    *,
    stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """`train` for a snapshot that is already open."""
    with join(config.device) as ranks, _asked_to_stop(stop) as stopping:
        return Trainer(snapshot, Path(out_dir), config, ranks).run(on_step or _ignore, stopping)


class Trainer:
    """One process of a run. The constructor builds everything and restores the newest checkpoint."""

    def __init__(self, snapshot: Any, out_dir: Path, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.out_dir = config, ranks, out_dir
        sources = Sources.open(snapshot, config)
        self.digests = sources.digests
        shape = model_config(config, sources.modalities, sources.image_size)
        self.loader = Loader(
            sources.snapshots, shape, config, weights=sources.weights, rank=ranks.rank, world=ranks.world
        )
        self.order = self.loader.order
        self.model = FourMill(shape, config.seed).to(ranks.device)
        self.model.checkpoint_blocks = config.activation_checkpointing
        self.optimizer = Optimizers(self.model, config)
        self.step = 0
        self.resumed_from = self._resume()
        if self.resumed_from is None and config.token_init == "codebook":
            self.model.start_from_codebooks(read_codebooks(sources, shape), config.seed)
        self.wrapped: nn.Module = self.model
        if ranks.world > 1:
            self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.validation = self._validation() if config.eval_every else []

    def _resume(self) -> int | None:
        folder = checkpoint.newest(self.out_dir)
        if folder is None:
            return None
        state = checkpoint.read_state(folder)
        checkpoint.check_same_run(state, self.digests, self.config, self.out_dir)
        checkpoint.restore(folder, self.model, self.optimizer)
        self.step = state.step
        if self.order.position(self.step) != state.position:
            raise FourmillError(
                f"{folder}: its position in the data is not that of step {self.step}; remove {folder}"
            )
        return self.step

    def _validation(self) -> list[Batch]:
        """The batches of this rank's share of the split ``val``, always masked in the same way."""
        size = self.config.micro_batch or max(1, self.config.batch_size // self.ranks.world)
        return self.loader.validation(size)

    def run(self, on_step: OnStep, stopping: Callable[[], bool]) -> TrainResult:
        begin = time.perf_counter()
        records = Records(self.out_dir, self.config, self.model.config.names, self.step, self.ranks.is_first)
        for batches in self.loader.steps(self.step):
            outcome = self._train_step(batches)
            validation = self.validation_losses() if self._is_time_to_validate() else None
            record = records.add(self.step, self.order, outcome, validation)
            if self.ranks.is_first:
                on_step(record)
            done = self.step == self.config.steps
            stopped = not done and self._all_agree(stopping())
            if done or stopped or self.step % self.config.checkpoint_every == 0:
                self._save()
            if stopped:
                raise WorkMissing(
                    f"training stopped at step {self.step} of {self.config.steps}; the same command goes on from there"
                )
        folder = checkpoint.newest(self.out_dir)
        assert folder is not None
        count = sum(p.numel() for p in self.model.parameters())
        seconds = time.perf_counter() - begin
        return TrainResult(self.step, folder, *records.latest(), seconds, self.resumed_from, count)

    def _is_time_to_validate(self) -> bool:
        every = self.config.eval_every
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)  # type: ignore[operator]

    def _train_step(self, batches: Sequence[Batch]) -> StepOutcome:
        """One optimizer step over all ranks."""
        config, device = self.config, self.ranks.device
        labels = torch.tensor([batch.counts for batch in batches], dtype=torch.int64, device=device).sum(0)
        counts = self.ranks.sum(labels).tolist()
        targets = [spec.is_target for spec in self.model.config.modalities]
        weights = torch.tensor(loss_weights(counts, targets, config.loss, config.count_absent), device=device)
        rate = learning_rate(self.step, config)
        self.optimizer.zero_grad()
        self.wrapped.train()
        sums = torch.zeros(len(targets), device=device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last or self.ranks.world == 1 else self.wrapped.no_sync():  # type: ignore[operator]
                with autocast(config.precision, device):
                    entropies = self.wrapped(batch.to(device))
                # DDP averages gradients over ranks; the loss is a sum over them.
                ((entropies * weights).sum() * self.ranks.world).backward()
            sums += entropies.detach()
        self.ranks.sum(sums)
        loss = float((sums * weights).sum())
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FourmillError(
                f"step {self.step + 1}: the loss is {loss} and the gradient's norm {norm}; lower train.lr or set "
                f"train.clip_grad, and go on from the last checkpoint in {self.out_dir}"
            )
        self.optimizer.step(rate)
        self.step += 1
        return StepOutcome(sums, counts, loss, norm, rate, [self.loader.fill_of(batch) for batch in batches])

    def _clip(self) -> float:
        """The norm of the whole gradient, which is then shortened to ``clip_grad``."""
        parameters = list(self.model.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip_grad is not None:
            clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        return float(norm)

    def _all_agree(self, stop: bool) -> bool:
        """Whether any rank was asked to stop, so that all stop after the same step."""
        if self.ranks.world == 1:
            return stop
        return bool(self.ranks.sum(torch.tensor(float(stop), device=self.ranks.device)))

    def _save(self) -> None:
        if self.ranks.is_first:
            position = self.order.position(self.step)
            state = checkpoint.TrainState(
                self.step,
                position,
                self.digests[0],
                self.config.identity(),
                checkpoint.versions(),
                self.digests[1:],
            )
            checkpoint.save(self.out_dir, self.model, self.optimizer, state, self.config.keep_checkpoints)
        self.ranks.wait()

    @torch.no_grad()
    def validation_losses(self) -> dict[str, float]:
        """Mean cross-entropy by modality on the split ``val``."""
        self.model.eval()
        device = self.ranks.device
        total = torch.zeros(2, len(self.model.config.modalities), dtype=torch.float64, device=device)
        for batch in self.validation:
            with autocast(self.config.precision, device):
                total[0] += self.model(batch.to(device))
            total[1] += torch.tensor(batch.counts, device=device)
        sums, counts = self.ranks.sum(total).cpu().numpy()
        return means(self.model.config.names, sums, counts)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0, 1, ...: linear from near 0 to the peak over the warm-up, then a cosine to ``min_lr``."""
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.peak_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def _asked_to_stop(stop: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
    """Whether somebody wants the run to end: ``stop``, SIGTERM or Ctrl-C (a second Ctrl-C ends it at once)."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # signals can't be handled elsewhere
        before = {int(number): signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked.is_set() or (stop is not None and stop())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(record: dict[str, Any]) -> None:
    return None
