"""Scenes: bit-identical for ever, exact and consistent truth."""

import hashlib
import json

import numpy as np
import pytest

from fourmill.shards.sources.scene_layout import draw_layout
from fourmill.shards.sources.scenes import DET_CLASSES, SCENE_CLASSES, VERSION, Scene, render

# (seed, index, size): sha256 of image, depth, normal, semseg, boxes and caption, first 16 hex digits each.
# Version 1 is frozen. If this fails, either the code is wrong or the scenes need a version 2 beside version 1.
GOLDEN: dict[tuple[int, int, int], list[str]] = {
    (0, 0, 128): [
        "517e102e702773fc",
        "57b440acab9507d6",
        "04c02a927ebf4721",
        "a4a1cfc8124edb93",
        "61f4e837a98923d9",
        "c8b3cd33bb976f0e",
    ],
    (0, 1, 64): [
        "61a2eec2db31d986",
        "0e5182fa8c8bed38",
        "8aaef27091bcbd4f",
        "65af64bf4624f033",
        "320e90f76b85f9f6",
        "1eb88ba7d03928c9",
    ],
    (1000, 17, 128): [
        "0e11f0961dab5e9a",
        "908e2795cce94cbf",
        "d4902256393d92d7",
        "2a7eebc71f44c822",
        "d98c196792ad9931",
        "b046f1de3fd6724f",
    ],
    (2000, 255, 128): [
        "660d1a3c1cc41a17",
        "30ac8a1e49605995",
        "af9a830b87f7b85c",
        "8b0264890ba31a02",
        "d83ad36b25787bc9",
        "785725621db94042",
    ],
    (42, 9, 224): [
        "8de13daaa8bc9428",
        "fe6d4179ec672584",
        "5cf8c100c18c493d",
        "c802f680ef10e32a",
        "a8bc43cfb0afc2bb",
        "04c3e4e91c207d5e",
    ],
}


def digests(scene: Scene) -> list[str]:
    arrays = (scene.image, scene.depth, scene.normal, scene.semseg, scene.boxes)
    blobs = [np.ascontiguousarray(a).tobytes() for a in arrays] + [scene.caption.encode()]
    return [hashlib.sha256(blob).hexdigest()[:16] for blob in blobs]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render(7, index, 96) for index in range(40)]


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_version_1_is_bit_identical(key: tuple[int, int, int]) -> None:
    assert VERSION == 1
    assert digests(render(*key)) == GOLDEN[key]


def test_deterministic_and_distinct() -> None:
    first = digests(render(3, 5, 64))
    assert digests(render(3, 5, 64)) == first
    assert digests(render(3, 6, 64))[0] != first[0]
    assert digests(render(4, 5, 64))[0] != first[0]


def test_size_changes_the_rasterisation_only() -> None:
    same, off = 0, [0.0]
    for index in range(30):
        small, large = render(11, index, 64), render(11, index, 128)
        same += small.caption == large.caption
        assert small.fov_deg == large.fov_deg
        assert large.focal_px == pytest.approx(2 * small.focal_px)
        if len(small.boxes) == len(large.boxes):
            off += list(np.abs(small.boxes - large.boxes).max(axis=1))
        # the centre of each 2x2 block of pixels of the large image is a pixel centre of the small one
        mean = large.depth.reshape(64, 2, 64, 2).mean(axis=(1, 3))
        assert np.median(np.abs(mean - small.depth) / small.depth) < 0.01
    assert np.quantile(off, 0.95) < 2.0 / 64  # a sliver seen past another object may differ by more
    assert same >= 27  # the others have an object at the limit of visibility


def test_ranges_and_types(scenes: list[Scene]) -> None:
    for s in scenes:
        assert s.image.shape == (96, 96, 3) and s.image.dtype == np.uint8
        assert s.depth.shape == (96, 96) and s.depth.dtype == np.float32
        assert s.normal.shape == (96, 96, 3) and s.normal.dtype == np.float32
        assert s.semseg.dtype == s.instance.dtype == s.box_classes.dtype == np.uint8
        assert 0.3 < s.depth.min() and s.depth.max() < 16.0
        assert s.semseg.max() < len(SCENE_CLASSES)
        assert 56.0 <= s.fov_deg <= 64.0
        assert s.boxes.shape == (len(s.box_classes), 4) and s.boxes.dtype == np.float32
        assert s.instance.max() == len(s.boxes) <= 6
        assert s.image.std() > 5.0
        assert s.caption == s.caption.strip() and "  " not in s.caption and s.caption.isascii()


