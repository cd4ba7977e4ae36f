"""Our own preprocessing against the image processor that each checkpoint names, on square images.

Labelers prepare images themselves, the same with and without torchvision. What transformers would make of the same file
differs by the filter alone: ours is always bicubic, and where a checkpoint asks for bilinear, pixels differ by a level or two.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fourmill.checkpoints import shipped_folder
from fourmill.labelers.base import LabelerSettings, labelers
from fourmill.labels import Boxes
from fourmill.shards.sources.scenes import render

NETWORKS = ("depth", "normal", "semseg", "det", "clip")
BILINEAR = ("det",)
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
BACKENDS = [
    "Pil",
    pytest.param("", marks=pytest.mark.skipif(not HAS_TORCHVISION, reason="torchvision is not here")),
]
MEAN_LEVELS, WORST_LEVELS = 2.0, 60.0  # of 255, between filters; at an edge they differ most
ONE_LEVEL = 1.01  # between two implementations of one filter


@cache
def processor_of(name: str, backend: str) -> Any:
    """The image processor that the checkpoint names: Pillow's or torchvision's."""
    import transformers as hf

    folder = shipped_folder(name)
    kind = json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
    return getattr(hf, kind.removesuffix("Fast") + backend).from_pretrained(folder)


@cache
def loaded(name: str) -> Any:
    labeler = labelers.get(name)(LabelerSettings(name))
    labeler.load()
    return labeler


@cache
def scenes(side: int, count: int = 4) -> list[np.ndarray]:
    pictures = (Image.fromarray(render(2000, index, 128).image) for index in range(count))
    return [np.array(one.resize((side, side), Image.Resampling.BICUBIC)) for one in pictures]


def both(name: str, side: int, backend: str) -> tuple[Any, torch.Tensor, torch.Tensor, list[Any]]:
    """The labeler, its input as we make it and as the processor does, and where the frames lie on it."""
    labeler, images = loaded(name), scenes(side)
    canvas, placements = labeler.canvas(images)
    theirs = processor_of(name, backend)(images=images, return_tensors="pt")["pixel_values"]
    return labeler, labeler.normalise(canvas), theirs, placements


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [128, 224])
def test_the_network_sees_what_its_own_processor_would_show_it(name: str, side: int, backend: str) -> None:
    labeler, ours, theirs, _ = both(name, side, backend)
    assert ours.shape == theirs.shape == (4, 3, 128, 128)
    std = torch.tensor(labeler.preprocessing.std).view(3, 1, 1)
    levels = ((ours - theirs) * std).abs() * 255
    if side == 128:  # nothing to resample
        assert levels.max() < 0.01
    elif name in BILINEAR:
        assert 0.01 < levels.mean() < MEAN_LEVELS and levels.max() < WORST_LEVELS
    else:
        assert levels.max() < (0.01 if backend == "Pil" else ONE_LEVEL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_labels_are_those_of_its_own_processor(name: str, backend: str) -> None:
    """Within the tolerance that labelers/README.md states, at 224 px."""
    labeler, ours, theirs, placements = both(name, 224, backend)
    with torch.inference_mode():
        made, wanted = (
            labeler.read(labeler.network(pixel_values=values), placements) for values in (ours, theirs)
        )
    for a, b in zip(made, wanted, strict=True):
        if isinstance(a, Boxes):
            sure = b.keep(b.scores >= 0.6)
            nearest = [
                np.abs(a.xyxy[a.class_ids == k] - box).max(1).min()
                for box, k in zip(sure.xyxy, sure.class_ids, strict=True)
            ]
            assert len(sure) and max(nearest) < 0.03
        elif a.dtype == np.uint8:
            assert (a != b).mean() < 0.002
        else:
            assert np.abs(a - b).mean() / np.abs(b).mean() < (1e-4 if backend == "Pil" else 0.005)
