"""Oracles: the source's truth under the same contracts as the networks' labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fourmill.labelers.base import labelers
from fourmill.labelers.quality import check
from fourmill.labels import Absent, Boxes
from fourmill.shards.sources.scenes import DET_CLASSES, SCENE_CLASSES, render

NAMES = ("depth", "normal", "semseg", "det")


def truth_of(scene: Any) -> dict[str, Any]:
    count = len(scene.boxes)
    det = Boxes(scene.boxes, scene.box_classes.astype(np.int64), np.ones(count, np.float32))
    return {"depth": scene.depth, "normal": scene.normal, "semseg": scene.semseg, "det": det}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [64, 96])
def test_truth_keeps_the_contract_also_at_another_decode_size(kit: Any, name: str, size: int) -> None:
    scenes = [render(2000, index, 64) for index in range(3)]
    frames = [np.zeros((size, size, 3), np.uint8) for _ in range(4)]
    labeler = kit.labeler(f"oracle_{name}")
    labeler.load()
    batch = kit.as_batch(frames, truth=[*(truth_of(scene) for scene in scenes), None])
    labels = labeler.label(batch)
    check(labeler.describe(), labels, frames)
    assert labels[3] == Absent("source has no truth")
    if size == 64:
        want = truth_of(scenes[0])[name]
        assert np.array_equal(labels[0].xyxy, want.xyxy) if name == "det" else np.array_equal(labels[0], want)


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_declares_what_the_network_declares(kit: Any, name: str) -> None:
    labeler = kit.labeler(f"oracle_{name}")
    assert labeler.modality is labelers.get(name).modality and labeler.inputs == ("truth",)
    classes = {"semseg": SCENE_CLASSES, "det": DET_CLASSES}.get(name, ())
    assert labeler.describe().contract.classes == tuple(classes)
    assert labeler.describe().resolved() == labeler.modality.with_classes(tuple(classes))


def test_a_source_without_truth(kit: Any) -> None:
    labeler = kit.labeler("oracle_depth")
    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    assert labeler.label(kit.as_batch(frames)) == [Absent("source has no truth")] * 2
    assert (
        labeler.label(kit.as_batch(frames, truth=[{"normal": 1}, None]))
        == [Absent("source has no truth")] * 2
    )


def test_classes_option_is_part_of_the_recipe(kit: Any) -> None:
    labeler = kit.labeler("oracle_semseg", classes=["a", "b"])
    assert labeler.describe().contract.classes == ("a", "b")
    assert labeler.recipe()["params"]["classes"] == ["a", "b"]
