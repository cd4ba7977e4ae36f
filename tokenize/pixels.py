"""The codec family "pixels": a crop <-> the bytes of a small image file, or its pixels as they are. Nothing to fit.

WebP is smallest; JPEG is somewhat larger and decoded in a quarter of the time; raw pixels take ten times the room and next to
no time. PNG, and WebP where it is ``lossless``, change no pixel. `decode_crop` reads all of them, whoever wrote them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Codec, Value, check_made_for, read_config, register

FORMATS = ("webp", "png", "jpeg", "raw")


@register("pixels")
class PixelsCodec(Codec):
    """uint8 (S, S, 3) <-> bytes: WebP (lossy unless ``lossless``), PNG, JPEG, or ``raw``, the pixels row by row.

    ``quality``, from 1 to 100, is that of lossy WebP and of JPEG.
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
        if lossless and format == "jpeg":
            raise ConfigError(
                f"modalities.{modality.name}.tokenizer.lossless: jpeg never is; choose webp, png or raw"
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
        if self.format == "raw":
            return crop.tobytes()
        stream = io.BytesIO()
        if self.format == "png":
            Image.fromarray(crop).save(stream, "PNG")
        elif self.format == "jpeg":
            Image.fromarray(crop).save(stream, "JPEG", quality=self.quality)
        else:
            Image.fromarray(crop).save(
                stream, "WEBP", quality=self.quality, lossless=self.lossless, exact=True
            )
        return stream.getvalue()

    def _decode(self, value: Value) -> np.ndarray:
        if not isinstance(value, bytes):
            raise ContractError(f"{self.modality.name!r}: a stored crop is {type(value).__name__}, not bytes")
        try:
            return decode_crop(value, self.image_size)
        except ContractError as error:
            raise ContractError(f"{self.modality.name!r}: {error}") from error

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


def decode_crop(blob: bytes | memoryview, image_size: int) -> np.ndarray:
    """uint8 (S, S, 3), not to be written to, from what `PixelsCodec` stores in any of its formats.

    A file is known by its first bytes, raw pixels by their number: those show ``blob``'s own memory. ContractError for
    anything else; the size in a file's header is checked before any pixel is decoded.
    """
    side = image_size
    kind = _kind(blob, side * side * 3)
    if kind == "RAW":
        return np.frombuffer(blob, np.uint8).reshape(side, side, 3)
    try:
        if kind is None:
            raise ValueError(
                f"its {len(blob)} bytes are no {', '.join(FORMATS[:-1])}; raw are {side * side * 3}"
            )
        if kind == "JPEG" and (pixels := _decode_jpeg(blob, side)) is not None:
            return pixels
        with Image.open(io.BytesIO(blob), formats=(kind,)) as image:
            if image.size != (side, side):
                raise ValueError(f"it is {image.size[0]} x {image.size[1]} pixels, not {side} square")
            # `convert` would copy what is RGB already
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise ContractError(f"a stored crop cannot be decoded: {error}") from error


def _decode_jpeg(blob: bytes | memoryview, side: int) -> np.ndarray | None:
    """The same pixels as Pillow's, in half the time; None for what that one has to judge: other sizes, CMYK, damage."""
    data = memoryview(blob).cast("B")  # buffers of Arrow say that their bytes are signed
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != (side, side) or colours not in ("YCbCr", "Gray", "RGB"):
            return None
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB"))
    except ValueError:
        return None


def _kind(blob: bytes | memoryview, raw_bytes: int) -> str | None:
    """As Pillow calls it; RAW for pixels. Some of those begin like a JPEG, whose sign is short: their number decides."""
    head = bytes(blob[:12])
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "WEBP"
    if len(blob) == raw_bytes:
        return "RAW"
    return "JPEG" if head.startswith(b"\xff\xd8\xff") else None
