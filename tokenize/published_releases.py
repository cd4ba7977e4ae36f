"""Which of the twelve published tokenizers is for which modality, and what they were trained on.

Facts of arXiv 2312.06647 and 2406.09406 and of the releases at huggingface.co/EPFL-VILAB.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fourmill.errors import ConfigError
from fourmill.modality import Modality
from fourmill.tokenize.published_network import ReleasedConfig

#: for `fourmill.licenses`; the text is LICENSE_WEIGHTS of apple/ml-4m
LICENSE = "Sample Code License of EPFL and Apple (non-commercial)"
#: encoders of the releases themselves; a config with another one is of somebody's own training
_RELEASED = ("vit_b_enc", "BottleneckMLP/B_6-Wi_1024")
_REPOSITORY = re.compile(r"4M_tokenizers_([A-Za-z0-9.-]+)_")

Kind = Literal["picture", "normal", "depth", "classes", "features", "vector", "mask"]


@dataclass(frozen=True, slots=True)
class Release:
    """``name`` follows "4M_tokenizers_"; ``codes`` is the vocabulary, ``channels`` those of the network's input."""

    name: str
    kind: Kind
    codes: int
    channels: tuple[int, ...]
    heads: int = 1  # tokens per place

    @property
    def repository(self) -> str:
        return f"EPFL-VILAB/4M_tokenizers_{self.name}"


_EDGES = Release("edge_8k_224-512", "picture", 8192, (3, 1))
#: by 4M's name of the modality, without its size
RELEASES: dict[str, Release] = {
    "tok_rgb": Release("rgb_16k_224-448", "picture", 16384, (3,)),
    "tok_depth": Release("depth_8k_224-448", "depth", 8192, (1,)),
    "tok_normal": Release("normal_8k_224-448", "normal", 8192, (3,)),
    "tok_canny_edge": _EDGES,
    "tok_sam_edge": _EDGES,
    "tok_semseg": Release("semseg_4k_224-448", "classes", 4096, (64,)),
    "tok_clip": Release("CLIP-B16_8k_224-448", "features", 8192, (512,)),
    "tok_dinov2": Release("DINOv2-B14_8k_224-448", "features", 8192, (768,)),
    "tok_imagebind": Release("ImageBind-H14_8k_224-448", "features", 8192, (1280,)),
    "tok_dinov2_global": Release("DINOv2-B14-global_8k_16_224", "vector", 8192, (768,), 16),
    "tok_imagebind_global": Release("ImageBind-H14-global_8k_16_224", "vector", 8192, (1280,), 16),
    "tok_sam_mask": Release("sam-instance_1k_64", "mask", 1024, (1,)),
    "tok_body_pose": Release("human-poses_1k_8", "vector", 1024, (207,), 8),
}


def release_for(modality: Modality) -> Release:
    """By 4M's name for the modality, else by ours. ConfigError where there is none."""
    for name in (modality.reference_name.partition("@")[0], f"tok_{modality.name}"):
        if name in RELEASES:
            return RELEASES[name]
    known = ", ".join(name.removeprefix("tok_") for name in RELEASES)
    raise ConfigError(
        f"there is no published tokenizer for modality {modality.name!r}; there are for {known}"
    )


def check_release(release: Release, modality: Modality, config: ReleasedConfig, folder: Path) -> None:
    """Refuse the tokenizer of another modality: by its folder's name, its channels, its codes. Raises ConfigError."""
    names = {other.name.partition("_")[0] for other in RELEASES.values()}
    stated = [found[1] for part in folder.parts if (found := _REPOSITORY.search(part)) and found[1] in names]
    if stated and stated[-1] != release.name.partition("_")[0]:
        raise ConfigError(
            f"it is the tokenizer of {stated[-1]}; for {modality.name!r} take {release.repository}"
        )
    takes = {"classes": bool(config.n_labels), "vector": config.quant_type == "memcodes"}
    if any(is_so != (release.kind == kind) for kind, is_so in takes.items()):
        raise ConfigError(f"it takes other labels than {modality.name!r} has; take {release.repository}")
    is_small = config.enc_type not in _RELEASED
    is_free = is_small and release.kind in ("classes", "features", "vector")
    if config.n_channels not in release.channels and not is_free:
        raise ConfigError(
            f"it takes {config.n_channels} channels, a tokenizer of {modality.name!r} takes {release.channels[0]}; "
            f"take {release.repository}"
        )
    if not is_small and (config.codebook_size, config.heads) != (release.codes, release.heads):
        raise ConfigError(
            f"it has {config.heads} x {config.codebook_size} codes, that of {modality.name!r} has {release.heads} x "
            f"{release.codes}; take {release.repository}"
        )


#: COCO's panoptic classes in the order of their ids; the published tokenizer puts "none" before them
COCO_PANOPTIC = tuple(
    """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|bench
    |bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard
    |sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon
    |bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table
    |toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors
    |teddy bear|hair drier|toothbrush|banner|blanket|bridge|cardboard|counter|curtain|door-stuff|floor-wood|flower|fruit
    |gravel|house|light|mirror-stuff|net|pillow|platform|playingfield|railroad|river|road|roof|sand|sea|shelf|snow|stairs
    |tent|towel|wall-brick|wall-stone|wall-tile|wall-wood|water-other|window-blind|window-other|tree-merged|fence-merged
    |ceiling-merged|sky-other-merged|cabinet-merged|table-merged|floor-other-merged|pavement-merged|mountain-merged
    |grass-merged|dirt-merged|paper-merged|food-other-merged|building-other-merged|rock-merged|wall-other-merged
    |rug-merged""".replace("\n    ", "").split("|")
)  # fmt: skip


def plain_class(name: str) -> str:
    """Checkpoints write "sky-other-merged" and "sky" for the same class."""
    return re.sub(r"(-other|-merged|-stuff)+$", "", name.strip().lower().replace("_", " "))
