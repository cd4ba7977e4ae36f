"""Span masking of sequences (T5; section 3.4 of the 4M notes), for a whole batch, and its inverse.

Dropped runs of tokens become sentinels [S_1], [S_2], ... in the input; the target is [S_1] run [S_2] run ... and a
closing sentinel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fourmill.train.draws import Draws, below
from fourmill.train.presets import EOS, FIRST_SENTINEL, NUM_SENTINELS

SHRINK = 0.9  # of keep_prob, while the input is longer than its budget
TRIES = 200  # keep_prob is then below 1e-9, and everything is dropped
KEEP_RANDOM, KEEP_ALL, KEEP_BINARY = range(3)


@dataclass(frozen=True, slots=True)
class Spans:
    """Masked sequences of a batch, padded with 0.

    ``inputs`` int64 (B, I) and ``targets`` int64 (B, T), of which ``input_lengths`` and ``target_lengths`` (B,) tokens
    are real. A target of k tokens fills k - 1 decoder slots (one or none: nothing to predict, length 0).
    """

    inputs: np.ndarray
    input_lengths: np.ndarray
    targets: np.ndarray
    target_lengths: np.ndarray


def span_layout(ids: np.ndarray, lengths: np.ndarray, dropped: np.ndarray) -> Spans:
    """The spans for given choices: ``ids`` (B, L), ``lengths`` (B,), ``dropped`` bool (B, L)."""
    rows, width = ids.shape
    real = np.arange(width) < lengths[:, None]
    dropped = dropped & real
    starts = dropped.copy()
    starts[:, 1:] &= ~dropped[:, :-1]
    run = np.cumsum(starts, axis=1)  # number of the run that a dropped token is in, from 1
    runs = run[:, -1] if width else np.zeros(rows, np.int64)

    shown = real & (~dropped | starts)
    inputs = _compress(np.where(dropped, FIRST_SENTINEL - 1 + run, ids), shown)
    target_lengths = dropped.sum(1) + runs + 1
    targets = np.zeros((rows, int(target_lengths.max(initial=1))), np.int64)
    place = np.cumsum(dropped, axis=1) + run - 1  # of a dropped token in the target
    row, column = np.nonzero(dropped)
    targets[row, place[row, column]] = ids[row, column]
    row, column = np.nonzero(starts)
    targets[row, place[row, column] - 1] = FIRST_SENTINEL - 1 + run[row, column]
    targets[np.arange(rows), target_lengths - 1] = FIRST_SENTINEL + runs
    return Spans(inputs, shown.sum(1), targets, target_lengths)


def _compress(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The chosen entries of each row, moved to its front; 0 behind them."""
    out = np.zeros((len(values), int(chosen.sum(1).max(initial=0))), np.int64)
    row, column = np.nonzero(chosen)
    out[row, (np.cumsum(chosen, axis=1) - 1)[row, column]] = values[row, column]
    return out


def mask_spans(
    draws: Draws,
    name: str,
    ids: np.ndarray,
    lengths: np.ndarray,
    input_budget: np.ndarray,
    target_budget: np.ndarray,
    scheme: np.ndarray,
    chunk: int = 1,
    most: int | None = None,
) -> Spans:
    """Mask a batch of sequences of at most ``most`` (None: L) tokens within its budgets, ``chunk`` tokens as one.

    ``ids`` (B, L) with EOS among the ``lengths`` (B,) real tokens. ``input_budget`` (B,) bounds the input's tokens,
    ``target_budget`` (B,) the decoder slots, one less than the target's tokens. ``scheme`` (B,) is one of KEEP_*.
    Where the input budget is 0 nothing is visible and everything is target.
    """
    dropped = _choose(draws, name, lengths, ids.shape[1], input_budget, scheme, chunk, most or ids.shape[1])
    spans = span_layout(ids, lengths, dropped)
    spans.input_lengths[input_budget == 0] = 0
    chosen = draws.uniform(f"span/{name}/cut", 1)[:, 0]
    targets, target_lengths = cut_targets(spans.targets, spans.target_lengths, target_budget + 1, chosen)
    target_lengths = np.where((target_budget > 0) & (lengths > 0) & (target_lengths > 1), target_lengths, 0)
    return Spans(spans.inputs, spans.input_lengths, targets, target_lengths)


