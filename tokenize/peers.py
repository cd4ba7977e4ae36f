"""Workers that fit one tokenizer together: which one this is, and sums over all of them.

`ALONE` is a fit in one process. `ProcessGroup` speaks through torch.distributed, whoever set it up: Ray Train, torchrun.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Peers:
    """Worker ``rank`` of ``world``. One alone has nobody to sum with."""

    rank: int = 0
    world: int = 1

    def sum_(self, values: Tensor) -> Tensor:
        """``values`` becomes the sum over all workers, the same bits on each of them; returned too."""
        return values

    def share(self, value: T) -> T:
        """The first worker's value, on all of them."""
        return value

    def wait(self) -> None:
        """Until all workers are here."""

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """The mean over the workers, as one message."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world == 1 or not gradients:
            return
        flat = self.sum_(torch.cat([g.flatten() for g in gradients])) / self.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Peers()


class ProcessGroup(Peers):
    """The default group of torch.distributed, which must be there."""

    __slots__ = ()

    @classmethod
    def joined(cls) -> ProcessGroup:
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def sum_(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values

    def share(self, value: T) -> T:
        cell = [value]
        torch.distributed.broadcast_object_list(cell, src=0)
        return cell[0]

    def wait(self) -> None:
        torch.distributed.barrier()
