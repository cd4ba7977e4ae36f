"""What the training loader costs: `python benchmarks/loader.py [--reference DIR] [--litdata PYTHON] [--samples N] [--only a,b]`.

Synthetic tokens of the seven 4M modalities (uniform: the worst case for storage), one crop, in Arrow shards that stay in the page
cache. One thread on one core; figures are samples per second of that core's time unless a row says otherwise. Batches of 256
samples, 128 input and 128 target tokens, half RGB to all and half all to all (alpha 0.5). Ours have presence, redistribution, no
padding, and index lists for the heads.

(a) Masked batches against the reference's loader (``--reference``: a checkout of apple/ml-4m, by path), without repeats and with
    its four, and against the floor: the samples' rows copied in, a batch copied out, nothing else.
(b) The same against litData's plain reading (``--litdata``: a Python that has it), and with numba left out.
(c) By a background thread against in the process itself, wall clock, while nothing else is done with the batches.
(d) How much of what the model computes is real, with the seven modalities and under the mixture of 21.
(e) Bytes per sample of the token files, against their information.
(f) Resuming in mid-epoch among 12 million samples: from an open snapshot to the first batch.
(g) From an S3 endpoint on loopback, once the cache is warm, against the local folder.
(h) Anonymous memory over an epoch.
(i) Pixels: JPEG crops decoded for the patches that masks keep, against decoders alone: Pillow's, and the one that we use.

Sides take turns in alternating order; a ratio is the median of the pairs' ratios. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import simplejpeg
import torch
from loader_data import MOD21, SEVEN, S3Endpoint, information_bytes, make_dataset, mixture_21
from PIL import Image
from rich.console import Console
from rich.table import Table

from fourmill.shards.snapshot import Snapshot
from fourmill.train.batches import BatchMaker
from fourmill.train.loader import Loader
from fourmill.train.presets import ModelConfig, model_config
from fourmill.train_config import MixtureComponent, TrainConfig

HERE = Path(__file__).resolve().parent
MIXTURE = (
    MixtureComponent(input_alphas={"rgb": 1000.0}, default_input_alpha=0.0, default_alpha=0.5),
    MixtureComponent(default_alpha=0.5),
)
CONFIG = TrainConfig(steps=10**9, warmup_steps=0, batch_size=256, mixture=MIXTURE)
PAIRS, STEPS = 7, 60
EPOCH = 4 * STEPS  # of 60,000 samples; half a second
CC12M = 12_000_000


def model_of(snapshot: Any, config: TrainConfig = CONFIG) -> ModelConfig:
    return model_config(config, snapshot.modalities, snapshot.image_size)


def loader_of(snapshot: Any, config: TrainConfig = CONFIG, compiled: bool | None = None) -> Loader:
    loader = Loader([snapshot], model_of(snapshot, config), config)
    if compiled is not None:
        loader.maker = BatchMaker(loader.shards, loader.model, config, compiled)
    return loader


def rate(run: Callable[[], int], clock: Callable[[], float] = time.process_time) -> float:
    begin = clock()
    samples = run()
    return samples / (clock() - begin)


def pairs(
    ours: Callable[[], int], other: Callable[[], int], clock: Callable[[], float] = time.process_time
) -> Any:
    """Medians of both rates, and the median, least and highest ratio. Each runs once before."""
    ours(), other()
    found = []
    for turn in range(PAIRS):
        order = (ours, other) if turn % 2 == 0 else (other, ours)
        rates = {call: rate(call, clock) for call in order}
        found.append((rates[ours], rates[other]))
    ratios = sorted(a / b for a, b in found)
    return {
        "ours_per_s": round(median(a for a, _ in found)),
        "other_per_s": round(median(b for _, b in found)),
        "ratio": round(median(ratios), 3),
        "min": round(ratios[0], 3),
        "max": round(ratios[-1], 3),
    }


class Steps:
    """Reads some steps at each call, and goes on from there."""

    def __init__(self, loader: Loader, steps: int = STEPS) -> None:
        self.loader, self.steps, self.next = loader, steps, 0

    def __call__(self) -> int:
        for number in range(self.next, self.next + self.steps):
            self.loader.step(number)
        self.next += self.steps
        return self.steps * self.loader.config.batch_size


def floor(snapshot: Snapshot) -> Callable[[], int]:
    """Copies whole rows of all grids in and a batch out, shuffled. Sequences are left out: that flatters the floor."""
    columns = [snapshot.column(shard, name).tokens for name in SEVEN for shard in range(len(snapshot.shards))
               if snapshot.modalities[name].kind == "grid"]  # fmt: skip
    tables = [column.reshape(len(column), -1) for column in columns if column is not None]
    per_shard, grids = len(tables[0]), len(tables) // len(snapshot.shards)
    order = np.random.default_rng(0)
    batch = np.zeros(256 * 1294, np.uint8)
    room = np.zeros((grids, 256, tables[0].shape[1]), np.uint16)

    def run() -> int:
        for _ in range(STEPS):
            rows = order.integers(0, per_shard, 256)
            shard = int(order.integers(len(snapshot.shards)))
            for grid in range(grids):
                np.take(
                    tables[grid * len(snapshot.shards) + shard], rows, axis=0, out=room[grid], mode="clip"
                )
            batch.copy()
        return STEPS * 256

    return run


def peer(*command: str) -> dict[str, Any]:
    """The last line of what a peer's script prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def against_reference(snapshot: Snapshot, reference: Path | None, room: Path) -> dict[str, Any]:
    steady = Steps(loader_of(snapshot), EPOCH)  # called once before it counts: then all shards are open
    found: dict[str, Any] = {"a floor": {**pairs(steady, floor(snapshot)), "aim": 0.07}}
    script, tree = str(HERE / "loader_reference.py"), str(room / "tree")
    if reference is not None:
        subprocess.run([sys.executable, script, "--make", tree, "--samples", "4000"], check=True)
    for repeats, aim in ((1, 400), (4, 300)):
        name = f"a reference, {repeats} repeat{'s' * (repeats > 1)}"
        if reference is None:
            found[name] = {"aim": aim}
            continue
        ours, theirs, shares = [], [], {}
        for _ in range(3):  # it takes minutes
            arguments = [
                "--reference",
                str(reference),
                "--data",
                tree,
                "--batches",
                "8",
                "--repeats",
                str(repeats),
            ]
            shares = peer(sys.executable, script, *arguments)
            theirs.append(shares["samples_per_cpu_s"])
            ours.append(rate(steady))
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        found[name] = {
            "ours_per_s": round(median(ours)), "other_per_s": round(median(theirs), 1), "ratio": round(median(ratios), 1),
            "min": round(ratios[0], 1), "max": round(ratios[-1], 1), "aim": aim, "reference": shares,
        }  # fmt: skip
    return found


