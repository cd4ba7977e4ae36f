"""The transformer: sizes, tables, masks and loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fourmill.errors import CheckpointError
from fourmill.train.batches import Batch, BatchMaker, Slots, batch_of
from fourmill.train.loss import loss_weights
from fourmill.train.model import FourMill, decoder_mask
from fourmill.train.optimizer import Optimizers
from fourmill.train.positions import sincos_1d, sincos_2d
from fourmill.train.presets import PRESETS, ModalitySpec, ModelConfig, model_config
from fourmill.train.reading import Shards
from fourmill.train_config import MixtureComponent, TrainConfig

GRID = ModalitySpec("rgb", "grid", 16, 16, True, True)
TINY = ModelConfig(32, 1, 1, (GRID,), head_dim=16)
CONFIG = TrainConfig(
    num_input_tokens=20, num_target_tokens=24, mixture=(MixtureComponent(default_alpha=1.0),)
)


def _batch(snapshot: Any, rows: int = 5) -> tuple[ModelConfig, Batch]:
    config = replace(
        model_config(CONFIG, snapshot.modalities, 64), dim=32, encoder_depth=2, decoder_depth=2, head_dim=16
    )
    shards = Shards([snapshot], config.modalities)
    return config, BatchMaker(shards, config, CONFIG)(shards.refs(np.arange(rows)))


def _ends(batch: Batch) -> list[int]:
    """Where the targets of each sample end, after a 0."""
    return [0, *batch.target_lengths.cumsum(0).tolist()]


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("4m-t", 24.8), ("4m-s", 58.7), ("4m-b", 198.2), ("4m-l", 704.7), ("4m-xl", 2818.8)],
)
def test_blocks_have_the_published_size(preset: str, millions: float) -> None:
    """The sizes that 4M advertises count the blocks of encoder and decoder, no embeddings."""
    size = PRESETS[preset]
    config = replace(
        TINY, dim=size.dim, encoder_depth=size.encoder_depth, decoder_depth=size.decoder_depth, head_dim=64
    )
    with torch.device("meta"):
        model = FourMill(config, seed=None)
    blocks = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(("encoder.", "decoder."))
    )
    assert blocks / 1e6 == pytest.approx(millions, abs=0.06)


def test_one_dimensional_positions_follow_the_formula() -> None:
    table = sincos_1d(7, 12)
    for p in range(7):
        for k in range(6):
            angle = p * 10000 ** (-k / 6)
            assert table[p, k] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 6 + k] == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(3, 3), (2, 5)])
def test_two_dimensional_positions_follow_the_formula(height: int, width: int) -> None:
    """Blocks sin row, cos row, sin column, cos column; right for grids that are not square too."""
    table = sincos_2d(height, width, 16).reshape(height, width, 4, 4)
    for row in range(height):
        for column in range(width):
            for k in range(4):
                frequency = 10000 ** (-k / 4)
                waves = [math.sin(row * frequency), math.cos(row * frequency)]
                waves += [math.sin(column * frequency), math.cos(column * frequency)]
                assert table[row, column, :, k].tolist() == pytest.approx(waves, abs=1e-6)


def test_decoder_mask_against_brute_force() -> None:
    generator = np.random.default_rng(0)
    causal = torch.tensor([False, True, True, False])
    for _ in range(20):
        row = generator.integers(-1, 4, 9)
        mask = decoder_mask(torch.from_numpy(row)[None], causal)[0, 0]
        for i in range(9):
            for j in range(9):
                same = row[i] == row[j] >= 0
                expected = i == j or (same and (not causal[row[i]] or j <= i))
                assert mask[i, j] == expected


def test_predictions_cannot_see_their_labels(snapshot_of: Callable[..., Any]) -> None:
    """Changing labels, or the decoder inputs of later words, changes no logits before them."""
    config, batch = _batch(snapshot_of())
    model = FourMill(config).eval()
    caption = config.index("caption")
    states = model.decode(batch, model.encode(batch))
    ends = _ends(batch)
    captions = [
        [i for i in range(start, end) if batch.target_modality[i] == caption] for start, end in pairwise(ends)
    ]
    slots = next(slots for slots in captions if len(slots) > 3)
    other = batch.previous.clone()
    other[slots[2]] = 7
    changed = replace(batch, previous=other, labels=torch.zeros_like(batch.labels))
    difference = (model.decode(changed, model.encode(changed)) - states).abs().sum(-1)
    seen = difference > 0
    assert seen[slots[2]]
    assert not seen[[i for i in range(len(seen)) if i not in slots[2:]]].any()


def test_samples_of_unequal_length_do_not_see_each_other(snapshot_of: Callable[..., Any]) -> None:
    """A batch gives what its samples give one by one, each in rows that are full; without any input it is finite."""
    config, batch = _batch(snapshot_of(absent=0.3))
    model = FourMill(config).eval()
    assert len(set(batch.input_lengths.tolist())) > 1 and len(batch.input_places)
    ins, outs = [0, *batch.input_lengths.cumsum(0).tolist()], _ends(batch)
    total = torch.zeros(len(config.modalities))
    states = model.decode(batch, model.encode(batch))
    for row in range(len(batch)):
        given, wanted = slice(ins[row], ins[row + 1]), slice(outs[row], outs[row + 1])
        inputs = Slots(
            batch.input_ids[given].numpy(), batch.input_modality[given].numpy(), batch.input_positions[given].numpy(),
            np.zeros(0, np.uint16), batch.input_lengths[row : row + 1].numpy(),
        )  # fmt: skip
        targets = Slots(
            batch.labels[wanted].numpy(), batch.target_modality[wanted].numpy(), batch.target_positions[wanted].numpy(),
            batch.previous[wanted].numpy(), batch.target_lengths[row : row + 1].numpy(),
        )  # fmt: skip
        alone = batch_of(inputs, targets, len(config.modalities))
        assert not len(alone.input_places) and not len(alone.target_places)
        assert torch.allclose(model.decode(alone, model.encode(alone)), states[wanted], atol=1e-5)
        total += model(alone)
    assert torch.allclose(model(batch), total, atol=1e-4)
    empty = [np.zeros(0, dtype) for dtype in (np.uint16, np.uint8, np.int16, np.uint16)]
    nothing = Slots(empty[0], empty[1], empty[2], empty[3], np.zeros(1, np.int32))
    assert torch.isfinite(model(batch_of(nothing, targets, len(config.modalities)))).all()


def test_forward_is_the_sum_of_cross_entropies(snapshot_of: Callable[..., Any]) -> None:
    config, batch = _batch(snapshot_of())
    model = FourMill(config)
    sums = model(batch)
    states = model.decode(batch, model.encode(batch))
    for m, spec in enumerate(config.modalities):
        chosen = batch.target_modality == m
        logits = states[chosen] @ model.heads()[m].T
        assert logits.shape[1] == spec.vocab_size
        expected = F.cross_entropy(logits, batch.labels[chosen].long(), reduction="sum")
        assert sums[m].item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_parameter_gets_a_gradient_even_without_labels(snapshot_of: Callable[..., Any]) -> None:
    """Or ranks whose share of a batch lacks a modality would wait for one another for ever."""
    config, batch = _batch(snapshot_of(pixels=True))
    blank = replace(
        batch,
        label_order=batch.label_order[:0],
        counts=(0,) * len(batch.counts),
        patches=batch.patches[:0],
        patch_slots=batch.patch_slots[:0],
    )
    model = FourMill(config)
    model(blank).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_recomputing_blocks_gives_the_same_gradients(snapshot_of: Callable[..., Any]) -> None:
    config, batch = _batch(snapshot_of())
    gradients = []
    for recompute in (False, True):
        model = FourMill(config).train()
        model.checkpoint_blocks = recompute
        model(batch).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


def test_initialisation(snapshot_of: Callable[..., Any]) -> None:
    """Xavier-uniform by single matrix, embeddings N(0, 0.02), heads by their own vocabulary; a function of the seed."""
    config = replace(_batch(snapshot_of())[0], token_std=0.02, modality_std=0.02, look_in_place=False)
    model, same, other = FourMill(config, 1), FourMill(config, 1), FourMill(config, 2)
    assert torch.equal(model.encoder_tokens.weight, same.encoder_tokens.weight)
    assert not torch.equal(model.encoder_tokens.weight, other.encoder_tokens.weight)
    block: Any = model.encoder[0]
    bounds: list[tuple[torch.Tensor, float]] = [
        (block.attention.projections.weight, math.sqrt(6 / 64)),
        (block.mlp.gate_up.weight, math.sqrt(6 / (32 + config.mlp_hidden))),
        (model.heads()[config.index("rgb")], math.sqrt(6 / (32 + 16))),
        (model.heads()[config.index("caption")], math.sqrt(6 / (32 + 220))),
    ]
    for weight, bound in bounds:
        assert 0.9 * bound < weight.abs().max().item() <= bound
    assert model.encoder_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_fast_beginning(snapshot_of: Callable[..., Any]) -> None:
    config, _ = _batch(snapshot_of())
    model = FourMill(replace(config, token_std=1.0, modality_std=0.5, look_in_place=True))
    assert model.encoder_tokens.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert model.modality_embedding.std().item() == pytest.approx(0.5, rel=0.3)
    block: Any = model.decoder[1]
    assert torch.equal(block.cross_attention.query.weight, torch.eye(32))
    assert torch.equal(block.cross_attention.projections.weight[:32], torch.eye(32))


def test_tokens_begin_as_projections_of_their_codes() -> None:
    """Equal codes begin alike in both tables, with the spread that the configuration gives; other tables are left alone."""
    other = replace(GRID, name="depth")
    model = FourMill(replace(TINY, modalities=(other, GRID), token_std=1.0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    codes = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    codes[5] = codes[9]
    model.start_from_codebooks({"rgb": codes}, seed=0)
    for table in (model.encoder_tokens.weight, model.decoder_tokens.weight):
        rgb = table[16:].detach()
        assert torch.equal(rgb[5], rgb[9]) and not torch.equal(rgb[5], rgb[8])
        assert torch.linalg.matrix_rank(rgb, rtol=1e-4) == 3
    assert model.encoder_tokens.weight[16:].std().item() == pytest.approx(1.0, rel=0.3)
    head = before["decoder_tokens.weight"][16:].std().item()
    assert model.heads()[1].std().item() == pytest.approx(head, rel=0.3)
    after = model.state_dict()
    for name, value in before.items():
        same = after[name][:16] if name.endswith("tokens.weight") else after[name]
        assert torch.equal(same, value[:16] if name.endswith("tokens.weight") else value)
    again = FourMill(replace(TINY, modalities=(other, GRID), token_std=1.0))
    again.start_from_codebooks({"rgb": codes}, seed=0)
    assert all(
        torch.equal(one, two) for one, two in zip(after.values(), again.state_dict().values(), strict=True)
    )


def test_decay_is_by_kind_and_not_by_name() -> None:
    """A modality called norm... must decay like any other; tables and norms never do."""
    vector = ModalitySpec("normal_bias", "vector", 16, 4, True, True)
    model = FourMill(replace(TINY, modalities=(vector, replace(GRID, name="norm.rgb"))))
    (optimizer,) = Optimizers(model, TrainConfig(weight_decay=0.05)).parts
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.05 and rest["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    assert all(p.ndim == 2 and "norm" not in names[id(p)] for p in decayed["params"])
    kept = {names[id(p)] for p in rest["params"]}
    tables = {"encoder_tokens.weight", "decoder_tokens.weight", "modality_embedding", "mask_token"}
    assert tables | {"encoder_positions", "decoder_positions", "context_projection.bias"} <= kept
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == len(decayed["params"])


def test_loss_weights() -> None:
    counts, targets = [10, 30, 0, 0], [True, True, True, False]
    assert loss_weights(counts, targets, "mod") == [1 / 20, 1 / 60, 0, 0]
    assert loss_weights(counts, targets, "mod", count_absent=True) == [1 / 30, 1 / 90, 0, 0]
    # By label count alone: a vocabulary of 30,000 weighs no more than one of 16.
    assert loss_weights(counts, targets, "token") == [1 / 40] * 4
    assert loss_weights([0, 0], [True, True], "mod") == loss_weights([0, 0], [True, True], "token") == [0, 0]


def test_configuration_survives_json_and_damage_is_named(snapshot_of: Callable[..., Any]) -> None:
    config, _ = _batch(snapshot_of())
    assert ModelConfig.from_json(config.to_json(), "here") == config
    with pytest.raises(CheckpointError, match="here: not the configuration of a model"):
        ModelConfig.from_json('{"dim": 3}', "here")
