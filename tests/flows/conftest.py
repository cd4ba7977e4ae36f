"""One small dataset and one briefly trained model, built once and shared by the tests of the flow room."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch
from photographs import Photo, encoded, original, photographs
from small_builds import without_ray

from fourmill.config import Config, load_config
from fourmill.flows.build import build
from fourmill.flows.engine import ray_session
from fourmill.flows.resolve import resolve
from fourmill.seeds import key64, split_of
from fourmill.shards.dataset import Dataset
from fourmill.shards.snapshot import Snapshot
from fourmill.train.trainer import train_on
from fourmill.train_config import TrainConfig


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: the workers of pytest-xdist share what is built here."""
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_here(config: Config) -> None:
    """Build, without Ray; does nothing where it is done."""
    with without_ray():
        build(config)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all processes of this test session see."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if hasattr(request.config, "workerinput") else base
    folder = root / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray for all tests of this process: `build` uses the one that is there."""
    with ray_session(load_config("demo")):
        yield


@pytest.fixture(scope="session")
def built(shared_folder: Path) -> tuple[Config, str]:
    """The demo with 48 scenes in three shards, about a quarter of them held out: (configuration, dataset's URL)."""
    url = str(shared_folder / "demo")
    overrides = [f"dataset={url}", "source.count=48", "shard_size=16", "val_fraction=0.25"]
    config = load_config("demo", overrides)
    with _locked(shared_folder):
        build_here(config)
    return config, url


@pytest.fixture(scope="session")
def trained(built: tuple[Config, str], shared_folder: Path) -> Path:
    """The output folder of a training run of six steps on `built`, whose snapshot is the only one."""
    torch.set_num_threads(1)
    out = shared_folder / "model"
    with _locked(shared_folder):
        if not out.exists():
            train_on(register_snapshot(built[0]), out, _brief_training())
    return out


def register_snapshot(config: Config) -> Snapshot:
    """The snapshot of everything that the configuration asks for."""
    resolved = resolve(config)
    recipes = {name: recipe.short for name, recipe in resolved.token_recipes().items()}
    modalities = {name: wanted.modality for name, wanted in resolved.wanted.items()}
    tokenizers = {name: str(wanted.tokenizer)[:12] for name, wanted in resolved.wanted.items()}
    return Snapshot.create(Dataset(config.dataset), recipes, modalities, tokenizers, config.image_size)


def _brief_training() -> TrainConfig:
    return TrainConfig(
        steps=6, batch_size=8, lr=1e-3, warmup_steps=2, log_every=2, eval_every=3, device="cpu",
        num_input_tokens=64, num_target_tokens=64,
    )  # fmt: skip


@dataclass(frozen=True)
class Photographs:
    """A dataset of photographs. ``hostile`` is a held-out key full of markup, ``broken`` one without an image."""

    config: Config
    url: str
    hostile: str
    broken: str
    caption: str  # of the hostile one


@pytest.fixture(scope="session")
def photographed(shared_folder: Path) -> Photographs:
    """About ten photographs with demo tokenizers, no truth, and file names and captions that mean harm."""
    url, folder = str(shared_folder / "photographs"), shared_folder / "photos"
    hostile = next(k for k in (f"<script>alert({i})</script>" for i in count()) if _is_held_out(k))
    broken = "[bold]<img src=x onerror=alert(7)>"
    caption = '"><script>alert(8)</script> {{ 7 * 191 }} a cat'
    overrides = [
        f"dataset={url}",
        f"source={{kind: folder, path: {folder}}}",
        "shard_size=8",
        "val_fraction=0.5",
    ]
    config = load_config("demo", overrides)
    with _locked(shared_folder):
        if not folder.exists():
            chosen = [
                p for p in photographs() if p.name.startswith(("people", "animals", "broken", "coffee"))
            ]
            cat = encoded(original("chelsea.png"), "JPEG")
            _write_photos(folder, [*chosen, Photo(hostile, ".jpg", cat, caption), Photo(broken, ".jpg", b"")])
        build_here(config)
    return Photographs(config, url, hostile, broken, caption)


def _is_held_out(key: str) -> bool:
    return split_of(0, key64(key), 0.5) == "val"


def _write_photos(folder: Path, chosen: list[Photo]) -> None:
    for photo in chosen:
        target = folder / f"{photo.name}{photo.ending}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(photo.data)
        if photo.caption:
            (folder / f"{photo.name}.txt").write_text(photo.caption)
