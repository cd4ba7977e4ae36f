"""The codec family "pixels": a crop <-> the bytes of a small image file. Nothing to fit."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Codec, Value, check_made_for, read_config, register

FORMATS = ("webp", "png")


@register("pixels")
class PixelsCodec(Codec):
    """uint8 (S, S, 3) <-> bytes, WebP (lossy unless ``lossless``) or PNG.

    ``num_tokens`` is what the model's patch projection will make of a crop: (S / patch_size) squared.
    """

    family = "pixels"

    def __init__(
        self,
        modality: Modality,
        image_size: int,
        format: str = "webp",
        quality: int = 90,
        lossless: bool = False,
        patch_size: int = 16,
    ) -> None:
        if format not in FORMATS:
            raise ConfigError(
                f"modalities.{modality.name}.tokenizer.format: {format!r}; known: {', '.join(FORMATS)}"
            )
        if not 1 <= int(quality) <= 100:
            raise ConfigError(
                f"modalities.{modality.name}.tokenizer.quality: {quality}; it goes from 1 to 100"
            )
        if image_size % patch_size:
            raise ConfigError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        self.image_size, self.format, self.quality = image_size, format, int(quality)
        self.lossless, self.patch_size = lossless, patch_size
        self.modality = modality.resolved(num_tokens=(image_size // patch_size) ** 2)

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return [self._encode(np.asarray(label)) for label in labels]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [self._decode(value) for value in values]

    def _encode(self, crop: np.ndarray) -> bytes:
        if crop.shape != (self.image_size, self.image_size, 3) or crop.dtype != np.uint8:
            raise ContractError(
                f"{self.modality.name!r}: a crop is {crop.dtype} {crop.shape}, wanted is uint8 "
                f"({self.image_size}, {self.image_size}, 3)"
            )
        stream = io.BytesIO()
        if self.format == "png":
            Image.fromarray(crop).save(stream, "PNG")
        else:
            Image.fromarray(crop).save(
                stream, "WEBP", quality=self.quality, lossless=self.lossless, exact=True
            )
        return stream.getvalue()

    def _decode(self, value: Value) -> np.ndarray:
        """The size in the header is checked before any pixel is decoded."""
        if not isinstance(value, bytes):
            raise ContractError(f"{self.modality.name!r}: a stored crop is {type(value).__name__}, not bytes")
        try:
            with Image.open(io.BytesIO(value), formats=[f.upper() for f in FORMATS]) as image:
                if image.size != (self.image_size, self.image_size):
                    raise ValueError(
                        f"it is {image.size[0]} x {image.size[1]} pixels, not {self.image_size} square"
                    )
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise ContractError(
                f"{self.modality.name!r}: a stored crop cannot be decoded: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "family": self.family,
            "modality": self.modality.name,
            "image_size": self.image_size,
            "classes": list(self.modality.contract.classes),
            "vocab_size": self.modality.vocab_size,
            "num_tokens": self.modality.num_tokens,
            "format": self.format,
            "quality": self.quality,
            "lossless": self.lossless,
            "patch_size": self.patch_size,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "card.yaml").write_text(f"modality: {self.modality.name}\nformat: {self.format}\n")

    @classmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> PixelsCodec:
        config = read_config(folder)
        check_made_for(folder, config, modality, image_size)
        try:
            chosen = {name: config[name] for name in ("format", "quality", "lossless", "patch_size")}
        except KeyError as error:
            raise CheckpointError(f"tokenizer {folder}: config.json lacks {error}") from error
        return cls(modality, image_size, **chosen)