def against_others(snapshot: Snapshot, litdata: str | None, room: Path) -> dict[str, Any]:
    plain = loader_of(snapshot, compiled=False)
    found: dict[str, Any] = {"b without numba": pairs(Steps(loader_of(snapshot)), Steps(plain, 4))}
    layouts = {"b litData, arrays (1, n)": ["--by-crop"], "b litData, arrays (n,)": []}
    if litdata is None:
        return {**found, **{name: {"aim": 12} for name in layouts}}
    script, tokens = str(HERE / "loader_litdata.py"), str(room / "tokens.npz")
    arrays: dict[str, np.ndarray] = {}
    for name in SEVEN:
        column = snapshot.column(0, name)
        if column.tokens is not None:
            arrays[name] = column.tokens.reshape(len(column.tokens), -1)
        else:
            assert column.flat is not None and column.offsets is not None
            arrays[name], arrays[f"{name}.offsets"] = column.flat, column.offsets
    np.savez(tokens, **arrays)
    steady = Steps(loader_of(snapshot), EPOCH)
    steady()  # until all shards are open
    for number, (name, shape) in enumerate(layouts.items()):
        data = str(room / f"litdata-{number}")
        making = [litdata, script, "--make", data, "--samples", "5000", "--tokens", tokens, *shape]
        subprocess.run(making, check=True)
        reading = [litdata, script, "--data", data, "--rounds", "10"]
        theirs, ours = [], []
        for _ in range(3):
            theirs.append(peer(*reading)["samples_per_cpu_s"])
            ours.append(rate(steady))
        found[name] = {
            "ours_per_s": round(median(ours)),
            "other_per_s": round(median(theirs)),
            "ratio": round(median(a / b for a, b in zip(ours, theirs, strict=True)), 1),
            "aim": 12,
        }
    return found


