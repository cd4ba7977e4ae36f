import hashlib
import io
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
from photographs import (
    ORIENTATION,
    Photo,
    bomb_png,
    damaged_png,
    encoded,
    original,
    photographs,
    rotated_jpeg,
)
from PIL import Image, ImageCms

from fourmill.modality import Resample
from fourmill.shards.decode import DECODE_VERSION, Frame, RejectedImage, decode_frame

GOOD = [photo for photo in photographs() if photo.reason is None]
BROKEN = [photo for photo in photographs() if photo.reason is not None]
RESAMPLES: tuple[Resample, ...] = ("bilinear", "bicubic")
COFFEE = original("coffee.png", (96, 64))  # landscape, so that width and height can't be mixed up


def pixels(data: bytes, side: int = 64) -> np.ndarray:
    return decode_frame(data, side, "bicubic").pixels


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("photo", GOOD, ids=lambda photo: photo.name)
def test_every_kind_of_photograph_fills_the_frame(photo: Photo) -> None:
    frame = decode_frame(photo.data, 96, "bicubic")
    height, width = frame.pixels.shape[:2]
    assert frame.pixels.dtype == np.uint8 and frame.pixels.shape[2] == 3 and frame.pixels.flags.c_contiguous
    assert min(height, width) == 96 and frame.pixels.std() > 10
    assert width / height == pytest.approx(frame.width / frame.height, abs=0.5 / 96 * 2)
    assert np.array_equal(frame.pixels, decode_frame(photo.data, 96, "bicubic").pixels)


@pytest.mark.parametrize("photo", BROKEN, ids=lambda photo: photo.name)
def test_every_kind_of_broken_file_is_rejected_by_reason(photo: Photo) -> None:
    for _ in range(2):
        with pytest.raises(RejectedImage) as error:
            decode_frame(photo.data, 96, "bicubic")
        assert error.value.reason == photo.reason and "\n" not in str(error.value)


UPRIGHT: dict[
    int, Callable[[np.ndarray], np.ndarray]
] = {  # EXIF: where row 0 and column 0 of the file belong
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_turns_the_unrotated_pixels(orientation: int) -> None:
    plain = decode_frame(rotated_jpeg(COFFEE, 1), 64, "bicubic")
    turned = decode_frame(rotated_jpeg(COFFEE, orientation), 64, "bicubic")
    assert np.array_equal(turned.pixels, UPRIGHT[orientation](plain.pixels))
    assert (turned.width, turned.height) == ((96, 64) if orientation < 5 else (64, 96))


def test_a_tiff_is_turned_once() -> None:
    turned = decode_frame(encoded(COFFEE, "TIFF", tiffinfo={ORIENTATION: 6}), 64, "bicubic")
    assert np.array_equal(turned.pixels, np.rot90(np.asarray(COFFEE), -1))
    assert (turned.width, turned.height) == (64, 96)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_exif_block_costs_nothing() -> None:
    data = encoded(COFFEE, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert np.array_equal(pixels(data), pixels(encoded(COFFEE, "JPEG")))


def test_sixteen_bits_are_scaled_to_eight() -> None:
    grey = np.asarray(COFFEE.convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(pixels(encoded(wide, kind))[:, :, 0], grey)
    dark = Image.fromarray(np.full((64, 64), 4095, np.uint16))  # 12-bit data isn't stretched
    assert set(np.unique(pixels(encoded(dark, "PNG")))) == {16}


def test_floats_are_taken_to_lie_between_zero_and_one() -> None:
    grey = np.asarray(COFFEE.convert("L"))
    assert np.array_equal(pixels(encoded(Image.fromarray(grey / np.float32(255)), "TIFF"))[:, :, 1], grey)
    for values in (grey.astype(np.float32), np.full((64, 64), np.nan, np.float32)):
        with pytest.raises(RejectedImage, match="unsupported mode"):
            pixels(encoded(Image.fromarray(values), "TIFF"))
    with pytest.raises(RejectedImage, match="unsupported mode"):
        pixels(encoded(COFFEE.convert("I"), "TIFF"))


def test_cmyk_looks_like_the_original() -> None:
    assert distance(pixels(encoded(COFFEE.convert("CMYK"), "JPEG", quality=95)), np.asarray(COFFEE)) < 3
    assert distance(pixels(encoded(COFFEE.convert("CMYK"), "TIFF")), np.asarray(COFFEE)) < 1


def transparent_files() -> dict[str, bytes]:
    """The left half is an opaque red or grey, the right half see-through over black."""
    alpha = Image.new("L", (32, 32), 0)
    alpha.paste(255, (0, 0, 16, 32))
    colour = Image.new("RGB", (32, 32), (200, 0, 0))
    colour.paste((0, 0, 0), (16, 0, 32, 32))
    grey = Image.new("L", (32, 32), 200)
    grey.paste(0, (16, 0, 32, 32))
    indexed = Image.new("P", (32, 32), 1)
    indexed.putpalette([0, 0, 0, 200, 0, 0])
    indexed.paste(0, (16, 0, 32, 32))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "RGBA": encoded(Image.merge("RGBA", (*colour.split(), alpha)), "PNG"),
        "RGBA webp": encoded(Image.merge("RGBA", (*colour.split(), alpha)), "WEBP", lossless=True),
        "LA": encoded(Image.merge("LA", (grey, alpha)), "PNG"),
        "P": encoded(indexed, "PNG", transparency=0),
        "P gif": encoded(indexed, "GIF", transparency=0),
        "RGB with one see-through colour": encoded(colour, "PNG", transparency=(0, 0, 0)),
        "L with one see-through value": encoded(grey, "PNG", transparency=0),
        "I;16 with one see-through value": encoded(wide, "PNG", transparency=0),
    }


@pytest.mark.parametrize("name", transparent_files())
def test_transparency_shows_white(name: str) -> None:
    frame = pixels(transparent_files()[name], 32)
    assert (frame[:, 16:] == 255).all()
    assert (frame[:, :16, 0] == 200).all()


def test_half_transparent_pixels_are_mixed_before_they_are_resized() -> None:
    image = Image.new(
        "RGBA", (128, 128), (0, 0, 0, 0)
    )  # see-through black, which must not bleed into the red
    image.paste((255, 0, 0, 255), (0, 0, 63, 128))
    frame = pixels(encoded(image, "PNG"), 64)
    assert (frame[:, :, 0] == 255).all()
    assert set(np.unique(pixels(encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 128)), "PNG")))) == {127}


