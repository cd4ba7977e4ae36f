"""Learning what there is to learn, and generating it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.errors import ConfigError
from fourmill.train import generate as generation
from fourmill.train import presets
from fourmill.train.checkpoint import load_model
from fourmill.train.generate import UNKNOWN, Step, generate, generate_chain
from fourmill.train.model import FourMill
from fourmill.train.sampling import draw, filter_logits, token_counts
from fourmill.train.trainer import train_on
from fourmill.train_config import MixtureComponent, TrainConfig

ROWS = 12


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, toy: Any
) -> Iterator[tuple[FourMill, dict[str, float]]]:
    """A model of the toy world, and its losses at the end."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        size = presets.Size(64, 1, 1, token_std=1.0, modality_std=0.5, look_in_place=True)
        patch.setitem(presets.PRESETS, "toy", size)
        rgb_to_all = MixtureComponent(weight=2, input_alphas={"rgb": 1000.0}, default_input_alpha=0.0)
        # What generation in many steps shows: all of rgb, and the part of depth that is there already.
        and_depth = MixtureComponent(input_alphas={"rgb": 40.0, "depth": 20.0}, default_input_alpha=0.0)
        config = TrainConfig(
            preset="toy", steps=420, batch_size=32, lr=3e-3, warmup_steps=20, num_input_tokens=24,
            num_target_tokens=32, mixture=(rgb_to_all, and_depth, MixtureComponent()), checkpoint_every=500, log_every=20,
            device="cpu", clip_grad=1.0,
        )  # fmt: skip
        out = tmp_path_factory.mktemp("toy")
        result = train_on(toy(rows=600, shards=2), out, config)
        yield load_model(out), result.losses


@pytest.fixture(scope="module")
def world(toy: Any) -> dict[str, Any]:
    """Samples that were never trained on: rgb, depth, captions."""
    snapshot = toy(rows=ROWS, shards=1, seed=99)
    texts = snapshot.column(0, "caption")
    return {
        "rgb": snapshot.column(0, "rgb").tokens[:, 0].astype(np.int64),
        "depth": snapshot.column(0, "depth").tokens[:, 0].astype(np.int64),
        "clip_global": snapshot.column(0, "clip_global").tokens[:, 0].astype(np.int64),
        "caption": [texts.cells(row).astype(np.int64) for row in range(ROWS)],
    }


def _agreement(one: np.ndarray, two: np.ndarray) -> float:
    return float((one == two).mean())


def test_training_beats_the_marginal_by_far(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any]
) -> None:
    """depth is a function of rgb: the marginal's loss is ln 16 = 2.77 and its accuracy 1/16."""
    model, losses = trained
    assert losses["depth"] < 0.7
    assert _agreement(generate(model, {"rgb": world["rgb"]}, "depth"), world["depth"]) > 0.85
    assert (
        _agreement(generate(model, {"depth": world["depth"]}, "rgb"), world["rgb"]) > 0.25
    )  # trained far less


@pytest.mark.parametrize("scheme", ["roar", "maskgit"])
@pytest.mark.parametrize("steps", [1, 4, 16, 99])
def test_schemes_predict_depth(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any], scheme: Any, steps: int
) -> None:
    out = generate(trained[0], {"rgb": world["rgb"]}, "depth", scheme, steps=steps)
    assert out.shape == (ROWS, 16) and out.dtype == np.int64
    assert _agreement(out, world["depth"]) > 0.7  # chance is 0.06


@pytest.mark.parametrize(
    "names", [(), ("depth",), ("caption",), ("rgb", "caption"), ("clip_global", "depth", "caption")]
)
@pytest.mark.parametrize("target", ["rgb", "clip_global", "caption"])
def test_any_inputs_give_any_target(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any], names: tuple[str, ...], target: str
) -> None:
    inputs = {name: world[name] for name in names if name != target}
    out = generate(trained[0], inputs, target, temperature=1.0, rows=ROWS)
    assert len(out) == ROWS
    spec = trained[0].config.spec(target)
    for row in out:
        assert len(row) <= spec.num_tokens + 1 and (row >= 0).all() and (row < spec.vocab_size).all()


