"""Labels from a model, whatever it has learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fourmill.errors import ConfigError
from fourmill.labels import Label
from fourmill.modality import CAPTION, LabelContract, Modality
from fourmill.tokenize.base import Codec
from fourmill.tokenize.vqvae import VQVAE, VQConfig
from fourmill.train.generate import UNKNOWN, generate, probabilities
from fourmill.train.model import FourMill
from fourmill.train.predict import average, predict
from fourmill.train.presets import ModalitySpec, ModelConfig

SIZE, ROWS, CODES = 64, 5, 16
DEPTH = LabelContract(form="map", dtype="float32", units="metres", low=1e-3)
NORMAL = LabelContract(form="map", dtype="float32", channels=3, low=-1, high=1, unit_norm=True)
CLASSES = LabelContract(form="map", dtype="uint8", units="class id", classes=("floor", "wall", "box"))


class Words(Codec):
    """Captions as their numbers, and no codebook."""

    family = "words"

    def __init__(self, modality: Modality) -> None:
        self.modality, self.image_size = modality, SIZE

    def encode(self, labels: Any) -> Any:
        raise NotImplementedError

    def decode(self, values: Any) -> list[Label]:
        return [" ".join(str(token) for token in value) for value in values]

    def save(self, folder: Any) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Any, modality: Any, image_size: int) -> Codec:
        raise NotImplementedError


@pytest.fixture(scope="module")
def model() -> FourMill:
    """Random weights, with heads large enough for probabilities that differ."""
    specs = (
        ModalitySpec("caption", "sequence", 220, 12, True, True),
        *(ModalitySpec(name, "grid", CODES, 16, True, True) for name in ("depth", "normal", "rgb", "semseg")),
    )
    made = FourMill(ModelConfig(64, 1, 1, specs, token_std=1.0), seed=0)
    with torch.no_grad():
        made.decoder_tokens.weight.mul_(4)
        made.decoder_tokens.weight[204:220] *= (
            4  # the words of captions, else special tokens are all that is written
        )
    return made.eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return {"rgb": np.random.default_rng(0).integers(0, CODES, (ROWS, 16))}


def codec_of(name: str, contract: LabelContract, codes: int = CODES) -> VQVAE:
    config = VQConfig(
        dim=32, encoder_depth=1, decoder_depth=1, heads=2, latent_dim=8, codebook_size=codes, class_dim=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = VQVAE(Modality(name=name, kind="grid", contract=contract), SIZE, config)
        points = torch.nn.functional.normalize(torch.randn(codes, 8), dim=1)
        codec.network.state_dict()["quantizer.codes"].copy_(points)
    return codec.freeze()


def test_probabilities_are_those_that_greedy_generation_takes(model: FourMill, inputs: Any) -> None:
    shares = probabilities(model, inputs, "depth")
    assert shares.shape == (ROWS, 16, CODES) and shares.dtype == np.float32
    assert np.allclose(shares.sum(-1), 1, atol=1e-5)
    assert np.array_equal(shares.argmax(-1), generate(model, inputs, "depth"))


def test_known_tokens_are_certain(model: FourMill, inputs: Any) -> None:
    known = np.full((ROWS, 16), UNKNOWN)
    known[:, 3] = 7
    shares = probabilities(model, {**inputs, "depth": known}, "depth")
    assert np.array_equal(shares[:, 3], np.eye(CODES)[[7] * ROWS]) and np.allclose(
        shares.sum(-1), 1, atol=1e-5
    )
    assert (shares[:, 4:] < 1).all()
    whole = probabilities(model, {**inputs, "depth": np.full((ROWS, 16), 5)}, "depth")
    assert np.array_equal(whole.argmax(-1), np.full((ROWS, 16), 5)) and whole.sum() == ROWS * 16


def test_probabilities_of_a_sequence_are_refused(model: FourMill, inputs: Any) -> None:
    with pytest.raises(ConfigError, match="'caption' is a sequence"):
        probabilities(model, inputs, "caption")


@pytest.mark.parametrize(("name", "contract"), [("depth", DEPTH), ("normal", NORMAL), ("semseg", CLASSES)])
@pytest.mark.parametrize("how", ["expectation", "sample", "greedy"])
def test_labels_keep_the_contract(
    model: FourMill, inputs: Any, name: str, contract: LabelContract, how: Any
) -> None:
    labels = predict(model, inputs, name, codec_of(name, contract), how=how, samples=3)
    shape = (SIZE, SIZE) if contract.channels is None else (SIZE, SIZE, 3)
    assert len(labels) == ROWS
    assert all(label.shape == shape and label.dtype == contract.dtype for label in labels)
    stack = np.stack(labels)
    assert np.isfinite(stack).all() and len(np.unique(stack)) > 1
    if name == "normal":
        assert np.allclose(np.linalg.norm(stack, axis=-1), 1, atol=1e-5)
    if name == "depth":
        assert stack.min() > 0
    if name == "semseg":
        assert stack.max() < len(contract.classes)


def test_expectation_decodes_the_mean_and_greedy_the_best(model: FourMill, inputs: Any) -> None:
    codec = codec_of("depth", DEPTH)
    expected = codec.decode_expected(probabilities(model, inputs, "depth"))
    assert np.allclose(predict(model, inputs, "depth", codec), expected, rtol=1e-4)
    best = codec.decode(list(generate(model, inputs, "depth")))
    greedy = predict(model, inputs, "depth", codec, how="greedy")
    assert np.allclose(greedy, best, rtol=1e-4)
    assert not np.allclose(greedy, expected, rtol=1e-2)


def test_a_codec_without_a_codebook_decodes_the_best_tokens(model: FourMill, inputs: Any) -> None:
    plain = Words(Modality(name="depth", kind="grid", contract=DEPTH, vocab_size=CODES, num_tokens=16))
    best = generate(model, inputs, "depth")
    assert predict(model, inputs, "depth", plain) == [" ".join(map(str, row)) for row in best]


def test_class_maps_have_no_mean(model: FourMill, inputs: Any) -> None:
    codec = codec_of("semseg", CLASSES)
    labels = predict(model, inputs, "semseg", codec)
    assert np.array_equal(labels, codec.decode(list(generate(model, inputs, "semseg"))))
    assert not np.array_equal(labels, codec.decode_expected(probabilities(model, inputs, "semseg")))


@pytest.mark.parametrize("how", ["expectation", "sample", "greedy"])
def test_rows_do_not_depend_on_how_they_are_batched(model: FourMill, inputs: Any, how: Any) -> None:
    codec = codec_of("depth", DEPTH)
    whole = predict(model, inputs, "depth", codec, how=how, samples=2)
    parts = predict(model, inputs, "depth", codec, how=how, samples=2, batch_size=2)
    assert np.allclose(whole, parts, rtol=1e-4)
    keys = np.arange(ROWS, dtype=np.uint64)[::-1]
    backward = {"rgb": inputs["rgb"][::-1]}
    assert np.allclose(
        whole[::-1], predict(model, backward, "depth", codec, how=how, samples=2, keys=keys), rtol=1e-4
    )


def test_samples_are_drawn_by_seed_and_average_to_the_expectation(model: FourMill, inputs: Any) -> None:
    codec = codec_of("depth", DEPTH)

    def labels(seed: int, samples: int) -> np.ndarray:
        return np.stack(predict(model, inputs, "depth", codec, how="sample", seed=seed, samples=samples))

    one, again, other = labels(0, 1), labels(0, 1), labels(1, 1)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    many = [labels(seed, 64) for seed in (0, 1)]
    spread = np.abs(many[0] - many[1]).mean()
    assert spread < 0.4 * np.abs(one - other).mean()


def test_averages_by_contract() -> None:
    metres = (np.full((1, 2), 1.0, np.float32), np.full((1, 2), 4.0, np.float32))
    assert np.allclose(average(metres, DEPTH), 2.5) and average(metres, DEPTH).dtype == np.float32
    ids = tuple(np.array([[a, b]], np.uint8) for a, b in ((2, 0), (1, 1), (2, 2)))
    assert average(ids, CLASSES).tolist() == [[2, 0]] and average(ids, CLASSES).dtype == np.uint8
    right, up = np.array([[[1.0, 0, 0]]], np.float32), np.array([[[0, 1.0, 0]]], np.float32)
    assert np.allclose(average((right, up), NORMAL), np.array([[[0.5, 0.5, 0]]]) ** 0.5)
    assert np.array_equal(average((right, -right), NORMAL), right)
    grey = LabelContract(form="image", dtype="uint8", channels=3, low=0, high=255)
    levels = tuple(np.full((1, 1), value, np.uint8) for value in (255, 252, 255))
    assert average(levels, grey).tolist() == [[254]]


def test_captions_are_written_token_by_token(model: FourMill, inputs: Any) -> None:
    codec = Words(CAPTION.resolved(vocab_size=220, num_tokens=12))
    texts = predict(model, inputs, "caption", codec, batch_size=2)
    written = generate(model, inputs, "caption")
    assert texts == codec.decode(written) and len(texts) == ROWS and any(texts)
    assert predict(model, inputs, "caption", codec, how="sample") != texts


def test_what_does_not_fit_is_refused(model: FourMill, inputs: Any) -> None:
    with pytest.raises(ConfigError, match="16 tokens below 16, the codec is for 'depth' with 16 below 32"):
        predict(model, inputs, "depth", codec_of("depth", DEPTH, codes=32))
    with pytest.raises(ConfigError, match="the codec is for 'depth'"):
        predict(model, inputs, "normal", codec_of("depth", DEPTH))
    with pytest.raises(ConfigError, match="how is 'mean'"):
        predict(model, inputs, "depth", codec_of("depth", DEPTH), how="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 samples"):
        predict(model, inputs, "depth", codec_of("depth", DEPTH), how="sample", samples=0)
    with pytest.raises(ConfigError, match="no inputs"):
        predict(model, {}, "depth", codec_of("depth", DEPTH))
