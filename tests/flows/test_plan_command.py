"""`fourmill plan`: it says what a build then does, why, and what that takes; and it touches nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_builds import (
    ORACLES,
    call_main,
    listing,
    small_config,
    small_content,
    with_tokenizers,
    without_ray,
    write_config,
    write_images,
)

from fourmill.config import Config
from fourmill.errors import ConfigError, WorkMissing
from fourmill.flows import calibrating
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.costs import Cost, Costs
from fourmill.flows.estimating import estimate
from fourmill.flows.forecast import Forecast, forecast
from fourmill.flows.micro_batch import TEST_KEY
from fourmill.flows.planning import Planned, parse_rates, plan_build
from fourmill.flows.reading import Reader
from fourmill.flows.resolve import resolve
from fourmill.labelers.base import LabelBatch
from fourmill.labelers.oracle import OracleDepth
from fourmill.shards.dataset import Dataset

PLAIN: dict[str, Any] = {"caption": {}, "rgb_pixels": {}}
ALL: dict[str, Any] = {**PLAIN, "depth": ORACLES["depth"], "det": ORACLES["det"]}

WHOLE = BuildOptions()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Modalities with tokenizers that exist."""
    url = tmp_path_factory.mktemp("fitted") / "ds"
    made(small_config(url, ALL, count=8))
    return with_tokenizers(url, ALL)


def made(config: Config, options: BuildOptions = WHOLE) -> None:
    with without_ray():
        build(config, options)


