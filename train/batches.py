"""Compact batches: only the tokens that the model reads, gathered and masked as whole arrays.

Shapes: B samples, N input slots, T target slots, M modalities in the order of the model's configuration.
A slot holds a token id, the modality it belongs to and its position in it; -1 as modality marks an empty slot.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fourmill.errors import DatasetError
from fourmill.train.draws import Draws
from fourmill.train.masking import Masker, Masks, Sequences
from fourmill.train.presets import EOS, PATCH_SIZE, ModalitySpec, ModelConfig
from fourmill.train_config import TrainConfig

NO_TOKEN = -1  # as a decoder input: the mask token


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model reads. All integers; ids are those of the modality, without an offset.

    ``previous`` holds the decoder's inputs: for sequences the token before the label, for grids and vectors -1, the
    mask token. Label slots are listed by modality, so that the model computes each head's logits for its own slots
    only, with counts that the host knows: ``label_order`` are indices into the flattened (B * T) slots, sorted by
    modality, and ``counts[m]`` how many belong to modality m. ``patches`` are visible pixels, rows first, then
    columns, then channels; ``patch_slots`` are their indices into the flattened (B * N) input slots.
    """

    input_ids: torch.Tensor  # int32 (B, N)
    input_modality: torch.Tensor  # int16 (B, N), -1: empty
    input_positions: torch.Tensor  # int16 (B, N)
    labels: torch.Tensor  # int32 (B, T)
    previous: torch.Tensor  # int32 (B, T), -1: the mask token
    target_modality: torch.Tensor  # int16 (B, T), -1: empty
    target_positions: torch.Tensor  # int16 (B, T)
    label_order: torch.Tensor  # int64 (L,)
    counts: tuple[int, ...]  # M numbers that add up to L
    patches: torch.Tensor  # uint8 (P, 768)
    patch_slots: torch.Tensor  # int64 (P,)
    inputs_full: bool  # no input slot is empty, so attention needs no mask

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Batch:
        """Copied to a device, from pinned memory where that is a GPU."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor) and device.type != "cpu":
                moved[field.name] = value.pin_memory().to(device, non_blocking=True)
        return replace(self, **moved)

    @property
    def real_share(self) -> tuple[float, float]:
        """The share of input slots and of target slots that hold a token."""
        slots = (self.input_modality, self.target_modality)
        return tuple((s >= 0).float().mean().item() if s.numel() else 0.0 for s in slots)  # type: ignore[return-value]


class Part(NamedTuple):
    """One modality's share of the slots of a batch: of each row the first ``counts`` (B,) entries."""

    modality: int
    ids: np.ndarray  # (B, W)
    positions: np.ndarray  # (B, W)
    counts: np.ndarray  # (B,)
    previous: np.ndarray | None = None  # (B, W), of sequence targets
    images: Mapping[int, np.ndarray] | None = None  # by row: uint8 (S, S, 3), of pixels


def pack(
    inputs: Sequence[Part], targets: Sequence[Part], config: ModelConfig, rows: int, slots: tuple[int, int]
) -> Batch:
    """Put the parts side by side in rows of ``slots`` = (N, T) slots. Parts must fit."""
    input_ids, input_modality, input_positions, _ = _lay_out(inputs, rows, slots[0])
    labels, target_modality, target_positions, previous = _lay_out(targets, rows, slots[1])
    flat = target_modality.reshape(-1)
    by_modality = [np.flatnonzero(flat == m) for m in range(len(config.modalities))]
    patches, patch_slots = _patches(inputs, input_modality, input_positions)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        input_modality=torch.from_numpy(input_modality),
        input_positions=torch.from_numpy(input_positions),
        labels=torch.from_numpy(labels),
        previous=torch.from_numpy(previous),
        target_modality=torch.from_numpy(target_modality),
        target_positions=torch.from_numpy(target_positions),
        label_order=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *by_modality])),
        counts=tuple(len(index) for index in by_modality),
        patches=torch.from_numpy(patches),
        patch_slots=torch.from_numpy(patch_slots),
        inputs_full=bool((input_modality >= 0).all()),
    )


def _lay_out(parts: Sequence[Part], rows: int, slots: int) -> tuple[np.ndarray, ...]:
    """ids, modality, positions and previous ids, (rows, slots) each."""
    ids = np.zeros((rows, slots), np.int32)
    modality = np.full((rows, slots), -1, np.int16)
    positions = np.zeros((rows, slots), np.int16)
    previous = np.full((rows, slots), NO_TOKEN, np.int32)
    start = np.zeros(rows, np.int64)
    for part in parts:
        row, column = np.nonzero(np.arange(part.ids.shape[1]) < part.counts[:, None])
        slot = start[row] + column
        ids[row, slot] = part.ids[row, column]
        modality[row, slot] = part.modality
        positions[row, slot] = part.positions[row, column]
        if part.previous is not None:
            previous[row, slot] = part.previous[row, column]
        start += part.counts
    return ids, modality, positions, previous


