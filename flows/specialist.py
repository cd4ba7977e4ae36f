"""The specialist: one actor hosts the networks and codecs of a group of modalities.

It takes a micro-batch of one fixed shape and gives back values (tokens) and, where asked, labels. It is
a plain object; `fourmill.flows.engine` wraps it in a Ray actor.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.crops import crop_map
from fourmill.errors import ContractError, FourmillError, first_line
from fourmill.flows.crop_labels import DRAWN, blank_label, crop_label, hw
from fourmill.flows.journal import Journal
from fourmill.flows.micro_batch import Failure, MicroBatch, MicroResult, sample_batch
from fourmill.flows.resolve import Wanted
from fourmill.labelers.base import LabelBatch, Labeler
from fourmill.labelers.figures import Measures
from fourmill.labelers.measure import measure, measure_tokens
from fourmill.labelers.quality import check
from fourmill.labels import NO_CAPTION, Absent, Label
from fourmill.modality import Modality
from fourmill.seeds import generator, key64
from fourmill.shards.arrow import Cell
from fourmill.shards.dataset import Dataset
from fourmill.tokenize.base import Codec, load_codec

logger = logging.getLogger(__name__)


class Specialist:
    """Hosts the labelers and codecs of a group, each loaded once."""

    def __init__(
        self,
        dataset_url: str,
        group: Sequence[Wanted],
        image_size: int,
        device: str,
        journal: tuple[str, str] | None = None,
        calls: int = 1,
    ) -> None:
        """``journal``: folder on this node and name, see `fourmill.flows.journal`. ``calls``: threads in `process`."""
        self._dataset_url = dataset_url
        self._group = {wanted.name: wanted for wanted in group}
        self._image_size = image_size
        self._device = device
        self._seed = 0  # the dataset's, once it is open
        self._labelers: dict[str, Labeler] | None = None
        self._codecs: dict[str, Codec] = {}
        self._journal = Journal(Path(journal[0]), journal[1]) if journal else None
        self._loading = threading.Lock()
        # one forward pass at a time: what is around it overlaps with another's
        self._network = threading.Lock()
        self._ended: float | None = None  # when the last forward pass was done
        self._calls, self._places = calls, threading.Semaphore(calls)
        self._alone = threading.Lock()

    def is_up(self) -> bool:
        """That the process is there, whatever it has loaded."""
        return True

    def ready(self) -> dict[str, Any]:
        """Load everything, and try it on one image; returns the environment that receipts record."""
        self._prepare()
        return environment(self._device)

    def _prepare(self) -> None:
        """Load what is not loaded yet. In every thread that works here."""
        import torch

        if self._device == "cpu":  # a setting of the thread, not of the process
            torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        with self._loading:
            if self._labelers is None:
                self._labelers = self._load()
                self._try_out()

    def _load(self) -> dict[str, Labeler]:
        loaded = {}
        for name, wanted in self._group.items():
            if wanted.settings is not None:
                labeler = wanted.make_labeler()
                labeler.settings = _on_device(labeler.settings, self._device)
                labeler.load()
                loaded[name] = labeler
        dataset = Dataset(self._dataset_url)
        self._seed = int(dataset.identity.get("seed", 0))
        for name, wanted in self._group.items():
            if wanted.tokenizer is not None:
                folder = dataset.tokenizer_folder(name, wanted.tokenizer[:12])
                codec = load_codec(folder, wanted.modality, self._image_size)
                self._codecs[name] = codec.to(self._device)
        return loaded

    def _try_out(self) -> None:
        """Label and tokenize a test image: what cannot work at all is known before a shard is touched."""
        import torch

        for name, wanted in self._group.items():
            tokens = [name] if name in self._codecs else []
            try:
                result = self._process(
                    sample_batch(self._image_size, wanted.crop_rule["n_crops"]),
                    [name],
                    tokens,
                    "a test image",
                )
            except torch.OutOfMemoryError as error:
                raise FourmillError(
                    f"modalities.{name}: not even one image fits into the memory of {self._device}; use a smaller network or "
                    f"`precision: bf16`, or give it an actor of its own (engine.groups): {first_line(error)}"
                ) from error
            for failure in result.failed.values():
                raise FourmillError(
                    f"modalities.{name}: it cannot even label a test image: {failure.text}; "
                    f"`fourmill check-labeler {wanted.labeler or name}` says more"
                )
        self._ended = None  # nobody waited for work until now

    def process(
        self,
        batch: MicroBatch,
        labels: Sequence[str],
        tokens: Sequence[str],
        task: str = "",
        alone: bool = False,
    ) -> MicroResult:
        """Label and tokenize; several threads may be here, whose forward passes take turns.

        ``labels``: modalities whose labels are wanted back; ``tokens``: to tokenize. ``task`` is what the journal calls
        it. ``alone``: while no other call is under way, so that whatever ends the process is the fault of this one.

        What a labeler or codec raises fails its modality and those that need it, no other. I/O errors and memory that
        runs out are no fault of the rows: they are raised.
        """
        self._prepare()
        with self._place(alone):
            return self._process(batch, labels, tokens, task or batch.name)

    @contextmanager
    def _place(self, alone: bool) -> Iterator[None]:
        count = self._calls if alone else 1
        with self._alone if alone else nullcontext():
            for _ in range(count):
                self._places.acquire()
        try:
            yield
        finally:
            self._places.release(count)

    def _process(
        self, batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str], task: str
    ) -> MicroResult:
        result = MicroResult()
        made: dict[str, list[Label]] = {}
        for name in self._needed(batch, {*labels, *tokens}):
            wanted = self._group[name]
            upstream = next((up for up in wanted.upstream if up in result.failed), None)
            if upstream is not None and name not in batch.given:
                result.failed[name] = result.failed[upstream]
                continue
            with self._guarded(name, task, result, "forward"):
                given = batch.given.get(name)
                noted: dict[str, list[float]] = {}
                if given is None:
                    made[name], noted = self._label(wanted, batch, made, result)
                else:
                    made[name] = list(given)
                if name in labels or name in tokens:
                    result.measured[name] = _measured(wanted, batch, made[name], noted)
            if name in tokens and name in made:
                with self._guarded(name, task, result, "tokenize"):
                    result.values[name] = self._tokenize(wanted, batch, made[name])
                    measure_tokens(wanted.modality, result.values[name], result.measured[name])
        result.labels = {name: made[name] for name in labels if name not in result.failed}
        return result

    def _needed(self, batch: MicroBatch, names: set[str]) -> list[str]:
        """With what they need, upstream first."""
        needed = set(names)
        for name in reversed(list(self._group)):
            if name in needed and name not in batch.given:
                needed.update(self._group[name].upstream)
        return [name for name in self._group if name in needed]

    @contextmanager
    def _guarded(self, name: str, task: str, result: MicroResult, phase: str) -> Iterator[None]:
        """Time it, note it in the journal, and remember what somebody's code raises as a failure of its modality."""
        import torch

        start = time.perf_counter()
        note = self._journal.entry(task, name) if self._journal else nullcontext()
        try:
            with note:
                yield
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except torch.AcceleratorError:
            os._exit(1)  # such an error stays with the process: Ray starts a new one
        except Exception as error:
            kind = (
                "broke its contract" if isinstance(error, ContractError) else f"raised {type(error).__name__}"
            )
            words = " ".join(str(error).split())
            result.failed[name] = Failure(name, f"{name} {kind}", f"{type(error).__name__}: {words}"[:500])
            logger.debug("%s: %s", task, result.failed[name].text, exc_info=True)
        spent = f"{phase} {name}"
        result.seconds[spent] = result.seconds.get(spent, 0.0) + time.perf_counter() - start

    # -- labels ---------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, result: MicroResult) -> Iterator[None]:
        """The networks' turn of this call. How long they had nothing to do before it is noted, as `starved`."""
        with self._network:
            if self._ended is not None:
                idle = time.perf_counter() - self._ended
                result.seconds["starved"] = result.seconds.get("starved", 0.0) + idle
            try:
                yield
            finally:
                self._ended = time.perf_counter()

    def _label(
        self, wanted: Wanted, batch: MicroBatch, made: Mapping[str, list[Label]], result: MicroResult
    ) -> tuple[list[Label], dict[str, list[float]]]:
        """One label per row (for a labeler that sees crops, an array with a leading crop axis), and what was noted of each."""
        if wanted.settings is None:
            return _from_source(wanted.modality, batch), {}
        assert self._labelers is not None
        labeler = self._labelers[wanted.name]
        whole = LabelBatch(
            keys=batch.keys,
            frames=batch.frames,
            present=batch.present,
            captions=batch.captions,
            truth=batch.truth,
            crops=self._crop_images(batch) if wanted.sees_crops else None,
            upstream={up: made[up] for up in wanted.upstream},
        )
        size = wanted.batch_size or len(batch.frames)
        n_crops = batch.crops.shape[1] if wanted.sees_crops else 1
        out: list[Label] = []
        notes: dict[str, list[float]] = {}
        for start in range(0, len(batch.frames), size):
            part = _part(whole, start, size)
            with self._turn(result):
                labeler.take_notes()  # what a call left that raised is of other rows
                labels = labeler.label(part)
                noted = labeler.take_notes()
            count = min(size, len(batch.frames) - start) * n_crops
            out.extend(labels[:count])
            for name, values in noted.items():
                notes.setdefault(name, []).extend(values[:count:n_crops])
        if len(out) != len(batch.frames) * n_crops:
            raise ContractError(
                f"labeler {wanted.labeler!r} returned {len(out)} labels for {len(batch.frames) * n_crops} inputs"
            )
        frames = [frame for frame in batch.frames for _ in range(n_crops)]
        rows = [row for row in range(len(batch.frames)) for _ in range(n_crops)]
        live = [i for i, row in enumerate(rows) if batch.present[row]]
        out = [_rounded(label, wanted.modality) for label in out]
        check(
            wanted.modality,
            [out[i] for i in live],
            [frames[i] for i in live],
            [batch.keys[rows[i]] for i in live],
        )
        if wanted.sees_crops:
            out = [_stack(out[row * n_crops : (row + 1) * n_crops]) for row in range(len(batch.frames))]
        return out, notes

    def _crop_images(self, batch: MicroBatch) -> np.ndarray:
        """uint8 (B, n_crops, S, S, 3)"""
        return np.stack(
            [
                np.stack([crop_map(frame, crop, hw(size), self._image_size, "bicubic") for crop in crops])
                for frame, crops, size in zip(batch.frames, batch.crops, batch.sizes, strict=True)
            ]
        )

    # -- tokens ---------------------------------------------------------------------------------------

    def _tokenize(self, wanted: Wanted, batch: MicroBatch, labels: Sequence[Label]) -> list[Cell]:
        """Crop each label by its own rule and encode all crops of the micro-batch as one batch."""
        n_crops = batch.crops.shape[1]
        blank = blank_label(wanted.modality, self._image_size)
        cropped: list[Label] = []
        for key, label, crops, size in zip(batch.keys, labels, batch.crops, batch.sizes, strict=True):
            for index, crop in enumerate(crops):
                if isinstance(label, Absent):
                    cropped.append(blank)
                    continue
                rng = None
                if wanted.modality.contract.form in DRAWN:
                    rng = generator(self._seed, f"crop of {wanted.name}", key64(key), index)
                cropped.append(crop_label(wanted.modality, label, index, crop, size, self._image_size, rng))
        if wanted.modality.contract.form == "features":
            shapes = (label.shape for label in cropped if isinstance(label, np.ndarray) and label.ndim == 3)
            shape = next(shapes, None)
            if shape is None:  # nothing here to tokenize, and nothing to tell the features' shape from
                return list(labels)
            cropped = [np.zeros(shape, np.float32) if label is blank else label for label in cropped]
        values = self._codecs[wanted.name].encode(cropped)
        return [
            label if isinstance(label, Absent) else values[row * n_crops : (row + 1) * n_crops]
            for row, label in enumerate(labels)
        ]


