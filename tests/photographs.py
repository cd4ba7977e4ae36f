"""Real photographs in every usual kind of file, and files that are broken in every usual way.

Written as a folder, a tar or a Parquet file; each writer returns which keys are good and why the others are not::

    {"ok": [key, ...], "broken": {key: reason}}
"""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage
from PIL import Image

SKIMAGE_DATA = Path(skimage.__file__).parent / "data"
ORIENTATION = 0x0112


class Written(TypedDict):
    ok: list[str]
    broken: dict[str, str]


@dataclass(frozen=True)
class Photo:
    """``name``: relative path without ending; ``reason``: None, or the status that the row must get."""

    name: str
    ending: str
    data: bytes
    caption: str | None = None
    reason: str | None = None


def original(name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """A photograph of scikit-image's, as it is or resized to (width, height)."""
    with Image.open(SKIMAGE_DATA / name) as image:
        image.load()
        return image if size is None else image.resize(size, Image.Resampling.LANCZOS)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def rotated_jpeg(image: Image.Image, orientation: int) -> bytes:
    """The pixels as they are, with the EXIF note that a camera held otherwise would write."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, "JPEG", quality=95, exif=exif)


def bomb_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few hundred bytes whose header claims gigabytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def damaged_png(image: Image.Image) -> bytes:
    """A PNG with a few bytes of its pixel data overwritten."""
    data = bytearray(encoded(image, "PNG"))
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(255 - byte for byte in data[middle : middle + 8])
    return bytes(data)


@cache
def photographs() -> tuple[Photo, ...]:
    return tuple(sorted((*_good(), *_broken()), key=lambda photo: photo.name))


def _good() -> Iterator[Photo]:
    astronaut = original("astronaut.png", (256, 256))
    chelsea = original("chelsea.png")
    coffee = original("coffee.png", (300, 200))
    motorcycle = original("motorcycle_left.png", (333, 225))
    moon = np.asarray(original("moon.png", (200, 160)), dtype=np.uint16) * 257
    rocket = original("rocket.jpg")
    yield Photo(
        "people/astronaut", ".jpg", encoded(astronaut, "JPEG", quality=90), "a portrait of an astronaut"
    )
    yield Photo("animals/chelsea", ".png", encoded(chelsea, "PNG"), "a cat\na tabby cat looks up")
    yield Photo("animals/turned", ".jpg", rotated_jpeg(chelsea, 6), "a cat, with the camera held sideways")
    yield Photo("coffee", ".webp", encoded(coffee, "WEBP", quality=85), "a cup of coffee on a wooden table")
    yield Photo("coffee.print", ".jpg", encoded(coffee.convert("CMYK"), "JPEG"), "a cup of coffee, for print")
    yield Photo(
        "motorcycle", ".JPG", encoded(motorcycle, "JPEG", progressive=True), "a motorcycle in a garage"
    )
    yield Photo("motorcycle 2", ".avif", encoded(motorcycle, "AVIF"), None)
    yield Photo("rocket", ".jpeg", (SKIMAGE_DATA / "rocket.jpg").read_bytes(), "a rocket on its launch pad")
    yield Photo(
        "grey/camera", ".png", encoded(original("camera.png", (192, 192)), "PNG"), "a man with a camera"
    )
    yield Photo(
        "grey/coins", ".png", encoded(original("coins.png").convert("LA"), "PNG"), "old coins, in rows"
    )
    yield Photo("grey/moon16", ".png", encoded(Image.fromarray(moon), "PNG"), "the surface of the moon")
    yield Photo("grey/page", ".tif", encoded(original("page.png").convert("1"), "TIFF"), "a page of text")
    yield Photo(
        "logo", ".png", encoded(original("logo.png", (250, 250)), "PNG"), "a colourful logo of a snake"
    )
    palette = coffee.quantize(64)
    yield Photo("palette", ".png", encoded(palette, "PNG", transparency=0), "a cup of coffee in 64 colours")
    frames = [chelsea.resize((150, 100)), astronaut.resize((150, 100))]
    moving = encoded(frames[0].quantize(32), "GIF", save_all=True, append_images=[frames[1].quantize(32)])
    yield Photo("moving", ".gif", moving, "first a cat, then an astronaut")
    yield Photo(
        "stack",
        ".tiff",
        encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "a cat on page one",
    )
    yield Photo(
        "rocket.profile", ".jpg", encoded(rocket, "JPEG", icc_profile=_wide_gamut_profile()), "a rocket"
    )


def _broken() -> Iterator[Photo]:
    coffee = original("coffee.png", (300, 200))
    jpeg, webp = encoded(coffee, "JPEG", quality=90), encoded(coffee, "WEBP", quality=90)
    yield Photo("broken/bomb", ".png", bomb_png(), "a bomb", "too large")
    yield Photo("broken/cut", ".jpg", jpeg[: len(jpeg) * 2 // 3], "half a cup", "truncated")
    yield Photo("broken/cut_webp", ".webp", webp[: len(webp) // 2], "half a cup", "truncated")
    yield Photo("broken/damaged", ".png", damaged_png(coffee), "a spilt cup", "unreadable")
    yield Photo("broken/empty", ".jpg", b"", "nothing", "no image")
    yield Photo(
        "broken/pixel", ".png", encoded(Image.new("RGB", (1, 1), "red"), "PNG"), "a pixel", "too small"
    )
    yield Photo("broken/strip", ".png", encoded(coffee.resize((300, 20)), "PNG"), "a strip", "too elongated")
    yield Photo("broken/text", ".jpg", b"<html><body>404 Not Found</body></html>", "a lost page", "no image")


def _wide_gamut_profile() -> bytes:
    """An ICC profile whose green and red are stronger than sRGB's: the sRGB one with two colorants exchanged."""
    from PIL import ImageCms

    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    for index in range(int.from_bytes(data[128:132], "big")):
        entry = data[132 + 12 * index : 144 + 12 * index]
        tags[bytes(entry[:4])] = (int.from_bytes(entry[4:8], "big"), int.from_bytes(entry[8:12], "big"))
    (red, size), (green, _) = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red : red + size], data[green : green + size] = data[green : green + size], data[red : red + size]
    at, size = tags[b"desc"]
    data[at : at + size] = bytes(data[at : at + size]).replace(b"\0s\0R\0G\0B", b"\0s\0w\0a\0p")
    return bytes(data)


