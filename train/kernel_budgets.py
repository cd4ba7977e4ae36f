"""The kernel's budgets: what `fourmill.train.masking.Masker` computes for a batch, for one sample.

``n`` and ``x`` are the tables of `Scratch`, a side is 0 for inputs and 1 for targets.
"""

from __future__ import annotations

import math

import numpy as np

from fourmill.train.compiled import compiled, first_half, log_gamma, mix, unit_of, word_at
from fourmill.train.rules import (
    ALLOWED,
    CAPACITY,
    INPUTS,
    KIND,
    LENGTH,
    PRESENT,
    REAL,
    SEQUENCE,
    TARGETS,
    TOKENS,
)

_TINY = 1e-200


@compiled
def _component(alphas, weights, half, n):
    total = 0.0
    for j in range(len(weights)):
        total += weights[j] * _fits(alphas, j, n)
    if total <= 0.0:
        return len(weights)
    point = unit_of(half) * total
    chosen, reached = 0, 0.0
    for j in range(len(weights)):
        reached += weights[j] * _fits(alphas, j, n)
        chosen += point >= reached
    return chosen


@compiled
def _fits(alphas, j, n):
    has_input, has_target = False, False
    for m in range(n.shape[1]):
        has_input |= n[PRESENT, m] != 0 and alphas[0, j, m] > 0
        has_target |= n[PRESENT, m] != 0 and alphas[1, j, m] > 0
    return has_input and has_target


@compiled
def _draw_shares(gammas, side, component, key, as_published, n, x):
    """Logarithms of a Dirichlet draw, up to a constant, and the shares of those that may have any, up to a factor."""
    alphas, table_of, tables = gammas
    best = -np.inf
    for m in range(n.shape[1]):
        alpha, table = alphas[side, component, m], table_of[side, component, m]
        x[side, m] = log_gamma(alpha, tables, table, word_at(key, m))
        if n[ALLOWED, m] > 0 or as_published:
            best = max(best, x[side, m])
    for m in range(n.shape[1]):
        drawn = n[ALLOWED, m] > 0 or (as_published and alphas[side, component, m] > 0)
        x[2 + side, m] = math.exp(x[side, m] - best) if drawn else 0.0


@compiled
def _renew_shares(side, row, n, x):
    """The same relative to those that still have room, whose shares may have been too small beside the others'."""
    best, whole = -np.inf, 0.0
    for m in range(n.shape[1]):
        if n[ALLOWED, m] > n[row, m]:
            best = max(best, x[side, m])
    if best == -np.inf:
        return 0.0
    for m in range(n.shape[1]):
        x[2 + side, m] = math.exp(x[side, m] - best) if n[ALLOWED, m] > n[row, m] else 0.0
        whole += x[2 + side, m]
    return whole


@compiled
def _share_out(side, base, left_keys, first_turn, total, row, n, x):
    """Add ``total`` tokens to the budgets ``n[row]``, none beyond ``n[ALLOWED]``."""
    left = total
    for turn in range(n.shape[1] + 1):
        if left <= 0:
            break
        whole = 0.0
        for m in range(n.shape[1]):
            whole += x[2 + side, m] if n[ALLOWED, m] > n[row, m] else 0.0
        if whole < _TINY:
            whole = _renew_shares(side, row, n, x)
            if whole <= 0.0:
                break
        start, rest = unit_of(first_half(base, left_keys[side, first_turn + turn])), np.float64(left)
        reached, before = 0.0, np.int64(0)
        for m in range(n.shape[1]):
            room = n[ALLOWED, m] - n[row, m]
            if room > 0:
                reached = min(reached + x[2 + side, m] / whole * rest, rest)
                until = np.int64(math.floor(reached + start))
                given = min(until - before, room)
                before = until
                n[row, m] += given
                left -= given


