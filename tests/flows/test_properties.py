"""However the work is cut and shared out, the dataset is the same: its keys, their order, and every byte."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_builds import (
    data_files,
    receipts,
    run_jobs_here,
    small_config,
    with_tokenizers,
    without_ray,
    write_images,
)

from fourmill.config import Config
from fourmill.flows.build import build
from fourmill.flows.engine import EngineReport
from fourmill.flows.plan import Plan
from fourmill.flows.resolve import Resolved
from fourmill.flows.status import status
from fourmill.labelers.base import LabelBatch, Labeler, labelers
from fourmill.labels import Label
from fourmill.modality import LabelContract, Modality
from fourmill.shards.dataset import Dataset
from fourmill.storage import Store

COUNT = 11


class Mood(Labeler):
    """Brightness; it cannot stand images whose corner is too bright, and says so by an exception."""

    modality: ClassVar[Modality] = Modality(
        name="mood", kind="grid", codec="vqvae", contract=LabelContract(form="map", dtype="float32")
    )

    def label(self, batch: LabelBatch) -> list[Label]:
        for frame, present in zip(batch.frames, batch.present, strict=True):
            if present and frame[0, 0].tolist() == [255, 0, 255]:
                raise ValueError("not in the mood")
        return [frame.mean(-1, dtype=np.float32) for frame in batch.frames]


class Echo(Labeler):
    modality: ClassVar[Modality] = Modality(
        name="echo", kind="grid", codec="vqvae", contract=LabelContract(form="map", dtype="float32")
    )
    inputs: ClassVar[tuple[str, ...]] = ("image", "label:mood")

    def label(self, batch: LabelBatch) -> list[Label]:
        return [255 - label for label in batch.upstream["mood"]]


MODALITIES: dict[str, Any] = {"caption": {}, "rgb_pixels": {}, "mood": {}, "echo": {}}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(labelers._known, "mood", Mood)
        patch.setitem(labelers._known, "echo", Echo)
        yield


@cache
def given_tokenizers() -> dict[str, Any]:
    root = Path(mkdtemp(prefix="fourmill-test-"))
    write_images(root / "photos", [f"{index:02d}.png" for index in range(8)])
    with without_ray():
        build(config_of(root / "ds", root / "photos", MODALITIES))
    return with_tokenizers(root / "ds", MODALITIES)


def config_of(url: Path, photos: Path, modalities: Mapping[str, Any], **changes: Any) -> Config:
    engine = {"batch_size": 4, "device": "cpu", "max_absent_rows": COUNT, **changes.pop("engine", {})}
    source = {"kind": "folder", "path": str(photos)}
    return small_config(url, modalities, source=source, engine=engine, **changes)


def photos_with(folder: Path, broken: Sequence[int], moody: Sequence[int]) -> Path:
    """Images of which some are no images, and some are what `Mood` cannot stand."""
    from PIL import Image

    write_images(folder, [f"{index:02d}.png" for index in range(COUNT)])
    for index in moody:
        with Image.open(folder / f"{index:02d}.png") as image:
            image.putpixel((0, 0), (255, 0, 255))
            image.save(folder / f"{index:02d}.png")
    for index in broken:
        (folder / f"{index:02d}.png").write_bytes(b"no image")
    return folder


def in_threads(count: int, order: Callable[[list[Any]], list[Any]]) -> Callable[..., EngineReport]:
    """An engine with that many runners, which take the jobs in another order."""

    def run_jobs(resolved: Resolved, plan: Plan, on_progress: Any) -> EngineReport:
        jobs = order(list(plan.jobs))
        parts = [
            Plan(plan.shards, plan.committed, plan.states, jobs[i::count], plan.listing) for i in range(count)
        ]
        with ThreadPoolExecutor(count) as pool:
            reports = list(
                pool.map(lambda part: run_jobs_here(resolved, part, lambda done, rows: None), parts)
            )
        total = reports[0]
        for report in reports[1:]:
            total.rows += report.rows
            total.parked |= report.parked
        return total

    return run_jobs


class Crash(BaseException):
    """Power off."""


@contextmanager
def crash_after(writes: int) -> Iterator[None]:
    """The store takes that many more writes, from all threads together."""
    left, lock = [writes], threading.Lock()
    original = Store.put_if_absent

    def call(store: Store, name: str, data: bytes) -> bool:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise Crash(name)
        return original(store, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "put_if_absent", call)
        yield


#: of the modalities; an echo needs a mood
subset = st.sets(st.sampled_from(sorted(MODALITIES)), min_size=1).map(
    lambda names: sorted(names | ({"mood"} if "echo" in names else set()))
)
rows = st.sets(st.integers(0, COUNT - 1), max_size=4).map(sorted)


@st.composite
def groupings(draw: st.DrawFn) -> list[list[str]]:
    """Modalities by the actor that hosts them; what is in no group shares the last one."""
    names = draw(st.permutations(sorted(MODALITIES)))
    cuts = sorted(draw(st.sets(st.integers(0, len(names)), max_size=2)))
    return [group for start, end in zip([0, *cuts], cuts, strict=False) if (group := names[start:end])]


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # examples take a second: shrinking them would take minutes
)  # fmt: skip
@given(
    shard_size=st.integers(1, COUNT + 1),
    broken=rows,
    moody=rows,
    workers=st.integers(1, 3),
    order=st.permutations(sorted(MODALITIES)),
    groups=groupings(),
    first=subset,
    kills=st.lists(st.integers(0, 40), max_size=2),
    turned=st.booleans(),
)
def test_the_dataset_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, shard_size: int, broken: list[int], moody: list[int], workers: int,
    order: list[str], groups: list[list[str]], first: list[str], kills: list[int], turned: bool,
) -> None:  # fmt: skip
    tokenizers = given_tokenizers()
    root = tmp_path_factory.mktemp("property")
    photos = photos_with(root / "photos", broken, moody)
    if len(broken) == COUNT:
        return
    expected, url = root / "expected", root / "ds"
    with without_ray():
        build(config_of(expected, photos, tokenizers, shard_size=shard_size))

    torch.set_num_threads(1)
    some = {name: tokenizers[name] for name in order if name in first}
    everything = {name: tokenizers[name] for name in order}
    with pytest.MonkeyPatch.context() as patch:
        turn = reversed if turned else iter
        patch.setattr("fourmill.flows.build.run_jobs", in_threads(workers, lambda jobs: list(turn(jobs))))
        for writes in kills:
            with crash_after(writes):
                try:
                    build(config_of(url, photos, some, shard_size=shard_size))
                except Crash:
                    pass
        build(config_of(url, photos, some, shard_size=shard_size))
        build(config_of(url, photos, everything, shard_size=shard_size, engine={"groups": groups}))
    assert status(Dataset(str(url))).complete
    assert data_files(url) == data_files(expected)
    assert receipts(url) == receipts(expected)
    reasons = status(Dataset(str(url))).reasons
    live = set(moody) - set(broken)
    assert reasons["mood"].get("mood raised ValueError", 0) == len(live)
    assert reasons["echo"].get("mood raised ValueError", 0) == len(live)
