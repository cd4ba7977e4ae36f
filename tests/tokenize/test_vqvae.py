import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.modality import RGB, LabelContract, Modality
from fourmill.tokenize.base import codec_hash, load_codec
from fourmill.tokenize.vqvae import VQVAE, VQConfig, sincos_positions
from fourmill.tokenize.vqvae_network import _patches

SIZE = 32
CLASSES = ("floor", "wall", "sphere")
TINY = VQConfig(
    dim=32,
    encoder_depth=1,
    decoder_depth=1,
    heads=2,
    patch_size=8,
    latent_dim=8,
    codebook_size=32,
    class_dim=4,
)


def grid(name: str, **contract: Any) -> Modality:
    return Modality(name=name, kind="grid", codec="vqvae", contract=LabelContract(**contract))


DEPTH = grid("depth", form="map", dtype="float32", units="metres", low=1e-3)
DISPARITY = grid("disparity", form="map", dtype="float32", units="relative")
NORMAL = grid(
    "normal",
    form="map",
    dtype="float32",
    channels=3,
    low=-1.0001,
    high=1.0001,
    unit_norm=True,
    flip="mirror_negate_x",
)
SEMSEG = grid(
    "semseg",
    form="map",
    dtype="uint8",
    units="class id",
    low=0,
    high=255,
    classes=CLASSES,
    resample="nearest",
)
CLIP = grid("clip", form="features", dtype="float32", channels=0, flip="none")
EDGES = grid("edges", form="map", dtype="uint8", low=0, high=255)
#: 47 numbers: sixteen pieces of three, with one place left over
HISTOGRAM = Modality(
    name="histogram",
    kind="vector",
    codec="vqvae",
    contract=LabelContract(form="vector", dtype="float32", channels=47, low=0.0, high=1.0),
)
ALL = (RGB, DEPTH, DISPARITY, NORMAL, SEMSEG, CLIP, EDGES, HISTOGRAM)


def some_label(modality: Modality, rng: np.random.Generator) -> np.ndarray:
    shape: tuple[int, ...] = (SIZE, SIZE)
    if modality.name == "clip":
        return rng.normal(size=(4, 4, 12)).astype(np.float32)
    if modality.name == "depth":
        return rng.uniform(0.5, 15, shape).astype(np.float32)
    if modality.name == "normal":
        vectors = rng.normal(size=(*shape, 3))
        return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    if modality.name == "semseg":
        return rng.integers(0, 3, shape).astype(np.uint8)
    if modality.name == "disparity":
        return rng.normal(size=shape).astype(np.float32)
    if modality.name == "histogram":
        return rng.uniform(0, 1, 47).astype(np.float32)
    return rng.integers(0, 256, (*shape, 3) if modality.name == "rgb" else shape).astype(np.uint8)


