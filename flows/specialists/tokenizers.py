"""Fits the tokenizers that ship with fourmill, on the ground truth of scenes.

    python -m fourmill.flows.specialists.tokenizers depth

rgb, depth, normal and semseg are fitted on the truth itself, clip on what the shipped CLIP labeler says of the same
images; caption and det share one vocabulary. Held-out figures (scenes of another seed) go into each card.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from fourmill.flows.specialists.pool import HELD_OUT_SEED, TRAIN_SEED, Progress
from fourmill.labelers.base import LabelBatch, LabelerSettings, labelers
from fourmill.modality import SOURCE_MODALITIES, Modality
from fourmill.shards.sources.scenes import DET_CLASSES, SCENE_CLASSES, VERSION, render
from fourmill.tokenize.fit import fit_codec

SIZE = 128
TRAIN_COUNT, HELD_OUT_COUNT = 6_000, 2_000
CAPTION_COUNT = 3_000
MODALITIES = ("rgb", "depth", "normal", "semseg", "clip", "caption", "det")
#: Optimiser steps of the fits that ship; about 8 a second on a core of its own.
STEPS = {"rgb": 4500, "depth": 1500, "normal": 1200, "semseg": 800, "clip": 1200}
OPTIONS: dict[str, Any] = {"preset": "demo", "batch_size": 16, "learning_rate": 2e-3}

_STORED: dict[str, tuple[str, tuple[int, ...]]] = {
    "image": ("uint8", (SIZE, SIZE, 3)),
    "depth": ("float16", (SIZE, SIZE)),
    "normal": ("float16", (SIZE, SIZE, 3)),
    "semseg": ("uint8", (SIZE, SIZE)),
}


def modality_of(name: str) -> Modality:
    """The modality as a dataset of scenes resolves it."""
    if name in SOURCE_MODALITIES:
        return SOURCE_MODALITIES[name]
    modality = labelers.get(name).modality
    classes = {"semseg": SCENE_CLASSES, "det": DET_CLASSES}.get(name, ())
    return modality.with_classes(classes)


def truth_maps(name: str, seed: int, count: int, cache: Path | None = None) -> np.ndarray:
    """(count, 128, 128[, C]) of scenes 0 to ``count`` - 1, memory-mapped: image, depth, normal or semseg.

    All four are written by one rendering, in a folder named after what determines them and put in place whole.
    """
    root = cache or Path(tempfile.gettempdir()) / "fourmill-scenes"
    folder = root / f"maps-v{VERSION}-seed{seed}-{SIZE}px-{count}"
    if not folder.is_dir():
        part = Path(tempfile.mkdtemp(dir=_made(root), prefix=".maps-"))
        _render(part, seed, count)
        try:
            part.rename(folder)
        except OSError:  # another process was first; its maps are the same
            shutil.rmtree(part)
    return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _render(folder: Path, seed: int, count: int) -> None:
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *shape))
        for name, (dtype, shape) in _STORED.items()
    }
    clock = Progress("render", count)
    for index in range(count):
        scene = render(seed, index, SIZE)
        for name, array in arrays.items():
            array[index] = getattr(scene, name)
        clock.tick(index + 1)
    for array in arrays.values():
        array.flush()


def clip_features(images: np.ndarray) -> np.ndarray:
    """(N, h, w, C) float16: what the shipped CLIP labeler says of the images."""
    labeler = labelers.get("clip")(LabelerSettings("clip", image_size=SIZE))
    labeler.load()
    parts, clock = [], Progress("clip", len(images))
    for start in range(0, len(images), 64):
        frames = list(images[start : start + 64])
        keys = [str(start + i) for i in range(len(frames))]
        present = np.ones(len(frames), dtype=bool)
        batch = LabelBatch(keys=keys, frames=frames, present=present, crops=np.stack(frames)[:, None])
        parts.append(np.stack(labeler.label(batch)).astype(np.float16))
        clock.tick(start + len(frames))
    return np.concatenate(parts)


def labels_of(name: str, seed: int, count: int) -> list[np.ndarray]:
    """Labels of a grid modality for scenes 0 to ``count`` - 1."""
    if name == "clip":
        return list(clip_features(truth_maps("image", seed, count)))
    return list(truth_maps("image" if name == "rgb" else name, seed, count))


def fit(
    name: str, out: Path, count: int, options: dict[str, Any], say: Callable[[str], None] = print
) -> Path:
    """Fit one tokenizer into the folder ``out`` and say how good it is."""
    modality = modality_of(name)
    if modality.codec == "vqvae":
        train, held_out = labels_of(name, TRAIN_SEED, count), labels_of(name, HELD_OUT_SEED, HELD_OUT_COUNT)
    else:
        train, held_out = [], []
        captions = [render(TRAIN_SEED, index, 64).caption for index in range(CAPTION_COUNT)]
        classes = sorted({*SCENE_CLASSES, *DET_CLASSES})
        options = {**options, "vocabulary_captions": captions, "vocabulary_classes": classes}
    clock = Progress(name, 1.0, say=say)

    def report(step: int, total: int, figures: dict[str, Any]) -> None:
        clock.total = total
        clock.tick(step, json.dumps({key: round(value, 4) for key, value in figures.items()}))

    fit_codec(modality, train, held_out, image_size=SIZE, options=options, out=out, progress=report)
    card = yaml.safe_load((out / "card.yaml").read_text())
    card["license"] = "Apache-2.0"
    card["data"] = (
        f"scenes version {VERSION} at {SIZE} px: seed {TRAIN_SEED} to fit, seed {HELD_OUT_SEED} held out"
    )
    (out / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False, width=110))
    say((out / "card.yaml").read_text())
    return out


def main(
    modality: Annotated[str, typer.Argument(help=f"one of {', '.join(MODALITIES)}")],
    minutes: Annotated[
        float, typer.Option(help="wall-clock limit of the fit; 0: by steps alone, and so reproducible")
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="optimiser steps; 0: as many as the shipped one had")] = 0,
    scenes: Annotated[int, typer.Option(help="scenes to fit on")] = TRAIN_COUNT,
    out: Annotated[Path | None, typer.Option(help="folder; default: where shipped tokenizers live")] = None,
) -> None:
    """Fit one of the tokenizers that ship with fourmill."""
    if modality not in MODALITIES:
        raise typer.BadParameter(f"{modality!r} is not one of {', '.join(MODALITIES)}")
    torch.set_num_threads(1)
    shipped = Path(__file__).resolve().parents[2] / "tokenize" / "fitted" / "scenes" / modality
    options = {**OPTIONS, "minutes": minutes, "steps": steps or STEPS.get(modality, 0)}
    fit(modality, out or shipped, scenes, options)


if __name__ == "__main__":
    typer.run(main)
