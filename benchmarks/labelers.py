"""Labelers against `transformers.pipeline` and the bare network: `python benchmarks/labelers.py [--only depth,semseg] [--quick]`.

Every architecture of `full_size.py` with random weights, and the networks that ship, each in a process of its own:

  label     images/s of `Labeler.label`, from uint8 frames to labels on the host
  pipeline  images/s of `transformers.pipeline` for the same task, checkpoint, images and batch size, with the image processor that
            works without torchvision. It gives Python objects (masks by class, pictures), we arrays. Aim: never slower
  bare      images/s of the network alone on ready tensors. Aim on a GPU: at least 0.9
  pre+post  milliseconds per image outside of the network, in three settings: a 224 px crop through a network that sees 224 px
            (aim on a CPU: 15); the same crop at the network's published size; a photograph of 256 x 341 px there
  peak MB   resident memory of the process at its most before the pipeline is there

Images are rendered scenes, square, of 224 px. Sides take turns in alternating order; rates are medians, ratios the medians of the
pairs' ratios. On a CPU one thread does everything and its processor time is what counts, so that other processes disturb less;
on a GPU it is the clock on the wall, and frames are resized on the device. UPerNet's bare network computes a second head and enlarges
150 maps, which `label` leaves out. The last line is JSON.
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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are there
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import full_size
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from fourmill.checkpoints import shipped_folder
from fourmill.labelers.base import LabelBatch, LabelerSettings, labelers
from fourmill.shards.sources.scenes import render

SHIPPED = ("depth", "normal", "semseg", "det", "clip")
TASKS = {
    "depth": "depth-estimation",
    "semseg": "image-segmentation",
    "det": "object-detection",
    "clip": "image-feature-extraction",
}
QUICK = (*(f"shipped:{name}" for name in SHIPPED), "segformer-b0")
CROP, PHOTO = (224, 224), (256, 341)
AIM_MS = 15
REPEATS = 7  # of pre- and post-processing


def cases() -> dict[str, str]:
    """Name -> labeler."""
    full = {name: one.labeler for name, one in full_size.ARCHITECTURES.items()}
    return {**{f"shipped:{name}": name for name in SHIPPED}, **full}


def frames(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """uint8 (H, W, 3)"""
    pictures = (Image.fromarray(render(7, index, 128).image) for index in range(count))
    return [np.array(one.resize(size[::-1], Image.Resampling.BICUBIC)) for one in pictures]


def as_batch(images: Sequence[np.ndarray]) -> LabelBatch:
    keys, present = [str(index) for index in range(len(images))], np.ones(len(images), bool)
    square = images[0].shape[0] == images[0].shape[1]
    return LabelBatch(
        keys=keys, frames=images, present=present, crops=np.stack(images)[:, None] if square else None
    )


class Case:
    """One labeler, its pipeline and its bare network, in this process."""

    def __init__(self, name: str, folder: Path, device: str, precision: str, batch: int) -> None:
        self.name, self.folder, self.device, self.batch = name, folder, device, batch
        self.labeler_name = cases()[name]
        options = {"resize": "device"} if device == "cuda" else {}
        made = labelers.get(self.labeler_name)(
            LabelerSettings(
                self.labeler_name, str(folder), precision=precision, device=device, options=options
            )
        )
        made.load()
        self.labeler: Any = made
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.images = frames(batch, CROP)
        self.pipeline, self.why = None, ""
        self.pipeline_batch = batch

    def load_pipeline(self) -> None:
        """Or say why there is none."""
        if self.labeler_name not in TASKS:
            self.why = "no pipeline for normals"
            return
        import transformers as hf

        content = json.loads((self.folder / "preprocessor_config.json").read_text())
        kind = content.get("image_processor_type", "").removesuffix("Fast").removesuffix("Pil") + "Pil"
        if not hasattr(hf, kind):
            self.why = f"transformers has no {kind}"
            return
        processor = getattr(hf, kind).from_pretrained(self.folder)
        model: Any = str(self.folder)
        if self.labeler_name == "clip":  # of a whole CLIP the pipeline would ask for texts
            model = hf.CLIPVisionModel.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.pipeline = hf.pipeline(
            TASKS[self.labeler_name],
            model=model,
            image_processor=processor,
            device=0 if self.device == "cuda" else -1,
            dtype=torch.float32,
        )
        try:
            self.pipe()
        except IndexError:  # of RT-DETR's output in transformers 5.23, in batches
            self.pipeline_batch = 1

    # -- what is timed ---------------------------------------------------------------------------------

    def label(self) -> Any:
        return self.labeler.label(as_batch(self.images))

    def pipe(self) -> Any:
        assert self.pipeline is not None
        more = {"return_tensors": True} if self.labeler_name == "clip" else {}
        pictures = [Image.fromarray(image) for image in self.images]
        with torch.inference_mode(), self._cast():
            return self.pipeline(pictures, batch_size=self.pipeline_batch, **more)

    def bare(self) -> Callable[[], Any]:
        network = self.labeler.network if self.pipeline is None else self.pipeline.model
        with torch.inference_mode():
            values = self.labeler.normalise(self.labeler.canvas(self.images)[0])

        def forward() -> Any:
            with torch.inference_mode(), self._cast():
                return network(pixel_values=values)

        return forward

    def _cast(self) -> Any:
        return torch.autocast(self.device, dtype=self.dtype) if self.dtype else nullcontext()

    def around(self, size: tuple[int, int], side: int | None = None) -> float:
        """Milliseconds per image before and after the network, of which ``side`` is the input's."""
        labeler, images = self.labeler, frames(2, size)
        usual, labeler.side = labeler.side, side or labeler.side
        more = {"interpolate_pos_encoding": labeler._resized} if self.labeler_name == "clip" else {}
        try:
            with torch.inference_mode():
                output = labeler.run(labeler.canvas(images)[0], **more)

                def once() -> None:
                    canvas, placements = labeler.canvas(images)
                    labeler.normalise(canvas)
                    labeler.read(output, placements)
                    labeler.take_notes()

                once()
                return median(self.seconds(once) for _ in range(REPEATS)) / len(images) * 1e3
        finally:
            labeler.side = usual

    def seconds(self, run: Callable[[], Any]) -> float:
        if self.device == "cpu":
            start = time.process_time()
            run()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def measure(self, pairs: int) -> dict[str, Any]:
        self.label()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.load_pipeline()
        sides: dict[str, Callable[[], Any]] = {"label": self.label, "bare": self.bare()}
        if self.pipeline is not None:
            sides["pipeline"] = self.pipe
        taken: dict[str, list[float]] = {side: [] for side in sides}
        sides["bare"]()  # the first time is another, as it was for the other two
        for number in range(pairs):
            for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
                taken[side].append(self.seconds(sides[side]))
        found: dict[str, Any] = {"batch": self.batch, "pairs": pairs, "side": self.labeler.side}
        found["pipeline_batch"] = self.pipeline_batch if self.pipeline is not None else None
        found["million"] = round(sum(one.numel() for one in self.labeler.network.parameters()) / 1e6, 1)
        for side in ("label", "pipeline", "bare"):
            found[f"{side}_per_s"] = round(self.batch / median(taken[side]), 3) if side in taken else None
        for side in ("pipeline", "bare"):
            ratios = [b / a for a, b in zip(taken["label"], taken.get(side, []), strict=False)]
            found[f"vs_{side}"] = round(median(ratios), 3) if ratios else self.why
        found["peak_mb"] = round(peak)
        return found | {"pre_post_ms": self.pre_post()}

    def pre_post(self) -> dict[str, float]:
        own = self.labeler.side
        found = {"own size": self.around(CROP)}
        if own >= CROP[0]:
            found["at 224"] = found["own size"] if own == CROP[0] else self.around(CROP, CROP[0])
        if self.labeler_name != "clip":
            found["photo"] = self.around(PHOTO)
        return {name: round(value, 1) for name, value in found.items()}


