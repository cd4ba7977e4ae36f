"""Fits of a diffusion decoder: on a frozen encoder, end to end, killed and gone on with; what it decodes, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from fourmill.errors import CheckpointError, ConfigError
from fourmill.labels import Label
from fourmill.modality import RGB, LabelContract, Modality
from fourmill.tokenize.base import codec_hash, load_codec
from fourmill.tokenize.diffusion_network import DiffusionNetwork, encoder_digest
from fourmill.tokenize.fit import check_fit, fit_codec
from fourmill.tokenize.unet import UNET_SIZES
from fourmill.tokenize.vqvae import VQVAE, VQConfig

SIZE = 32


def a_map(name: str, **contract: Any) -> Modality:
    return Modality(
        name=name, kind="grid", codec="vqvae", contract=LabelContract(form="map", dtype="float32", **contract)
    )


DEPTH = a_map("depth", units="metres", low=1e-3)
DISPARITY = a_map("depth", units="relative")
NORMAL = a_map("normal", channels=3, low=-1.0001, high=1.0001, unit_norm=True, flip="mirror_negate_x")
EDGES = Modality(
    name="edges",
    kind="grid",
    codec="vqvae",
    contract=LabelContract(form="map", dtype="uint8", low=0, high=255),
)
SEMSEG = Modality(
    name="semseg", kind="grid", codec="vqvae",
    contract=LabelContract(form="map", dtype="uint8", units="class id", resample="nearest", classes=("a", "b")),
)  # fmt: skip
CLIP = Modality(
    name="clip",
    kind="grid",
    codec="vqvae",
    contract=LabelContract(form="features", dtype="float32", channels=4),
)
FIRST: dict[str, Any] = {
    "preset": "demo", "dim": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "patch_size": 8, "latent_dim": 8,
    "codebook_size": 64, "refine": 0, "batch_size": 8, "steps": 80, "learning_rate": 3e-3,
}  # fmt: skip
#: sizes of a U-Net that takes 10 ms for eight images
UNET: dict[str, Any] = {
    "unet_width": 32,
    "unet_multipliers": [1],
    "unet_blocks": 1,
    "unet_patch": 4,
    "ddim_steps": 4,
}
DECODER: dict[str, Any] = {
    "preset": "demo", "decoder": "diffusion", **UNET, "batch_size": 8, "steps": 120, "learning_rate": 3e-3,
}  # fmt: skip
WHOLE: dict[str, Any] = {
    k: v for k, v in {**FIRST, **DECODER}.items() if k not in ("refine", "decoder_depth")
}


def planes(count: int, seed: int) -> list[Label]:
    """Depth maps of tilted planes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    return [
        np.exp(1 + a * rows + b * columns).astype(np.float32) for a, b in rng.uniform(-0.8, 0.8, (count, 2))
    ]


