"""Scenes per second on one core, against the floor of 100/s at 128 px: `python benchmarks/scenes.py [--baselines]`.

Prints a table and, as its last line, JSON. With --baselines also how far off it is to predict the mean of 500 scenes
of seed 1000 for each pixel (the mode, for classes), measured on 200 scenes of seed 2000.
"""

import argparse
import json
import time

import numpy as np

from fourmill.shards.sources.scenes import SCENE_CLASSES, render

FLOOR_PER_S = 100.0


def rate(size: int, seconds: float) -> float:
    """Images/s; the best of five equal parts, since other processes may share the core."""
    for index in range(5):
        render(1, index, size)
    best, index = 0.0, 0
    for _ in range(5):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 5:
            render(3, index, size)
            index, done = index + 1, done + 1
        best = max(best, done / (time.perf_counter() - start))
    return best


def baselines(size: int = 64) -> dict[str, float]:
    train = [render(1000, index, size) for index in range(500)]
    test = [render(2000, index, size) for index in range(200)]
    depth = np.mean([s.depth for s in train], axis=0)
    normal = np.mean([s.normal for s in train], axis=0)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    counts = [np.sum([s.semseg == c for s in train], axis=0) for c in range(len(SCENE_CLASSES))]
    mode = np.argmax(counts, axis=0)
    truth = np.stack([s.semseg for s in test])
    ious = []
    for c in range(len(SCENE_CLASSES)):
        both, either = ((mode == c) & (truth == c)).sum(), ((mode == c) | (truth == c)).sum()
        ious.append(both / either)
    cosines = [(s.normal * normal).sum(-1) for s in test]
    return {
        "depth_abs_rel": float(np.mean([np.abs(depth - s.depth) / s.depth for s in test])),
        "normal_deg": float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean()),
        "semseg_miou": float(np.mean(ious)),
        "objects_per_scene": float(np.mean([len(s.boxes) for s in test])),
        "depth_min": float(min(s.depth.min() for s in test)),
        "depth_max": float(max(s.depth.max() for s in test)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--baselines", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, float] = {}
    print(f"{'size':>6} {'images/s':>10} {'floor':>8}")
    for size in (64, 128, 224):
        result[f"images_per_s_{size}"] = round(rate(size, arguments.seconds), 1)
        print(f"{size:>6} {result[f'images_per_s_{size}']:>10} {FLOOR_PER_S if size == 128 else '':>8}")
    if arguments.baselines:
        result |= {name: round(value, 4) for name, value in baselines().items()}
    print(json.dumps({"benchmark": "scenes", "floor_128": FLOOR_PER_S, **result}))


if __name__ == "__main__":
    main()