def test_normals_are_unit_and_face_the_viewer(scenes: list[Scene]) -> None:
    for s in scenes:
        np.testing.assert_allclose(np.sqrt((s.normal.astype(np.float64) ** 2).sum(-1)), 1.0, atol=1e-6)
        right, up = slopes(s)
        facing = -(s.normal[..., 0] * right + s.normal[..., 1] * up) + s.normal[..., 2]
        assert facing.min() > -1e-4


def slopes(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Right and up slopes of the rays through the pixel centres: (1, S) and (S, 1)."""
    size = scene.depth.shape[0]
    offset = (np.arange(size) + 0.5 - size / 2) / scene.focal_px
    return offset[None, :], -offset[:, None]


def test_depth_and_normals_agree(scenes: list[Scene]) -> None:
    """Points back-projected from the depth span the plane that the normal says; this fixes all sign conventions."""
    for s in scenes:
        right, up = slopes(s)
        depth = s.depth.astype(np.float64)
        points = np.stack([right * depth, up * depth, -depth], axis=-1)
        across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        normal = np.cross(down, across)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        # planar parts: all nine neighbours have the same normal
        stack = [s.normal[1 + dy : 95 + dy, 1 + dx : 95 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        planar = (np.abs(np.stack(stack) - s.normal[1:-1, 1:-1]).max(axis=(0, 3)) < 1e-6) & (
            s.semseg[1:-1, 1:-1] < 2
        )
        cosine = (normal * s.normal[1:-1, 1:-1]).sum(-1)[planar]
        assert planar.mean() > 0.15
        assert np.quantile(cosine, 0.02) > 0.9999


def test_floor_and_walls_are_where_the_layout_says(scenes: list[Scene]) -> None:
    for index, s in enumerate(scenes):
        camera = draw_layout(7, index).camera
        right, up = slopes(s)
        height = camera.height + s.depth * (up * camera.cos_pitch - camera.sin_pitch + 0 * right)
        assert np.abs(height[s.semseg == 0]).max(initial=0.0) < 1e-4
        assert height[s.semseg != 0].min() > -1e-4


def test_boxes_are_tight_around_the_instances(scenes: list[Scene]) -> None:
    for s in scenes:
        for k, (box, kind) in enumerate(zip(s.boxes, s.box_classes, strict=True)):
            mask = s.instance == k + 1
            rows, columns = np.nonzero(mask)
            assert len(rows) >= 10
            expected = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 96
            np.testing.assert_array_equal(box, expected.astype(np.float32))
            assert set(s.semseg[mask]) == {SCENE_CLASSES.index(DET_CLASSES[kind])}
    assert sum(len(s.boxes) for s in scenes) > 80


def test_captions_name_what_is_there(scenes: list[Scene]) -> None:
    words = {"sphere": ("sphere", "ball"), "box": ("box", "block"), "cylinder": ("cylinder", "pillar")}
    for s in scenes:
        tokens = [t.strip(",.:") for t in s.caption.split()]
        for number, kind in enumerate(DET_CLASSES):
            assert sum(tokens.count(w) for w in words[kind]) == int((s.box_classes == number).sum()), (
                s.caption
            )
        assert "floor" in tokens and ("wall" in tokens or "walls" in tokens)
    assert len({s.caption for s in scenes}) == len(scenes)


def test_a_size_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 8"):
        render(0, 0, 4)


if __name__ == "__main__":  # prints the golden digests
    for golden in ((0, 0, 128), (0, 1, 64), (1000, 17, 128), (2000, 255, 128), (42, 9, 224)):
        print(f"    {golden}: {json.dumps(digests(render(*golden)))},")
