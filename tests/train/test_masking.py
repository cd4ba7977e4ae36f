"""Budgets, grid masks and span masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.train.draws import Draws
from fourmill.train.masking import Masker, Masks, Sequences
from fourmill.train.presets import EOS, FIRST_SENTINEL, ModalitySpec
from fourmill.train.spans import (
    KEEP_ALL,
    KEEP_BINARY,
    KEEP_RANDOM,
    cut_targets,
    mask_spans,
    merge_spans,
    span_layout,
)
from fourmill.train_config import MixtureComponent, TrainConfig

GRIDS = ("clip", "depth", "rgb")
SPECS = (
    ModalitySpec("caption", "sequence", 300, 32, True, True),
    *(ModalitySpec(name, "grid", 16, 16, True, True) for name in GRIDS),
    ModalitySpec("rgb_pixels", "pixels", 0, 16, True, False),
)
ROWS = 200


def _draws(rows: int = ROWS, seed: int = 0, visit: int = 0) -> Draws:
    return Draws(seed, np.arange(rows, dtype=np.uint64) + np.uint64(10**12), np.full(rows, visit))


def _captions(rows: int = ROWS, present: np.ndarray | None = None) -> dict[str, Sequences]:
    lengths = np.arange(rows) % 25 + 1
    if present is not None:
        lengths = np.where(present, lengths, 0)
    ids = 204 + np.arange(rows)[:, None] % 7 + np.arange(25)[None, :]
    ids[np.arange(rows), np.maximum(lengths - 1, 0)] = EOS
    return {"caption": Sequences(ids, lengths)}


def _mask(config: TrainConfig, present: np.ndarray | None = None, **draws: int) -> Masks:
    present = np.ones((ROWS, len(SPECS)), bool) if present is None else present
    return Masker(SPECS, config)(_draws(**draws), present, _captions(present=present[:, 0]))


def _used(masks: Masks) -> tuple[np.ndarray, np.ndarray]:
    """Input and target slots (B, modalities)."""
    inputs = [
        masks.spans[s.name].input_lengths if s.is_sequence else masks.grids[s.name].inputs for s in SPECS
    ]
    targets = [
        np.maximum(masks.spans[s.name].target_lengths - 1, 0)
        if s.is_sequence
        else masks.grids[s.name].targets
        for s in SPECS
    ]
    return np.stack(inputs, 1), np.stack(targets, 1)


EVERYTHING = (MixtureComponent(default_alpha=0.5),)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 10.0])
def test_budgets_are_filled_exactly_where_there_is_enough(alpha: float) -> None:
    """4M's own code loses what it clamps; here the other modalities get it."""
    config = TrainConfig(
        num_input_tokens=20, num_target_tokens=24, mixture=(MixtureComponent(default_alpha=alpha),)
    )
    inputs, targets = _used(_mask(config))
    assert (inputs.sum(1) == 20).all()
    assert (targets.sum(1) == 24).all()


def test_budgets_between_bounds_are_uniform() -> None:
    config = TrainConfig(
        num_input_tokens=12, min_input_tokens=3, num_target_tokens=9, min_target_tokens=7, mixture=EVERYTHING
    )
    inputs, targets = _used(_mask(config))
    assert set(inputs.sum(1)) == set(range(3, 13))
    assert set(targets.sum(1)) == {7, 8, 9}


def test_visible_and_hidden_positions_are_disjoint_and_inside_the_grid() -> None:
    masks = _mask(TrainConfig(num_input_tokens=30, num_target_tokens=30, mixture=EVERYTHING))
    for mask in masks.grids.values():
        assert (np.sort(mask.order, axis=1) == np.arange(16)).all()  # so no position can be both
        assert (mask.inputs >= 0).all() and (mask.targets >= 0).all()
        assert (mask.inputs + mask.targets <= 16).all()


def test_absent_modalities_and_pixels_get_no_budget_they_cannot_use() -> None:
    present = np.random.default_rng(0).random((ROWS, len(SPECS))) < 0.5
    present[:, 2] = True
    inputs, targets = _used(
        _mask(TrainConfig(num_input_tokens=20, num_target_tokens=20, mixture=EVERYTHING), present)
    )
    assert not inputs[~present].any()
    assert not targets[~present].any()
    assert not targets[:, 4].any()  # pixels are never a target
    assert inputs[present].any() and (targets.sum(1) > 0).all()


