"""Shards that are unlike the others are named, and those that are not are left in peace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_builds import ORACLES, call_main, small_config, without_ray

from fourmill.errors import ConfigError, WorkMissing
from fourmill.flows.build import build
from fourmill.flows.qa import FIRST, OTHERS, Odd, examine
from fourmill.flows.resolve import resolve
from fourmill.labelers.figures import Measures, Tally
from fourmill.labelers.oracle import OracleDepth
from fourmill.seeds import generator
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Receipt, Recipe

RECIPE = Recipe("token", {"label": {"labeler": "depth"}})
OLD = Recipe("samples", {"seed": 0})
IMAGES = 200

#: image number -> what is measured of it
Draw = Callable[[np.random.Generator], Measures]


def usual(draw: np.random.Generator) -> Measures:
    return Measures.of([{"mean": draw.normal(3, 1), "constant": 0.0}], [{"near": 0.7, "far": 0.3}])


def dataset_of(
    folder: Path, shards: dict[int, Draw], absent: dict[int, int] | None = None, **environment: Any
) -> Dataset:
    """A dataset whose receipts say that, and no more."""
    dataset = Dataset.create(str(folder / "ds"), {"shard_size": IMAGES})
    for shard, draw in shards.items():
        tally, random = Tally(), generator(shard, "figures")
        for _ in range(IMAGES):
            tally.merge(Tally.of(draw(random)))
        for column, recipe in ((SAMPLES, OLD), ("depth", RECIPE)):
            bad = (absent or {}).get(shard, 0) if column == "depth" else 0
            receipt = Receipt(
                column=column, recipe=recipe.hash, shard=shard, rows=IMAGES, absent={"depth hung": bad} if bad else {},
                presence="", keys="k", file="f", sha256="s", bytes=1, dataset=dataset.digest,
                environment={"device": environment.get(f"device{shard}", "cpu")}, timings={"committed": float(shard)},
                figures=tally.to_text() if column == "depth" else "",
            )  # fmt: skip
            dataset.commit(recipe, receipt)
    run = {
        "recipes": {"depth": {"kind": "token", **RECIPE.content}},
        "shards": dict.fromkeys(map(str, shards), IMAGES),
    }
    dataset.store.put("runs/1.yaml", yaml.safe_dump(run).encode())
    return Dataset(dataset.url)


def odd_in(dataset: Dataset) -> set[tuple[int, str, str]]:
    return {(odd.shard, odd.figure, odd.against) for odd in examine(dataset).odd}


def test_usual_shards_are_left_in_peace(tmp_path: Path) -> None:
    found = examine(dataset_of(tmp_path, dict.fromkeys(range(60), usual)))
    assert found.odd == []
    mean, deviation = found.columns["depth"].figures["mean"]
    assert mean == pytest.approx(3, abs=0.05) and deviation == pytest.approx(1, abs=0.05)
    assert found.columns["depth"].images == 60 * IMAGES


def test_sources_whose_shards_differ_by_nature_are_left_in_peace(tmp_path: Path) -> None:
    """Each shard is of another web site: they differ, all of them."""

    def of_site(site: float) -> Draw:
        return lambda draw: Measures.of([{"mean": draw.normal(site, 1)}])

    sites = generator(5, "sites").normal(3, 1, size=40)
    found = examine(dataset_of(tmp_path, {i: of_site(site) for i, site in enumerate(sites)}))
    assert [odd for odd in found.odd if odd.against == OTHERS] == []


def test_a_shard_with_another_mean(tmp_path: Path) -> None:
    dataset = dataset_of(
        tmp_path,
        {i: usual for i in range(12)}
        | {7: lambda draw: Measures.of([{"mean": draw.normal(4.5, 1), "constant": 0.0}])},
        device7="NVIDIA H100",
    )
    (odd,) = [odd for odd in examine(dataset).odd if odd.figure == "mean"]
    assert (odd.column, odd.shard, odd.against) == ("depth", 7, OTHERS)
    assert odd.value == pytest.approx(4.5, abs=0.3) and odd.usual == pytest.approx(3, abs=0.1)
    assert odd.size == pytest.approx(1.5, abs=0.3)
    assert odd.note == "device NVIDIA H100, mostly cpu"


def test_a_small_difference_is_none_however_certain(tmp_path: Path) -> None:
    slightly: Draw = lambda draw: Measures.of([{"mean": draw.normal(3.3, 1), "constant": 0.0}])
    assert odd_in(dataset_of(tmp_path, {i: usual for i in range(12)} | {7: slightly})) == set()


def test_a_share_that_rises(tmp_path: Path) -> None:
    broken: Draw = lambda draw: Measures.of(
        [{"mean": draw.normal(3, 1), "constant": float(draw.random() < 0.5)}]
    )
    assert odd_in(dataset_of(tmp_path, {i: usual for i in range(12)} | {3: broken})) == {
        (3, "constant", OTHERS)
    }


def test_rows_without_a_value(tmp_path: Path) -> None:
    assert odd_in(dataset_of(tmp_path, {i: usual for i in range(12)}, absent={2: 20, 5: 1})) == {
        (2, "absent", OTHERS)
    }


def test_another_distribution_with_the_same_mean(tmp_path: Path) -> None:
    swapped: Draw = lambda draw: Measures.of([{"mean": draw.normal(3, 1)}], [{"near": 0.2, "far": 0.8}])
    assert odd_in(dataset_of(tmp_path, {i: usual for i in range(12)} | {9: swapped})) == {
        (9, "distribution", OTHERS)
    }


def test_what_changed_after_the_first_shards_shows_against_them(tmp_path: Path) -> None:
    """Though most shards are of the new kind: seen from the others, it is the first ones that are odd."""
    later: Draw = lambda draw: Measures.of([{"mean": draw.normal(5, 1)}])
    found = odd_in(dataset_of(tmp_path, {i: usual if i < 8 else later for i in range(30)}))
    assert {shard for shard, figure, against in found if against == FIRST} == set(range(8, 30))
    assert {shard for shard, figure, against in found if against == OTHERS} == set(range(8))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken: Draw = lambda draw: Measures.of([{"mean": 9.0, "constant": 1.0}])
    dataset = dataset_of(tmp_path, {i: usual for i in range(6)} | {4: broken})
    assert call_main("qa", dataset.url) == 0
    shown = capsys.readouterr().out
    assert "column shards are odd" in shown and "constant" in shown
    assert call_main("qa", dataset.url, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {odd["shard"] for odd in found["odd"]} == {4} and set(found["odd"][0]) == set(Odd.__slots__)
    assert call_main("qa", dataset.url, "--strict") == 1


# -- from a build -------------------------------------------------------------------------------------

QUALITY = {"mean": {"refuse_above": 50.0}, "constant": {"warn_above": 0.2, "refuse_above": 0.9}}


def config_of(url: Path, **quality: Any) -> Any:
    modalities = {"depth": {**ORACLES["depth"], "quality": {**QUALITY, **quality}}}
    return small_config(url, modalities, count=24, shard_size=12)


def test_figures_are_in_receipts(tmp_path: Path) -> None:
    with without_ray():
        build(config_of(tmp_path / "ds"))
    found = examine(Dataset(str(tmp_path / "ds"))).columns["depth"]
    assert (found.shards, found.measured, found.images) == (2, 2, 24)
    assert set(found.figures) == {"absent", "constant", "distinct tokens", "mean", "spread"}
    source = resolve(config_of(tmp_path / "ds")).source
    truth = np.mean([np.asarray(source.truth(row.key)["depth"]).mean() for row in source.rows()])
    assert found.figures["mean"][0] == pytest.approx(truth, rel=1e-3)


def test_a_shard_whose_figures_are_beyond_a_limit_is_parked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network that sees nothing: every label keeps its contract, and is the same everywhere."""
    monkeypatch.setattr(
        OracleDepth, "_one", lambda self, truth, frame: np.full(frame.shape[:2], 2.0, np.float32)
    )
    with (
        without_ray(),
        pytest.raises(WorkMissing, match="constant is 1 on average over 12 images, above 0.9"),
    ):
        build(config_of(tmp_path / "ds"))
    with without_ray():  # who means it may have it so
        build(config_of(tmp_path / "ds", constant={"warn_above": 0.2}))
    found = examine(Dataset(str(tmp_path / "ds"))).columns["depth"]
    assert found.warnings == {"constant": 2}
    capsys.readouterr()
    assert call_main("status", tmp_path / "ds") == 0
    assert "depth: constant is beyond its limit in 2 shards" in " ".join(capsys.readouterr().out.split())


def test_a_limit_of_a_figure_that_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"modalities.depth.quality.constnat: no such figure; did you mean 'constant'"
    ):
        resolve(config_of(tmp_path / "ds", constnat={"warn_above": 0.5}))
