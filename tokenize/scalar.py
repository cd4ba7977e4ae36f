"""The codec family "scalar": a number that is stored as it is. It is no token: training reads it to choose samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fourmill.errors import ContractError
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Codec, Value, check_made_for, read_config, register


@register("scalar")
class ScalarCodec(Codec):
    """float <-> float32, the precision that columns of scalars have."""

    family = "scalar"

    def __init__(self, modality: Modality, image_size: int) -> None:
        self.modality, self.image_size = modality, image_size

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        values = np.array([float(label) for label in labels], np.float32)
        if not np.isfinite(values).all():
            raise ContractError(f"{self.modality.name!r}: a score is not finite")
        return [float(value) for value in values]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [float(np.asarray(value, np.float32).reshape(-1)[0]) for value in values]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"family": self.family, "modality": self.modality.name, "image_size": self.image_size}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "card.yaml").write_text(f"modality: {self.modality.name}\n")

    @classmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> ScalarCodec:
        check_made_for(folder, read_config(folder), modality, image_size)
        return cls(modality, image_size)