def test_rows_may_lack_an_input(trained: tuple[FourMill, dict[str, float]], world: dict[str, Any]) -> None:
    """A row without rgb is generated as if rgb had not been given at all."""
    rgb, texts = world["rgb"].copy(), list(world["caption"])
    rgb[0], texts[1] = UNKNOWN, None
    out = generate(trained[0], {"rgb": rgb, "caption": texts}, "depth")
    assert np.array_equal(out[0], generate(trained[0], {"caption": texts[:1]}, "depth")[0])
    assert np.array_equal(out[1], generate(trained[0], {"rgb": rgb[1:2]}, "depth")[0])


@pytest.mark.parametrize(
    ("scheme", "target"), [("roar", "depth"), ("maskgit", "depth"), ("autoregressive", "caption")]
)
def test_generation_is_deterministic_by_seed_and_by_row(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any], scheme: Any, target: str
) -> None:
    model, rgb, keys = trained[0], world["rgb"], np.arange(ROWS, dtype=np.uint64) + np.uint64(7)
    options: dict[str, Any] = {
        "temperature": 3.0,
        "steps": 3 if target == "depth" else 1,
        "top_k": 0.9,
        "cooling": "linear",
    }

    def make(rows: slice, seed: int = 0) -> list[list[int]]:
        out = generate(model, {"rgb": rgb[rows]}, target, scheme, seed=seed, keys=keys[rows], **options)
        return [row.tolist() for row in out]

    whole = make(slice(None))
    assert whole == make(slice(None))
    assert whole[4:9] == make(slice(4, 9))  # a row does not depend on its batch
    assert whole != make(slice(None), seed=1)


def test_captions_are_written_and_completed(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any]
) -> None:
    """A caption spells the first tokens of rgb; a prompt with a gap is filled between its visible words."""
    model, rgb = trained[0], world["rgb"]
    words = generate(model, {"rgb": rgb}, "caption")
    pairs = [(a, b) for row, text in enumerate(words) for a, b in zip(text, 204 + rgb[row], strict=False)]
    assert len(pairs) > ROWS
    prompts = [np.array([204 + row[0], 5, 204 + row[4], 3]) for row in rgb]
    filled = generate(model, {"rgb": rgb, "caption": prompts}, "caption")
    for text, row in zip(filled, rgb, strict=True):
        assert text[0] == 204 + row[0]
        assert not ((text >= 4) & (text < 204)).any()  # no sentinel is left
    closed = generate(model, {"rgb": rgb[:1], "caption": [np.array([210, 211])]}, "caption")
    assert closed[0].tolist() == [210, 211]  # nothing to fill


@pytest.mark.parametrize("scheme", ["roar", "maskgit"])
def test_known_tokens_of_the_target_stay(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any], scheme: Any
) -> None:
    known = world["depth"].copy()
    known[np.random.default_rng(0).random(known.shape) < 0.5] = UNKNOWN
    known[0], known[1] = UNKNOWN, world["depth"][1]
    out = generate(trained[0], {"rgb": world["rgb"], "depth": known}, "depth", scheme, steps=5)
    assert np.array_equal(out[known != UNKNOWN], known[known != UNKNOWN])
    assert (out != UNKNOWN).all()
    assert known[0, 0] == UNKNOWN  # the caller's array is not written to


def test_a_chain_feeds_each_result_to_the_next(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any]
) -> None:
    model, rgb = trained[0], world["rgb"]
    steps = [
        Step(target="depth", steps=2),
        Step(target="caption", temperature=0.5),
        Step(target="clip_global"),
    ]
    done = generate_chain(model, {"rgb": rgb}, steps)
    assert list(done) == ["depth", "caption", "clip_global"]
    known = {"rgb": rgb, "depth": done["depth"]}
    assert _same(done["caption"], generate(model, known, "caption", temperature=0.5))
    known["caption"] = done["caption"]
    assert np.array_equal(done["clip_global"], generate(model, known, "clip_global"))