def _patches(
    parts: Sequence[Part], modality: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The visible patches uint8 (P, 768) and their flat slots int64 (P,)."""
    found: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    for part in parts:
        for row, image in (part.images or {}).items():
            side = image.shape[0] // PATCH_SIZE
            grid = (
                image.reshape(side, PATCH_SIZE, side, PATCH_SIZE, 3).swapaxes(1, 2).reshape(side * side, -1)
            )
            columns = np.flatnonzero(modality[row] == part.modality)
            found.append(grid[positions[row, columns]])
            slots.append(row * modality.shape[1] + columns)
    if not found:
        return np.zeros((0, 3 * PATCH_SIZE**2), np.uint8), np.zeros(0, np.int64)
    return np.ascontiguousarray(np.concatenate(found)), np.concatenate(slots)


class Samples:
    """The samples of one split of a snapshot, numbered 0, 1, ... in the order of shards and rows."""

    def __init__(self, snapshot: Any, specs: Sequence[ModalitySpec], split: str = "train") -> None:
        self.snapshot = snapshot
        self.specs = tuple(specs)
        masks = snapshot.is_train if split == "train" else snapshot.is_val
        rows = [np.flatnonzero(masks(shard)) for shard in range(len(snapshot.shards))]
        keys = [snapshot.keys64(shard)[index] for shard, index in enumerate(rows)]
        self.rows = np.concatenate([np.zeros(0, np.int64), *rows])
        self.keys64 = np.concatenate([np.zeros(0, np.uint64), *keys])
        self.shards = np.repeat(np.arange(len(rows)), [len(index) for index in rows])
        self._columns: dict[tuple[int, str], Any] = {}
        if not len(self.rows):
            raise DatasetError(
                f"snapshot {snapshot.digest[:12]} has no {split} sample; see val_fraction and the build's report"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, shard: int, name: str) -> Any:
        key = (shard, name)
        if key not in self._columns:
            self._columns[key] = self.snapshot.column(shard, name)
        return self._columns[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}}  # memory maps are opened anew in each process

    def by_shard(self, index: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For each shard that ``index`` (B,) touches: the shard, places in the batch, rows in the shard."""
        shards = self.shards[index]
        order = np.argsort(shards, kind="stable")
        places = np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)
        return [(int(shards[place[0]]), place, self.rows[index[place]]) for place in places]


