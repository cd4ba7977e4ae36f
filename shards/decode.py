"""Decoding: the bytes of an image file to the dataset's decode frame, once and the same way for everyone.

The frame is the image as its author meant it (EXIF orientation applied, colours in sRGB), opaque, with its shorter
side at a fixed number of pixels. The bytes are hostile: what they claim is checked in the header before anything is
decoded, only the formats in `FORMATS` are tried (no EPS, which would start an interpreter), and whatever goes wrong
is a `RejectedImage` with a short reason that stays the same from run to run.

Choices that the bytes do not settle: transparency shows white, as on a page; 16-bit values are scaled by 255/65535,
never stretched; floats are taken to be in [0, 1]; an animation or a stack of pages is its first frame; a colour
profile is applied where it is sound and fits the image, and ignored where not.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from fourmill.modality import Resample

log = logging.getLogger(__name__)

#: Enters the identity of a dataset: change it with any change to the pixels that `decode_frame` returns.
DECODE_VERSION = 1

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")
MAX_PIXELS = 64 << 20  # of the file's image: 192 MiB decoded
MAX_BYTES = 64 << 20  # of the file
MIN_SIDE_PX = 8  # anything smaller is a tracking pixel or a spacer
MAX_ASPECT = 10.0  # a longer strip has next to nothing in its centre square, and a frame of unbounded size
MAX_PROFILE_BYTES = 4 << 20

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_TRANSPOSE[number] for number in (5, 6, 7, 8)]
_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


class RejectedImage(ValueError):
    """The bytes of one row are at fault. ``reason`` is stored as the row's status; ``detail`` is for the log.

    Reasons: "no image", "truncated", "unreadable", "too large", "too small", "too elongated", "unsupported mode".
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass(frozen=True, slots=True)
class Frame:
    """``pixels``: uint8 (h, w, 3) sRGB, contiguous; ``width``, ``height``: of the original, upright image."""

    pixels: np.ndarray
    width: int
    height: int


