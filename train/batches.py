"""Compact batches: only the tokens that the model reads, end to end and without padding.

Shapes: B samples, I input slots and T target slots of all samples together, M modalities in the order of the model's
configuration. A slot holds a token id, the modality it belongs to and its position in it. Slots of a sample follow
each other, and within a sample those of a modality, so lengths say how attention is divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fourmill.train.draws import Draws
from fourmill.train.masking import Masker, Masks, Sequences
from fourmill.train.order import Refs
from fourmill.train.patches import read_patches
from fourmill.train.presets import EOS, PATCH_SIZE, ModalitySpec, ModelConfig
from fourmill.train.reading import Shards
from fourmill.train.rules import Outputs, Scratch, rules_of
from fourmill.train.spans import shuffle_chunks
from fourmill.train_config import TrainConfig

try:
    from fourmill.train.kernel import fill
except ImportError:  # numba comes late to new versions of Python and NumPy
    fill = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model reads. Ids are those of the modality, without an offset.

    ``previous`` holds the decoder's inputs: for sequences the token before the label; grids and vectors read the mask
    token there, and hold 0. Target slots are listed by modality, so that the model computes each head's logits for its own
    slots only, with counts that the host knows: ``label_order`` are target slots sorted by modality, and ``counts[m]``
    how many belong to modality m. ``patches`` are visible pixels, rows first, then columns, then channels;
    ``patch_slots`` are their input slots. ``input_width`` and ``target_width`` are the longest samples' lengths.
    """

    input_ids: Tensor  # uint16 (I,)
    input_modality: Tensor  # uint8 (I,)
    input_positions: Tensor  # int16 (I,)
    input_lengths: Tensor  # int32 (B,), adding up to I
    labels: Tensor  # uint16 (T,)
    previous: Tensor  # uint16 (T,)
    target_modality: Tensor  # uint8 (T,)
    target_positions: Tensor  # int16 (T,)
    target_lengths: Tensor  # int32 (B,), adding up to T
    label_order: Tensor  # int32 (T,)
    patches: Tensor  # uint8 (P, 768)
    patch_slots: Tensor  # int64 (P,)
    input_places: Tensor  # int64 (I,): slots in rows of input_width; empty where all samples are as long
    target_places: Tensor  # int64 (T,): the same for target_width
    counts: tuple[int, ...]  # M numbers that add up to T
    input_width: int
    target_width: int

    def __len__(self) -> int:
        return len(self.input_lengths)

    def to(self, device: torch.device) -> Batch:
        """Copied to a device, from pinned memory where that is a GPU, without waiting for the copy."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {}
        for name in _TENSORS:
            value: Tensor = getattr(self, name)
            value = value if value.is_pinned() else value.pin_memory()
            moved[name] = value.to(device, non_blocking=True)
        return replace(self, **moved)

    def to_bytes(self) -> Tensor:
        """Everything as one uint8 tensor: a process hands over one tensor far faster than fourteen."""
        arrays = [getattr(self, name).numpy() for name in _TENSORS]
        sizes = [len(array) for array in arrays]
        head = np.array(
            [self.input_width, self.target_width, len(self.counts), *self.counts, *sizes], np.int64
        )
        parts = [array.reshape(-1).view(np.uint8) for array in (head, *arrays)]
        packed = np.zeros(sum(_aligned(len(part)) for part in parts), np.uint8)
        at = 0
        for part in parts:
            packed[at : at + len(part)] = part
            at += _aligned(len(part))
        return torch.from_numpy(packed)

    @classmethod
    def from_bytes(cls, packed: Tensor) -> Batch:
        """The inverse of `to_bytes`. Shares the tensor's memory."""
        raw = packed.numpy()
        input_width, target_width, modalities = raw[:24].view(np.int64).tolist()
        at = 8 * (3 + modalities + len(_TENSORS))
        numbers = raw[24:at].view(np.int64).tolist()
        found: dict[str, Any] = {}
        for name, size in zip(_TENSORS, numbers[modalities:], strict=True):
            dtype, width = _DTYPES[name]
            length = size * width * dtype.itemsize
            array = raw[at : at + length].view(dtype)
            found[name] = torch.from_numpy(array.reshape(size, width) if width > 1 else array)
            at += _aligned(length)
        return cls(
            **found, counts=tuple(numbers[:modalities]), input_width=input_width, target_width=target_width
        )


