"""Text-like modalities, string by string and id by id as the public 4M code writes them (tests/tokenize/data).

Ids of special tokens, coordinates and class names are compared always; ids of words where FOURMILL_REFERENCE_VOCABULARY names
that code's vocabulary file. Ours differs where a caption spells a special token, where bodies are mirrored, where a shape lies
beyond its range, and where boxes of people are whole pixels.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourmill.crops import ask, crop_boxes, crop_poses, grid_points
from fourmill.flows.crop_labels import crop_label
from fourmill.labels import Boxes, Instances, Metadata, Palettes, Poses
from fourmill.modality import CAPTION, LabelContract, Modality
from fourmill.tokenize.boxes import BoxesCodec
from fourmill.tokenize.metadata import CHUNK, FIELDS, MetadataCodec
from fourmill.tokenize.palette import PaletteCodec
from fourmill.tokenize.poses import PosesCodec
from fourmill.tokenize.published_releases import COCO_PANOPTIC
from fourmill.tokenize.sam_instances import InstancesCodec
from fourmill.tokenize.text import TextCodec, VocabularyCodec
from fourmill.tokenize.vocabulary import EOS, FIRST_CLASS, WORDS, Vocabulary, train_vocabulary

GOLDEN: dict[str, Any] = json.loads(
    lzma.decompress((Path(__file__).parent / "data" / "encodings.json.xz").read_bytes())
)
REFERENCE = os.environ.get("FOURMILL_REFERENCE_VOCABULARY", "")
CLASSES = sorted(COCO_PANOPTIC[:80])
LAST_CLASS = FIRST_CLASS + len(CLASSES) - 1
OURS = train_vocabulary([case["input"] for case in GOLDEN["captions"]], CLASSES, 6000)
SPECIAL: dict[str, int] = GOLDEN["special_ids"]


def modality(form: Any, classes: tuple[str, ...] = ()) -> Modality:
    contract = LabelContract(form=form, dtype="", classes=classes)
    return Modality(name="x", kind="sequence", contract=contract)


@pytest.fixture(scope="module", params=["ours", "the reference's"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    if request.param == "ours":
        return OURS
    if not REFERENCE:
        pytest.skip("FOURMILL_REFERENCE_VOCABULARY does not name the public vocabulary file: no ids of words")
    path = Path(REFERENCE)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN["tokenizer_sha256"]
    return Vocabulary.load(path)


def as_string(vocabulary: Vocabulary, ids: np.ndarray) -> str:
    return " ".join(vocabulary.token(int(i)) for i in ids)


def in_reference_ids(vocabulary: Vocabulary, ids: np.ndarray) -> list[int]:
    """Ours, with the words that structures are written with renumbered; with the reference's file, just the ids."""
    words = {vocabulary.word(word): SPECIAL[word] for word in WORDS}
    return [words.get((int(i),), int(i)) for i in ids]


def check(codec: VocabularyCodec, label: Any, case: dict[str, Any]) -> None:
    (value,) = codec.encode([label])
    ids = np.asarray(value)
    assert as_string(codec.vocabulary, ids) == case["string"].strip()
    mapped = in_reference_ids(codec.vocabulary, ids)
    assert mapped == case["ids"]
    assert [*mapped, EOS][: codec.modality.num_tokens] == case["ids_eos_truncated"]


def cases(name: str) -> Any:
    return pytest.mark.parametrize("case", GOLDEN[name], ids=range(len(GOLDEN[name])))


# -- vocabulary, captions -----------------------------------------------------------------------------


def test_special_tokens_have_their_ids(vocabulary: Vocabulary) -> None:
    for token, number in SPECIAL.items():
        if number <= LAST_CLASS:
            assert vocabulary.token(number) == token
        elif vocabulary is not OURS:
            assert vocabulary.word(token) == (number,)
        else:
            assert len(vocabulary.word(token)) == 1


def spells_a_special_token(case: dict[str, Any]) -> bool:
    """[UNK] may also stand for a word that is unknown."""
    return any(i != 1 and i < FIRST_CLASS for i in case["ids"]) or "[UNK]" in case["input"]


