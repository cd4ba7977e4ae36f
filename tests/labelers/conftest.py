"""Tiny networks of the real architectures, with random weights, saved as ordinary checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, labelers
from fourmill.seeds import generator

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SCENE_LABELS = {0: "floor", 1: "wall", 2: "sphere", 3: "box", 4: "cylinder"}
#: gaps and a late start as in COCO's numbering, and a name that stands twice
DET_LABELS = {0: "N/A", 1: "sphere", 2: "box", 3: "N/A", 4: "cylinder", 5: "box"}


def write_preprocessor(folder: Path, size: Any = 64, **changes: Any) -> None:
    content = {
        "do_resize": True, "size": {"height": size, "width": size} if isinstance(size, int) else size,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps({**content, **changes}))


def batch_of(*sizes: tuple[int, int], seed: int = 0) -> LabelBatch:
    """Random frames of (H, W)."""
    rng = np.random.default_rng(seed)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return as_batch(frames)


def as_batch(frames: list[np.ndarray], **more: Any) -> LabelBatch:
    for frame in frames:
        frame.setflags(write=False)  # as they come out of Ray's object store
    keys = [f"k{index}" for index in range(len(frames))]
    return LabelBatch(keys=keys, frames=frames, present=np.ones(len(frames), bool), **more)


def make_labeler(
    name: str, folder: Path | str | None = None, *, precision: str = "fp32", **options: Any
) -> Labeler:
    settings = LabelerSettings(
        modality=name, model=None if folder is None else str(folder), precision=precision, options=options
    )
    return labelers.get(name)(settings)


def _dpt(**changes: Any) -> Any:
    from transformers import DPTConfig

    return DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
        **changes,
    )  # fmt: skip


def _resnet() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )


def _swin() -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def _build(name: str) -> Any:
    import transformers as hf

    detr = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    }  # fmt: skip
    if name == "dpt_metric":
        return hf.DPTForDepthEstimation(_dpt(depth_estimation_type="metric"))
    if name == "dpt_plain":
        return hf.DPTForDepthEstimation(_dpt())
    if name == "depth_anything":
        backbone = hf.Dinov2Config(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
            out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
        )  # fmt: skip
        return hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8, head_hidden_size=8,
            )
        )  # fmt: skip
    if name == "dpt_normal":
        return hf.DPTForSemanticSegmentation(_dpt(num_labels=3))
    if name in ("segformer", "segformer_normal"):
        labels = SCENE_LABELS if name == "segformer" else {0: "x", 1: "y", 2: "z"}
        return hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
                decoder_hidden_size=8, id2label=labels,
            )
        )  # fmt: skip
    if name == "mask2former":
        return hf.Mask2FormerForUniversalSegmentation(
            hf.Mask2FormerConfig(
                backbone_config=_swin(), feature_size=32, mask_feature_size=32, hidden_dim=16, encoder_layers=1,
                decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16, num_queries=6,
                num_attention_heads=2, id2label=SCENE_LABELS,
            )
        )  # fmt: skip
    if name == "detr":
        return hf.DetrForObjectDetection(
            hf.DetrConfig(
                use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=_resnet(),
                num_queries=7, id2label=DET_LABELS, **detr,
            )
        )  # fmt: skip
    if name == "yolos":
        return hf.YolosForObjectDetection(
            hf.YolosConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=[64, 64],
                num_detection_tokens=7, id2label=DET_LABELS,
            )
        )  # fmt: skip
    if name == "rt_detr":
        backbone = hf.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        return hf.RTDetrForObjectDetection(
            hf.RTDetrConfig(
                backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8], encoder_layers=1,
                encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, decoder_in_channels=[16, 16, 16],
                decoder_layers=2, decoder_ffn_dim=16, decoder_attention_heads=2, decoder_n_points=2, num_queries=7,
                num_denoising=0, id2label=dict(enumerate(("sphere", "box", "cylinder"))),
            )
        )  # fmt: skip
    if name in ("clip", "clip_vision", "clip_bare"):
        vision = hf.CLIPVisionConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=64,
            patch_size=16, projection_dim=12,
        )  # fmt: skip
        if name != "clip":
            return (hf.CLIPVisionModelWithProjection if name == "clip_vision" else hf.CLIPVisionModel)(vision)
        text = hf.CLIPTextConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64
        )
        return hf.CLIPModel(
            hf.CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=12)
        )
    raise KeyError(name)


def _values(purpose: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that no library's initialisation decides, of a size that keeps signals alive through the layers."""
    values = generator(0, purpose).normal(size=shape)
    if len(shape) > 1:
        values *= 1.5 / np.sqrt(np.prod(shape[1:]))
    elif purpose.endswith("weight"):
        values = 1 + 0.2 * values
    else:
        values *= 0.02
    return values.astype(np.float32)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The helpers above, and ``checkpoint("segformer")``: the folder of a tiny network, saved once per session."""
    import torch

    torch.set_num_threads(1)
    folders: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            network = _build(name)
            with torch.no_grad():
                for title, weight in network.named_parameters():
                    weight.copy_(torch.from_numpy(_values(f"{name}/{title}", tuple(weight.shape))))
            network.save_pretrained(folder)
            write_preprocessor(folder, 56 if name == "depth_anything" else 64)
            folders[name] = folder
        return folders[name]

    return SimpleNamespace(
        checkpoint=checkpoint,
        write_preprocessor=write_preprocessor,
        batch_of=batch_of,
        as_batch=as_batch,
        labeler=make_labeler,
        mean=MEAN,
        std=STD,
    )
