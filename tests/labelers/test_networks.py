"""Tiny random networks through the real `from_pretrained` path: shapes, dtypes, contracts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fourmill.errors import CheckpointError, ConfigError
from fourmill.labelers.base import labelers
from fourmill.labelers.network import read_preprocessing
from fourmill.labelers.quality import check
from fourmill.labels import Boxes

Kit = Any

MAPS = [
    ("depth", "dpt_metric"),
    ("depth", "dpt_plain"),
    ("depth", "depth_anything"),
    ("normal", "dpt_normal"),
    ("normal", "segformer_normal"),
    ("semseg", "segformer"),
    ("semseg", "mask2former"),
    ("det", "detr"),
    ("det", "yolos"),
    ("det", "rt_detr"),
]


@pytest.mark.parametrize(("name", "kind"), MAPS)
def test_labels_keep_the_contract_in_any_frame(kit: Kit, name: str, kind: str) -> None:
    options = {"min_score": 0.0} if name == "det" else {}
    labeler = kit.labeler(name, kit.checkpoint(kind), **options)
    labeler.load()
    batch = kit.batch_of((37, 53), (128, 64), (64, 64), (9, 200))
    labels = labeler.label(batch)
    check(labeler.describe(), labels, batch.frames, batch.keys, name)
    again = labeler.label(batch)
    assert name != "det" or len(labels[2]) > 0
    for label, other in zip(labels, again, strict=True):
        if isinstance(label, Boxes):
            assert (np.diff(label.scores) <= 0).all()
            assert label.xyxy.tobytes() == other.xyxy.tobytes()
        else:
            assert label.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", ["clip", "clip_vision"])
def test_clip_features_by_crop(kit: Kit, kind: str) -> None:
    import torch
    from transformers import CLIPVisionModelWithProjection

    crops = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    labeler = kit.labeler("clip", kit.checkpoint(kind))
    labeler.load()
    labels = labeler.label(kit.as_batch([np.zeros((70, 80, 3), np.uint8)] * 2, crops=crops))
    flat = crops.reshape(-1, 64, 64, 3)
    check(labeler.describe(), labels, list(flat))
    assert len(labels) == 6 and labels[0].shape == (4, 4, 12) and labeler.describe().contract.channels == 12

    # by hand: CLIP's normalisation, every token projected as CLIP projects its class token, class token dropped
    network = CLIPVisionModelWithProjection.from_pretrained(kit.checkpoint(kind)).eval()
    pixels = torch.tensor(((flat / 255 - kit.mean) / kit.std).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        hidden = network.vision_model(pixels).last_hidden_state
        tokens = network.visual_projection(network.vision_model.post_layernorm(hidden))
        whole = network(pixels).image_embeds
    assert torch.allclose(tokens[:, 0], whole, atol=1e-5)
    want = tokens[:, 1:].reshape(6, 4, 4, 12).numpy()
    assert np.allclose(np.stack(labels), want, atol=1e-4)


def test_clip_at_another_size_interpolates_positions(kit: Kit) -> None:
    labeler = kit.labeler("clip", kit.checkpoint("clip"), input_size=96)
    labeler.load()
    crops = np.zeros((1, 1, 96, 96, 3), np.uint8)
    (label,) = labeler.label(kit.as_batch([np.zeros((96, 96, 3), np.uint8)], crops=crops))
    assert label.shape == (6, 6, 12)


def test_a_row_does_not_depend_on_its_neighbours(kit: Kit) -> None:
    labeler = kit.labeler("depth", kit.checkpoint("dpt_metric"))
    labeler.load()
    first, second = kit.batch_of((37, 53), (40, 40)), kit.batch_of((37, 53), (64, 90), seed=1)
    mixed = kit.as_batch([first.frames[0], second.frames[1]])
    assert np.array_equal(labeler.label(first)[0], labeler.label(mixed)[0])


def test_bf16_is_close_and_not_equal(kit: Kit) -> None:
    batch = kit.batch_of((64, 64))
    both = []
    for precision in ("fp32", "bf16"):
        labeler = kit.labeler("normal", kit.checkpoint("dpt_normal"), precision=precision)
        labeler.load()
        both.append(labeler.label(batch)[0])
    assert both[1].dtype == np.float32
    assert 0 < np.abs(both[0] - both[1]).max() and np.abs(both[0] - both[1]).mean() < 0.05


def test_precision_is_checked(kit: Kit) -> None:
    with pytest.raises(
        ConfigError, match=r"modalities.depth.precision: unknown precision 'bf61'; did you mean 'bf16'"
    ):
        kit.labeler("depth", kit.checkpoint("dpt_metric"), precision="bf61")
    with pytest.raises(ConfigError, match="fp16 on a CPU"):
        kit.labeler("depth", kit.checkpoint("dpt_metric"), precision="fp16")


def test_class_names_come_from_the_checkpoint_alone(kit: Kit) -> None:
    assert kit.labeler("semseg", kit.checkpoint("mask2former")).describe().contract.classes[:2] == (
        "floor",
        "wall",
    )
    assert kit.labeler("det", kit.checkpoint("detr")).describe().contract.classes == (
        "sphere",
        "box",
        "cylinder",
    )


def test_depth_kind(kit: Kit) -> None:
    assert kit.labeler("depth", kit.checkpoint("dpt_metric")).describe().contract.units == "metres"
    for plain in (kit.checkpoint("dpt_plain"), kit.checkpoint("depth_anything")):
        assert kit.labeler("depth", plain).describe().contract.units.startswith("relative")
        assert kit.labeler("depth", plain, kind="metric").describe().contract.units == "metres"
    with pytest.raises(ConfigError, match="unknown kind of depth 'metrick'; did you mean 'metric'"):
        kit.labeler("depth", kit.checkpoint("dpt_plain"), kind="metrick").describe()


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("depth", "clip", r"holds CLIPModel \(model type clip\); a depth network is expected"),
        ("depth", "dpt_normal", r"holds DPTForSemanticSegmentation .*DPTForDepthEstimation"),
        ("semseg", "dpt_plain", r"holds DPTForDepthEstimation .*DPTForSemanticSegmentation"),
        ("semseg", "detr", r"DetrForObjectDetection .*a semantic segmentation network is expected"),
        ("det", "segformer", r"SegformerForSemanticSegmentation .*an object detector is expected"),
        ("clip", "segformer", r"a CLIP image encoder with its projection is expected"),
        ("clip", "clip_bare", r"lacks 1 weights of a CLIP image encoder.* visual_projection.weight"),
        ("normal", "segformer", r"has 5 output channels; a normals network with 3"),
    ],
)
def test_a_checkpoint_of_the_wrong_kind(kit: Kit, name: str, kind: str, said: str) -> None:
    labeler = kit.labeler(name, kit.checkpoint(kind))
    with pytest.raises(CheckpointError, match=said) as raised:
        labeler.load()
    message = str(raised.value)
    assert message.startswith(f"modalities.{name}.model: ") and str(kit.checkpoint(kind)) in message
    assert "\n" not in message


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def _without(folder: Path, start: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(start)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused(kit: Kit, tmp_path: Path) -> None:
    folder = _copy(kit.checkpoint("segformer"), tmp_path / "net")
    _without(folder, "decode_head.classifier")
    with pytest.raises(CheckpointError, match=r"lacks 2 weights .*decode_head.classifier.bias"):
        kit.labeler("semseg", folder).load()


def test_weights_that_no_forward_pass_reads_may_be_missing(kit: Kit, tmp_path: Path) -> None:
    """The MiDaS checkpoints lack the first fusion layer's residual unit."""
    folder = _copy(kit.checkpoint("dpt_metric"), tmp_path / "net")
    _without(folder, "neck.fusion_stage.layers.0.residual_layer1.")
    batch, labels = kit.batch_of((64, 64)), []
    for source in (kit.checkpoint("dpt_metric"), folder):
        labeler = kit.labeler("depth", source)
        labeler.load()
        labels.append(labeler.label(batch)[0])
    assert np.array_equal(*labels)


