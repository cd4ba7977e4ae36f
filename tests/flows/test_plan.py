"""What a plan finds from listings and receipts: stale columns and why, null cells to try again, one request per column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_builds import ORACLES, small_config, with_tokenizers, without_ray

from fourmill.errors import WorkMissing
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.plan import column_states, make_plan, retryable, why_stale
from fourmill.flows.resolve import recipe_diff, resolve
from fourmill.flows.status import status, status_report
from fourmill.labels import DUPLICATE, NO_CAPTION
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Receipt, Recipe
from fourmill.storage import Store

OLD = Recipe(
    "token",
    {"label": {"labeler": "depth", "version": 1, "weights": "sha256:" + "ab" * 32}, "tokenizer": "0" * 64},
)
NEW = Recipe(
    "token",
    {"label": {"labeler": "depth", "version": 2, "weights": "sha256:" + "cd" * 32}, "tokenizer": "0" * 64},
)


def commit(
    dataset: Dataset, recipe: Recipe, shard: int, column: str = "depth", epoch: int = 0, **absent: int
) -> Receipt:
    receipt = Receipt(
        column=column, recipe=recipe.hash, shard=shard, rows=4, absent=absent, presence="Dw==", keys="k",
        file=f"tokens/{column}/x", sha256="s", bytes=1, dataset=dataset.digest, epoch=epoch,
    )  # fmt: skip
    assert dataset.commit(recipe, receipt)
    return receipt


@pytest.fixture(params=["folder", "memory", "remote"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    url = str(tmp_path / "ds") if request.param == "folder" else f"memory://{tmp_path.name}"
    dataset = Dataset.create(url, {"shard_size": 4})
    if request.param == "remote":
        dataset.store.is_remote = True
        dataset.store.put_if_absent = lambda name, data: dataset.store.put(name, data) or True  # type: ignore
    return dataset


def test_states_of_columns(dataset: Dataset) -> None:
    for shard in (0, 1):
        commit(dataset, OLD, shard)
    commit(dataset, NEW, 1)
    commit(dataset, NEW, 1, epoch=1)
    commit(dataset, NEW, 2)
    commit(dataset, Recipe("label", {"labeler": "depth"}), 4)
    for shard in (2, 3):
        dataset.park("depth", NEW.short, shard, "ab12", "broken")
    states, listings = column_states(dataset, {"depth": NEW, "normal": None}, range(5))
    assert states["depth"].finished == {1, 2}
    assert states["depth"].stale == {0} and states["depth"].stale_recipes == (OLD.short,)
    assert states["depth"].parked == {3}, "shard 2 has a receipt since"
    assert not states["normal"].finished and not states["normal"].stale
    assert listings["depth"].finished(NEW.short) == {1, 2} == dataset.finished("depth", NEW.short)
    assert dataset.receipts("depth", NEW.short, listings["depth"])[1].epoch == 1
    assert why_stale(dataset, "depth", NEW, states["depth"]) == [
        "label.version: 1 -> 2",
        "label.weights: sha256:abababababab.. -> sha256:cdcdcdcdcdcd..",
    ]
    commit(dataset, NEW, 0)
    assert column_states(dataset, {"depth": NEW}, range(5))[0]["depth"].stale_recipes == ()


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
        ({"a": 1}, {"a": True}, ["a: 1 -> true"]),
        ({"a": 1}, {"b": [1, "é"]}, ["a: 1 -> nothing", 'b: nothing -> [1, "é"]']),
        ({"a": None}, {}, ["a: null -> nothing"]),
        ({"a": {}}, {"a": {"b": ""}}, ["a: {} -> nothing", 'a.b: nothing -> ""']),
        ({"h": "0" * 64}, {"h": "1" * 64}, [f"h: {'0' * 12}.. -> {'1' * 12}.."]),
        ({"h": "0" * 63 + "1"}, {"h": "0" * 64}, [f'h: "{"0" * 63}1" -> "{"0" * 64}"']),
        ({"a": 1}, {"a": "1"}, ['a: 1 -> "1"']),
        ({"a": "nothing"}, {}, ['a: "nothing" -> nothing']),
    ],
)
def test_differences_of_recipes(old: dict[str, Any], new: dict[str, Any], lines: list[str]) -> None:
    assert recipe_diff(old, new) == lines


def test_null_cells_that_may_be_tried_again(tmp_path: Path) -> None:
    dataset = Dataset.create(str(tmp_path), {"shard_size": 4})
    samples = commit(dataset, OLD, 0, SAMPLES, **{"truncated": 1, DUPLICATE: 2})
    for absent, reason, expected in (
        ({"truncated": 1, DUPLICATE: 2}, True, 0),
        ({"truncated": 1, DUPLICATE: 2, NO_CAPTION: 1}, True, 0),
        ({"truncated": 2, "depth raised ValueError": 1}, True, 2),
        ({"truncated": 2, "depth raised ValueError": 1}, "truncated", 1),
        ({"truncated": 1, "depth raised ValueError": 1}, "truncated", 0),
        ({"depth raised ValueError": 3}, "depth raised", 0),
    ):
        receipt = Receipt(
            column="depth", recipe="r", shard=0, rows=9, absent=absent, presence="", keys="k", file="f", sha256="s",
            bytes=1, dataset="d",
        )  # fmt: skip
        assert retryable(receipt, samples, reason) == expected, (absent, reason)


def test_a_changed_labeler_makes_its_modality_stale_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modalities: dict[str, Any] = {"rgb_pixels": {}, "depth": ORACLES["depth"]}
    with without_ray():
        build(small_config(tmp_path / "fitted", modalities, count=8))
        modalities = with_tokenizers(tmp_path / "fitted", modalities)
        config = small_config(tmp_path / "ds", modalities, count=8)
        build(config)
        changed = {**modalities, "depth": {**modalities["depth"], "precision": "bf16"}}
        again = small_config(tmp_path / "ds", changed, count=8)
        with pytest.raises(WorkMissing, match="stale"):
            build(again)
    dataset = Dataset(str(tmp_path / "ds"))
    plan = make_plan(resolve(again), dataset)
    assert plan.jobs == [] and plan.states["depth"].stale == {0, 1} and not plan.states["rgb_pixels"].stale
    assert [(j.shard, j.tokens) for j in make_plan(resolve(again), dataset, redo_stale=True).jobs] == [
        (0, ("depth",)), (1, ("depth",)),
    ]  # fmt: skip
    found = status(dataset)
    assert found.why_stale == {"depth": ["label.precision: fp32 -> bf16"]}
    console = Console(record=True, width=200)
    console.print(status_report(found, dataset.url))
    assert "stale depth: label.precision: fp32 -> bf16" in console.export_text()

    reads: list[str] = []
    original = Store.read_if_exists

    def noted(self: Store, name: str) -> bytes | None:
        reads.append(name)
        return original(self, name)

    monkeypatch.setattr(Store, "read_if_exists", noted)
    make_plan(resolve(config), dataset)
    assert not [name for name in reads if name.startswith("receipts/depth") and "shard-" in name], reads


def test_planning_again_reads_no_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with without_ray():
        config = small_config(tmp_path / "ds", {"rgb_pixels": {}}, count=8)
        build(config, BuildOptions())
    dataset = Dataset(str(tmp_path / "ds"))
    first = make_plan(resolve(config), dataset)
    monkeypatch.setattr(Receipt, "from_json", lambda *a: pytest.fail("read again"))
    assert make_plan(resolve(config), dataset) == first
