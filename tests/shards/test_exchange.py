"""Labels as the published 4M code reads them: against its own inputs, and back again."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import same, some_poses

from fourmill.labels import METADATA, Boxes, Metadata, Palettes, Poses
from fourmill.shards.exchange import captions_of, label_json, label_of

#: inputs that the published code was run with
GOLDEN: dict[str, Any] = json.loads(
    lzma.decompress((Path(__file__).parents[1] / "tokenize" / "data" / "encodings.json.xz").read_bytes())
)
SIZE = (640, 480)


def again(form: str, label: Any, classes: tuple[str, ...] = ()) -> Any:
    return label_of(form, json.loads(json.dumps(label_json(form, label, classes, SIZE))), classes, SIZE)


def test_what_the_published_code_reads_is_read_and_written_the_same() -> None:
    """People: numbers are float32 here, and joints that no one reads are not compared."""
    classes = tuple(sorted({i["class_name"] for case in GOLDEN["detections"] for i in case["instances"]}))
    inside = [
        case
        for case in GOLDEN["detections"]
        if all(0 <= min(i["boxes"]) and max(i["boxes"]) <= 1 for i in case["instances"])
    ]
    assert len(inside) > 10
    for case in inside:
        value = {"instances": case["instances"]}
        written = label_json("boxes", label_of("boxes", value, classes, SIZE), classes, SIZE)
        for found, expected in zip(written["instances"], case["instances"], strict=True):
            assert set(found) == set(expected) and found["class_name"] == expected["class_name"]
            assert np.allclose(found["boxes"], expected["boxes"], atol=1e-7)
    for case in GOLDEN["metadata"]:
        assert (
            label_json("metadata", label_of("metadata", case["input"], (), SIZE), (), SIZE) == case["input"]
        )
    palettes = [case["palettes"] for case in GOLDEN["color_palettes"] if "palettes" in case]
    for value in palettes:
        rounded = [{n: np.rint(colours).astype(int).tolist() for n, colours in value[0].items()}]
        assert label_json("palette", label_of("palette", value, (), SIZE), (), SIZE) == rounded
    assert palettes
    people = 0
    for case in GOLDEN["human_poses"]:
        value, size = json.loads(json.dumps(case["input"])), (case["orig_h_w"][1], case["orig_h_w"][0])
        value.get("pred_smpl_params", {}).pop("body_pose", None)
        written = label_json("poses", label_of("poses", value, (), size), (), size)
        assert set(written) == set(value) and (written == {}) == (value == {})
        for name in ("bbox_xyxy", "pred_cam", "pose_tokenized") if value else ():
            assert np.allclose(written[name], value[name], rtol=1e-5, atol=1e-4), name
            people += 1
        for name in ("global_orient", "betas") if value else ():
            numbers = np.array(value["pred_smpl_params"][name], np.float64)
            assert np.allclose(
                np.reshape(written["pred_smpl_params"][name], numbers.shape), numbers, rtol=1e-5
            )
    assert people > 20


@pytest.mark.parametrize("case", GOLDEN["caption_lists"])
def test_captions_of_every_kind(case: dict[str, Any]) -> None:
    texts = captions_of(case["input"])
    assert texts[case["rand_aug_idx"] or 0] == case["string"]


def test_boxes_of_pixels_are_written_as_floats() -> None:
    """The published code cuts a box of whole numbers to 0 and 1."""
    poses = Poses.of([[0.0, 0.25, 0.5, 1.0]], pose_ids=np.zeros((1, 8)))
    text = json.dumps(label_json("poses", poses, (), SIZE)["bbox_xyxy"])
    assert text == "[[0.0, 120.0, 320.0, 480.0]]"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(0, 4), values=st.dictionaries(
    st.sampled_from(sorted(METADATA)), st.one_of(st.integers(0, 5000), st.floats(0, 300))))  # fmt: skip
def test_everything_comes_back(seed: int, count: int, values: dict[str, float]) -> None:
    rng = np.random.default_rng(seed)
    boxes = Boxes(
        np.sort(rng.random((count, 4)).astype(np.float32)),
        rng.integers(0, 2, count),
        rng.random(count).astype(np.float32),
    )
    assert same(again("boxes", boxes, ("cat", "dog")), boxes)
    assert same(again("metadata", Metadata(values)), Metadata(values))
    order = rng.permutation(7) + 1  # a palette is drawn by its place
    palettes = Palettes(tuple(rng.integers(0, 256, (n, 3)).astype(np.uint8) for n in order))
    assert same(again("palette", palettes), palettes)
    poses = some_poses(rng, count)
    expected = Poses.of(
        poses.xyxy, **{n: getattr(poses, n) for n in ("pose_ids", "orient", "betas", "camera", "body_pose")}
    )
    assert same(again("poses", poses), expected), "but for the order, which is drawn anew"


def test_what_the_published_code_could_not_read_is_refused() -> None:
    one = Palettes((np.zeros((3, 3), np.uint8),))
    with pytest.raises(
        ValueError, match="no palette of 1, 2, 4, 5, 6, 7 colours, and the published code draws"
    ):
        label_json("palette", one, (), SIZE)
    with pytest.raises(ValueError, match="people without tokens of their body pose"):
        label_json("poses", Poses.of([[0, 0, 1, 1]]), (), SIZE)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "instances",
                    "boxes",
                    "class_name",
                    "score",
                    "1",
                    "7",
                    "caption",
                    "brightness",
                    "bbox_xyxy",
                    "pred_smpl_params",
                    "pred_cam",
                    "pose_tokenized",
                    "betas",
                    "global_orient",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(form=st.sampled_from(["boxes", "text", "metadata", "palette", "poses", "scalar"]), value=_JSON)
def test_any_json_is_a_label_or_a_value_error(form: str, value: Any) -> None:
    try:
        label = label_of(form, value, ("cat",), SIZE)
    except ValueError as error:
        assert str(error)
    else:
        assert label is not None