def test_weights_of_another_shape_are_refused(kit: Kit, tmp_path: Path) -> None:
    folder = _copy(kit.checkpoint("segformer"), tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(index): f"c{index}" for index in range(7)}
    config["label2id"] = {name: int(index) for index, name in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"modalities.semseg.model: cannot load a semantic segmentation network"
    ):
        kit.labeler("semseg", folder).load()


def test_no_safetensors_no_processor_no_classes(kit: Kit, tmp_path: Path) -> None:
    folder = _copy(kit.checkpoint("segformer"), tmp_path / "net")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="cannot load a semantic segmentation network .*model.safetensors"
    ):
        kit.labeler("semseg", folder).load()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=f"{folder} lacks preprocessor_config.json"):
        kit.labeler("semseg", folder).load()
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"]
    (folder / "config.json").write_text(json.dumps(config))
    fresh = _copy(folder, tmp_path / "fresh")
    with pytest.raises(CheckpointError, match="has no class names"):
        kit.labeler("semseg", fresh).describe()


def test_input_size(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"modalities.depth.input_size: 64 is no multiple .* 14 pixels; use 56"
    ):
        kit.labeler("depth", kit.checkpoint("depth_anything"), input_size=64).load()
    folder = _copy(kit.checkpoint("dpt_metric"), tmp_path / "net")
    kit.write_preprocessor(folder, size={})
    with pytest.raises(ConfigError, match="gives no size"):
        kit.labeler("depth", folder).load()
    labeler = kit.labeler("depth", folder, input_size=96)
    labeler.load()
    assert labeler.label(kit.batch_of((30, 50)))[0].shape == (30, 50)


