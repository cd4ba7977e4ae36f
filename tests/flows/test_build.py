"""What a build does with what is there: pilots, modalities that come later, stale and parked shards, sources that change."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from small_builds import (
    ORACLES,
    call_main,
    data_files,
    environment,
    listing,
    receipts,
    small_config,
    small_content,
    with_tokenizers,
    without_ray,
    write_config,
    write_images,
)

from fourmill.errors import DatasetError, WorkMissing
from fourmill.flows.build import BuildOptions, BuildResult, build
from fourmill.flows.micro_batch import TEST_KEY
from fourmill.flows.status import status
from fourmill.labelers.base import LabelBatch
from fourmill.labelers.oracle import OracleDepth
from fourmill.labels import Absent, Label
from fourmill.shards.dataset import SAMPLES, Dataset

PLAIN: dict[str, Any] = {"caption": {}, "rgb_pixels": {}}


def make(url: Path, modalities: Mapping[str, Any], *, options: Any = None, **changes: Any) -> BuildResult:
    """Build in this process."""
    with without_ray():
        return build(small_config(url, modalities, **changes), options or BuildOptions())


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Modalities with tokenizers that exist, so that builds have nothing to fit."""
    modalities = {**PLAIN, "depth": ORACLES["depth"], "det": ORACLES["det"]}
    url = tmp_path_factory.mktemp("fitted") / "ds"
    make(url, modalities, count=12)
    return with_tokenizers(url, modalities)


