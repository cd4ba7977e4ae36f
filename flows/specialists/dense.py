"""Trains the dense specialists that ship with fourmill on scenes.

`python -m fourmill.flows.specialists.dense depth normal --minutes 25 --out labelers/specialists` trains the named
networks together, one step each on the same batch. Those of one kind (depth and normals are DPTs) share all but their
heads meanwhile: what the one learns helps the other, at little cost. Each is saved whole. It writes checkpoints and cards into OUT/<task>, a first one early. The first half runs on images of half
the size, at a quarter of the cost. Minutes are of processor time on one thread: a busy machine takes longer and learns
as much. The length is a time, so two runs do not give the same bits.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fourmill.flows.specialists.dense_networks import SIZE, TASKS, make_network, make_processor
from fourmill.flows.specialists.dense_pool import DensePool, open_dense_pool
from fourmill.flows.specialists.evaluate import (
    HELD_OUT_SCENES,
    HELD_OUT_SEED,
    evaluate,
    full_size,
    load,
    to_pixels,
)
from fourmill.flows.specialists.folder import count_params, one_cycle, save_half, write_card
from fourmill.flows.specialists.muon import Together
from fourmill.shards.sources.scenes import VERSION

TRAIN_SEED = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    tasks: tuple[str, ...]
    out: Path
    minutes: float = 15.0  # of processor time
    scenes: int = 12288
    batch: int = 8
    lr: float = 2e-3
    weight_decay: float = 0.02
    half_size_share: float = 0.5  # of the time
    ema: float = 0.997  # decay per step of the averaged weights, which are what is saved
    save_minutes: float = 4.0
    init: Path | None = None  # checkpoint folders to start from, by task
    seed: int = 0


def train(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    pool = open_dense_pool(TRAIN_SEED, settings.scenes, SIZE)
    networks = {task: _start(task, settings.init) for task in settings.tasks}
    _share_trunks(networks)
    together = nn.ModuleList(networks.values())  # counts shared parameters once
    optimizer = Together(together, settings.lr, settings.weight_decay)
    averages = {task: copy.deepcopy(network).eval() for task, network in networks.items()}
    batches, step, losses = _batches(pool, settings), 0, dict.fromkeys(networks, 0.0)
    started, said, saved = time.process_time(), 0.0, 0.0
    while (spent := (time.process_time() - started) / 60.0) < settings.minutes:
        fraction = spent / settings.minutes
        lr = settings.lr * one_cycle(fraction)
        side = SIZE // 2 if fraction < settings.half_size_share else SIZE
        for task, loss in _step(networks, optimizer, next(batches), side, lr).items():
            losses[task] = 0.98 * losses[task] + 0.02 * loss if step else loss
        step += 1
        _average(averages, networks, min(settings.ema, step / (step + 10.0)))
        if spent - said > 0.25:
            said = spent
            shown = " ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
            print(f"{spent:5.1f} min step {step} side {side} {shown}", flush=True)
        if spent - saved > settings.save_minutes:
            saved = spent
            _save(averages, settings, step)
    _save(averages, settings, step)


def _start(task: str, init: Path | None) -> Any:
    return (load(task, init / task) if init else make_network(task)).train()


def _share_trunks(networks: dict[str, Any]) -> None:
    """DPTs that train together use the first one's encoder and neck."""
    first, *others = [network for network in networks.values() if hasattr(network, "dpt")] or [None]
    for network in others:
        network.dpt, network.neck = first.dpt, first.neck


def _batches(pool: DensePool, settings: Settings) -> Iterator[dict[str, torch.Tensor]]:
    """Endless shuffled batches at full size, half of them mirrored."""
    random = np.random.default_rng(settings.seed)
    while True:
        order = random.permutation(len(pool))
        for start in range(0, len(order) - settings.batch + 1, settings.batch):
            rows = np.sort(order[start : start + settings.batch])
            batch = {
                "pixels": to_pixels(pool.image[rows]),
                "depth": torch.from_numpy(pool.depth[rows].astype(np.float32))[:, None],
                "normal": torch.from_numpy(pool.normal[rows].astype(np.float32) / 127.0).permute(0, 3, 1, 2),
                "semseg": torch.from_numpy(pool.semseg[rows].astype(np.int64)),
            }
            yield _mirror(batch) if random.random() < 0.5 else batch