def _same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    return [a.tolist() for a in one] == [b.tolist() for b in two]


def test_guidance_is_the_formula(trained: tuple[FourMill, dict[str, float]], world: dict[str, Any]) -> None:
    """l_u + s (l_c - l_u) and l_u + sum w_i (l_i - l_u), with l_u computed by leaving inputs out."""
    model, known = trained[0], {"rgb": world["rgb"], "clip_global": world["clip_global"]}

    def logits(inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        draws = generation.Draws(0, np.arange(ROWS, dtype=np.uint64), np.zeros(ROWS, np.int64))
        worker = generation._Worker(model, inputs, Step(target="depth", **options), draws)
        tokens = np.full((ROWS, 16), UNKNOWN)
        with torch.inference_mode():
            return worker._logits(tokens, tokens == UNKNOWN)

    blank = np.full_like(world["rgb"], UNKNOWN)
    nothing = logits({"rgb": blank})
    both, rgb, clip = (
        logits(known),
        logits({"rgb": known["rgb"]}),
        logits({"clip_global": known["clip_global"]}),
    )
    assert torch.allclose(logits(known, guidance=2.5), nothing + 2.5 * (both - nothing), atol=1e-3)
    expected = nothing + 1.5 * (rgb - nothing) - 0.5 * (clip - nothing)
    assert torch.allclose(logits(known, guidance={"rgb": 1.5, "clip_global": -0.5}), expected, atol=1e-3)
    kept = logits(known, guidance={"rgb": 2.0})  # clip_global is not guided: both passes see it
    assert torch.allclose(kept, clip + 2.0 * (both - clip), atol=1e-3)


def test_dropped_text_is_a_lone_sentinel(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any]
) -> None:
    draws = generation.Draws(0, np.arange(ROWS, dtype=np.uint64), np.zeros(ROWS, np.int64))
    worker = generation._Worker(
        trained[0], {"caption": world["caption"]}, Step(target="depth", guidance=2.0), draws
    )
    part = worker._inputs(worker.branches[0][1])[0]
    assert part.ids.tolist() == [[5]] * ROWS and part.counts.tolist() == [1] * ROWS