def swapped_profile() -> bytes:
    photo = next(photo for photo in GOOD if photo.name == "rocket.profile")
    with Image.open(io.BytesIO(photo.data)) as image:
        return bytes(image.info["icc_profile"])


def test_a_colour_profile_is_applied() -> None:
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    assert pixels(encoded(red, "PNG"))[0, 0].tolist() == [255, 0, 0]
    r, g, b = pixels(encoded(red, "PNG", icc_profile=swapped_profile()))[0, 0].tolist()
    assert g > 250 and r < 5 and b < 5  # the profile says that the first channel is green


def test_unfit_profiles_are_ignored() -> None:
    plain = pixels(encoded(COFFEE, "PNG"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(COFFEE, "PNG", icc_profile=srgb)), plain)
    for profile in (b"no profile at all", srgb[:200], swapped_profile()[:-300] + bytes(300)):
        assert (
            distance(pixels(encoded(COFFEE, "PNG", icc_profile=profile)), plain) < 60
        )  # decoded, not rejected
    grey = COFFEE.convert("L")
    assert np.array_equal(
        pixels(encoded(grey, "PNG", icc_profile=swapped_profile()))[:, :, 0], np.asarray(grey)
    )


def test_only_the_first_frame_counts() -> None:
    cat = original("chelsea.png", (96, 64))
    stack = encoded(COFFEE, "TIFF", save_all=True, append_images=[cat])
    assert np.array_equal(pixels(stack), np.asarray(COFFEE))
    moving = encoded(COFFEE.quantize(64), "GIF", save_all=True, append_images=[cat.quantize(64)])
    assert distance(pixels(moving), np.asarray(COFFEE)) < 12 < distance(pixels(moving), np.asarray(cat))


