"""Each card's default at full size with random weights, from its published configuration; for `labelers.py`.

`python benchmarks/full_size.py FOLDER [NAME...]` writes checkpoint folders as transformers would (config.json, safetensors,
preprocessor_config.json), which labelers then load as any other local folder: memory, speed and post-processing of the real
architectures without a hub. What such a network predicts means nothing. Numbers are those of the published config.json and
preprocessor_config.json files; class names, which cost nothing, are not repeated here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP_STATISTICS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers


@dataclass(frozen=True)
class Architecture:
    """``million`` parameters, as its page or paper says (of TIPSv2, whose page was not at hand, as built): a check of the numbers."""

    labeler: str
    published: str
    build: Callable[[], Any]
    preprocessor: Mapping[str, Any]
    million: float


def _preprocessor(kind: str, side: int, resample: int, **changes: Any) -> dict[str, Any]:
    size = {"height": side, "width": side}
    scale = {"do_rescale": True, "rescale_factor": 1 / 255}
    how = {"do_resize": True, "size": size, "resample": resample, "do_normalize": True}
    return {"image_processor_type": kind, **how, **scale, **changes}


def _depth_anything_v2_small() -> Any:
    import transformers as hf

    backbone = hf.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14,
        out_indices=[3, 6, 9, 12], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = hf.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=384, reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=[48, 96, 192, 384], fusion_hidden_size=64, head_hidden_size=32,
        depth_estimation_type="metric", max_depth=20,
    )  # fmt: skip
    return hf.DepthAnythingForDepthEstimation(config)


def _tipsv2_b14_dpt() -> Any:
    import transformers as hf

    backbone = hf.Tipsv2VisionConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4, image_size=448, patch_size=14,
        num_register_tokens=1, out_indices=[3, 6, 9, 12], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = hf.Tipsv2DptConfig(
        backbone_config=backbone, neck_hidden_sizes=[96, 192, 384, 768], fusion_hidden_size=256,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return hf.Tipsv2DptForNormalEstimation(config)


def _upernet_convnext_tiny() -> Any:
    import transformers as hf

    backbone = hf.ConvNextConfig(
        depths=[3, 3, 9, 3], hidden_sizes=[96, 192, 384, 768],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.UperNetConfig(
        backbone_config=backbone, hidden_size=512, pool_scales=[1, 2, 3, 6], use_auxiliary_head=True,
        auxiliary_in_channels=384, auxiliary_channels=256, auxiliary_num_convs=1, id2label=_classes(150),
    )  # fmt: skip
    return hf.UperNetForSemanticSegmentation(config)


def _segformer_b0() -> Any:
    import transformers as hf

    config = hf.SegformerConfig(
        hidden_sizes=[32, 64, 160, 256], depths=[2, 2, 2, 2], num_attention_heads=[1, 2, 5, 8], sr_ratios=[8, 4, 2, 1],
        mlp_ratios=[4, 4, 4, 4], decoder_hidden_size=256, id2label=_classes(150),
    )  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config)


def _rtdetr_v2_r50vd() -> Any:
    import transformers as hf

    backbone = hf.RTDetrResNetConfig(
        embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3], layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.RTDetrV2Config(
        backbone_config=backbone, encoder_in_channels=[512, 1024, 2048], encoder_hidden_dim=256, encoder_layers=1,
        d_model=256, decoder_layers=6, decoder_attention_heads=8, decoder_n_points=4, num_queries=300,
        id2label=_classes(80),
    )  # fmt: skip
    return hf.RTDetrV2ForObjectDetection(config)


def _clip_vision(**changes: Any) -> Any:
    import transformers as hf

    config = hf.CLIPVisionConfig(image_size=224, hidden_act="quick_gelu", **changes)
    return hf.CLIPVisionModelWithProjection(config)


def _clip_large() -> Any:
    return _clip_vision(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14,
        projection_dim=768,
    )  # fmt: skip


def _clip_base() -> Any:
    return _clip_vision(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=16,
        projection_dim=512,
    )  # fmt: skip


def _classes(count: int) -> dict[int, str]:
    return {index: f"class {index}" for index in range(count)}


_CLIP = _preprocessor(
    "CLIPImageProcessor", 224, BICUBIC, size={"shortest_edge": 224}, do_center_crop=True,
    crop_size={"height": 224, "width": 224}, **CLIP_STATISTICS,
)  # fmt: skip
_SEGMENTATION = _preprocessor("SegformerImageProcessor", 512, BILINEAR, **IMAGENET)

ARCHITECTURES: dict[str, Architecture] = {
    "depth-anything-v2-small": Architecture(
        "depth", "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf", _depth_anything_v2_small,
        _preprocessor("DPTImageProcessor", 518, BICUBIC, keep_aspect_ratio=True, ensure_multiple_of=14, **IMAGENET), 24.8,
    ),
    "tipsv2-b14-dpt": Architecture(
        "normal", "google/tipsv2-b14-dpt", _tipsv2_b14_dpt,
        _preprocessor("Tipsv2DptImageProcessor", 448, BICUBIC, do_normalize=False), 110.2,
    ),
    "upernet-convnext-tiny": Architecture(
        "semseg", "openmmlab/upernet-convnext-tiny", _upernet_convnext_tiny, _SEGMENTATION, 60.2
    ),
    "segformer-b0": Architecture(
        "semseg", "nvidia/segformer-b0-finetuned-ade-512-512", _segformer_b0, _SEGMENTATION, 3.8
    ),
    "rtdetr-v2-r50vd": Architecture(
        "det", "PekingU/rtdetr_v2_r50vd", _rtdetr_v2_r50vd,
        _preprocessor("RTDetrImageProcessor", 640, BILINEAR, do_normalize=False, do_pad=False, **IMAGENET), 42.9,
    ),
    "clip-vit-large-patch14": Architecture(
        "clip", "openai/clip-vit-large-patch14", _clip_large, _CLIP, 304.0
    ),
    "clip-vit-base-patch16": Architecture(
        "clip", "openai/clip-vit-base-patch16", _clip_base, _CLIP, 86.2
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """The checkpoint folder ``folder/name``: random weights of a fixed seed, in half precision to spare the disk."""
    import torch

    architecture, target = ARCHITECTURES[name], folder / name
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = architecture.build().eval()
    million = sum(one.numel() for one in network.parameters()) / 1e6
    if abs(million / architecture.million - 1) > 0.03:
        raise SystemExit(
            f"{name}: {million:.1f} M parameters, {architecture.published} has {architecture.million}"
        )
    network.half().save_pretrained(target)
    (target / "preprocessor_config.json").write_text(json.dumps(dict(architecture.preprocessor)))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where to write; without it nothing is written")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(ARCHITECTURES)}"
    )
    arguments = parser.parse_args()
    if arguments.folder is None:
        return
    for name in arguments.names or ARCHITECTURES:
        if name not in ARCHITECTURES:
            parser.error(f"{name!r} is not one of {', '.join(ARCHITECTURES)}")
        print(write(name, arguments.folder))


if __name__ == "__main__":
    main()
