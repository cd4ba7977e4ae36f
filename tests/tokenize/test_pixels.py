"""Crops as image files: they come back, and what is none of them is refused before it costs anything."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from fourmill.errors import ConfigError, ContractError
from fourmill.modality import RGB_PIXELS
from fourmill.tokenize.base import load_codec
from fourmill.tokenize.fit import fit_codec
from fourmill.tokenize.pixels import FORMATS, PixelsCodec, decode_crop

MAGIC = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG", "webp": b"RIFF"}


def smooth_crop(size: int) -> np.ndarray:
    ramp = np.linspace(0, 255, size)
    return np.stack(
        [np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), np.full((size, size), 90.0)], -1
    ).astype(np.uint8)


def stored(crop: np.ndarray, **options: Any) -> bytes:
    (value,) = PixelsCodec(RGB_PIXELS, len(crop), **options).encode([crop])
    assert isinstance(value, bytes)
    return value


def file_of(kind: str, mode: str = "RGB", side: int = 64) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (side, side)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("options", "worst"),
    [
        ({"format": "png"}, 0),
        ({"format": "raw"}, 0),
        ({"lossless": True}, 0),
        ({}, 12),
        ({"format": "jpeg"}, 12),
        ({"format": "jpeg", "quality": 20}, 40),
    ],
)
def test_pixels_come_back(options: dict[str, object], worst: int, tmp_path: Path) -> None:
    fit_codec(RGB_PIXELS, [], [], image_size=64, options=options, out=tmp_path)
    codec = load_codec(tmp_path, RGB_PIXELS, 64)
    assert codec.modality.num_tokens == 16 and not codec.needs_fit
    crop = smooth_crop(64)
    (value,) = codec.encode([crop])
    assert isinstance(value, bytes) and value.startswith(MAGIC.get(str(options.get("format", "webp")), b""))
    (back,) = codec.decode([value])
    assert back.shape == (64, 64, 3) and back.dtype == np.uint8
    assert np.abs(back.astype(int) - crop).max() <= worst
    assert np.array_equal(decode_crop(memoryview(value), 64), back)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**32), st.sampled_from(["png", "raw", "webp"]))
def test_noise_of_any_size_comes_back(patches: int, seed: int, format: str) -> None:
    """Files about as long as the pixels themselves are not taken for them, nor are pixels for files."""
    crop = np.random.default_rng(seed).integers(0, 256, (patches, patches, 3), dtype=np.uint8)
    value = stored(crop, format=format, lossless=format == "webp", patch_size=1)
    assert np.array_equal(decode_crop(value, patches), crop)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(0, 2**32),
    st.sampled_from(["RGB", "L"]),
    st.integers(1, 100),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
)
def test_a_jpeg_has_the_pixels_that_pillow_sees(
    side: int, seed: int, mode: str, quality: int, subsampling: int, progressive: bool
) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    options: dict[str, Any] = {} if mode == "L" else {"subsampling": subsampling}
    Image.fromarray(values).convert(mode).save(
        stream, "JPEG", quality=quality, progressive=progressive, **options
    )
    with Image.open(stream) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode_crop(stream.getvalue(), side), expected)


def test_a_jpeg_in_an_arrow_file_takes_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    value = stored(smooth_crop(64), format="jpeg")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow decoded it"))
    assert np.array_equal(decode_crop(memoryview(pa.py_buffer(value)), 64), decode_crop(value, 64))


def test_pixels_that_begin_like_a_file() -> None:
    crop = smooth_crop(64)
    for sign in MAGIC.values():
        crop.reshape(-1)[: len(sign)] = list(sign)
        assert np.array_equal(decode_crop(stored(crop, format="raw"), 64), crop)


def test_quality_is_that_of_lossy_formats() -> None:
    crop = smooth_crop(64)
    for format in FORMATS:
        small, large = (len(stored(crop, format=format, quality=quality)) for quality in (10, 95))
        assert (small < large) is (format in ("webp", "jpeg"))


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGBA")]
)
def test_other_modes_become_rgb(kind: str, mode: str) -> None:
    found = decode_crop(file_of(kind, mode), 64)
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_files_of_another_size_are_refused_before_decoding(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, huge = file_of(kind, side=2000), file_of(kind, side=3000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    codec = PixelsCodec(RGB_PIXELS, 64)
    with pytest.raises(
        ContractError, match="'rgb_pixels': a stored crop cannot be decoded: it is 2000 x 2000"
    ):
        codec.decode([large])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(ContractError, match=r"cannot be decoded: .*9000000 pixels"):
        codec.decode([huge])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_files_that_end_early_are_refused(kind: str) -> None:
    whole = stored(smooth_crop(64), format=kind.lower())
    for length in (12, len(whole) // 2):
        with pytest.raises(ContractError, match="cannot be decoded"):
            decode_crop(whole[:length], 64)


def test_what_is_no_crop_is_refused() -> None:
    codec = PixelsCodec(RGB_PIXELS, 64)
    raw = smooth_crop(64).tobytes()
    for bad in (file_of("GIF"), b"", raw[:-1], raw + b"x"):
        with pytest.raises(
            ContractError, match=f"its {len(bad)} bytes are no webp, png, jpeg; raw are 12288"
        ):
            codec.decode([bad])
    with pytest.raises(ContractError, match="not bytes"):
        codec.decode([np.zeros(3, np.uint16)])
    with pytest.raises(ContractError, match="wanted is uint8"):
        codec.encode([smooth_crop(32)])


def test_pixel_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="webp, png, jpeg, raw"):
        PixelsCodec(RGB_PIXELS, 64, format="gif")
    with pytest.raises(ConfigError, match="1 to 100"):
        PixelsCodec(RGB_PIXELS, 64, format="jpeg", quality=0)
    with pytest.raises(ConfigError, match="lossless: jpeg never is"):
        PixelsCodec(RGB_PIXELS, 64, format="jpeg", lossless=True)
