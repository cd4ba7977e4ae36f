"""Tokenizers that are fitted on this dataset: from kept labels of the fit set to folders in the dataset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fourmill.errors import SourceError
from fourmill.flows.engine import device_of
from fourmill.flows.fit_encoder import with_encoder
from fourmill.flows.fit_labels import fit_labels, scratch_folder
from fourmill.flows.fit_pictures import PICTURE, reconstructions
from fourmill.flows.fit_workers import FitJob, fit_on_workers
from fourmill.flows.progress import say
from fourmill.flows.resolve import ORIGIN, Resolved, Wanted, fit_origin, fitted_tokenizer
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.tokenize.base import codecs, load_codec
from fourmill.tokenize.fit import fit_codec
from fourmill.tokenize.vqvae import VQVAE

OnFit = Callable[[str, int, int, dict[str, Any]], None]  # (modality, step, steps, figures)


def needs_labels(wanted: Wanted) -> bool:
    """Whether fitting its tokenizer looks at labels at all (a picture format doesn't)."""
    return bool(codecs.get(wanted.modality.codec).needs_fit)


def fit_tokenizers(
    resolved: Resolved,
    dataset: Dataset,
    shards: Sequence[int],
    on_fit: OnFit,
    names: Sequence[str] | None = None,
) -> None:
    """Fit the tokenizers of ``names`` (of all that are wanted and missing) on the kept labels of ``shards``, and add them
    to the dataset. What a fit keeps of its state and its labels is removed once the tokenizer is there.
    """
    vocabulary: Path | None = None
    names = resolved.unfitted() if names is None else names
    texts = [name for name in names if resolved.wanted[name].modality.kind == "sequence"]
    for name in names:
        with_encoder(
            dataset, name, resolved.config.modalities[name].tokenizer.options
        )  # refused before any fit
    for name in [*sorted(texts, key=lambda n: n != "caption"), *(n for n in names if n not in texts)]:
        options: dict[str, Any] = dict(resolved.config.modalities[name].tokenizer.options)
        if name in texts:
            options |= (
                {"vocabulary": vocabulary}
                if vocabulary
                else _vocabulary_options(resolved, dataset, shards, options)
            )
        elif needs_labels(resolved.wanted[name]):
            options = {**resolved.config.fit.options(), "seed": resolved.config.seed, **options}
        scratch = scratch_folder(resolved, dataset, name, shards)
        with _alone_in(scratch, name):
            short = fitted_tokenizer(dataset, resolved.wanted[name], resolved.config)
            if short is None:  # otherwise another process has fitted it
                folder = _fit(resolved, dataset, name, shards, options, scratch, on_fit)
                origin = fit_origin(resolved.wanted[name], resolved.config)
                (folder / ORIGIN).write_text(json.dumps(origin, sort_keys=True))
                short = dataset.add_tokenizer(name, folder)
            if scratch.exists():
                shutil.rmtree(scratch)
        if name in texts and vocabulary is None:
            vocabulary = dataset.tokenizer_folder(name, short)


@contextmanager
def _alone_in(scratch: Path, name: str) -> Iterator[None]:
    """Two builds of one dataset would fit in the same folder: the second waits until the first is done, or dead."""
    scratch.parent.mkdir(parents=True, exist_ok=True)
    path = scratch.with_name(f"{scratch.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{name}: another process fits its tokenizer; waiting for it")
        lock.acquire()
    try:
        yield
        path.unlink(missing_ok=True)  # who still waits for this file finds the tokenizer
    finally:
        lock.release()


def _fit(
    resolved: Resolved,
    dataset: Dataset,
    name: str,
    shards: Sequence[int],
    options: dict[str, Any],
    scratch: Path,
    on_fit: OnFit,
) -> Path:
    """One tokenizer's folder, in ``scratch``."""
    wanted, config = resolved.wanted[name], resolved.config
    train: Sequence[Any] = []
    held_out: Sequence[Any] = []
    if needs_labels(wanted):
        train, held_out = fit_labels(resolved, dataset, wanted, shards, options.get("sizes", ()), scratch)
        if not train:
            raise SourceError(f"modalities.{name}.tokenizer: the fit set has no label of {name} to fit it on")

    def progress(done: int, total: int, figures: dict[str, Any]) -> None:
        on_fit(name, done, total, figures)

    out = scratch / name
    if needs_labels(wanted) and config.fit.workers > 1:
        fit_on_workers(FitJob(resolved, name, tuple(shards), options, scratch), out, progress)
    else:
        device = {"device": device_of(config)} if needs_labels(wanted) else {}
        options = with_encoder(dataset, name, options)
        fit_codec(
            wanted.modality,
            train,
            held_out,
            image_size=config.image_size,
            options={**device, **options},
            out=out,
            progress=progress,
            scratch=scratch,
        )
    codec = load_codec(out, wanted.modality, config.image_size)
    if isinstance(codec, VQVAE) and (picture := reconstructions(codec, held_out)) is not None:
        (out / PICTURE).write_bytes(picture)
    return out


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
