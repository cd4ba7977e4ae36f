"""How a trained specialist becomes a checkpoint folder: float16 safetensors that load as float32, and a card."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn


def save_half(model: Any, folder: Path) -> None:
    """`save_pretrained` in float16. The configuration says float32, in which `from_pretrained` then loads it:
    float16 is slow on a CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_card(folder: Path, card: dict[str, Any]) -> None:
    (folder / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False, width=110))


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def one_cycle(fraction: float, warmup: float = 0.05, last: float = 0.01) -> float:
    """The learning rate at a fraction of the training, as a share of its peak: linear up, cosine down to ``last``."""
    if fraction < warmup:
        return max(fraction / warmup, 0.01)
    down = min((fraction - warmup) / (1.0 - warmup), 1.0)
    return last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * down))


def adamw(modules: list[nn.Module], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices and kernels alone (not on biases, norms and positions of one dimension)."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


@torch.inference_mode()
def milliseconds(call: Callable[[torch.Tensor], Any], size: int) -> float:
    """Processor time per image of ``call`` on batches (16, 3, size, size)."""
    pixels, times = torch.zeros(16, 3, size, size), []
    for _ in range(12):
        start = time.process_time()
        call(pixels)
        times.append(time.process_time() - start)
    return round(1000.0 * float(np.median(times)) / 16, 2)
