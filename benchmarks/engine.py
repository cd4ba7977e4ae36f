"""The engine against what one would write without one: `python benchmarks/engine.py [--only a,b,c] [--pairs 7] [--quick]`.

(a) Networks that only wait, 20 ms per image, as a GPU would while the CPU is free: two, in an actor each. Against the
    rate that the waits allow, 50 images/s. The run is cut into as many windows as there are pairs.
(b) The networks and tokenizers that ship (depth, normal, semseg, det, clip) on JPEG files of 128 px scenes. Against a bare
    loop in as many processes, of one thread each, that reads, decodes and calls the same labelers and codecs on batches of the same
    size, and does nothing else: no crops (those of a square image are the image), no checks, no shards, nothing written.
(c) Trivial networks, five modalities of 256 tokens, 512 px JPEG files in a decode frame of 512 px: the engine itself is
    the cost. Against (c1) a chain of Ray Data's `map_batches` of the same stages, and (c2) one pass per modality, in which a bare
    loop decodes again for each modality and writes a .npy file per row. All write all tokens; only the engine commits.

What counts: (a), (b) images between two moments at which a labeler begins a batch: the first, and one so near the end that
every process still has work. (c) all images, from the first batch that a labeler begins until the last receipt (of a loop: its end;
of the chain: its last file). So starting processes, Ray and actors, loading networks, planning and decoding the first batch
count on no side. Sides take turns, in alternating order; the ratio is the median of the pairs' ratios. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is there, and for all processes that follow

import numpy as np
from engine_bare import BareLoops, bare_loops
from engine_chain import run_chain
from engine_labelers import TRIVIAL, WAIT_S, WAITING, RoundCodec, notes
from PIL import Image
from rich.console import Console
from rich.table import Table

from fourmill.config import Config, check_config
from fourmill.flows.build import build
from fourmill.labelers.base import LabelerSettings, labelers
from fourmill.shards.sources.scenes import render

ENTRY_POINTS = "[fourmill.labelers]\nbench_depth = engine_labelers:TracedDepth\n"
SHIPPED = ("depth", "normal", "semseg", "det", "clip")


@dataclass(frozen=True)
class Sizes:
    """Images per run of each side (a: per window); the engine's shards have ``shard`` rows (c: ``shard_c``)."""

    pairs: int = 7
    a: int = 128
    b: int = 320
    engine: int = 4096  # of c, as are the next two: each side runs for some seconds
    chain: int = 512
    passes: int = 384
    shard: int = 128
    shard_c: int = 512  # half the default: a commit's share of a row's cost is what it is in a real dataset


QUICK = Sizes(pairs=1, a=32, b=48, engine=64, chain=64, passes=64, shard=32, shard_c=32)
BATCH = {"a": 16, "b": 8, "c": 16}  # micro-batches; b's take a second