@cases("captions")
def test_captions(case: dict[str, Any], vocabulary: Vocabulary) -> None:
    (value,) = TextCodec(CAPTION, 224, vocabulary).encode([case["input"]])
    ids = np.asarray(value).tolist()
    if spells_a_special_token(case):
        assert all(i == 1 or i >= FIRST_CLASS for i in ids)
        assert ids != case["ids"]
    elif vocabulary is OURS:
        names = [i for i in ids if FIRST_CLASS <= i <= LAST_CLASS]
        assert names == [i for i in case["ids"] if FIRST_CLASS <= i <= LAST_CLASS]
    else:
        assert ids == case["ids"]
        assert [*ids, EOS][: CAPTION.num_tokens] == case["ids_eos_truncated"]


def test_a_caption_that_spells_special_tokens_stays_text() -> None:
    """There are such cases, and every one of them differs: we are right, a caption must not end a sequence."""
    spelt = [case["input"] for case in GOLDEN["captions"] if spells_a_special_token(case)]
    assert {"[S_1]", "v0=5", "[EOS] [PAD] [UNK] [SOS]"} <= set(spelt) and len(spelt) >= 5
    for text in spelt:
        decoded = OURS.decode_text(OURS.encode_text(text))
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


@cases("caption_lists")
def test_a_crop_has_its_caption_of_a_list(case: dict[str, Any]) -> None:
    index = case["rand_aug_idx"] or 0  # the reference draws one where crops have none of their own
    size = np.array([10, 10])
    caption = crop_label(CAPTION, case["input"], index, np.array([0, 0, 10, 10, 0]), size, 224)
    codec = TextCodec(CAPTION, 224, OURS)
    assert np.array_equal(codec.encode([caption])[0], codec.encode([case["string"]])[0])


# -- detections ---------------------------------------------------------------------------------------


def boxes_of(case: dict[str, Any], least: float = 0.6) -> Boxes:
    found = [x for x in case["instances"] if x["score"] >= least]
    return Boxes(
        np.array([x["boxes"] for x in found], np.float32).reshape(-1, 4),
        np.array([CLASSES.index(x["class_name"]) for x in found], np.int64),
        np.array([x["score"] for x in found], np.float32),
    )


def crop_of(case: dict[str, Any], flip: bool | None = None) -> np.ndarray:
    return np.array([*case["crop_top_left_h_w"], case["flip"] if flip is None else flip], np.int32)


@cases("detections")
def test_detections(case: dict[str, Any], vocabulary: Vocabulary) -> None:
    height, width = case["orig_h_w"]
    label = crop_boxes(boxes_of(case), crop_of(case), (height, width), case.get("min_visibility", 0.0))
    options = {"order": case.get("bbox_order", "distance"), "max_boxes": case.get("det_max_instances", 0)}
    codec = BoxesCodec(modality("boxes", tuple(CLASSES)), 224, vocabulary, **options)
    check(codec, label, case)


# -- metadata, palettes -------------------------------------------------------------------------------


def test_type_ids_of_metadata() -> None:
    assert {name: f"v1={number}" for number, name in enumerate(FIELDS)} == GOLDEN["metadata_id_map"]


