"""What a run reads: a snapshot, and perhaps those of other datasets, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fourmill.errors import ConfigError
from fourmill.modality import Modality
from fourmill.shards.snapshot import Snapshot
from fourmill.train_config import TrainConfig

_GIB = 2**30


@dataclass(frozen=True)
class Sources:
    """Snapshots and their weights; what they have in common. The first one is the run's own.

    Raises ConfigError where they do not fit: another image size, or tokens of one name that mean different things.
    """

    snapshots: Sequence[Any]
    weights: Sequence[float]
    modalities: dict[str, Modality] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[str, Modality] = {}
        owners: dict[str, Any] = {}
        own = self.snapshots[0]
        for snapshot in self.snapshots:
            if snapshot.image_size != own.image_size:
                raise ConfigError(
                    f"train.datasets: crops of {snapshot.digest[:12]} have {snapshot.image_size} pixels, those of "
                    f"{own.digest[:12]} have {own.image_size}"
                )
            for name, modality in snapshot.modalities.items():
                if name not in found:
                    found[name], owners[name] = modality, snapshot
                elif _meaning(snapshot, name) != _meaning(owners[name], name):
                    raise ConfigError(
                        f"train.datasets: tokens of {name!r} in {snapshot.digest[:12]} are not those of "
                        f"{owners[name].digest[:12]}: {_meaning(snapshot, name)} and {_meaning(owners[name], name)}; "
                        "build both with one tokenizer, or leave it out of train.inputs and train.targets"
                    )
        object.__setattr__(self, "modalities", found)

    @property
    def image_size(self) -> int:
        return int(self.snapshots[0].image_size)

    @property
    def digests(self) -> list[str]:
        return [snapshot.digest for snapshot in self.snapshots]

    def owner(self, name: str) -> Any:
        """The first snapshot that has a modality."""
        return next(snapshot for snapshot in self.snapshots if name in snapshot.modalities)

    @classmethod
    def open(cls, snapshot: Any, config: TrainConfig) -> Sources:
        """``snapshot`` and those of `train.datasets`; files on object stores through this machine's cache."""
        others = [Snapshot.load(other.url, other.snapshot) for other in config.datasets]
        found = [
            one.cached(int(config.cache_gb * _GIB), config.cache_dir) if isinstance(one, Snapshot) else one
            for one in (snapshot, *others)
        ]
        return cls(found, [config.weight, *(other.weight for other in config.datasets)])


def _meaning(snapshot: Any, name: str) -> str:
    """What must be equal for tokens to be the same."""
    modality = snapshot.modalities[name]
    parts = [modality.kind, f"{modality.vocab_size} ids", f"{modality.num_tokens} tokens"]
    tokenizer = snapshot.tokenizer(name)
    return ", ".join([*parts, f"tokenizer {tokenizer}"] if tokenizer else parts)
