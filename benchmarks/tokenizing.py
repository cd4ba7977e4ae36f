"""What tokenizers cost: `python benchmarks/tokenizing.py [--reference DIR] [--quick] [--only a,b,c]`. One thread.

(a) `encode` of a fitted codec against the bare forward pass of its encoder on a ready tensor: at ViT-B size (224 px, 8,192 codes,
    random weights) and at the size of the demo's. `encode` also checks, stacks and scales the labels, searches the nearest
    codes and gives uint16 arrays.
(b) A published tokenizer of ViT-B size (16,384 codes) against the inner loop of the reference's save_vq_tokens.py, from a ready
    batch to int16 arrays, on the same random weights; the tokens must be the same. Needs ``--reference``, a checkout of
    apple/ml-4m, whose code is read from there by path, and the packages that this code imports (einops).
(c) Peak memory of tensors that one step of a fit's quantizer adds at 16,384 codes of 32 numbers, for 32 x 196 vectors, backward pass included, and
    its time; with ``--reference`` that of the reference's quantizer too. Each in a process of its own.

Sides take turns in alternating order; a ratio is the median of the pairs' ratios, speed over the other's speed. Times are the thread's
processor time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fourmill.modality import RGB
from fourmill.tokenize.fit import default_config
from fourmill.tokenize.published_network import PublishedNetwork, ReleasedConfig
from fourmill.tokenize.quantizers import CosineCodebook
from fourmill.tokenize.vqvae import VQVAE

CODES, LATENT, VECTORS = 16_384, 32, (32, 14, 14)
AIMS = {"a": 0.9, "b": 1.0, "c": 2.0}


def pairs(ours: Callable[[], Any], other: Callable[[], Any], count: int) -> dict[str, Any]:
    """Seconds of both, medians, and the ratio of speeds. Each runs once before."""
    ours(), other()
    seconds: list[tuple[float, float]] = []
    for turn in range(count):
        order = (ours, other) if turn % 2 == 0 else (other, ours)
        took = {call: _seconds(call) for call in order}
        seconds.append((took[ours], took[other]))
    ratios = sorted(b / a for a, b in seconds)
    return {
        "ours_ms": round(1e3 * median(a for a, _ in seconds), 2),
        "other_ms": round(1e3 * median(b for _, b in seconds), 2),
        "ratio": round(median(ratios), 3),
        "min": round(ratios[0], 3),
        "max": round(ratios[-1], 3),
        "pairs": count,
    }


def _seconds(call: Callable[[], Any]) -> float:
    """Processor time of this thread, the only one that works: what else the machine does shows less."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


def encode_against_forward(preset: str, size: int, batch: int, count: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = default_config(RGB, preset, size, **({"codebook_size": 8192} if preset == "4m" else {}))
    codec = VQVAE(RGB, size, config)
    codec.network.quantizer.get_buffer("codes").copy_(
        nn.functional.normalize(torch.randn(config.codes, config.latent_dim))
    )
    codec.freeze()
    labels = list(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3)).astype(np.uint8))
    ready = codec.to_network(labels)

    def forward() -> Any:
        with torch.inference_mode():
            return codec.network.encode(ready)

    return pairs(lambda: codec.encode(labels), forward, count)


def against_reference(folder: Path, name: str, size: int, batch: int, count: int) -> dict[str, Any]:
    torch.manual_seed(0)
    values = {
        "dec_type": "none",
        "enc_type": f"{name}_enc",
        "image_size": size,
        "codebook_size": CODES,
        "latent_dim": LATENT,
    }
    ours = PublishedNetwork(ReleasedConfig.from_mapping(values)).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.05)
    codes = torch.randn(CODES, LATENT)
    ours.quantize.get_buffer("_codebook.embed").copy_(nn.functional.normalize(codes, dim=1))
    theirs = Reference(folder, name, size).eval()
    wanted = theirs.state_dict()
    given = {k: v for k, v in ours.state_dict().items() if k in wanted}
    theirs.load_state_dict({**wanted, **given})
    x = torch.rand(batch, 3, size, size) * 2 - 1

    def tokens() -> np.ndarray:
        with torch.inference_mode():
            return ours.tokens(x).flatten(1).cpu().numpy().astype(np.uint16)

    def loop() -> np.ndarray:
        with torch.no_grad():
            found = theirs(x)
            return found.flatten(1).detach().cpu().numpy().astype(np.int16)

    same = float((tokens().astype(int) == loop().astype(int)).mean())
    return {**pairs(tokens, loop, count), "tokens_equal": round(same, 4)}