@pytest.mark.parametrize("case", GOLDEN["metadata"] + GOLDEN["metadata_shuffled"])
def test_metadata(case: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Chunk by chunk; ours are stored by type id, those of the reference shuffled or as the input has them."""
    codec = MetadataCodec(modality("metadata"), 224, vocabulary)
    ids = np.asarray(codec.encode([Metadata(case["input"])])[0]).reshape(-1, CHUNK)
    by_type = sorted(zip(case["chunk_ids"], case["chunks"], strict=True))
    assert ids.tolist() == [chunk for chunk, _ in by_type]
    assert [as_string(vocabulary, chunk) for chunk in ids] == [text for _, text in by_type]
    order = [by_type.index(pair) for pair in zip(case["chunk_ids"], case["chunks"], strict=True)]
    flat = [*ids[order].reshape(-1).tolist(), EOS][: codec.modality.num_tokens]
    assert flat == [i for chunk in case["chunk_ids_eos_truncated"] for i in chunk]


@cases("color_palettes")
def test_palettes(case: dict[str, Any], vocabulary: Vocabulary) -> None:
    index = case["palette_index"]
    (sizes,) = next(x for x in GOLDEN["color_palettes"] if x["palette_index"] == index and "palettes" in x)[
        "palettes"
    ]
    label = Palettes((np.rint(sizes[str(case["drawn_size"])]).astype(np.uint8),))
    check(PaletteCodec(modality("palette"), 224, vocabulary), label, case)


# -- people -------------------------------------------------------------------------------------------


def poses_of(case: dict[str, Any], as_theirs: bool = False) -> Poses:
    """Boxes normalised to the image. ``as_theirs``: the reference cuts those that come as whole pixels to 0 and 1."""
    made = case["input"]
    if not made:
        return Poses.empty()
    height, width = case["orig_h_w"]
    pixels, body = np.array(made["bbox_xyxy"]), made["pred_smpl_params"]
    boxes = pixels / [width, height, width, height]
    return Poses.of(
        np.trunc(boxes) if as_theirs and pixels.dtype.kind == "i" else boxes,
        pose_ids=made["pose_tokenized"],
        orient=body["global_orient"],
        betas=body["betas"],
        camera=made["pred_cam"],
    )


def with_orders(poses: Poses, case: dict[str, Any]) -> Poses:
    """The drawn orders belong to the people that are left in the crop."""
    return replace(poses, orders=np.array(case["group_permutations"], np.int64).reshape(-1, 4))


def within_range(text: str) -> str:
    """Values of a shape beyond 3 standard deviations are written as the end of the range by us."""
    return re.sub(r"v0=(-?\d+)", lambda found: f"v0={min(max(int(found[1]), 0), 999)}", text)


@cases("human_poses")
def test_people(case: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Not mirrored, as the reference forgets that."""
    label = crop_poses(poses_of(case, as_theirs=True), crop_of(case, flip=False), tuple(case["orig_h_w"]))
    codec = PosesCodec(modality("poses"), 224, vocabulary)
    if within_range(case["string"]) == case["string"]:
        check(codec, with_orders(label, case), case)
    else:  # theirs fell apart into pieces of words
        ids = np.asarray(codec.encode([with_orders(label, case)])[0])
        assert as_string(vocabulary, ids) == within_range(case["string"]).strip()
        assert len(ids) == 39 * len(label) < len(case["ids"])


def test_boxes_in_whole_pixels_are_boxes_too() -> None:
    """The reference writes "none" there, though a person is to be seen: it divides integers in place."""
    case = next(c for c in GOLDEN["human_poses"] if c["note"] == "first person outside the crop")
    assert case["string"] == "none"
    label = crop_poses(poses_of(case), crop_of(case), tuple(case["orig_h_w"]))
    assert label.pose_ids.tolist() == [case["input"]["pose_tokenized"][1]]


@pytest.mark.parametrize("case", [c for c in GOLDEN["human_poses"] if c["flip"]][:6])
def test_boxes_of_people_are_mirrored_with_the_image(case: dict[str, Any]) -> None:
    size = tuple(case["orig_h_w"])
    plain, mirrored = (crop_poses(poses_of(case), crop_of(case, flip), size) for flip in (False, True))
    assert len(plain) == len(mirrored) > 0
    assert np.allclose(mirrored.xyxy[:, [2, 1, 0, 3]], plain.xyxy * [-1, 1, -1, 1] + [1, 0, 1, 0], atol=1e-6)
    assert np.array_equal(mirrored.camera[:, 1], -plain.camera[:, 1])
    assert (mirrored.pose_ids == -1).all() and (plain.pose_ids >= 0).all()


# -- instances ----------------------------------------------------------------------------------------


def instances_of(case: dict[str, Any]) -> Instances:
    yxyx = np.array(case["bbox_ymin_xmin_ymax_xmax"], np.float64).reshape(-1, 4)
    return Instances.of(
        yxyx[:, [1, 0, 3, 2]] / 224,
        [np.array(polygon, np.float64) / 224 for polygon in case["polygons_xy"]],
        np.array(case["token_ids"], np.int64).reshape(-1, 16),
    )


@cases("sam_instances")
def test_instances(case: dict[str, Any], vocabulary: Vocabulary) -> None:
    label = ask(instances_of(case), np.array(case["query_points_xy"]))
    check(InstancesCodec(modality("instances"), 224, vocabulary), label, case)


def test_the_grid_of_points() -> None:
    assert grid_points().tolist() == GOLDEN["sam_grid_query_points_xy"]