def _summary(keyed: list[tuple[str, Photo]]) -> Written:
    return {
        "ok": [key for key, photo in keyed if photo.reason is None],
        "broken": {key: photo.reason for key, photo in keyed if photo.reason is not None},
    }


def write_photo_folder(path: Path) -> Written:
    """Images at three depths with captions beside them, and things that are no part of the collection."""
    for photo in photographs():
        target = path / f"{photo.name}{photo.ending}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(photo.data)
        if photo.caption:
            (path / f"{photo.name}.txt").write_text(photo.caption)
    (path / "README.md").write_text("no image")
    (path / ".thumbnail.jpg").write_bytes(photographs()[0].data)
    (path / ".cache").mkdir(exist_ok=True)
    (path / ".cache" / "copy.png").write_bytes(photographs()[0].data)
    return _summary([(photo.name, photo) for photo in photographs()])


def photo_members() -> list[tuple[str, bytes]]:
    """As img2dataset writes them: number.jpg, number.json, number.txt, whatever the image really is."""
    members = []
    for index, photo in enumerate(photographs()):
        members.append((f"{index:09d}{photo.ending.lower()}", photo.data))
        facts = {"key": f"{index:09d}", "caption": photo.caption, "url": f"https://example.org/{photo.name}"}
        members.append((f"{index:09d}.json", json.dumps(facts).encode()))
        if photo.caption:
            members.append((f"{index:09d}.txt", photo.caption.encode()))
    return members


def tar_bytes(members: list[tuple[str, bytes]], style: int = tarfile.PAX_FORMAT) -> bytes:
    """Written by the standard library, with the header style of choice and times that need pax records."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=style) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000.25
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def write_photo_tar(path: Path) -> Written:
    """One tar at ``path`` (ending in .tar)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(photo_members()))
    return _summary([(f"{path.stem}/{index:09d}", photo) for index, photo in enumerate(photographs())])


def write_photo_parquet(path: Path, row_group_size: int = 7) -> Written:
    """One Parquet file in the layout of the Hugging Face datasets library, with several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": p.data, "path": f"{p.name}{p.ending}"} for p in photographs()], image
            ),
            "caption": pa.array([p.caption for p in photographs()], pa.string()),
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return _summary([(f"{path.stem}/{index}", photo) for index, photo in enumerate(photographs())])