@pytest.mark.parametrize(
    ("content", "size", "mean", "rescale"),
    [
        ({"size": 384, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 384, 0.5, 1 / 255),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_normalize": False}, 800, 0.0, 1 / 255),
        ({"size": {"height": 640, "width": 512}, "do_rescale": False, "do_normalize": False}, 640, 0.0, 1.0),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
         224, 0.0, 1 / 255),
        ({"do_normalize": False, "image_mean": [0.5] * 3, "rescale_factor": 0.5}, None, 0.0, 0.5),
    ],
)  # fmt: skip
def test_preprocessor_files(
    tmp_path: Path, content: dict, size: int | None, mean: float, rescale: float
) -> None:
    from fourmill.checkpoints import Checkpoint

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    read = read_preprocessing(Checkpoint(str(tmp_path), None, "sha256:0"), "modalities.x.model")
    assert (read.size, read.mean, read.rescale) == (size, (mean,) * 3, rescale)


def test_preprocessor_inside_processor_config_and_half_told(tmp_path: Path) -> None:
    from fourmill.checkpoints import Checkpoint

    checkpoint = Checkpoint(str(tmp_path), None, "sha256:0")
    inner = {"size": 32, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    read = read_preprocessing(checkpoint, "x")
    assert read.mean == (0.1, 0.2, 0.3) and read.fill == (26, 51, 76)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, "do_normalize": True}))
    with pytest.raises(CheckpointError, match="image_mean and image_std are None and None"):
        read_preprocessing(checkpoint, "x")


def test_every_network_labeler_has_a_default_model_and_a_reference_name() -> None:
    for name in ("depth", "normal", "semseg", "det", "clip"):
        cls = labelers.get(name)
        assert cls.default_model == f"shipped:{name}"
        assert cls.modality.reference_name == ("det" if name == "det" else f"tok_{name}@{{size}}")