class Reference(nn.Module):
    """The parts of the reference that its inner loop goes through, in its order, under its names of weights."""

    def __init__(self, folder: Path, name: str, size: int) -> None:
        super().__init__()
        vit = by_path(folder / "fourm/vq/models/vit_models.py")
        self.encoder = getattr(vit, f"{name}_enc")(in_channels=3, patch_size=16, resolution=size)
        self.quant_proj = nn.Conv2d(self.encoder.dim_tokens, LATENT, 1)
        self.quantize = reference_quantizer(folder)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantize(self.quant_proj(self.encoder(x)))[2]


def reference_quantizer(folder: Path) -> nn.Module:
    """As its VQ class makes it for a codebook of this size."""
    module = by_path(folder / "fourm/vq/quantizers/quantize_lucid.py")
    quantizer: nn.Module = module.VectorQuantize(
        dim=LATENT,
        codebook_size=CODES,
        codebook_dim=LATENT,
        use_cosine_sim=True,
        decay=0.99,
        threshold_ema_dead_code=np.prod(VECTORS) / CODES / 32,
    )
    return quantizer


def by_path(file: Path) -> Any:
    """A module of the reference, alone: its packages import much that this has no use for."""
    spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SystemExit(f"--reference: {file} is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_step(side: str, folder: str) -> None:
    """In a process of its own: prints the peak that a step adds (MiB) and its seconds (the fastest of three more)."""
    torch.set_num_threads(1)
    quantizer: Any = CosineCodebook(CODES, LATENT) if side == "ours" else reference_quantizer(Path(folder))
    quantizer.train()
    latents = torch.randn(VECTORS[0], LATENT, *VECTORS[1:], requires_grad=True)

    def step() -> None:
        quantized, second, third = quantizer.quantize(latents) if side == "ours" else quantizer(latents)
        loss = third if side == "ours" else second
        (quantized.sum() + loss.sum()).backward()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    peak = _peak_bytes(profiled) / 2**20
    fastest = min(_seconds(step) for _ in range(3))
    print(json.dumps({"peak_mib": round(peak, 1), "seconds": round(fastest, 3)}))


def _peak_bytes(profiled: profile) -> int:
    """Most that tensors held at a time beyond what was there before. What the process holds says less: pages of libraries
    come and go.
    """
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def quantizer_memory(folder: Path | None) -> dict[str, Any]:
    found = {}
    for side in ("ours", *(("reference",) if folder else ())):
        command = [
            sys.executable,
            __file__,
            "--one-step",
            side,
            *(("--reference", str(folder)) if folder else ()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    result = {f"{side}_{key}": value for side, line in found.items() for key, value in line.items()}
    if folder:
        result["ratio"] = round(found["reference"]["peak_mib"] / found["ours"]["peak_mib"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of apple/ml-4m")
    parser.add_argument("--quick", action="store_true", help="tiny networks, one pair: does it run?")
    parser.add_argument("--only", default="a,b,c", help="cases, as in a,c")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--one-step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_step:
        one_step(args.one_step, str(args.reference))
        return
    torch.set_num_threads(1)
    cases = args.only.split(",")
    for case in cases:
        if case not in AIMS:
            parser.error(f"no case {case!r}; there are {', '.join(AIMS)}")
    count = 1 if args.quick else args.pairs
    found: dict[str, Any] = {"benchmark": "tokenizers", "threads": 1, "load": round(os.getloadavg()[0], 1)}
    if "a" in cases:
        if not args.quick:
            found["a_vit_b"] = encode_against_forward("4m", 224, 4, count)
        found["a_demo"] = encode_against_forward("demo", 128, 16, 3 * count)
    if "b" in cases and args.reference:
        size, batch = (64, 2) if args.quick else (224, 4)
        found["b"] = against_reference(args.reference, "vit_s" if args.quick else "vit_b", size, batch, count)
    elif "b" in cases:
        found["b"] = None
    if "c" in cases:
        found["c"] = quantizer_memory(args.reference)
    show(found)
    print(json.dumps(found))


def show(found: dict[str, Any]) -> None:
    table = Table("case", "ours", "other", "ratio", "min..max", "aim")
    titles = {
        "a_vit_b": "encode / encoder's forward, ViT-B",
        "a_demo": "encode / encoder's forward, demo's size",
        "b": "encode / the reference's inner loop",
        "c": "peak memory of a quantizer's step, other / ours",
    }
    for case, line in ((k, v) for k, v in found.items() if k in titles):
        aim = f"{AIMS[case[0]]:g}"
        if line is None:
            table.add_row(titles[case], "", "not measured", "", "", aim)
        elif case == "c":
            other = line.get("reference_peak_mib")
            sides = (f"{line['ours_peak_mib']} MiB", "not measured" if other is None else f"{other} MiB")
            table.add_row(titles[case], *sides, str(line.get("ratio", "")), "", aim)
        else:
            spread = f"{line['min']}..{line['max']}"
            sides = (f"{line['ours_ms']} ms", f"{line['other_ms']} ms")
            table.add_row(titles[case], *sides, str(line["ratio"]), spread, aim)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
