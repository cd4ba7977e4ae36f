"""The processes of one training run: alone, or several under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from fourmill.errors import ConfigError

_TIMEOUT = timedelta(minutes=30)  # of a collective: a dead rank fails the run instead of hanging it


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process is ``rank`` of ``world`` and computes on ``device``."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        if self.world > 1:
            distributed.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto``: the rank's GPU if there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"train.device: {name!r} cannot be used here: {reason}") from error
    return device


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bfloat16 where asked for, or on a GPU by default; weights stay float32."""
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def join(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun's environment speaks of; a process group lives as long as the block."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(rank, world, chosen)
    finally:
        distributed.destroy_process_group()