@dataclass
class Row:
    """One line of the result: images/s of both sides by pair."""

    name: str
    against: str
    aim: float
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def summary(self) -> dict[str, Any]:
        ratios = self.ratios()
        return {
            "engine_per_s": round(median(self.ours), 1),
            "other_per_s": round(median(self.theirs), 1),
            "ratio": round(median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
            "aim": self.aim,
            "pairs": len(ratios),
        }


class Bench:
    """A folder for everything, and the number of cores that both sides use."""

    def __init__(self, root: Path, sizes: Sizes) -> None:
        self.root, self.sizes = root, sizes
        self.cores = len(os.sched_getaffinity(0))
        self._runs = 0

    def fresh(self, name: str) -> Path:
        self._runs += 1
        folder = self.root / f"{name}-{self._runs}"
        folder.mkdir()
        return folder

    def config(
        self,
        images: Path,
        side: int,
        modalities: dict[str, Any],
        batch: int,
        shard: int | None = None,
        **engine: Any,
    ) -> Config:
        content = {
            "dataset": str(self.root / "none"),
            "source": {"kind": "folder", "path": str(images)},
            "shard_size": shard or self.sizes.shard,
            "decode": {"shorter_side": side},
            "image_size": 128,
            "modalities": modalities,
            "engine": {"device": "cpu", "batch_size": batch, **engine},
        }
        return check_config(content, "benchmark")

    def trivial(self, name: str) -> dict[str, Any]:
        """One of our own modalities, with its tokenizer given."""
        folder = self.root / "tokenizers" / name
        if not folder.exists():
            modality = labelers.get(name)(LabelerSettings(name)).describe()
            RoundCodec(modality, 128).save(folder)
        return {"tokenizer": {"model": str(folder)}}

    def engine(self, config: Config, traced: Sequence[str]) -> tuple[Path, float]:
        """Build a fresh dataset. Where labelers of ``traced`` noted their batches; when the last receipt was there."""
        folder, trace = self.fresh("dataset"), self.fresh("trace")
        with contextlib.redirect_stdout(io.StringIO()):
            build(_changed(config, folder / "ds", trace, traced))
        end = max(path.stat().st_mtime for path in (folder / "ds" / "receipts").rglob("shard-*.json"))
        shutil.rmtree(folder)
        return trace, end

    def chain(self, config: Config, traced: str) -> tuple[Path, float]:
        out, trace = self.fresh("out"), self.fresh("trace")
        end = run_chain(_changed(config, out, trace, [traced]), out)
        shutil.rmtree(out)
        return trace, end

    def loops(self, loops: BareLoops) -> tuple[Path, float]:
        out, trace = self.fresh("out"), self.fresh("trace")
        end = loops.run(out, trace)
        shutil.rmtree(out)
        return trace, end


def _changed(config: Config, dataset: Path, trace: Path, traced: Sequence[str]) -> Config:
    content = config.model_dump()
    content["dataset"] = str(dataset)
    for name in traced:
        content["modalities"][name]["trace"] = str(trace)
    return check_config(content, "benchmark")


def rate(images: int, trace: Path, end: float) -> float:
    """Images/s from the first batch to the end."""
    return images / (end - notes(trace)[0][0])


def steady_rate(images: int, batch: int, processes: int, trace: Path) -> float:
    """Images/s while every process has work: the last two batches of each are left out."""
    begun = [when for when, _ in notes(trace)]
    last = (images // batch // processes - 2) * processes
    return last * batch / (begun[last] - begun[0])


def case_a(bench: Bench) -> list[Row]:
    """Waiting networks, by windows of one run; of two actors the slower one counts."""
    sizes, size = bench.sizes, BATCH["a"]
    batches = sizes.a // size
    total = (sizes.pairs + 1) * batches + 1  # the first window is not counted: the pipeline fills
    images = write_images(bench.fresh("images"), total * size, 512)
    modalities = {name: bench.trivial(name) for name in WAITING}
    config = bench.config(images, 256, modalities, size, groups=[[name] for name in WAITING], replicas=1)
    trace, _ = bench.engine(config, WAITING)
    by_actor = [
        [float(line.split()[0]) for line in path.read_text().splitlines()] for path in trace.iterdir()
    ]
    row = Row("a  waiting networks", "what the waits allow", 0.95)
    for first in range(batches, total - batches, batches):
        spans = [times[first + batches] - times[first] for times in by_actor]
        row.ours.append(batches * size / max(spans))
        row.theirs.append(1 / WAIT_S)
    return [row]


def case_b(bench: Bench) -> list[Row]:
    count, size = bench.sizes.b, BATCH["b"]
    images = write_images(bench.fresh("images"), count, 128)
    modalities: dict[str, Any] = {n: {"tokenizer": {"model": f"shipped:scenes/{n}"}} for n in SHIPPED}
    modalities["depth"]["labeler"] = "bench_depth"
    config = bench.config(images, 128, modalities, size, replicas=bench.cores)
    row = Row("b  networks that ship", "bare loop", 0.85)

    def steady(trace: Path) -> float:
        return steady_rate(count, size, bench.cores, trace)

    with bare_loops(config, bench.cores, one_pass=True) as loops:
        for number in range(bench.sizes.pairs):
            ours = (row.ours, lambda: steady(bench.engine(config, ["depth"])[0]))
            theirs = (row.theirs, lambda: steady(bench.loops(loops)[0]))
            take_turns([ours, theirs], number)
    return [row]


def case_c(bench: Bench) -> list[Row]:
    sizes = bench.sizes
    modalities = {name: bench.trivial(name) for name in TRIVIAL}
    engine, chain, passes = (
        bench.config(
            write_images(bench.fresh("images"), count, 512),
            512,
            modalities,
            BATCH["c"],
            sizes.shard_c,
            replicas=bench.cores,
        )
        for count in (sizes.engine, sizes.chain, sizes.passes)
    )
    c1 = Row("c1 trivial networks", "Ray Data map_batches", 3.0)
    c2 = Row("c2 trivial networks", "one pass per modality", 3.0, ours=c1.ours)
    with bare_loops(passes, bench.cores, one_pass=False) as loops:
        for number in range(sizes.pairs):
            sides = [
                (c1.ours, lambda: rate(sizes.engine, *bench.engine(engine, TRIVIAL[:1]))),
                (c1.theirs, lambda: rate(sizes.chain, *bench.chain(chain, TRIVIAL[0]))),
                (c2.theirs, lambda: rate(sizes.passes, *bench.loops(loops))),
            ]
            take_turns(sides, number)
    return [c1, c2]


def take_turns(sides: Sequence[tuple[list[float], Callable[[], float]]], number: int) -> None:
    for rates, run in sides if number % 2 == 0 else reversed(sides):
        rates.append(run())


def write_images(folder: Path, count: int, side: int, distinct: int = 64) -> Path:
    """JPEG files of scenes; those larger than 128 px are enlarged and get the noise of a photograph (100 kB at 512 px)."""

    def one(index: int) -> None:
        image = Image.fromarray(render(7, index, 128).image)
        if side != 128:
            noise = np.random.default_rng(index).normal(0, 6, (side, side, 1))
            pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) + noise
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{index:06d}.jpg", quality=90)
        data = (folder / f"{index:06d}.jpg").read_bytes()
        for copy in range(index + distinct, count, distinct):
            (folder / f"{copy:06d}.jpg").write_bytes(data)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(min(distinct, count))))
    return folder


