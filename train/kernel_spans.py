"""The kernel's span masking: what `fourmill.train.spans` does for a batch, for one sequence.

``n`` and ``text`` are the tables of `Scratch`.
"""

from __future__ import annotations

import math

import numpy as np

from fourmill.train.compiled import HALF, LOW, compiled, first_half, half_at, mix, unit_of, word_at
from fourmill.train.presets import FIRST_SENTINEL, NUM_SENTINELS
from fourmill.train.rules import (
    CHUNK,
    CUT,
    FIRST,
    HIDDEN,
    IDS,
    INPUTS,
    KEEP,
    LENGTH,
    SHOWN,
    TARGETS,
    TOKENS,
    TRY,
)
from fourmill.train.spans import KEEP_ALL, KEEP_BINARY, SHRINK, TRIES

_TO_WORD = 2.0**32
_LAST_SENTINEL = FIRST_SENTINEL + NUM_SENTINELS - 1


@compiled
def _drop(keep, try_key, chunk, most, length, budget, dropped):
    """Which tokens are dropped; all, if nothing may be shown."""
    stride = (most + 1) // 2
    if budget > 0:
        for number in range(TRIES):
            limit = np.uint64(math.ceil(keep * _TO_WORD))
            shown, before, word = 0, False, LOW
            for i in range(length):
                if chunk > 1:
                    half = half_at(try_key, 2 * number * stride + i // chunk)
                elif i & 1:
                    half = word & LOW
                else:
                    word = word_at(try_key, number * stride + (i >> 1))
                    half = word >> HALF
                gone = half >= limit
                dropped[i] = gone
                shown += not (gone and before)
                before = gone
                if shown > budget:
                    break
            if shown <= budget:
                return
            keep *= SHRINK
    for i in range(length):
        dropped[i] = True


@compiled
def _lay_out(text, m, length, dropped):
    """Fill what is shown and what is hidden; returns their lengths."""
    run, num_shown, num_hidden, before = 0, 0, 0, False
    for i in range(length):
        gone = dropped[i]
        if gone:
            if not before:
                text[SHOWN, m, num_shown] = text[HIDDEN, m, num_hidden] = FIRST_SENTINEL + run
                run += 1
                num_shown += 1
                num_hidden += 1
            text[HIDDEN, m, num_hidden] = text[IDS, m, i]
            num_hidden += 1
        else:
            text[SHOWN, m, num_shown] = text[IDS, m, i]
            num_shown += 1
        before = gone
    text[HIDDEN, m, num_hidden] = FIRST_SENTINEL + run
    return num_shown, num_hidden + 1


@compiled
def _cut(text, m, size, most, half):
    """Where the target begins that has at most ``most`` tokens, and how many it has."""
    sentinels = 0
    for i in range(size):
        sentinels += FIRST_SENTINEL <= text[HIDDEN, m, i] <= _LAST_SENTINEL
    wanted = np.int64(math.floor(unit_of(half) * (sentinels - 1)))
    start, fitting, seen = 0, -1, 0
    for i in range(size):
        if FIRST_SENTINEL <= text[HIDDEN, m, i] <= _LAST_SENTINEL:
            if seen == wanted:
                start = i
            seen += 1
            if fitting < 0 and size - i <= most:
                fitting = i
    if size - start <= most:
        start = max(fitting, 0)
    return start, min(size - start, most)


@compiled
def mask_sequence(shape, keys, scheme, base, m, n, text, dropped):
    """Mask a sequence within its budgets, and lower them to what it really uses."""
    length, budget_in, budget_out = n[LENGTH, m], n[INPUTS, m], n[TARGETS, m]
    keep = unit_of(first_half(base, keys[KEEP, m]))
    if scheme == KEEP_ALL:
        keep = 1.0
    elif scheme == KEEP_BINARY:
        keep = 1.0 if keep < 0.5 else 0.0
    try_key = mix(base ^ keys[TRY, m])
    _drop(keep, try_key, shape[CHUNK, m], shape[TOKENS, m], length, budget_in, dropped)
    num_shown, num_hidden = _lay_out(text, m, length, dropped)
    first = 0
    if num_hidden > budget_out + 1:
        first, num_hidden = _cut(text, m, num_hidden, budget_out + 1, first_half(base, keys[CUT, m]))
    if budget_out <= 0 or length == 0:
        num_hidden = 0
    n[INPUTS, m] = num_shown if budget_in > 0 else 0
    n[TARGETS, m] = max(num_hidden - 1, 0)
    n[FIRST, m] = first
