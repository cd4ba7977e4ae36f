"""From any modalities to any other: ROAR, MaskGIT and autoregression, with classifier-free guidance.

    model = load_model("runs/demo")
    depth = generate(model, {"rgb": tokens}, "depth")                       # one parallel step
    text = generate(model, {"rgb": tokens, "depth": depth}, "caption")      # token by token

Grids and vectors are int arrays (B, n) where -1 marks a token that is not known; sequences are lists of B
one-dimensional arrays without EOS, None where there is none; pixels are uint8 (B, S, S, 3). All choices are a
function of (seed, row key, target, step, position): the same call gives the same tokens, and a row does not depend
on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fourmill.errors import ConfigError
from fourmill.train.batches import Batch, Part, batch_of, lay_out
from fourmill.train.draws import Draws
from fourmill.train.model import Context, FourMill
from fourmill.train.patches import cut_patches
from fourmill.train.presets import EOS, FIRST_SENTINEL, NUM_SENTINELS, PATCH_SIZE, ModalitySpec
from fourmill.train.ranks import autocast
from fourmill.train.sampling import Schedule, check_sampling, draw, token_counts
from fourmill.train.spans import merge_spans

Scheme = Literal["roar", "maskgit", "autoregressive"]
Tokens = Any  # np.ndarray (B, n) | list[np.ndarray | None], see above
UNKNOWN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How one target is generated.

    ``scheme`` None: roar for grids and vectors, autoregressive for sequences. ``steps`` forward passes for roar and maskgit.
    ``temperature`` 0: the most probable token. ``guidance``: a scale s for l_u + s (l_c - l_u), where l_u is
    without the given inputs (1: no guidance), or weights by input for l_u + sum_i w_i (l_i - l_u).
    """

    target: str
    scheme: Scheme | None = None
    steps: int = 1
    schedule: Schedule = "cosine"
    temperature: float = 0.0
    cooling: Literal["constant", "linear"] = (
        "constant"  # linear: the temperature falls with what is left to do
    )
    top_k: float | None = None
    top_p: float | None = None
    guidance: float | Mapping[str, float] = 1.0


def generate(
    model: FourMill,
    inputs: Mapping[str, Tokens],
    target: str,
    scheme: Scheme | None = None,
    *,
    seed: int = 0,
    keys: np.ndarray | None = None,
    rows: int | None = None,
    **options: Any,
) -> Tokens:
    """The tokens of ``target``: int64 (B, n), or a list of arrays for a sequence.

    ``options`` are the other fields of `Step`. ``keys`` uint64 (B,) name the rows for the random choices (default: their
    numbers). ``rows`` is B where there are no inputs. Tokens of the target that ``inputs`` already has are kept.
    """
    done = generate_chain(
        model, inputs, [Step(target=target, scheme=scheme, **options)], seed=seed, keys=keys, rows=rows
    )
    return done[target]


@torch.inference_mode()
def generate_chain(
    model: FourMill,
    inputs: Mapping[str, Tokens],
    steps: Sequence[Step],
    *,
    seed: int = 0,
    keys: np.ndarray | None = None,
    rows: int | None = None,
) -> dict[str, Tokens]:
    """Several targets, one after the other, each an input of the next. Returns the targets by name."""
    known = {name: _checked(model.config.spec(name), value) for name, value in inputs.items()}
    count = _rows(known, rows)
    keys = np.arange(count, dtype=np.uint64) if keys is None else np.asarray(keys, np.uint64)
    draws = Draws(seed, keys, np.zeros(count, np.int64))
    model.eval()
    done = {}
    for step in steps:
        worker = _Worker(model, known, step, draws)
        known[step.target] = done[step.target] = worker.run()
    return done


@torch.inference_mode()
def probabilities(
    model: FourMill,
    inputs: Mapping[str, Tokens],
    target: str,
    *,
    guidance: float | Mapping[str, float] = 1.0,
) -> np.ndarray:
    """What the model believes of each token of a grid or vector after one parallel pass: float32 (B, n, V).

    The positions are each predicted by themselves, as in the first step of ROAR. Tokens of the target that ``inputs``
    already has get probability 1.
    """
    known = {name: _checked(model.config.spec(name), value) for name, value in inputs.items()}
    count = _rows(known, None)
    draws = Draws(0, np.arange(count, dtype=np.uint64), np.zeros(count, np.int64))
    model.eval()
    return _Worker(model, known, Step(target=target, guidance=guidance), draws).probabilities()