# -- all of them --------------------------------------------------------------------------------------


def run_case(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, so that its peak memory is."""
    where = shipped_folder(name.removeprefix("shipped:")) if name.startswith("shipped:") else folder / name
    if not where.exists():
        # in another process: what one had in memory counts as the peak of those that it starts
        subprocess.run([sys.executable, full_size.__file__, str(folder), name], check=True)
    shipped = name.startswith("shipped:")
    gpu = options.device == "cuda"
    batch = options.batch or (32 if gpu else 16 if shipped else 1)
    pairs = options.pairs + 4 * shipped
    command = [sys.executable, __file__, "--case", name, "--folder", str(where), "--device", options.device]
    command += ["--precision", options.precision, "--batch", str(batch), "--pairs", str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def print_table(results: dict[str, dict[str, Any]]) -> None:
    table = Table()
    table.add_column("network", no_wrap=True)
    for column in (
        "M", "px", "batch", "label /s", "pipeline /s", "bare /s", "vs pipeline", "vs bare", "at 224", "own size", "photo",
        "peak MB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for name, found in results.items():
        rates = (found[f"{side}_per_s"] for side in ("label", "pipeline", "bare"))
        around = found["pre_post_ms"]
        table.add_row(
            name, f"{found['million']}", f"{found['side']}", f"{found['batch']}",
            *("-" if rate is None else f"{rate:.3g}" for rate in rates), *map(_shown, (found["vs_pipeline"], found["vs_bare"])),
            *(_shown(around.get(one)) for one in ("at 224", "own size", "photo")), f"{found['peak_mb']}",
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    console.print("at 224, own size, photo: pre- and post-processing, ms per image")
    for name, found in results.items():
        if isinstance(found["vs_pipeline"], str):
            console.print(f"{name}: pipeline not measured: {found['vs_pipeline']}")
        elif found["pipeline_batch"] != found["batch"]:
            console.print(f"{name}: the pipeline takes image by image, it fails on batches of this network")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="labelers or networks, such as depth,clip-vit-base-patch16"
    )
    parser.add_argument(
        "--pairs", type=int, default=9, help="of the full-size networks; four more of small ones"
    )
    parser.add_argument(
        "--batch", type=int, help="default on a CPU: 1, and 16 of the small networks; on a GPU 32"
    )
    parser.add_argument("--quick", action="store_true", help="what ships, and the smallest full-size network")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--folder", type=Path, help="keeps the full-size checkpoints, 1.3 GB (default: temporary)"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        case = Case(options.case, options.folder, options.device, options.precision, options.batch)
        print(json.dumps(case.measure(options.pairs)))
        return
    chosen = options.only.split(",") if options.only else list(QUICK if options.quick else cases())
    names = [name for name, labeler in cases().items() if name in chosen or labeler in chosen]
    known = {*cases(), *cases().values()}
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--only: no labeler or network {unknown[0]!r}; there are {', '.join(sorted(known))}")
    load = os.getloadavg()[0]
    results = {}
    with tempfile.TemporaryDirectory(prefix="fourmill-bench-") as temporary:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = run_case(name, options.folder or Path(temporary), options)
    print_table(results)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread"
    said = {"device": device, "clock": "wall" if options.device == "cuda" else "processor time of one thread"}
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    print(
        json.dumps(
            {
                "benchmark": "labelers", **said, "precision": options.precision, "aim_ms": AIM_MS,
                "load_before_and_after": loads, **results,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