def in_a_thread(snapshot: Snapshot) -> dict[str, Any]:
    steps = iter(loader_of(snapshot))

    def threaded() -> int:
        return sum(len(batch) for _ in range(EPOCH) for batch in next(steps))

    return {"c thread": {**pairs(threaded, Steps(loader_of(snapshot), EPOCH), time.perf_counter), "aim": 0.9}}


def real_share(snapshot: Snapshot, room: Path) -> dict[str, Any]:
    """Slots that the model computes and that hold a token; beside it, what padding to whole budgets would leave."""
    found: dict[str, Any] = {}
    for name, data, config in (
        ("7 modalities", snapshot, CONFIG),
        ("21 modalities", make_dataset(room / "many", 2000, MOD21), mixture_21(CONFIG)),
    ):
        loader = loader_of(data, config)
        batches = [batch for step in range(20) for batch in loader.step(step)]
        slots = sum(len(b.input_ids) + len(b.labels) for b in batches)
        tokens = sum(int(b.input_lengths.sum()) + int(b.target_lengths.sum()) for b in batches)
        rows = sum(len(b) * (b.input_width + b.target_width) for b in batches)
        fill = np.mean([loader.fill_of(batch) for batch in batches], axis=0)
        found[f"d {name}"] = {
            "ratio": round(tokens / slots, 4), "aim": 0.98, "in_rows_of_attention": round(tokens / rows, 4),
            "of_input_budget": round(float(fill[0]), 4), "of_target_budget": round(float(fill[1]), 4),
        }  # fmt: skip
    return found


def storage(snapshot: Snapshot) -> dict[str, Any]:
    root = Path(snapshot.dataset.url)
    files = (
        sum((root / ref.files[name]).stat().st_size for ref in snapshot.shards for name in SEVEN)
        / snapshot.rows
    )
    least = information_bytes(snapshot)
    return {"e bytes per sample": {"ours": round(files, 1), "least": round(least, 1), "ratio": round(files / least, 3),
                                   "at_most": 1.25}}  # fmt: skip


class Repeated:
    """A snapshot of 12 million samples: each shard of a small one stands for many."""

    def __init__(self, snapshot: Snapshot, samples: int) -> None:
        self.inner, self.copies = snapshot, samples // snapshot.rows
        self.shards = snapshot.shards * self.copies
        self.modalities, self.n_crops = snapshot.modalities, snapshot.n_crops
        self.digest, self.image_size = snapshot.digest, snapshot.image_size

    def split_sizes(self, split: str) -> np.ndarray:
        return np.tile(self.inner.split_sizes(split), self.copies)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)
        if not callable(method) or name == "tokenizer":
            return method
        return lambda shard, *rest: method(shard % len(self.inner.shards), *rest)

    def prefetch(self, shards: Any, names: Any) -> None:
        """Nothing is remote."""


