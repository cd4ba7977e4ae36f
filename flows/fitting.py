"""Tokenizers that are fitted on this dataset: from kept labels of the fit set to folders in the dataset."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fourmill.errors import SourceError
from fourmill.flows.crop_labels import crop_label
from fourmill.flows.resolve import ORIGIN, Resolved, Wanted, fit_origin
from fourmill.labels import Absent, Label
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.samples import OK
from fourmill.shards.tar import read_labels
from fourmill.tokenize.base import codecs
from fourmill.tokenize.fit import fit_codec

OnFit = Callable[[str, int, int, dict[str, Any]], None]  # (modality, step, steps, figures)
#: labels that are held out of a fit to measure it on
HELD_OUT = 256


def needs_labels(wanted: Wanted) -> bool:
    """Whether fitting its tokenizer looks at labels at all (a picture format doesn't)."""
    return bool(codecs.get(wanted.modality.codec).needs_fit)


def fit_tokenizers(resolved: Resolved, dataset: Dataset, shards: Sequence[int], on_fit: OnFit) -> None:
    """Fit every tokenizer that is wanted and missing, on the kept labels of ``shards``, and add it to the dataset."""
    vocabulary: Path | None = None
    names = resolved.unfitted()
    texts = [name for name in names if resolved.wanted[name].modality.kind == "sequence"]
    for name in [*sorted(texts, key=lambda n: n != "caption"), *(n for n in names if n not in texts)]:
        wanted = resolved.wanted[name]
        options: dict[str, Any] = dict(resolved.config.modalities[name].tokenizer.options)
        train: list[Label] = []
        held_out: list[Label] = []
        if needs_labels(wanted):
            train, held_out = _labels(resolved, dataset, wanted, shards)
            if not train:
                raise SourceError(
                    f"modalities.{name}.tokenizer: the fit set has no label of {name} to fit it on"
                )
        if name in texts:
            options |= (
                {"vocabulary": vocabulary}
                if vocabulary
                else _vocabulary_options(resolved, dataset, shards, options)
            )
        elif needs_labels(wanted):
            options = {**resolved.config.fit.model_dump(), "seed": resolved.config.seed, **options}
        with tempfile.TemporaryDirectory(prefix="fourmill-fit-") as scratch:
            folder = fit_codec(
                wanted.modality,
                train,
                held_out,
                image_size=resolved.config.image_size,
                options=options,
                out=Path(scratch) / name,
                progress=lambda done, total, figures, name=name: on_fit(name, done, total, figures),  # type: ignore[misc]
            )
            (folder / ORIGIN).write_text(json.dumps(fit_origin(wanted, resolved.config), sort_keys=True))
            short = dataset.add_tokenizer(name, folder)
        if name in texts and vocabulary is None:
            vocabulary = dataset.tokenizer_folder(name, short)


def _vocabulary_options(
    resolved: Resolved, dataset: Dataset, shards: Sequence[int], options: dict[str, Any]
) -> dict[str, Any]:
    """Captions of the training split of the fit set, and the class names of every modality that has any."""
    if "vocabulary" in options:
        return {}
    samples = resolved.samples_recipe
    captions: list[str] = []
    for shard in shards:
        table = dataset.table(dataset.receipt(SAMPLES, samples.short, shard).file)
        for texts, split in zip(table["captions"].to_pylist(), table["split"].to_pylist(), strict=True):
            captions += texts if split == "train" else []
    classes = sorted({c for w in resolved.wanted.values() for c in w.modality.contract.classes})
    return {"vocabulary_captions": captions, "vocabulary_classes": classes}


def _labels(
    resolved: Resolved, dataset: Dataset, wanted: Wanted, shards: Sequence[int]
) -> tuple[list[Label], list[Label]]:
    """(training, held out) labels, cropped to crop 0. Neither contains a sample of the validation split."""
    import numpy as np

    train: list[Label] = []
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
                size = resolved.config.image_size
                train.append(crop_label(wanted.modality, label, 0, crops[row, 0], sizes[row], size))
    held = min(HELD_OUT, len(train) // 8)
    return train[: len(train) - held], train[len(train) - held :]