def test_every_guided_pass_sees_what_was_generated_before(
    trained: tuple[FourMill, dict[str, float]], world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the reference's ROAR with several conditions the generated tokens stay hidden from the conditional passes."""
    visible = []
    original = FourMill.encode

    def spy(self: FourMill, batch: Any) -> Any:
        visible.append(int((batch.input_modality == self.config.index("depth")).sum()) // ROWS)
        return original(self, batch)

    monkeypatch.setattr(FourMill, "encode", spy)
    inputs = {"rgb": world["rgb"], "clip_global": world["clip_global"]}
    generate(
        trained[0], inputs, "depth", steps=2, schedule="linear", guidance={"rgb": 1.0, "clip_global": 1.0}
    )
    assert visible == [0, 0, 0, 8, 8, 8]


def test_maskgit_at_temperature_zero_keeps_the_most_confident(
    trained: tuple[FourMill, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the reference all samples then have confidence 1, and the order of the positions decides."""
    confidence = np.random.default_rng(3).permutation(16)
    asked_for = []

    def logits(self: Any, tokens: np.ndarray, asked: np.ndarray) -> torch.Tensor:
        asked_for.append(asked[0].copy())
        out = torch.zeros(int(asked.sum()), 16)
        out[:, 5] = torch.from_numpy((confidence[np.nonzero(asked)[1]] + 1) / 4.0)
        return out

    monkeypatch.setattr(generation._Worker, "_logits", logits)
    out = generate(trained[0], {}, "depth", "maskgit", steps=2, schedule="linear", rows=1)
    assert (out == 5).all()
    assert asked_for[0].all()
    assert np.array_equal(asked_for[1], confidence < 8)  # the 8 surest went first


@pytest.mark.parametrize(
    ("inputs", "target", "options", "message"),
    [
        ({"rgb": np.zeros((2, 9), int)}, "depth", {}, r"'rgb': expected tokens \(B, 16\), got \(2, 9\)"),
        ({"rgb": np.full((2, 16), 16)}, "depth", {}, "outside the vocabulary of 16"),
        ({"caption": [np.array([999])]}, "depth", {}, "'caption': a token lies outside the vocabulary"),
        ({"rbg": np.zeros((2, 16), int)}, "depth", {}, "no modality 'rbg'; did you mean 'rgb'"),
        ({}, "depth", {}, "at least one; got no inputs"),
        (
            {"rgb": np.zeros((2, 16), int), "depth": np.zeros((3, 16), int)},
            "depth",
            {},
            "same number of rows",
        ),
        ({"rgb": np.zeros((2, 16), int)}, "caption", {"scheme": "roar"}, "scheme 'roar' can't make it"),
        ({"rgb": np.zeros((2, 16), int)}, "depth", {"steps": 0}, "at least one is needed"),
        ({"rgb": np.zeros((2, 16), int)}, "depth", {"temperature": -1.0}, "temperature is -1.0"),
        ({"rgb": np.zeros((2, 16), int)}, "depth", {"top_p": 1.5}, "top_p is 1.5"),
        ({"rgb": np.zeros((2, 16), int)}, "depth", {"guidance": {"det": 1.0}}, "guidance names 'det'"),
    ],
)
def test_wrong_requests_say_what_is_wrong(
    trained: tuple[FourMill, dict[str, float]], inputs: Any, target: str, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(trained[0], inputs, target, **options)


# -- sampling -------------------------------------------------------------------------------------------


@given(st.sampled_from(["cosine", "linear"]), st.integers(1, 300), st.integers(1, 120))
def test_schedules_have_no_empty_and_no_negative_step(schedule: Any, tokens: int, steps: int) -> None:
    counts = token_counts(schedule, tokens, steps)
    assert sum(counts) == tokens and min(counts) >= 1 and len(counts) == min(steps, tokens)


def test_cosine_schedule_is_small_at_both_ends() -> None:
    counts = token_counts("cosine", 196, 8)
    exact = [196 * 0.5 * (np.cos(np.pi * i / 8) - np.cos(np.pi * (i + 1) / 8)) for i in range(8)]
    assert np.abs(np.array(counts) - exact).max() <= 1
    assert token_counts("linear", 10, 4) == [3, 3, 2, 2]
    assert token_counts("cosine", 0, 4) == []


def test_filters_keep_what_they_should() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]]).log()

    def kept(**options: Any) -> list[int]:
        return (
            torch.isfinite(filter_logits(logits, **{"top_k": None, "top_p": None, **options})[0])
            .nonzero()
            .flatten()
            .tolist()
        )

    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=0.5) == [0, 1]
    assert kept(top_k=0.01) == [0]  # never nothing
    assert kept(top_k=1.0) == kept(top_k=99) == kept() == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [0]
    assert kept(top_p=0.6) == [0, 1]
    assert kept(top_p=1e-9) == [0]
    assert kept(top_k=3, top_p=0.9) == [0, 1, 2]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 3.0))
def test_draws_follow_the_softmax(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=5)).float()
    uniforms = (np.arange(4000) + 0.5) / 4000  # a stratified sample: no luck involved
    tokens, shares = draw(logits.expand(4000, 5), uniforms, temperature)
    expected = (logits / temperature).softmax(-1)
    assert np.abs(np.bincount(tokens, minlength=5) / 4000 - expected.numpy()).max() < 1e-3
    assert torch.allclose(shares, expected[tokens], atol=1e-6)


def test_draws_never_take_what_was_filtered() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, -40.0]]).expand(3, 4)
    tokens, _ = draw(logits, np.array([1e-12, 0.5, 1 - 1e-12]), 5.0, top_k=2)
    assert set(tokens.tolist()) <= {0, 1}
    best, confidence = draw(logits, np.zeros(3), 0.0)
    assert best.tolist() == [0, 0, 0]
    assert confidence[0].item() == pytest.approx(logits[0].softmax(-1)[0].item())
