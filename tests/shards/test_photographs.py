"""Real photographs and broken files, through each source and the decoder to the samples table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photographs import Written, photographs, write_photo_folder, write_photo_parquet, write_photo_tar

from fourmill.shards.decode import Frame, RejectedImage, decode_frame
from fourmill.shards.samples import OK, Outcome, sample_table
from fourmill.shards.sources.base import RawSample, Source, make_source


def folder(path: Path) -> tuple[Source, Written]:
    written = write_photo_folder(path / "photos")
    return make_source("folder", path=str(path / "photos")), written


def webdataset(path: Path) -> tuple[Source, Written]:
    written = write_photo_tar(path / "tars" / "00000.tar")
    return make_source("webdataset", url=f"{path}/tars/{{00000..00000}}.tar"), written


def parquet(path: Path) -> tuple[Source, Written]:
    written = write_photo_parquet(path / "table" / "train.parquet")
    return make_source("parquet", url=f"{path}/table"), written


SOURCES: dict[str, Callable[[Path], tuple[Source, Written]]] = {
    "folder": folder,
    "webdataset": webdataset,
    "parquet": parquet,
}


def decoded(source: Source) -> tuple[list[Any], list[Outcome], list[tuple[str, ...]]]:
    rows = list(source.rows())
    outcomes: list[Outcome] = []
    captions: list[tuple[str, ...]] = []
    for sample in source.read(rows):
        captions.append(sample.captions if isinstance(sample, RawSample) else ())
        try:
            if isinstance(sample, Exception):
                raise sample
            outcomes.append(decode_frame(sample.image, 64, "bicubic"))
        except RejectedImage as error:
            outcomes.append(error)
    return rows, outcomes, captions


@pytest.mark.parametrize("kind", SOURCES)
def test_photographs_become_samples_and_broken_files_reasons(tmp_path: Path, kind: str) -> None:
    source, written = SOURCES[kind](tmp_path)
    rows, outcomes, captions = decoded(source)
    table = sample_table(rows, outcomes, captions, seed=1, n_crops=2, val_fraction=0.2)
    status = dict(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert [key for key, text in status.items() if text == OK] == written["ok"]
    assert {key: text for key, text in status.items() if text != OK} == written["broken"]
    shown = [photo for photo in photographs() if photo.reason is None]
    for key, photo in zip(written["ok"], shown, strict=True):
        row = table.slice(table["key"].to_pylist().index(key), 1).to_pylist()[0]
        lines = (photo.caption or "").splitlines()
        assert row["captions"] == (lines if kind == "folder" else [" ".join(lines)] if lines else [])
        assert 0 < row["crops"][2] <= row["height"] and 0 < row["crops"][3] <= row["width"]
    sizes = {
        photo.name: (row["width"], row["height"])
        for photo, row in zip(photographs(), table.to_pylist(), strict=True)
    }
    assert sizes["animals/chelsea"] == (451, 300) and sizes["animals/turned"] == (300, 451)


def test_all_sources_give_the_same_pixels(tmp_path: Path) -> None:
    frames: dict[str, list[Frame]] = {}
    for kind, make in SOURCES.items():
        _, outcomes, _ = decoded(make(tmp_path)[0])
        frames[kind] = [frame for frame in outcomes if isinstance(frame, Frame)]
        assert len(frames[kind]) == sum(photo.reason is None for photo in photographs())
    for kind in ("webdataset", "parquet"):
        for ours, theirs in zip(frames["folder"], frames[kind], strict=True):
            assert np.array_equal(ours.pixels, theirs.pixels)


def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    """The cat was stored lying on its side: its frame is the upright cat's, turned by a quarter."""
    source, _ = folder(tmp_path)
    frames = {
        row.key: frame.pixels
        for row, frame in zip(*decoded(source)[:2], strict=True)
        if isinstance(frame, Frame)
    }
    cat, turned = frames["animals/chelsea"], frames["animals/turned"]
    assert turned.shape == (cat.shape[1], cat.shape[0], 3)
    assert np.abs(np.rot90(turned, 1).astype(int) - cat).mean() < 4  # JPEG against PNG
    assert np.abs(np.rot90(turned, -1).astype(int) - cat).mean() > 20


def test_the_helper_writes_what_is_no_part_of_the_collection(tmp_path: Path) -> None:
    source, written = folder(tmp_path)
    hidden = [path for path in (tmp_path / "photos").rglob("*") if "/." in str(path) and path.is_file()]
    assert len(hidden) == 2
    listed = {json.loads(row.position)["file"] for row in source.rows()}
    assert len(listed) == len(written["ok"]) + len(written["broken"])
    assert not any(name.startswith(".") for name in listed)
