"""The loader as a dataset of PyTorch: in a thread, in workers, on ranks, and from any step on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from fourmill.errors import ConfigError, DatasetError
from fourmill.train.batches import Batch
from fourmill.train.loader import Loader
from fourmill.train.presets import model_config
from fourmill.train_config import MixtureComponent, TrainConfig

CONFIG = TrainConfig(
    steps=12, warmup_steps=0, batch_size=16, lanes=8, shuffle_window=8, num_input_tokens=12, num_target_tokens=14,
    mixture=(MixtureComponent(default_alpha=1.0),),
)  # fmt: skip


def _loader(snapshot: Any, **options: Any) -> Loader:
    changes = {name: options.pop(name) for name in list(options) if name in TrainConfig.model_fields}
    config = CONFIG.model_copy(update=changes)
    return Loader([snapshot], model_config(config, snapshot.modalities, 64), config, **options)


def _content(batches: list[Batch]) -> list[bytes]:
    return [batch.to_bytes().numpy().tobytes() for batch in batches]


def _all(loader: Loader, start: int = 0) -> list[list[bytes]]:
    return [_content(batches) for batches in loader.steps(start)]


@pytest.fixture(scope="module")
def snapshot(toy: Callable[..., Any]) -> Any:
    return toy(rows=160, shards=8, n_crops=2, absent=0.1, pixels=True)


@pytest.fixture(scope="module")
def whole(snapshot: Any) -> list[list[bytes]]:
    found = _all(_loader(snapshot))
    assert len(found) == 12 and len({content for step in found for content in step}) == 12
    return found


@pytest.mark.parametrize("start", [0, 5, 11])
def test_it_goes_on_from_any_step(snapshot: Any, whole: list[list[bytes]], start: int) -> None:
    assert _all(_loader(snapshot), start) == whole[start:]


def test_state_is_that_of_the_last_step_delivered(snapshot: Any, whole: list[list[bytes]]) -> None:
    """Not of the last one prepared: a thread is ahead of whoever reads."""
    loader = _loader(snapshot)
    steps: Any = iter(loader)
    for _ in range(4):
        next(steps)
    state = loader.state_dict()
    assert state["step"] == 4
    steps.close()
    other = _loader(snapshot)
    other.load_state_dict(state)
    assert [_content(batches) for batches in other] == whole[4:]
    assert not [t for t in threading.enumerate() if t.name == "batches"]


def test_workers_give_the_same_batches(snapshot: Any, whole: list[list[bytes]]) -> None:
    assert _all(_loader(snapshot, workers=2), 1) == whole[1:]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_goes_on(snapshot: Any, whole: list[list[bytes]], workers: int) -> None:
    """It asks each worker for its state, and gives it back to the worker of that number. A batch comes as one tensor."""

    def loader() -> StatefulDataLoader[Any]:
        context = "spawn" if workers else None
        return StatefulDataLoader(
            _loader(snapshot), None, num_workers=workers, multiprocessing_context=context
        )

    def content(step: list[Any]) -> list[bytes]:
        assert not workers or all(part.dtype == torch.uint8 for part in step)
        return _content([Batch.from_bytes(part) if workers else part for part in step])

    before = iter(loader_before := loader())
    found = [content(next(before)) for _ in range(5)]
    state = loader_before.state_dict()
    del before, loader_before
    after = loader()
    after.load_state_dict(state)
    assert found + [content(step) for step in after] == whole


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_step_whatever_their_number(snapshot: Any, world: int) -> None:
    def samples(batch: Batch) -> list[tuple[int, ...]]:
        ends = batch.target_lengths.cumsum(0).tolist()
        return [tuple(part.tolist()) for part in np.split(batch.labels.numpy(), ends[:-1])]

    ranks = [_loader(snapshot, rank=rank, world=world) for rank in range(world)]
    alone = _loader(snapshot)
    chunk = alone.order.chunk
    for step in (0, 7):
        whole = samples(alone.step(step)[0])
        for rank, loader in enumerate(ranks):
            mine = [s for at in range(rank * chunk, 16, world * chunk) for s in whole[at : at + chunk]]
            assert samples(loader.step(step)[0]) == mine


def test_micro_batches_are_the_batch_in_pieces(snapshot: Any) -> None:
    one, parts = _loader(snapshot).step(3), _loader(snapshot, micro_batch=5).step(3)
    assert [len(part) for part in parts] == [5, 5, 5, 1]
    assert np.array_equal(np.concatenate([part.labels.numpy() for part in parts]), one[0].labels.numpy())


def test_what_goes_wrong_in_the_thread_is_raised(toy: Callable[..., Any]) -> None:
    snapshot = toy(rows=60)
    snapshot.modalities["rgb"] = snapshot.modalities["rgb"].resolved(vocab_size=4)
    with pytest.raises(DatasetError, match="rgb holds the token"):
        next(iter(_loader(snapshot)))
    assert not [t for t in threading.enumerate() if t.name == "batches"]


def test_ranks_that_cannot_share_are_refused_at_once(snapshot: Any) -> None:
    with pytest.raises(ConfigError, match="3 ranks cannot share"):
        _loader(snapshot, world=3)


def test_validation_is_shared_by_the_ranks(snapshot: Any) -> None:
    whole = _loader(snapshot).validation(8)
    assert sum(map(len, whole)) == 32
    halves = [_loader(snapshot, rank=rank, world=2).validation(8) for rank in range(2)]
    assert sum(int(batch.counts[0]) for half in halves for batch in half) == sum(b.counts[0] for b in whole)


def test_every_tensor_is_on_the_list(snapshot: Any) -> None:
    batch = _loader(snapshot).step(0)[0]
    tensors = [field.name for field in fields(batch) if isinstance(getattr(batch, field.name), torch.Tensor)]
    assert len(tensors) == 14
    assert all(
        getattr(Batch.from_bytes(batch.to_bytes()), n).shape == getattr(batch, n).shape for n in tensors
    )
