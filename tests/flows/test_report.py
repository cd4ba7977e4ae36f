"""The report: its numbers, its page, and what it does about hostile text, missing truth and other people's models."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fourmill.config import Config
from fourmill.errors import CheckpointError, ConfigError, WorkMissing
from fourmill.flows.report import ReportResult, make, make_report, numbers_table
from fourmill.flows.report.curve import loss_chart, round_ticks, spread
from fourmill.flows.report.measures import Baseline, family_of, measure_class, targets_of
from fourmill.flows.report.pictures import Painter, Palette, depth_ticks
from fourmill.flows.report.view import View
from fourmill.labelers.depth import DEPTH
from fourmill.labelers.det import DET
from fourmill.labelers.normal import NORMAL
from fourmill.labelers.semseg import SEMSEG
from fourmill.labels import Boxes
from fourmill.modality import CAPTION, RGB
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.sources.scenes import SCENE_CLASSES, render
from fourmill.storage import Store
from fourmill.train.metrics import abs_rel, mean_iou

Built = tuple[Config, str]


@pytest.fixture(scope="module")
def report(built: Built, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> ReportResult:
    """Three samples shown, all measured; its files are copied, for other tests write theirs in the same place."""
    made = make_report(built[1], trained, samples=3)
    kept = tmp_path_factory.mktemp("report") / "reports"
    shutil.copytree(Path(built[1]) / "reports", kept)
    assert (made.path, made.chain) == (f"{built[1]}/reports/index.html", f"{built[1]}/reports/chain.png")
    return replace(made, path=str(kept / "index.html"), chain=str(kept / "chain.png"))


@pytest.fixture(scope="module")
def page(report: ReportResult) -> str:
    return Path(report.path).read_text()


class Seen(HTMLParser):
    """The tags of a page, with their attributes, and whether they close."""

    VOID = frozenset({"meta", "img", "br", "col", "line", "path", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def is_self_contained(text: str) -> Seen:
    """No script, no handler, and nothing that a browser would fetch."""
    seen = Seen(text)
    assert not seen.open
    for tag, attributes in seen.tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form"}, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "srcset", "xlink:href", "data", "action"}:
                assert str(value).startswith(("data:image/", "#")), (tag, name, str(value)[:80])
    css = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in css and "@import" not in css
    return seen


# -- numbers ------------------------------------------------------------------------------------------


def test_every_link_has_its_number(report: ReportResult) -> None:
    figures = {name: entry["figures"] for name, entry in report.numbers["modalities"].items()}
    for name, figure in (("depth", "abs_rel"), ("normal", "mean_degrees"), ("semseg", "miou")):
        assert figures[name][figure].keys() == {"label", "round_trip", "model", "baseline"}
        assert report.numbers["modalities"][name]["compared_with"] == "truth"
    assert figures["det"]["ap50"].keys() == {"label", "round_trip", "model"}
    assert figures["clip"]["cosine"].keys() == {"round_trip", "model", "baseline"}
    assert figures["rgb"]["psnr_db"].keys() == {"round_trip"}
    assert figures["depth"]["abs_rel"]["round_trip"] < figures["depth"]["abs_rel"]["baseline"]
    assert figures["depth"]["abs_rel"]["label"] < figures["depth"]["abs_rel"]["baseline"]
    assert figures["normal"]["mean_degrees"]["label"] < 25 < figures["normal"]["mean_degrees"]["baseline"]
    assert figures["semseg"]["miou"]["label"] > figures["semseg"]["miou"]["baseline"] + 0.3
    assert figures["caption"]["exact"]["round_trip"] > 0.9
    assert {target["modality"] for target in report.numbers["targets"]} == {"depth", "normal", "semseg"}
    assert report.numbers["model"]["step"] == 6 and not report.numbers["notes"]


def test_json_is_beside_the_page(report: ReportResult) -> None:
    assert json.loads((Path(report.path).parent / "report.json").read_text()) == report.numbers


def test_baseline_is_fitted_on_training_and_measured_on_held_out_samples(
    built: Built, report: ReportResult
) -> None:
    """Computed again here, from the snapshot and the renderer alone."""
    snapshot = Snapshot.load(built[1])
    view = View.open(built[1], snapshot.digest)
    train: dict[str, list[Any]] = {"depth": [], "semseg": []}
    truth = []
    for shard in range(len(snapshot.shards)):
        for name, decoded in train.items():
            tokens = snapshot.column(shard, name).tokens
            assert tokens is not None
            decoded += view.codecs[name].decode(list(tokens[snapshot.is_train(shard), 0]))
        keys = snapshot.keys(shard)
        truth += [render(0, int(keys[row]), 128) for row in np.flatnonzero(snapshot.is_val(shard))]
    assert report.numbers["samples_measured"] == len(truth) > 4
    mean = np.asarray(np.mean(train["depth"], axis=0, dtype=np.float64))
    votes = np.stack([np.sum(np.stack(train["semseg"]) == c, axis=0) for c in range(5)]).argmax(0)
    figures = {name: entry["figures"] for name, entry in report.numbers["modalities"].items()}
    expected = float(np.mean([abs_rel(mean, scene.depth) for scene in truth]))
    assert figures["depth"]["abs_rel"]["baseline"] == pytest.approx(expected, abs=2e-5)
    maps = np.stack([scene.semseg for scene in truth])
    expected = mean_iou(np.broadcast_to(votes, maps.shape), maps, len(SCENE_CLASSES))
    assert figures["semseg"]["miou"]["baseline"] == pytest.approx(expected, abs=2e-5)


def test_only_held_out_samples_are_measured(
    built: Built, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, set[str]] = {}

    def spy(name: str) -> Callable[..., Any]:
        function = getattr(make, name)

        def call(view: View, *rest: Any) -> Any:
            samples = rest[0] if name == "fit_baselines" else rest[1]
            asked[name] = {sample.split for sample in samples}
            return function(view, *rest)

        return call

    for name in ("fit_baselines", "follow"):
        monkeypatch.setattr(make, name, spy(name))
    made = make_report(built[1], trained, samples=1, metric_samples=3)
    assert asked == {"fit_baselines": {"train"}, "follow": {"val"}}
    assert made.numbers["samples_measured"] == 3


def test_the_terminal_table_says_what_the_json_says(report: ReportResult) -> None:
    text = _printed(numbers_table(report.numbers))
    assert f"{report.numbers['modalities']['depth']['figures']['abs_rel']['model']:.3f}" in text
    assert "round trip to label" in text and "AbsRel ↓" in text
    assert text.count("reached") + text.count("missed") == 3


# -- the page -----------------------------------------------------------------------------------------


def test_page_is_one_file_that_fetches_nothing(page: str) -> None:
    seen = is_self_contained(page)
    assert "default-src 'none'" in page
    pictures = [a for tag, a in seen.tags if tag == "img" and a.get("alt", "")]
    assert len(pictures) >= 3 * (6 + 6 + 5 + 4)  # 3 samples: label, round trip, model, truth
    assert "data:image/webp" in page and "data:image/png" in page
    assert "prefers-color-scheme: dark" in page


def test_page_shows_held_out_keys_legends_losses_and_states(page: str, built: Built) -> None:
    snapshot = Snapshot.load(built[1])
    held = {k for s in range(3) for k, v in zip(snapshot.keys(s), snapshot.is_val(s), strict=True) if v}
    shown = re.findall(r'<header><span class="key">(.*?)</span>', page)
    assert len(shown) == 3 and set(shown) <= held
    text = " ".join(Seen(page).text)
    for word in (*SCENE_CLASSES, "predicted from RGB alone", "first three principal components", "finished"):
        assert word in text
    assert page.count('class="line s') == 7  # one loss for each modality
    assert re.search(r"(reached|missed)", text) and "AP50" in text


def test_chain_picture_has_a_row_for_each_sample(report: ReportResult) -> None:
    with Image.open(report.chain) as picture:
        assert (
            picture.format == "PNG" and picture.width > 1400 and picture.height == 16 + 44 + 3 * 116 - 4 + 16
        )
        colours = picture.convert("RGB").resize((200, 40)).getcolors(8000)
    assert colours is not None and len(colours) > 500


def test_without_a_model_its_columns_are_left_out(built: Built) -> None:
    made = make_report(built[1], samples=1, metric_samples=2)
    for entry in made.numbers["modalities"].values():
        assert all("model" not in values for values in entry["figures"].values())
    assert made.numbers["targets"] == [] and made.numbers["model"] is None
    text = Path(made.path).read_text()
    is_self_contained(text)
    assert "predicted from RGB alone" not in text and 'class="chart"' not in text


def test_photographs_have_no_truth_and_hostile_text_is_escaped(photographed: Any) -> None:
    made = make_report(photographed.url, samples=12)
    assert not made.numbers["has_truth"] and made.numbers["samples_measured"] > 2
    for entry in made.numbers["modalities"].values():
        assert entry["compared_with"] == "label"
        assert all("label" not in values for values in entry["figures"].values())
    text = Path(made.path).read_text()
    seen = is_self_contained(text)
    assert "The source has no truth" in text and "of the source</small>" not in text
    shown = " ".join(seen.text)
    assert photographed.hostile in shown and photographed.broken in shown and photographed.caption in shown
    assert "&lt;script&gt;alert" in text and str(7 * 191) not in shown
    assert "truncated" in shown and "too small" in shown
    assert "label to truth" not in _printed(numbers_table(made.numbers))


def test_nothing_held_out_is_shown_but_not_measured(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = View.choose
    monkeypatch.setattr(
        View, "choose", lambda self, split, n: [] if split == "val" else choose(self, split, n)
    )
    made = make_report(built[1], samples=2)
    assert made.numbers["modalities"] == {} and made.numbers["samples_measured"] == 0
    text = Path(made.path).read_text()
    assert "training samples and nothing is measured" in text and text.count('<article class="sample">') == 2


def test_labels_of_another_labeler_are_not_passed_off_as_these(
    built: Built, trained: Path, tmp_path: Path
) -> None:
    """The newest run asks for another threshold: the stored tokens are not those of its labels."""
    url = str(tmp_path / "demo")
    shutil.copytree(built[1], url)
    run = yaml.safe_load(max((tmp_path / "demo/runs").iterdir()).read_text())
    run["config"]["modalities"]["det"]["min_score"] = 0.7
    (tmp_path / "demo/runs/30000101T000000000000-000000.yaml").write_text(yaml.safe_dump(run))
    made = make_report(url, trained, samples=1, metric_samples=4)
    assert made.numbers["modalities"]["det"]["figures"]["ap50"].keys() == {"model"}
    assert "labeler has changed" in made.numbers["notes"]["det"]
    assert "label" in made.numbers["modalities"]["depth"]["figures"]["abs_rel"]


def test_a_dataset_on_object_storage_gets_its_report_there(built: Built, trained: Path) -> None:
    store = Store("memory://report/demo")
    for path in Path(built[1]).rglob("*"):
        if path.is_file() and "reports" not in path.parts:
            store.put(str(path.relative_to(built[1])), path.read_bytes())
    made = make_report(store.url, trained, samples=1, metric_samples=2)
    assert made.path == "memory://report/demo/reports/index.html"
    assert b"<!doctype html>" in store.read("reports/index.html")
    assert json.loads(store.read("reports/report.json"))["samples_measured"] == 2
    assert store.read("reports/chain.png").startswith(b"\x89PNG")


def test_the_errors_are_one_line(built: Built, trained: Path, photographed: Any, tmp_path: Path) -> None:
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ConfigError, "not a dataset", lambda: make_report(str(tmp_path))),
        (CheckpointError, "no such folder", lambda: make_report(built[1], tmp_path / "nowhere")),
        (CheckpointError, "no complete checkpoint", lambda: make_report(built[1], tmp_path)),
        (CheckpointError, "which .* does not have", lambda: make_report(photographed.url, trained)),
    ]
    for error, text, call in cases:
        with pytest.raises(error, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)
    shutil.copytree(built[1], tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo/receipts")
    with pytest.raises(WorkMissing, match="no finished shard"):
        make_report(str(tmp_path / "demo"))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the page with")
def test_a_browser_draws_it_in_light_and_in_dark(report: ReportResult, tmp_path: Path) -> None:
    shots = []
    for scheme in (1, 0):  # light, dark
        shot = tmp_path / f"{scheme}.png"
        command = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1280,1800", f"--screenshot={shot}", Path(report.path).as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as picture:
            shots.append(np.asarray(picture.convert("RGB"), dtype=np.float64))
    light, dark = shots
    assert light[:40].mean() > 235 and dark[:40].mean() < 60  # the paper
    pictures = light[1200:, 200:1200]
    saturation = pictures.max(-1) - pictures.min(-1)
    assert (saturation > 60).mean() > 0.1  # normals and classes are in colour


# -- the parts ----------------------------------------------------------------------------------------


def test_class_measure_counts_over_all_samples() -> None:
    modality = SEMSEG.with_classes(("a", "b", "c"))
    measure = measure_class(modality)(modality)
    rng = np.random.default_rng(0)
    made, true = rng.integers(0, 3, (2, 5, 8, 8)).astype(np.uint8)
    true[0, 0] = 255  # void
    for a, b in zip(made, true, strict=True):
        measure.add(a, b)
    assert measure.values()["miou"] == pytest.approx(mean_iou(made, true, 3))


def test_baselines_are_mean_renormalised_mean_and_mode() -> None:
    depth = Baseline(DEPTH)
    depth.add([np.full((2, 2), 1, np.float32), np.full((2, 2), 4, np.float32)])
    normal = Baseline(NORMAL)
    normal.add([np.full((1, 1, 3), [1, 0, 0], np.float32), np.full((1, 1, 3), [0, 0, 1], np.float32)])
    modality = SEMSEG.with_classes(("a", "b"))
    classes = Baseline(modality)
    classes.add([np.array([[0, 1]], np.uint8), np.array([[0, 1]], np.uint8), np.array([[1, 255]], np.uint8)])
    label = depth.label()
    assert label is not None and label.dtype == np.float32 and (label == 2.5).all()
    assert normal.label() == pytest.approx(np.array([[[math.sqrt(0.5), 0, math.sqrt(0.5)]]]))
    mode = classes.label()
    assert mode is not None and mode.tolist() == [[0, 1]]
    assert Baseline(DEPTH).label() is None


def test_targets_are_those_of_the_design() -> None:
    met = targets_of("depth", "depth", {"abs_rel": 0.35}, {"abs_rel": 0.5})[0]
    assert met.passed and met.limit == pytest.approx(0.35)
    assert not targets_of("depth", "depth", {"abs_rel": 0.36}, {"abs_rel": 0.5})[0].passed
    assert targets_of("n", "normal", {"mean_degrees": 24.0}, {"mean_degrees": 30.0})[0].passed
    assert not targets_of("n", "normal", {"mean_degrees": 25.0}, {"mean_degrees": 30.0})[0].passed
    assert targets_of("s", "classes", {"miou": 0.46}, {"miou": 0.3})[0].passed
    assert not targets_of("s", "classes", {"miou": 0.44}, {"miou": 0.3})[0].passed
    assert targets_of("depth", "depth", {}, {"abs_rel": 0.5}) == []


def test_text_is_compared_by_words() -> None:
    measure = measure_class(CAPTION)(CAPTION)
    measure.add("A red ball.", ["a red ball ."])
    measure.add("a red ball", "a blue ball")
    assert measure.values() == {"token_f1": pytest.approx((1 + 2 / 3) / 2), "exact": 0.5}


def test_near_is_lighter_and_the_scale_is_shared() -> None:
    painter = Painter(DEPTH, 8, Palette(), [np.geomspace(1, 10, 64, dtype=np.float32).reshape(8, 8)])
    drawn = painter.paint(np.array([[1, 2, 4, 10]], np.float32))
    assert drawn is not None
    assert np.all(np.diff(drawn[0] @ np.array([0.299, 0.587, 0.114])) < -15)
    ticks = depth_ticks(1.0, 10.0)
    assert ticks[0][1] == "1" and ticks[0][0] == 0 and len(ticks) <= 7


def test_boxes_carry_the_colours_of_their_classes() -> None:
    palette = Palette()
    painter = Painter(DET.with_classes(("sphere", "box")), 64, palette, [])
    boxes = Boxes(np.array([[0.2, 0.4, 0.8, 0.9]], np.float32), np.array([1]), np.ones(1, np.float32))
    drawn = painter.paint(boxes, np.zeros((64, 64, 3), np.uint8))
    assert drawn is not None and drawn.shape == (384, 384, 3)
    assert (drawn == palette.colour("box")).all(-1).sum() > 500
    assert not (drawn == palette.colour("sphere")).all(-1).any()


def test_a_contract_says_how_it_is_drawn() -> None:
    assert family_of(RGB.contract) == "image" and family_of(DEPTH.contract) == "depth"
    assert family_of(NORMAL.contract) == "normal" and family_of(SEMSEG.contract) == "classes"
    assert family_of(DET.contract) == "boxes" and family_of(CAPTION.contract) == "text"


def test_loss_chart_is_inside_its_frame() -> None:
    records = [
        {"step": 10 * i, "losses": {"a": 5 - i / 10, "b": 1.0}, "val_losses": {"a": 5.5}}
        for i in range(1, 30)
    ]
    chart = loss_chart(records)
    assert chart is not None
    points = [
        tuple(map(float, p.split(","))) for line in chart.lines for p in re.split("[ML]", line.path)[1:]
    ]
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in points)
    assert [line.name for line in chart.lines] == ["a", "b"] and len(chart.lines[0].val) == 29
    assert chart.lines[0].last == pytest.approx(2.1)
    assert loss_chart(records[:1]) is None


def test_ticks_are_round_and_names_keep_apart() -> None:
    assert round_ticks(0, 6.3, 5) == [0, 2, 4, 6]
    places = spread([100.0, 101.0, 102.0, 250.0], 14, 10, 250)
    assert np.all(np.diff(sorted(places)) >= 14 - 1e-9) and max(places) <= 250


def _printed(renderable: Any) -> str:
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()
