"""Null cells that are tried again: only they are made anew, and what was registered before still holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_builds import (
    ORACLES,
    call_main,
    data_files,
    small_config,
    with_tokenizers,
    without_ray,
    write_config,
)

from fourmill.flows import flow_runs
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.status import status
from fourmill.flows.training import make_snapshot
from fourmill.labelers.oracle import OracleDepth
from fourmill.labels import Absent, Label
from fourmill.shards.dataset import Dataset
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.sources.scenes_source import Scenes

NAMES = ("depth", "semseg")
ENGINE = {"batch_size": 4, "device": "cpu", "max_absent_rows": 4}


@pytest.fixture(scope="module")
def modalities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    fitted = {name: ORACLES[name] for name in NAMES}
    url = tmp_path_factory.mktemp("fitted") / "ds"
    with without_ray():
        build(small_config(url, fitted, count=8))
    return with_tokenizers(url, fitted)


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Rows whose depth cannot be made at present, with the reason; `seen` counts the frames that are labelled."""
    source = Scenes(count=12, size=64, seed=0)
    row_of = {float(source.truth(f"{row:08d}")["depth"].mean()): row for row in range(12)}
    sick: dict[int, str] = {}
    original: Callable[..., Label] = OracleDepth._one

    def one(self: OracleDepth, truth: Any, frame: Any) -> Label:
        label = original(self, truth, frame)
        if isinstance(label, Absent):
            return label
        row = row_of[float(np.asarray(label).mean())]
        return Absent(sick[row]) if row in sick else label

    monkeypatch.setattr(OracleDepth, "_one", one)
    return sick


def reasons(url: Path) -> dict[str, int]:
    return status(Dataset(str(url))).reasons["depth"]


def test_null_cells_alone_are_made_again(
    tmp_path: Path, modalities: dict[str, Any], sick: dict[int, str]
) -> None:
    url, whole = tmp_path / "ds", tmp_path / "whole"
    config = small_config(url, modalities, count=12, engine=ENGINE)
    sick |= {1: "depth hung", 2: "depth raised ValueError", 6: "depth hung"}
    with without_ray():
        build(config)
        assert reasons(url) == {"depth hung": 2, "depth raised ValueError": 1}
        before = make_snapshot(config)
        old = {index: np.array(before.column(index, "depth").tokens) for index in range(3)}
        assert build(config).rows_labelled == 0, "without being asked nothing is tried again"

        sick.clear()
        result = build(config, BuildOptions(retry_rejects="depth hung"))
        assert result.rows_labelled == 8, "two shards of four"
        assert reasons(url) == {"depth raised ValueError": 1}
        assert build(config, BuildOptions(retry_rejects="another reason")).rows_labelled == 0
        result = build(config, BuildOptions(retry_rejects=True))
        assert result.rows_labelled == 4 and result.status.complete
        assert reasons(url) == {}
        build(small_config(whole, modalities, count=12, engine=ENGINE))
    dataset = Dataset(str(url))
    (short,) = dataset.recipes("depth")
    current = {shard: dataset.receipt("depth", short, shard) for shard in (0, 1, 2)}
    assert [current[shard].epoch for shard in (0, 1, 2)] == [2, 1, 0]
    mine, theirs = data_files(url), data_files(whole)
    assert {current[s].file: mine[current[s].file] for s in current} == {
        name: digest for name, digest in theirs.items() if name.startswith("tokens/depth/")
    }, "as if nothing had ever gone wrong"
    assert {k: v for k, v in mine.items() if "semseg" in k} == {
        k: v for k, v in theirs.items() if "semseg" in k
    }
    held = Snapshot.load(str(url), before.digest)
    for index, tokens in old.items():
        assert np.array_equal(np.array(held.column(index, "depth").tokens), tokens), (
            "an earlier snapshot still holds"
        )


def test_beside_a_modality_that_is_missing(
    tmp_path: Path, modalities: dict[str, Any], sick: dict[int, str]
) -> None:
    """One job makes a new column whole, and of an old one the null cells alone."""
    url, whole = tmp_path / "ds", tmp_path / "whole"
    sick |= {1: "depth hung"}
    with without_ray():
        build(small_config(url, {"depth": modalities["depth"]}, count=12, engine=ENGINE))
        sick.clear()
        config = small_config(url, modalities, count=12, engine=ENGINE)
        assert build(config, BuildOptions(retry_rejects=True)).status.complete
        build(small_config(whole, modalities, count=12, engine=ENGINE))
    dataset = Dataset(str(url))
    assert reasons(url) == {}
    for name in NAMES:
        (short,) = dataset.recipes(name)
        for shard in range(3):
            file = dataset.receipt(name, short, shard).file
            assert (url / file).read_bytes() == (whole / file).read_bytes()


def test_kept_labels_are_tried_again_with_their_tokens(
    tmp_path: Path, modalities: dict[str, Any], sick: dict[int, str]
) -> None:
    """Tokens that are made from kept labels another time must not find a null cell there again."""
    url, whole = tmp_path / "ds", tmp_path / "whole"
    keeping = {**modalities, "depth": {**modalities["depth"], "keep_labels": True}}
    sick |= {1: "depth hung", 6: "depth hung"}
    with without_ray():
        build(small_config(url, keeping, count=12, engine=ENGINE))
        sick.clear()
        assert build(
            small_config(url, keeping, count=12, engine=ENGINE), BuildOptions(retry_rejects=True)
        ).status.complete
        build(small_config(whole, keeping, count=12, engine=ENGINE))
    dataset, undisturbed = Dataset(str(url)), Dataset(str(whole))
    for short in dataset.recipes("depth"):  # of the labels, and of the tokens
        for shard in range(3):
            receipt = dataset.receipt("depth", short, shard)
            assert receipt.absent == {} and receipt.epoch == (shard < 2)
            assert receipt.file == undisturbed.receipt("depth", short, shard).file
    before = status(dataset).to_json()
    with without_ray():
        assert (
            build(
                small_config(url, keeping, count=12, engine=ENGINE), BuildOptions(retry_rejects=True)
            ).rows_labelled
            == 0
        )
    assert status(dataset).to_json() == before


def test_in_vain_nothing_changes(tmp_path: Path, modalities: dict[str, Any], sick: dict[int, str]) -> None:
    url = tmp_path / "ds"
    config = small_config(url, modalities, count=12, engine=ENGINE)
    sick[5] = "depth hung"
    with without_ray():
        build(config)
        before = data_files(url)
        build(config, BuildOptions(retry_rejects=True))
    assert data_files(url) == before
    dataset = Dataset(str(url))
    (short,) = dataset.recipes("depth")
    assert dataset.receipt("depth", short, 1).epoch == 0


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--retry-rejects"], True),
        (["--retry-rejects", "--no-prefect"], True),
        (["--retry-rejects", "depth hung"], "depth hung"),
        ([], False),
    ],
)
def test_the_reason_may_be_left_out(
    arguments: list[str], wanted: bool | str, tmp_path: Path, modalities: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: list[Any] = []

    def run_flow(flow: Any, **parameters: Any) -> None:
        asked.append(parameters["retry_rejects"])
        raise KeyboardInterrupt

    monkeypatch.setattr(flow_runs, "run_flow", run_flow)
    config = write_config(
        tmp_path / "c.yaml", small_config(tmp_path / "ds", modalities).model_dump(mode="json")
    )
    assert call_main("build", config, *arguments) == 3
    assert asked == [wanted]
