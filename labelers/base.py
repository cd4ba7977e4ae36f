"""What a labeler is: a class in one file that maps a batch of images to labels.

It names its modality and its inputs, loads its network in `load`, and knows nothing of storage,
crops of other labelers, or tokens. Register it and the flow, the shards and training know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fourmill.checkpoints import Checkpoint, resolve
from fourmill.errors import ConfigError, ContractError, nearest
from fourmill.labelers.card import Card, license_of
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.registry import Registry

labelers: Registry[Labeler] = Registry("labeler", "fourmill.labelers", group="fourmill.labelers")
register = labelers.register


#: keys that every modality of a configuration may have, beside its labeler's own options
COMMON_KEYS = (
    "labeler", "model", "revision", "license", "batch_size", "precision", "keep_labels", "quality",
    "tokenizer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LabelerSettings:
    """What the configuration says about one labeler, and where it runs."""

    modality: str  # the key under `modalities:`
    model: str | None = None  # folder, hub id or "shipped:NAME"; None: the labeler's default
    revision: str | None = None
    license: str | None = None  # of the weights, where the configuration names it
    precision: str = "fp32"
    device: str = "cpu"
    image_size: int = 224  # side of a crop in pixels
    options: Mapping[str, Any] = field(default_factory=dict)
    upstream: Mapping[str, Modality] = field(
        default_factory=dict
    )  # that its inputs name, as their labelers describe them


@dataclass(frozen=True, slots=True)
class LabelBatch:
    """B rows of one shard. Rows that were set aside hold a blank (black) image and ``present`` False.

    ``frames``: uint8 (H, W, 3) RGB per row, the whole image in the dataset's decode frame.
    ``crops``: uint8 (B, n_crops, S, S, 3), given to labelers whose inputs name "crops".
    ``truth``: per row the source's ground truth by modality name, given where inputs name "truth".
    ``upstream``: labels of the modalities that inputs name as "label:<modality>".
    Arrays may be read-only: copy before writing.
    """

    keys: Sequence[str]
    frames: Sequence[np.ndarray]
    present: np.ndarray
    captions: Sequence[Sequence[str]] = ()
    crops: np.ndarray | None = None
    truth: Sequence[Mapping[str, Any] | None] = ()
    upstream: Mapping[str, Sequence[Label]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frames)


def upstream_of(inputs: Sequence[str]) -> tuple[str, ...]:
    """The modalities whose labels are among the inputs."""
    return tuple(name.removeprefix("label:") for name in inputs if name.startswith("label:"))


class Labeler(ABC):
    """Base class. Class attributes say what it is; `load` and `label` do the work.

    Raise ``version`` whenever the same weights and parameters would give other labels.
    ``sees`` "image": one label per image, in the frame of the whole image, cropped afterwards by the
    engine. "crops": one label per crop, list in row-major (row, crop) order.
    """

    version: ClassVar[int] = 1
    modality: ClassVar[Modality]
    inputs: ClassVar[tuple[str, ...]] = ("image",)
    sees: ClassVar[str] = "image"
    default_model: ClassVar[str | None] = None
    #: figures that `label` notes of each image beside those of its modality, such as "confidence"
    notes: ClassVar[tuple[str, ...]] = ()
    #: options that the configuration may set beside the common ones, with their defaults
    options: ClassVar[Mapping[str, Any]] = {}
    #: those of them that came after labels had been made: at its default such an option is left out of the recipe, so
    #: that these labels keep theirs. (An option that is new with its labeler, or its `version`, need not be named.)
    later_options: ClassVar[frozenset[str]] = frozenset()
    batch_size: ClassVar[int] = 16
    #: where its weights come from, and what they may be used for
    card: ClassVar[Card | None] = None

    def __init__(self, settings: LabelerSettings) -> None:
        self.settings = settings
        self.where = f"modalities.{settings.modality}"
        for name in settings.options:
            if name not in self.options:
                raise ConfigError(
                    f"{self.where}.{name}: unknown key{nearest(name, [*self.options, *COMMON_KEYS])}"
                )
        self.params: dict[str, Any] = {**self.options, **settings.options}
        self._noted: dict[str, list[float]] = {}

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The weights, or None for a labeler without a network."""
        model = self.settings.model or self.default_model
        return None if model is None else resolve(model, self.settings.revision, f"{self.where}.model")

    @property
    def license(self) -> str | None:
        """The licence of the weights, "unknown" where nobody names one; None for a labeler without a network."""
        model = self.settings.model or self.default_model
        return license_of(self.settings.license, self.card, model, self.checkpoint)

    def upstream_modalities(self) -> tuple[str, ...]:
        return upstream_of(self.inputs)

    def describe(self) -> Modality:
        """The modality with what the checkpoint's configuration adds (class names, channels). Reads no weights."""
        return self.modality

    def load(self) -> None:
        """Load the network. Heavy imports belong here. Called once, before `label`."""
        return

    @abstractmethod
    def label(self, batch: LabelBatch) -> list[Label]:
        """One label per row (or per row and crop), `Absent` where none can be made."""

    def note(self, name: str, values: Sequence[float]) -> None:
        """Say a number of each label that `label` is about to return; one of ``notes``. It enters a shard's figures."""
        if name not in self.notes:
            raise ContractError(
                f"{self.where}: its labeler notes {name!r}, which it does not name in `notes`"
            )
        self._noted[name] = [float(value) for value in values]

    def take_notes(self) -> dict[str, list[float]]:
        """What was noted since the last call."""
        noted, self._noted = self._noted, {}
        return noted

    def recipe(self) -> dict[str, Any]:
        """Everything chosen here that determines the labels; enters the label recipe."""
        checkpoint = self.checkpoint
        return {
            "labeler": type(self).__name__,
            "version": self.version,
            "weights": checkpoint.identity if checkpoint else None,
            "precision": self.settings.precision,
            "params": {
                name: value
                for name, value in self.params.items()
                if name not in self.later_options or value != self.options[name]
            },
        }
