"""Metadata, palettes, people and instances as labels: what a crop does to them, how they are checked, measured and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from structures import modality, same, some_instances, some_poses, triangle

from fourmill.crops import crop_boxes, crop_instances, crop_poses, draw_palette, mirror_poses
from fourmill.errors import FourmillError
from fourmill.flows.crop_labels import crop_label
from fourmill.labelers.figures import figure_names
from fourmill.labelers.measure import measure
from fourmill.labelers.quality import check
from fourmill.labels import Boxes, Instances, Metadata, Palettes, Poses, parts_of
from fourmill.seeds import generator
from fourmill.shards.tar import read_labels, write_labels

FRAME = np.zeros((6, 9, 3), np.uint8)
SIZE = np.array([100, 200])
WHOLE, MIRRORED = (np.array([0, 0, 100, 200, flip], np.int32) for flip in (0, 1))


def test_half_of_a_box_and_its_visibility() -> None:
    box = Boxes(np.array([[0.4, 0, 0.6, 1]], np.float32), np.zeros(1, np.int64), np.ones(1, np.float32))
    left = np.array([0, 0, 100, 100, 0])
    assert np.allclose(crop_boxes(box, left, (100, 200)).xyxy, [[0.8, 0, 1, 1]])
    assert len(crop_boxes(box, left, (100, 200), 0.49)) == 1
    assert len(crop_boxes(box, left, (100, 200), 0.51)) == 0


def test_people_in_a_mirror() -> None:
    rng = np.random.default_rng(1)
    body = rng.normal(size=(2, 23, 3, 3))
    label = replace(some_poses(rng, 2), body_pose=body.astype(np.float32))
    assert same(mirror_poses(mirror_poses(label)), replace(label, pose_ids=np.full((2, 8), -1)))
    mirrored = crop_poses(label, MIRRORED, (100, 200))
    assert np.allclose(mirrored.xyxy, label.xyxy[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0], atol=1e-6)
    assert np.allclose(mirrored.camera, label.camera * [1, -1, 1]) and np.array_equal(
        mirrored.betas, label.betas
    )
    assert (mirrored.pose_ids == -1).all()


def test_a_left_arm_that_points_up_is_a_right_arm_that_points_up() -> None:
    """The bone of the left elbow lies along x. Turned about z it rises; its image in a mirror is the right one's."""
    turned = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)  # x to y
    body = np.tile(np.eye(3, dtype=np.float32), (1, 23, 1, 1))
    left, right = 15, 16  # shoulders
    body[0, left] = turned
    mirrored = mirror_poses(Poses.of([[0, 0, 1, 1]], body_pose=body)).body_pose[0]
    assert np.array_equal(mirrored[left], np.eye(3))
    assert np.allclose(mirrored[right] @ [-1, 0, 0], [0, 1, 0])  # the right arm's bone points to -x at rest


def test_instances_are_cut_and_mirrored() -> None:
    label = triangle((0.25, 0.2), (0.75, 0.2), (0.25, 0.8))
    whole = crop_instances(label, WHOLE, (100, 200))
    assert np.array_equal(whole.xyxy, label.xyxy) and (whole.mask_ids == 3).all()
    mirrored = crop_instances(label, MIRRORED, (100, 200))
    assert np.allclose(mirrored.xyxy, [[0.25, 0.2, 0.75, 0.8]]) and (mirrored.mask_ids == -1).all()
    assert np.allclose(mirrored.polygons[0], [[0.75, 0.2], [0.25, 0.2], [0.75, 0.8]])
    right = crop_instances(label, np.array([0, 100, 100, 100, 0]), (100, 200))
    assert np.allclose(right.xyxy, [[0, 0.2, 0.5, 0.5]]) and (right.mask_ids == -1).all()
    inside = crop_instances(label, np.array([10, 40, 80, 120, 0]), (100, 200))
    assert (inside.mask_ids == 3).all() and inside.xyxy[0, 0] == pytest.approx(10 / 120)
    away = crop_instances(label, np.array([0, 160, 100, 40, 0]), (100, 200))
    assert len(away) == 0 and all(len(hit) == 0 for hit in away.hits)
    assert len(crop_instances(triangle((0, 0), (0.02, 0), (0, 0.02)), WHOLE, (100, 200))) == 0  # too small


def test_points_find_what_they_lie_in() -> None:
    label = crop_instances(triangle((0.25, 0.2), (0.75, 0.2), (0.25, 0.8)), WHOLE, (100, 200))
    assert len(label.points) == 49
    inside = (label.points[:, 0] >= 0.25) & (label.points[:, 1] >= 0.2)
    inside &= (label.points[:, 0] - 0.25) / 0.5 + (label.points[:, 1] - 0.2) / 0.6 <= 1
    assert [len(hit) for hit in label.hits] == inside.astype(int).tolist() and 0 < inside.sum() < 49