@compiled
def _share_out_as_published(gammas, side, component, key, total, row, n, x):
    alphas, table_of, tables = gammas
    modalities, rest, whole = n.shape[1], total, 0.0
    for m in range(modalities):
        whole += x[2 + side, m]
    if whole <= 0.0 or total <= 0:
        return
    for m in range(modalities):
        n[row, m] = np.int64(math.floor(x[2 + side, m] / whole * total))
        rest -= n[row, m]
    for token in range(rest):
        chosen, highest = 0, -np.inf
        for m in range(modalities):
            if alphas[side, component, m] > 0:
                alpha, table = alphas[side, component, m], table_of[side, component, m]
                value = log_gamma(alpha, tables, table, word_at(key, token * modalities + m))
                if value > highest:
                    chosen, highest = m, value
        n[row, chosen] += 1
    for m in range(modalities):
        n[row, m] = min(n[row, m], n[ALLOWED, m])


@compiled
def budgets(shape, gammas, weights, component_key, keys, wanted, as_published, base, n, x):
    """Fill the budgets; ``wanted`` (2,) says how many tokens, and is lowered where there are not as many.

    Returns the component. ``keys`` (2, ...): see `Rules`.
    """
    alphas = gammas[0]
    modalities = n.shape[1]
    for m in range(modalities):
        n[INPUTS, m] = n[TARGETS, m] = 0
        n[CAPACITY, m] = shape[TOKENS, m] if as_published else n[LENGTH, m]
        n[PRESENT, m] = n[REAL, m] or as_published
    j = _component(alphas, weights, first_half(base, component_key), n)
    if not as_published:
        usable, hideable = 0, 0
        for m in range(modalities):
            usable += n[CAPACITY, m] * (alphas[0, j, m] > 0 or alphas[1, j, m] > 0)
            hideable += n[CAPACITY, m] * (alphas[1, j, m] > 0)
        wanted[0] = min(wanted[0], usable - min(wanted[1], hideable // 2))
    for m in range(modalities):
        n[ALLOWED, m] = n[CAPACITY, m] if alphas[0, j, m] > 0 else 0
    _draw_shares(gammas, 0, j, mix(base ^ keys[0, 1]), as_published, n, x)
    if as_published:
        _share_out_as_published(gammas, 0, j, mix(base ^ keys[0, 2]), wanted[0], INPUTS, n, x)
    else:
        _share_out(0, base, keys, 2, wanted[0], INPUTS, n, x)
    if not as_published:
        stuck = True
        for m in range(modalities):
            if n[CAPACITY, m] > 0 and alphas[1, j, m] > 0:
                stuck &= not (shape[KIND, m] == SEQUENCE or n[CAPACITY, m] > n[INPUTS, m])
        if stuck:
            for m in range(modalities):
                n[INPUTS, m] //= 1 + (alphas[1, j, m] > 0)
    for m in range(modalities):
        free = n[CAPACITY, m] - n[INPUTS, m]
        if shape[KIND, m] == SEQUENCE:
            free = n[CAPACITY, m] + (not as_published)
        n[ALLOWED, m] = free if n[PRESENT, m] and alphas[1, j, m] > 0 else 0
    _draw_shares(gammas, 1, j, mix(base ^ keys[1, 1]), as_published, n, x)
    if as_published:
        _share_out_as_published(gammas, 1, j, mix(base ^ keys[1, 2]), wanted[1], TARGETS, n, x)
    else:
        _share_out(1, base, keys, 2, wanted[1], TARGETS, n, x)
    for m in range(modalities):
        n[INPUTS, m] *= n[REAL, m]
        n[TARGETS, m] *= n[REAL, m]
    return j


@compiled
def hand_on(shape, gammas, keys, component, wanted, base, n, x):
    """Give the grids what the sequences left over: inputs first, both from positions that are still unused."""
    modalities = n.shape[1]
    for side in range(2):
        row = TARGETS if side else INPUTS
        left = wanted[side]
        for m in range(modalities):
            left -= n[row, m]
        if left <= 0:
            continue
        for m in range(modalities):
            free = n[CAPACITY, m] - n[INPUTS, m] - n[TARGETS, m]
            is_grid = shape[KIND, m] != SEQUENCE and gammas[0][side, component, m] > 0
            n[ALLOWED, m] = n[row, m] + free if is_grid else n[row, m]
        _share_out(side, base, keys, 3 + modalities, left, row, n, x)
