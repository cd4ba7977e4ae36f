"""What a training run says about itself: one line of JSON every few steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourmill.train.order import Order
from fourmill.train_config import TrainConfig

FILE = "metrics.jsonl"
OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """One step over all ranks: sums of cross-entropy float32 (M,) in nats, label counts, and what they came to."""

    sums: torch.Tensor
    counts: Sequence[int]
    loss: float
    grad_norm: float
    lr: float
    filled: Sequence[
        tuple[float, float]
    ]  # how much of the input and target budgets, by micro-batch of this rank


class Records:
    """Gathers steps into records, and appends the records to OUT/metrics.jsonl."""

    def __init__(
        self, out_dir: Path, config: TrainConfig, names: Sequence[str], step: int, is_first: bool
    ) -> None:
        self.path, self.config, self.names, self.is_first = out_dir / FILE, config, names, is_first
        if is_first:
            out_dir.mkdir(parents=True, exist_ok=True)
            _drop_later(self.path, step)
        self._latest = _read(self.path)[-1:]
        self._sums: Any = 0.0  # float64 (M,), on the device until a record is made
        self._counts = np.zeros(len(names), np.int64)
        self._losses: list[float] = []
        self._shares: list[tuple[float, float]] = []
        self._since = time.perf_counter()

    def latest(self) -> tuple[float, dict[str, float]]:
        """The loss, and the losses by modality, of the last record."""
        record = self._latest[0] if self._latest else {}
        return record.get("loss", float("nan")), record.get("losses", {})

    def add(
        self, step: int, order: Order, outcome: StepOutcome, validation: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """The short record of a step, or the whole one where it is time for that (and then it is written)."""
        self._sums = self._sums + outcome.sums.double()
        self._counts += np.asarray(outcome.counts)
        self._losses.append(outcome.loss)
        self._shares += outcome.filled
        config = self.config
        speed = len(self._losses) * config.batch_size / (time.perf_counter() - self._since)
        record: dict[str, Any] = {"step": step, "steps": config.steps, "loss": outcome.loss, "lr": outcome.lr}
        record["samples_per_s"] = round(speed, 2)
        if step % config.log_every and step != config.steps and validation is None:
            return record
        inputs, targets = np.mean(self._shares, axis=0)
        record["loss"] = float(np.mean(self._losses))
        record["losses"] = means(self.names, self._sums.cpu().numpy(), self._counts)
        record["grad_norm"] = outcome.grad_norm
        epochs = order.position(step).epochs
        record["epoch"] = epochs[0] if len(epochs) == 1 else list(epochs)
        record["filled_inputs"], record["filled_targets"] = round(float(inputs), 4), round(float(targets), 4)
        if validation is not None:
            record["val_losses"] = dict(validation)
        if self.is_first:
            with self.path.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        self._latest = [record]
        self._clear()
        return record

    def _clear(self) -> None:
        self._sums = 0.0
        self._counts[:] = 0
        self._losses, self._shares = [], []
        self._since = time.perf_counter()


def means(names: Sequence[str], sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy of the modalities that had labels."""
    return {name: float(s / c) for name, s, c in zip(names, sums, counts, strict=True) if c}


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line that was cut short by a kill is no record."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(dict(json.loads(line)))
        except ValueError:
            continue
    return records


def _drop_later(path: Path, step: int) -> None:
    """Forget the records of steps that a resumed run will do again."""
    if path.is_file():
        kept = [json.dumps(record) + "\n" for record in _read(path) if record.get("step", 0) <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
