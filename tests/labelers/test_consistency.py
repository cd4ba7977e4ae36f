"""Scores that hold two labels of an image, or an image and its caption, against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fourmill.errors import CheckpointError, ConfigError
from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, labelers
from fourmill.labelers.det import DET
from fourmill.labelers.det_vs_semseg import DetVsSemseg, agreement
from fourmill.labelers.semseg import SEMSEG
from fourmill.labels import Absent, Boxes, is_fault
from fourmill.modality import Modality
from fourmill.shards.sources.scenes import render
from fourmill.shards.sources.scenes_source import Scenes

SOURCE = Scenes(count=8, size=96, seed=11)
KEYS = [f"{row:08d}" for row in range(8)]
DET_CLASSES = ("sphere", "box", "cylinder")
CLASSES = ("floor", "wall", "sphere", "box", "cylinder")
UPSTREAM = {"det": DET.with_classes(DET_CLASSES), "semseg": SEMSEG.with_classes(CLASSES)}


def scores(name: str, upstream: dict[str, list[Any]], **options: Any) -> list[Any]:
    labeler = labelers.get(name)(LabelerSettings(name, options=options, upstream=UPSTREAM))
    labeler.describe()
    labeler.load()
    images = [render(11, index, 96).image for index in range(len(KEYS))]
    return labeler.label(LabelBatch(KEYS, images, np.ones(len(images), bool), upstream=upstream))


def truth(name: str) -> list[Any]:
    return [SOURCE.truth(key)[name] for key in KEYS]


def test_true_normals_fit_true_depth() -> None:
    found = scores("normal_vs_depth", {"depth": truth("depth"), "normal": truth("normal")})
    assert max(found) < 2, "degrees"


@pytest.mark.parametrize("signs", [(-1, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_normals_with_a_wrong_sign_do_not(signs: tuple[int, int, int]) -> None:
    turned = [normal * np.array(signs, np.float32) for normal in truth("normal")]
    found = scores("normal_vs_depth", {"depth": truth("depth"), "normal": turned})
    assert np.mean(found) > 5


def test_what_is_absent_stays_absent() -> None:
    hung = Absent("depth hung")
    found = scores("normal_vs_depth", {"depth": [hung, *truth("depth")[1:]], "normal": truth("normal")})
    assert found[0] == hung and isinstance(found[1], float)
    found = scores("det_vs_semseg", {"det": [hung, *truth("det")[1:]], "semseg": truth("semseg")})
    assert found[0] == hung


def test_true_boxes_fit_true_classes() -> None:
    right = scores("det_vs_semseg", {"det": truth("det"), "semseg": truth("semseg")})
    of_others = scores(
        "det_vs_semseg", {"det": truth("det")[1:] + truth("det")[:1], "semseg": truth("semseg")}
    )
    assert min(right) > 0.8
    assert np.mean([score for score in of_others if isinstance(score, float)]) < np.mean(right) - 0.3


def boxes(*xyxy: tuple[float, float, float, float]) -> Boxes:
    return Boxes(
        np.array(xyxy, np.float32).reshape(-1, 4),
        np.zeros(len(xyxy), np.int64),
        np.ones(len(xyxy), np.float32),
    )


def test_agreement_by_hand() -> None:
    classes = np.zeros((10, 10), np.uint8)
    classes[:5, :5] = 1
    assert agreement(boxes((0, 0, 0.5, 0.5)), classes, {0: 1}) == 1
    assert agreement(boxes(), classes, {0: 1}) == 0, "a segment without a box"
    assert agreement(boxes((0.5, 0.5, 1, 1)), classes, {0: 1}) == 0, "a box without a segment"
    assert agreement(boxes((0, 0, 0.5, 0.2)), classes, {0: 1}) == pytest.approx(2 * 0.4 / 1.4), (
        "a recall of 0.4"
    )
    assert agreement(boxes((0, 0, 1, 1)), classes, {0: 1}) == pytest.approx(2 * 0.5 / 1.5), (
        "a quarter of a box"
    )
    assert agreement(boxes((0, 0, 0.5, 0.5)), classes, {}) is None
    assert agreement(boxes(), np.zeros((10, 10), np.uint8), {0: 1}) is None


def test_nothing_to_compare_is_no_fault() -> None:
    empty = [np.zeros((96, 96), np.uint8)] * len(KEYS)
    (reason, *_) = {
        a.reason for a in scores("det_vs_semseg", {"det": [Boxes.empty()] * len(KEYS), "semseg": empty})
    }
    assert not is_fault(reason) and is_fault("depth hung")


def classed(det: tuple[str, ...], semseg: tuple[str, ...], **options: Any) -> DetVsSemseg:
    upstream: dict[str, Modality] = {"det": DET.with_classes(det), "semseg": SEMSEG.with_classes(semseg)}
    labeler = DetVsSemseg(LabelerSettings("det_vs_semseg", options=options, upstream=upstream))
    labeler.describe()
    labeler.load()
    return labeler


def test_classes_are_matched_by_name() -> None:
    found = classed(
        ("Dog", "dining table", "kite"), ("wall", "dog", "table-merged"), names={"dining table": "table"}
    )
    assert found.pairs == {0: 1, 1: 2}
    with pytest.raises(
        ConfigError, match="have no class in common; map names with modalities.det_vs_semseg.names"
    ):
        classed(("kite",), ("wall",))


# -- CLIP ---------------------------------------------------------------------------------------------


def clip_score(texts: list[list[str]], **options: Any) -> list[Any]:
    labeler: Labeler = labelers.get("clip_score")(
        LabelerSettings("clip_score", image_size=128, options=options)
    )
    labeler.describe()
    labeler.load()
    images = [render(11, index, 128).image for index in range(len(texts))]
    return labeler.label(
        LabelBatch([str(i) for i in range(len(texts))], images, np.ones(len(texts), bool), texts)
    )


@pytest.fixture(scope="module")
def captions() -> list[list[str]]:
    return [[render(11, index, 128).caption] for index in range(8)]


def test_an_image_s_own_captions_score_higher(captions: list[list[str]]) -> None:
    own, others = clip_score(captions), clip_score(captions[1:] + captions[:1])
    assert np.mean(own) > np.mean(others) + 0.1
    assert all(-1 <= score <= 1 for score in own + others)


def test_a_score_does_not_depend_on_the_captions_of_others(captions: list[list[str]]) -> None:
    without = [captions[0], [], *captions[2:5], [], *captions[6:]]
    found, alone = clip_score(captions), clip_score(without)
    assert [i for i, score in enumerate(alone) if isinstance(score, Absent)] == [1, 5]
    assert all(alone[i] == found[i] for i in (0, 2, 3, 4, 6, 7)), "bit by bit"
    assert clip_score([[]] * 2) == [Absent("no caption")] * 2


def test_several_captions_are_pooled(captions: list[list[str]]) -> None:
    pairs = [[own[0], other[0]] for own, other in zip(captions, captions[1:] + captions[:1], strict=True)]
    mean, high, low = (np.array(clip_score(pairs, captions=2, pool=pool)) for pool in ("mean", "max", "min"))
    assert (low <= high).all() and np.allclose(mean, (low + high) / 2, atol=1e-6)


def test_what_is_no_whole_clip(tmp_path: Any) -> None:
    import shutil

    from fourmill.checkpoints import shipped_folder

    folder = tmp_path / "clip"
    shutil.copytree(shipped_folder("clip"), folder)
    (folder / "tokenizer.json").unlink()
    settings = LabelerSettings("clip_score", model=str(folder))
    labeler = labelers.get("clip_score")(settings)
    with pytest.raises(CheckpointError, match="lacks tokenizer.json"):
        labeler.load()
    with pytest.raises(ConfigError, match="modalities.clip_score.pool: 'men' is none of mean, max, min"):
        labelers.get("clip_score")(LabelerSettings("clip_score", options={"pool": "men"}))
