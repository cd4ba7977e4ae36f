"""What a report reads: the tokens of a snapshot or of the newest run, the source, and the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.config import Config
from fourmill.errors import CheckpointError, DatasetError
from fourmill.flows.exporting import config_of
from fourmill.flows.resolve import Resolved, resolve
from fourmill.flows.status import latest_run
from fourmill.labels import Absent, Label
from fourmill.modality import Modality
from fourmill.seeds import generator
from fourmill.shards.arrow import Column
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Recipe
from fourmill.shards.samples import OK
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.sources.base import Row
from fourmill.tokenize.base import Codec, load_codec
from fourmill.train.checkpoint import TrainState, load_model, newest, read_state
from fourmill.train.model import FourMill


@dataclass(frozen=True, slots=True)
class Sample:
    """One readable row. ``crop`` int32 (5,): its crop 0; ``size``: height, width of the upright original."""

    shard: int
    row: int
    key: str
    key64: int
    position: str
    split: str
    captions: tuple[str, ...]
    crop: np.ndarray
    size: np.ndarray

    @property
    def source_row(self) -> Row:
        return Row(self.key, self.position)


@dataclass(frozen=True)
class Trained:
    """A model with what its folder says of it. ``state`` is None for weights without a training state."""

    model: FourMill
    folder: Path
    state: TrainState | None

    @property
    def records(self) -> Path | None:
        """metrics.jsonl of the run that the checkpoint belongs to."""
        found = [p / "metrics.jsonl" for p in (self.folder, *self.folder.parents[:2])]
        return next((path for path in found if path.is_file()), None)


def open_model(path: Path | str) -> Trained:
    """From a run's output folder (its newest checkpoint) or a checkpoint's folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"model {path}: no such folder; give the output folder of a training run")
    if not (folder / "config.json").is_file():
        folder = newest(folder) or folder
    state = read_state(folder) if (folder / "state.json").is_file() else None
    return Trained(load_model(folder), folder, state)


