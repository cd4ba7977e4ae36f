"""Every link of the chain for held-out samples: label, token round trip, the model's prediction, and the truth.

Samples go through in micro-batches; what is measured is added up and thrown away, and only what the page shows is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fourmill.errors import FourmillError, SourceError
from fourmill.flows.crop_labels import crop_label
from fourmill.flows.engine import device_of
from fourmill.flows.micro_batch import MicroBatch
from fourmill.flows.report.measures import Baseline, Measure, family_of, measure_class
from fourmill.flows.report.view import Sample, Trained, View
from fourmill.flows.specialist import Specialist
from fourmill.labelers.base import LabelerSettings, labelers
from fourmill.labels import Absent, Label
from fourmill.shards.decode import RejectedImage, decode_frame
from fourmill.shards.tar import read_labels
from fourmill.train.predict import predict

#: links by name
LABEL, ROUND_TRIP, MODEL, TRUTH, BASELINE = "label", "round_trip", "model", "truth", "baseline"
#: kept labels are read instead of made again where a shard's are no larger than this
MAX_KEPT_BYTES = 256 << 20

#: rows whose predictions are held in memory at once
CHUNK = 64

Progress = Callable[[int, int, str], None]


@dataclass
class Shown:
    """One sample of the page: its picture uint8 (S, S, 3) and its labels by link, then modality."""

    sample: Sample
    image: np.ndarray
    links: dict[str, dict[str, Label]] = field(default_factory=dict)


@dataclass
class Links:
    """What became of the samples. ``figures``: modality -> link -> figure -> value."""

    shown: list[Shown]
    figures: dict[str, dict[str, dict[str, float]]]
    references: dict[str, str]  # modality -> "truth" or "label"
    rows: dict[str, int]  # modality -> samples measured
    notes: dict[str, str]  # modality -> why a link is missing


class Reader:
    """The labels of samples, in the frame of crop 0: made again by the dataset's labelers, or read where kept."""

    def __init__(self, view: View, names: Sequence[str]) -> None:
        self.view, self.names = view, list(names)
        resolved = view.resolved
        hosted = [replace(resolved.wanted[name], tokenizer=None) for name in resolved.closure(self.names)]
        self._needs_truth = any(wanted.needs_truth for wanted in hosted)
        device = device_of(view.config)
        self._specialist = Specialist(view.dataset.url, hosted, view.image_size, device)
        self._kept: dict[tuple[str, int], Mapping[int, Label] | None] = {}

    def batches(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[list[Sample], np.ndarray, dict[str, list[Label]]]]:
        """(samples, their crops uint8 (n, S, S, 3), labels by modality), a micro-batch at a time."""
        size = self.view.config.engine.batch_size
        for start in range(0, len(samples), size):
            part = list(samples[start : start + size])
            batch = self._batch(part, size)
            result = self._specialist.process(batch, self.names, ())
            for failure in result.failed.values():
                raise FourmillError(f"report: {failure.reason} ({failure.text})")
            made = result.labels
            labels = {
                name: [self._crop(name, labels[i], sample) for i, sample in enumerate(part)]
                for name, labels in made.items()
            }
            yield part, np.stack([self.picture(batch.frames[i], s) for i, s in enumerate(part)]), labels

    def picture(self, frame: np.ndarray, sample: Sample) -> np.ndarray:
        """uint8 (S, S, 3): crop 0 of a decoded frame."""
        from fourmill.crops import crop_map

        height, width = (int(side) for side in sample.size)
        return crop_map(frame, sample.crop, (height, width), self.view.image_size, "bicubic")

    def _crop(self, name: str, label: Label, sample: Sample) -> Label:
        if isinstance(label, Absent):
            return label
        modality = self.view.resolved.wanted[name].modality
        return crop_label(modality, label, 0, sample.crop, sample.size, self.view.image_size)

    def _batch(self, part: Sequence[Sample], size: int) -> MicroBatch:
        """As the runner makes them: one shape, filled up with blanks."""
        config, side = self.view.config, self.view.config.decode.shorter_side
        blank = np.zeros((side, side, 3), np.uint8)
        frames = [self.frame(sample, raw) for sample, raw in zip(part, self._read(part), strict=True)]
        fill = size - len(part)
        source = self.view.resolved.source
        truth: list[Any] = [source.truth(s.key) if self._needs_truth else None for s in part]
        crops = [np.tile(sample.crop, (config.n_crops, 1)) for sample in part]
        whole = np.tile(np.array([0, 0, side, side, 0], np.int32), (config.n_crops, 1))
        return MicroBatch(
            name="report",
            keys=[*(s.key for s in part), *[""] * fill],
            frames=[*frames, *[blank] * fill],
            present=np.arange(size) < len(part),
            sizes=np.array([*(s.size for s in part), *[[side, side]] * fill], np.int32),
            crops=np.stack([*crops, *[whole] * fill]),
            captions=[*(s.captions for s in part), *[()] * fill],
            truth=[*truth, *[None] * fill],
            given=self._given(part, fill),
        )

    def _read(self, part: Sequence[Sample]) -> list[Any]:
        return list(self.view.resolved.source.read([sample.source_row for sample in part]))

    def frame(self, sample: Sample, raw: Any) -> np.ndarray:
        """The decode frame of a row; one that has become unreadable is an error that names it."""
        decode = self.view.config.decode
        try:
            if isinstance(raw, Exception):
                raise RejectedImage("unreadable", str(raw))
            return decode_frame(raw.image, decode.shorter_side, decode.filter).pixels
        except RejectedImage as error:
            raise SourceError(
                f"source row {sample.key!r} was readable when the dataset was built, and is now {error.reason!r}; "
                "restore it"
            ) from error

    def _given(self, part: Sequence[Sample], fill: int) -> dict[str, list[Label]]:
        """Labels that were kept, where they were kept for the whole micro-batch."""
        given = {}
        for name in self.view.resolved.closure(self.names):
            tables = [self._kept_shard(name, sample.shard) for sample in part]
            if all(table is not None for table in tables):
                found = [t[s.row] for t, s in zip(tables, part, strict=True) if t is not None]
                given[name] = [*found, *[Absent("blank")] * fill]
        return given

    def _kept_shard(self, name: str, shard: int) -> Mapping[int, Label] | None:
        if (name, shard) not in self._kept:
            dataset, wanted = self.view.dataset, self.view.resolved.wanted[name]
            short = wanted.label_recipe.short
            found = None
            if shard in dataset.finished(name, short):
                receipt = dataset.receipt(name, short, shard)
                if receipt.bytes <= MAX_KEPT_BYTES:
                    found = read_labels(dataset.store.read(receipt.file), wanted.modality)
            stale = [at for at in self._kept if at[0] == name]  # samples come in shard order: one is enough
            for at in stale:
                del self._kept[at]
            self._kept[name, shard] = found
        return self._kept[name, shard]


