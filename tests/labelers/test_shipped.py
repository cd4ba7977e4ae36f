"""The specialists that ship with fourmill, through the labelers that load them, against the truth of held-out scenes.

The gates are loose: they tell a working chain from a broken one (a sign, a half pixel, a class map). The exact
accuracy of each network stands in its card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml

from fourmill.labelers.base import LabelBatch
from fourmill.labelers.quality import check
from fourmill.labels import Boxes
from fourmill.shards.sources.scenes import DET_CLASSES, SCENE_CLASSES, render
from fourmill.train.metrics import abs_rel, ap50, mean_angular_error_deg, mean_iou

HELD_OUT_SEED, COUNT, SIZE = 2000, 16, 128


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [render(HELD_OUT_SEED, index, SIZE) for index in range(COUNT)]


def batch_of(scenes: list[Any]) -> LabelBatch:
    frames = [scene.image for scene in scenes]
    return LabelBatch(
        keys=[str(index) for index in range(len(frames))],
        frames=frames,
        present=np.ones(len(frames), bool),
        crops=np.stack(frames)[:, None],
    )


def labels_of(kit: Any, name: str, scenes: list[Any]) -> tuple[Any, list[Any]]:
    labeler = kit.labeler(name)
    labeler.load()
    labels = labeler.label(batch_of(scenes))
    check(labeler.describe(), labels, [scene.image for scene in scenes], labeler=name)
    return labeler, labels


def _truth_boxes(scene: Any) -> Boxes:
    return Boxes(scene.boxes, scene.box_classes.astype(np.int64), np.ones(len(scene.boxes), np.float32))


Metric = Callable[[Any, Any], float]


def _dense(metric: Metric, name: str) -> Metric:
    def over(labels: Any, scenes: Any) -> float:
        return metric(np.stack(labels), np.stack([getattr(scene, name) for scene in scenes]))

    return over


def _semseg(predicted: np.ndarray, true: np.ndarray) -> float:
    return mean_iou(predicted, true, len(SCENE_CLASSES))


def _det(labels: Any, scenes: Any) -> float:
    return ap50(labels, [_truth_boxes(scene) for scene in scenes])


#: labeler -> metric, and its name in the card
METRICS: dict[str, tuple[Metric, str]] = {
    "depth": (_dense(abs_rel, "depth"), "abs_rel"),
    "normal": (_dense(mean_angular_error_deg, "normal"), "mean_angular_error_deg"),
    "semseg": (_dense(_semseg, "semseg"), "mean_iou"),
    "det": (_det, "ap50"),
}
#: the least and the most that is let through
GATES: dict[str, tuple[float, float]] = {
    "depth": (0.0, 0.09),
    "normal": (0.0, 7.0),
    "semseg": (0.8, 1.0),
    "det": (0.6, 1.0),
}


@pytest.mark.parametrize("name", sorted(METRICS))
def test_accuracy_is_what_the_card_says(kit: Any, scenes: list[Any], name: str) -> None:
    """16 scenes instead of the card's 256 explain a quarter of difference; no wrong axis or class map does."""
    metric, title = METRICS[name]
    labeler, labels = labels_of(kit, name, scenes)
    value = metric(labels, scenes)
    card = yaml.safe_load((labeler.checkpoint.folder / "card.yaml").read_text())
    assert value == pytest.approx(card["held_out"][title], rel=0.25)
    least, most = GATES.get(name, (0.0, np.inf))
    assert least <= value <= most


def test_what_they_declare(kit: Any) -> None:
    assert kit.labeler("depth").describe().contract.units == "metres"
    assert kit.labeler("semseg").describe().contract.classes == tuple(SCENE_CLASSES)
    assert kit.labeler("det").describe().contract.classes == tuple(DET_CLASSES)
    assert kit.labeler("clip").describe().contract.channels == 512


def test_clip_tells_surfaces_apart(kit: Any, scenes: list[Any]) -> None:
    """Patches of one class of surface are more alike than patches of different ones."""
    _, labels = labels_of(kit, "clip", scenes)
    assert labels[0].shape == (8, 8, 512)
    features = np.stack(labels).reshape(-1, 512)
    features = features - features.mean(0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    blocks = (
        np.stack([scene.semseg for scene in scenes]).reshape(COUNT, 8, 16, 8, 16).transpose(0, 1, 3, 2, 4)
    )
    pure = blocks.reshape(-1, 256)
    keep = (pure == pure[:, :1]).all(axis=1)
    classes, alike = pure[keep, 0], features[keep] @ features[keep].T
    same = classes[:, None] == classes[None]
    np.fill_diagonal(same, False)
    other = classes[:, None] != classes[None]
    assert alike[same].mean() > alike[other].mean() + 0.1
