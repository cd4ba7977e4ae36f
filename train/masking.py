"""Which tokens of a sample are visible and which are to be predicted (4M, sections 3.1 to 3.4 of the notes).

A budget of input and target tokens is split over the modalities by a Dirichlet draw of a mixture component; grids
then show a random subset and predict another, sequences are masked by spans. Whole batches at once, no Python
per sample, and every number a function of (seed, key64, visit). Unlike 4M's own code:

- only modalities that are present in the sample get a budget, and only those that can be targets a target budget;
- an alpha of 0 means never, and what a modality cannot use goes to the others of the component, in proportion;
- sequences are masked first, so that what they leave over of their budget goes to the grids.

``masking: reference`` in a configuration turns all three off, and draws what 4M's own code draws. This is the plain
form of the rules; `fourmill.train.kernel` draws the same masks from the same numbers, faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fourmill.train.draws import Draws, LogGamma
from fourmill.train.presets import ModalitySpec
from fourmill.train.spans import KEEP_RANDOM, Spans, mask_spans
from fourmill.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class GridMask:
    """``order`` int64 (B, n): the first ``inputs`` (B,) positions of a row are visible, the next ``targets`` hidden."""

    order: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, slots=True)
class Masks:
    """What became of a batch: a mask by modality name, and the component that each row drew (B,)."""

    grids: dict[str, GridMask]
    spans: dict[str, Spans]
    component: np.ndarray


@dataclass(frozen=True, slots=True)
class Sequences:
    """Ragged sequences of a batch, padded: ``ids`` (B, L), of which ``lengths`` (B,) are real, EOS included."""

    ids: np.ndarray
    lengths: np.ndarray


class Masker:
    """Draws the masks of a batch. Built once per run."""

    def __init__(self, specs: Sequence[ModalitySpec], config: TrainConfig) -> None:
        self.specs = tuple(specs)
        self.config = config
        mixture = config.mixture
        alphas = np.zeros((2, len(mixture), len(specs)))
        for j, part in enumerate(mixture):
            alphas[0, j] = [part.input_alpha(s.name) if s.is_input else 0 for s in specs]
            alphas[1, j] = [part.target_alpha(s.name) if s.is_target else 0 for s in specs]
        # One more component, for samples that no component fits: whatever is there, evenly.
        fallback = np.array([[[s.is_input for s in specs]], [[s.is_target for s in specs]]], np.float64)
        self.alphas = np.concatenate([alphas, fallback], axis=1)  # (2, components + 1, modalities)
        self.weights = np.array([part.weight for part in mixture])
        self.gammas = LogGamma(self.alphas)
        self._is_sequence = np.array([s.is_sequence for s in specs])
        self._as_published = config.masking == "reference"

    def __call__(self, draws: Draws, present: np.ndarray, sequences: Mapping[str, Sequences]) -> Masks:
        """``present`` bool (B, modalities) in the order of the specs."""
        budgets = self._budgets_as_published if self._as_published else self._budgets
        component, inputs, targets, spans = budgets(draws, present, sequences)
        grids = {}
        for m, spec in enumerate(self.specs):
            if not spec.is_sequence:
                depth = int((inputs[:, m] + targets[:, m]).max(initial=0))
                order = draws.permutations(f"grid/{spec.name}", spec.num_tokens, depth)
                grids[spec.name] = GridMask(order, inputs[:, m], targets[:, m])
        return Masks(grids, spans, component)

    def _budgets(
        self, draws: Draws, present: np.ndarray, sequences: Mapping[str, Sequences]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Spans]]:
        """Components (B,), input and target slots (B, modalities), masked sequences."""
        capacity = np.array([s.num_tokens for s in self.specs]) * present
        for m, spec in enumerate(self.specs):
            if spec.is_sequence:
                capacity[:, m] = np.where(present[:, m], sequences[spec.name].lengths, 0)
        component = self._components(draws, present)
        wanted_in, wanted_tgt = self._totals(draws, component, capacity)
        shares = tuple(self._draw_shares(draws, side, component) for side in ("input", "target"))
        inputs = self._split(draws, "input", component, shares[0], wanted_in, capacity)
        room = self._target_room(component, capacity, inputs)
        targets = self._split(draws, "target", component, shares[1], wanted_tgt, np.where(present, room, 0))
        spans = self._sequences(draws, component, inputs, targets, sequences)
        if spans:
            self._hand_on(draws, component, shares, (wanted_in, wanted_tgt), (inputs, targets), capacity)
        return component, inputs, targets, spans

    def _budgets_as_published(
        self, draws: Draws, present: np.ndarray, sequences: Mapping[str, Sequences]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Spans]]:
        """The same as 4M's own code gives: every modality gets a budget, and what it cannot use is lost."""
        component, inputs, targets = self.published_budgets(draws)
        inputs, targets = inputs * present, targets * present
        spans = self._sequences(draws, component, inputs, targets, sequences)
        return component, inputs, targets, spans

    def published_budgets(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Components (B,), input and target budgets (B, modalities), whatever a sample has."""
        everything = np.ones((len(draws), len(self.specs)), bool)
        component = self._components(draws, everything)
        wanted_in, wanted_tgt = self._drawn_totals(draws)
        capacity = np.array([s.num_tokens for s in self.specs]) * everything
        shares = [self._draw_shares(draws, side, component) for side in ("input", "target")]
        inputs = self._split(draws, "input", component, shares[0], wanted_in, capacity)
        room = np.where(self._is_sequence, capacity, capacity - inputs)
        targets = self._split(draws, "target", component, shares[1], wanted_tgt, room)
        return component, inputs, targets

    def _components(self, draws: Draws, present: np.ndarray) -> np.ndarray:
        """int64 (B,): a component for each row, among those that have an input and a target in it."""
        usable = (
            ((self.alphas[:, None] > 0) & present[None, :, None, :]).any(-1).all(0)
        )  # (B, components + 1)
        weights = usable[:, :-1] * self.weights
        cumulative = np.cumsum(weights, axis=1)
        point = draws.uniform("component", 1) * cumulative[:, -1:]
        chosen = (point >= cumulative).sum(axis=1)
        return np.where(cumulative[:, -1] > 0, chosen, len(self.weights))

    def _totals(
        self, draws: Draws, component: np.ndarray, capacity: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Input and target budgets (B,) of the rows, uniform between their bounds.

        A sample with few tokens would be shown whole, with nothing left to predict: half of what can be a target
        (or the target budget, if that is less) is kept out of the input.
        """
        totals = self._drawn_totals(draws)
        allowed = self.alphas[:, component] > 0
        available = (capacity * allowed.any(0)).sum(1)
        reserve = np.minimum(totals[1], (capacity * allowed[1]).sum(1) // 2)
        return np.minimum(totals[0], available - reserve), totals[1]

    def _drawn_totals(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        first, second = (
            low + draws.integers(f"total/{side}", high - low + 1)
            for side, (low, high) in enumerate(self.config.token_bounds)
        )
        return first, second

    def _target_room(self, component: np.ndarray, capacity: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """How many targets each modality has room for. Where all is visible, half is hidden again (in ``inputs``)."""
        allowed = self.alphas[1][component] > 0
        stuck = ~(allowed & (self._is_sequence | (capacity > inputs))).any(1, where=capacity > 0)
        inputs[stuck] = np.where(allowed[stuck], inputs[stuck] // 2, inputs[stuck])
        return np.where(self._is_sequence, capacity + 1, capacity - inputs)

    def _draw_shares(self, draws: Draws, side: str, component: np.ndarray) -> np.ndarray:
        """float64 (B, modalities): logarithms of a Dirichlet draw, up to a constant for each row."""
        index = self._alpha_index(side, component)
        return self.gammas.sample(index, draws.words(f"{side}/dirichlet", len(self.specs)))

    def _split(
        self,
        draws: Draws,
        side: str,
        component: np.ndarray,
        log_share: np.ndarray,
        total: np.ndarray,
        capacity: np.ndarray,
    ) -> np.ndarray:
        """int64 (B, modalities): ``total`` tokens by the drawn shares, none beyond ``capacity``."""
        alphas = self.alphas[0 if side == "input" else 1]
        room = np.where(alphas[component] > 0, capacity, 0)
        return self._share_out(draws, side, component, log_share, total, room, np.zeros_like(capacity))

    def _alpha_index(self, side: str, component: np.ndarray) -> np.ndarray:
        """Indices (B, modalities) into the flattened alphas."""
        components, modalities = self.alphas.shape[1:]
        first = (0 if side == "input" else components) + component
        return first[:, None] * modalities + np.arange(modalities)

    def _share_out(
        self,
        draws: Draws,
        side: str,
        component: np.ndarray,
        log_share: np.ndarray,
        total: np.ndarray,
        capacity: np.ndarray,
        budget: np.ndarray,
    ) -> np.ndarray:
        """Add ``total`` tokens to ``budget`` in proportion to exp(log_share), never above ``capacity``.

        Rounded up or down by one random number for all (systematic sampling), so that expectations are exact and the sum
        is too. What was clamped is shared out again among the modalities that have room, until there is none. 4M's
        own code rounds down, gives each token that is left to the largest entry of a fresh Dirichlet draw, and loses what
        is clamped, be it all of it.
        """
        left = total.astype(np.int64)
        for turn in range(1 if self._as_published else len(self.specs) + 1):
            room = capacity - budget
            active = np.flatnonzero((left > 0) & (room > 0).any(1))
            if not active.size:
                break
            room, rest = room[active], left[active]
            drawn = np.isfinite(log_share[active]) if self._as_published else room > 0
            whole = _softmax(np.where(drawn, log_share[active], -np.inf)) * rest[:, None]
            here, purpose = draws.rows(active), f"{side}/left/{turn}"
            if self._as_published:
                share = np.floor(whole).astype(np.int64)
                share += self._remainder(here, purpose, component[active], drawn, rest - share.sum(1))
            else:
                reached = np.minimum(whole.cumsum(axis=1), rest[:, None]) + here.uniform(purpose, 1)
                share = np.diff(np.floor(reached).astype(np.int64), axis=1, prepend=0)
            share = np.minimum(share, room)
            budget[active] += share
            left[active] -= share.sum(1)
        return budget

    def _remainder(
        self, draws: Draws, purpose: str, component: np.ndarray, allowed: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """int64 (B, modalities): ``count`` (B,) single tokens, each to the argmax of its own Dirichlet draw."""
        most = int(count.max(initial=0))
        out = np.zeros(allowed.shape, np.int64)
        if most == 0:
            return out
        width = len(self.specs)
        row, token = np.nonzero(np.arange(most) < count[:, None])
        words = draws.words(purpose, most * width).reshape(len(draws), most, width)[row, token]
        index = self._alpha_index(purpose.partition("/")[0], component)[row]
        value = np.where(allowed[row], self.gammas.sample(index, words), -np.inf)
        np.add.at(out, (row, value.argmax(1)), 1)
        return out

    def _sequences(
        self,
        draws: Draws,
        component: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        sequences: Mapping[str, Sequences],
    ) -> dict[str, Spans]:
        """Mask the sequences, and put what they really use into ``inputs`` and ``targets``."""
        out = {}
        for m, spec in enumerate(self.specs):
            if not spec.is_sequence:
                continue
            keep = keep_schemes(spec, self.config)
            batch = sequences[spec.name]
            spans = mask_spans(
                draws,
                spec.name,
                batch.ids,
                batch.lengths,
                inputs[:, m],
                targets[:, m],
                np.array(keep)[component],
                spec.chunk,
                spec.num_tokens,
            )
            if not spec.is_input:
                assert not spans.input_lengths.any()
            inputs[:, m], targets[:, m] = spans.input_lengths, np.maximum(spans.target_lengths - 1, 0)
            out[spec.name] = spans
        return out

    def _hand_on(
        self,
        draws: Draws,
        component: np.ndarray,
        shares: Sequence[np.ndarray],
        wanted: tuple[np.ndarray, np.ndarray],
        used: tuple[np.ndarray, np.ndarray],
        capacity: np.ndarray,
    ) -> None:
        """Give the grids what the sequences left over: inputs first, both from positions that are still unused."""
        inputs, targets = used
        for side, name in enumerate(("input", "target")):
            allowed = (self.alphas[side][component] > 0) & ~self._is_sequence
            free = np.where(allowed, capacity - inputs - targets, 0)
            left = np.maximum(wanted[side] - used[side].sum(1), 0)
            self._share_out(
                draws, f"{name}/handed-on", component, shares[side], left, used[side] + free, used[side]
            )


def keep_schemes(spec: ModalitySpec, config: TrainConfig) -> list[int]:
    """KEEP_* by component of the mixture; the last is that of the fallback."""
    schemes = ("random", "all", "binary")
    return [schemes.index(part.keep_scheme(spec.name)) for part in config.mixture] + [KEEP_RANDOM]


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise; rows must have a finite entry."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.cumsum(axis=1)[:, -1:]  # one after the other, as the kernel adds them