@dataclass
class View:
    """A dataset as one report sees it: one recipe, tokenizer and modality by name."""

    dataset: Dataset
    config: Config
    resolved: Resolved
    modalities: dict[str, Modality]
    recipes: dict[str, str]
    tokenizers: dict[str, str]
    image_size: int
    snapshot: str | None
    only_shards: frozenset[int] | None = None
    codecs: dict[str, Codec] = field(default_factory=dict)
    _columns: dict[tuple[str, int], Column | None] = field(default_factory=dict)

    @classmethod
    def open(cls, url: str, snapshot: str | None, only: Collection[str] | None = None) -> View:
        """The snapshot by its digest, or what the newest run asked for where it is None; ``only`` these modalities."""
        dataset = Dataset(url)
        run = latest_run(dataset)
        config = config_of(dataset, run)
        resolved = resolve(config)
        pinned = Snapshot.load(url, snapshot) if snapshot is not None else None
        view = _of_snapshot(pinned, config, resolved) if pinned else _of_run(dataset, run, config, resolved)
        for name, short in view.tokenizers.items():
            if only is not None and name not in only:
                continue
            folder = dataset.tokenizer_folder(name, short)
            view.codecs[name] = load_codec(folder, view.modalities[name], view.image_size)
            view.modalities[name] = view.codecs[name].modality
        return view

    @property
    def names(self) -> list[str]:
        """The modalities that can be decoded, in the configuration's order."""
        return [name for name in self.resolved.wanted if name in self.codecs]

    def finished(self, name: str) -> set[int]:
        done = self.dataset.finished(name, self.recipes[name])
        return done if self.only_shards is None else done & self.only_shards

    def shards(self) -> list[int]:
        """Shards that are finished in every modality, or, where there is none, all that have samples; drawn in order."""
        short = self.dataset.samples_recipe()
        everything = self.dataset.finished(SAMPLES, short) if short else set()
        whole = everything.intersection(*(self.finished(name) for name in self.names))
        return [
            int(s) for s in generator(self.config.seed, "report").permutation(sorted(whole or everything))
        ]

    def choose(self, split: str, count: int) -> list[Sample]:
        """Up to ``count`` readable rows of a split, whole shards at a time."""
        chosen: list[Sample] = []
        for shard in self.shards():
            if len(chosen) >= count:
                break
            chosen += self._rows(shard, split)
        return sorted(chosen[:count], key=lambda sample: (sample.shard, sample.row))

    def _rows(self, shard: int, split: str) -> list[Sample]:
        table = self.dataset.samples(shard)
        wanted = [
            i
            for i, (s, status) in enumerate(
                zip(table["split"].to_pylist(), table["status"].to_pylist(), strict=True)
            )
            if s == split and status == OK
        ]
        return [sample_of(entry, shard, row) for row, entry in _entries(table, wanted)]

    def find(self, key: str) -> tuple[Sample | None, dict[str, Any], int, int]:
        """A key's sample (None where it is set aside), its row of the samples table, shard and row."""
        for shard in sorted(self.dataset.finished(SAMPLES, str(self.dataset.samples_recipe()))):
            table = self.dataset.samples(shard)
            keys = table["key"].to_pylist()
            if key in keys:
                row = keys.index(key)
                entry = table.slice(row, 1).to_pylist()[0]
                sample = sample_of(entry, shard, row) if entry["status"] == OK else None
                return sample, entry, shard, row
        raise DatasetError(f"{self.dataset.url} has no sample with the key {key!r}")

    def sample(self, shard: int, row: int) -> Sample:
        """A readable row by its place."""
        return sample_of(self.dataset.samples(shard).slice(row, 1).to_pylist()[0], shard, row)

    def column(self, name: str, shard: int) -> Column | None:
        """One shard of a modality, None where it is not finished. The last few stay open."""
        at = (name, shard)
        if at not in self._columns:
            if len(self._columns) >= 4 * max(1, len(self.names)):
                self._columns.pop(next(iter(self._columns)))
            done = shard in self.finished(name)
            self._columns[at] = self.dataset.column(name, self.recipes[name], shard) if done else None
        return self._columns[at]

    def cell(self, name: str, sample: Sample) -> Any:
        """The stored value of crop 0, or `Absent` with the stored reason."""
        column = self.column(name, sample.shard)
        if column is None:
            return Absent("shard not finished")
        if not column.present[sample.row]:
            return Absent(str(column.reasons[sample.row].as_py()))
        return column.cells(sample.row)

    def decode(self, name: str, samples: Sequence[Sample]) -> list[Label]:
        """The labels that the stored tokens stand for, `Absent` where there are none."""
        out: list[Label] = [self.cell(name, sample) for sample in samples]
        there = [i for i, value in enumerate(out) if not isinstance(value, Absent)]
        if there:
            for i, label in zip(there, self.codecs[name].decode([out[i] for i in there]), strict=True):
                out[i] = label
        return out

    def label_recipe_stands(self, name: str) -> bool:
        """Whether the configuration's labeler is the one that these tokens were made with."""
        made = self.dataset.recipe(name, self.recipes[name]).get("label")
        return Recipe("label", made or {}).text == self.resolved.wanted[name].label_recipe.text


def _entries(table: Any, rows: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
    return list(zip(rows, table.take(list(rows)).to_pylist(), strict=True)) if rows else []


def sample_of(entry: Mapping[str, Any], shard: int, row: int) -> Sample:
    return Sample(
        shard=shard,
        row=row,
        key=entry["key"],
        key64=entry["key64"],
        position=entry["position"],
        split=entry["split"],
        captions=tuple(entry["captions"]),
        crop=np.array(entry["crops"][:5], np.int32),
        size=np.array([entry["height"], entry["width"]], np.int32),
    )


def _of_snapshot(snapshot: Snapshot, config: Config, resolved: Resolved) -> View:
    entries = snapshot.content["modalities"]
    known = [name for name in entries if name in resolved.wanted and entries[name].get("tokenizer")]
    return View(
        dataset=snapshot.dataset,
        config=config,
        resolved=resolved,
        modalities={name: snapshot.modalities[name] for name in known},
        recipes={name: str(entries[name]["recipe"]) for name in known},
        tokenizers={name: str(entries[name]["tokenizer"]) for name in known},
        image_size=snapshot.image_size,
        snapshot=snapshot.digest,
        only_shards=frozenset(shard.index for shard in snapshot.shards),
    )


def _of_run(dataset: Dataset, run: Mapping[str, Any], config: Config, resolved: Resolved) -> View:
    """The recipes that the newest run asked for, as they were written down then."""
    recipes, tokenizers = {}, {}
    for name, content in run["recipes"].items():
        if content and name in resolved.wanted:
            body = {key: value for key, value in content.items() if key != "kind"}
            recipes[name] = Recipe(content["kind"], body).short
            tokenizers[name] = str(content["tokenizer"])[:12]
    modalities = {name: resolved.wanted[name].modality for name in recipes}
    return View(dataset, config, resolved, modalities, recipes, tokenizers, config.image_size, None)
