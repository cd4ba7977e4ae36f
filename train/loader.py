"""From shards to the masked batches of a run, step by step: in the training process, beside it, or in worker processes.

Nothing needs to be remembered but the number of the next step: its batches are a function of (snapshots, configuration,
step), so that a run goes on anywhere, on any number of ranks and workers, at the cost of starting.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fourmill.errors import DatasetError
from fourmill.train.batches import Batch, BatchMaker
from fourmill.train.order import Order, Refs
from fourmill.train.presets import ModelConfig
from fourmill.train.reading import Shards
from fourmill.train_config import TrainConfig

_AHEAD = 2  # steps that are prepared while one is computed
_T = TypeVar("_T")


class Loader(IterableDataset[list[Batch]]):
    """The micro-batches of each step of one rank, as a dataset of PyTorch.

    Iterating gives, from the next step on, a list of `Batch` for each step; a thread prepares the steps ahead. In a worker
    process of a DataLoader (``batch_size=None``) each batch is one uint8 tensor, for `Batch.from_bytes`, and a worker has
    every W-th step. ``state_dict`` and ``load_state_dict`` are what StatefulDataLoader asks for.
    """

    def __init__(
        self,
        snapshots: Sequence[Any],
        model: ModelConfig,
        config: TrainConfig,
        *,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """``weights``: of the snapshots; None: by their numbers of samples.

        Raises DatasetError for a snapshot without training samples, ConfigError where the ranks cannot share a step.
        """
        self.model, self.config, self.rank, self.world = model, config, rank, world
        self.shards = Shards(snapshots, model.modalities)
        shares = [float(count.sum()) for count in self.shards.counts] if weights is None else list(weights)
        self.order = Order(
            self.shards.counts, shares, config.seed, config.batch_size, config.lanes, config.shuffle_window
        )
        self.maker = BatchMaker(self.shards, model, config)
        self._next = 0
        self._stride = 1  # of the state that was loaded: steps of one worker are so far apart
        self.order.step(0, rank, world)

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of step ``number``, from 0."""
        refs = self.order.step(number, self.rank, self.world)
        soon = self.order.take_soon()
        if len(soon):
            self.shards.prefetch(soon)
        size = self.config.micro_batch or len(refs.shard)
        return [
            self.maker(Refs(*(column[at : at + size] for column in refs)))
            for at in range(0, len(refs.shard), size)
        ]

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = self._next if self._stride == workers else self._next + worker
        self._stride = workers
        numbers = range(first, self.config.steps, workers)
        made: Iterable[Any] = _in_background(self.step, numbers) if info is None else map(self.step, numbers)
        for number, batches in zip(numbers, made, strict=True):
            self._next = number + workers
            yield batches if info is None else [batch.to_bytes() for batch in batches]

    def state_dict(self) -> dict[str, int]:
        """What was delivered so far. In a worker process, by this worker."""
        return {"step": self._next, "stride": self._stride}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next, self._stride = int(state["step"]), int(state["stride"])

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """From step ``start`` on, made as ``config.workers`` says."""
        self.load_state_dict({"step": start, "stride": 1})
        if not self.config.workers:
            yield from self
            return
        loader = DataLoader(
            self,
            None,
            num_workers=self.config.workers,
            collate_fn=_same,
            multiprocessing_context="forkserver",
        )
        for packed in loader:
            yield [Batch.from_bytes(tensor) for tensor in packed]

    def fill_of(self, batch: Batch) -> tuple[float, float]:
        """How much of the budgets of input and of target tokens a batch uses."""
        config, rows = self.config, max(1, len(batch))
        return (
            len(batch.input_ids) / (rows * config.num_input_tokens),
            len(batch.labels) / (rows * config.num_target_tokens),
        )

    def validation(self, size: int) -> list[Batch]:
        """This rank's share of the first ``eval_samples`` of the split ``val``, ``size`` at a time, always masked alike."""
        shards = Shards(self.shards.snapshots, self.model.modalities, "val")
        maker = BatchMaker(shards, self.model, self.config)
        index = np.arange(min(len(shards), self.config.eval_samples))[self.rank :: self.world]
        return [maker(shards.refs(index[at : at + size])) for at in range(0, len(index), size)]


def _same(item: list[torch.Tensor]) -> list[torch.Tensor]:
    return item


def _in_background(make: Callable[[int], _T], numbers: Iterable[int]) -> Iterator[_T]:
    """What ``make`` makes of each number, prepared by one thread a few ahead. Raises what ``make`` raised, in its turn."""
    ready: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: tuple[_T | None, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in numbers:
                put((make(number), None))
                if stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 (handed to the thread that waits for it)
            put((None, error))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        for _ in numbers:
            item, error = _wait(ready, thread)
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join()


def _wait(ready: queue.Queue[Any], thread: threading.Thread) -> Any:
    while True:
        try:
            return ready.get(timeout=1.0)
        except queue.Empty:
            if not thread.is_alive() and ready.empty():
                raise DatasetError(
                    "the thread that makes batches ended without one; see its traceback"
                ) from None
