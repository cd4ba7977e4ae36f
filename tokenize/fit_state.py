"""A fit under way, as one file: weights, their running mean, the optimizer, the codebook's counts, and the step.

Every random choice of a fit is a function of its seed and the step, so there is no generator to be kept. The file is put in
place whole; a fit that goes on from it ends, on one CPU, with the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fourmill.errors import CheckpointError
from fourmill.tokenize.quantizers import Quantizer

#: raised when another computation would follow from the same state
STATE_VERSION = 2


def state_name(facts: Mapping[str, Any]) -> str:
    """Name of the file of the fit that ``facts`` describe: another fit never finds it."""
    text = json.dumps({"version": STATE_VERSION, **facts}, sort_keys=True, default=str)
    return f"fit-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def write_state(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Replace ``file`` at once: who is killed meanwhile leaves the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".part-{os.getpid()}")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata=dict(facts))
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, file)


def read_state(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts that `write_state` wrote. CheckpointError where they are damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"the state of a fit {file} is damaged: {reason}; remove it, and the fit starts again"
        ) from error


def collect(
    network: nn.Module, quantizer: Quantizer, optimizer: torch.optim.Optimizer, average: list[Tensor] | None
) -> dict[str, Tensor]:
    """Everything of a fit that is a tensor, by name."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"quantizer.{k}": v for k, v in quantizer.fit_state().items()}
    tensors |= {f"average.{i}": v for i, v in enumerate(average or ())}
    for number, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{number}.{key}"] = value
    return tensors


@torch.no_grad()
def put_back(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    quantizer: Quantizer,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor] | None,
) -> None:
    """The opposite of `collect`, on whatever device they are now."""
    network.load_state_dict(_under("network.", tensors))
    quantizer.load_fit_state(_under("quantizer.", tensors))
    for number, value in enumerate(average or ()):
        value.copy_(tensors[f"average.{number}"])
    for number, parameter in enumerate(_parameters(optimizer)):
        for key, value in _under(f"optimizer.{number}.", tensors).items():
            # AdamW counts its steps on the CPU
            optimizer.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