def fit(out: Path, options: Mapping[str, Any], modality: Modality = DEPTH, **more: Any) -> VQVAE:
    fit_codec(modality, planes(64, 0), planes(16, 1), image_size=SIZE, options=options, out=out, **more)
    codec = load_codec(out, modality, SIZE)
    assert isinstance(codec, VQVAE)
    return codec


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a ViT for a decoder."""
    out = tmp_path_factory.mktemp("first") / "depth"
    fit(out, FIRST)
    return out


def relative_error(codec: VQVAE, labels: list[Label]) -> float:
    decoded = codec.decode(codec.encode(labels))
    return float(np.mean([np.abs(b - a) / a for a, b in zip(labels, decoded, strict=True)]))


def test_a_decoder_for_a_tokenizer_that_exists(first: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    options = {**DECODER, "encoder": str(first), "ema": 0.9}

    def progress(step: int, total: int, figures: dict[str, Any]) -> None:
        losses.append(figures["loss"])

    codec = fit(tmp_path / "made", options, progress=progress)
    untrained = fit(tmp_path / "none", {**options, "steps": 1, "learning_rate": 0.0})
    assert losses[-1] < 0.3 * losses[0]
    held_out = planes(16, 1)
    error, before = relative_error(codec, held_out), relative_error(untrained, held_out)
    mean = np.exp(np.log(np.stack(planes(64, 0))).mean(0))
    trivial = np.mean([np.abs(mean - a) / a for a in held_out])
    assert error < 0.4 * trivial and error < 0.4 * before, (error, trivial, before)
    card = yaml.safe_load((tmp_path / "made" / "card.yaml").read_text())
    assert card["held_out"]["abs_rel"] == pytest.approx(error, abs=1e-3) and card["fit"]["steps_done"] == 120
    assert card["encoder"] == codec_hash(first)[:12]


def test_a_frozen_encoder_keeps_its_tokens_to_the_last_bit(first: Path, tmp_path: Path) -> None:
    base = load_codec(first, DEPTH, SIZE)
    codec = fit(tmp_path / "made", {**DECODER, "encoder": str(first), "steps": 30, "ema": 0.9})
    again = fit(
        tmp_path / "twice",
        {**DECODER, "encoder": str(tmp_path / "made"), "steps": 2, "seed": 4, "precision": "bf16"},
    )
    labels = planes(40, 5)
    tokens = np.stack([np.asarray(v) for v in base.encode(labels)])
    assert len(np.unique(tokens)) > 20
    for other in (codec, again):
        assert np.array_equal(tokens, np.stack([np.asarray(v) for v in other.encode(labels)]))
    old, new = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "made"))
    shared = {k for k in old if not k.startswith(("decoder.", "head.", "from_latent."))}
    assert shared == {k for k in new if not k.startswith("unet.")} and len(shared) > 10
    assert all(torch.equal(old[k], new[k]) for k in shared)
    assert isinstance(base, VQVAE) and isinstance(base.network, DiffusionNetwork) is False
    assert encoder_digest(codec.network) == encoder_digest(base.network) == encoder_digest(again.network)  # type: ignore[arg-type]


def test_an_encoder_is_fitted_first_where_that_is_asked_for(tmp_path: Path) -> None:
    few = {**FIRST, "steps": 20}
    both = fit(tmp_path / "both", {**WHOLE, "refine": 0, "decoder_depth": 1, "steps": 20, "encoder": "first"})
    alone = fit(tmp_path / "alone", few)
    labels = planes(16, 1)
    assert np.array_equal(np.stack(both.encode(labels)), np.stack(alone.encode(labels)))
    assert yaml.safe_load((tmp_path / "both" / "card.yaml").read_text())["encoder"] == "fitted first"


def test_end_to_end_the_codes_learn_too(tmp_path: Path) -> None:
    codec = fit(tmp_path / "made", {**WHOLE, "steps": 90, "relaxed": 0.2})
    held_out = planes(16, 1)
    mean = np.exp(np.log(np.stack(planes(64, 0))).mean(0))
    trivial = np.mean([np.abs(mean - a) / a for a in held_out])
    assert relative_error(codec, held_out) < 0.6 * trivial
    card = yaml.safe_load((tmp_path / "made" / "card.yaml").read_text())
    assert card["held_out"]["perplexity"] > 5 and "encoder" not in card
    network = json.loads((tmp_path / "made" / "config.json").read_text())["network"]
    assert network["decoder"] == "diffusion" and network["unet_width"] == 32 and "refine" not in network
    codec.save(tmp_path / "again")
    assert codec_hash(tmp_path / "again") == codec_hash(tmp_path / "made")


class Stopped(Exception):
    """In the middle of a fit."""


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "whole"])
def test_a_stopped_fit_ends_with_the_same_bytes(frozen: bool, first: Path, tmp_path: Path) -> None:
    options = {**(DECODER | {"encoder": str(first)} if frozen else WHOLE), "ema": 0.9, "relaxed": 0.2}
    options |= {"steps": 26, "checkpoint_steps": 7}

    def stop(step: int, total: int, figures: dict[str, Any]) -> None:
        if step == 20:
            raise Stopped

    with pytest.raises(Stopped):
        fit(tmp_path / "stopped", options, scratch=tmp_path / "scratch", progress=stop)
    assert not (tmp_path / "stopped").exists()
    seen: list[int] = []
    fit(
        tmp_path / "resumed", options, scratch=tmp_path / "scratch",
        progress=lambda step, total, figures: seen.append(step),
    )  # fmt: skip
    assert seen == [20, 26], "it went on behind step 14"
    fit(tmp_path / "whole", options)
    assert codec_hash(tmp_path / "resumed") == codec_hash(tmp_path / "whole")
    cards = [(tmp_path / name / "card.yaml").read_bytes() for name in ("resumed", "whole")]
    assert cards[0] == cards[1]
    fit(tmp_path / "other", {**options, "seed": 3, "steps": 2})
    fit(tmp_path / "third", {**options, "seed": 4, "steps": 2})
    assert codec_hash(tmp_path / "other") != codec_hash(tmp_path / "third")


def test_a_fit_to_another_encoder_is_another_fit(first: Path, tmp_path: Path) -> None:
    """Its state is not found by the name of the first."""
    fit(tmp_path / "second", {**FIRST, "seed": 7, "steps": 20})
    for encoder in (first, tmp_path / "second"):
        options = {**DECODER, "encoder": str(encoder), "steps": 4}
        fit(tmp_path / f"of-{encoder.name}", options, scratch=tmp_path / "scratch")
    assert len(list((tmp_path / "scratch").glob("fit-*"))) == 2


def some_label(modality: Modality, rng: np.random.Generator) -> np.ndarray:
    if modality.name == "edges":
        return rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8)
    if modality.name == "rgb":
        return rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    if modality.name == "normal":
        vectors = rng.normal(size=(SIZE, SIZE, 3))
        return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return rng.uniform(1, 9, (SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize(
    "modality", [RGB, DEPTH, DISPARITY, NORMAL, EDGES], ids=["rgb", "depth", "disparity", "normal", "edges"]
)
def test_what_is_decoded_keeps_its_contract(modality: Modality, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels: list[Label] = [some_label(modality, rng) for _ in range(8)]
    fit_codec(modality, labels, labels[:4], image_size=SIZE, options={**WHOLE, "steps": 4}, out=tmp_path)
    codec = load_codec(tmp_path, modality, SIZE)
    tokens = [np.asarray(v) for v in codec.encode(labels)]
    assert all(t.shape == (16,) and t.dtype == np.uint16 for t in tokens)
    wild = [rng.integers(0, 64, 16).astype(np.uint16) for _ in range(20)]
    decoded = codec.decode(wild)
    for one in decoded:
        assert one.shape == labels[0].shape and one.dtype == labels[0].dtype and np.isfinite(one).all()
        if modality is DEPTH:
            assert one.min() > 0.39 and one.max() < 20.1
        if modality is NORMAL:
            assert np.allclose(np.linalg.norm(one, axis=-1), 1, atol=1e-5)
    alone = codec.decode([wild[17]])[0]
    assert np.allclose(
        alone.astype(float), decoded[17].astype(float), atol=1e-4 if alone.dtype != np.uint8 else 1
    )
    assert isinstance(codec, VQVAE)
    certain = np.eye(64, dtype=np.float32)[np.stack(wild[:2])]
    for one, two in zip(decoded, codec.decode_expected(certain), strict=False):
        assert np.allclose(one.astype(float), two.astype(float), atol=1e-3 if one.dtype != np.uint8 else 1)


def test_the_loss_is_that_of_4m() -> None:
    """Smooth L1 of depth and edges, squares of the rest, between the clean image and the prediction."""
    config = VQConfig(
        dim=32, heads=2, encoder_depth=1, patch_size=8, latent_dim=8, codebook_size=8, decoder="diffusion", unet_width=32,
        unet_multipliers=(1,), unet_blocks=1,
    )  # fmt: skip
    made, target = torch.randn(2, 1, 8, 8) * 3, torch.randn(2, 1, 8, 8)
    for modality, expected in (
        (DEPTH, F.smooth_l1_loss),
        (EDGES, F.smooth_l1_loss),
        (NORMAL, F.mse_loss),
        (RGB, F.mse_loss),
    ):
        codec = VQVAE(modality, SIZE, config)
        assert torch.equal(codec.network.loss(codec.space, made, target), expected(made, target)), (
            modality.name
        )


def test_a_step_is_drawn_from_the_seed_and_sees_its_noise() -> None:
    """The U-Net gets the clean image with as much noise as the drawn step says; at the last step nothing else."""
    config = VQConfig(
        dim=32, heads=2, encoder_depth=1, patch_size=8, latent_dim=8, codebook_size=8, decoder="diffusion", unet_width=32,
        unet_multipliers=(1,), unet_blocks=1,
    )  # fmt: skip
    network = VQVAE(DEPTH, SIZE, config).network
    assert isinstance(network, DiffusionNetwork)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    network.unet.forward = lambda x, steps, condition: seen.append((x, steps)) or x  # type: ignore[method-assign, func-returns-value]
    clean, codes = torch.full((4000, 1, 4, 4), 0.7), torch.zeros(4000, 8, 1, 1)
    for seed in (1, 1, 2):
        network.reconstruct(clean, codes, torch.Generator().manual_seed(seed))
    (x, steps), (again, steps_again), (other, _) = seen
    assert torch.equal(x, again) and torch.equal(steps, steps_again) and not torch.equal(x, other)
    assert steps.min() < 10 and steps.max() > 990 and abs(float(steps.float().mean()) - 499.5) < 20
    share = network.schedule.alphas[steps].float()
    noise = (x[:, 0, 0, 0] - share.sqrt() * 0.7) / (1 - share).sqrt()
    assert abs(float(noise.mean())) < 0.06 and abs(float(noise.std()) - 1) < 0.05
    assert float(network.schedule.alphas[-1]) == 0


WRONG: list[tuple[Modality, dict[str, Any], str]] = [
    (DEPTH, {"decoder": "diffusoin"}, r"tokenizer\.decoder 'diffusoin': known are 'vit', 'diffusion'"),
    (DEPTH, {"decoder": ["diffusion"]}, r"tokenizer\.decoder: expected is a word"),
    (SEMSEG, {"decoder": "diffusion"}, r"modalities\.semseg\.tokenizer\.decoder: 'diffusion' is for images"),
    (CLIP, {"decoder": "diffusion"}, r"modalities\.clip\.tokenizer\.decoder: 'diffusion' is for"),
    (DEPTH, {"decoder": "diffusion", "unet_width": 48}, r"tokenizer\.unet_width 48 must be a multiple of 32"),
    (DEPTH, {"decoder": "diffusion", "unet_width": 0}, r"tokenizer\.unet_width 0 must be at least 1"),
    (
        DEPTH,
        {"decoder": "diffusion", "unet_width": "wide"},
        r"tokenizer\.unet_width: expected is a whole number",
    ),
    (
        DEPTH,
        {"decoder": "diffusion", "unet_width": True},
        r"tokenizer\.unet_width: expected is a whole number",
    ),
    (
        DEPTH,
        {"decoder": "diffusion", "unet_blocks": -1},
        r"tokenizer\.unet_blocks: expected is a whole number",
    ),
    (DEPTH, {"decoder": "diffusion", "unet_multipliers": []}, r"tokenizer\.unet_multipliers \(\)"),
    (
        DEPTH,
        {"decoder": "diffusion", "unet_multipliers": [1, "2"]},
        r"tokenizer\.unet_multipliers: expected is a list",
    ),
    (
        DEPTH,
        {"decoder": "diffusion", "unet_multipliers": 2},
        r"tokenizer\.unet_multipliers: expected is a list",
    ),
    (
        DEPTH,
        {"decoder": "diffusion", "unet_patch": 5},
        r"tokenizer\.unet_patch: image_size 32 is no multiple of 5",
    ),
    (DEPTH, {"decoder": "diffusion", "ddim_steps": 0}, r"tokenizer\.ddim_steps 0 must be 1 to 1000"),
    (
        DEPTH,
        {"decoder": "diffusion", "ddim_steps": float("nan")},
        r"tokenizer\.ddim_steps: expected is a whole",
    ),
    (DEPTH, {"decoder": "diffusion", "refine": 8}, r"tokenizer\.refine: no option of this decoder"),
    (
        DEPTH,
        {"decoder": "diffusion", "unet_widht": 32},
        r"tokenizer\.unet_widht: unknown option.*'unet_width'",
    ),
    (DEPTH, {"unet_width": 32}, r"tokenizer\.unet_width: no option of this decoder"),
    (DEPTH, {"encoder": "first"}, r"tokenizer\.encoder: is for `decoder: diffusion`"),
    (DEPTH, {"decoder": "diffusion", "encoder": 7}, r"tokenizer\.encoder: expected is a folder"),
    (
        DEPTH,
        {"decoder": "diffusion", "encoder": "x", "codebook_size": 9},
        r"tokenizer\.codebook_size: is settled by",
    ),
    (DEPTH, {"dim": "x"}, r"tokenizer\.dim: expected is a whole number, got 'x'"),
    (DEPTH, {"heads": 0}, r"tokenizer\.heads 0 must be at least 1"),
    (DEPTH, {"steps": 0}, r"tokenizer\.steps 0 must be at least 1"),
    (DEPTH, {"learning_rate": "fast"}, r"tokenizer\.learning_rate: expected is a number"),
]


@pytest.mark.parametrize(("modality", "options", "said"), WRONG, ids=lambda v: str(v)[:40])
def test_options_that_cannot_be_are_named(
    modality: Modality, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check_fit(modality, {"preset": "demo", **options}, SIZE)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=said):  # before a label is looked at
        fit_codec(modality, [], [], image_size=SIZE, options={"preset": "demo", **options}, out=tmp_path)


def test_encoders_that_cannot_be_are_named(first: Path, tmp_path: Path) -> None:
    from tokenize_released import write_released

    nowhere = {**DECODER, "encoder": str(tmp_path / "nowhere")}
    with pytest.raises(CheckpointError, match="nowhere"):
        fit(tmp_path / "out", nowhere)
    with pytest.raises(CheckpointError, match="made for modality 'depth', not 'normal'"):
        fit(tmp_path / "out", {**DECODER, "encoder": str(first)}, NORMAL)
    with pytest.raises(ConfigError, match=r"tokenizer\.sizes: the given encoder was fitted at 32, not at 64"):
        fit(tmp_path / "out", {**DECODER, "encoder": str(first), "sizes": [64]})
    released = write_released("depth", tmp_path / "released")
    with pytest.raises(ConfigError, match=r"tokenizer\.encoder: .* is of the family 'published'"):
        fit(tmp_path / "out", {**DECODER, "encoder": str(released)})


def test_the_default_is_the_u_net_of_4m() -> None:
    config = VQConfig(decoder="diffusion")
    assert config.unet == UNET_SIZES["unet_patched"] and config.ddim_steps == 25
