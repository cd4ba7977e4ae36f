"""Making the report: read, follow every link for held-out samples, measure, and write three files."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourmill import __version__
from fourmill.errors import CheckpointError, WorkMissing
from fourmill.flows.engine import device_of
from fourmill.flows.report.chain import chain_png
from fourmill.flows.report.links import LABEL, MODEL, TRUTH, Links, Progress, Shown, fit_baselines, follow
from fourmill.flows.report.measures import family_of, measure_class, targets_of
from fourmill.flows.report.page import Page, render
from fourmill.flows.report.pictures import make_painters
from fourmill.flows.report.view import Sample, Trained, View, open_model
from fourmill.flows.status import Status, status
from fourmill.labels import Label
from fourmill.shards.dataset import Dataset
from fourmill.shards.snapshot import Snapshot

FOLDER = "reports"
BASELINE_SAMPLES = 256
CHAIN_ROWS = 3


@dataclass(frozen=True)
class ReportResult:
    """Where the page is, and its numbers (also in ``reports/report.json``)."""

    path: str
    chain: str  # the strip of pictures for a README
    numbers: dict[str, Any]
    seconds: float


def make_report(
    dataset_url: str,
    model: Path | str | None = None,
    *,
    samples: int = 8,
    metric_samples: int = 128,
    snapshot: str | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> ReportResult:
    """Measure every link of the chain on held-out samples, and write DATASET/reports/{index.html, report.json, chain.png}.

    ``model``: the output folder of a training run or a checkpoint; None leaves the model out. ``samples`` are shown,
    ``metric_samples`` measured. ``snapshot``: by default the one that the model was trained on, or what the newest run
    asked for. Training samples are read for the baseline alone. Raises ConfigError for a folder that is no dataset,
    WorkMissing for one without a finished shard, CheckpointError for a model of another dataset.
    """
    started = time.perf_counter()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))  # more wait for each other
    say, progress = say or _silent, progress or _still
    trained = open_model(model) if model is not None else None
    view = View.open(dataset_url, _snapshot_of(dataset_url, trained, snapshot))
    if trained is not None:
        trained.model.to(device_of(view.config))
    chosen, shown_from = _choose(view, max(1, samples, metric_samples))
    measured = chosen[: max(1, metric_samples)] if shown_from == "val" else []
    say(f"{len(measured)} held-out samples to measure on, {min(samples, len(chosen))} to show")
    training = view.choose("train", BASELINE_SAMPLES) if measured and trained else []
    baselines = fit_baselines(view, training)  # which only a model has to beat
    links = follow(view, trained, measured or chosen[:samples], samples, baselines, progress)
    stands = status(view.dataset)
    numbers = _numbers(view, trained, links, stands, measured=len(measured), trained_on=len(training))
    painters, palette = make_painters(
        {name: view.modalities[name] for name in view.names}, view.image_size, _references(links.shown)
    )
    numbers["seconds"] = round(time.perf_counter() - started, 2)
    page = Page(view, trained, links, numbers, stands, painters, palette, shown_from)
    store = view.dataset.store
    store.put(f"{FOLDER}/chain.png", chain_png(links.shown[:CHAIN_ROWS], painters, links.references))
    store.put(f"{FOLDER}/report.json", json.dumps(numbers, indent=1, ensure_ascii=False).encode())
    store.put(f"{FOLDER}/index.html", render(page).encode())
    where = f"{view.dataset.store.url}/{FOLDER}"
    return ReportResult(f"{where}/index.html", f"{where}/chain.png", numbers, time.perf_counter() - started)


def _choose(view: View, count: int) -> tuple[list[Sample], str]:
    """Held-out rows; training rows, to be shown and never measured, where nothing is held out."""
    for split in ("val", "train"):
        chosen = view.choose(split, count)
        if chosen:
            return chosen, split
    raise WorkMissing(f"{view.dataset.url} has no finished shard with a readable image; run `fourmill build`")


def _snapshot_of(url: str, trained: Trained | None, asked: str | None) -> str | None:
    """The snapshot to read: the one asked for, else the model's, which must be one of this dataset's."""
    if trained is None or trained.state is None:
        return asked
    own = trained.state.snapshot
    if f"{own}.json" not in Dataset(url).store.names("snapshots"):
        raise CheckpointError(
            f"{trained.folder} was trained on snapshot {own[:12]}, which {url} does not have; "
            "give the dataset that it was trained on"
        )
    if asked is None:
        return own
    wanted, begun = Snapshot.load(url, asked), Snapshot.load(url, own)
    for name in wanted.modalities.keys() & begun.modalities.keys():
        if wanted.tokenizer(name) != begun.tokenizer(name):
            raise CheckpointError(
                f"{trained.folder} knows {name} by the tokenizer {begun.tokenizer(name)}, snapshot "
                f"{wanted.digest[:12]} by {wanted.tokenizer(name)}; leave out the snapshot"
            )
    return asked


def _references(shown: Iterable[Shown]) -> dict[str, list[Label]]:
    """The labels and truths that are shown, by modality: the painters' scales are taken from them."""
    found: dict[str, list[Label]] = {}
    for one in shown:
        for link in (LABEL, TRUTH):
            for name, label in one.links.get(link, {}).items():
                found.setdefault(name, []).append(label)
    return found


def _numbers(
    view: View, trained: Trained | None, links: Links, stands: Status, *, measured: int, trained_on: int
) -> dict[str, Any]:
    modalities: dict[str, Any] = {}
    targets: list[dict[str, Any]] = []
    for name in view.names:
        modality, values = view.modalities[name], links.figures[name]
        figures = {
            figure.name: {link: _finite(v[figure.name]) for link, v in values.items() if v}
            for figure in measure_class(modality).figures
        }
        modalities[name] = {
            "compared_with": links.references[name],
            "samples": links.rows[name],
            "figures": figures,
        }
        found = targets_of(
            name, family_of(modality.contract), values.get(MODEL, {}), values.get("baseline", {})
        )
        targets += [target.to_json() for target in found]
    return {
        "fourmill": __version__,
        "dataset": view.dataset.url,
        "snapshot": view.snapshot,
        "model": _model_facts(trained),
        "split": "val",
        "samples_measured": measured,
        "baseline_samples": trained_on,
        "has_truth": any(reference == TRUTH for reference in links.references.values()),
        "modalities": modalities if measured else {},
        "targets": targets if measured else [],
        "notes": links.notes,
        "status": stands.to_json(),
    }


def _model_facts(trained: Trained | None) -> Mapping[str, Any] | None:
    if trained is None:
        return None
    state = trained.state
    return {
        "path": str(trained.folder),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "preset": state.config.get("preset") if state else None,
        "step": state.step if state else None,
        "snapshot": state.snapshot if state else None,
    }


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _silent(text: str) -> None:
    return None


def _still(done: int, total: int, note: str) -> None:
    return None