def planned(config: Config, options: BuildOptions = WHOLE, **more: Any) -> Planned:
    return plan_build(config, options, **more)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Images that are decoded, and that pass through the depth network (shards and micro-batches have four)."""
    counts = {"decoded": 0, "depth": 0}
    decode, label = Reader.decode, OracleDepth.label

    def decoding(reader: Reader, raw: Any, *rest: Any, **more: Any) -> Any:
        counts["decoded"] += len(raw)
        return decode(reader, raw, *rest, **more)

    def labelling(labeler: OracleDepth, batch: LabelBatch) -> Any:
        counts["depth"] += len(batch.frames) if TEST_KEY not in batch.keys else 0
        return label(labeler, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "decode", decoding)
        patch.setattr(OracleDepth, "label", labelling)
        yield counts


def comes_true(config: Config, options: BuildOptions = WHOLE) -> Forecast:
    """The forecast, after a build that did just that: as many images decoded and labelled, and nothing left."""
    found = planned(config, options).forecast
    with counted() as counts:
        try:
            made(config, options)
        except WorkMissing:
            assert any(work.stale for work in found.modalities.values())
    depth = found.modalities.get("depth")
    assert counts["decoded"] == found.decoded_rows
    assert counts["depth"] == (depth.label_rows if depth else 0)
    assert planned(config, options).forecast.nothing_to_do
    return found


# -- it says what a build does ------------------------------------------------------------------------


def test_of_a_dataset_that_does_not_exist(tmp_path: Path) -> None:
    """Two of three shards are the fit set: labelled first, then tokenized from kept labels."""
    config = small_config(tmp_path / "ds", {**ALL, "rgb_pixels": {}}, count=12)
    found = comes_true(config)
    assert (found.exists, found.shards, found.committed, found.fit_shards) == (False, 3, 0, 2)
    depth, pixels = found.modalities["depth"], found.modalities["rgb_pixels"]
    assert (depth.fit, depth.pending, depth.label, depth.from_kept, depth.tokenize) == (True, 3, 3, 2, 3)
    assert (pixels.label, pixels.from_kept, pixels.tokenize, pixels.keep) == (0, 0, 3, 0)
    assert found.decodes == {1: 2, 4: 3}, "captions and boxes need no labels to be fitted on"


def test_of_a_pilot_and_of_what_is_left_after_it(tmp_path: Path, given: dict[str, Any]) -> None:
    config = small_config(tmp_path / "ds", given, count=24)
    pilot = comes_true(config, BuildOptions(limit=6))
    assert (pilot.shards, pilot.samples, pilot.decodes) == (2, 8, {4: 2})
    rest = comes_true(config)
    assert (rest.shards, rest.committed, rest.decodes) == (6, 2, {4: 4})
    assert rest.modalities["depth"].finished == 2 and rest.modalities["depth"].label == 4


def test_of_a_modality_that_comes_later(tmp_path: Path, given: dict[str, Any]) -> None:
    made(small_config(tmp_path / "ds", {n: given[n] for n in PLAIN}, count=8))
    found = comes_true(small_config(tmp_path / "ds", given, count=8))
    assert found.decodes == {2: 2}, "depth and boxes share each decode"
    assert found.modalities["caption"].tokenize == 0


def test_of_what_is_stale_and_why(tmp_path: Path, given: dict[str, Any]) -> None:
    made(small_config(tmp_path / "ds", given, count=8))
    config = small_config(tmp_path / "ds", {**given, "det": {**given["det"], "precision": "bf16"}}, count=8)
    left = comes_true(config).modalities["det"]
    assert (left.stale, left.tokenize, left.redo) == (2, 0, 0)
    assert left.why_stale == ["label.precision: fp32 -> bf16"]
    found = comes_true(config, BuildOptions(redo_stale=True))
    again = found.modalities["det"]
    assert (again.stale, again.tokenize, again.redo, again.label) == (2, 2, 2, 2)
    assert found.modalities["depth"].label == 0


def test_of_stale_tokens_whose_tokenizer_is_yet_to_be_fitted(tmp_path: Path) -> None:
    made(small_config(tmp_path / "ds", {"depth": ORACLES["depth"]}, count=8))
    fitted = {"depth": {**ORACLES["depth"], "tokenizer": {"steps": 4}}}
    config = small_config(tmp_path / "ds", fitted, count=8)
    found = planned(config).forecast.modalities["depth"]
    assert (found.fit, found.stale, found.tokenize, found.keep) == (True, 2, 0, 0), "labels are there"
    assert [line for line in found.why_stale if line.endswith("-> to be fitted")]
    assert comes_true(config, BuildOptions(redo_stale=True)).modalities["depth"].from_kept == 2


def test_kept_labels_spare_the_network(tmp_path: Path, given: dict[str, Any]) -> None:
    modalities = {**PLAIN, "depth": given["depth"]}
    made(small_config(tmp_path / "ds", modalities, count=8), BuildOptions(only_labels=("depth",)))
    found = comes_true(small_config(tmp_path / "ds", modalities, count=8))
    depth = found.modalities["depth"]
    assert (depth.label, depth.from_kept, depth.tokenize) == (0, 2, 2)


def test_parked_shards_with_their_errors(tmp_path: Path, given: dict[str, Any]) -> None:
    config = small_config(tmp_path / "ds", given, count=8)
    made(config, BuildOptions(limit=4))
    recipe = resolve(config).token_recipes()["depth"]
    Dataset(str(tmp_path / "ds")).park("depth", recipe.short, 1, "a", "its runner died 4 times")
    depth = planned(config).forecast.modalities["depth"]
    assert (depth.parked, depth.pending, depth.tokenize) == (1, 0, 1)
    assert depth.errors == {1: "its runner died 4 times"}


# -- it touches nothing -------------------------------------------------------------------------------


def test_nothing_is_touched(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where there is a dataset nor where there is none; not by a calibration either, which leaves no folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(calibrating, "IMAGES", 4)
    built = tmp_path / "built"
    made(small_config(built, given, count=8), BuildOptions(limit=4))
    before = listing(built)
    for url in (built, tmp_path / "none"):
        path = write_config(
            tmp_path / "config.yaml", small_content(url, {**given, "det": ORACLES["det"]}, count=8)
        )
        for more in ([], ["--redo-stale"], ["--retry-rejects"], ["--calibrate", "--set", "seed=0"]):
            assert call_main("plan", path, *more) == 0
            assert "not known" not in capsys.readouterr().out or "--calibrate" not in more
        assert call_main("plan", path, "--json", "--calibrate") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["plan"]["modalities"]["depth"]["tokenize"] > 0 and found["estimate"]["seconds"] > 0
        assert found["estimate"]["unknown"] == {} and found["estimate"]["total_bytes"] > 0
    assert listing(built) == before and not (tmp_path / "none").exists()
    assert list(scratch.iterdir()) == []


def test_a_calibration_takes_images_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones, whatever their kind; the rest of the source is not listed."""
    write_images(tmp_path / "photos", [f"{i}.png" for i in range(9)])
    config = small_config(tmp_path / "ds", PLAIN, source={"kind": "folder", "path": str(tmp_path / "photos")})
    monkeypatch.setattr(calibrating, "IMAGES", 5)
    small = calibrating.calibration_config(resolve(config), ["caption"], tmp_path / "scratch")
    copies = tmp_path / "scratch" / "images"
    assert len(list(copies.glob("*.jpg"))) == len(list(copies.glob("*.txt"))) == 5
    assert small.dataset == str(tmp_path / "scratch" / "dataset") and list(small.modalities) == ["caption"]
    made(small)


