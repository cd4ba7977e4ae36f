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
    """A network with fresh weights: DPT-hybrid for depth, SegFormers with fine stages for normals and classes."""
    if task == "depth":
        network = _dpt_hybrid()
        _scale_weights(network)
        nn.init.constant_(network.head.head[-2].bias, MEAN_DEPTH_M)
        return network
    names = ["x", "y", "z"] if task == "normal" else list(SCENE_CLASSES)
    network = _segformer(names)
    _scale_weights(network)
    return network


def make_processor(task: str) -> Any:
    """The image processor that goes with `make_network`: squares of 128 px, (x / 255 - 0.5) / 0.5."""
    from transformers import DPTImageProcessor, SegformerImageProcessor

    kind = DPTImageProcessor if task == "depth" else SegformerImageProcessor
    return kind(
        size={"height": SIZE, "width": SIZE},
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _segformer(names: list[str]) -> Any:
    """Stages at 1/2, 1/4, 1/8 and 1/16 (the original: 1/4 to 1/32), since outlines at 128 px need them."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
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


def _dpt_hybrid() -> Any:
    """Three convolutional stages at 1/4, 1/8 and 1/16, a transformer on the last, and the DPT decoder."""
    from transformers import BitConfig, DPTConfig, DPTForDepthEstimation

    widths, hidden, layers = [32, 64, 128], 128, 4
    backbone = BitConfig(
        embedding_size=32,
        hidden_sizes=widths,
        depths=[2, 2, 2],
        layer_type="bottleneck",
        num_groups=8,
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = DPTConfig(
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
        fusion_hidden_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_auxiliary_head=False,
    )
    config.depth_estimation_type = "metric"  # metres; says so to whoever loads it
    return DPTForDepthEstimation(config)


def _scale_weights(network: nn.Module) -> None:
    """Draws matrices and kernels with variance 1 / fan-in. The library's 0.02 suits widths of 768, not of 48."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
