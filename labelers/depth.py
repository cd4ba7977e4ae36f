"""Depth from one image: DPT, Depth Anything, GLPN and their kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from fourmill.errors import ConfigError, nearest
from fourmill.labelers.base import register
from fourmill.labelers.card import LETTERBOXED, Card, Weights
from fourmill.labelers.letterbox import Placement, map_to_frame
from fourmill.labelers.network import NETWORK_OPTIONS, NetworkLabeler
from fourmill.labels import Label
from fourmill.modality import LabelContract, Modality

if TYPE_CHECKING:
    import torch

#: Metric depth is clamped to at least this: networks that end in a ReLU can say zero.
MIN_DEPTH_M = 0.01
#: Relative depth spans this much from the nearest surface (1) to the farthest (`MAX_RELATIVE`).
MAX_RELATIVE = 100.0

DEPTH = Modality(
    name="depth",
    kind="grid",
    codec="vqvae",
    reference_name="tok_depth@{size}",
    doc="distance of each pixel's surface from the camera",
    contract=LabelContract(
        form="map",
        dtype="float32",
        units="metres",
        low=MIN_DEPTH_M,
        frame="z-depth: along the optical axis, not along the ray; larger is farther",
        resample="bilinear",
    ),
)

_ANYTHING_V2 = "Yang et al., Depth Anything V2, NeurIPS 2024, arXiv:2406.09414"
_DPT = "Ranftl et al., Vision Transformers for Dense Prediction, ICCV 2021, arXiv:2103.13413"

CARD = Card(
    expects=LETTERBOXED,
    default=Weights(
        model="depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf",
        revision="8078d68a9c75a972131914f6afd0c1723be0da7f",
        license="Apache-2.0",
        note="metric, trained on rendered interiors, up to 20 m. Its page names no licence: this is what the project "
        "says of its Small models, while Base and Large are CC-BY-NC-4.0",
        citation=_ANYTHING_V2,
    ),
    paper=Weights(
        model="sashasax/omnidata_depth_dpt_hybrid_384",
        license="CC-BY-NC-4.0",
        loads=False,
        note="Omnidata DPT-Hybrid; published as a pickled .pth in a layout of its own. Its nearest kin that loads is "
        "Intel/dpt-hybrid-midas",
        citation="Eftekhar et al., Omnidata, ICCV 2021, arXiv:2110.04994",
    ),
    others=(
        Weights(
            model="depth-anything/Depth-Anything-V2-Small-hf",
            revision="5426e4f0f36572d16453bbda7a8389317b1bef99",
            license="Apache-2.0",
            note="relative, for scenes of every kind; `normal_from_depth` wants metric depth",
            citation=_ANYTHING_V2,
        ),
        Weights(
            model="depth-anything/Depth-Anything-V2-Large-hf",
            license="CC-BY-NC-4.0",
            note="relative",
            citation=_ANYTHING_V2,
        ),
        Weights(
            model="Intel/dpt-hybrid-midas",
            license="Apache-2.0",
            note="relative; safetensors stand in a pull request of its repository, not at main",
            citation=_DPT,
        ),
    ),
)

_KINDS = ("auto", "metric", "relative_inverse")
_METRIC_FAMILIES = ("glpn", "zoedepth", "tipsv2_dpt")


@register("depth")
class Depth(NetworkLabeler):
    """float32 (H, W). ``kind`` says what the network predicts:

    - ``metric``: z-depth in metres, stored as it is (at least `MIN_DEPTH_M`).
    - ``relative_inverse``: inverse depth up to an unknown scale (MiDaS, Depth Anything: larger is nearer).
      Stored is its reciprocal, so that larger is farther as in metric depth: 1 / max(q, 1/100), q being
      the prediction divided by its maximum over the image. It lies in [1, 100] without a unit, and since the
      network's shift is unknown too, ratios of distances are not to be trusted.
    - ``auto``: the checkpoint's ``depth_estimation_type`` ("metric" or "relative") where it has one, metric for
      GLPN and ZoeDepth, else relative_inverse. A DPT trained on metres says so in its config.json.
    """

    modality: ClassVar[Modality] = DEPTH
    card: ClassVar[Card | None] = CARD
    default_model: ClassVar[str | None] = "shipped:depth"
    expected: ClassVar[str] = "a depth network"
    options: ClassVar[Mapping[str, Any]] = {**NETWORK_OPTIONS, "kind": "auto"}
    auto_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "AutoModelForDepthEstimation": (
            "dpt", "depth_anything", "glpn", "zoedepth", "depth_pro", "chmv2", "tipsv2_dpt",
        )
    }  # fmt: skip

    def describe(self) -> Modality:
        if self._kind(self.config()) == "metric":
            return DEPTH
        contract = replace(
            DEPTH.contract,
            units="relative to the nearest surface, which is 1",
            low=1.0,
            high=MAX_RELATIVE,
            frame="reciprocal of a predicted inverse depth of unknown scale and shift; larger is farther",
        )
        return replace(DEPTH, contract=contract)

    def load(self) -> None:
        super().load()
        self.metric = self._kind(self.config()) == "metric"

    def _kind(self, config: Mapping[str, Any]) -> str:
        kind = self.params["kind"]
        if kind not in _KINDS:
            raise ConfigError(
                f"{self.where}.kind: unknown kind of depth {kind!r}{nearest(str(kind), _KINDS)}"
            )
        if kind != "auto":
            return str(kind)
        said = config.get("depth_estimation_type")
        metric = said == "metric" if said else config.get("model_type") in _METRIC_FAMILIES
        return "metric" if metric else "relative_inverse"

    def read(self, output: Any, placements: Sequence[Placement]) -> list[Label]:
        predicted = output.predicted_depth.float()  # (B, h, w)
        finish = _metric if self.metric else _relative
        maps = [finish(map_to_frame(row[None], at)[0]) for row, at in zip(predicted, placements, strict=True)]
        return [one.cpu().numpy() for one in maps]  # a device is waited for once all is asked of it


def _metric(depth_m: torch.Tensor) -> torch.Tensor:
    return depth_m.clamp(min=MIN_DEPTH_M)


def _relative(inverse: torch.Tensor) -> torch.Tensor:
    positive = inverse.clamp(min=0)
    nearness = positive / positive.max().clamp(min=1e-12)
    return 1 / nearness.clamp(1 / MAX_RELATIVE, 1)
