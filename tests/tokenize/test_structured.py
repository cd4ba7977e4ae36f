"""Metadata, palettes, people and instances as tokens: what comes back, and what any tokens decode to."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import modality, same, some_instances, some_poses, triangle
from tokenize_released import write_released

from fourmill.crops import (
    INSTANCE_FRAME,
    crop_instances,
    crop_poses,
)
from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.flows.crop_labels import blank_label
from fourmill.labels import METADATA, Metadata, Palettes, Poses
from fourmill.tokenize.base import Value, codecs, load_codec
from fourmill.tokenize.fit import fit_codec
from fourmill.tokenize.metadata import FIELDS, MetadataCodec
from fourmill.tokenize.palette import PaletteCodec
from fourmill.tokenize.poses import BODY_POSE, PosesCodec
from fourmill.tokenize.sam_instances import InstancesCodec, stretched_mask
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vocabulary import EOS, FIRST_COORDINATE, Vocabulary, train_vocabulary

SHIPPED = Path(__file__).parents[2] / "tokenize" / "fitted" / "scenes" / "caption"
OURS = train_vocabulary(["a human by a polygon"], ["dog"], 4300)
OLDER = Vocabulary.load(SHIPPED)  # it spells the words letter by letter
FRAME = np.zeros((6, 9, 3), np.uint8)
SIZE = np.array([100, 200])
WHOLE, MIRRORED = (np.array([0, 0, 100, 200, flip], np.int32) for flip in (0, 1))


FORMS = ("metadata", "palette", "poses", "instances")
CODECS: dict[tuple[str, str], Any] = {
    (form, name): codecs.get(form)(modality(form), 224, vocabulary)  # type: ignore[call-arg]
    for form in FORMS
    for name, vocabulary in (("ours", OURS), ("older", OLDER))
}


def again(codec: Any, label: Any) -> Any:
    return codec.decode(codec.encode([label]))[0]


# -- round trips --------------------------------------------------------------------------------------

_AMOUNTS: dict[str, st.SearchStrategy[float]] = {
    name: st.integers(0, 999) if scale == FIELDS["n_humans"] else st.floats(-5, 300)
    for name, scale in FIELDS.items()
} | {name: st.integers(0, 31_967) for name in ("original_width", "original_height")}
metadata = st.fixed_dictionaries({}, optional=_AMOUNTS).map(Metadata)


@settings(max_examples=100, deadline=None)
@given(metadata)
def test_metadata_comes_back_within_half_a_bin(label: Metadata) -> None:
    codec = CODECS["metadata", "ours"]
    found = again(codec, label)
    assert set(found.values) == set(label.values)
    for name, value in label.values.items():
        scale, back = FIELDS[name], found.values[name]
        if scale.bounds:
            assert scale.to_bin(back) == scale.to_bin(value)
        elif scale.high:
            assert abs(back - min(max(value, 0), scale.high)) <= 0.5 * scale.high / (scale.bins - 1) + 1e-9
        else:
            assert abs(back - value) <= scale.step / 2 and (scale.step > 1 or back == value)
    assert np.array_equal(codec.encode([found])[0], codec.encode([label])[0])


colours = st.integers(1, 7).flatmap(lambda n: st.binary(min_size=3 * n, max_size=3 * n))
palettes = st.lists(colours.map(lambda raw: np.frombuffer(raw, np.uint8).reshape(-1, 3)), max_size=7).map(
    lambda found: Palettes(tuple(found))
)


@settings(max_examples=60, deadline=None)
@given(palettes)
def test_palettes_come_back_exactly(label: Palettes) -> None:
    assert same(again(CODECS["palette", "ours"], label), label)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6), st.sampled_from(["ours", "older"]))
def test_people_come_back_to_half_a_step(seed: int, count: int, name: str) -> None:
    label = some_poses(np.random.default_rng(seed), count)
    codec = CODECS["poses", name]
    found = again(codec, label)
    assert np.array_equal(found.pose_ids, label.pose_ids) and np.array_equal(found.orders, label.orders)
    for part, span in (("xyxy", 1), ("orient", 2), ("betas", 6), ("camera", 20)):
        assert np.abs(getattr(found, part) - getattr(label, part)).max(initial=0) <= 0.5 * span / 999 + 2e-6
    assert np.array_equal(codec.encode([found])[0], codec.encode([label])[0])
    assert name == "older" or len(codec.encode([label])[0]) == (39 * count or 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6), st.sampled_from(["ours", "older"]))
def test_instances_come_back_to_the_pixel(seed: int, count: int, name: str) -> None:
    label = some_instances(np.random.default_rng(seed), count)
    codec = CODECS["instances", name]
    found = again(codec, label)
    assert np.array_equal(found.points, label.points)
    assert [len(hit) for hit in found.hits] == [len(hit) for hit in label.hits]
    for ours, theirs in zip(found.hits, label.hits, strict=True):
        assert np.abs(found.xyxy[ours] - label.xyxy[theirs]).max(initial=0) <= 0.5 / INSTANCE_FRAME + 1e-6
        assert np.array_equal(found.mask_ids[ours], label.mask_ids[theirs])
    assert np.array_equal(codec.encode([found])[0], codec.encode([label])[0])


def test_values_beyond_their_range_are_its_ends() -> None:
    label = Poses.of([[-0.5, 0, 2, 1]], pose_ids=[range(8)], betas=[[9, -9] * 5], camera=[[-2, 20, 0]])
    found = again(CODECS["poses", "ours"], label)
    assert np.allclose(found.betas, [[3, -3] * 5]) and np.allclose(found.camera, [[-1, 19, 0]], atol=0.011)
    assert np.array_equal(found.xyxy, [[0, 0, 1, 1]])
    many = Metadata({"n_humans": 5000, "original_width": 10**6, "entropy": -3.0, "aesthetic_score": 99})
    values = {
        "original_width": 999 * 32 + 16,
        "n_humans": 999,
        "entropy": 0.5 * 10 / 49,
        "aesthetic_score": 6.0,
    }
    assert again(CODECS["metadata", "ours"], many).values == pytest.approx(values)


# -- decoding is total --------------------------------------------------------------------------------


def pieces(form: str) -> st.SearchStrategy[list[int]]:
    """Rubbish, coordinates, words, and cut-off parts of what is right."""
    rng = np.random.default_rng(5)
    right: dict[str, Any] = {
        "metadata": Metadata({"n_humans": 2, "entropy": 3.0}),
        "palette": Palettes((np.full((2, 3), 9, np.uint8),)),
        "poses": some_poses(rng, 2),
        "instances": some_instances(rng, 5),
    }
    good = np.asarray(CODECS[form, "ours"].encode([right[form]])[0]).tolist()
    words = [OURS.word(word)[0] for word in ("human", "pose", "shape", "point", "polygon", "none")]
    part = st.tuples(st.integers(0, len(good)), st.integers(0, len(good))).map(
        lambda ends: good[min(ends) : max(ends)]
    )
    one = st.one_of(
        st.integers(0, 65535), st.integers(FIRST_COORDINATE, FIRST_COORDINATE + 4000), st.sampled_from(words)
    )
    return st.lists(st.one_of(one.map(lambda i: [i]), part), max_size=20).map(
        lambda lists: list(chain(*lists))
    )


def check_valid(form: str, label: Any) -> None:
    if form == "metadata":
        assert set(label.values) <= set(METADATA) and all(
            np.isfinite(v) and v >= 0 for v in label.values.values()
        )
    elif form == "palette":
        assert all(c.dtype == np.uint8 and c.shape[1:] == (3,) and 1 <= len(c) <= 7 for c in label.colours)
    else:
        xyxy = label.xyxy
        assert xyxy.shape == (len(label), 4) and (xyxy >= 0).all() and (xyxy <= 1).all()
        assert (xyxy[:, :2] <= xyxy[:, 2:]).all()
        ids = label.pose_ids if form == "poses" else label.mask_ids
        assert ids.shape == (len(label), 8 if form == "poses" else 16) and ((ids >= 0) & (ids < 1024)).all()
    if form == "poses":
        assert (np.sort(label.orders, axis=1) == np.arange(4)).all()
        assert np.isfinite(label.betas).all() and np.isfinite(label.camera).all()
    if form == "instances":
        assert len(label.hits) == len(label.points) and ((label.points >= 0) & (label.points < 1)).all()
        assert all(((hit >= 0) & (hit < len(label))).all() for hit in label.hits)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_tokens_decode_to_something_valid(form: str, data: st.DataObject) -> None:
    tokens = data.draw(pieces(form))
    for name in ("ours", "older"):
        codec = CODECS[form, name]
        (label,) = codec.decode([np.array(tokens, np.int64)])
        check_valid(form, label)
        assert (
            same(again(codec, label), label) or form == "instances"
        )  # those that no point hits are not written


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_and_nothing_found_are_the_same(form: str) -> None:
    codec, empty = CODECS[form, "ours"], blank_label(modality(form), 224)
    assert same(codec.decode([np.zeros(0, np.uint16)])[0], empty)
    assert same(again(codec, empty), empty)


def test_structures_are_found_between_rubbish_and_end_at_eos() -> None:
    at, codec = OURS.coordinate, CODECS["palette", "ours"]
    red = [at(1, 1), at(0, 255), at(0, 0), at(0, 0)]
    tokens = [
        at(1, 2),
        *red,
        at(0, 9),
        7,
        at(1, 8),
        *red,
        at(1, 1),
        at(0, 256),
        at(0, 0),
        at(0, 0),
        EOS,
        *red,
    ]
    assert [c.tolist() for c in codec.decode([np.array(tokens)])[0].colours] == [[[255, 0, 0]]] * 2
    person = np.asarray(CODECS["poses", "ours"].encode([some_poses(np.random.default_rng(0), 1)])[0]).tolist()
    found = CODECS["poses", "ours"].decode([np.array([*person[:20], *person, 5, *person, *person[:38]])])[0]
    assert len(found) == 2
    twice = [
        at(1, 5),
        at(0, 3),
        at(1, 5),
        at(0, 4),
        at(1, 21),
        at(0, 1),
        at(1, 19),
        at(0, 2),
        at(1, 9),
        at(0, 50),
    ]
    assert CODECS["metadata", "ours"].decode([np.array(twice)])[0].values == {"n_humans": 3}


# -- tokenizers inside tokenizers ---------------------------------------------------------------------


class Bodies(VocabularyCodec):
    """Stands for the published tokenizer: its ids say where the elbow's rotation points."""

    family = "metadata"

    def __init__(self) -> None:
        self.modality, self.image_size = BODY_POSE.resolved(num_tokens=8, vocab_size=1024), 224

    def encode(self, labels: Any) -> list[Value]:
        return [np.round(511 + 511 * label[:8]).astype(np.uint16) for label in labels]

    def decode(self, values: Any) -> list[Any]:
        return [np.zeros(207, np.float32) for _ in values]


