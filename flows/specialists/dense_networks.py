"""The dense networks as they start: architectures of `transformers` at a size that two CPU cores can train.

All see 128 px, normalised to [-1, 1].
"""

from typing import Any

from torch import nn

from fourmill.shards.sources.scenes import SCENE_CLASSES

SIZE = 128
TASKS = ("depth", "normal", "semseg")
MEAN_DEPTH_M = 4.0  # what an untrained depth network says


def make_network(task: str) -> Any:
    """A network with fresh weights: DPT-hybrids for depth and normals, a SegFormer with fine stages for classes."""
    from transformers import DPTForDepthEstimation, DPTForSemanticSegmentation

    if task == "depth":
        network = DPTForDepthEstimation(_dpt_config())
        # metres; labelers read it. It is written after construction, which would drop it
        network.config.depth_estimation_type = "metric"
    elif task == "normal":
        network = DPTForSemanticSegmentation(_dpt_config(**_names(["x", "y", "z"])))
    else:
        network = _segformer(list(SCENE_CLASSES))
    _scale_weights(network)
    if task == "depth":
        nn.init.constant_(network.head.head[-2].bias, MEAN_DEPTH_M)
    return network


def make_processor(task: str) -> Any:
    """The image processor that goes with `make_network`: squares of 128 px, (x / 255 - 0.5) / 0.5."""
    from transformers import DPTImageProcessor, SegformerImageProcessor

    kind = SegformerImageProcessor if task == "semseg" else DPTImageProcessor
    return kind(
        size={"height": SIZE, "width": SIZE},
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _names(names: list[str]) -> dict[str, Any]:
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: k for k, name in enumerate(names)},
    }


def _segformer(names: list[str]) -> Any:
    """Stages at 1/2, 1/4, 1/8 and 1/16 (the original: 1/4 to 1/32), since outlines at 128 px need them."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        **_names(names),
        patch_sizes=[5, 3, 3, 3],
        strides=[2, 2, 2, 2],
        hidden_sizes=[16, 48, 96, 144],
        depths=[1, 2, 3, 2],
        sr_ratios=[8, 4, 2, 1],
        num_attention_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 3, 4, 4],
        decoder_hidden_size=32,
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    return SegformerForSemanticSegmentation(config)


def _dpt_config(**more: Any) -> Any:
    """Three convolutional stages at 1/4, 1/8 and 1/16, a transformer on the last, and the DPT decoder."""
    from transformers import BitConfig, DPTConfig

    widths, hidden, layers = [64, 128, 256], 144, 4
    backbone = BitConfig(
        embedding_size=32,
        hidden_sizes=widths,
        depths=[2, 3, 3],
        layer_type="bottleneck",
        num_groups=4,
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    return DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        backbone_featmap_shape=[1, widths[-1], SIZE // 16, SIZE // 16],
        image_size=SIZE,
        patch_size=16,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=3 * hidden,
        backbone_out_indices=[0, 0, layers // 2 - 1, layers - 1],
        neck_hidden_sizes=[widths[0], widths[1], hidden, hidden],
        neck_ignore_stages=[0, 1],
        reassemble_factors=[1, 1, 1, 0.5],
        readout_type="project",
        fusion_hidden_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        semantic_classifier_dropout=0.0,
        use_auxiliary_head=False,
        **more,
    )


def _scale_weights(network: nn.Module) -> None:
    """Draws matrices and kernels with variance 1 / fan-in. The library's 0.02 suits widths of 768, not of 48."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
