"""What each version of each labeler returns for given weights and frames, in a few numbers.

A difference means that labels changed while their recipe did not: raise the labeler's ``version`` and only then
print new numbers (they are in the test's message). The tolerance is that of another processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fourmill.labels import Boxes, Label
from fourmill.seeds import generator
from fourmill.shards.sources.scenes import render


def summary(label: Label) -> list[float]:
    """Quantiles and centres of mass by row and column: blind to the last bits, not to a mirrored or shifted map."""
    if isinstance(label, Boxes):
        best = label.keep(np.arange(min(2, len(label))))
        return [len(label), *best.class_ids.tolist(), *best.scores.tolist(), *best.xyxy.ravel().tolist()]
    values = label.astype(np.float64).reshape(*label.shape[:2], -1)
    rows, columns = np.linspace(-1, 1, values.shape[0]), np.linspace(-1, 1, values.shape[1])
    out = [*np.quantile(values, [0.05, 0.5, 0.95])]
    for channel in range(min(3, values.shape[2])):
        plane = values[..., channel] - values[..., channel].mean()
        out += [(plane * rows[:, None]).mean(), (plane * columns).mean()]
    return [float(value) for value in out]


GOLDEN: dict[tuple[str, int, str], list[float]] = {
    ("depth", 1, "dpt_metric"): [389.3785, 1024.2255, 1821.1138, -205.8869, 50.7394],
    ("depth", 1, "depth_anything"): [4.2372, 100.0, 100.0, 4.1417, -1.4074],
    ("normal", 1, "dpt_normal"): [-0.5055, 0.5393, 0.8045, 0.0071, -0.0338, 0.0061, -0.0407, 0.0033, 0.0081],
    ("semseg", 1, "segformer"): [2.0, 4.0, 4.0, -0.0918, 0.0699],
    ("semseg", 1, "mask2former"): [0.0, 0.0, 3.0, -0.3582, 0.09],
    ("det", 1, "detr"): [
        7,
        0,
        0,
        0.6606,
        0.6468,
        0.176,
        0.2551,
        0.5515,
        0.9891,
        0.1774,
        0.2585,
        0.5532,
        0.989,
    ],
    ("det", 1, "rt_detr"): [5, 0, 0, 0.9841, 0.9705, 0.9834, 0.0, 1.0, 0.005, 0.6186, 0.0, 0.8256, 0.6424],
    ("clip", 1, "clip"): [-2.6299, 0.1687, 2.2572, -0.1796, 0.6001, -0.434, -0.1516, -0.6295, 0.0791],
    ("normal_from_depth", 1, ""): [
        -0.2601,
        0.3894,
        0.9488,
        -0.0726,
        -0.1386,
        0.1747,
        0.0787,
        -0.0008,
        0.0043,
    ],
}


@pytest.mark.parametrize(("name", "version", "kind"), list(GOLDEN))
def test_golden(kit: Any, name: str, version: int, kind: str) -> None:
    options = {"min_score": 0.0} if name == "det" else {}
    labeler = kit.labeler(name, kit.checkpoint(kind) if kind else None, **options)
    assert labeler.version == version, "print the numbers of the new version"
    labeler.load()
    scene = render(21, 36, 96)
    frame = scene.image[10:70]
    crops = generator(0, "crop").integers(0, 256, (1, 1, 64, 64, 3), dtype=np.uint8)
    batch = kit.as_batch([frame], crops=crops, upstream={"depth": [scene.depth[10:70]]})
    (label,) = labeler.label(batch)
    found = [round(value, 4) for value in summary(label)]
    want = GOLDEN[name, version, kind]
    if len(found) != len(want) or not np.allclose(found, want, rtol=2e-3, atol=2e-3):
        pytest.fail(f"{name} version {version} now gives {found}")