def test_a_sample_with_little_in_it_keeps_something_to_predict() -> None:
    present = np.zeros((ROWS, len(SPECS)), bool)
    present[:, 1:3] = True  # two grids of 16, and budgets of 64
    inputs, targets = _used(
        _mask(TrainConfig(num_input_tokens=64, num_target_tokens=64, mixture=EVERYTHING), present)
    )
    assert (inputs.sum(1) == 16).all()
    assert (targets.sum(1) == 16).all()


def test_rgb_to_all_shows_rgb_alone() -> None:
    part = MixtureComponent(input_alphas={"rgb": 1000.0}, default_input_alpha=0.0, default_alpha=0.5)
    inputs, targets = _used(_mask(TrainConfig(num_input_tokens=12, num_target_tokens=30, mixture=(part,))))
    assert (inputs[:, 3] == 12).all()
    assert inputs.sum() == 12 * ROWS
    assert (targets.sum(1) == 30).all()


def test_a_component_is_drawn_only_for_samples_that_it_fits() -> None:
    rgb_only = MixtureComponent(weight=5, input_alphas={"rgb": 1.0}, default_input_alpha=0.0)
    present = np.ones((ROWS, len(SPECS)), bool)
    present[::2, 3] = False
    masks = _mask(TrainConfig(mixture=(rgb_only, *EVERYTHING)), present)
    assert (masks.component[::2] == 1).all()
    assert 0.7 < (masks.component[1::2] == 0).mean() < 0.95  # five in six
    lone = _mask(TrainConfig(num_input_tokens=8, num_target_tokens=8, mixture=(rgb_only,)), present)
    assert (lone.component[::2] == 1).all()  # the fallback: whatever is there
    assert (_used(lone)[0].sum(1) == 8).all()


def test_mean_budgets_are_those_of_the_dirichlet() -> None:
    """Alphas 3, 1, 1: the first gets three fifths of a budget that nothing clamps; and the variance is right too."""
    specs = [ModalitySpec(name, "grid", 16, 1024, True, True) for name in GRIDS]
    part = MixtureComponent(input_alphas={"clip": 3.0}, default_alpha=1.0)
    masker = Masker(specs, TrainConfig(num_input_tokens=1000, num_target_tokens=4, mixture=(part,)))
    masks = masker(_draws(4000), np.ones((4000, 3), bool), {})
    shares = np.stack([masks.grids[name].inputs for name in GRIDS], 1) / 1000
    assert np.abs(shares.mean(0) - [0.6, 0.2, 0.2]).max() < 0.015
    assert np.abs(shares.var(0) - [0.6 * 0.4 / 6, 0.2 * 0.8 / 6, 0.2 * 0.8 / 6]).max() < 0.005


def test_masks_are_a_function_of_seed_key_and_visit_alone() -> None:
    config = TrainConfig(num_input_tokens=20, num_target_tokens=24, mixture=EVERYTHING)
    whole, again = _mask(config), _mask(config)
    few = np.array([3, 17, 101])
    captions = _captions()["caption"]
    shorter = Sequences(captions.ids[few, : captions.lengths[few].max()], captions.lengths[few])
    part = Masker(SPECS, config)(_draws().rows(few), np.ones((3, len(SPECS)), bool), {"caption": shorter})
    for name in (*GRIDS, "rgb_pixels"):
        assert np.array_equal(whole.grids[name].order, again.grids[name].order)
        used = part.grids[name].inputs + part.grids[name].targets
        same = whole.grids[name].order[few] == part.grids[name].order
        assert same[np.arange(16) < used[:, None]].all()  # what lies behind is of no use
        assert np.array_equal(whole.grids[name].inputs[few], part.grids[name].inputs)
        assert np.array_equal(whole.grids[name].targets[few], part.grids[name].targets)
    length = part.spans["caption"].targets.shape[1]
    assert np.array_equal(whole.spans["caption"].targets[few, :length], part.spans["caption"].targets)
    for other in (_mask(config, seed=1), _mask(config, visit=1)):
        assert not np.array_equal(whole.grids["rgb"].order, other.grids["rgb"].order)
        assert not np.array_equal(_used(whole)[0], _used(other)[0])


# -- spans ----------------------------------------------------------------------------------------------


