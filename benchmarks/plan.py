"""Planning 12 million samples: `python benchmarks/plan.py [--shards 12000] [--modalities 21] [--folder /tmp]`.

Writes 12,000 receipts of samples and 252,000 of 21 modalities to a temporary folder, and plans: with everything in place, with
two modalities missing (alone, and with the estimate of `fourmill plan`), and as `status` does. Each is a process of its own, so
that its peak memory is; the caches of the file
system are warm, as they are in a run that follows another. The floor, in the same run, is a bare `os.scandir` of the same
folders. Prints a table and, as its last line, JSON. The target: under 3 s and 1 GB. The seconds of processor time say what a
measurement on a busy machine would be on an idle one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich import box
from rich.console import Console
from rich.table import Table

from fourmill.config import check_config
from fourmill.flows.build import BuildOptions
from fourmill.flows.plan import make_plan
from fourmill.flows.planning import plan_resolved
from fourmill.flows.resolve import Resolved, Wanted
from fourmill.flows.status import status
from fourmill.modality import SOURCE_MODALITIES
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Receipt, Recipe, receipt_name, sha256
from fourmill.shards.sources.base import RawSample, Row, Source

ROWS = 1000
MISSING = 2
TARGET_S, TARGET_MB = 3.0, 1000.0
DIGEST = sha256("a source that has not changed")


class Unchanged(Source):
    """A source whose listing is the one that the receipts speak of: no row of it is looked at."""

    options: ClassVar[Mapping[str, Any]] = {}

    def rows(self) -> Iterator[Row]:
        raise AssertionError("nothing has changed: no row is listed")

    def read(self, rows: Sequence[Row]) -> Iterator[RawSample | Exception]:
        raise AssertionError("planning reads no image")

    def digest(self) -> str:
        return DIGEST

    def identity(self) -> dict[str, Any]:
        return {"kind": "unchanged"}


def resolved(folder: Path, modalities: int) -> Resolved:
    """Modalities as a configuration would give them, without networks."""
    config = check_config(
        {"dataset": str(folder), "source": {"kind": "scenes"}, "shard_size": ROWS, "modalities": {"rgb": {}}},
        "benchmark",
    )
    wanted = {}
    for index in range(modalities):
        name = f"modality{index:02d}"
        recipe = Recipe("label", {"labeler": name, "version": 1, "weights": sha256(name)})
        wanted[name] = Wanted(
            name=name, modality=SOURCE_MODALITIES["rgb"], labeler=None, settings=None, label_recipe=recipe,
            crop_rule={"version": 1, "n_crops": 1, "image_size": 224}, keep_labels=False, batch_size=None,
            upstream=(), sees_crops=False, needs_truth=False, tokenizer=sha256(f"tokenizer {name}"),
        )  # fmt: skip
    return Resolved(config, Unchanged(), wanted)


def write_receipts(wanted: Resolved, shards: int) -> None:
    """What a finished build leaves, but for its data files, which a plan does not look at."""
    dataset = Dataset.create(wanted.config.dataset, wanted.identity)
    columns = {SAMPLES: wanted.samples_recipe, **wanted.token_recipes()}
    for column, recipe in columns.items():
        folder = Path(dataset.store.root) / "receipts" / column / recipe.short
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text(recipe.text)
        for shard in range(shards):
            receipt = make_receipt(dataset, column, recipe, shard, shards)
            path = Path(dataset.store.root) / receipt_name(column, recipe.short, shard)
            path.write_text(receipt.to_json())
    recipes = {name: {"kind": r.kind, **r.content} for name, r in wanted.token_recipes().items()}
    run = {"recipes": recipes, "shards": {str(shard): ROWS for shard in range(shards)}}
    dataset.store.put("runs/20260101T000000.yaml", json.dumps(run).encode())


def make_receipt(dataset: Dataset, column: str, recipe: Recipe, shard: int, shards: int) -> Receipt:
    content = sha256(f"{column} {shard}")
    return Receipt(
        column=column,
        recipe=recipe.hash,
        shard=shard,
        rows=ROWS,
        absent={},
        presence="////" * 41 + "/w==",
        keys=sha256(str(shard)),
        file=f"tokens/{column}/shard-{shard:06d}.{content[:12]}.arrow",
        sha256=content,
        bytes=400_000,
        dataset=dataset.digest,
        source={"digest": DIGEST, "rows_total": ROWS * shards} if column == SAMPLES else {},
        provenance={"labeler": column, "model": f"somebody/{column}", "weights": sha256(column)},
        environment={
            "fourmill": "0.1",
            "python": "3.11",
            "torch": "2.13",
            "device": "NVIDIA A100",
            "batch_size": 64,
        },
        timings={"read": 1.2345, "decode": 3.4567, "wait": 0.1234, "forward": 9.8765, "write": 0.0123},
    )


def measure(what: str, folder: Path, modalities: int) -> dict[str, float]:
    """Seconds of one kind of work in this process, and its peak memory."""
    wanted = resolved(folder, modalities)
    began, spent = time.perf_counter(), time.process_time()
    if what == "scan":
        found = sum(_scan(folder / "receipts"))
    elif what == "command":
        found = plan_resolved(wanted, BuildOptions()).forecast.shards
    elif what == "status":
        found = status(Dataset(str(folder))).shards
    else:
        found = len(make_plan(wanted, Dataset(str(folder))).jobs)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - spent,
        "found": found,
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _scan(folder: Path) -> Iterator[int]:
    """One per file below a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _scan(Path(entry.path))
            else:
                yield 1


