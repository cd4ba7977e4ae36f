"""What is in a batch: the tokens of the snapshot, at their places."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fourmill.errors import ConfigError, DatasetError
from fourmill.modality import LabelContract, Modality
from fourmill.train.batches import Batch, BatchMaker
from fourmill.train.order import Refs
from fourmill.train.presets import EOS, ModelConfig, model_config
from fourmill.train.reading import Shards
from fourmill.train.spans import merge_spans
from fourmill.train_config import MixtureComponent, TrainConfig

SnapshotOf = Callable[..., Any]
CONFIG = TrainConfig(
    num_input_tokens=24, num_target_tokens=30, mixture=(MixtureComponent(default_alpha=1.0),)
)


def _maker(snapshot: Any, config: TrainConfig = CONFIG, compiled: bool | None = None) -> BatchMaker:
    model = model_config(config, snapshot.modalities, snapshot.image_size)
    return BatchMaker(Shards([snapshot], model.modalities), model, config, compiled)


def _all(maker: BatchMaker, rows: int | None = None) -> Batch:
    return maker(maker.shards.refs(np.arange(rows or len(maker.shards))))


def _where(maker: BatchMaker, row: int) -> tuple[int, int]:
    """Shard and row of a sample."""
    refs = maker.shards.refs(np.array([row]))
    maker.shards.open(refs.shard)
    return int(refs.shard[0]), int(maker.shards.look_up(refs)[0][0])


def _row(lengths: torch.Tensor, row: int) -> slice:
    ends = lengths.cumsum(0).tolist()
    return slice(ends[row] - int(lengths[row]), ends[row])


def _slots(batch: Batch, row: int, modality: int) -> tuple[np.ndarray, ...]:
    """Positions and ids of the inputs, then positions, labels and previous ids of the targets, of a modality in a row."""
    shown, hidden = _row(batch.input_lengths, row), _row(batch.target_lengths, row)
    is_in = batch.input_modality[shown].numpy() == modality
    is_out = batch.target_modality[hidden].numpy() == modality
    return (
        batch.input_positions[shown].numpy()[is_in],
        batch.input_ids[shown].numpy()[is_in],
        batch.target_positions[hidden].numpy()[is_out],
        batch.labels[hidden].numpy()[is_out],
        batch.previous[hidden].numpy()[is_out],
    )


def _same(one: Batch, two: Batch) -> bool:
    tensors = [name for name, value in vars_of(one).items() if isinstance(value, torch.Tensor)]
    numbers = [(b.counts, b.input_width, b.target_width) for b in (one, two)]
    return numbers[0] == numbers[1] and all(
        np.array_equal(getattr(one, name).numpy(), getattr(two, name).numpy())
        and getattr(one, name).dtype == getattr(two, name).dtype
        for name in tensors
    )


def vars_of(batch: Batch) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("n_crops", [1, 3])
def test_grid_tokens_stand_at_their_positions(snapshot_of: SnapshotOf, n_crops: int, compiled: bool) -> None:
    snapshot = snapshot_of(n_crops=n_crops, absent=0.2)
    maker = _maker(snapshot, compiled=compiled)
    batch = _all(maker)
    crops_seen = set()
    for name in ("rgb", "depth", "clip_global"):
        m = maker.model.index(name)
        for row in range(len(batch)):
            shard, place = _where(maker, row)
            column = snapshot.column(shard, name)
            seen, ids, wanted, labels, _ = _slots(batch, row, m)
            assert not set(seen) & set(wanted)
            if not column.present[place]:
                assert not len(seen) and not len(wanted)
                continue
            fitting = [
                crop
                for crop in range(n_crops)
                if np.array_equal(column.tokens[place, crop][seen], ids)
                and np.array_equal(column.tokens[place, crop][wanted], labels)
            ]
            assert fitting, f"{name} of row {row} is of no crop"
            if len(fitting) == 1:
                crops_seen.add(fitting[0])
    assert crops_seen == set(range(n_crops))


@pytest.mark.parametrize("compiled", [True, False])
def test_sequences_are_teacher_forced_and_merge_back(snapshot_of: SnapshotOf, compiled: bool) -> None:
    snapshot = snapshot_of()
    maker = _maker(snapshot, compiled=compiled)
    m = maker.model.index("caption")
    batch = _all(maker)
    whole = 0
    for row in range(len(batch)):
        _, shown, positions, labels, previous = _slots(batch, row, m)
        if not len(labels):
            continue
        assert np.array_equal(previous[1:], labels[:-1])  # each slot reads what the one before predicts
        assert np.array_equal(positions, np.arange(len(labels)))
        target = np.append(previous[:1], labels)
        if target[0] == 5 and (not len(shown) or set(shown[(shown > 4) & (shown < 204)]) <= set(target)):
            shard, place = _where(maker, row)
            text = snapshot.column(shard, "caption").cells(place)
            prompt = shown if len(shown) else np.array([5])
            whole += np.array_equal(merge_spans(prompt, target), text)
    assert whole > 5


def test_long_sequences_lose_their_end(snapshot_of: SnapshotOf) -> None:
    """EOS is appended before the sequence is cut, so a cut one has none."""
    snapshot = snapshot_of()
    snapshot.modalities["caption"] = snapshot.modalities["caption"].resolved(num_tokens=4)
    config = replace_config(keep="all", alpha=1e6)
    for compiled in (True, False):
        maker = _maker(snapshot, config, compiled)
        m = maker.model.index("caption")
        batch = _all(maker)
        for row in range(len(batch)):
            shard, place = _where(maker, row)
            text = snapshot.column(shard, "caption").cells(place)
            assert _slots(batch, row, m)[1].tolist() == [*text, EOS][:4]


def replace_config(keep: str, alpha: float) -> TrainConfig:
    part = MixtureComponent(input_alphas={"caption": alpha}, default_alpha=1.0, keep={"caption": keep})  # type: ignore[dict-item]
    return CONFIG.model_copy(update={"mixture": (part,)})


_COMPONENTS = st.builds(
    MixtureComponent,
    weight=st.sampled_from([1.0, 3.0]),
    input_alphas=st.dictionaries(
        st.sampled_from(["rgb", "caption", "rgb_pixels"]), st.sampled_from([0.0, 0.05, 1000.0]), max_size=2
    ),
    target_alphas=st.dictionaries(st.sampled_from(["rgb", "depth"]), st.sampled_from([0.0, 5.0]), max_size=1),
    default_alpha=st.sampled_from([0.01, 0.5, 10.0]),
    keep=st.dictionaries(st.just("caption"), st.sampled_from(["all", "binary"]), max_size=1),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_COMPONENTS, min_size=1, max_size=3),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.booleans(),
    st.sampled_from(["full", "reference"]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([1, 2, 5]),
    st.integers(0, 9),
)
def test_the_kernel_draws_what_the_plain_form_draws(
    toy: SnapshotOf,
    mixture: list[MixtureComponent],
    most: tuple[int, int],
    varied: bool,
    masking: str,
    absent: float,
    chunk: int,
    seed: int,
) -> None:
    snapshot = toy(rows=30, n_crops=2, absent=absent, pixels=True, seed=seed)
    config = TrainConfig(
        num_input_tokens=most[0],
        num_target_tokens=most[1],
        min_input_tokens=most[0] // 2 if varied else None,
        min_target_tokens=(most[1] + 1) // 2 if varied else None,
        mixture=tuple(mixture),
        masking=masking,  # type: ignore[arg-type]
        seed=seed,
    )
    makers = [_maker(snapshot, config, compiled) for compiled in (True, False)]
    for maker in makers:  # captions in chunks, as metadata is
        specs = [replace(s, chunk=chunk) if s.is_sequence else s for s in maker.model.modalities]
        maker.__init__(maker.shards, replace(maker.model, modalities=tuple(specs)), config, maker.compiled)  # type: ignore[misc]
    refs = makers[0].shards.refs(np.arange(len(makers[0].shards)))
    refs = refs._replace(visit=np.arange(len(refs.shard)) % 3)
    one, two = (maker(refs) for maker in makers)
    assert _same(one, two)
    if masking == "full":
        for lengths, limit in ((one.input_lengths, most[0]), (one.target_lengths, most[1])):
            assert int(lengths.max()) <= limit


def test_slots_counts_and_types(snapshot_of: SnapshotOf) -> None:
    maker = _maker(snapshot_of(absent=0.3))
    batch = _all(maker, 20)
    assert len(batch) == 20 and batch.input_lengths.sum() == len(batch.input_ids)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.previous.dtype == torch.uint16
    assert batch.input_modality.dtype == torch.uint8 and batch.target_positions.dtype == torch.int16
    assert int(batch.input_lengths.max()) == batch.input_width <= 24
    start = 0
    for m, count in enumerate(batch.counts):
        here = batch.label_order[start : start + count].numpy()
        assert (batch.target_modality.numpy()[here] == m).all() and (np.diff(here) > 0).all()
        assert count == (batch.target_modality == m).sum()
        start += count
    assert start == len(batch.label_order) == len(batch.labels) == int(batch.target_lengths.sum())
    is_sequence = np.array([s.is_sequence for s in maker.model.modalities])
    assert not batch.previous.numpy()[~is_sequence[batch.target_modality.numpy()]].any()


def test_there_is_nothing_but_real_tokens(snapshot_of: SnapshotOf) -> None:
    """Samples with little in them take less room; what is full has no index of places."""
    batch = _all(_maker(snapshot_of(absent=0.5)))
    assert len(set(batch.input_lengths.tolist())) > 1
    rows = torch.zeros(len(batch) * batch.input_width, dtype=torch.int64)
    rows[batch.input_places] = batch.input_positions.long() + 1
    for row in range(len(batch)):
        part = rows.view(len(batch), -1)[row]
        assert torch.equal(part[part > 0] - 1, batch.input_positions[_row(batch.input_lengths, row)].long())
        assert (part[int(batch.input_lengths[row]) :] == 0).all()
    full = _all(
        _maker(snapshot_of(), CONFIG.model_copy(update={"num_input_tokens": 12, "num_target_tokens": 12}))
    )
    assert set(full.input_lengths.tolist()) == {12} and not len(full.input_places)


def test_batches_are_a_function_of_samples_and_visits(snapshot_of: SnapshotOf) -> None:
    maker = _maker(snapshot_of(n_crops=2))
    refs = maker.shards.refs(np.array([3, 40, 7]))._replace(visit=np.array([0, 2, 1]))
    one, two = maker(refs), maker(refs)
    assert _same(one, two)
    later = Refs(*(column[1:] for column in refs))
    other = pickle.loads(pickle.dumps(maker))(later)  # noqa: S301 (ours: what a worker process gets)
    assert np.array_equal(
        one.labels[_row(one.target_lengths, 1)].numpy(), other.labels[_row(other.target_lengths, 0)].numpy()
    )
    assert not _same(one, maker(refs._replace(visit=refs.visit + 1)))


def test_a_batch_travels_as_one_tensor(snapshot_of: SnapshotOf) -> None:
    for rows in (1, 3, 8):
        batch = _all(_maker(snapshot_of(pixels=True, absent=0.3)), rows)
        packed = batch.to_bytes()
        assert packed.dtype == torch.uint8 and packed.ndim == 1
        assert _same(Batch.from_bytes(packed), batch)


def test_validation_and_training_samples_are_apart(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of()
    specs = model_config(CONFIG, snapshot.modalities, 64).modalities
    keys = []
    for split in ("train", "val"):
        shards = Shards([snapshot], specs, split)
        refs = shards.refs(np.arange(len(shards)))
        shards.open(refs.shard)
        keys.append(set(shards.look_up(refs)[1].tolist()))
    assert len(keys[0]) + len(keys[1]) == 60
    assert not keys[0] & keys[1]


def test_few_shards_are_open_at_a_time(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of(rows=60, shards=12)
    model = model_config(CONFIG, snapshot.modalities, 64)
    shards = Shards([snapshot], model.modalities, most_maps=3 * (len(model.modalities) + 1))
    maker = BatchMaker(shards, model, CONFIG)
    unbounded = _maker(snapshot)
    for start in range(0, 48, 4):
        refs = shards.refs(np.arange(start, start + 4))
        assert _same(maker(refs), unbounded(refs))
        assert shards.num_open <= 3
    assert unbounded.shards.num_open == 12
    everything = shards.refs(np.arange(48))  # more than may stay open, but a batch needs them at once
    assert _same(maker(everything), unbounded(everything))


def test_a_snapshot_may_lack_a_modality_that_another_has(snapshot_of: SnapshotOf) -> None:
    one, two = snapshot_of(), snapshot_of(seed=1, n_crops=2)
    model = model_config(CONFIG, one.modalities, 64)
    two.modalities = {name: m for name, m in two.modalities.items() if name != "depth"}
    shards = Shards([one, two], model.modalities)
    refs = shards.refs(np.arange(len(shards)))
    batches = [BatchMaker(shards, model, CONFIG, compiled)(refs) for compiled in (True, False)]
    assert _same(*batches)
    m, ends = model.index("depth"), batches[0].input_lengths.cumsum(0)
    assert (batches[0].input_modality[: ends[47]] == m).any()
    assert not (batches[0].input_modality[ends[47] :] == m).any()


def test_pixels_are_cut_into_the_patches_that_are_visible(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of(rows=9, pixels=True)
    maker = _maker(snapshot)
    batch = _all(maker, 6)
    m = maker.model.index("rgb_pixels")
    checked = 0
    ends = batch.input_lengths.cumsum(0).numpy()
    for patch, slot in zip(batch.patches.numpy(), batch.patch_slots.numpy(), strict=True):
        row = int(np.searchsorted(ends, slot, side="right"))
        assert batch.input_modality[slot] == m
        top, left = divmod(int(batch.input_positions[slot]), 4)
        shard, place = _where(maker, row)
        image = np.asarray(Image.open(io.BytesIO(snapshot.column(shard, "rgb_pixels").cells(place, 0))))
        expected = image[16 * top : 16 * top + 16, 16 * left : 16 * left + 16]
        assert np.array_equal(patch.reshape(16, 16, 3), expected)  # row, column, channel
        checked += 1
    assert checked == (batch.input_modality == m).sum() > 0


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("name", "size"), [("depth", 8), ("caption", 206)])
def test_a_token_beyond_the_vocabulary_is_a_damaged_file(
    snapshot_of: SnapshotOf, compiled: bool, name: str, size: int
) -> None:
    snapshot = snapshot_of()
    snapshot.modalities[name] = snapshot.modalities[name].resolved(vocab_size=size)
    with pytest.raises(
        DatasetError, match=rf"shard \d: {name} holds the token \d+, beyond its vocabulary of {size}"
    ):
        _all(_maker(snapshot, compiled=compiled), 30)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("depth", {"tokens": np.zeros((20, 1, 9), np.uint16)}),
        ("depth", {"tokens": np.zeros((19, 1, 16), np.uint16)}),
        ("depth", {"tokens": np.zeros((20, 1, 16), np.int64)}),
        ("caption", {"offsets": np.full(21, 10**6, np.int32)}),
        ("caption", {"offsets": np.arange(21, dtype=np.int32)[::-1].copy()}),
        ("caption", {"offsets": np.zeros(20, np.int32)}),
        ("rgb", {"present": np.ones(3, bool)}),
    ],
)
def test_files_of_another_shape_are_refused(snapshot_of: SnapshotOf, name: str, change: Any) -> None:
    """The kernel reads by address: it must never be led outside a file."""
    snapshot = snapshot_of()
    snapshot.columns[name][1] = replace(snapshot.columns[name][1], **change)
    with pytest.raises(DatasetError, match=f"shard 1: {name} does not have the shape .* `fourmill verify`"):
        _all(_maker(snapshot))


def test_nothing_to_train_on(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of(rows=3)
    snapshot.split_sizes = lambda split: np.zeros(3, np.int64)
    with pytest.raises(DatasetError, match="no train sample"):
        _maker(snapshot)


def _model(snapshot: Any, **changes: Any) -> ModelConfig:
    return model_config(CONFIG.model_copy(update=changes), snapshot.modalities, 64)


def test_inputs_and_targets_are_those_that_can_be(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of(pixels=True)
    snapshot.modalities["t5"] = Modality(
        name="t5", kind="embedding", contract=LabelContract(form="vector", dtype="float16")
    )
    model = _model(snapshot)
    assert model.names == ("caption", "clip_global", "depth", "rgb", "rgb_pixels")
    assert not model.spec("rgb_pixels").is_target and model.spec("rgb_pixels").num_tokens == 16
    few = _model(snapshot, inputs=("rgb",), targets=("depth",), mixture=TrainConfig().mixture)
    assert [(s.name, s.is_input, s.is_target) for s in few.modalities] == [
        ("depth", False, True),
        ("rgb", True, False),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("rgb_pixels",)}, "'rgb_pixels' is of kind 'pixels', which cannot be among the targets"),
        ({"inputs": ("deptj",)}, "has no modality 'deptj'; did you mean 'depth'"),
        (
            {"mixture": (MixtureComponent(input_alphas={"rbg": 1}),)},
            "mixture.0: .* 'rbg'; did you mean 'rgb'",
        ),
        ({"preset": "4m-n"}, "unknown preset '4m-n'"),
    ],
)
def test_wrong_configurations_name_what_is_wrong(snapshot_of: SnapshotOf, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _model(snapshot_of(pixels=True), **changes)


def test_unusable_modalities_are_refused(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of()
    depth = snapshot.modalities["depth"]
    for changed, message in (
        (depth.resolved(num_tokens=15), "15 tokens is not square"),
        (depth.resolved(vocab_size=0), "is not resolved"),
        (snapshot.modalities["caption"].resolved(name="depth", num_tokens=500), "sentinels"),
    ):
        other = replace(snapshot, modalities={**snapshot.modalities, "depth": changed})
        with pytest.raises(ConfigError, match=message):
            _model(other)