def _rows(known: Mapping[str, Tokens], rows: int | None) -> int:
    """B, which all inputs share. Raises ConfigError if they don't, or if there is no row."""
    sizes = {name: len(value) for name, value in known.items()}
    count = rows if rows is not None else max(sizes.values(), default=0)
    if count < 1 or any(size != count for size in sizes.values()):
        raise ConfigError(
            f"generate: inputs must have the same number of rows, at least one; got {sizes or 'no inputs'}"
        )
    return count


class _Worker:
    """Generates one target for B rows."""

    def __init__(self, model: FourMill, known: Mapping[str, Tokens], step: Step, draws: Draws) -> None:
        check_sampling(step.temperature, step.top_k, step.top_p)
        self.model, self.step, self.draws = model, step, draws
        self.spec = model.config.spec(step.target)
        self.index = model.config.index(step.target)
        self.device = model.mask_token.device
        if not self.spec.is_target:
            raise ConfigError(f"generate: the model was not trained to predict {step.target!r}")
        self.scheme = step.scheme or ("autoregressive" if self.spec.is_sequence else "roar")
        if self.spec.is_sequence != (self.scheme == "autoregressive"):
            raise ConfigError(
                f"generate: {step.target!r} is of kind {self.spec.kind!r}; scheme {self.scheme!r} can't make it"
            )
        self.own = known.get(step.target)
        self.conditions = {name: value for name, value in known.items() if name != step.target}
        self.branches = self._branches()

    def run(self) -> Tokens:
        return self._autoregressive() if self.spec.is_sequence else self._parallel()

    def _branches(self) -> list[tuple[float, frozenset[str]]]:
        """Weights that add up to 1, with the conditions that are left out of each forward pass."""
        guidance, names = self.step.guidance, frozenset(self.conditions)
        if isinstance(guidance, Mapping):
            unknown = set(guidance) - names
            if unknown:
                raise ConfigError(f"generate: guidance names {min(unknown)!r}, which is not among the inputs")
            guided = frozenset(guidance)
            branches = [(weight, guided - {name}) for name, weight in guidance.items()]
            return [(1.0 - sum(guidance.values()), guided), *branches]
        if guidance == 1.0 or not names:
            return [(1.0, frozenset())]
        return [(1.0 - guidance, names), (guidance, frozenset())]

    # -- grids and vectors ----------------------------------------------------------------------------

    def _parallel(self) -> np.ndarray:
        """ROAR asks for random places, MaskGIT for all that are left and keeps the most confident."""
        rows, width = len(self.draws), self.spec.num_tokens
        tokens = np.full((rows, width), UNKNOWN, np.int64) if self.own is None else self.own.copy()
        counts = self._counts((tokens == UNKNOWN).sum(1))
        rank = self.draws.permutations(f"{self.spec.name}/order", width)
        for number in range(counts.shape[1]):
            todo = counts[:, number]
            left = tokens == UNKNOWN
            asked = left if self.scheme == "maskgit" else _lowest(np.where(left, rank, width), todo) & left
            row, place = np.nonzero(asked)
            chance = self.draws.uniform(f"{self.spec.name}/{number}", width)[row, place]
            temperature = np.full(len(row), self.step.temperature)
            if self.step.cooling == "linear":
                temperature *= (left.sum(1) / np.maximum(1, counts.sum(1)))[row]
            found, confidence = draw(
                self._logits(tokens, asked), chance, temperature, self.step.top_k, self.step.top_p
            )
            if self.scheme == "maskgit":
                doubt = np.full(tokens.shape, np.inf)
                doubt[row, place] = -confidence.cpu().numpy()
                kept = _lowest(doubt, todo)[row, place]
                row, place, found = row[kept], place[kept], found[torch.from_numpy(kept).to(found.device)]
            tokens[row, place] = found.cpu().numpy()
        return tokens

    def probabilities(self) -> np.ndarray:
        """float32 (B, n, V), see the function of this name."""
        if self.spec.is_sequence:
            raise ConfigError(
                f"probabilities: {self.spec.name!r} is a sequence, whose tokens depend on each other"
            )
        rows, width = len(self.draws), self.spec.num_tokens
        tokens = np.full((rows, width), UNKNOWN, np.int64) if self.own is None else self.own
        asked = tokens == UNKNOWN
        out = np.zeros((rows, width, self.spec.vocab_size), np.float32)
        out[(*np.nonzero(~asked), tokens[~asked])] = 1.0
        if asked.any():
            out[asked] = self._logits(tokens, asked).softmax(dim=-1).cpu().numpy()
        return out

    def _counts(self, left: np.ndarray) -> np.ndarray:
        """int64 (B, steps): how many tokens each step makes in each row."""
        if self.step.steps < 1:
            raise ConfigError(
                f"generate: {self.step.steps} steps for {self.spec.name!r}; at least one is needed"
            )
        lists = [token_counts(self.step.schedule, int(count), self.step.steps) for count in left]
        out = np.zeros((len(left), max((len(counts) for counts in lists), default=0)), np.int64)
        for row, counts in enumerate(lists):
            out[row, : len(counts)] = counts
        return out

    def _logits(self, tokens: np.ndarray, asked: np.ndarray) -> Tensor:
        """Guided logits (sum of asked, V) of the asked places (B, n), row by row."""
        places, counts = _front(asked)
        target = Part(self.index, np.zeros_like(places), places, counts)
        own = [_visible(self.index, tokens)] if self.spec.is_input else []
        out: Tensor | float = 0.0
        for weight, dropped in self.branches:
            batch = self._batch([*self._inputs(dropped), *own], [target])
            with autocast("auto", self.device):
                states = self.model.decode(batch, self.model.encode(batch))
                logits = next(self.model.logits(batch, states))[1]
            out = out + weight * logits.float()
        assert isinstance(out, Tensor)
        return out

    # -- sequences ------------------------------------------------------------------------------------

    def _autoregressive(self) -> list[np.ndarray]:
        """Decode from [S_1] to EOS or the closing sentinel, then put the spans back into the visible text."""
        rows = len(self.draws)
        given = self.own if self.own is not None else [None] * rows
        prompts = [np.array([FIRST_SENTINEL]) if text is None else text for text in given]
        closing = np.array([FIRST_SENTINEL + _is_sentinel(prompt).sum() for prompt in prompts])
        contexts = self._contexts([_padded(self.index, prompts)] if self.spec.is_input else [])
        chances = self.draws.uniform(f"{self.spec.name}/text", self.spec.num_tokens + 1)
        written = np.full((rows, 1), FIRST_SENTINEL, np.int64)
        open_rows = closing > FIRST_SENTINEL  # a prompt without a sentinel leaves nothing to write
        for number in range(self.spec.num_tokens + 1):
            if not open_rows.any():
                break
            found = (
                draw(
                    self._next(written, contexts),
                    chances[:, number],
                    self.step.temperature,
                    self.step.top_k,
                    self.step.top_p,
                )[0]
                .cpu()
                .numpy()
            )
            found = np.where(open_rows, found, EOS)
            written = np.concatenate([written, found[:, None]], axis=1)
            open_rows &= (found != EOS) & (found != closing)
        return [merge_spans(prompt, text) for prompt, text in zip(prompts, written, strict=True)]

    def _contexts(self, own: list[Part]) -> list[tuple[float, Context]]:
        """The encoder's output for each branch, computed once."""
        contexts = []
        for weight, dropped in self.branches:
            with autocast("auto", self.device):
                contexts.append((weight, self.model.encode(self._batch([*self._inputs(dropped), *own], []))))
        return contexts

    def _next(self, written: np.ndarray, contexts: list[tuple[float, Context]]) -> Tensor:
        """Guided logits (B, V) of the token after ``written`` (B, t)."""
        rows, length = written.shape
        places = np.broadcast_to(np.arange(length), written.shape)
        part = Part(self.index, np.zeros_like(written), places, np.full(rows, length), written)
        batch = self._batch([], [part])
        last = torch.arange(1, rows + 1, device=self.device) * length - 1
        batch = replace(batch, label_order=last, counts=tuple(rows * (n > 0) for n in batch.counts))
        out: Tensor | float = 0.0
        for weight, context in contexts:
            with autocast("auto", self.device):
                states = self.model.decode(batch, context)
                out = out + weight * next(self.model.logits(batch, states))[1].float()
        assert isinstance(out, Tensor)
        return out

    # -- inputs ---------------------------------------------------------------------------------------

    def _inputs(self, dropped: frozenset[str]) -> list[Part]:
        """The conditions as parts. A dropped sequence is a lone [S_1], as a fully masked one is; others are empty."""
        parts = []
        for name, value in self.conditions.items():
            spec, index = self.model.config.spec(name), self.model.config.index(name)
            if not spec.is_input:
                raise ConfigError(f"generate: the model was not trained with {name!r} as an input")
            if spec.is_sequence and name in dropped:
                parts.append(_padded(index, [np.array([FIRST_SENTINEL])] * len(value)))
            elif spec.is_sequence:
                texts = [None if t is None else np.append(t, EOS)[: spec.num_tokens] for t in value]
                parts.append(_padded(index, texts))
            elif spec.kind == "pixels" and name not in dropped:
                places = np.broadcast_to(np.arange(spec.num_tokens), (len(value), spec.num_tokens))
                full = np.full(len(value), spec.num_tokens)
                parts.append(Part(index, np.zeros_like(places), places, full))
            elif name not in dropped:
                parts.append(_visible(index, value))
        return parts

    def _batch(self, inputs: list[Part], targets: list[Part]) -> Batch:
        rows, specs = len(self.draws), self.model.config.modalities
        shown, asked = lay_out(inputs, rows), lay_out(targets, rows)
        patches = [np.zeros((0, 3 * PATCH_SIZE**2), np.uint8)]
        slots = [np.zeros(0, np.int64)]
        for part in inputs:
            if specs[part.modality].kind == "pixels":
                patches += [cut_patches(image) for image in self.conditions[specs[part.modality].name]]
                slots.append(np.flatnonzero(shown.modality == part.modality))
        pixels = (np.concatenate(patches), np.concatenate(slots))
        return batch_of(shown, asked, len(specs), pixels).to(self.device)


