"""A batch, read and masked sample by sample in compiled code: what `Masker` does, from the same numbers.

The kernel reads tokens where they lie in the memory-mapped files, and only those that the masks keep. It holds no lock,
so that a thread can prepare batches while the model computes. `fourmill.train.masking` and `fourmill.train.spans` are
the plain form of the same rules; the tests compare both, number by number.

Reference counts cost more than the work here, so structures are taken apart once, views are avoided, and what belongs to
a sample stands in a few small tables (`fourmill.train.rules.Scratch`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from fourmill.train.compiled import below, compiled, first_half, half_at, mix, shuffle
from fourmill.train.draws import VISIT
from fourmill.train.kernel_budgets import budgets, hand_on
from fourmill.train.kernel_spans import mask_sequence
from fourmill.train.presets import EOS
from fourmill.train.rules import (
    ALLOWED,
    CHUNK,
    EVERYWHERE,
    FIRST,
    GRID_ORDER,
    HIDDEN,
    IDS,
    INPUTS,
    KIND,
    LENGTH,
    PIXELS,
    REAL,
    SEQUENCE,
    SHOWN,
    SHUFFLE,
    TARGETS,
    TOKENS,
    VOCABULARY,
)

_LINE = np.uint64(64)  # bytes that come from memory together


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


@intrinsic
def _fetch(typing: Any, address: Any) -> Any:
    """Ask for a line of memory that will be read soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        pointer = builder.inttoptr(arguments[0], byte.as_pointer())
        hints = [word(0), word(2), word(1)]  # for reading, into the second cache, data
        builder.call(call, [pointer, *hints])
        return context.get_dummy_value()

    return types.none(types.uint64), generate


@compiled
def _read_sequence(offsets_at, values_at, cell, most, chunk, shuffle_key, m, text):
    """The tokens of a cell with EOS, cut to what training keeps; whole chunks in random order. Returns how many."""
    offsets = carray(_pointer(offsets_at), (cell + 2,), np.int32)
    start = np.int64(offsets[cell])
    kept = min(np.int64(offsets[cell + 1]) - start, most)
    tokens = carray(_pointer(values_at), (start + kept,), np.uint16)
    for i in range(kept):
        text[IDS, m, i] = tokens[start + i]
    if chunk > 1:
        chunks = kept // chunk
        for i in range(chunks):
            other = i + below(half_at(shuffle_key, i), chunks - i)
            for j in range(chunk):
                token = text[IDS, m, i * chunk + j]
                text[IDS, m, i * chunk + j] = text[IDS, m, other * chunk + j]
                text[IDS, m, other * chunk + j] = token
    if kept < most:
        text[IDS, m, kept] = EOS
        kept += 1
    return kept


@compiled
def _read(shape, keys, present_at, values_at, offsets_at, shard, row, cell, base, n, text):
    """Presence and lengths, and the sequences themselves. Returns modality and value of a token beyond its vocabulary."""
    for m in range(n.shape[1]):
        n[REAL, m] = n[LENGTH, m] = 0
        if present_at[shard, m] == EVERYWHERE:
            n[REAL, m] = 1
        elif present_at[shard, m]:
            n[REAL, m] = carray(_pointer(present_at[shard, m]), (row + 1,), np.uint8)[row] != 0
        if not n[REAL, m]:
            continue
        n[LENGTH, m] = shape[TOKENS, m]
        if shape[KIND, m] == SEQUENCE:
            shuffle_key = mix(base ^ keys[SHUFFLE, m])
            n[LENGTH, m] = _read_sequence(
                offsets_at[shard, m], values_at[shard, m], cell, shape[TOKENS, m], shape[CHUNK, m], shuffle_key, m, text
            )  # fmt: skip
            for i in range(n[LENGTH, m]):
                if text[IDS, m, i] >= shape[VOCABULARY, m]:
                    return m, np.int64(text[IDS, m, i])
    return -1, np.int64(-1)


@compiled
def _write_sequence(text, row, m, skip, count, at, ids, modality, positions):
    for i in range(count):
        ids[at + i] = text[row, m, skip + i]
        modality[at + i] = m
        positions[at + i] = i


@compiled
def _write_grid(tokens_at, width, order, skip, m, count, at, ids, modality, positions):
    """``tokens_at`` 0: pixels, which have no ids. Returns the highest token."""
    for i in range(count):  # one array at a time, so that several places are written at once
        modality[at + i] = m
    for i in range(count):
        positions[at + i] = order[skip + i]
    highest = np.uint16(0)
    if tokens_at:
        tokens = carray(_pointer(tokens_at), (width,), np.uint16)
        for i in range(count):
            token = tokens[order[skip + i]]
            ids[at + i] = token
            highest = max(highest, token)
    else:
        for i in range(count):
            ids[at + i] = 0
    return np.int64(highest)


@compiled
def _locate(rows_at, keys64_at, crops, crop_key, shards, places, visits, out_row, out_crop, bases):
    """Rows, crops and the base of all draws, for a whole batch."""
    for b in range(len(shards)):
        row = carray(_pointer(rows_at[shards[b]]), (places[b] + 1,), np.int64)[places[b]]
        key64 = carray(_pointer(keys64_at[shards[b]]), (row + 1,), np.uint64)[row]
        bases[b] = mix(mix(key64) + np.uint64(visits[b]) * VISIT)
        out_row[b], out_crop[b] = row, below(first_half(bases[b], crop_key), crops[shards[b]])


