"""What is in a batch: the tokens of the snapshot, at their places."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fourmill.errors import ConfigError, DatasetError
from fourmill.modality import LabelContract, Modality
from fourmill.train.batches import NO_TOKEN, Batch, BatchMaker, Samples
from fourmill.train.presets import EOS, ModelConfig, model_config
from fourmill.train.spans import merge_spans
from fourmill.train_config import MixtureComponent, TrainConfig

SnapshotOf = Callable[..., Any]
CONFIG = TrainConfig(
    num_input_tokens=24, num_target_tokens=30, mixture=(MixtureComponent(default_alpha=1.0),)
)


def _maker(snapshot: Any, config: TrainConfig = CONFIG) -> BatchMaker:
    model = model_config(config, snapshot.modalities, snapshot.image_size)
    return BatchMaker(Samples(snapshot, model.modalities), model, config)


def _slots(batch: Batch, row: int, modality: int) -> tuple[np.ndarray, ...]:
    """Positions and ids of the inputs, then of the targets, of a modality in a row."""
    shown = batch.input_modality[row].numpy() == modality
    hidden = batch.target_modality[row].numpy() == modality
    return (
        batch.input_positions[row].numpy()[shown],
        batch.input_ids[row].numpy()[shown],
        batch.target_positions[row].numpy()[hidden],
        batch.labels[row].numpy()[hidden],
    )


@pytest.mark.parametrize("n_crops", [1, 3])
def test_grid_tokens_stand_at_their_positions(snapshot_of: SnapshotOf, n_crops: int) -> None:
    snapshot = snapshot_of(n_crops=n_crops, absent=0.2)
    maker = _maker(snapshot)
    index = np.arange(len(maker.samples))
    batch = maker(index, np.zeros_like(index))
    crops_seen = set()
    for name in ("rgb", "depth", "clip_global"):
        m = maker.model.index(name)
        for row in index:
            shard, place = maker.samples.shards[row], maker.samples.rows[row]
            column = snapshot.column(shard, name)
            seen, ids, wanted, labels = _slots(batch, int(row), m)
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


def test_sequences_are_teacher_forced_and_merge_back(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of()
    maker = _maker(snapshot)
    m = maker.model.index("caption")
    index = np.arange(len(maker.samples))
    batch = maker(index, np.zeros_like(index))
    whole = 0
    for row in index:
        hidden = batch.target_modality[row].numpy() == m
        labels, previous = batch.labels[row].numpy()[hidden], batch.previous[row].numpy()[hidden]
        if not len(labels):
            continue
        assert np.array_equal(previous[1:], labels[:-1])  # each slot reads what the one before predicts
        assert np.array_equal(batch.target_positions[row].numpy()[hidden], np.arange(len(labels)))
        shown = batch.input_ids[row].numpy()[batch.input_modality[row].numpy() == m]
        target = np.append(previous[:1], labels)
        if target[0] == 5 and (not len(shown) or set(shown[(shown > 4) & (shown < 204)]) <= set(target)):
            text = snapshot.column(maker.samples.shards[row], "caption").cells(maker.samples.rows[row])
            prompt = shown if len(shown) else np.array([5])
            whole += np.array_equal(merge_spans(prompt, target), text)
    assert whole > 5


def test_long_sequences_lose_their_end(snapshot_of: SnapshotOf) -> None:
    """EOS is appended before the sequence is cut, so a cut one has none."""
    snapshot = snapshot_of()
    snapshot.modalities["caption"] = snapshot.modalities["caption"].resolved(num_tokens=4)
    config = replace_config(keep="all", alpha=1e6)
    maker = _maker(snapshot, config)
    m = maker.model.index("caption")
    index = np.arange(len(maker.samples))
    batch = maker(index, np.zeros_like(index))
    for row in index:
        text = snapshot.column(maker.samples.shards[row], "caption").cells(maker.samples.rows[row])
        assert _slots(batch, int(row), m)[1].tolist() == [*text, EOS][:4]


def replace_config(keep: str, alpha: float) -> TrainConfig:
    part = MixtureComponent(input_alphas={"caption": alpha}, default_alpha=1.0, keep={"caption": keep})  # type: ignore[dict-item]
    return CONFIG.model_copy(update={"mixture": (part,)})


def test_slots_counts_and_types(snapshot_of: SnapshotOf) -> None:
    maker = _maker(snapshot_of(absent=0.3))
    batch = maker(np.arange(20), np.arange(20))
    assert batch.input_ids.shape == (20, 24) and batch.labels.shape == (20, 30)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.previous.dtype == torch.int32
    assert batch.input_modality.dtype == batch.target_positions.dtype == torch.int16
    flat = batch.target_modality.flatten()
    start = 0
    for m, count in enumerate(batch.counts):
        assert (flat[batch.label_order[start : start + count]] == m).all()
        assert count == (flat == m).sum()
        start += count
    assert start == len(batch.label_order) == (flat >= 0).sum()
    is_sequence = torch.tensor([s.is_sequence for s in maker.model.modalities])
    reads_mask = batch.previous == NO_TOKEN
    full = batch.target_modality >= 0
    assert torch.equal(reads_mask[full], ~is_sequence[batch.target_modality[full].long()])
    shares = batch.real_share
    assert shares[0] == pytest.approx((batch.input_modality >= 0).float().mean().item())
    assert batch.inputs_full == (shares[0] == 1)


def test_batches_are_a_function_of_samples_and_visits(snapshot_of: SnapshotOf) -> None:
    maker = _maker(snapshot_of(n_crops=2))
    index, visits = np.array([3, 40, 7]), np.array([0, 2, 1])
    one, two = maker(index, visits), maker(index, visits)
    other = pickle.loads(pickle.dumps(maker))(index[1:], visits[1:])  # noqa: S301 (ours: what a worker process gets)
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.labels, two.labels)
    assert torch.equal(one.labels[1:], other.labels) and torch.equal(
        one.input_positions[1:], other.input_positions
    )
    assert not torch.equal(one.input_positions, maker(index, visits + 1).input_positions)


def test_validation_and_training_samples_are_apart(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of()
    specs = model_config(CONFIG, snapshot.modalities, 64).modalities
    train, val = Samples(snapshot, specs), Samples(snapshot, specs, "val")
    assert len(train) + len(val) == 60
    assert not set(train.keys64) & set(val.keys64)


def test_pixels_are_cut_into_the_patches_that_are_visible(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of(rows=9, pixels=True)
    maker = _maker(snapshot)
    batch = maker(np.arange(6), np.zeros(6, np.int64))
    m = maker.model.index("rgb_pixels")
    checked = 0
    for patch, slot in zip(batch.patches.numpy(), batch.patch_slots.numpy(), strict=True):
        row, column = divmod(int(slot), 24)
        assert batch.input_modality[row, column] == m
        top, left = divmod(int(batch.input_positions[row, column]), 4)
        blob = snapshot.column(maker.samples.shards[row], "rgb_pixels").cells(maker.samples.rows[row], 0)
        image = np.asarray(Image.open(io.BytesIO(blob)))
        expected = image[16 * top : 16 * top + 16, 16 * left : 16 * left + 16]
        assert np.array_equal(patch.reshape(16, 16, 3), expected)  # row, column, channel
        checked += 1
    assert checked == (batch.input_modality == m).sum() > 0


def test_a_token_beyond_the_vocabulary_is_a_damaged_file(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of()
    snapshot.modalities["depth"] = snapshot.modalities["depth"].resolved(vocab_size=8)
    with pytest.raises(
        DatasetError, match=r"shard \d: depth holds the token 1\d, beyond its vocabulary of 8"
    ):
        _maker(snapshot)(np.arange(30), np.zeros(30, np.int64))


def test_nothing_to_train_on(snapshot_of: SnapshotOf) -> None:
    snapshot = snapshot_of(rows=3)
    snapshot.is_train = lambda shard: np.zeros(1, bool)
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