@pytest.mark.parametrize("form", ["palette", "poses", "instances"])
def test_what_is_drawn_follows_from_the_seed(form: str) -> None:
    rng = np.random.default_rng(2)
    label: Any = {
        "palette": Palettes(tuple(np.full((n, 3), n, np.uint8) for n in range(1, 8))),
        "poses": some_poses(rng, 5),
        "instances": some_instances(rng, 5),
    }[form]

    def drawn(number: int) -> Any:
        return crop_label(modality(form), label, 0, WHOLE, SIZE, 224, generator(number, "crop of x", 7, 0))

    assert same(drawn(1), drawn(1))
    assert len({repr(parts_of(drawn(i))) for i in range(8)}) > 3
    fixed = [crop_label(modality(form), label, 0, WHOLE, SIZE, 224) for _ in range(2)]
    assert same(*fixed)


def test_every_palette_may_be_drawn() -> None:
    label = Palettes(tuple(np.zeros((n, 3), np.uint8) for n in range(1, 8)))
    sizes = {len(draw_palette(label, generator(0, "x", i)).colours[0]) for i in range(60)}
    assert sizes == set(range(1, 8)) and len(draw_palette(label, None).colours[0]) == 7


GOOD: list[tuple[str, Any]] = [
    ("metadata", Metadata({"n_humans": 2, "entropy": 1.5})),
    ("metadata", Metadata({})),
    ("palette", Palettes((np.zeros((7, 3), np.uint8), np.ones((1, 3), np.uint8)))),
    ("poses", some_poses(np.random.default_rng(0), 3)),
    ("poses", Poses.of([[0, 0, 1, 1]], body_pose=np.zeros((1, 23, 3, 3)))),
    ("poses", Poses.empty()),
    ("instances", triangle((0.25, 0.2), (0.75, 0.2), (0.25, 0.8))),
    ("instances", Instances.empty()),
]


@pytest.mark.parametrize(("form", "label"), GOOD)
def test_labels_pass_are_measured_and_kept(form: str, label: Any) -> None:
    check(modality(form), [label], [FRAME])
    measured = measure(modality(form), [label])
    assert measured.seen.all() and set(measured.figures) <= set(figure_names(modality(form)))
    assert measured.values[0, measured.figures.index("empty")] == float(len(label) == 0)
    kept = read_labels(write_labels(["a"], [label], modality(form)), modality(form))[0]
    assert same(kept, label)


ONE = some_poses(np.random.default_rng(0), 1)
SHAPE = triangle((0.25, 0.2), (0.75, 0.2), (0.25, 0.8))
BAD: list[tuple[str, Any, str]] = [
    ("metadata", {"n_humans": 2}, "is a dict, not Metadata"),
    ("metadata", Metadata({"n_human": 2}), "n_humans"),
    ("metadata", Metadata({"entropy": float("nan")}), "nan as entropy"),
    ("metadata", Metadata({"entropy": "2"}), "a str as entropy"),  # type: ignore[dict-item]
    ("palette", Palettes((np.zeros((8, 3), np.uint8),)), "shape \\(8, 3\\)"),
    ("palette", Palettes((np.zeros((3, 3)),)), "no uint8"),
    ("poses", replace(ONE, betas=ONE.betas[:, :9]), "has betas float32 \\(1, 9\\)"),
    ("poses", replace(ONE, pose_ids=ONE.pose_ids + 1024), "pose_ids that are neither"),
    ("poses", replace(ONE, pose_ids=np.full((1, 8), -1)), "neither body_pose nor pose_ids"),
    ("poses", replace(ONE, orders=np.zeros((1, 4), np.int64)), "no permutations"),
    ("poses", replace(ONE, xyxy=ONE.xyxy[:, ::-1]), "x0, y0, x1, y1"),
    ("poses", replace(ONE, camera=ONE.camera * np.float32(np.inf)), "camera that is not finite"),
    ("instances", replace(SHAPE, xyxy=SHAPE.xyxy * 224), "outside \\[0, 1\\]"),
    ("instances", replace(SHAPE, polygons=()), "0 polygons for 1 boxes"),
    ("instances", replace(SHAPE, polygons=(np.zeros((2, 2)),)), "not float64 \\(3 or more, 2\\)"),
    ("instances", replace(SHAPE, mask_ids=np.full((1, 16), 2000)), "mask_ids that are neither"),
    ("instances", Boxes.empty(), "not Instances"),
]


@pytest.mark.parametrize(("form", "label", "said"), BAD)
def test_labels_that_break_their_contract_are_named(form: str, label: Any, said: str) -> None:
    with pytest.raises(FourmillError, match=said):
        check(modality(form), [label], [FRAME])