def environment(device: str) -> dict[str, str]:
    """What receipts say of this process, as plain strings: reading torch's own kind of string would import torch."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"torch": str(torch.__version__), "transformers": version("transformers"), "device": name}


def _measured(
    wanted: Wanted, batch: MicroBatch, labels: Sequence[Label], noted: Mapping[str, list[float]]
) -> Measures:
    """Of each row that has an image; of features and other labels by crop, the first crop."""
    if wanted.sees_crops:
        labels = [label[0] if isinstance(label, np.ndarray) else label for label in labels]
    return measure(wanted.modality, labels, noted, batch.present)


def _from_source(modality: Modality, batch: MicroBatch) -> list[Label]:
    if modality.contract.form == "image":
        return list(batch.frames)
    return [list(texts) if texts else Absent(NO_CAPTION) for texts in batch.captions]


def _rounded(label: Label, modality: Modality) -> Label:
    """Round to the precision that labels are kept in, so that kept and fresh labels give the same tokens."""
    stored = modality.contract.stored
    if stored and isinstance(label, np.ndarray):
        return label.astype(stored).astype(modality.contract.dtype)
    return label


def _stack(labels: Sequence[Label]) -> Label:
    absent = next((label for label in labels if isinstance(label, Absent)), None)
    return absent if absent is not None else np.stack(labels)


def _part(batch: LabelBatch, start: int, size: int) -> LabelBatch:
    """Rows start..start+size, padded to ``size`` by repeating the last row: networks see one shape."""
    index = [min(i, len(batch.frames) - 1) for i in range(start, start + size)]
    if index == list(range(len(batch.frames))):
        return batch

    def take(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in index] if len(values) else []

    return LabelBatch(
        keys=take(batch.keys),
        frames=take(batch.frames),
        present=batch.present[index],
        captions=take(batch.captions),
        crops=None if batch.crops is None else batch.crops[index],
        truth=take(batch.truth),
        upstream={name: take(labels) for name, labels in batch.upstream.items()},
    )


def _on_device(settings: Any, device: str) -> Any:
    return replace(settings, device=device)
