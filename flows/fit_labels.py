"""Labels that tokenizers are fitted on, cropped, in files of one fixed row length: as many as there are, in little memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.errors import ContractError
from fourmill.flows.crop_labels import crop_label
from fourmill.flows.resolve import Resolved, Wanted, fit_origin
from fourmill.labels import Absent, Label
from fourmill.shards.dataset import Dataset
from fourmill.shards.samples import OK
from fourmill.shards.tar import read_labels

#: labels at the end of the fit set, at most, that a tokenizer is measured on and not fitted on
HELD_OUT = 2_000


@dataclass(frozen=True)
class LabelFile(Sequence[Label]):
    """Rows ``first`` to ``last`` - 1 of a file. Pickles as its path."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    first: int
    last: int

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r").reshape(-1, *self.shape)

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return np.array(self._rows[self.first + index])


def scratch_folder(resolved: Resolved, dataset: Dataset, name: str, shards: Sequence[int]) -> Path:
    """Where a fit keeps its labels and its state until it is over: ``fits/`` of the dataset, or, where that is no folder of
    this machine, the user's cache.
    """
    facts: dict[str, Any] = {
        "origin": fit_origin(resolved.wanted[name], resolved.config),
        "shards": list(shards),
    }
    facts |= {"dataset": dataset.url, "modality": name, "seed": resolved.config.seed}
    short = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    local = dataset.store.local_path(f"fits/{name}-{short}")
    return local or _user_cache() / "fourmill" / "fits" / f"{name}-{short}"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def fit_labels(
    resolved: Resolved,
    dataset: Dataset,
    wanted: Wanted,
    shards: Sequence[int],
    sizes: Sequence[int],
    folder: Path,
) -> tuple[Sequence[Label], Sequence[Label]]:
    """(training, held out) labels of crop 0, at the largest of ``sizes`` and at the dataset's image size.

    Neither contains a sample of the validation split. Files that are there already are used.
    """
    own = resolved.config.image_size
    largest = max([own, *sizes])
    files = {
        size: _label_file(
            folder / f"labels-{size}", _cropped(resolved, dataset, wanted, shards, size), wanted.name
        )
        for size in {own, largest}
    }
    train, held_out = files[largest], files[own]
    if train is None or held_out is None:
        return [], []
    cut = len(train) - min(HELD_OUT, len(train) // 8)
    return _part(train, 0, cut), _part(held_out, cut, len(train))


def _part(file: LabelFile, first: int, last: int) -> LabelFile:
    return LabelFile(file.path, file.shape, file.dtype, first, last)


def _label_file(path: Path, labels: Iterator[np.ndarray], name: str) -> LabelFile | None:
    """The labels in ``path``, written if it is not there, in one piece; None where there are no labels."""
    facts = path.with_suffix(".json")
    if not facts.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shape, dtype, count = None, "", 0
        part = path.with_suffix(f".part-{os.getpid()}")
        with part.open("wb") as stream:
            for label in labels:
                shape, dtype = shape or label.shape, dtype or label.dtype.str
                if (label.shape, label.dtype.str) != (shape, dtype):
                    raise ContractError(
                        f"labels of {name!r} have the shapes {shape} and {label.shape}; a tokenizer takes one"
                    )
                stream.write(np.ascontiguousarray(label).tobytes())
                count += 1
        os.replace(part, path)
        told = facts.with_suffix(f".part-{os.getpid()}")
        told.write_text(json.dumps({"shape": shape, "dtype": dtype, "count": count}))
        os.replace(told, facts)
    found = json.loads(facts.read_text())
    if not found["count"]:
        return None
    return LabelFile(path, tuple(found["shape"]), found["dtype"], 0, found["count"])


def _cropped(
    resolved: Resolved, dataset: Dataset, wanted: Wanted, shards: Sequence[int], size: int
) -> Iterator[np.ndarray]:
    for shard in shards:
        table = dataset.samples(shard)
        status, split = table["status"].to_pylist(), table["split"].to_pylist()
        crops = table["crops"].combine_chunks().values.to_numpy().reshape(table.num_rows, -1, 5)
        sizes = np.stack(
            [table["height"].fill_null(0).to_numpy(), table["width"].fill_null(0).to_numpy()], axis=1
        )
        receipt = dataset.receipt(wanted.name, wanted.label_recipe.short, shard)
        labels = read_labels(dataset.store.read(receipt.file), wanted.modality)
        for row, label in sorted(labels.items()):
            if status[row] == OK and split[row] == "train" and not isinstance(label, Absent):
                yield np.asarray(crop_label(wanted.modality, label, 0, crops[row, 0], sizes[row], size))