def test_layout_of_a_known_example() -> None:
    ids = np.array([[301, 302, 303, 304, 305, EOS]])
    dropped = np.array([[True, True, False, True, False, False]])
    spans = span_layout(ids, np.array([6]), dropped)
    one, two, three = FIRST_SENTINEL, FIRST_SENTINEL + 1, FIRST_SENTINEL + 2
    assert spans.inputs.tolist() == [[one, 303, two, 305, EOS]]
    assert spans.targets.tolist() == [[one, 301, 302, two, 304, three]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_spans_merge_back_to_the_text(data: Any) -> None:
    texts = data.draw(st.lists(st.lists(st.integers(204, 400), max_size=12), min_size=1, max_size=4))
    width = max(len(text) for text in texts) + 1
    ids = np.zeros((len(texts), width), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text) + 1] = [*text, EOS]
    lengths = np.array([len(text) + 1 for text in texts])
    flips = data.draw(st.lists(st.booleans(), min_size=ids.size, max_size=ids.size))
    spans = span_layout(ids, lengths, np.array(flips).reshape(ids.shape))
    for row, text in enumerate(texts):
        shown = spans.inputs[row, : spans.input_lengths[row]]
        hidden = spans.targets[row, : spans.target_lengths[row]]
        assert merge_spans(shown, hidden).tolist() == text
        is_sentinel = (hidden >= FIRST_SENTINEL) & (hidden < 204)
        assert hidden[is_sentinel].tolist() == list(range(FIRST_SENTINEL, FIRST_SENTINEL + is_sentinel.sum()))
        assert is_sentinel[0] and is_sentinel[-1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from([KEEP_RANDOM, KEEP_ALL, KEEP_BINARY]),
    st.integers(0, 99),
)
def test_spans_respect_their_budgets(inputs: int, targets: int, scheme: int, seed: int) -> None:
    captions = _captions(25)["caption"]
    rows = len(captions.lengths)
    spans = mask_spans(
        _draws(rows, seed), "caption", captions.ids, captions.lengths,
        np.full(rows, inputs), np.full(rows, targets), np.full(rows, scheme),
    )  # fmt: skip
    assert (spans.input_lengths <= inputs).all()
    assert (np.maximum(spans.target_lengths - 1, 0) <= targets).all()
    if inputs == 0 and targets > 27:  # nothing is visible and everything is target: [S_1] text EOS [S_2]
        assert (spans.target_lengths == captions.lengths + 2).all()
    if scheme == KEEP_ALL and inputs >= 25:
        assert (spans.input_lengths == captions.lengths).all()
        assert not spans.target_lengths.any()


def test_keep_probability_is_uniform() -> None:
    """With no budget in the way, the share of kept tokens is spread evenly over [0, 1]."""
    ids, lengths = np.full((3000, 60), 300), np.full(3000, 60)
    budget, scheme = np.full(3000, 60), np.zeros(3000, np.int64)
    spans = mask_spans(_draws(3000), "long", ids, lengths, budget, budget * 2, scheme)
    kept = (spans.inputs == 300).sum(1) / 60
    assert abs(kept.mean() - 0.5) < 0.02
    assert abs(kept.std() - np.sqrt(1 / 12)) < 0.02


def test_cutting_targets_begins_at_a_sentinel() -> None:
    one, two, three = FIRST_SENTINEL, FIRST_SENTINEL + 1, FIRST_SENTINEL + 2
    target = np.array([[one, 301, 302, 303, two, 304, three]])

    def cut(limit: int, chosen: float) -> list[int]:
        out, lengths = cut_targets(target, np.array([7]), np.array([limit]), np.array([chosen]))
        return out[0, : lengths[0]].tolist()

    assert cut(7, 0.1) == target[0].tolist()  # fits
    assert cut(3, 0.1) == [one, 301, 302]  # from the first sentinel, more than 3 follow
    assert cut(2, 0.9) == [two, 304]  # from the second
    assert cut(3, 0.9) == [two, 304, three]  # the tail fits exactly
    assert cut(5, 0.9) == [two, 304, three]  # the earliest sentinel from which the tail fits
    assert cut(0, 0.9) == []


def test_merging_ignores_a_sentinel_that_comes_back_and_stops_at_eos() -> None:
    one, two = FIRST_SENTINEL, FIRST_SENTINEL + 1
    assert merge_spans(np.array([one]), np.array([one, 301, two, 302, one, 303])).tolist() == [301]
    assert merge_spans(np.array([one]), np.array([one, 301, EOS, 302])).tolist() == [301]
    assert merge_spans(np.array([300, one, 305]), np.array([one, 301])).tolist() == [300, 301, 305]