class BatchMaker:
    """Makes the batch of given samples. A pure function of (samples, visits, configuration, seed)."""

    def __init__(self, samples: Samples, model: ModelConfig, config: TrainConfig) -> None:
        self.samples = samples
        self.model = model
        self.config = config
        self.masker = Masker(model.modalities, config)

    def __call__(self, index: np.ndarray, visits: np.ndarray) -> Batch:
        """``index`` int64 (B,): samples; ``visits`` int64 (B,): how often each was seen before."""
        draws = Draws(self.config.seed, self.samples.keys64[index], visits)
        crops = draws.integers("crop", self.samples.snapshot.n_crops)
        groups = self.samples.by_shard(index)
        present = np.zeros((len(index), len(self.model.modalities)), bool)
        grids: dict[str, np.ndarray] = {}
        sequences: dict[str, Sequences] = {}
        for m, spec in enumerate(self.model.modalities):
            for shard, place, rows in groups:
                present[place, m] = self.samples.column(shard, spec.name).present[rows]
            if spec.is_sequence:
                sequences[spec.name] = self._sequences(spec, groups, crops, present[:, m])
            elif spec.kind != "pixels":
                grids[spec.name] = self._grid(spec, groups, crops)
        masks = self.masker(draws, present, sequences)
        inputs, targets = self._parts(masks, grids, groups, crops)
        slots = (self.config.num_input_tokens, self.config.num_target_tokens)
        return pack(inputs, targets, self.model, len(index), slots)

    def _grid(self, spec: ModalitySpec, groups: list[Any], crops: np.ndarray) -> np.ndarray:
        """uint16 (B, n), zeros where absent."""
        out = np.zeros((len(crops), spec.num_tokens), np.uint16)
        for shard, place, rows in groups:
            out[place] = self.samples.column(shard, spec.name).tokens[rows, crops[place]]
        self._check_vocabulary(spec, out, groups)
        return out

    def _sequences(
        self, spec: ModalitySpec, groups: list[Any], crops: np.ndarray, present: np.ndarray
    ) -> Sequences:
        """The tokens with EOS appended, then cut to what training keeps; length 0 where absent."""
        kept = np.zeros(len(crops), np.int64)
        starts = np.zeros(len(crops), np.int64)
        for shard, place, rows in groups:
            column = self.samples.column(shard, spec.name)
            cell = rows * column.n_crops + crops[place]
            starts[place] = column.offsets[cell]
            kept[place] = column.offsets[cell + 1] - starts[place]
        kept = np.minimum(kept, spec.num_tokens)
        lengths = np.where(present, np.minimum(kept + 1, spec.num_tokens), 0)
        ids = np.zeros((len(crops), max(1, int(lengths.max(initial=1)))), np.int64)
        ids[np.arange(len(crops)), np.minimum(kept, ids.shape[1] - 1)] = EOS
        for shard, place, _ in groups:
            row, token = np.nonzero(np.arange(ids.shape[1]) < (kept * present)[place][:, None])
            ids[place[row], token] = self.samples.column(shard, spec.name).flat[starts[place[row]] + token]
        self._check_vocabulary(spec, ids, groups)
        return Sequences(ids, lengths)

    def _check_vocabulary(self, spec: ModalitySpec, ids: np.ndarray, groups: list[Any]) -> None:
        if int(ids.max(initial=0)) >= spec.vocab_size:
            row = int(np.argwhere(ids >= spec.vocab_size)[0, 0])
            shard = next(shard for shard, place, _ in groups if row in place)
            raise DatasetError(
                f"shard {self.samples.snapshot.shards[shard].index}: {spec.name} holds the token {int(ids.max())}, beyond "
                f"its vocabulary of {spec.vocab_size}; the file is damaged: run `fourmill verify`"
            )

    def _parts(
        self, masks: Masks, grids: Mapping[str, np.ndarray], groups: list[Any], crops: np.ndarray
    ) -> tuple[list[Part], list[Part]]:
        inputs, targets = [], []
        for m, spec in enumerate(self.model.modalities):
            if spec.is_sequence:
                span = masks.spans[spec.name]
                inputs.append(_sequence_part(m, span.inputs, span.input_lengths))
                targets.append(target_sequence_part(m, span.targets, span.target_lengths))
                continue
            mask = masks.grids[spec.name]
            places = np.minimum(mask.inputs[:, None] + np.arange(spec.num_tokens), spec.num_tokens - 1)
            hidden = np.take_along_axis(mask.order, places, axis=1)
            if spec.kind == "pixels":
                images = self._images(spec, groups, crops, mask.inputs)
                inputs.append(Part(m, np.zeros_like(mask.order), mask.order, mask.inputs, images=images))
                continue
            tokens = grids[spec.name]
            inputs.append(Part(m, np.take_along_axis(tokens, mask.order, axis=1), mask.order, mask.inputs))
            targets.append(Part(m, np.take_along_axis(tokens, hidden, axis=1), hidden, mask.targets))
        return inputs, targets

    def _images(
        self, spec: ModalitySpec, groups: list[Any], crops: np.ndarray, wanted: np.ndarray
    ) -> dict[int, np.ndarray]:
        """The decoded crops of the rows that show any of their patches."""
        images = {}
        size = self.samples.snapshot.image_size
        for shard, place, rows in groups:
            for row, number in zip(place, rows, strict=True):
                if not wanted[row]:
                    continue
                blob = self.samples.column(shard, spec.name).cells(int(number), int(crops[row]))
                with Image.open(io.BytesIO(blob)) as image:
                    images[int(row)] = np.asarray(image.convert("RGB"))
                if images[int(row)].shape != (size, size, 3):
                    raise DatasetError(
                        f"shard {shard}, row {number}: {spec.name} is not a {size} x {size} picture"
                    )
        return images


def _sequence_part(modality: int, ids: np.ndarray, lengths: np.ndarray) -> Part:
    return Part(modality, ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), lengths)


def target_sequence_part(modality: int, targets: np.ndarray, lengths: np.ndarray) -> Part:
    """Teacher forcing: k target tokens (B, T) make k - 1 slots that read [:-1] and predict [1:]."""
    labels, previous = targets[:, 1:], targets[:, :-1]
    positions = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
    return Part(modality, labels, positions, np.maximum(lengths - 1, 0), previous)
