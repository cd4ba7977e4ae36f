from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.labels import Boxes
from fourmill.modality import CAPTION, LabelContract, Modality
from fourmill.tokenize.base import load_codec
from fourmill.tokenize.boxes import BoxesCodec
from fourmill.tokenize.fit import fit_codec
from fourmill.tokenize.text import TextCodec
from fourmill.tokenize.vocabulary import Vocabulary, train_vocabulary

CLASSES = ("sphere", "box", "potted plant")
DET = Modality(
    name="det",
    kind="sequence",
    codec="boxes",
    contract=LabelContract(form="boxes", dtype="float32", classes=CLASSES),
)
VOCABULARY = train_vocabulary(["a red sphere on the floor", "the box"], CLASSES, 4300)
BOXES = BoxesCodec(DET, 64, VOCABULARY)


def boxes(*rows: tuple[float, float, float, float, int]) -> Boxes:
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return Boxes(
        table[:, :4].astype(np.float32), table[:, 4].astype(np.int64), np.ones(len(table), np.float32)
    )


def decode(tokens: list[int]) -> Boxes:
    label = BOXES.decode([np.array(tokens, dtype=np.uint16)])[0]
    assert isinstance(label, Boxes)
    return label


def test_five_tokens_per_box_nearest_to_the_origin_first() -> None:
    (ids,) = BOXES.encode([boxes((0.5, 0.5, 0.75, 1.0, 1), (0.1, 0.2, 0.5, 0.9, 0))])
    words = [VOCABULARY.token(int(i)) for i in np.asarray(ids)]
    assert words == [
        "v0=100", "v1=200", "v2=500", "v3=899", "sphere",
        "v0=500", "v1=500", "v2=749", "v3=999", "box",
    ]  # fmt: skip
    assert np.asarray(ids).dtype == np.uint16


def test_ids_agree_with_the_published_vocabulary() -> None:
    """`v0=100 v1=200 v2=500 v3=899 dog`, as 4M's own code numbers it, with the 80 classes of COCO."""
    things = """airplane apple backpack banana baseball_bat baseball_glove bear bed bench bicycle bird boat book bottle
    bowl broccoli bus cake car carrot cat cell_phone chair clock couch cow cup dining_table dog donut elephant
    fire_hydrant fork frisbee giraffe hair_drier handbag horse hot_dog keyboard kite knife laptop microwave motorcycle
    mouse orange oven parking_meter person pizza potted_plant refrigerator remote sandwich scissors sheep sink
    skateboard skis snowboard spoon sports_ball stop_sign suitcase surfboard teddy_bear tennis_racket tie toaster
    toilet toothbrush traffic_light train truck tv umbrella vase wine_glass zebra"""
    names = tuple(name.replace("_", " ") for name in reversed(things.split()))
    assert len(names) == 80
    vocabulary = train_vocabulary(["a dog"], names, 4300)
    codec = BoxesCodec(DET.with_classes(names), 224, vocabulary)
    (ids,) = codec.encode([boxes((0.1, 0.2, 0.5, 0.9, names.index("dog")))])
    assert np.asarray(ids).tolist() == [304, 1404, 2704, 4103, 4232]
    assert (vocabulary.classes["airplane"], vocabulary.classes["zebra"]) == (4204, 4283)
    assert vocabulary.classes["traffic light"] == 4276


_COORDINATE = st.floats(0, 1, width=32)


@st.composite
def some_boxes(draw: st.DrawFn) -> Boxes:
    rows = []
    for _ in range(draw(st.integers(0, 6))):
        x0, x1 = sorted((draw(_COORDINATE), draw(_COORDINATE)))
        y0, y1 = sorted((draw(_COORDINATE), draw(_COORDINATE)))
        rows.append((x0, y0, x1, y1, draw(st.integers(0, len(CLASSES) - 1))))
    return boxes(*rows)


