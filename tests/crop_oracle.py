"""What a crop of an image's truth is, written a second time from the definitions, for tests of the crop rules.

Nothing here calls `fourmill.crops`. Coordinates: a crop is (top, left, height, width, flip) in pixels of an original of
``hw`` = (height, width); a map covers the whole original at any resolution; pixel i covers [i, i + 1).
``shift`` and ``sign`` make wrong oracles on purpose: a test that cannot tell them from the right one is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fourmill.labels import Boxes, Instances, Poses

#: SMPL's joints behind the root, in the order of `Poses.body_pose`
JOINTS = ["left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hand", "right_hand"]  # fmt: skip
PARENTS: dict[str, str] = {
    "left_hip": "root", "right_hip": "root", "spine1": "root", "left_knee": "left_hip", "right_knee": "right_hip",
    "spine2": "spine1", "left_ankle": "left_knee", "right_ankle": "right_knee", "spine3": "spine2",
    "left_foot": "left_ankle", "right_foot": "right_ankle", "neck": "spine3", "left_collar": "spine3",
    "right_collar": "spine3", "head": "neck", "left_shoulder": "left_collar", "right_shoulder": "right_collar",
    "left_elbow": "left_shoulder", "right_elbow": "right_shoulder", "left_wrist": "left_elbow",
    "right_wrist": "right_elbow", "left_hand": "left_wrist", "right_hand": "right_wrist",
}  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """``shift``: pixels of the map to the right. ``sign``: of x in mirrored vectors."""

    shift: float = 0.0
    sign: float = -1.0
    flips: bool = True

    def map(
        self,
        values: np.ndarray,
        crop: np.ndarray,
        hw: tuple[int, int],
        side: int,
        filter: str,
        flip: str = "mirror",
    ) -> np.ndarray:
        """(side, side[, C]) of a map (h, w[, C])."""
        top, left, height, width, flipped = (int(v) for v in crop)
        tall, wide = values.shape[0] / hw[0], values.shape[1] / hw[1]
        down = _weights(values.shape[0], side, top * tall, (top + height) * tall, filter)
        across = _weights(
            values.shape[1], side, left * wide + self.shift, (left + width) * wide + self.shift, filter
        )
        out = (
            values[down.argmax(1)][:, across.argmax(1)]
            if filter == "nearest"
            else _mixed(values, down, across)
        )
        if flipped and self.flips and flip != "none":
            out = out[:, ::-1]
            if flip == "mirror_negate_x":
                out = out * np.array([self.sign, 1, 1], out.dtype)
        return out

    def points(self, xy: np.ndarray, crop: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
        """Normalised points (N, 2) of the image, as those of the crop; not cut at its edges."""
        top, left, height, width, flipped = (int(v) for v in crop)
        x = (xy[:, 0] * hw[1] + self.shift - left) / width
        y = (xy[:, 1] * hw[0] - top) / height
        return np.stack([1 - x if flipped and self.flips else x, y], axis=1)

    def corners(self, xyxy: np.ndarray, crop: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
        """Boxes (N, 4), cut at the crop's edges; those of which nothing is left have no area."""
        one, two = (self.points(xyxy[:, part].astype(np.float64), crop, hw) for part in ([0, 1], [2, 3]))
        return np.concatenate([np.minimum(one, two), np.maximum(one, two)], axis=1).clip(0, 1)

    def boxes(self, boxes: Boxes, crop: np.ndarray, hw: tuple[int, int]) -> Boxes:
        xyxy = self.corners(boxes.xyxy, crop, hw)
        kept = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
        return Boxes(xyxy[kept].astype(np.float32), boxes.class_ids[kept], boxes.scores[kept])

    def poses(self, poses: Poses, crop: np.ndarray, hw: tuple[int, int]) -> Poses:
        xyxy = self.corners(poses.xyxy, crop, hw)
        kept = np.flatnonzero((xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1]))
        body, orient, camera = poses.body_pose, poses.orient, poses.camera.copy()
        if crop[4] and self.flips:
            other = [JOINTS.index(_other_side(name)) for name in JOINTS]
            mirror = np.diag([self.sign, 1, 1]).astype(np.float32)
            body, orient = mirror @ body[:, other] @ mirror, mirror @ orient @ mirror
            camera[:, 1] *= self.sign
        return Poses.of(
            xyxy[kept],
            body_pose=body[kept],
            orient=orient[kept],
            betas=poses.betas[kept],
            camera=camera[kept],
        )

    def polygons(self, instances: Instances, crop: np.ndarray, hw: tuple[int, int]) -> list[np.ndarray]:
        return [self.points(polygon, crop, hw) for polygon in instances.polygons]


def joints_of(body: np.ndarray, root: np.ndarray, rest: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where the joints are: ``body`` (23, 3, 3) turns each joint in its parent's frame, ``rest`` are the bones at rest."""
    turned, place = {"root": root}, {"root": np.zeros(3)}
    for index, name in enumerate(JOINTS):
        parent = PARENTS[name]
        place[name] = place[parent] + turned[parent] @ rest[name]
        turned[name] = turned[parent] @ body[index]
    return place


def symmetric_rest(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Bones of somebody whose right half is the mirror image of the left."""
    bones = {
        name: rng.normal(size=3) * (1 if name[:5] in ("left_", "right") else [0, 1, 1]) for name in JOINTS
    }
    return {
        name: bones[_other_side(name)] * [-1, 1, 1] if name.startswith("right_") else bone
        for name, bone in bones.items()
    }


def mirrored_places(places: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {_other_side(name): at * [-1, 1, 1] for name, at in places.items()}


def inside(polygon: np.ndarray, point: np.ndarray) -> bool:
    """Of a convex outline: on the same side of all edges."""
    edges, to_point = np.roll(polygon, -1, axis=0) - polygon, point - polygon
    cross = edges[:, 0] * to_point[:, 1] - edges[:, 1] * to_point[:, 0]
    return bool((cross >= 0).all() or (cross <= 0).all())


def _other_side(name: str) -> str:
    if name.startswith("left_"):
        return f"right_{name[5:]}"
    return f"left_{name[6:]}" if name.startswith("right_") else name


def resized(values: np.ndarray, shape: tuple[int, int], filter: str) -> np.ndarray:
    """A whole map (h, w[, C]) at another resolution."""
    down, across = (
        _weights(before, after, 0, before, filter) for before, after in zip(values.shape, shape, strict=False)
    )
    return _mixed(values, down, across)


def _mixed(values: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Bytes are rounded after each of the two passes."""
    is_byte = values.dtype == np.uint8
    rows = _bytes(np.einsum("oi,hi...->ho...", across, values.astype(np.float64), optimize=True), is_byte)
    return _bytes(np.einsum("oh,hw...->ow...", down, rows, optimize=True), is_byte).astype(values.dtype)


def _bytes(values: np.ndarray, is_byte: bool) -> np.ndarray:
    return np.floor(values + 0.5).clip(0, 255) if is_byte else values


def _weights(count: int, side: int, start: float, stop: float, filter: str) -> np.ndarray:
    """(side, count): how much of each input pixel is in each output pixel; wider filters on the way down."""
    scale = (stop - start) / side
    centres = start + (np.arange(side) + 0.5) * scale
    if filter == "nearest":
        return np.eye(count)[np.floor(centres).astype(int).clip(0, count - 1)]
    kernel: Callable[[np.ndarray], np.ndarray] = {"bilinear": _triangle, "bicubic": _cubic}[filter]
    weights = kernel((np.arange(count)[None] + 0.5 - centres[:, None]) / max(scale, 1.0))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys 1981 with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