def test_mirrored_bodies_are_tokenized_again() -> None:
    rng = np.random.default_rng(3)
    label = replace(some_poses(rng, 2), body_pose=rng.uniform(-1, 1, (2, 23, 3, 3)).astype(np.float32))
    mirrored = crop_poses(label, MIRRORED, (100, 200))
    with pytest.raises(ContractError, match=r"modalities\.poses\.tokenizer\.pose_tokenizer"):
        CODECS["poses", "ours"].encode([mirrored])
    codec = PosesCodec(modality("poses"), 224, OURS, Bodies())
    found = again(codec, mirrored)
    expected = Bodies().encode([mirrored.body_pose[row].reshape(-1) for row in range(2)])
    assert np.array_equal(found.pose_ids, np.stack([np.asarray(v) for v in expected]))
    assert np.array_equal(again(codec, label).pose_ids, label.pose_ids)  # those that are given stay
    assert found.body_pose.shape == (2, 23, 3, 3) and np.isfinite(found.body_pose).all()


def test_a_mask_tokenizer_lies_in_the_folder(tmp_path: Path) -> None:
    release = write_released("sam_mask", tmp_path / "release")
    options = {"vocabulary": SHIPPED, "mask_tokenizer": str(release)}
    kind = modality("instances")
    fit_codec(kind, [], [], image_size=224, options=options, out=tmp_path / "made")
    names = {file.name for file in (tmp_path / "made").iterdir()}
    assert names == {"config.json", "vocab.json", "card.yaml", "mask_config.json", "mask_model.safetensors"}
    codec = load_codec(tmp_path / "made", kind, 224)
    assert isinstance(codec, InstancesCodec) and codec.inner is not None and codec.modality.num_tokens == 290
    label = crop_instances(triangle((0.25, 0.2), (0.75, 0.2), (0.25, 0.8)), MIRRORED, (100, 200))
    mask = stretched_mask(label.polygons[0], label.xyxy[0])
    assert mask.shape == (64, 64) and mask[0].all() and mask[-1, -1] == 1 and mask[-1, 0] == 0
    assert 0.45 < mask.mean() < 0.55
    found = again(codec, label)
    assert np.array_equal(found.mask_ids, [np.asarray(codec.inner.encode([mask])[0])])
    assert len(found) == 1


