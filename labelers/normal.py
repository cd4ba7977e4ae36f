"""Surface normals from one image: any dense network with three output channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fourmill.errors import CheckpointError, ConfigError
from fourmill.labelers.base import LabelerSettings, register
from fourmill.labelers.card import LETTERBOXED, Card, Weights
from fourmill.labelers.letterbox import Placement, map_to_frame
from fourmill.labelers.network import NETWORK_OPTIONS, NetworkLabeler
from fourmill.labels import Label
from fourmill.modality import LabelContract, Modality

NORMAL = Modality(
    name="normal",
    kind="grid",
    codec="vqvae",
    reference_name="tok_normal@{size}",
    doc="the direction that each pixel's surface faces",
    contract=LabelContract(
        form="map",
        dtype="float32",
        channels=3,
        units="unit vector",
        low=-1.0001,
        high=1.0001,
        unit_norm=True,
        frame="camera space: x to the right, y up, z toward the viewer (a wall facing the camera is 0, 0, 1)",
        resample="bilinear",
        flip="mirror_negate_x",
    ),
)

CARD = Card(
    expects=LETTERBOXED,
    note="the configurations for photographs take `normal_from_depth`. Networks differ in their axes: before a build "
    "hold a few labels against that one's, and set `axis_signs`",
    default=Weights(
        model="google/tipsv2-b14-dpt",
        license="Apache-2.0",
        note="trained on NYU Depth V2: interiors; take a commit whose config.json is for transformers' own classes",
        citation="TIPSv2: Advancing Vision-Language Pretraining with Enhanced Patch-Text Alignment, 2026, "
        "arXiv:2604.12012",
    ),
    paper=Weights(
        model="sashasax/omnidata_normal_dpt_hybrid_384",
        license="CC-BY-NC-4.0",
        loads=False,
        note="Omnidata DPT-Hybrid; published as a pickled .pth in a layout of its own. Converted to a "
        "DPTForSemanticSegmentation with three labels it loads from a folder",
        citation="Eftekhar et al., Omnidata, ICCV 2021, arXiv:2110.04994; Kar et al., 3D Common Corruptions, CVPR 2022",
    ),
    others=(
        Weights(
            model="facebook/sapiens2-normal-1b",
            license="sapiens2-license",
            note="for images of people; a licence of Meta's own. Take a commit with files for transformers",
            citation="Sapiens2, 2026, arXiv:2604.21681",
        ),
    ),
)


@register("normal")
class Normal(NetworkLabeler):
    """float32 (H, W, 3) unit vectors: the network's three channels, upsampled, then normalised.

    ``axis_signs`` turns a network's axes into ours (x right, y up, z toward the viewer): [1, -1, -1] for one that
    speaks the OpenCV camera frame (y down, z away).
    """

    modality: ClassVar[Modality] = NORMAL
    card: ClassVar[Card | None] = CARD
    default_model: ClassVar[str | None] = "shipped:normal"
    expected: ClassVar[str] = "a normals network with 3 output channels"
    options: ClassVar[Mapping[str, Any]] = {**NETWORK_OPTIONS, "axis_signs": [1, 1, 1]}
    auto_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "AutoModelForSemanticSegmentation": ("dpt", "segformer", "upernet", "beit"),
        "AutoModelForNormalEstimation": ("sapiens2", "tipsv2_dpt"),
    }

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        signs = self.params["axis_signs"]
        if not (
            isinstance(signs, (list, tuple)) and len(signs) == 3 and all(sign in (1, -1) for sign in signs)
        ):
            raise ConfigError(f"{self.where}.axis_signs: {signs!r} is not three signs such as [1, -1, -1]")

    def describe(self) -> Modality:
        self._check_channels()
        return NORMAL

    def load(self) -> None:
        self._check_channels()
        super().load()

    def _check_channels(self) -> None:
        """A segmentation head's channels are its labels; transformers takes two where config.json names none."""
        config = self.config()
        channels = len(config.get("id2label") or ()) or int(config.get("num_labels", 2))
        if channels != 3 and self._choose(config) == "AutoModelForSemanticSegmentation":
            raise CheckpointError(
                f"{self.where}.model: {self.weights.source} has {channels} output channels; {self.expected} is expected"
            )

    def read(self, output: Any, placements: Sequence[Placement]) -> list[Label]:
        import torch

        vectors = (output.logits if "logits" in output else output.normals).float()  # (B, 3, h, w)
        signs = torch.tensor(self.params["axis_signs"], device=vectors.device, dtype=vectors.dtype).view(
            3, 1, 1
        )
        labels = []
        for row, at in zip(vectors, placements, strict=True):
            full = map_to_frame(row, at) * signs
            # opposite vectors can cancel to zero length: such a pixel faces the viewer
            facing = torch.tensor([0.0, 0.0, 1.0], device=full.device).view(3, 1, 1)
            length = _length(full)
            full = torch.where(length > 1e-12, full / length.clamp(min=1e-12), facing)
            labels.append(full.permute(1, 2, 0).contiguous())
        return [label.cpu().numpy() for label in labels]


def _length(vectors: Any) -> Any:
    """Of (3, H, W): (1, H, W). `Tensor.norm` along a short first axis takes a hundred times as long.

    The root is taken in double precision: correctly rounded, unlike that of vectors in single precision.
    """
    x, y, z = vectors
    return (x * x + y * y + z * z).double().sqrt().to(vectors.dtype)[None]