def decode_frame(
    image: bytes | np.ndarray,
    shorter_side: int,
    resample: Resample,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Frame:
    """The decode frame of an image file's bytes, or of rendered pixels uint8 (H, W, 3).

    ``resample`` is antialiased on the way down. Raises `RejectedImage`, and nothing else on account of the bytes.
    """
    if isinstance(image, np.ndarray):
        return _frame_of_pixels(image, shorter_side, resample)
    if len(image) > max_bytes:
        raise RejectedImage("too large", f"{len(image)} bytes; the limit is {max_bytes}")
    opened = _open(bytes(image), max_pixels)
    try:
        return _frame_of_file(opened, shorter_side, resample)
    except (RejectedImage, MemoryError):
        raise
    except Exception as error:  # decoders raise anything at all on broken bytes
        raise _rejection(bytes(image), error) from error
    finally:
        opened.close()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The file with its header read and its claims checked; no pixel is decoded yet."""
    if not data:
        raise RejectedImage("no image", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectedImage("too large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        reason = "truncated" if _is_cut_riff(data) else "no image"
        raise RejectedImage(reason, f"{len(data)} bytes of no known format") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _rejection(data, error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise RejectedImage("too large", f"{width}x{height} px; the limit is {max_pixels} px")
    _check_shape(width, height)
    return image


def _check_shape(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE_PX:
        raise RejectedImage("too small", f"{width}x{height} px; the shorter side needs {MIN_SIDE_PX}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RejectedImage("too elongated", f"{width}x{height} px; sides may differ {MAX_ASPECT:g} to 1")


def _rejection(data: bytes, error: Exception) -> RejectedImage:
    if isinstance(error, Image.DecompressionBombError):
        return RejectedImage("too large", str(error))
    text = " ".join(str(error).split()).lower()
    cut = "truncated" in text or "not enough" in text or isinstance(error, EOFError) or _is_cut_riff(data)
    return RejectedImage("truncated" if cut else "unreadable", f"{type(error).__name__}: {text}"[:200])


def _is_cut_riff(data: bytes) -> bool:
    """WebP tells its length in the first bytes, and its decoder does not say why it failed."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp and int.from_bytes(data[4:8], "little") + 8 > len(data)


def _frame_of_pixels(pixels: np.ndarray, shorter_side: int, resample: Resample) -> Frame:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise RejectedImage("unsupported mode", f"{pixels.dtype} {pixels.shape}; expected uint8 (H, W, 3)")
    height, width = pixels.shape[:2]
    _check_shape(width, height)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return Frame(_as_array(_resized(image, shorter_side, resample)), width, height)


def _frame_of_file(image: Image.Image, shorter_side: int, resample: Resample) -> Frame:
    original = image.size
    if image.format in ("JPEG", "MPO"):
        # libjpeg scales by 1/2, 1/4 or 1/8 while decoding; twice the target is left to the antialiasing filter
        scale = 2 * shorter_side / min(original)
        image.draft(None, (max(1, int(original[0] * scale)), max(1, int(original[1] * scale))))
    image.load()
    turn = _TRANSPOSE.get(_orientation(image))
    profile = image.info.get("icc_profile")
    small = _resized(_opaque(image), shorter_side, resample)
    upright = _to_srgb(small, profile)
    if turn is not None:
        upright = upright.transpose(turn)
        if turn in _SIDEWAYS:
            original = (original[1], original[0])
    return Frame(_as_array(upright), *original)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation still to be applied, 1 to 8 (TIFF has applied its own); broken EXIF says nothing."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception as error:  # noqa: BLE001  # metadata of any kind of brokenness must not cost us a good image
        log.debug("unreadable EXIF block ignored: %s", error)
        return 1


def _resized(image: Image.Image, shorter_side: int, resample: Resample) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    if short == shorter_side:
        return image
    size = tuple((2 * side * shorter_side + short) // (2 * short) for side in (width, height))
    return image.resize((size[0], size[1]), _FILTERS[resample])


def _opaque(image: Image.Image) -> Image.Image:
    """The image as 8-bit L, RGB or CMYK, with transparency over white."""
    mode = image.mode
    if mode in _WIDE_GREY or (mode == "I" and image.format == "PPM"):
        values = np.asarray(image).astype(np.float64)
        see_through = image.info.get("transparency")  # a PNG can name one value
        return _grey(np.where(values == see_through, 65535, values) / 65535)
    if mode == "F":
        return _grey(np.asarray(image).astype(np.float64))
    if image.has_transparency_data:
        return _over_white(image)
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "YCbCr", "RGBX", "HSV"):
        return image.convert("RGB")
    if mode in ("L", "RGB", "CMYK"):
        return image
    raise RejectedImage("unsupported mode", f"{image.format} {mode}")


def _grey(values: np.ndarray) -> Image.Image:
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise RejectedImage("unsupported mode", "floats outside [0, 1]")
    return Image.fromarray(np.round(values * 255).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    is_grey = image.mode in ("1", "L", "LA", "La")
    layered = image.convert("LA" if is_grey else "RGBA")
    page = Image.new("L" if is_grey else "RGB", image.size, "white")
    page.paste(layered.convert(page.mode), mask=layered.getchannel("A"))
    return page


def _to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """RGB in sRGB. An unsound profile, or one for another kind of image, is ignored."""
    if isinstance(profile, bytes) and 0 < len(profile) <= MAX_PROFILE_BYTES:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = str(source.profile.xcolor_space).strip()
            fits = {"RGB": "RGB", "CMYK": "CMYK", "L": "GRAY"}[image.mode] == space
            if fits and not (source.profile.profile_description or "").startswith("sRGB"):
                turned = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
                if turned is not None:
                    return turned
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            log.debug("unsound colour profile ignored: %s", error)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _as_array(image: Image.Image) -> np.ndarray:
    return np.array(image, dtype=np.uint8, order="C")