def _choose(
    draws: Draws,
    name: str,
    lengths: np.ndarray,
    width: int,
    budget: np.ndarray,
    scheme: np.ndarray,
    chunk: int,
    most: int,
) -> np.ndarray:
    """bool (B, L): which tokens are dropped. Redrawn with a smaller keep_prob while the input is too long."""
    first = draws.uniform(f"span/{name}/keep", 1)[:, 0]
    keep = np.select([scheme == KEEP_ALL, scheme == KEEP_BINARY], [1.0, (first < 0.5) * 1.0], first)
    dropped = np.ones((len(lengths), width), bool)
    chunk_of = np.arange(width) // chunk
    todo = np.flatnonzero((budget > 0) & (lengths > 0))
    for number in range(TRIES):
        if not todo.size:
            break
        limit = np.ceil(keep[todo, None] * 2.0**32).astype(np.uint64)
        # Tries are ``most`` numbers apart: a row's must not depend on the longest sequence of the batch.
        halves = draws.rows(todo).halves(f"span/{name}/tries", width, number * ((most + 1) // 2))
        found = halves[:, chunk_of] >= limit
        dropped[todo] = found
        keep[todo] *= SHRINK
        todo = todo[_input_lengths(found, lengths[todo]) > budget[todo]]
    dropped[todo] = True
    return dropped


def shuffle_chunks(draws: Draws, name: str, ids: np.ndarray, lengths: np.ndarray, chunk: int) -> None:
    """Put the whole chunks of each row's ``lengths`` (B,) first tokens into a random order, in place."""
    rows, places = np.arange(len(ids)), np.arange(chunk)
    chunks = lengths // chunk
    most = int(chunks.max(initial=0))
    halves = draws.halves(f"shuffle/{name}", most)
    for number in range(most):
        here = rows[chunks > number]
        other = number + below(halves[here, number], chunks[here] - number)
        one, two = number * chunk + places, other[:, None] * chunk + places
        chosen = ids[here[:, None], two]
        ids[here[:, None], two] = ids[here[:, None], one]
        ids[here[:, None], one] = chosen


def _input_lengths(dropped: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens of the input (B,), of dropped (B, L): those kept and one sentinel for each run of dropped ones."""
    shown = ~dropped
    shown[:, 0] = True
    shown[:, 1:] |= ~dropped[:, :-1]
    return (shown & (np.arange(dropped.shape[1]) < lengths[:, None])).sum(-1)


def cut_targets(
    targets: np.ndarray, lengths: np.ndarray, limit: np.ndarray, uniforms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the targets that are longer than ``limit`` (B,) tokens, beginning at a sentinel.

    A sentinel is chosen at random (``uniforms`` in (0, 1), never the closing one). If more than ``limit`` tokens follow
    from it, the first ``limit`` of them are the target; otherwise the tail from the earliest sentinel whose tail fits.
    Returns targets (B, T) and lengths (B,).
    """
    targets, lengths = targets.copy(), lengths.copy()
    long = np.flatnonzero(lengths > limit)
    if not long.size:
        return targets, lengths
    part, size, most = targets[long], lengths[long], limit[long]
    columns = np.arange(part.shape[1])
    real = columns < size[:, None]
    is_sentinel = (part >= FIRST_SENTINEL) & (part < FIRST_SENTINEL + NUM_SENTINELS) & real
    spans = is_sentinel.sum(1) - 1  # without the closing one
    wanted = np.floor(uniforms[long] * spans).astype(np.int64)
    rank = np.cumsum(is_sentinel, axis=1) - 1
    start = (is_sentinel & (rank == wanted[:, None])).argmax(1)
    fits = is_sentinel & (size[:, None] - columns <= most[:, None])
    start = np.where(size - start > most, start, fits.argmax(1))
    kept = np.minimum(size - start, most)
    source = np.minimum(start[:, None] + columns, part.shape[1] - 1)
    targets[long] = np.where(columns < kept[:, None], np.take_along_axis(part, source, axis=1), 0)
    lengths[long] = kept
    return targets, lengths


def merge_spans(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Put the spans of one target (T,) back into the visible tokens (I,), up to and without EOS.

    A span ends at the next sentinel; a sentinel that comes back later does not re-open the text. Sentinels without
    a span, and spans without a place, are left out.
    """
    spans: dict[int, list[int]] = {}
    current: list[int] | None = None
    for token in (int(t) for t in targets):
        if FIRST_SENTINEL <= token < FIRST_SENTINEL + NUM_SENTINELS:
            current = None if token in spans else spans.setdefault(token, [])
        elif current is not None:
            current.append(token)
    merged: list[int] = []
    for token in (int(t) for t in inputs):
        merged += (
            spans.get(token, []) if FIRST_SENTINEL <= token < FIRST_SENTINEL + NUM_SENTINELS else [token]
        )
    if EOS in merged:
        merged = merged[: merged.index(EOS)]
    return np.array(merged, np.int64)