def resume(snapshot: Snapshot) -> dict[str, Any]:
    """Milliseconds of wall time, medians of five; both positions."""
    large = Repeated(snapshot, CC12M)
    steps = CC12M // CONFIG.batch_size
    took: dict[int, list[float]] = {0: [], steps // 2: []}
    same = []
    for _ in range(5):
        for step, times in took.items():
            begin = time.perf_counter()
            first = loader_of(large).step(step)[0]
            times.append(1e3 * (time.perf_counter() - begin))
        same.append(first.to_bytes().numpy().tobytes())
    assert len(set(same)) == 1
    start, middle = (median(times) for times in took.values())
    return {
        "f resume at 6 of 12 million, ms": {
            "ours": round(middle, 1),
            "start_ms": round(start, 1),
            "at_most": 100,
        }
    }


def from_s3(snapshot: Snapshot, room: Path) -> dict[str, Any]:
    with S3Endpoint(Path(snapshot.dataset.url)) as url:
        remote = Snapshot.load(url, snapshot.digest).cached(1 << 34, str(room / "cache"))
        theirs, ours = Steps(loader_of(snapshot)), Steps(loader_of(remote))
        for _ in range(20):
            ours()  # warms the cache
        return {"g S3, warm cache": {**pairs(ours, theirs), "aim": 0.9}}


def memory(snapshot: Snapshot) -> dict[str, Any]:
    """MiB of anonymous memory (VmRSS less files), after a tenth and after ten tenths of an epoch."""

    def anonymous() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    loader = loader_of(snapshot)
    steps = snapshot.rows // CONFIG.batch_size
    found = []
    for step in range(steps):
        loader.step(step)
        if step in (steps // 10, steps - 1):
            found.append(anonymous())
    return {"h anonymous MiB": {"ours": round(found[1], 1), "after_a_tenth": round(found[0], 1),
                                "ratio": round(found[1] / found[0], 3), "at_most": 1.05}}  # fmt: skip


def pixels(room: Path) -> dict[str, Any]:
    config = CONFIG.model_copy(update={"mixture": (MixtureComponent(input_alphas={"rgb_pixels": 1000.0},
                                                                    default_input_alpha=0.0),)})  # fmt: skip
    snapshot = make_dataset(room / "pixels", 512, {**SEVEN, "rgb_pixels": ("pixels", 0, 196)})
    blobs = [bytes(snapshot.column(0, "rgb_pixels").cells(row)) for row in range(512)]

    def bare(decode: Callable[[bytes], Any]) -> Callable[[], int]:
        return lambda: sum(decode(blob) is not None for blob in blobs)

    decoders: dict[str, Callable[[bytes], Any]] = {
        "i pixels, Pillow": lambda blob: np.asarray(Image.open(io.BytesIO(blob))),
        "i pixels, simplejpeg": lambda blob: simplejpeg.decode_jpeg(blob, "RGB"),
    }
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    steps = Steps(loader_of(snapshot, config), 4)
    return {name: {**pairs(steps, bare(decode)), "aim": 0.9} for name, decode in decoders.items()}


def show(rows: dict[str, Any]) -> None:
    table = Table(title="the training loader, one core")
    for heading in ("case", "ours", "other", "ratio", "min..max", "aim"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for name, row in rows.items():
        aim = f">= {row['aim']}" if "aim" in row else f"<= {row['at_most']}" if "at_most" in row else ""
        ours = row.get("ours_per_s", row.get("ours"))
        other = row.get("other_per_s", row.get("least", row.get("after_a_tenth", row.get("start_ms"))))
        spread = f"{row['min']}..{row['max']}" if "min" in row else ""
        measured = "ratio" in row or "ours" in row
        cells = [f"{v:,}" if v is not None else "" for v in (ours, other, row.get("ratio"))]
        table.add_row(name, *(cells if measured else ["not measured", "", ""]), spread, aim)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, help="a checkout of apple/ml-4m")
    parser.add_argument("--litdata", help="a Python that has litdata")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--only", default="abcdefghi", help="letters of the cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        snapshot = make_dataset(room / "seven", options.samples, SEVEN)
        cases: dict[str, Callable[[], dict[str, Any]]] = {
            "a": lambda: against_reference(snapshot, options.reference, room),
            "b": lambda: against_others(snapshot, options.litdata, room),
            "c": lambda: in_a_thread(snapshot),
            "d": lambda: real_share(snapshot, room),
            "e": lambda: storage(snapshot),
            "f": lambda: resume(snapshot),
            "g": lambda: from_s3(snapshot, room),
            "h": lambda: memory(snapshot),
            "i": lambda: pixels(room),
        }
        for letter, case in cases.items():
            if letter in options.only:
                rows |= case()
    show(rows)
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    print(
        json.dumps(
            {"benchmark": "loader", "samples": options.samples, "load_before_and_after": loads, **rows}
        )
    )


if __name__ == "__main__":
    main()
