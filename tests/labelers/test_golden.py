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
    ("depth", 1, "dpt_metric"): [1013.4145, 2064.0536, 3313.0849, -191.4496, 199.6566],
    ("depth", 1, "depth_anything"): [2.8932, 100.0, 100.0, -0.4349, 3.6136],
    ("normal", 1, "dpt_normal"): [-0.5255, 0.5257, 0.8136, 0.0141, -0.0319, 0.0452, -0.0471, 0.0311, 0.1076],
    ("semseg", 1, "segformer"): [0.0, 4.0, 4.0, 0.2012, 0.3213],
    ("semseg", 1, "mask2former"): [2.0, 2.0, 2.0, -0.0162, -0.0002],
    ("det", 1, "detr"): [
        7,
        0,
        0,
        0.5986,
        0.5898,
        0.2315,
        0.0932,
        0.4778,
        0.4153,
        0.2316,
        0.0938,
        0.4746,
        0.4128,
    ],
    ("det", 1, "rt_detr"): [7, 0, 0, 0.9596, 0.9577, 0.7849, 0.0, 0.9752, 0.0523, 0.9644, 0.0, 1.0, 0.4879],
    ("clip", 1, "clip"): [-2.6299, 0.1687, 2.2572, -0.1796, 0.6001, -0.434, -0.1516, -0.6295, 0.0791],
    ("normal_from_depth", 1, ""): [-0.237, -0.0, 0.9769, 0.0005, 0.0284, 0.2132, 0.0282, -0.1242, -0.0101],
}


@pytest.mark.parametrize(("name", "version", "kind"), list(GOLDEN))
def test_golden(kit: Any, name: str, version: int, kind: str) -> None:
    options = {"min_score": 0.0} if name == "det" else {}
    labeler = kit.labeler(name, kit.checkpoint(kind) if kind else None, **options)
    assert labeler.version == version, "print the numbers of the new version"
    labeler.load()
    scene = render(7, 3, 96)
    frame = scene.image[10:70]
    crops = generator(0, "crop").integers(0, 256, (1, 1, 64, 64, 3), dtype=np.uint8)
    batch = kit.as_batch([frame], crops=crops, upstream={"depth": [scene.depth[10:70]]})
    (label,) = labeler.label(batch)
    found = [round(value, 4) for value in summary(label)]
    want = GOLDEN[name, version, kind]
    if len(found) != len(want) or not np.allclose(found, want, rtol=2e-3, atol=2e-3):
        pytest.fail(f"{name} version {version} now gives {found}")
