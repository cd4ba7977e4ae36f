from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fourmill.errors import ConfigError, ContractError
from fourmill.labels import Label
from fourmill.modality import CAPTION, RGB, RGB_PIXELS, LabelContract, Modality
from fourmill.tokenize.base import codec_hash, codecs, load_codec
from fourmill.tokenize.fit import default_config, fit_codec, fit_needed
from fourmill.tokenize.robust import standardise_robustly

SIZE = 32
DEPTH = Modality(
    name="depth", kind="grid", codec="vqvae",
    contract=LabelContract(form="map", dtype="float32", units="metres", low=1e-3),
)  # fmt: skip
CLIP = Modality(
    name="clip",
    kind="grid",
    codec="vqvae",
    contract=LabelContract(form="features", dtype="float32", channels=0),
)
TINY: dict[str, Any] = {
    "preset": "demo", "dim": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "patch_size": 8, "latent_dim": 8,
    "codebook_size": 64, "refine": 0, "batch_size": 8, "steps": 120, "learning_rate": 3e-3,
}  # fmt: skip


def planes(count: int, seed: int) -> list[Label]:
    """Depth maps of tilted planes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    slopes = rng.uniform(-0.8, 0.8, (count, 2))
    return [np.exp(1 + a * rows + b * columns).astype(np.float32) for a, b in slopes]


def test_a_small_fit_learns(tmp_path: Path) -> None:
    train, held_out = planes(64, 0), planes(16, 1)
    losses: list[float] = []
    calls: list[tuple[int, int]] = []

    def progress(step: int, total: int, figures: dict[str, Any]) -> None:
        losses.append(figures["loss"])
        calls.append((step, total))

    out = fit_codec(
        DEPTH, train, held_out, image_size=SIZE, options=TINY, out=tmp_path / "depth", progress=progress
    )
    assert calls[-1] == (120, 120) and losses[-1] < 0.5 * losses[0]
    codec = load_codec(out, DEPTH, SIZE)
    decoded = codec.decode(codec.encode(held_out))
    mean = np.exp(np.log(np.stack(train)).mean(0))
    error = np.mean([np.abs(b - a) / a for a, b in zip(held_out, decoded, strict=True)])
    trivial = np.mean([np.abs(mean - a) / a for a in held_out])
    assert error < 0.5 * trivial
    card = yaml.safe_load((out / "card.yaml").read_text())
    assert card["held_out"]["abs_rel"] == pytest.approx(error, abs=1e-3)
    assert card["held_out"]["codebook_use"] > 0.2 and card["held_out"]["perplexity"] > 5
    assert card["fit"]["steps_done"] == 120


def test_the_same_seed_gives_the_same_tokenizer(tmp_path: Path) -> None:
    options = {**TINY, "steps": 12, "codebook_size": 256}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit_codec(
            DEPTH, planes(8, 0), [], image_size=SIZE, options={**options, "seed": seed}, out=tmp_path / name
        )
    assert codec_hash(tmp_path / "a") == codec_hash(tmp_path / "b") != codec_hash(tmp_path / "c")


def test_a_vector_becomes_a_few_tokens(tmp_path: Path) -> None:
    """Mixtures of three fixed vectors: much closer than the mean of all, and the same from a saved codec."""
    contract = LabelContract(form="vector", dtype="float32", channels=24, low=0.0)
    histogram = Modality(name="histogram", kind="vector", codec="vqvae", contract=contract)
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 1, (3, 24))
    labels: list[Label] = [(rng.dirichlet([0.5] * 3) @ base).astype(np.float32) for _ in range(96)]
    options = {**TINY, "steps": 200}
    out = fit_codec(
        histogram, labels[:80], labels[80:], image_size=SIZE, options=options, out=tmp_path / "histogram"
    )
    codec = load_codec(out, histogram, SIZE)
    assert (codec.modality.num_tokens, codec.modality.vocab_size) == (12, 64)
    decoded = np.stack(codec.decode(codec.encode(labels[80:])))
    error, trivial = (
        float(((other - np.stack(labels[80:])) ** 2).mean())
        for other in (decoded, np.mean(labels[:80], axis=0))
    )
    assert error < 0.4 * trivial
    card = yaml.safe_load((out / "card.yaml").read_text())
    assert 0.3 < card["held_out"]["centred_cosine"] <= card["held_out"]["cosine"] <= 1


def test_features_are_standardised_and_their_grid_comes_from_the_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centre = rng.normal(size=12) * 20
    labels: list[Label] = [(centre + rng.normal(size=(3, 5, 12))).astype(np.float32) for _ in range(16)]
    options = {**TINY, "steps": 10}
    fit_codec(CLIP, labels, labels[:4], image_size=SIZE, options=options, out=tmp_path)
    codec = load_codec(tmp_path, CLIP, SIZE)
    assert codec.modality.num_tokens == 15
    decoded = codec.decode(codec.encode(labels[:2]))
    assert decoded[0].shape == (3, 5, 12) and decoded[0].dtype == np.float32
    assert np.abs(decoded[0] - centre).mean() < 2, "an unfitted decoder is already at the mean"


def test_labels_may_be_lazy(tmp_path: Path) -> None:
    class Lazy(list[Label]):
        def __init__(self) -> None:
            self.read = 0

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: Any) -> Any:
            self.read += 1
            return planes(1, int(index))[0]

    lazy = Lazy()
    fit_codec(DEPTH, lazy, [], image_size=SIZE, options={**TINY, "steps": 2}, out=tmp_path)
    assert lazy.read == 24, "two batches of eight, and one read ahead"


def test_bfloat16_leaves_the_codes_in_float32(tmp_path: Path) -> None:
    options = {**TINY, "steps": 30, "precision": "bf16", "relaxed": 0.2}
    fit_codec(DEPTH, planes(16, 0), planes(8, 1), image_size=SIZE, options=options, out=tmp_path)
    assert yaml.safe_load((tmp_path / "card.yaml").read_text())["held_out"]["abs_rel"] < 1


def test_a_reader_that_fails_ends_the_fit(tmp_path: Path) -> None:
    class Broken(list[Label]):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fit_codec(DEPTH, Broken(planes(4, 0)), [], image_size=SIZE, options=TINY, out=tmp_path)


def test_misspelt_options_are_named(tmp_path: Path) -> None:
    for modality, option, hint in (
        (DEPTH, "codebok_size", "codebook_size"), (CAPTION, "vocabulry", "vocabulary"), (RGB_PIXELS, "qualty", "quality")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"modalities\.{modality.name}\.tokenizer\.{option}.*'{hint}'"):
            fit_codec(modality, planes(2, 0), [], image_size=SIZE, options={option: 1}, out=tmp_path)


def test_a_time_limit_ends_the_fit(tmp_path: Path) -> None:
    options = {**TINY, "steps": 10**9, "minutes": 0.01}
    fit_codec(DEPTH, planes(8, 0), [], image_size=SIZE, options=options, out=tmp_path)
    assert 0 < yaml.safe_load((tmp_path / "card.yaml").read_text())["fit"]["steps_done"] < 10_000


def test_presets() -> None:
    full = default_config(RGB, "4m", 224)
    assert (full.dim, full.encoder_depth, full.decoder_depth, full.latent_dim) == (768, 12, 12, 32)
    assert full.codebook_size == 16384 and full.patch_size == 16
    assert default_config(DEPTH, "4m", 224).codebook_size == 8192
    assert default_config(DEPTH, "demo", 128).normalisation == "log"
    relative = DEPTH.resolved(contract=LabelContract(form="map", dtype="float32", units="disparity"))
    assert default_config(relative, "demo", 128).normalisation == "robust"
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        default_config(RGB, "dmeo", 128)
    with pytest.raises(ConfigError, match=r"modalities\.rgb\.tokenizer\.patch_sise.*patch_size"):
        default_config(RGB, "demo", 128, patch_sise=8)


def test_which_families_need_a_fit() -> None:
    assert {"boxes", "metadata", "pixels", "poses", "published", "text", "vqvae"} <= set(codecs.names())
    assert all(cls.family == name for name, cls in codecs.items())
    assert [fit_needed(m) for m in (RGB, DEPTH, CAPTION, RGB_PIXELS)] == [True, True, False, False]


def test_nothing_to_fit_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no labels to fit on"):
        fit_codec(DEPTH, [], [], image_size=SIZE, options=TINY, out=tmp_path)
    unknown = DEPTH.resolved(codec="runes")
    with pytest.raises(ConfigError, match="'runes'"):
        fit_codec(unknown, planes(2, 0), [], image_size=SIZE, options={}, out=tmp_path)


def test_robust_standardisation_ignores_outliers() -> None:
    rng = np.random.default_rng(0)
    depth = rng.normal(5, 2, (2, 40, 40)).astype(np.float32)
    wild = depth.copy()
    wild[:, :2] = 1e4
    assert np.abs(standardise_robustly(depth)[:, 4:] - standardise_robustly(wild)[:, 4:]).max() < 0.5
    middle = np.sort(depth[0].ravel())[160:-160]
    assert standardise_robustly(depth)[0].ravel()[0] == pytest.approx(
        (depth[0, 0, 0] - middle.mean()) / middle.std(), abs=1e-3
    )
