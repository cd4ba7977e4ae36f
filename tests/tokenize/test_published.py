"""The released tokenizers as codecs: from the labels of our contracts to the reference's tokens and back."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenize_released import DATA, MARGIN, arrays_of, config_of, folder_of, write_released

from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.licenses import terms
from fourmill.modality import RGB, LabelContract, Modality
from fourmill.tokenize import published
from fourmill.tokenize.base import codec_hash, load_codec
from fourmill.tokenize.published import PublishedCodec
from fourmill.tokenize.published_releases import COCO_PANOPTIC, RELEASES, release_for
from fourmill.tokenize.published_spaces import standardise


def grid(name: str, **contract: Any) -> Modality:
    return Modality(name=name, kind="grid", codec="vqvae", contract=LabelContract(**contract))


DEPTH = grid("depth", form="map", dtype="float32", units="metres", low=0.01)
NORMAL = grid("normal", form="map", dtype="float32", channels=3, low=-1.0001, high=1.0001, unit_norm=True)
CLASSES = tuple(f"class {i}" for i in range(23))
SEMSEG = grid("semseg", form="map", dtype="uint8", units="class id", low=0, high=255, classes=CLASSES)
CLIP = grid("clip", form="features", dtype="float32", channels=0, flip="none")
EDGES = grid("canny_edge", form="map", dtype="uint8", low=0, high=255)
GLOBAL = replace(grid("dinov2_global", form="vector", dtype="float32", channels=48), kind="vector")
MASK = grid("sam_mask", form="map", dtype="uint8", low=0, high=1)
SIZE = {"depth": 64, "divae": 64, "semseg": 64, "clip_like": 128, "global_memcodes": 224, "sam_mask": 224}


def load(name: str, modality: Modality, folder: Path) -> PublishedCodec:
    codec = load_codec(write_released(name, folder), modality, SIZE[name])
    assert isinstance(codec, PublishedCodec)
    codec.steps = 2
    return codec


def golden(name: str, tag: str = "") -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in arrays_of(folder_of(name) / "io.npz", tag).items()}


def same_tokens(ours: list[Any], io: dict[str, np.ndarray]) -> bool:
    clear = io["token_margin"].reshape(len(ours), -1) >= MARGIN
    return bool((np.stack(ours) == io["tokens"].reshape(len(ours), -1))[clear].all())


def test_depth_in_metres(tmp_path: Path) -> None:
    """Tokens are those of the standardised map at any scale and shift."""
    codec, io = load("depth", DEPTH, tmp_path), golden("depth", "r64|")
    assert (codec.modality.vocab_size, codec.modality.num_tokens) == (128, 64)
    labels = [np.float32(0.7) * m + 5 for m in io["input"][:, 0]]
    again = [np.float32(13) * m + 90 for m in labels]
    encoded = codec.encode(labels)
    stacked = np.stack([np.asarray(ids) for ids in encoded])
    assert stacked.dtype == np.uint16 and stacked.shape == (2, 64)
    assert (stacked == np.stack([np.asarray(ids) for ids in codec.encode(again)])).mean() > 0.95
    direct = codec.network.tokens(torch.from_numpy(standardise(io["input"][:, 0]))[:, None])
    assert np.array_equal(stacked, direct.flatten(1).numpy())


def test_decoded_depth_says_that_it_has_no_scale(tmp_path: Path) -> None:
    codec, io = load("depth", DEPTH, tmp_path), golden("depth", "r64|")
    assert codec.modality.contract.units.startswith("relative")
    decoded = codec.decode(list(io["tokens"].reshape(2, -1).astype(np.uint16)))
    for ours, theirs in zip(decoded, io["decoded"][:, 0], strict=True):
        assert ours.min() == 1
        np.testing.assert_allclose(ours - ours.mean(), theirs - theirs.mean(), atol=1e-4)
    resolved_again = load_codec(tmp_path, codec.modality, 64)
    assert resolved_again.modality == codec.modality


def test_standardisation_is_the_reference_s() -> None:
    """It is its own fixed point: standardised maps stay as they are."""
    maps = np.concatenate(list(golden_depth()))
    np.testing.assert_allclose(standardise(maps), maps, atol=1e-4)
    np.testing.assert_allclose(standardise(3 + 0.2 * maps), maps, atol=2e-3)  # 1e-6 beside a smaller variance
    assert np.array_equal(standardise(np.full((1, 4, 4), 7.0)), np.zeros((1, 4, 4), np.float32))


def golden_depth() -> Iterator[np.ndarray]:
    with np.load(DATA / "standardised_depth.npz", allow_pickle=False) as arrays:
        yield from [arrays[name] for name in arrays]


def test_pixels_with_the_diffusion_decoder(tmp_path: Path) -> None:
    codec, io = load("divae", RGB, tmp_path), golden("divae")
    images = np.rint((io["image"].clip(-1, 1).transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)
    ids = codec.encode(list(images))
    direct = codec.network.tokens(torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1))
    assert np.array_equal(np.stack(ids), direct.flatten(1).numpy())
    both = codec.decode(ids)
    assert both[0].shape == (64, 64, 3) and both[0].dtype == np.uint8 and both[0].std() > 1
    alone = codec.decode(ids[1:])[0].astype(int)
    assert np.abs(alone - both[1]).max() <= 1 and not np.array_equal(both[0], both[1])


def test_normals_are_turned_into_the_published_frame(tmp_path: Path) -> None:
    codec = load("divae", NORMAL, tmp_path)
    up = np.broadcast_to(np.array([0, 1, 0], np.float32), (64, 64, 3))
    network_input = codec.space.to_network(up[None])
    assert network_input[0, :, 0, 0].tolist() == [0, -1, 0]  # y points down there
    assert np.array_equal(codec.space.to_labels(network_input)[0], up)
    decoded = codec.decode(codec.encode([up]))[0]
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=-1), 1, atol=1e-5)


def test_grey_edges_go_to_three_channels(tmp_path: Path) -> None:
    codec = load("divae", EDGES, tmp_path)
    edges = np.zeros((64, 64), np.uint8)
    edges[::7] = 255
    entered = codec.space.to_network(edges[None])
    assert entered.shape == (1, 3, 64, 64) and entered.unique().tolist() == [-1, 1]
    assert np.array_equal(codec.space.to_labels(entered)[0], edges)
    decoded = codec.decode(codec.encode([edges]))[0]
    assert decoded.shape == (64, 64) and decoded.dtype == np.uint8


def test_classes_stand_behind_none(tmp_path: Path) -> None:
    codec, io = load("semseg", SEMSEG, tmp_path), golden("semseg", "r64|")
    shifted = io["input"].astype(np.int64) - 1  # theirs: 0 is none; ours: none is 255
    labels = np.where(shifted < 0, 255, shifted).astype(np.uint8)
    assert same_tokens(codec.encode(list(labels)), io)
    decoded = codec.decode(list(io["tokens"].reshape(len(labels), -1).astype(np.uint16)))
    assert np.array_equal(decoded[0], io["decoded"][0, 1:].argmax(0).astype(np.uint8))
    assert max(int(d.max()) for d in decoded) < len(CLASSES)
    with pytest.raises(ContractError, match="class 23, there are 23"):
        codec.encode([np.full((64, 64), 23, np.uint8)])


def test_features(tmp_path: Path) -> None:
    codec, io = load("clip_like", CLIP, tmp_path), golden("clip_like", "r8|")
    assert codec.modality.num_tokens == 64
    labels = list(io["input"].transpose(0, 2, 3, 1))
    assert same_tokens(codec.encode(labels), io)
    decoded = codec.decode(list(io["tokens"].reshape(2, -1).astype(np.uint16)))
    np.testing.assert_allclose(np.stack(decoded), io["decoded"].transpose(0, 2, 3, 1), atol=3e-5)
    with pytest.raises(ContractError, match="takes \\(8, 8, 48\\)"):
        codec.encode([np.zeros((7, 7, 48), np.float32)])


def test_a_global_vector_is_sixteen_tokens(tmp_path: Path) -> None:
    codec, io = load("global_memcodes", GLOBAL, tmp_path), golden("global_memcodes", "v|")
    assert (codec.modality.vocab_size, codec.modality.num_tokens) == (32, 16)
    assert same_tokens(codec.encode(list(io["input"][:, :, 0, 0])), io)
    decoded = codec.decode(list(io["tokens"].reshape(6, -1).astype(np.uint16)))
    np.testing.assert_allclose(np.stack(decoded), io["decoded"][:, :, 0, 0], atol=3e-5)


def test_the_mask_of_an_instance_has_its_own_size(tmp_path: Path) -> None:
    codec, io = load("sam_mask", MASK, tmp_path), golden("sam_mask", "r64|")
    assert codec.modality.num_tokens == 16
    assert same_tokens(codec.encode(list(io["input"][:, 0].astype(np.uint8))), io)
    decoded = codec.decode(list(io["tokens"].reshape(len(io["tokens"]), -1).astype(np.uint16)))
    assert np.array_equal(np.stack(decoded), io["decoded"][:, 0] > 0)


def test_saving_gives_the_released_form_again(tmp_path: Path) -> None:
    codec, io = load("depth", DEPTH, tmp_path / "a"), golden("depth", "r64|")
    codec.save(tmp_path / "b")
    again = load_codec(tmp_path / "b", DEPTH, 64)
    assert same_tokens(
        again.encode(list(io["input"][:, 0])),
        {**io, "tokens": np.array(codec.encode(list(io["input"][:, 0])))},
    )
    codec.save(tmp_path / "c")
    assert codec_hash(tmp_path / "b") == codec_hash(tmp_path / "c")
    assert {file.name for file in (tmp_path / "b").iterdir()} == {"config.json", "model.safetensors"}


def test_the_licence_is_shown_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "_shown", set())
    codec = load("depth", DEPTH, tmp_path)
    assert capfd.readouterr().err.count("non-commercial") == 1
    load_codec(tmp_path, DEPTH, 64)
    assert capfd.readouterr().err == ""
    assert codec.license is not None and terms(codec.license) == "non-commercial"


def test_there_is_one_for_each_modality_of_4m() -> None:
    assert len({release.name for release in RELEASES.values()}) == 12
    named = replace(grid("d", form="map", dtype="float32"), reference_name="tok_depth@224")
    assert release_for(named).repository == "EPFL-VILAB/4M_tokenizers_depth_8k_224-448"
    with pytest.raises(
        ConfigError, match="no published tokenizer for modality 'chroma'; there are for rgb, depth"
    ):
        release_for(grid("chroma", form="map", dtype="float32"))


@pytest.mark.parametrize(
    ("name", "modality", "size", "message"),
    [
        (
            "depth",
            NORMAL,
            64,
            "takes 1 channels, a tokenizer of 'normal' takes 3; take EPFL-VILAB/4M_tokenizers_normal",
        ),
        ("divae", SEMSEG, 64, "takes other labels than 'semseg' has"),
        ("semseg", DEPTH, 64, "takes other labels than 'depth' has"),
        ("depth", DEPTH, 60, "image_size 60 is no multiple of its patch_size 8"),
        ("semseg", SEMSEG.with_classes(CLASSES[1:]), 64, "knows 23 classes, 'semseg' here has 22"),
        ("clip_like", replace(CLIP, contract=replace(CLIP.contract, channels=12)), 128, "takes 48 channels"),
        ("clip_like", replace(GLOBAL, name="clip"), 128, "labels of the form 'features'"),
    ],
)
def test_another_modality_is_refused(
    name: str, modality: Modality, size: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_codec(write_released(name, tmp_path), modality, size)


@pytest.mark.parametrize(
    ("changes", "modality", "folder", "message"),
    [
        (
            {"enc_type": "vit_b_enc", "codebook_size": 16384, "n_channels": 3},
            NORMAL,
            "t",
            "has 1 x 16384 codes, that of 'normal' has 1 x 8192",
        ),
        ({}, DEPTH, "4M_tokenizers_normal_8k_224-448", "is the tokenizer of normal; for 'depth' take"),
        (
            {},
            DEPTH,
            "models--EPFL-VILAB--4M_tokenizers_rgb_16k_224-448/snapshots/0123",
            "is the tokenizer of rgb",
        ),
    ],
)
def test_a_release_for_another_modality_is_refused(
    changes: dict[str, Any], modality: Modality, folder: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_codec(write_released("depth", tmp_path / folder, **changes), modality, 64)


def test_the_classes_of_coco_are_checked_by_name() -> None:
    from fourmill.tokenize.published_network import ReleasedConfig
    from fourmill.tokenize.published_spaces import NumberedClasses

    config = ReleasedConfig.from_mapping({**config_of("semseg"), "n_labels": 134})
    plain = tuple(name.replace("-merged", "").replace("-other", "") for name in COCO_PANOPTIC)
    assert NumberedClasses(SEMSEG.with_classes(plain), config).num_classes == 133
    swapped = (COCO_PANOPTIC[1], COCO_PANOPTIC[0], *COCO_PANOPTIC[2:])
    with pytest.raises(ConfigError, match="'person' at 0; 'semseg' here has 'bicycle' there"):
        NumberedClasses(SEMSEG.with_classes(swapped), config)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "other", "text"])
def test_damaged_weights_are_one_clear_error(damage: str, tmp_path: Path) -> None:
    weights = write_released("depth", tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    elif damage == "other":
        write_released("semseg", tmp_path / "other")
        weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    else:
        weights.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"{" * 40}[damage])
    expected = "has the shape|the weights lack" if damage == "other" else "missing or damaged"
    with pytest.raises(CheckpointError, match=expected) as error:
        load_codec(tmp_path, DEPTH, 64)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_config_of_neither_kind_is_refused(tmp_path: Path) -> None:
    write_released("depth", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 3}))
    with pytest.raises(CheckpointError, match="names no `family`"):
        load_codec(tmp_path, DEPTH, 64)
    (tmp_path / "config.json").write_text(json.dumps({**config_of("depth"), "codebook_size": 1 << 17}))
    with pytest.raises(CheckpointError, match="config.json asks for"):
        load_codec(tmp_path, DEPTH, 64)


def test_ids_out_of_range_are_refused(tmp_path: Path) -> None:
    codec = load("depth", DEPTH, tmp_path)
    assert codec.encode([]) == codec.decode([]) == []
    for ids in (np.full(64, 128, np.uint16), np.zeros(63, np.uint16)):
        with pytest.raises(ContractError, match="64 ids below 128"):
            codec.decode([ids])
