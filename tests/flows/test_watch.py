"""Progress from receipts: the figures, what is read for them, and how it looks in a build and from another terminal."""

from __future__ import annotations

import io
import json
import signal
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from small_builds import (
    ORACLES,
    call_main,
    small_config,
    started,
    wait_until,
    without_ray,
)

from fourmill.flows import progress, watch, watch_show
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.watch import Line, Watch
from fourmill.flows.watch_show import human_seconds
from fourmill.shards.dataset import Dataset
from fourmill.shards.receipts import Receipt, Recipe, pack_presence

BEGAN = 1_700_000_000.0  # 2023-11-14T22:13:20Z
RUN = "runs/20231114T221320000000-abcdef.yaml"
RECIPE = Recipe("token", {"labeler": "depth"})
PLAIN: dict[str, Any] = {"rgb_pixels": {}, "depth": ORACLES["depth"]}


@pytest.fixture(params=["local", "memory"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """Of 40 shards of 100 rows, with a run that asks for depth (and for normals, once their tokenizer is fitted)."""
    url = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "ds")
    made = Dataset.create(url, {"seed": 0})
    remember(made, RUN)
    return made


def remember(dataset: Dataset, name: str, **asked: Any) -> None:
    content = {
        "recipes": {"depth": {"kind": "token", **RECIPE.content}, "normal": None},
        "shards": {str(shard): 100 for shard in range(40)},
        **asked,
    }
    dataset.store.put(name, yaml.safe_dump(content).encode())


def commit(
    dataset: Dataset,
    shard: int,
    after: float,
    *,
    absent: dict[str, int] | None = None,
    epoch: int = 0,
    **spent: float,
) -> None:
    """A receipt of depth, ``after`` seconds since the run began."""
    absent = absent or {}
    receipt = Receipt(
        column="depth", recipe=RECIPE.hash, shard=shard, rows=100, absent=absent,
        presence=pack_presence(np.arange(100) >= sum(absent.values())), keys="k", file="f", sha256="s", bytes=1,
        dataset=dataset.digest, environment={"device": "cpu"}, timings={**spent, "committed": BEGAN + after}, epoch=epoch,
    )  # fmt: skip
    assert dataset.commit(RECIPE, receipt)


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(watch.time, "time", lambda: BEGAN + seconds)


def depth(view: Watch) -> Line:
    return next(line for line in view.look().lines if line.name == "depth")


# -- figures ------------------------------------------------------------------------------------------


def test_a_line_adds_up(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 100)
    for shard in range(10):
        commit(
            dataset, shard, 10 * shard, absent={"depth raised ValueError": 2, "no caption": 5},
            forward=3.0, tokenize=1.0, busy=6.0, starved=2.0,
        )  # fmt: skip
    line = depth(Watch(dataset))
    assert (line.finished, line.total, line.parked, line.rejects) == (10, 40, 0, 20), "no caption is no fault"
    assert line.rate == pytest.approx(1000 / 100)
    assert line.left == pytest.approx(3000 / 10)
    assert line.wait == pytest.approx(0.25)
    assert (line.seconds, line.per_thousand) == (pytest.approx(40.0), pytest.approx(40.0))


def test_the_pace_is_that_of_the_last_minutes(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 2000)
    for shard in range(20):
        commit(dataset, shard, 10 + shard, busy=1.0, starved=9.0)  # at the beginning: long ago
    for shard in range(20, 32):
        commit(dataset, shard, 1710 + 20 * (shard - 20), busy=3.0, starved=1.0)
    line = depth(Watch(dataset))
    assert line.rate == pytest.approx(1200 / 300) and line.wait == pytest.approx(0.25)


def test_few_receipts_count_however_old(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Big shards: the last eight and the time since the one before them."""
    at(monkeypatch, 10_000)
    for shard in range(10):
        commit(dataset, shard, 1000 * shard)
    assert depth(Watch(dataset)).rate == pytest.approx(800 / 9000)


def test_earlier_runs_say_nothing_of_the_pace(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 50)
    for shard in range(10):
        commit(dataset, shard, -500 + shard, forward=2.0)
    line = depth(Watch(dataset))
    assert (line.finished, line.rate, line.left) == (10, None, None)
    assert line.seconds == pytest.approx(20.0)


def test_a_finished_modality_keeps_its_pace(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(40):
        commit(dataset, shard, shard + 31, decode=0.75, wait=0.25)  # after half a minute of starting
    at(monkeypatch, 9000)
    line = depth(Watch(dataset))
    assert line.rate == pytest.approx(4000 / 40) and line.left == 0
    assert not Watch(dataset).look().complete, "normals have no tokenizer yet"


def test_parked_shards_are_shown_until_they_are_made(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, 5)
    view = Watch(dataset)
    dataset.park("depth", RECIPE.short, 3, "a", "why")
    assert depth(view).parked == 1
    commit(dataset, 3, 1)
    assert depth(view).parked == 0


# -- reading ------------------------------------------------------------------------------------------


def test_each_receipt_is_read_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 50)
    read: list[str] = []
    whole = type(dataset.store).read

    def noted(store: Any, name: str) -> bytes:
        read.append(name)
        return whole(store, name)

    monkeypatch.setattr(type(dataset.store), "read", noted)
    for shard in range(3):
        commit(dataset, shard, shard)
    view = Watch(dataset)
    assert depth(view).finished == 3 and len([n for n in read if n.startswith("receipts/")]) == 3
    read.clear()
    assert depth(view).finished == 3 and read == []
    commit(dataset, 3, 4)
    assert depth(view).finished == 4 and len(read) == 1
    for shard in range(4, 40):
        commit(dataset, shard, shard)
    read.clear()
    assert depth(view).finished == 40 and len(read) >= 36
    read.clear()
    assert depth(view).finished == 40 and read == []


def test_a_second_attempt_replaces_the_first(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 50)
    view = Watch(dataset)
    commit(dataset, 0, 1, absent={"depth raised ValueError": 7}, forward=1.0)
    assert depth(view).rejects == 7
    commit(dataset, 0, 2, epoch=1, forward=3.0)
    line = depth(view)
    assert (line.finished, line.rejects, line.seconds) == (1, 0, pytest.approx(3.0))


def test_a_new_run_is_found(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 200)
    view = Watch(dataset)
    commit(dataset, 0, 10, read=10.0)
    assert depth(view).rate == pytest.approx(0.5)
    remember(dataset, "runs/20231114T221500000000-abcdef.yaml", tokens=["depth"])  # 100 s later
    picture = view.look()
    assert [(line.name, line.rate) for line in picture.lines] == [("depth", None)]
    commit(dataset, 1, 150, read=60.0)
    assert depth(view).rate == pytest.approx(1.0)


def test_labels_that_are_kept_have_lines_of_their_own(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, 50)
    asked = {"depth": {"recipe": RECIPE.short, "shards": [1, 5]}}
    remember(dataset, "runs/20231114T221321000000-abcdef.yaml", labels=asked, tokens=[])
    for shard in (0, 5):
        commit(dataset, shard, 10)
    view = Watch(dataset)
    (line,) = view.look().lines
    assert (line.name, line.finished, line.total) == ("depth labels", 1, 2), "shard 0 is not asked for"
    commit(dataset, 1, 20)
    assert view.look().complete


# -- showing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3590, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_time_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of four rows, complete, with a tokenizer that was fitted."""
    url = tmp_path_factory.mktemp("pilot") / "ds"
    with without_ray():
        build(small_config(url, PLAIN, count=8), BuildOptions())
    return url


def test_watching_ends_when_a_dataset_is_complete(pilot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main("status", pilot, "--watch") == 0
    said = capsys.readouterr().out
    assert "depth: 2/2 shards" in said and "CPU-s" in said and said.rstrip().endswith("complete")
    assert call_main("status", pilot, "--watch", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["complete"] and [entry["name"] for entry in found["lines"]] == list(PLAIN)
    assert all(entry["rate"] > 0 and entry["seconds"] > 0 for entry in found["lines"])


def test_a_build_says_how_it_went(pilot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal one line per modality at the end; on one, a table under the bar."""
    for terminal in (False, True):
        screen = Console(file=io.StringIO(), force_terminal=terminal, width=110)
        for module in (progress, watch_show):
            monkeypatch.setattr(module, "console", screen)
        with without_ray():
            build(small_config(tmp_path / str(terminal), {"rgb_pixels": {}}, count=8), BuildOptions())
        shown = screen.file.getvalue()  # type: ignore[attr-defined]
        assert ("rgb_pixels: 2/2 shards" in shown) is not terminal
        assert "per 1,000" in shown and "2/2" in shown


def test_the_fit_set_is_watched_too(pilot: Path) -> None:
    runs = [yaml.safe_load(path.read_text()) for path in sorted((pilot / "runs").iterdir())]
    fit, whole = runs
    assert set(fit["labels"]) == {"depth"} and fit["labels"]["depth"]["shards"] == [0, 1]
    assert "tokens" not in fit, "tokens follow: it is not complete when labels are"
    assert not {"labels", "tokens"} & whole.keys()


def test_trouble_is_shown_and_passes(pilot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown beside the work never ends it."""
    lines = watch_show.BuildLines(str(pilot))

    def fails(_: Watch) -> Any:
        raise OSError("storage\nis slow")

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "look", fails)
        lines.finish()
        assert "storage is slow" in str(lines.__rich__())
    lines.finish()
    assert "storage" not in str(lines.__rich__())


def test_interrupted_watching_is_no_failure(pilot: Path, tmp_path: Path) -> None:
    """From another process, while there is work left."""
    url = tmp_path / "ds"
    with without_ray():
        build(small_config(url, {"rgb_pixels": {}}, count=8), BuildOptions(limit=4))
    run = max((url / "runs").iterdir())
    later = run.with_name("29991231T000000000000-abcdef.yaml")
    later.write_text(run.read_text().replace("shards:\n", "shards:\n  '7': 4\n"))
    with started("status", url, "--watch", cwd=tmp_path) as process:
        said = tmp_path / "output.txt"
        wait_until(lambda: "1/2 shards" in said.read_text(), 60, "the first look", process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, said.read_text()