def measured(what: str, folder: Path, modalities: int, cache: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--measure",
        what,
        "--folder",
        str(folder),
        "--modalities",
        str(modalities),
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(shards: int, modalities: int, parent: str | None, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder, cache = Path(temporary) / "dataset", Path(temporary) / "cache"
        began = time.perf_counter()
        write_receipts(resolved(folder, modalities), shards)
        results: dict[str, Any] = {
            "shards": shards,
            "receipts": shards * modalities,
            "written_s": round(time.perf_counter() - began, 1),
        }
        once = {"first": ("first plan, nothing cached", "plan", modalities)}
        by_turns = {
            "scan": ("floor: os.scandir of the receipts", "scan", modalities),
            "done": ("plan, everything in place", "plan", modalities),
            "missing": (f"plan, {MISSING} modalities missing", "plan", modalities + MISSING),
            "command": (
                "the same as `fourmill plan` does, with its estimate",
                "command",
                modalities + MISSING,
            ),
        }
        status_once = {"first_status": ("first status, samples cached", "status", modalities)}
        status_again = {"status": ("status", "status", modalities)}
        table = Table("", "s", "s, best", "s, worst", "cpu s", "peak MB", "found", box=box.SIMPLE_HEAD)
        for steps, times in ((once, 1), (by_turns, repeats), (status_once, 1), (status_again, 3)):
            taken: dict[str, list[dict[str, float]]] = {key: [] for key in steps}
            for _ in range(times):
                for key, (_, what, wanted) in steps.items():
                    taken[key].append(measured(what, folder, wanted, cache))
            for key, (title, *_) in steps.items():
                ordered = sorted(taken[key], key=lambda one: one["seconds"])
                best, worst = ordered[0], ordered[-1]
                middle = ordered[len(ordered) // 2]
                results[key] = {k: round(v, 3) for k, v in {**middle, "best_s": best["seconds"]}.items()}
                seconds = (middle["seconds"], best["seconds"], worst["seconds"], middle["cpu_s"])
                table.add_row(
                    title, *(f"{s:.2f}" for s in seconds), f"{middle['mb']:.0f}", f"{middle['found']:.0f}"
                )
    Console().print(table)
    kept = all(
        results[k]["seconds"] < TARGET_S and results[k]["mb"] < TARGET_MB
        for k in ("done", "missing", "command")
    )
    return {**results, "target_s": TARGET_S, "target_mb": TARGET_MB, "kept": kept}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=12_000)
    parser.add_argument("--modalities", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the temporary folder is made, or is")
    parser.add_argument("--measure", choices=("scan", "plan", "command", "status"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, Path(options.folder), options.modalities)))
    else:
        print(json.dumps(run(options.shards, options.modalities, options.folder, options.repeats)))