class Truth:
    """The source's truth, for the modalities in which it can be compared with labels."""

    def __init__(self, view: View, names: Sequence[str], example: str) -> None:
        self.view = view
        self.notes: dict[str, str] = {}
        source = view.resolved.source
        known = source.truth(example) if source.has_truth else {}
        self.names = [name for name in names if name in known and self._comparable(name)]

    def _comparable(self, name: str) -> bool:
        wanted = self.view.resolved.wanted[name]
        contract = wanted.modality.contract
        if wanted.settings is None:
            return False  # it comes from the source itself: the label is the truth
        if family_of(contract) == "relative":
            self.notes[name] = "labels have no scale, so they cannot be compared with the truth"
            return False
        oracle = f"oracle_{name}"
        if contract.classes and oracle in labelers:
            settings = LabelerSettings(modality=name)
            known = labelers.get(oracle)(settings).describe().contract.classes
            if known != contract.classes:
                self.notes[name] = "the labeler's classes are not those of the source's truth"
                return False
        return True

    def of(self, sample: Sample) -> dict[str, Label]:
        """Truth by modality in the frame of crop 0."""
        if not self.names:
            return {}
        found = self.view.resolved.source.truth(sample.key)
        size = self.view.image_size
        return {
            name: crop_label(
                self.view.resolved.wanted[name].modality, found[name], 0, sample.crop, sample.size, size
            )
            for name in self.names
        }


