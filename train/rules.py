"""What the masking kernel works with: a configuration, open shards and a batch's slots, as plain arrays.

It does not need the compiler, so that everything but the kernel works where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fourmill.train.draws import purpose_key
from fourmill.train.masking import Masker, keep_schemes
from fourmill.train.presets import ModalitySpec
from fourmill.train_config import TrainConfig

GRID, SEQUENCE, PIXELS = range(3)  # vectors are read and masked as grids are
KIND, TOKENS, VOCABULARY, CHUNK = range(4)  # rows of `Rules.shape`
GRID_ORDER, KEEP, CUT, SHUFFLE, TRY = range(5)  # rows of `Rules.own_keys`
REAL, PRESENT, LENGTH, CAPACITY, ALLOWED, INPUTS, TARGETS, FIRST = range(8)  # rows of `Scratch.numbers`
EVERYWHERE = 1  # in place of an address in `Pointers.present`: no row lacks the modality
IDS, SHOWN, HIDDEN = range(3)  # rows of `Scratch.text`


class Rules(NamedTuple):
    """A masking configuration over M modalities and C components (the last one the fallback).

    ``keys`` of a side are those of: the total, the shares, and of each turn of sharing out, first the whole, then what the
    sequences left over.
    """

    shape: np.ndarray  # int64 (4, M): KIND, TOKENS, VOCABULARY, CHUNK
    gammas: tuple[
        np.ndarray, np.ndarray, np.ndarray
    ]  # alphas (2, C, M), which table is theirs, and the tables
    weights: np.ndarray  # float64 (C - 1,)
    schemes: np.ndarray  # int64 (C, M): KEEP_*
    bounds: np.ndarray  # int64 (2, 2): of input and of target tokens, the least and the most
    as_published: bool  # as 4M's own code does
    common: np.ndarray  # uint64 (2,): keys of crop and component
    keys: np.ndarray  # uint64 (2, 2 + 2 turns): by side
    own_keys: np.ndarray  # uint64 (5, M): by modality, GRID_ORDER ... TRY


class Pointers(NamedTuple):
    """Addresses of the arrays of S shards, 0 for one that is not open, by shard, and by shard and modality."""

    rows: np.ndarray  # uint64 (S,): int64, the rows of the split
    keys64: np.ndarray  # uint64 (S,): uint64, by row
    crops: np.ndarray  # int64 (S,): how many crops a row has
    present: np.ndarray  # uint64 (S, M): bool, by row; or EVERYWHERE
    values: np.ndarray  # uint64 (S, M): uint16, tokens by row and crop, or of all sequences end to end
    offsets: np.ndarray  # uint64 (S, M): int32, where the sequence of (row, crop) begins

    @classmethod
    def closed(cls, shards: int, modalities: int) -> Pointers:
        one, two = np.zeros(shards, np.uint64), np.zeros((shards, modalities), np.uint64)
        return cls(one, one.copy(), np.ones(shards, np.int64), two, two.copy(), two.copy())


class Outputs(NamedTuple):
    """Room for the slots of a batch of B samples: N and T slots for each at most. See `Batch`."""

    input_ids: np.ndarray  # uint16 (B * N,)
    input_modality: np.ndarray  # uint8 (B * N,)
    input_positions: np.ndarray  # int16 (B * N,)
    labels: np.ndarray  # uint16 (B * T,)
    previous: np.ndarray  # uint16 (B * T,)
    target_modality: np.ndarray  # uint8 (B * T,)
    target_positions: np.ndarray  # int16 (B * T,)
    label_order: np.ndarray  # int32 (B * T,)
    input_lengths: np.ndarray  # int32 (B,)
    target_lengths: np.ndarray  # int32 (B,)
    counts: np.ndarray  # int64 (M,): target slots by modality
    crop: np.ndarray  # int64 (B,): which crop was read
    row: np.ndarray  # int64 (B,): and of which row of the shard

    @classmethod
    def of(cls, rows: int, slots: tuple[int, int], modalities: int) -> Outputs:
        n, t = rows * slots[0], rows * slots[1]
        sizes = {
            "input_ids": (n, np.uint16), "input_modality": (n, np.uint8), "input_positions": (n, np.int16),
            "labels": (t, np.uint16), "previous": (t, np.uint16), "target_modality": (t, np.uint8),
            "target_positions": (t, np.int16), "label_order": (t, np.int32),
            "input_lengths": (rows, np.int32), "target_lengths": (rows, np.int32),
            "counts": (modalities, np.int64), "crop": (rows, np.int64), "row": (rows, np.int64),
        }  # fmt: skip
        return cls(**{name: np.empty(size, dtype) for name, (size, dtype) in sizes.items()})


class Scratch(NamedTuple):
    """Room for one sample while it is masked; see the names of the rows above."""

    numbers: np.ndarray  # int64 (8, M): presence, then counts of tokens
    shares: np.ndarray  # float64 (4, M): logarithms of the shares of inputs and of targets, then the shares
    text: np.ndarray  # uint16 (3, M, 2 L + 2): sequences, what is visible, what is hidden
    dropped: np.ndarray  # bool (L + 1,)
    order: np.ndarray  # uint16 (most tokens of a grid,)
    wanted: np.ndarray  # int64 (2,): input and target tokens

    @classmethod
    def of(cls, specs: Sequence[ModalitySpec]) -> Scratch:
        count = len(specs)
        longest = max([spec.num_tokens for spec in specs if spec.is_sequence], default=0)
        widest = max(spec.num_tokens for spec in specs)
        return cls(
            np.zeros((8, count), np.int64),
            np.zeros((4, count)),
            np.zeros((3, count, 2 * longest + 2), np.uint16),
            np.zeros(longest + 1, bool),
            np.zeros(widest, np.uint16),
            np.zeros(2, np.int64),
        )


def rules_of(masker: Masker, specs: Sequence[ModalitySpec], config: TrainConfig) -> Rules:
    """The rules by which ``masker`` draws."""

    def keys(*purposes: str) -> np.ndarray:
        return np.array([purpose_key(config.seed, purpose) for purpose in purposes], np.uint64)

    def by_modality(form: str) -> np.ndarray:
        return keys(*(form.format(spec.name) for spec in specs))

    turns = range(len(specs) + 1)
    by_side = [
        keys(
            f"total/{number}",
            f"{side}/dirichlet",
            *(f"{side}/left/{turn}" for turn in turns),
            *(f"{side}/handed-on/left/{turn}" for turn in turns),
        )
        for number, side in enumerate(("input", "target"))
    ]
    kinds = {"sequence": SEQUENCE, "pixels": PIXELS}
    shape = [[kinds.get(s.kind, GRID), s.num_tokens, s.vocab_size, s.chunk] for s in specs]
    gammas = masker.gammas
    return Rules(
        shape=np.array(shape, np.int64).T.copy(),
        gammas=(masker.alphas, gammas.table_of.reshape(masker.alphas.shape), gammas.tables),
        weights=masker.weights,
        schemes=np.array([keep_schemes(spec, config) for spec in specs], np.int64).T.copy(),
        bounds=np.array(config.token_bounds, np.int64),
        as_published=config.masking == "reference",
        common=keys("crop", "component"),
        keys=np.stack(by_side),
        own_keys=np.stack(
            [
                by_modality("grid/{}"),
                by_modality("span/{}/keep"),
                by_modality("span/{}/cut"),
                by_modality("shuffle/{}"),
                by_modality("span/{}/tries"),
            ]
        ),
    )