@compiled
def _fetch_cell(shape, values_at, offsets_at, shard, cell):
    """Memory is slow: ask for a sample's grids, and for where its sequences are, while others are masked."""
    for m in range(shape.shape[1]):
        if shape[KIND, m] == SEQUENCE and offsets_at[shard, m]:
            _fetch(offsets_at[shard, m] + np.uint64(4 * cell))
        elif values_at[shard, m]:
            size = np.uint64(2 * shape[TOKENS, m])
            start = values_at[shard, m] + np.uint64(cell) * size
            for line in range(start, start + size, _LINE):
                _fetch(line)


@compiled
def _fetch_sequences(shape, values_at, offsets_at, shard, cell):
    """The sequences themselves, once it is known where they are."""
    for m in range(shape.shape[1]):
        if shape[KIND, m] == SEQUENCE and offsets_at[shard, m]:
            first = np.int64(carray(_pointer(offsets_at[shard, m]), (cell + 1,), np.int32)[cell])
            _fetch(values_at[shard, m] + np.uint64(2 * first))


@compiled
def fill(rules, pointers, out, room, shards, places, visits):
    """Fill ``out`` (`Outputs`) with the slots of samples int64 (B,), by `Rules` and `Pointers`; ``room``: `Scratch`.

    Returns how many input and target slots there are, and sample, modality and value of a token that is beyond its
    vocabulary (-1: none).
    """
    shape, gammas, weights, schemes, bounds, as_published, common, keys, own_keys = rules
    rows_at, keys64_at, crops, present_at, values_at, offsets_at = pointers
    ids_in, modality_in, positions_in, ids_out, previous, modality_out, positions_out, label_order = out[:8]
    lengths_in, lengths_out, counts, out_crop, out_row = out[8:]
    n, x, text, dropped, order, wanted = room
    modalities = shape.shape[1]
    num_in, num_out = np.int64(0), np.int64(0)
    counts[:] = 0
    has_sequences = False
    for m in range(modalities):
        has_sequences |= shape[KIND, m] == SEQUENCE
    bases = np.empty(len(shards), np.uint64)
    _locate(rows_at, keys64_at, crops, common[0], shards, places, visits, out_row, out_crop, bases)
    for b in range(len(shards)):
        shard, row, base = shards[b], out_row[b], bases[b]
        cell = row * crops[shard] + out_crop[b]
        if b + 2 < len(shards):
            after = shards[b + 2]
            _fetch_cell(shape, values_at, offsets_at, after, out_row[b + 2] * crops[after] + out_crop[b + 2])
        if b + 1 < len(shards):
            after = shards[b + 1]
            _fetch_sequences(
                shape, values_at, offsets_at, after, out_row[b + 1] * crops[after] + out_crop[b + 1]
            )
        wrong, value = _read(
            shape, own_keys, present_at, values_at, offsets_at, shard, row, cell, base, n, text
        )
        if wrong >= 0:
            return num_in, num_out, np.int64(b), wrong, value
        for side in range(2):
            low, high = bounds[side, 0], bounds[side, 1]
            wanted[side] = low + below(first_half(base, keys[side, 0]), high - low + 1)
        component = budgets(shape, gammas, weights, common[1], keys, wanted, as_published, base, n, x)
        for m in range(modalities):
            if shape[KIND, m] == SEQUENCE:
                mask_sequence(shape, own_keys, schemes[component, m], base, m, n, text, dropped)
        if has_sequences and not as_published:
            hand_on(shape, gammas, keys, component, wanted, base, n, x)

        begin_in, begin_out = num_in, num_out
        for m in range(modalities):
            inputs, targets = n[INPUTS, m], n[TARGETS, m]
            if shape[KIND, m] == SEQUENCE:
                begin = n[FIRST, m]
                _write_sequence(text, SHOWN, m, 0, inputs, num_in, ids_in, modality_in, positions_in)
                _write_sequence(
                    text, HIDDEN, m, begin + 1, targets, num_out, ids_out, modality_out, positions_out
                )
                for i in range(targets):
                    previous[num_out + i] = text[HIDDEN, m, begin + i]
            elif inputs + targets > 0:
                width, at = shape[TOKENS, m], np.uint64(0)
                if shape[KIND, m] != PIXELS:
                    at = values_at[shard, m] + np.uint64(2 * cell * width)
                shuffle(mix(base ^ own_keys[GRID_ORDER, m]), width, inputs + targets, order)
                highest = max(
                    _write_grid(at, width, order, 0, m, inputs, num_in, ids_in, modality_in, positions_in),
                    _write_grid(
                        at, width, order, inputs, m, targets, num_out, ids_out, modality_out, positions_out
                    ),
                )
                for i in range(targets):
                    previous[num_out + i] = 0
                if highest >= shape[VOCABULARY, m] and shape[KIND, m] != PIXELS:
                    return num_in, num_out, np.int64(b), m, highest
            num_in += inputs
            num_out += targets
            counts[m] += targets
        lengths_in[b], lengths_out[b] = num_in - begin_in, num_out - begin_out

    # Which slots each modality has, for the model's heads.
    start = np.int64(0)
    for m in range(modalities):
        n[ALLOWED, m] = start
        start = start + counts[m]
    for i in range(num_out):
        m = modality_out[i]
        label_order[n[ALLOWED, m]] = i
        n[ALLOWED, m] += 1
    return num_in, num_out, np.int64(-1), -1, np.int64(-1)
