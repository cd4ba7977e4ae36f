"""The one word that labelers, codecs, shards and training share: the Modality.

A labeler *declares* its modality; a dataset *resolves* it (image size, class names, tokenizer), so
``semseg`` of scenes and ``semseg`` of COCO are two resolutions of one declaration.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["grid", "vector", "sequence", "pixels", "embedding", "scalar"]
FlipRule = Literal["mirror", "mirror_negate_x", "none"]
Form = Literal[
    "map", "features", "boxes", "text", "vector", "scalar", "image", "metadata", "palette", "poses", "instances"
]  # fmt: skip
Resample = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelContract:
    """What a label of this modality is, whoever made it. Checked on every batch."""

    form: Form
    dtype: str  # of the label in memory, e.g. "float32"
    stored: str = ""  # dtype that labels are rounded to as soon as they are made, and kept in ("": dtype)
    channels: int | None = None  # None: no channel axis; 0: known when the network is loaded
    units: str = ""  # "metres", "unit vector", "class id", ...
    low: float | None = None  # smallest legal value, inclusive
    high: float | None = None  # largest legal value, inclusive
    unit_norm: bool = False  # vectors along the channel axis have length one
    frame: str = ""  # prose: which way the axes point, what zero means
    resample: Resample = "bilinear"  # how a map is resized when it is cropped
    flip: FlipRule = "mirror"  # what a horizontal flip does to it
    classes: tuple[str, ...] = ()  # class names by id, known when the network is loaded


@dataclass(frozen=True, kw_only=True, slots=True)
class Modality:
    """A modality: its label contract, how it is tokenized, and what training sees of it.

    ``kind`` grid: ``num_tokens`` ids on a square grid; vector: a few ids; sequence: up to
    ``max_tokens`` ids, masked by spans; pixels: image bytes; embedding: floats, input only; scalar: a score.
    ``vocab_size`` and ``num_tokens`` are 0 until a tokenizer resolves them.
    ``reference_name`` is the name in 4M's own code, e.g. ``tok_depth@224``.
    """

    name: str
    kind: Kind
    contract: LabelContract
    codec: str = ""  # name of the codec family in fourmill.tokenize
    vocab_size: int = 0
    num_tokens: int = 0  # per crop; for sequences the longest that training keeps
    reference_name: str = ""
    doc: str = ""
    codec_options: dict[str, object] = field(default_factory=dict, hash=False)

    def resolved(self, **changes: object) -> Modality:
        """A copy in which the dataset's facts are filled in."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def with_classes(self, classes: tuple[str, ...]) -> Modality:
        return replace(self, contract=replace(self.contract, classes=classes))


IMAGE_CONTRACT = LabelContract(
    form="image",
    dtype="uint8",
    channels=3,
    units="sRGB",
    low=0,
    high=255,
    resample="bicubic",
    frame="rows from the top, columns from the left",
)

RGB = Modality(
    name="rgb",
    kind="grid",
    contract=IMAGE_CONTRACT,
    codec="vqvae",
    reference_name="tok_rgb@{size}",
    doc="the image itself, tokenized",
)
RGB_PIXELS = Modality(
    name="rgb_pixels",
    kind="pixels",
    contract=IMAGE_CONTRACT,
    codec="pixels",
    reference_name="rgb@{size}",
    doc="the crop's pixels as image bytes: an input to the encoder, never a target",
)
CAPTION = Modality(
    name="caption",
    kind="sequence",
    codec="text",
    reference_name="caption",
    num_tokens=256,
    contract=LabelContract(
        form="text", dtype="str", flip="none", frame="the captions that came with the image"
    ),
    doc="the image's captions",
)

#: Modalities that come from the source itself; no labeler makes them.
SOURCE_MODALITIES: dict[str, Modality] = {m.name: m for m in (RGB, RGB_PIXELS, CAPTION)}
