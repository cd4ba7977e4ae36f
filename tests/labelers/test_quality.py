"""The contract gate: what passes, and one case for each way in which a label can be wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fourmill.errors import ContractError
from fourmill.labelers.clip import CLIP
from fourmill.labelers.depth import DEPTH
from fourmill.labelers.det import DET
from fourmill.labelers.normal import NORMAL
from fourmill.labelers.quality import check
from fourmill.labelers.semseg import SEMSEG
from fourmill.labels import Absent, Boxes
from fourmill.modality import CAPTION, RGB, LabelContract, Modality

FRAME = np.zeros((6, 9, 3), np.uint8)
SEG = SEMSEG.with_classes(("floor", "wall", "box"))
OBJECTS = DET.with_classes(("sphere", "box"))
FEATURES = replace(CLIP, contract=replace(CLIP.contract, channels=4))
SCORE = Modality(
    name="score", kind="scalar", contract=LabelContract(form="scalar", dtype="float32", low=0, high=10)
)
GLOBAL = Modality(
    name="global", kind="vector", contract=LabelContract(form="vector", dtype="float32", channels=5)
)


def normals(shape: tuple[int, int] = (6, 9)) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def boxes(**changes: Any) -> Boxes:
    good: dict[str, Any] = {
        "xyxy": np.array([[0, 0.1, 1, 0.5], [0.2, 0, 0.3, 1]], np.float32),
        "class_ids": np.array([0, 1], np.int64),
        "scores": np.array([1, 0], np.float32),
    }
    return Boxes(**{**good, **changes})


def depth(value: float = 2.0, shape: tuple[int, ...] = (6, 9), dtype: Any = np.float32) -> np.ndarray:
    out = np.ones(shape, dtype)
    out[-1, -1] = value
    return out


def ids(value: int = 2) -> np.ndarray:
    return depth(value, dtype=np.uint8)


GOOD = [
    (DEPTH, depth()),
    (NORMAL, normals()),
    (SEG, ids()),
    (SEMSEG, ids(200)),
    (OBJECTS, boxes()),
    (OBJECTS, Boxes.empty()),
    (FEATURES, np.zeros((2, 2, 4), np.float32)),
    (CLIP, np.zeros((2, 2, 77), np.float32)),
    (CAPTION, ["a cat", ""]),
    (RGB, FRAME),
    (SCORE, 3.5),
    (SCORE, np.float32(0)),
    (GLOBAL, np.zeros(5, np.float32)),
    *[(modality, Absent("no truth")) for modality in (DEPTH, OBJECTS, SCORE, CAPTION)],
]


@pytest.mark.parametrize(("modality", "label"), GOOD)
def test_what_keeps_the_contract_passes(modality: Modality, label: Any) -> None:
    check(modality, [label, label], [FRAME, FRAME])


BAD = [
    (DEPTH, None, "is a NoneType, not an array"),
    (DEPTH, depth(dtype=np.float64), "has dtype float64, not float32"),
    (DEPTH, depth(shape=(6, 9, 1)), r"has shape \(6, 9, 1\), not 2 axes"),
    (DEPTH, depth(shape=(9, 6)), r"is 9 x 6, the image is 6 x 9 \(height x width\)"),
    (DEPTH, depth(float("nan")), "has 1 values that are not finite"),
    (DEPTH, depth(float("inf")), "not finite"),
    (DEPTH, depth(0.0), "has the value 0, below 0.01"),
    (NORMAL, normals()[..., :2], "has 2 channels, not 3"),
    (NORMAL, normals() * np.float32(0.99), "length is off one by 0.01"),
    (NORMAL, normals() * np.float32(1.5), "above 1.0001|below -1.0001"),
    (SEG, ids(3), "has class id 3, but there are 3 classes"),
    (SEG, depth(), "has dtype float32, not uint8"),
    (FEATURES, np.zeros((2, 2, 5), np.float32), "has 5 channels, not 4"),
    (FEATURES, np.zeros((0, 2, 4), np.float32), "is empty"),
    (FEATURES, np.full((2, 2, 4), np.nan, np.float32), "16 values that are not finite"),
    (OBJECTS, [[0, 0, 1, 1]], "is a list, not Boxes"),
    (OBJECTS, boxes(xyxy=np.array([[0.5, 0.1, 0.2, 0.5]] * 2, np.float32)), "x1 <= x0"),
    (OBJECTS, boxes(xyxy=np.array([[0.1, 0.5, 0.2, 0.5]] * 2, np.float32)), "y1 <= y0"),
    (
        OBJECTS,
        boxes(xyxy=np.array([[0, 0, 64, 64]] * 2, np.float32)),
        r"outside \[0, 1\]; boxes are normalised",
    ),
    (OBJECTS, boxes(xyxy=np.array([[-0.1, 0, 1, 1]] * 2, np.float32)), r"outside \[0, 1\]"),
    (OBJECTS, boxes(xyxy=np.array([[np.nan, 0, 1, 1]] * 2, np.float32)), r"outside \[0, 1\]"),
    (OBJECTS, boxes(xyxy=np.zeros((3, 4), np.float32)), r"has xyxy float32 \(3, 4\), not float32 \(2, 4\)"),
    (OBJECTS, boxes(scores=np.array([0.5, 1.5], np.float32)), r"score outside \[0, 1\]"),
    (OBJECTS, boxes(scores=np.array([0.5, np.nan], np.float32)), r"score outside \[0, 1\]"),
    (OBJECTS, boxes(scores=np.array([0.5, 0.5])), "has scores float64"),
    (OBJECTS, boxes(class_ids=np.array([0, 2])), r"has class ids 0..2, but there are 2 classes"),
    (OBJECTS, boxes(class_ids=np.array([-1, 1])), r"has class ids -1..1"),
    (CAPTION, "a cat", "is a str, not a list of strings"),
    (CAPTION, ["a cat", None], "not a list of strings"),
    (RGB, depth(), "has dtype float32, not uint8"),
    (RGB, np.zeros((6, 9), np.uint8), "not 3 axes"),
    (SCORE, "3", "is a str, not a number"),
    (SCORE, True, "is a bool, not a number"),
    (SCORE, 11.0, "has the value 11, above 10"),
    (SCORE, float("nan"), "not finite"),
    (GLOBAL, np.zeros((5, 1), np.float32), "not 1 axes"),
]


@pytest.mark.parametrize(("modality", "label", "said"), BAD)
def test_what_breaks_the_contract_is_named(modality: Modality, label: Any, said: str) -> None:
    fine = next(good for known, good in GOOD if known is modality)
    with pytest.raises(ContractError, match=said) as raised:
        check(modality, [fine, label], [FRAME, FRAME], ["img/1", "img/2"], labeler="mine")
    message = str(raised.value)
    assert message.startswith(f"labeler 'mine' of '{modality.name}', img/2: ") and "\n" not in message


def test_the_number_of_labels() -> None:
    with pytest.raises(ContractError, match="labels of 'depth': 1 labels for 2 images"):
        check(DEPTH, [depth()], [FRAME, FRAME])
    check(DEPTH, [], [])


def test_without_keys_the_row_is_named() -> None:
    with pytest.raises(ContractError, match="labels of 'depth', row 1: .*metres"):
        check(DEPTH, [depth(), depth(-1)], [FRAME, FRAME])