class Predictor:
    """What the model makes of RGB alone."""

    def __init__(self, view: View, trained: Trained | None) -> None:
        self.view, self.trained = view, trained
        self.targets: list[str] = []
        if trained is None:
            return
        config = trained.model.config
        inputs = [n for n in ("rgb", "rgb_pixels") if n in config.names and n in view.codecs]
        self.input = next((n for n in inputs if config.spec(n).is_input), None)
        if self.input is not None:
            known = [n for n in view.names if n in config.names and n not in ("rgb", "rgb_pixels")]
            self.targets = [n for n in known if config.spec(n).is_target]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, list[Label]]:
        """Labels by modality; `Absent` for a sample without the input."""
        if self.trained is None or self.input is None:
            return {}
        cells = [self.view.cell(self.input, sample) for sample in samples]
        there = [i for i, cell in enumerate(cells) if not isinstance(cell, Absent)]
        out: dict[str, list[Label]] = {
            name: [Absent(f"no {self.input}")] * len(samples) for name in self.targets
        }
        if not there:
            return out
        given: dict[str, Any] = {self.input: self._stack([cells[i] for i in there])}
        keys = np.array([samples[i].key64 for i in there], np.uint64)
        for name in self.targets:
            found = predict(self.trained.model, given, name, self.view.codecs[name], keys=keys)
            for i, label in zip(there, found, strict=True):
                out[name][i] = label
        return out

    def _stack(self, cells: list[Any]) -> np.ndarray:
        assert self.input is not None
        if self.view.modalities[self.input].kind == "pixels":
            return np.stack(self.view.codecs[self.input].decode(cells))
        return np.stack(cells).astype(np.int64)


def fit_baselines(view: View, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """One label per modality that has a baseline, from the tokens of training samples."""
    out = {}
    for name in view.names:
        if family_of(view.modalities[name].contract) in Baseline.FAMILIES:
            baseline = Baseline(view.modalities[name])
            for start in range(0, len(samples), 32):
                labels = view.decode(name, samples[start : start + 32])
                baseline.add([label for label in labels if not isinstance(label, Absent)])
            label = baseline.label()
            if label is not None:
                out[name] = label
    return out


def follow(
    view: View,
    trained: Trained | None,
    samples: Sequence[Sample],
    shown: int,
    baselines: Mapping[str, np.ndarray],
    progress: Progress,
) -> Links:
    """Every link for the samples; ``shown`` of them, spread evenly, are kept for the page."""
    stand = [name for name in view.names if view.label_recipe_stands(name)]
    reader, truth, predictor = (
        Reader(view, stand),
        Truth(view, view.names, samples[0].key),
        Predictor(view, trained),
    )
    keep = set(np.linspace(0, len(samples) - 1, min(shown, len(samples))).round().astype(int).tolist())
    references = {name: TRUTH if name in truth.names else LABEL for name in view.names}
    sums = _Sums(view, references)
    kept: list[Shown] = []
    done = 0
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        predicted = predictor(chunk)  # many rows at once: sequences are written token by token
        for part, pictures, labels in reader.batches(chunk):
            at = done - start
            links = {
                LABEL: labels,
                ROUND_TRIP: {name: view.decode(name, part) for name in view.names},
                MODEL: {name: made[at : at + len(part)] for name, made in predicted.items()},
                BASELINE: {name: [label] * len(part) for name, label in baselines.items()},
            }
            for i, sample in enumerate(part):
                own = {
                    link: {name: made[i] for name, made in column.items()} for link, column in links.items()
                }
                own[TRUTH] = truth.of(sample)
                sums.add(own)
                if done + i in keep:
                    kept.append(Shown(sample, pictures[i], own))
            done += len(part)
            progress(done, len(samples), "")
    notes = {name: "the labeler has changed since these tokens were made" for name in view.names}
    notes = {name: text for name, text in notes.items() if name not in stand} | truth.notes
    return Links(kept, sums.figures(), references, sums.rows, notes)


class _Sums:
    """The measures of every link of every modality."""

    def __init__(self, view: View, references: Mapping[str, str]) -> None:
        self.view, self.references = view, references
        self.rows = dict.fromkeys(view.names, 0)
        self._measures: dict[tuple[str, str], Measure] = {}

    def add(self, links: Mapping[str, Mapping[str, Label]]) -> None:
        """Round trips are compared with labels, everything else with the modality's reference."""
        for name, reference in self.references.items():
            pairs = {ROUND_TRIP: LABEL, MODEL: reference, BASELINE: reference}
            if reference == TRUTH:
                pairs[LABEL] = TRUTH
            counted = False
            for link, other in pairs.items():
                made, true = links[link].get(name), links[other].get(name)
                if made is None or true is None or isinstance(made, Absent) or isinstance(true, Absent):
                    continue
                self._measure(name, link).add(made, true)
                counted = True
            self.rows[name] += counted

    def _measure(self, name: str, link: str) -> Measure:
        if (name, link) not in self._measures:
            modality = self.view.modalities[name]
            self._measures[name, link] = measure_class(modality)(modality)
        return self._measures[name, link]

    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        out: dict[str, dict[str, dict[str, float]]] = {name: {} for name in self.references}
        for (name, link), measure in self._measures.items():
            out[name][link] = measure.values()
        return out