def test_the_short_cut_for_large_jpegs_keeps_the_quality() -> None:
    data = encoded(original("motorcycle_left.png").resize((2223, 1500)), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        exact = np.asarray(image.resize((190, 128), Image.Resampling.BICUBIC))
    frame = decode_frame(data, 128, "bicubic")
    assert frame.pixels.shape == exact.shape and (frame.width, frame.height) == (2223, 1500)
    assert distance(frame.pixels, exact) < 2


@pytest.mark.parametrize(
    ("size", "expected"), [((451, 300), (192, 128)), ((300, 451), (128, 192)), ((9, 8), (144, 128))]
)
def test_the_shorter_side_is_exact_and_the_longer_is_rounded(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    frame = decode_frame(encoded(COFFEE.resize(size), "PNG"), 128, "bilinear")
    assert frame.pixels.shape == (expected[1], expected[0], 3) and (frame.width, frame.height) == size


def test_limits() -> None:
    data = encoded(COFFEE, "PNG")
    assert isinstance(decode_frame(data, 32, "bicubic", max_pixels=96 * 64, max_bytes=len(data)), Frame)
    for limits in ({"max_pixels": 96 * 64 - 1}, {"max_bytes": len(data) - 1}):
        with pytest.raises(RejectedImage, match="too large"):
            decode_frame(data, 32, "bicubic", **limits)
    with pytest.raises(RejectedImage, match="too large"):  # under Pillow's own limit, over ours
        decode_frame(bomb_png(9000, 9000), 32, "bicubic")
    for size, reason in (((7, 40), "too small"), ((20, 201), "too elongated")):
        with pytest.raises(RejectedImage, match=reason):
            decode_frame(encoded(COFFEE.resize(size), "PNG"), 32, "bicubic")
    assert decode_frame(encoded(COFFEE.resize((20, 200)), "PNG"), 32, "bicubic").pixels.shape == (320, 32, 3)


def test_formats_that_start_programs_are_not_tried() -> None:
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", b"%PDF-1.7\n"):
        with pytest.raises(RejectedImage, match="no image"):
            pixels(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on tags
def test_hostile_bytes_are_rejected_or_decoded_and_always_the_same() -> None:
    draw = random.Random(3)
    small = COFFEE.resize((48, 32))
    files = [encoded(small, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")]
    files += [encoded(small, "JPEG", progressive=True, icc_profile=swapped_profile()), rotated_jpeg(small, 5)]
    outcomes: dict[str, int] = {}
    for round_ in range(60):
        for data in files:
            mutant = bytearray(data[: draw.randrange(len(data))] if round_ % 3 == 0 else data)
            for _ in range(draw.choice((1, 4, 20))):
                if mutant:
                    mutant[draw.randrange(min(len(mutant), 300) if round_ % 3 == 1 else len(mutant))] = (
                        draw.randrange(256)
                    )
            outcome = verdict(bytes(mutant))
            assert outcome == verdict(bytes(mutant))
            outcomes[outcome.split()[0]] = outcomes.get(outcome.split()[0], 0) + 1
    assert outcomes["decoded"] > 50 and sum(outcomes.values()) - outcomes["decoded"] > 200


def verdict(data: bytes) -> str:
    try:
        frame = decode_frame(data, 24, "bilinear", max_pixels=1 << 22)
    except RejectedImage as error:
        return error.reason
    return f"decoded {frame.pixels.shape} {frame.pixels.sum()}"


def test_rendered_pixels_pass_through() -> None:
    image = np.asarray(COFFEE)
    frame = decode_frame(image, 64, "bicubic")
    assert np.array_equal(frame.pixels, image) and (frame.width, frame.height) == (96, 64)
    assert frame.pixels.flags.writeable and not np.shares_memory(frame.pixels, image)
    assert decode_frame(image, 32, "bicubic").pixels.shape == (32, 48, 3)
    for wrong in (image.astype(np.float32), image[:, :, 0], image[:4]):
        with pytest.raises(RejectedImage):
            decode_frame(wrong, 64, "bicubic")


def test_a_rejection_survives_the_way_between_processes() -> None:
    with pytest.raises(RejectedImage) as error:
        pixels(damaged_png(COFFEE))
    copy = pickle.loads(pickle.dumps(error.value))  # noqa: S301
    assert (copy.reason, copy.detail) == (error.value.reason, error.value.detail) and isinstance(
        copy, ValueError
    )


def test_version_one_of_the_decode_frame_stays_as_it_is() -> None:
    """If this fails after a change to decode.py, that change needs a new DECODE_VERSION."""
    ramp = np.indices((90, 130)).transpose(1, 2, 0)
    colours = np.stack([ramp[..., 0] * 2, ramp[..., 1], ramp.prod(-1) % 251, 255 - ramp.sum(-1)], -1).astype(
        np.uint8
    )
    files = [
        encoded(Image.fromarray(colours), "PNG"),
        encoded(Image.fromarray(colours[..., :3]), "TIFF", tiffinfo={ORIENTATION: 6}),
        encoded(Image.fromarray(colours[..., 0].astype(np.uint16) * 300), "PNG"),
    ]
    digest = hashlib.sha256()
    for data in files:
        for resample in RESAMPLES:
            digest.update(decode_frame(data, 48, resample).pixels.tobytes())
    assert DECODE_VERSION == 1
    assert digest.hexdigest() == "3848a08327964d37e8ff09c0fa13052e55266b5c8b97c08c97993f7e3d4c8c83"
