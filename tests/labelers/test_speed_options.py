"""What makes labelers faster leaves labels as they are, or within what the README states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fourmill.errors import ConfigError
from fourmill.labelers.base import Labeler, LabelerSettings, labelers
from fourmill.labelers.cells import classes_of, finished_classes_of
from fourmill.labelers.letterbox import letterbox, letterbox_on, map_to_frame, place
from fourmill.labels import Boxes
from fourmill.shards.sources.scenes import render

NETWORKS = ("depth", "normal", "semseg", "det", "clip")
FRAMES = [(224, 224), (128, 128), (37, 211), (64, 96), (9, 200), (300, 2)]


def scores_of(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """(count, side, side): a few patches of each class, as a network's scores are."""
    coarse = torch.randn(1, count, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[0]


def as_cells(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(1, 2, 0).flatten(0, 1).contiguous()


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("grid", "side"), [(32, 128), (56, 224), (128, 128), (96, 64)])
def test_classes_are_those_of_full_size_maps(frame: tuple[int, int], grid: int, side: int) -> None:
    scores, at = scores_of(20, grid), place(frame, side)
    full = map_to_frame(scores, at)
    found = classes_of(as_cells(scores), (grid, grid), at)
    assert found.shape == frame and found.dtype == torch.uint8
    # what is not the best class is as good as the best
    reached = full.gather(0, found.long()[None])[0]
    assert torch.allclose(reached, full.amax(0), atol=1e-5)
    assert (found != full.argmax(0)).float().mean() < 1e-3


@pytest.mark.parametrize("frame", FRAMES)
def test_classes_of_masks_are_those_of_full_size_masks(frame: tuple[int, int]) -> None:
    masks, at = scores_of(7, 24), place(frame, 96)
    classes = torch.rand(7, 5, generator=torch.Generator().manual_seed(1))
    full = torch.einsum("qhw,qc->chw", map_to_frame(masks, at).sigmoid(), classes)
    finish = partial(lambda weights, values: values.sigmoid() @ weights, classes)
    found = finished_classes_of(as_cells(masks), (24, 24), at, finish)
    assert torch.allclose(full.gather(0, found.long()[None])[0], full.amax(0), atol=1e-5)


def test_of_equal_scores_the_first_class_wins() -> None:
    scores = torch.zeros(3, 8, 8)
    scores[1:, :, 4:] = 1
    found = classes_of(as_cells(scores), (8, 8), place((16, 16), 16)).numpy()
    assert (found[:, :7] == 0).all() and (found[:, 9:] == 1).all()


@pytest.mark.parametrize(("old", "tolerance"), [((64, 64), 0), ((90, 160), 2), ((20, 31), 2)])
def test_resizing_on_the_device_gives_nearly_the_same_pixels(old: tuple[int, int], tolerance: int) -> None:
    picture = Image.fromarray(render(5, 1, 160).image).resize(old[::-1], Image.Resampling.BICUBIC)
    frames = [
        np.asarray(picture),
        np.asarray(picture.transpose(Image.Transpose.ROTATE_90)),
        np.asarray(picture),
    ]
    want, at = letterbox(frames, 64, (1, 2, 3))
    found, also = letterbox_on("cpu", frames, 64, (1, 2, 3))
    assert also == at and found.dtype == torch.uint8
    away = np.abs(found.permute(0, 2, 3, 1).numpy().astype(int) - want)
    assert away.max() <= tolerance and away.mean() < 0.25


def loaded(name: str, precision: str = "fp32", **options: Any) -> Labeler:
    """What ships under this name."""
    made = labelers.get(name)(LabelerSettings(modality=name, precision=precision, options=options))
    made.load()
    return made


@pytest.fixture(scope="module")
def batch(kit: Any) -> Any:
    frames = [np.array(render(2000, index, 128).image) for index in range(8)]
    return kit.as_batch(frames, crops=np.stack(frames)[:, None])


@pytest.fixture(scope="module")
def usual(batch: Any) -> dict[str, Any]:
    return {name: loaded(name).label(batch) for name in NETWORKS}


def _depth(a: np.ndarray, b: np.ndarray) -> float:
    """AbsRel."""
    return float(np.mean(np.abs(a - b) / b))


def _normal(a: np.ndarray, b: np.ndarray) -> float:
    """Mean angle in degrees."""
    return float(np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1))).mean())


def _semseg(a: np.ndarray, b: np.ndarray) -> float:
    """Share of pixels that differ."""
    return float((a != b).mean())