def _checked(spec: ModalitySpec, value: Tokens) -> Tokens:
    """The value in its canonical form. Raises ConfigError for a wrong shape or a token outside the vocabulary."""
    where = f"generate: input {spec.name!r}"
    if spec.is_sequence:
        texts = [None if text is None else np.asarray(text, np.int64).reshape(-1) for text in value]
        if any(text is not None and ((text < 0) | (text >= spec.vocab_size)).any() for text in texts):
            raise ConfigError(f"{where}: a token lies outside the vocabulary of {spec.vocab_size}")
        return texts
    array = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    if spec.kind == "pixels":
        side = spec.side * PATCH_SIZE
        if array.shape[1:] != (side, side, 3) or array.dtype != np.uint8:
            raise ConfigError(
                f"{where}: expected uint8 (B, {side}, {side}, 3), got {array.dtype} {array.shape}"
            )
        return array
    if array.ndim != 2 or array.shape[1] != spec.num_tokens:
        raise ConfigError(f"{where}: expected tokens (B, {spec.num_tokens}), got {array.shape}")
    if array.size and (array.astype(np.int64).min() < UNKNOWN or array.max() >= spec.vocab_size):
        raise ConfigError(f"{where}: a token lies outside the vocabulary of {spec.vocab_size}")
    return array.astype(np.int64)


def _visible(index: int, tokens: np.ndarray) -> Part:
    """The known tokens of (B, n)."""
    places, counts = _front(tokens != UNKNOWN)
    return Part(index, np.take_along_axis(tokens, places, axis=1), places, counts)


def _front(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (B, n) with the chosen ones first and in order, and how many were chosen (B,)."""
    return np.argsort(~chosen, axis=1, kind="stable"), chosen.sum(1)


def _lowest(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool (B, n): the ``counts`` (B,) lowest values of each row; ties go to the earlier place."""
    rank = np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")
    return rank < counts[:, None]


def _padded(index: int, texts: Sequence[np.ndarray | None]) -> Part:
    lengths = np.array([0 if text is None else len(text) for text in texts])
    ids = np.zeros((len(texts), max(1, int(lengths.max()))), np.int64)
    for row, text in enumerate(texts):
        if text is not None:
            ids[row, : len(text)] = text
    return Part(index, ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), lengths)


def _is_sentinel(tokens: np.ndarray) -> np.ndarray:
    return (tokens >= FIRST_SENTINEL) & (tokens < FIRST_SENTINEL + NUM_SENTINELS)