def some_labels(modality: Modality, count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [some_label(modality, rng) for _ in range(count)]


def tiny(modality: Modality, config: VQConfig = TINY, seed: int = 0) -> VQVAE:
    """A codec with random weights and codes."""
    if modality.name == "disparity":
        config = VQConfig(**{**_fields(config), "normalisation": "robust"})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        codec = VQVAE(modality, SIZE, config, grid=(4, 4), channels=12 if modality.name == "clip" else None)
        if "quantizer.codes" in codec.network.state_dict():
            codes = torch.nn.functional.normalize(torch.randn(config.codebook_size, config.latent_dim), dim=1)
            codec.network.state_dict()["quantizer.codes"].copy_(codes)
    return codec.freeze()


def _fields(config: VQConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in VQConfig.__dataclass_fields__}


@pytest.mark.parametrize("modality", ALL, ids=lambda m: m.name)
def test_saved_and_loaded_gives_the_same_bits(modality: Modality, tmp_path: Path) -> None:
    codec, labels = tiny(modality), some_labels(modality)
    codec.save(tmp_path)
    loaded = load_codec(tmp_path, modality, SIZE)
    tokens = codec.encode(labels)
    again = loaded.encode(labels)
    assert np.array_equal(np.stack([np.asarray(t) for t in tokens]), np.stack([np.asarray(t) for t in again]))
    for one, two in zip(codec.decode(tokens), loaded.decode(tokens), strict=True):
        assert np.array_equal(one, two)
    assert loaded.modality.vocab_size == 32 and loaded.modality.num_tokens == 16
    loaded.save(tmp_path / "again")
    assert codec_hash(tmp_path / "again") == codec_hash(tmp_path)


@pytest.mark.parametrize("modality", ALL, ids=lambda m: m.name)
def test_tokens_and_decoded_labels_keep_their_contracts(modality: Modality) -> None:
    codec, labels = tiny(modality), some_labels(modality)
    tokens = [np.asarray(t) for t in codec.encode(labels)]
    assert all(t.shape == (16,) and t.dtype == np.uint16 and t.max() < 32 for t in tokens)
    rng = np.random.default_rng(1)
    for decoded in codec.decode([rng.integers(0, 32, 16).astype(np.uint16) for _ in range(4)]):
        assert decoded.shape == labels[0].shape and decoded.dtype == np.dtype(modality.contract.dtype)
        assert np.isfinite(decoded).all()
        if modality.name == "depth":
            assert decoded.min() > 0.09 and decoded.max() < 201
        if modality.name == "normal":
            assert np.allclose(np.linalg.norm(decoded, axis=-1), 1, atol=1e-5)
        if modality.name == "semseg":
            assert decoded.max() < len(CLASSES)
        if modality.name == "histogram":
            assert decoded.min() >= 0 and decoded.max() <= 1
    assert codec.encode([]) == [] and codec.decode([]) == []


def test_float16_labels_encode_like_float32() -> None:
    codec = tiny(NORMAL)
    kept = [label.astype(np.float16) for label in some_labels(NORMAL)]
    wide = [label.astype(np.float32) for label in kept]
    assert np.array_equal(np.stack(codec.encode(kept)), np.stack(codec.encode(wide)))


@pytest.mark.parametrize("modality", ALL, ids=lambda m: m.name)
def test_what_enters_the_network_comes_out_again(modality: Modality) -> None:
    space, labels = tiny(modality).space, some_labels(modality)
    entered = space.to_network(np.stack(labels))
    if modality.name == "semseg":
        entered = torch.nn.functional.one_hot(entered, 3).permute(0, 3, 1, 2).float()
    out = space.to_labels(entered)
    if modality.name == "disparity":
        labels = [(label - out_label) * 0 + out_label for label, out_label in zip(labels, out, strict=True)]
        assert abs(np.stack(out).mean()) < 0.1 and 0.9 < np.quantile(np.stack(out), 0.9)
    for label, decoded in zip(labels, out, strict=True):
        assert np.allclose(label, decoded, rtol=1e-4, atol=1e-4)


def test_a_flip_follows_the_rule_of_the_modality() -> None:
    chosen = torch.tensor([True, False, False])
    for modality in (RGB, NORMAL, SEMSEG, CLIP):
        space, labels = tiny(modality).space, some_labels(modality)
        flipped = space.flip(space.to_network(np.stack(labels)), chosen)
        expected = labels[0] if modality.name == "clip" else labels[0][:, ::-1]
        if modality.name == "normal":
            expected = expected * np.array([-1, 1, 1], np.float32)
        both = space.to_network(np.stack([expected, *labels[1:]]))
        assert torch.allclose(flipped, both, atol=1e-5), modality.name


def test_fsq_and_refinement_are_options_of_the_network(tmp_path: Path) -> None:
    values = {**_fields(TINY), "quantizer": "fsq", "levels": (4, 4, 3), "refine": 8}
    codec = tiny(RGB, VQConfig(**values))
    assert codec.modality.vocab_size == 48
    codec.save(tmp_path)
    labels = some_labels(RGB)
    assert np.array_equal(
        np.stack(codec.encode(labels)), np.stack(load_codec(tmp_path, RGB, SIZE).encode(labels))
    )


@pytest.mark.parametrize("modality", ALL, ids=lambda m: m.name)
@pytest.mark.parametrize("quantizer", ["cosine", "fsq"])
def test_certain_probabilities_decode_like_tokens(modality: Modality, quantizer: str) -> None:
    values = {**_fields(TINY), "quantizer": quantizer, "levels": (4, 4, 2) if quantizer == "fsq" else ()}
    codec = tiny(modality, VQConfig(**values))
    ids = np.random.default_rng(0).integers(0, 32, (3, 16))
    certain = np.eye(32, dtype=np.float32)[ids]
    for one, two in zip(codec.decode(list(ids)), codec.decode_expected(certain), strict=True):
        assert one.dtype == two.dtype and np.allclose(one, two, atol=1e-4, rtol=1e-4)
    assert codec.decode_expected(certain[:0]) == []


def test_uncertain_probabilities_decode_the_mean_code() -> None:
    codec = tiny(DEPTH)
    codes = codec.network.quantizer.lookup(torch.arange(32).view(1, 1, -1))[0, :, 0].T
    weights = np.random.default_rng(0).dirichlet(np.ones(32), (2, 16))
    latents = torch.einsum("btk,kd->bdt", torch.from_numpy(weights).float(), codes).view(2, -1, 4, 4)
    with torch.inference_mode():
        expected = codec.space.to_labels(codec.network.decode(latents))
    assert np.allclose(codec.decode_expected(weights), expected, rtol=1e-4)
    with pytest.raises(ContractError, match="not 16 places x 32 codes"):
        codec.decode_expected(weights[:, :, :31])


def test_patches_are_laid_out_channel_by_channel() -> None:
    """As `pixel_unshuffle` has them, which the weights of fitted tokenizers know."""
    x = torch.randn(2, 3, 24, 40)
    assert torch.equal(_patches(x, 8), torch.nn.functional.pixel_unshuffle(x, 8).flatten(2).transpose(1, 2))
    assert torch.equal(_patches(x, 1), x.flatten(2).transpose(1, 2)) and _patches(x, 8).is_contiguous()


def test_positions_are_sines_of_row_then_column() -> None:
    table = sincos_positions(3, 5, 8)
    assert table.shape == (15, 8)
    row, column = 2, 3
    at = table[row * 5 + column]
    expected = [f(p * w) for p in (row, column) for f in (np.sin, np.cos) for w in (1, 0.01)]
    assert np.allclose(at.numpy(), expected, atol=1e-6)


def test_another_modality_size_or_class_map_is_refused(tmp_path: Path) -> None:
    tiny(SEMSEG).save(tmp_path)
    with pytest.raises(CheckpointError, match="made for modality 'semseg', not 'depth'"):
        load_codec(tmp_path, DEPTH, SIZE)
    with pytest.raises(CheckpointError, match="image_size 32, the dataset has 64"):
        load_codec(tmp_path, SEMSEG, 64)
    with pytest.raises(CheckpointError, match="knows the classes floor, wall, sphere"):
        load_codec(tmp_path, SEMSEG.with_classes(("wall", "floor", "sphere")), SIZE)


def test_features_of_another_width_are_refused(tmp_path: Path) -> None:
    tiny(CLIP).save(tmp_path)
    wider = CLIP.resolved(contract=LabelContract(form="features", dtype="float32", channels=768))
    with pytest.raises(CheckpointError, match="12 channels, declared are 768"):
        load_codec(tmp_path, wider, SIZE)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    tiny(RGB).save(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors are missing or damaged"):
            load_codec(tmp_path, RGB, SIZE)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors are missing"):
        load_codec(tmp_path, RGB, SIZE)


def test_a_configuration_that_does_not_fit_the_weights_is_named(tmp_path: Path) -> None:
    tiny(RGB).save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "network": {**config["network"], "dim": 64}}))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_codec(tmp_path, RGB, SIZE)
    path.write_text(json.dumps({**config, "network": {**config["network"], "codebook_size": 65537}}))
    with pytest.raises(CheckpointError, match="65537 is more than 65536"):
        load_codec(tmp_path, RGB, SIZE)
    path.write_text(json.dumps({**config, "network": {**config["network"], "depht": 3}}))
    with pytest.raises(CheckpointError, match="depht"):
        load_codec(tmp_path, RGB, SIZE)
    del config["network"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not describe"):
        load_codec(tmp_path, RGB, SIZE)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"codebook_size": 65537}, "uint16"),
        ({"dim": 20}, "multiple of 4 x heads"),
        ({"quantizer": "fsq"}, "needs `levels`"),
        ({"normalisation": "none"}, "neither 'log' nor 'robust'"),
        ({"refine": 8, "patch_size": 6}, "multiple of 4"),
    ],
)
def test_impossible_networks_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        VQConfig(**{**_fields(TINY), **changes})
    assert VQConfig(codebook_size=65536).codes == 65536


def test_wrong_labels_and_tokens_are_refused() -> None:
    codec = tiny(SEMSEG)
    with pytest.raises(ContractError, match=r"shape \(16, 16\)"):
        codec.encode([np.zeros((16, 16), np.uint8)])
    with pytest.raises(ContractError, match="holds class 3"):
        codec.encode([np.full((SIZE, SIZE), 3, np.uint8)])
    with pytest.raises(ContractError, match="ids below 32"):
        codec.decode([np.full(16, 32, np.uint16)])
    with pytest.raises(ContractError, match="16 ids"):
        codec.decode([np.zeros(15, np.uint16)])


def test_maps_that_no_space_takes_are_refused() -> None:
    flow = grid("flow", form="map", dtype="float32", channels=2)
    with pytest.raises(ConfigError, match="`low` and `high`"):
        VQVAE(flow, SIZE, TINY)
    with pytest.raises(ConfigError, match="not grids"):
        VQVAE(grid("tags", form="text", dtype="str"), SIZE, TINY)
    with pytest.raises(ConfigError, match="class names are not known"):
        VQVAE(SEMSEG.with_classes(()), SIZE, TINY)
    with pytest.raises(ConfigError, match="no multiple of patch_size"):
        VQVAE(RGB, 36, TINY)