@settings(max_examples=100, deadline=None)
@given(some_boxes())
def test_boxes_come_back_to_half_a_bin(label: Boxes) -> None:
    decoded = BOXES.decode(BOXES.encode([label]))[0]
    order = np.argsort((label.xyxy[:, :2].astype(np.float64) ** 2).sum(1), kind="stable")
    assert len(decoded) == len(label)
    assert np.array_equal(decoded.class_ids, label.class_ids[order])
    if len(label):
        assert np.abs(decoded.xyxy - label.xyxy[order]).max() <= 0.5 / 999 + 1e-6


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 65535), st.integers(204, 4206)), max_size=40))
def test_any_tokens_decode_to_legal_boxes(tokens: list[int]) -> None:
    label = decode(tokens)
    assert label.xyxy.shape == (len(label), 4) and label.xyxy.dtype == np.float32
    assert len(label.scores) == len(label.class_ids) == len(label)
    if len(label):
        assert label.xyxy.min() >= 0 and label.xyxy.max() <= 1
        assert (label.xyxy[:, :2] <= label.xyxy[:, 2:]).all()
        assert 0 <= label.class_ids.min() and label.class_ids.max() < len(CLASSES)


def test_boxes_are_found_between_rubbish() -> None:
    at = VOCABULARY.coordinate
    good = [at(0, 1), at(1, 2), at(2, 30), at(3, 40), VOCABULARY.classes["box"]]
    assert decode(
        [3, at(1, 5), *good, at(0, 9), *good, 4299, *good[:4], 7, *good[:3]]
    ).class_ids.tolist() == [1, 1]
    inverted = [at(0, 50), at(1, 2), at(2, 30), at(3, 40), VOCABULARY.classes["box"]]
    assert len(decode(inverted)) == 0 and len(decode([])) == 0


def test_a_class_without_a_token_or_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no token for the classes giraffe"):
        BoxesCodec(DET.with_classes((*CLASSES, "giraffe")), 64, VOCABULARY)
    with pytest.raises(ContractError, match="class 3 of 3"):
        BOXES.encode([boxes((0, 0, 1, 1, 3))])
    BOXES.save(tmp_path)
    with pytest.raises(CheckpointError, match="knows the classes"):
        load_codec(tmp_path, DET.with_classes(("sphere", "box")), 64)


def test_boxes_and_captions_survive_saving(tmp_path: Path) -> None:
    label = boxes((0.1, 0.1, 0.6, 0.7, 2))
    BOXES.save(tmp_path / "det")
    loaded = load_codec(tmp_path / "det", DET, 64)
    assert np.array_equal(np.asarray(loaded.encode([label])[0]), np.asarray(BOXES.encode([label])[0]))
    assert loaded.modality.vocab_size == VOCABULARY.size

    options = {"vocabulary": tmp_path / "det"}
    fit_codec(CAPTION, [], [], image_size=64, options=options, out=tmp_path / "caption")
    text = load_codec(tmp_path / "caption", CAPTION, 64)
    assert isinstance(text, TextCodec) and text.modality.num_tokens == 256
    first, second = text.encode([["the red box", "ignored"], "the red box"])
    assert np.array_equal(np.asarray(first), np.asarray(second)) and np.asarray(first).dtype == np.uint16
    assert text.decode([first, np.zeros(0, np.uint16)]) == ["the red box", ""]
    assert len(np.asarray(text.encode([[]])[0])) == 0


def test_a_vocabulary_is_trained_where_none_is_given(tmp_path: Path) -> None:
    options = {
        "vocabulary_captions": ["a sphere", "a box"],
        "vocabulary_classes": ["wall"],
        "vocabulary_size": 4250,
    }
    fit_codec(DET, [], [], image_size=64, options=options, out=tmp_path)
    assert sorted(Vocabulary.load(tmp_path).classes) == ["box", "potted plant", "sphere", "wall"]
    with pytest.raises(ConfigError, match="needs a vocabulary"):
        fit_codec(CAPTION, [], [], image_size=64, options={}, out=tmp_path / "none")