def test_a_tokenizer_of_other_parts_is_refused(tmp_path: Path) -> None:
    other = Bodies()
    other.modality = other.modality.resolved(num_tokens=16)
    with pytest.raises(CheckpointError, match="gives 16 tokens below 1024; 8 below 1024"):
        PosesCodec(modality("poses"), 224, OURS, other)


# -- as every other modality --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_family_is_set_up_without_a_fit(form: str, tmp_path: Path) -> None:
    options = {"vocabulary_captions": ["a dog"], "vocabulary_size": 4400}
    fit_codec(modality(form), [], [], image_size=224, options=options, out=tmp_path)
    codec = load_codec(tmp_path, modality(form), 224)
    assert codec.family == form and not codec.needs_fit
    expected = {"metadata": 40, "palette": 23, "poses": 275, "instances": 290}
    assert codec.modality.num_tokens == expected[form]
    with pytest.raises(ConfigError, match="unknown option"):
        fit_codec(modality(form), [], [], image_size=224, options={**options, "colour": 1}, out=tmp_path)


def test_a_vocabulary_that_cannot_spell_is_refused() -> None:
    tiny = train_vocabulary([], ["dog"], 4207)
    with pytest.raises(CheckpointError, match="cannot spell the word"):
        PosesCodec(modality("poses"), 224, tiny)
    assert not PaletteCodec(modality("palette"), 224, tiny).decode([np.arange(5000)])[0].colours
    assert MetadataCodec(modality("metadata"), 224, tiny).decode([np.arange(5000)])[0].values is not None