def _aligned(size: int) -> int:
    """Bytes up to where any array can begin."""
    return -(-size // 8) * 8


_PATCH = 3 * PATCH_SIZE**2
_DTYPES: dict[str, tuple[np.dtype[Any], int]] = {
    "input_ids": (np.dtype(np.uint16), 1), "input_modality": (np.dtype(np.uint8), 1),
    "input_positions": (np.dtype(np.int16), 1), "input_lengths": (np.dtype(np.int32), 1),
    "labels": (np.dtype(np.uint16), 1), "previous": (np.dtype(np.uint16), 1),
    "target_modality": (np.dtype(np.uint8), 1), "target_positions": (np.dtype(np.int16), 1),
    "target_lengths": (np.dtype(np.int32), 1), "label_order": (np.dtype(np.int32), 1),
    "patches": (np.dtype(np.uint8), _PATCH), "patch_slots": (np.dtype(np.int64), 1),
    "input_places": (np.dtype(np.int64), 1), "target_places": (np.dtype(np.int64), 1),
}  # fmt: skip
_TENSORS = tuple(field.name for field in fields(Batch) if field.type == "Tensor")
assert _TENSORS == tuple(_DTYPES)


class Part(NamedTuple):
    """One modality's share of the slots of a batch: of each row the first ``counts`` (B,) entries."""

    modality: int
    ids: np.ndarray  # (B, W)
    positions: np.ndarray  # (B, W)
    counts: np.ndarray  # (B,)
    previous: np.ndarray | None = None  # (B, W), of sequence targets


class Slots(NamedTuple):
    """The slots of one side of a batch, end to end."""

    ids: np.ndarray  # uint16 (L,)
    modality: np.ndarray  # uint8 (L,)
    positions: np.ndarray  # int16 (L,)
    previous: np.ndarray  # uint16 (L,)
    lengths: np.ndarray  # int32 (B,)


def lay_out(parts: Sequence[Part], rows: int) -> Slots:
    """Sample by sample, in each the parts in their order."""
    lengths: np.ndarray = np.zeros(rows, np.int32)
    for part in parts:
        lengths = lengths + part.counts.astype(np.int32)
    total = int(lengths.sum())
    out = Slots(
        np.zeros(total, np.uint16), np.zeros(total, np.uint8), np.zeros(total, np.int16), np.zeros(total, np.uint16),
        lengths,
    )  # fmt: skip
    start = np.cumsum(lengths, dtype=np.int64) - lengths
    for part in parts:
        row, column = np.nonzero(np.arange(part.ids.shape[1]) < part.counts[:, None])
        slot = start[row] + column
        out.ids[slot] = part.ids[row, column]
        out.modality[slot] = part.modality
        out.positions[slot] = part.positions[row, column]
        if part.previous is not None:
            out.previous[slot] = part.previous[row, column]
        start = start + part.counts
    return out


def batch_of(
    inputs: Slots,
    targets: Slots,
    modalities: int,
    patches: tuple[np.ndarray, np.ndarray] | None = None,
    labels: tuple[np.ndarray, Sequence[int]] | None = None,
) -> Batch:
    """The batch of given slots; ``patches`` as of `read_patches`; ``labels``: their order and counts, if they are known."""
    if labels is None:
        order = np.argsort(targets.modality, kind="stable").astype(np.int32)
        labels = order, np.bincount(targets.modality, minlength=modalities).tolist()
    pixels, slots = patches or (np.zeros((0, _PATCH), np.uint8), np.zeros(0, np.int64))
    widths = [max(1, int(side.lengths.max(initial=1))) for side in (inputs, targets)]
    places = [_places(side.lengths, width) for side, width in zip((inputs, targets), widths, strict=True)]
    arrays = (
        inputs.ids, inputs.modality, inputs.positions, inputs.lengths, targets.ids, targets.previous,
        targets.modality, targets.positions, targets.lengths, labels[0], pixels, slots, *places,
    )  # fmt: skip
    tensors = dict(zip(_TENSORS, map(torch.from_numpy, arrays), strict=True))
    return Batch(**tensors, counts=tuple(labels[1]), input_width=widths[0], target_width=widths[1])


def _places(lengths: np.ndarray, width: int) -> np.ndarray:
    """int64 (L,): where slots stand in rows of ``width``; empty where every row is full."""
    if int(lengths.sum()) == len(lengths) * width:
        return np.zeros(0, np.int64)
    rows, starts = np.arange(len(lengths)), np.cumsum(lengths, dtype=np.int64) - lengths
    return np.repeat(rows * width - starts, lengths) + np.arange(int(lengths.sum()))


class BatchMaker:
    """Makes the batch of given samples. A pure function of (samples, visits, configuration, seed); one thread at a time.

    ``compiled`` chooses the kernel; both ways give the same batches. None: the kernel where numba is installed.
    """

    def __init__(
        self, shards: Shards, model: ModelConfig, config: TrainConfig, compiled: bool | None = None
    ) -> None:
        self.shards, self.model, self.config = shards, model, config
        self.masker = Masker(model.modalities, config)
        self.compiled = fill is not None if compiled is None else compiled
        self._rules = tuple(rules_of(self.masker, model.modalities, config))
        self._room = tuple(Scratch.of(model.modalities))
        self._has_pixels = any(spec.kind == "pixels" for spec in model.modalities)

    def __call__(self, refs: Refs) -> Batch:
        self.shards.open(refs.shard)
        return self._by_kernel(refs) if self.compiled else self._by_numpy(refs)

    def _by_kernel(self, refs: Refs) -> Batch:
        size = (self.config.num_input_tokens, self.config.num_target_tokens)
        out = Outputs.of(len(refs.shard), size, len(self.model.modalities))
        # Numba looks at plain tuples ten times as fast as at those with names.
        tables = (tuple(self.shards.pointers), tuple(out), self._room)
        num_in, num_out, sample, m, token = fill(self._rules, *tables, *refs)
        if sample >= 0:
            self._beyond_vocabulary(refs.shard[sample], self.model.modalities[m], token)
        inputs = Slots(
            out.input_ids[:num_in], out.input_modality[:num_in], out.input_positions[:num_in],
            out.previous[:0], out.input_lengths,
        )  # fmt: skip
        targets = Slots(
            out.labels[:num_out], out.target_modality[:num_out], out.target_positions[:num_out],
            out.previous[:num_out], out.target_lengths,
        )  # fmt: skip
        return self._batch(
            refs, out.row, out.crop, inputs, targets, (out.label_order[:num_out], out.counts.tolist())
        )

    def _by_numpy(self, refs: Refs) -> Batch:
        rows, keys64 = self.shards.look_up(refs)
        draws = Draws(self.config.seed, keys64, refs.visit)
        crops = draws.integers("crop", self.shards.crops(refs.shard))
        present = np.zeros((len(rows), len(self.model.modalities)), bool)
        grids: dict[str, np.ndarray] = {}
        sequences: dict[str, Sequences] = {}
        for m, spec in enumerate(self.model.modalities):
            present[:, m] = self.shards.present(spec.name, refs.shard, rows)
            if spec.is_sequence:
                sequences[spec.name] = self._sequences(draws, spec, refs.shard, rows, crops)
            elif spec.kind != "pixels":
                grids[spec.name] = self.shards.tokens(spec, refs.shard, rows, crops)
        masks = self.masker(draws, present, sequences)
        inputs, targets = self._parts(masks, grids)
        return self._batch(refs, rows, crops, lay_out(inputs, len(rows)), lay_out(targets, len(rows)))

    def _batch(
        self,
        refs: Refs,
        rows: np.ndarray,
        crops: np.ndarray,
        inputs: Slots,
        targets: Slots,
        labels: tuple[np.ndarray, Sequence[int]] | None = None,
    ) -> Batch:
        patches = None
        if self._has_pixels:
            patches = read_patches(
                self.shards, self.model.modalities, refs.shard, rows, crops,
                inputs.modality, inputs.positions, inputs.lengths,
            )  # fmt: skip
        return batch_of(inputs, targets, len(self.model.modalities), patches, labels)

    def _sequences(
        self, draws: Draws, spec: ModalitySpec, shard: np.ndarray, rows: np.ndarray, crops: np.ndarray
    ) -> Sequences:
        """The tokens with EOS appended, then cut to what training keeps; length 0 where absent."""
        ids, kept, present = self.shards.sequences(spec, shard, rows, crops)
        kept = np.minimum(kept, spec.num_tokens)
        if spec.chunk > 1:
            shuffle_chunks(draws, spec.name, ids, kept, spec.chunk)
        lengths = np.where(present, np.minimum(kept + 1, spec.num_tokens), 0)
        ends = np.flatnonzero(lengths > kept)
        ids[ends, kept[ends]] = EOS
        if int(ids.max(initial=0)) >= spec.vocab_size:
            row, column = np.argwhere(ids >= spec.vocab_size)[0]
            self._beyond_vocabulary(shard[row], spec, int(ids[row, column]))
        return Sequences(ids, lengths)

    def _beyond_vocabulary(self, shard: int, spec: ModalitySpec, token: int) -> None:
        raise self.shards.damaged(
            int(shard), f"{spec.name} holds the token {token}, beyond its vocabulary of {spec.vocab_size}"
        )

    def _parts(self, masks: Masks, grids: dict[str, np.ndarray]) -> tuple[list[Part], list[Part]]:
        inputs, targets = [], []
        for m, spec in enumerate(self.model.modalities):
            if spec.is_sequence:
                span = masks.spans[spec.name]
                inputs.append(sequence_part(m, span.inputs, span.input_lengths))
                targets.append(target_sequence_part(m, span.targets, span.target_lengths))
                continue
            mask = masks.grids[spec.name]
            if spec.kind == "pixels":
                inputs.append(Part(m, np.zeros_like(mask.order), mask.order, mask.inputs))
                continue
            tokens = np.take_along_axis(grids[spec.name], mask.order, axis=1)
            inputs.append(Part(m, tokens, mask.order, mask.inputs))
            places = np.minimum(mask.inputs[:, None] + np.arange(spec.num_tokens), spec.num_tokens - 1)
            hidden = np.take_along_axis(mask.order, places, axis=1)
            targets.append(Part(m, np.take_along_axis(tokens, places, axis=1), hidden, mask.targets))
        return inputs, targets


def sequence_part(modality: int, ids: np.ndarray, lengths: np.ndarray) -> Part:
    return Part(modality, ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), lengths)


def target_sequence_part(modality: int, targets: np.ndarray, lengths: np.ndarray) -> Part:
    """Teacher forcing: k target tokens (B, T) make k - 1 slots that read [:-1] and predict [1:]."""
    labels, previous = targets[:, 1:], targets[:, :-1]
    positions = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
    return Part(modality, labels, positions, np.maximum(lengths - 1, 0), previous)