def _mirror(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Left and right exchanged, in the images and in what the normals mean."""
    flipped = {name: value.flip(-1) for name, value in batch.items()}
    flipped["normal"] = flipped["normal"] * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    return flipped


def _step(
    networks: dict[str, Any], optimizer: Together, batch: dict[str, torch.Tensor], side: int, lr: float
) -> dict[str, float]:
    pixels = batch["pixels"] if side == SIZE else F.avg_pool2d(batch["pixels"], SIZE // side)
    losses = {task: LOSSES[task](raw, batch[task]) for task, raw in _outputs(networks, pixels).items()}
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step(lr)
    return {task: float(loss.detach()) for task, loss in losses.items()}


def _outputs(networks: dict[str, Any], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """By task the raw output at full size; a neck that networks share runs once."""
    outputs: dict[str, torch.Tensor] = {}
    features: list[torch.Tensor] = []  # of the neck that ran last
    neck = None
    for task, network in networks.items():
        if features and getattr(network, "neck", None) is neck:
            raw = network.head(features[-1])
            raw = raw if raw.ndim == 4 else raw[:, None]
            outputs[task] = F.interpolate(raw, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
            continue
        if hasattr(network, "dpt"):
            neck = network.neck
            network.dpt.embeddings.image_size = tuple(pixels.shape[2:])
            hook = neck.register_forward_hook(lambda module, args, output: features.append(output))
            outputs[task] = full_size(task, network(pixels), SIZE)
            hook.remove()
        else:
            outputs[task] = full_size(task, network(pixels), SIZE)
    return outputs


def depth_loss(raw: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Error of the log depth, and of its differences over 1, 2, 4 and 8 pixels (sharp edges, flat walls).

    Args: raw (B, 1, S, S) metres, may be zero or less; true (B, 1, S, S) metres.
    """
    error = raw.clamp(min=0.05).log() - true.log()
    loss = error.abs().mean()
    for gap in (1, 2, 4, 8):
        across, down = error[..., gap:] - error[..., :-gap], error[..., gap:, :] - error[..., :-gap, :]
        loss = loss + 0.1 * (across.abs().mean() + down.abs().mean())
    # the logarithm is clamped: without this, pixels that a ReLU holds at zero would learn nothing
    return loss + (0.05 - raw).clamp(min=0.0).mean()


def normal_loss(raw: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Mean chord between unit vectors, which is the angle in radians where it is small; (B, 3, S, S) both."""
    chord_squared = (F.normalize(raw, dim=1, eps=1e-4) - true).square().sum(dim=1)
    return (chord_squared + 1e-5).sqrt().mean()


def semseg_loss(raw: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Cross entropy; objects, which are rarer, count double. Logits (B, 5, S, S), ids (B, S, S)."""
    return F.cross_entropy(raw, true, weight=torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0]))


LOSSES = {"depth": depth_loss, "normal": normal_loss, "semseg": semseg_loss}


@torch.no_grad()
def _average(averages: dict[str, Any], networks: dict[str, Any], decay: float) -> None:
    """Moves the averaged weights towards the trained ones; running statistics are copied."""
    for task, average in averages.items():
        slow, fast = list(average.parameters()), list(networks[task].parameters())
        torch._foreach_lerp_(slow, fast, 1.0 - decay)
        for a, b in zip(average.buffers(), networks[task].buffers(), strict=True):
            a.copy_(b)


def _save(averages: dict[str, Any], settings: Settings, step: int) -> None:
    """Checkpoints, image processors, and cards with the accuracy of what was saved."""
    for task, average in averages.items():
        folder = settings.out / task
        network = copy.deepcopy(average)
        save_half(network, folder)
        make_processor(task).save_pretrained(folder)
        found = evaluate(task, folder)
        milliseconds = found.pop("ms_per_image")
        print(f"saved {folder} at step {step}: {found}, {milliseconds} ms/image", flush=True)
        write_card(
            folder,
            {
                "name": f"scenes {task}",
                "architecture": type(network).__name__,
                "params": count_params(network),
                "license": "Apache-2.0",
                "trained_on": f"scenes version {VERSION}, seed {TRAIN_SEED}, {settings.scenes} images",
                "command": _command(settings),
                "steps": step,
                "held_out": {"seed": HELD_OUT_SEED, "scenes": HELD_OUT_SCENES, "size_px": SIZE, **found},
            },
        )


def _command(settings: Settings) -> str:
    words = ["python -m fourmill.flows.specialists.dense", *settings.tasks]
    words += ["--minutes", f"{settings.minutes:g}", "--out", "OUT", "--half-size-share"]
    words += [f"{settings.half_size_share:g}", "--lr", f"{settings.lr:g}"]
    return " ".join(words) + (" --init PREVIOUS" if settings.init else "")


def main() -> None:
    default = Settings(tasks=(), out=Path())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints go into OUT/<task>")
    parser.add_argument("--minutes", type=float, default=default.minutes)
    parser.add_argument("--scenes", type=int, default=default.scenes, help="size of the training pool")
    parser.add_argument("--lr", type=float, default=default.lr)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--half-size-share", type=float, default=default.half_size_share)
    parser.add_argument("--save-minutes", type=float, default=default.save_minutes)
    parser.add_argument("--init", type=Path, help="start from the checkpoints in INIT/<task>")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # subnormal numbers are many times slower
    arguments = vars(parser.parse_args())
    train(Settings(**{**arguments, "tasks": tuple(arguments["tasks"])}))


if __name__ == "__main__":
    main()