def some(given: Mapping[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    """Some of the modalities; ``changes`` are keys for those that have a labeler."""
    chosen = {name: dict(given[name]) for name in names}
    for entry in chosen.values():
        if "labeler" in entry:
            entry.update(changes)
    return chosen


def kept(before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    """Nothing that was there has changed or gone."""
    return all(after.get(name) == digest for name, digest in before.items())


# -- pilots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [BuildOptions(limit=6), BuildOptions(shards=(1, 3))])
def test_a_pilot_is_part_of_the_full_build(
    tmp_path: Path, given: dict[str, Any], options: BuildOptions
) -> None:
    modalities = some(given, "caption", "rgb_pixels", "depth")
    url, whole = tmp_path / "ds", tmp_path / "whole"
    pilot = make(url, modalities, options=options)
    assert pilot.status.complete and (pilot.status.shards, pilot.status.samples) == (2, 8)
    assert pilot.rows_labelled == 8
    before = listing(url)
    full = make(url, modalities)
    assert full.status.complete and (full.status.shards, full.status.samples) == (6, 24)
    assert full.rows_labelled == 16, "the pilot's shards were made again"
    assert kept(before, listing(url))
    make(whole, modalities)
    assert data_files(url) == data_files(whole)
    assert receipts(url) == receipts(whole)


def test_a_pilot_with_fitting_keeps_its_tokenizers(tmp_path: Path) -> None:
    modalities = {"caption": {}, "depth": ORACLES["depth"]}
    url = tmp_path / "ds"
    make(url, modalities, options=BuildOptions(limit=8))
    before = listing(url)
    full = make(url, modalities)
    assert full.status.complete and full.status.shards == 6
    assert kept(before, listing(url))
    assert [len(list((url / "tokenizers" / name).iterdir())) for name in modalities] == [1, 1]


# -- columns are independent --------------------------------------------------------------------------


def test_a_modality_that_comes_later_writes_new_files_only(tmp_path: Path, given: dict[str, Any]) -> None:
    url, whole = tmp_path / "ds", tmp_path / "whole"
    make(url, some(given, "rgb_pixels"))
    before = listing(url)
    result = make(url, some(given, "rgb_pixels", "depth", "caption"))
    assert result.status.complete and set(result.status.modalities) == {"rgb_pixels", "depth", "caption"}
    after = listing(url)
    assert kept(before, after)
    new = {name.split("/")[0] + "/" + name.split("/")[1] for name in after.keys() - before.keys()}
    runs = {name for name in new if name.startswith("runs/")}
    assert new - runs == {
        f"{folder}/{name}" for folder in ("tokens", "receipts", "tokenizers") for name in ("depth", "caption")
    }
    make(whole, some(given, "rgb_pixels", "depth", "caption"))
    assert data_files(url) == data_files(whole)


def test_nothing_to_do_writes_nothing(tmp_path: Path, given: dict[str, Any]) -> None:
    url = tmp_path / "ds"
    make(url, some(given, "rgb_pixels"))
    before = listing(url)
    again = make(url, some(given, "rgb_pixels"))
    assert again.rows_labelled == 0
    new = listing(url).keys() - before.keys()
    assert kept(before, listing(url)) and all(name.startswith("runs/") for name in new)


# -- stale --------------------------------------------------------------------------------------------


def test_a_changed_labeler_makes_stale(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --redo-stale the run ends with exit status 3 and nothing changed, with it all is made again."""
    url = tmp_path / "ds"
    first = write_config(tmp_path / "1.yaml", small_content(url, some(given, "rgb_pixels", "depth")))
    second = write_config(
        tmp_path / "2.yaml", small_content(url, some(given, "rgb_pixels", "depth", precision="bf16"))
    )
    assert call_main("build", first, "--no-prefect") == 0
    before = data_files(url)
    capsys.readouterr()
    assert call_main("build", second, "--no-prefect") == 3
    said = capsys.readouterr()
    assert "--redo-stale" in said.err and len(said.err.strip().splitlines()) == 1
    assert data_files(url) == before
    found = status(Dataset(str(url)))
    assert not found.complete
    assert (found.modalities["depth"].stale, found.modalities["depth"].finished) == (6, 0)
    assert (found.modalities["rgb_pixels"].stale, found.modalities["rgb_pixels"].finished) == (0, 6)
    assert call_main("build", second, "--redo-stale", "--no-prefect") == 0
    found = status(Dataset(str(url)))
    assert found.complete and (found.modalities["depth"].stale, found.modalities["depth"].finished) == (0, 6)
    assert kept(before, data_files(url))
    assert call_main("build", second, "--no-prefect") == 0


def test_weights_that_change_in_place_make_stale(tmp_path: Path, given: dict[str, Any]) -> None:
    """Noticed by a process that has seen the folder before, too."""
    url, model = tmp_path / "ds", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"first")
    make(url, some(given, "depth", model=str(model)), count=4)
    (model / "model.safetensors").write_bytes(b"other")
    with pytest.raises(WorkMissing, match="1 column shards are stale"):
        make(url, some(given, "depth", model=str(model)), count=4)
    (model / "model.safetensors").write_bytes(b"first")
    assert make(url, some(given, "depth", model=str(model)), count=4).status.complete


def test_a_tokenizer_that_was_damaged_is_refused_until_it_is_mended(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    url = tmp_path / "ds"
    make(url, {"caption": {}}, count=8)
    (file,) = url.glob("tokenizers/caption/*/vocab.json")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(DatasetError, match=r"tokenizers/caption/.* is missing or damaged"):
        make(url, {"caption": {}}, count=12)
    file.write_bytes(whole)
    assert make(url, {"caption": {}}, count=12).status.complete


def test_refitting_makes_tokens_stale_and_spends_no_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "ds"
    modalities = {"depth": {**ORACLES["depth"], "keep_labels": True}}
    make(url, modalities)
    labels = {n: h for n, h in data_files(url).items() if n.startswith("labels/")}
    assert len(labels) == 6

    def no_pass(self: OracleDepth, batch: LabelBatch) -> list[Label]:
        if TEST_KEY in batch.keys:
            return [Absent("no truth")]
        raise AssertionError("a label was made again")

    monkeypatch.setattr(OracleDepth, "label", no_pass)
    fit = {"preset": "demo", "steps": 5, "samples": 8, "batch_size": 4}
    with pytest.raises(WorkMissing, match="stale"):
        make(url, modalities, fit=fit)
    assert status(Dataset(str(url))).modalities["depth"].stale == 6
    result = make(url, modalities, fit=fit, options=BuildOptions(redo_stale=True))
    assert result.status.complete
    assert {n: h for n, h in data_files(url).items() if n.startswith("labels/")} == labels
    assert len(list((url / "tokenizers" / "depth").iterdir())) == 2


def test_tokens_from_kept_labels_are_those_of_fresh_ones(tmp_path: Path, given: dict[str, Any]) -> None:
    fresh, late = tmp_path / "fresh", tmp_path / "late"
    make(fresh, some(given, "depth", "det"))
    label_first = BuildOptions(only_labels=("depth", "det"))
    make(late, some(given, "depth", "det"), options=label_first)
    assert not list(late.glob("tokens/*/*")) and len(list(late.glob("labels/*/*.tar"))) == 12
    make(late, some(given, "depth", "det"))
    tokens = [{n: h for n, h in data_files(url).items() if n.startswith("tokens/")} for url in (fresh, late)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 12


# -- parked -------------------------------------------------------------------------------------------


def test_too_many_rows_without_a_value_park_the_shard(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard's labels cannot be made: it is parked, the others are complete, and a later run tries again."""
    original = OracleDepth._one

    def fails_in_shard_two(self: OracleDepth, truth: Any, frame: Any) -> Label:
        label = original(self, truth, frame)
        is_sick = not isinstance(label, Absent) and float(label.mean()) in failing
        return Absent("no depth today") if is_sick else label

    url, whole = tmp_path / "ds", tmp_path / "whole"
    engine = {"batch_size": 4, "device": "cpu", "max_absent_rows": 1, "max_absent_share": 0.25}
    modalities = some(given, "depth", "rgb_pixels")
    config = small_config(url, modalities, engine=engine)
    from fourmill.shards.sources.scenes_source import Scenes

    source = Scenes(count=24, size=64, seed=0)
    failing = {float(source.truth(f"{i:08d}")["depth"].mean()) for i in (8, 10)}
    monkeypatch.setattr(OracleDepth, "_one", fails_in_shard_two)
    with without_ray(), pytest.raises(WorkMissing, match=r"depth shard 2: 2 of 4 rows .*no depth today"):
        build(config)
    found = status(Dataset(str(url)))
    assert not found.complete
    depth = found.modalities["depth"]
    assert (depth.finished, depth.parked, depth.pending) == (5, 1, 0)
    assert found.modalities["rgb_pixels"].finished == 6
    failing.clear()
    with without_ray():
        assert build(config).status.complete
    assert status(Dataset(str(url))).modalities["depth"].parked == 0
    make(whole, modalities, engine=engine)
    assert data_files(url) == data_files(whole)


@pytest.mark.long  # half a minute
@pytest.mark.ray
def test_a_file_that_cannot_be_read_parks_its_shard_alone(
    tmp_path: Path, given: dict[str, Any], cluster: None
) -> None:
    """Bad luck is retried: the bytes vanish after their shard was frozen, and come back before the next run."""
    images = tmp_path / "images"
    write_images(images, [f"{i:02d}.png" for i in range(12)])
    url = tmp_path / "ds"
    source = {"kind": "folder", "path": str(images)}
    make(url, some(given, "caption"), source=source)
    (images / "05.png").rename(tmp_path / "away.png")
    config = small_config(url, some(given, "caption", "rgb_pixels"), source=source)
    with pytest.raises(WorkMissing, match=r"rgb_pixels shard 1: .*05\.png"):
        build(config)
    found = status(Dataset(str(url)))
    assert found.modalities["rgb_pixels"].finished == 2 and found.modalities["rgb_pixels"].parked == 1
    assert "05.png" in found.parked["rgb_pixels"][1]
    (tmp_path / "away.png").rename(images / "05.png")
    assert build(config).status.complete


PLUGIN = """
from pathlib import Path
import numpy as np
from fourmill.labelers.base import Labeler
from fourmill.modality import LabelContract, Modality

class Grumpy(Labeler):
    contract = LabelContract(form="map", dtype="float32", low=0.0, high=255.0)
    modality = Modality(name="mood", kind="grid", codec="vqvae", contract=contract)
    options = {"mended": ""}

    def label(self, batch):
        if "00000006" in batch.keys and not Path(self.params["mended"]).exists():
            raise RuntimeError("not in the mood for 00000006")
        return [frame.mean(-1, dtype=np.float32) for frame in batch.frames]
"""

DRIVER = """
import sys
from pathlib import Path
from fourmill.config import load_config
from fourmill.errors import DatasetError, WorkMissing
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.engine import ray_session

config = load_config(sys.argv[1])
keep = BuildOptions(only_labels=("mood",))
with ray_session(config):
    try:
        build(config, keep)
        print("finished too early")
    except WorkMissing as error:
        print("first:", error)
    Path(sys.argv[2]).touch()
    build(config, keep)
    print("second: done")
"""


@pytest.mark.ray
@pytest.mark.long
def test_a_labeler_of_somebody_else_that_fails(tmp_path: Path) -> None:
    """Found by its entry point; its error parks one shard, and once it is mended the next run finishes."""
    packages = tmp_path / "packages"
    info = packages / "grumpy-1.0.dist-info"
    info.mkdir(parents=True)
    (packages / "grumpy.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: grumpy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fourmill.labelers]\nmood = grumpy:Grumpy\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    url, mended = tmp_path / "ds", tmp_path / "mended"
    content = small_content(url, {"mood": {"mended": str(mended)}}, count=12)
    config = write_config(tmp_path / "c.yaml", content)
    done = subprocess.run(
        [sys.executable, tmp_path / "driver.py", config, mended],
        env=environment(PYTHONPATH=str(packages)), cwd=tmp_path, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if line.startswith("first:"))
    assert "mood shard 1: RuntimeError: not in the mood for 00000006" in first
    assert "second: done" in done.stdout
    dataset = Dataset(str(url))
    (short,) = dataset.recipes("mood")
    assert dataset.finished("mood", short) == {0, 1, 2}
    assert dataset.parked("mood", short) == {}


# -- status -------------------------------------------------------------------------------------------


def test_status_as_json(tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    url = tmp_path / "ds"
    make(url, some(given, "caption", "rgb_pixels"), count=10)
    capsys.readouterr()
    assert call_main("status", url, "--json") == 0
    out = capsys.readouterr().out
    assert len(out.strip().splitlines()) == 1
    found = json.loads(out)
    assert list(found) == ["samples", "shards", "complete", "rejected", "modalities"]
    assert {k: found[k] for k in ("samples", "shards", "complete", "rejected")} == {
        "samples": 10, "shards": 3, "complete": True, "rejected": 0,
    }  # fmt: skip
    assert list(found["modalities"]) == ["caption", "rgb_pixels"]
    for name, column in found["modalities"].items():
        size = sum(path.stat().st_size for path in (url / "tokens" / name).iterdir())
        assert column == {
            "finished": 3, "pending": 0, "stale": 0, "parked": 0, "rows": 10, "absent": 0, "bytes": size,
        }  # fmt: skip


def test_status_of_a_build_that_was_cut_short(tmp_path: Path, given: dict[str, Any]) -> None:
    """Pending is what nobody has begun; a file without a receipt is nothing."""
    url = tmp_path / "ds"
    make(url, some(given, "caption", "rgb_pixels"), count=10)
    dataset = Dataset(str(url))
    (short,) = dataset.recipes("rgb_pixels")
    (url / "receipts" / "rgb_pixels" / short / "shard-000001.json").unlink()
    found = status(dataset)
    assert not found.complete
    assert (found.modalities["rgb_pixels"].finished, found.modalities["rgb_pixels"].pending) == (2, 1)
    assert make(url, some(given, "caption", "rgb_pixels"), count=10).rows_labelled == 4
    assert status(dataset).complete


# -- sources that change ------------------------------------------------------------------------------


def keys_by_shard(url: Path) -> dict[int, list[str]]:
    dataset = Dataset(str(url))
    short = str(dataset.samples_recipe())
    return {s: dataset.samples(s)["key"].to_pylist() for s in sorted(dataset.finished(SAMPLES, short))}


def folder_build(url: Path, images: Path, given: Mapping[str, Any], **more: Any) -> BuildResult:
    source = {"kind": "folder", "path": str(images)}
    return make(url, some(given, "caption", "rgb_pixels"), source=source, **more)


def names(*numbers: int) -> list[str]:
    return [f"{number:02d}.png" for number in numbers]


def test_new_files_go_into_new_shards(tmp_path: Path, given: dict[str, Any]) -> None:
    """Even those that sort before what is there, and though the last shard is short."""
    url, images = tmp_path / "ds", tmp_path / "images"
    write_images(images, names(*range(10, 16)))
    folder_build(url, images, given)
    assert {s: len(k) for s, k in keys_by_shard(url).items()} == {0: 4, 1: 2}
    before = listing(url)
    write_images(images, names(1, 12 + 20, 2))
    result = folder_build(url, images, given)
    assert result.status.complete and result.status.samples == 9
    assert kept(before, listing(url))
    assert keys_by_shard(url) == {0: ["10", "11", "12", "13"], 1: ["14", "15"], 2: ["01", "02", "32"]}


def test_vanished_and_changed_files_shift_nothing(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    url, images = tmp_path / "ds", tmp_path / "images"
    write_images(images, names(*range(8)))
    folder_build(url, images, given)
    before = listing(url)
    (images / "01.png").unlink()
    write_images(images, ["05.png"], seed=2)
    write_images(images, names(20, 21))
    capsys.readouterr()
    result = folder_build(url, images, given)
    assert "1 committed rows are no longer in the source" in capsys.readouterr().out
    assert result.status.complete and kept(before, listing(url))
    assert keys_by_shard(url)[2] == ["20", "21"]


@pytest.mark.parametrize("first", [(1, 2), (0, 1), (2, 3)])
def test_a_key_that_comes_twice_across_shards(
    tmp_path: Path, given: dict[str, Any], first: tuple[int, int]
) -> None:
    """Whichever shard is frozen first (the fit set is drawn), rows do not shift and one of the two stays."""
    images = tmp_path / "images"
    write_images(images, names(*range(9)))
    (images / "03.webp").write_bytes((images / "03.png").read_bytes())  # rows 3 and 4: two shards
    url, whole = tmp_path / "ds", tmp_path / "whole"
    folder_build(url, images, given, options=BuildOptions(shards=first))
    folder_build(url, images, given)
    folder_build(whole, images, given)
    assert keys_by_shard(whole)[0][3] == keys_by_shard(whole)[1][0] == "03"
    states = Dataset(str(whole)).samples(1)["status"].to_pylist()
    assert states == ["duplicate key", "ok", "ok", "ok"]
    assert data_files(url) == data_files(whole)
    assert receipts(url) == receipts(whole)


def test_a_larger_count_of_scenes_extends_the_dataset(tmp_path: Path, given: dict[str, Any]) -> None:
    url = tmp_path / "ds"
    make(url, some(given, "rgb_pixels"), count=6)
    before = listing(url)
    result = make(url, some(given, "rgb_pixels"), count=13)
    assert result.status.complete and result.status.samples == 13
    assert kept(before, listing(url))
    lengths: Sequence[int] = [len(keys) for keys in keys_by_shard(url).values()]
    assert lengths == [4, 2, 4, 3]