# -- estimates ----------------------------------------------------------------------------------------


def test_estimates_from_given_rates(tmp_path: Path, given: dict[str, Any]) -> None:
    """Of two groups the slower one decides."""
    groups = {"batch_size": 4, "device": "cpu", "groups": [["depth"], ["det", "caption", "rgb_pixels"]]}
    config = small_config(tmp_path / "ds", given, count=24, engine=groups)
    rates = {"depth": 2.0, "det": 4.0, "caption": 1000.0, "rgb_pixels": 1000.0}
    guess = planned(config, rates=rates, specialists=2).estimate
    assert guess.seconds == pytest.approx(24 / 2 / 2) and guess.rate == pytest.approx(4.0)
    assert guess.hours["depth"] == pytest.approx(12 / 3600) and guess.hours["det"] == pytest.approx(6 / 3600)
    assert guess.bytes["depth"] == 24 * 2 * 16, "16 tokens of two bytes"
    assert set(guess.unknown) == {"caption", "rgb_pixels", "det", "samples"}, "how large, receipts would tell"
    assert all("speed" not in what for what in guess.unknown.values())


def test_what_is_not_known_is_said(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "config.yaml", small_content(tmp_path / "ds", given, count=8))
    assert call_main("plan", path, "--rate", "depth=120") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not known: caption: speed, size" in said and "--rate caption=" in said and "--calibrate" in said
    assert "estimate (without caption, rgb_pixels, det)" in said


def test_estimates_from_receipts(tmp_path: Path, given: dict[str, Any]) -> None:
    config = small_config(tmp_path / "ds", given, count=24)
    made(config, BuildOptions(limit=8))
    guess = planned(config).estimate
    assert not guess.unknown and guess.seconds and set(guess.sources.values()) == {"receipts of this dataset"}
    assert guess.bytes["depth"] == pytest.approx(sum(_bytes_of(tmp_path / "ds", "depth")) / 8 * 16)


def _bytes_of(url: Path, name: str) -> list[int]:
    return [path.stat().st_size for path in (url / "tokens" / name).iterdir()]


def test_waiting_and_cores_lengthen_a_run(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve(small_config(tmp_path / "ds", {"depth": given["depth"]}, count=24))
    found = forecast(resolved, None, BuildOptions())
    cost = Cost(forward=0.75, tokenize=0.25, token_bytes=1.0)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for costs, seconds in (
        (Costs({"depth": cost}), 6.0),  # four specialists
        (Costs({"depth": cost}, idle=0.5), 12.0),
        (
            Costs({"depth": cost}, decode=3.0),
            24.0,
        ),  # of a second of network and three of decoding on four cores
    ):
        assert estimate(resolved, found, costs).seconds == pytest.approx(seconds)
    assert estimate(resolved, found, Costs({"depth": cost}), 1).seconds == pytest.approx(24.0)


# -- usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["depth", "depth=", "depth=fast", "depth=0", "depth=-1", "depth=nan", "depth=inf"]
)
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        parse_rates([text])


def test_wrong_usage(tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    made(small_config(tmp_path / "ds", PLAIN, count=4))
    path = write_config(tmp_path / "config.yaml", small_content(tmp_path / "ds", PLAIN, count=4))
    for more, said in (
        (["--rate", "dept=3"], "not in the configuration"),
        (["--shards", "9:12"], "the source makes shards"),
        (["--set", "seed=9"], "that can't change"),
    ):
        assert call_main("plan", path, *more) == 2
        assert said in capsys.readouterr().err