def _det(a: Boxes, b: Boxes) -> float:
    """1 - IoU on average over those boxes of ``b`` that score 0.55 and more, each with the best one of its class."""
    ious = []
    for box, kind, score in zip(b.xyxy, b.class_ids, b.scores, strict=True):
        others = a.xyxy[a.class_ids == kind]
        if score >= 0.55:
            ious.append(max((_iou(box, other) for other in others), default=0.0))
    return 1 - float(np.mean(ious or [1.0]))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = float(np.prod(np.clip(high - low, 0, None)))
    return both / float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


def _clip(a: np.ndarray, b: np.ndarray) -> float:
    """1 - cosine on average."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(1 - ((a * b).sum(-1) / norms).mean())


APART: dict[str, Callable[[Any, Any], float]] = {
    "depth": _depth,
    "normal": _normal,
    "semseg": _semseg,
    "det": _det,
    "clip": _clip,
}
#: labels in bf16 and in fp32 may be so far apart; the table in labelers/README.md
BF16 = {"depth": 0.005, "normal": 0.5, "semseg": 0.002, "det": 0.05, "clip": 1e-4}


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_is_within_its_tolerance(batch: Any, usual: dict[str, Any], name: str) -> None:
    labels = loaded(name, precision="bf16").label(batch)
    away = float(np.mean([APART[name](a, b) for a, b in zip(labels, usual[name], strict=True)]))
    assert away <= BF16[name]
    assert name in ("semseg", "det") or away > 0, "bf16 had no effect"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("option", [{"channels_last": True}, {"resize": "device"}])
def test_options_that_change_rounding_alone(
    batch: Any, usual: dict[str, Any], name: str, option: dict[str, Any]
) -> None:
    """These frames have the network's size: nothing is resampled."""
    labels = loaded(name, **option).label(batch)
    away = float(np.mean([APART[name](a, b) for a, b in zip(labels, usual[name], strict=True)]))
    assert away <= {"semseg": 1e-4, "normal": 0.05}.get(name, 1e-4)


def test_compile_runs_the_compiled_network(
    monkeypatch: pytest.MonkeyPatch, batch: Any, usual: dict[str, Any]
) -> None:
    compiled = []

    def compile_(network: Any) -> Any:
        def run(**arguments: Any) -> Any:
            compiled.append(sorted(arguments))
            return network(**arguments)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    labels = loaded("depth", compile=True).label(batch)
    assert compiled == [["pixel_values"]]
    assert np.array_equal(labels[0], usual["depth"][0])


def test_options_are_checked() -> None:
    wrong: list[tuple[Mapping[str, Any], str]] = [
        ({"channels_last": "yes"}, "channels_last: 'yes' is not one of auto, true, false"),
        ({"channels_last": 1}, "channels_last: 1 is not one of auto, true, false"),
        ({"compile": "auto"}, "compile: 'auto' is not one of true, false"),
        ({"resize": "gpu"}, "resize: 'gpu' is not one of host, device"),
        ({"attention": "flash"}, "attention: 'flash' is not one of auto, sdpa, eager"),
    ]
    for options, said in wrong:
        with pytest.raises(ConfigError, match=said):
            labelers.get("depth")(LabelerSettings(modality="depth", options=options))


def test_recipes_from_before_there_were_these_options_stay_valid() -> None:
    def recipe(**options: Any) -> Any:
        return labelers.get("depth")(LabelerSettings(modality="depth", options=options)).recipe()["params"]

    assert recipe() == {"input_size": None, "attention": "auto", "kind": "auto"}
    assert recipe(compile=False, resize="host", channels_last="auto") == recipe()
    assert recipe(resize="device") == {**recipe(), "resize": "device"}
    assert recipe(channels_last=False)["channels_last"] is False


def test_upernet_gives_what_its_whole_forward_gives(kit: Any, tmp_path: Any) -> None:
    import transformers as hf

    backbone = hf.ConvNextConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = hf.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8,
        id2label=dict(enumerate("abcdefg")),
    )  # fmt: skip
    torch.manual_seed(0)
    network = hf.UperNetForSemanticSegmentation(config).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 / weight[0].numel() ** 0.5)
            elif name.endswith("classifier.bias"):
                weight.zero_()
    network.save_pretrained(tmp_path)
    kit.write_preprocessor(tmp_path)
    labeler = kit.labeler("semseg", tmp_path)
    labeler.load()
    frames = kit.batch_of((64, 64), (48, 80))
    labels = labeler.label(frames)
    canvas, placements = labeler.canvas(frames.frames)
    with torch.inference_mode():
        whole = network(labeler.normalise(canvas)).logits
    assert whole.shape == (2, 7, 64, 64)
    for label, logits, at in zip(labels, whole, placements, strict=True):
        assert (label == map_to_frame(logits, at).argmax(0).numpy()).mean() > 0.999
        assert len(np.unique(label)) > 1
