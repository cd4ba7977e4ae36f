"""Scores as columns: made from other labels, stale with them, and what a snapshot chooses its rows by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_builds import ORACLES, small_config, without_ray

from fourmill.errors import ConfigError
from fourmill.flows.build import build
from fourmill.flows.resolve import resolve
from fourmill.flows.training import make_snapshot, train_model
from fourmill.labels import Absent
from fourmill.shards.dataset import Dataset
from fourmill.shards.filters import parse_conditions
from fourmill.shards.snapshot import Snapshot

SCORED: dict[str, Any] = {
    "caption": {},
    "depth": ORACLES["depth"],
    "normal": ORACLES["normal"],
    "normal_vs_depth": {},
    "clip_score": {"input_size": 128},
}
TRAIN = {
    "preset": "demo",
    "steps": 2,
    "batch_size": 4,
    "warmup_steps": 0,
    "num_input_tokens": 8,
    "num_target_tokens": 8,
}


def config_of(url: Path, *where: str, **changes: Any) -> Any:
    return small_config(url, SCORED, count=16, n_crops=2, train={**TRAIN, "where": where}, **changes)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("scored") / "ds"
    with without_ray():
        build(config_of(url))
    return url


def scores(snapshot: Snapshot, name: str) -> np.ndarray:
    columns = [snapshot.column(shard, name).tokens for shard in range(len(snapshot.shards))]
    return np.concatenate([c.reshape(-1) for c in columns if c is not None])


def test_a_score_is_one_number_per_row(url: Path) -> None:
    snapshot = make_snapshot(config_of(url))
    assert scores(snapshot, "normal_vs_depth").shape == (16,)
    assert (scores(snapshot, "normal_vs_depth") < 5).all(), "degrees"
    assert np.ptp(scores(snapshot, "clip_score")) > 0
    assert snapshot.chosen == 16 and snapshot.where == []


def test_its_recipe_depends_on_both_labels(url: Path) -> None:
    before = resolve(config_of(url)).wanted["normal_vs_depth"].label_recipe
    other = {**SCORED, "depth": {"labeler": "depth", "input_size": 64}}
    after = resolve(small_config(url, other, count=16, n_crops=2)).wanted["normal_vs_depth"].label_recipe
    assert before.hash != after.hash
    assert set(before.content["inputs"]) == {"depth", "normal"}


def test_a_snapshot_chooses_rows(url: Path) -> None:
    found = scores(make_snapshot(config_of(url)), "clip_score")
    middle = float(np.median(found))
    chosen = make_snapshot(config_of(url, f"clip_score >= {middle!r}", "normal_vs_depth < 90"))
    kept = np.concatenate([chosen.is_kept(shard) for shard in range(len(chosen.shards))])
    assert np.array_equal(kept, found >= np.float32(middle)) and 0 < chosen.chosen < 16
    used = np.concatenate([chosen.is_train(s) | chosen.is_val(s) for s in range(len(chosen.shards))])
    assert np.array_equal(used, kept)
    again = Snapshot.load(str(url), chosen.digest)
    assert again.where == chosen.where and again.chosen == chosen.chosen
    assert again.digest != make_snapshot(config_of(url)).digest


def test_training_reads_what_was_chosen_and_no_score(url: Path, tmp_path: Path) -> None:
    result = train_model(config_of(url, "clip_score > -1"), tmp_path / "run")
    assert result.step == 2
    assert "clip_score" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "clip_scor > 0.2",
            "'clip_scor' is no scalar modality of this configuration; did you mean 'clip_score'",
        ),
        ("depth > 0.2", "'depth' is no scalar modality of this configuration"),
        ("clip_score > 2", "not one of 16 rows fulfils clip_score > 2; loosen it"),
        ("clip_score ~ 0.2", "'clip_score ~ 0.2' is no condition; write it as MODALITY >= NUMBER"),
        ("clip_score > 1.2.3", "is no condition"),
    ],
)
def test_conditions_that_cannot_be_met(where: str, message: str, url: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        make_snapshot(config_of(url, where))


def test_rows_without_a_score(url: Path) -> None:
    """Nothing to score is no reason to leave a row out; a score that could not be made is."""
    from fourmill.shards.arrow import column_table, open_column

    modality = resolve(config_of(url)).wanted["clip_score"].modality
    cells: list[Any] = [[0.5], Absent("n/a: no box"), Absent("clip_score hung"), [0.1]]
    column = open_column(column_table(modality, cells, 2, {}), "x")
    (condition,) = parse_conditions(["clip_score >= 0.2"], "train.where")
    assert condition.keeps(column).tolist() == [True, True, False, False]


def test_a_score_is_stale_with_the_label_that_it_is_made_from(url: Path) -> None:
    other = {**SCORED, "normal": {"labeler": "normal_from_depth"}}
    with without_ray():
        build(small_config(url, other, count=16, n_crops=2), _redo())
    dataset = Dataset(str(url))
    recipe = resolve(small_config(url, other, count=16, n_crops=2)).token_recipes()["normal_vs_depth"]
    assert len(dataset.receipts("normal_vs_depth", recipe.short)) == 4
    assert len(dataset.recipes("clip_score")) == 1, "which is not made from it"


def _redo() -> Any:
    from fourmill.flows.build import BuildOptions

    return BuildOptions(redo_stale=True)