CASES: dict[str, Callable[[Bench], list[Row]]] = {"a": case_a, "b": case_b, "c": case_c}


@contextmanager
def session(root: Path) -> Iterator[None]:
    """One Ray for all runs, whose processes find our labelers as they would those of any other package."""
    info = root / "packages" / "engine_labelers-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-labelers\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    added = [str(info.parent), str(Path(__file__).resolve().parent)]
    sys.path[1:1] = added
    os.environ["PYTHONPATH"] = os.pathsep.join([*added, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    import ray

    # as `build` starts it, but for an object store in which the chain need not spill
    options = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    ray.init("local", include_dashboard=False, object_store_memory=2 << 30, **options)
    try:
        yield
    finally:
        ray.shutdown()


def print_table(rows: Sequence[Row]) -> None:
    table = Table()
    for name in ("case", "against"):
        table.add_column(name, no_wrap=True)
    for name in ("engine, images/s", "other, images/s", "ratio", "min..max", "aim"):
        table.add_column(name, justify="right")
    for row in rows:
        s = row.summary()
        table.add_row(
            row.name, row.against, f"{s['engine_per_s']:.1f}", f"{s['other_per_s']:.1f}", f"{s['ratio']:.2f}",
            f"{s['min']:.2f}..{s['max']:.2f}", f">= {row.aim:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="a,b,c", help="cases, such as a,c")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one pair of tiny runs, to see that all works")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := [name for name in chosen if name not in CASES]:
        parser.error(f"--only: no case {unknown[0]!r}; there are {', '.join(CASES)}")
    sizes = QUICK if arguments.quick else Sizes(pairs=arguments.pairs)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="fourmill-bench-") as name, session(Path(name)):
        bench = Bench(Path(name), sizes)
        rows = [row for case in chosen for row in CASES[case](bench)]
    print_table(rows)
    found = {row.name.split()[0]: {"against": row.against, **row.summary()} for row in rows}
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    print(json.dumps({"benchmark": "engine", "cores": bench.cores, "load_before_and_after": loads, **found}))


if __name__ == "__main__":
    main()
