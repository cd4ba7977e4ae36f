"""What a codec is: labels to discrete tokens and back, for one modality.

Codecs are fitted or given, then frozen: `save` writes a folder (config.json, safetensors, card.yaml)
whose content hash enters every token recipe.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fourmill.checkpoints import folder_hash
from fourmill.errors import CheckpointError
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.registry import Registry

codecs: Registry[Codec] = Registry("codec", "fourmill.tokenize")
register = codecs.register

#: the family of released 4M tokenizers, and the key that each of their config.json has
PUBLISHED, PUBLISHED_KEY = "published", "dec_type"

#: One stored cell: uint16 (n,) for grid, vector and sequence; bytes for pixels; float16 (n,) for embeddings; float.
Value = np.ndarray | bytes | float


class Codec(ABC):
    """Labels of one modality <-> values of its column.

    ``modality`` is fully resolved: vocabulary size, tokens per crop, class names.
    """

    family: ClassVar[str]
    needs_fit: ClassVar[bool] = False
    #: of weights that somebody else published
    license: ClassVar[str | None] = None

    modality: Modality
    image_size: int

    @abstractmethod
    def encode(self, labels: Sequence[Label]) -> list[Value]:
        """One value per label. Labels are already cropped to (image_size, image_size)."""

    @abstractmethod
    def decode(self, values: Sequence[Value]) -> list[Label]:
        """The labels that the values stand for. Total: any legal token ids give a valid label."""

    def to(self, device: str) -> Codec:
        """Move a network, where there is one, to ``device``; returns the codec itself."""
        return self

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write config.json (with ``family``, ``modality``, ``image_size``) and weights."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> Codec:
        """Read what `save` wrote. Refuses a folder made for another modality, image size or class map."""


def load_codec(folder: Path, modality: Modality, image_size: int) -> Codec:
    """The codec in ``folder``, of whichever family its config.json names."""
    config = read_config(folder)
    if "family" not in config:
        raise CheckpointError(
            f"tokenizer folder {folder}: config.json names no `family`, and is not a published 4M tokenizer's either"
        )
    return codecs.get(config["family"]).load(folder, modality, image_size)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with its family. Raises CheckpointError where it cannot be read."""
    try:
        return with_family(dict(json.loads((folder / "config.json").read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"tokenizer folder {folder}: cannot read config.json: {error}") from error


def with_family(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json's content. That of a published 4M tokenizer names no family: "published" is filled in."""
    return {"family": PUBLISHED, **config} if PUBLISHED_KEY in config else config


def check_made_for(folder: Path, config: dict[str, Any], modality: Modality, image_size: int) -> None:
    """Refuse a tokenizer of another modality, image size or class map, by name."""
    if config["modality"] != modality.name:
        raise CheckpointError(
            f"tokenizer {folder} was made for modality {config['modality']!r}, not {modality.name!r}"
        )
    sizes = config.get("image_sizes", [config["image_size"]])
    if image_size not in sizes:
        raise CheckpointError(
            f"tokenizer {folder} was fitted at image_size {', '.join(map(str, sizes))}, the dataset has {image_size}"
        )
    classes = tuple(config.get("classes", ()))
    if classes != modality.contract.classes:
        raise CheckpointError(
            f"tokenizer {folder} knows the classes {', '.join(classes) or '(none)'}; "
            f"{modality.name!r} here has {', '.join(modality.contract.classes) or '(none)'}"
        )


def codec_hash(folder: Path) -> str:
    """sha256 of a tokenizer's folder; its first 12 digits name it in the dataset."""
    return folder_hash(str(folder.resolve()))
