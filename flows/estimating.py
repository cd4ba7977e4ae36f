"""How long a forecast's work takes, and how much room: from what an image costs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fourmill.flows.costs import Cost, Costs
from fourmill.flows.engine import device_of
from fourmill.flows.forecast import Forecast
from fourmill.flows.resolve import Resolved
from fourmill.shards.dataset import SAMPLES

SPEED = "speed"


@dataclass
class Estimate:
    """``hours``: of specialists, by modality; ``seconds``: until the end, ``rate``: images/s on the way.

    ``unknown``: modality -> what is not known of it, and counts as nothing.
    ``sources``: modality -> where its speed comes from.
    """

    hours: dict[str, float]
    per_specialist: dict[str, float]  # images/s
    bytes: dict[str, float]
    seconds: float | None
    rate: float | None
    specialists: int  # of each group, at the same time
    unit: str
    sources: dict[str, str]
    unknown: dict[str, list[str]]

    @property
    def total_hours(self) -> float:
        return sum(self.hours.values())

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"total_hours": self.total_hours, "total_bytes": self.total_bytes}


def specialists_here(resolved: Resolved) -> int:
    """How many of each group work at the same time: as configured, or as many as this machine has room for."""
    engine, groups = resolved.config.engine, len(resolved.groups())
    if engine.replicas:
        return engine.replicas
    if engine.address:
        return 1  # of a cluster we know nothing
    if device_of(resolved.config) == "cuda" and engine.gpus_per_actor > 0:
        import torch

        return max(1, int(torch.cuda.device_count() / engine.gpus_per_actor + 1e-6) // groups)
    return max(1, (os.cpu_count() or 1) // groups)


def estimate(resolved: Resolved, found: Forecast, costs: Costs, specialists: int | None = None) -> Estimate:
    """``specialists``: how many of each group work at the same time; default: `specialists_here`."""
    device = device_of(resolved.config)
    # of the one machine, which decoding and, without a GPU, networks share; 0: there may be several
    cores = 0 if resolved.config.engine.address or specialists else os.cpu_count() or 1
    specialists = specialists or specialists_here(resolved)
    spent: dict[str, float] = {}
    size: dict[str, float] = {}
    speed: dict[str, float] = {}
    unknown: dict[str, list[str]] = {}
    for name, work in found.modalities.items():
        cost = costs.modalities.get(name, Cost())
        missing = unknown.setdefault(name, [])
        spent[name] = _times(work.label_rows, cost.forward, SPEED, missing)
        spent[name] += _times(work.tokenize_rows, cost.tokenize, SPEED, missing)
        size[name] = _times(work.tokenize_rows, cost.token_bytes, "size", missing)
        size[name] += _times(work.keep_rows, cost.label_bytes, "size of labels", missing)
        if cost.forward is not None and cost.tokenize is not None and cost.forward + cost.tokenize > 0:
            speed[name] = 1 / (cost.forward + cost.tokenize)
        unknown[name] = list(dict.fromkeys(missing))
    missing = unknown.setdefault(SAMPLES, [])
    size[SAMPLES] = _times(found.new_rows, costs.sample_bytes, "size", missing)
    seconds = None
    if any(spent.values()):
        seconds = _wall(resolved, found, costs, spent, specialists, device, cores)
    return Estimate(
        hours={name: value / 3600 for name, value in spent.items()},
        per_specialist=speed,
        bytes=size,
        seconds=seconds,
        rate=found.decoded_rows / seconds if seconds else None,
        specialists=specialists,
        unit="GPU-h" if device == "cuda" else "CPU-h",
        sources={name: cost.source for name, cost in costs.modalities.items() if cost.source},
        unknown={name: what for name, what in unknown.items() if what},
    )


def _times(rows: int, cost: float | None, what: str, missing: list[str]) -> float:
    if not rows:
        return 0.0
    if cost is None:
        missing.append(what)
        return 0.0
    return rows * cost


def _wall(
    resolved: Resolved, found: Forecast, costs: Costs, spent: Mapping[str, float], specialists: int, device: str, cores: int
) -> float:  # fmt: skip
    """The slowest group decides; or the cores, where networks and decoding share them."""
    slowest = max(sum(spent[name] for name in group) for group in resolved.groups()) / specialists
    decode = found.decoded_rows * (costs.decode or 0.0)
    if cores:
        slowest = max(slowest, (decode + (sum(spent.values()) if device == "cpu" else 0.0)) / cores)
    return slowest / (1 - costs.idle)
