"""Labels that lie in files already: finding them by key, and decoding them with suspicion.

`Shelf` lists a folder, tars, or a COCO JSON file on any fsspec URL. Keys are looked up in that listing and never become
part of a path. What a file claims of itself is held against its size before memory is taken; nothing is unpickled.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from braceexpand import braceexpand
from PIL import Image, UnidentifiedImageError

from fourmill.errors import ConfigError, SourceError
from fourmill.storage import Entry, Store

ENDINGS = (".png", ".npy")
MAX_PIXELS = 64 << 20  # of one map
MAX_BYTES = 1 << 30  # of one label's file
MAX_JSON_BYTES = 2 << 30
_EDGE = 64 << 10  # bytes at each end of a local file that enter its identity


class BadLabel(Exception):
    """The bytes of one label are at fault; the message names the file."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a label's bytes are: in ``file`` of the shelf, from ``offset`` on. ``name`` is what people know it by."""

    name: str
    file: str
    offset: int
    size: int


class Shelf:
    """The labels behind a URL, by key. ``suffix`` is cut off the names of label files (``0001_depth.png``)."""

    def __init__(self, url: str, suffix: str, where: str) -> None:
        """``where`` names the configuration key for messages. SourceError where there is nothing."""
        self.url, self.suffix, self.where = url, suffix, where
        folder, pattern = _split(url)
        self.store = Store(folder)
        try:
            self.files = _listed(self.store, pattern)
        except OSError as error:
            raise SourceError(f"{where}: {url} cannot be listed: {type(error).__name__}: {error}") from error
        if not self.files:
            raise SourceError(f"{where}: no .png, .npy, .tar or .json there: {url}")
        self._by_key: dict[str, Place] | None = None

    @property
    def json_file(self) -> str | None:
        """The one COCO file, where that is what the URL names."""
        only = next(iter(self.files))
        return only if len(self.files) == 1 and only.lower().endswith(".json") else None

    def digest(self) -> str:
        """sha256 over names, sizes and contents: etags where the store has them, else both ends of each file."""
        digest = hashlib.sha256(self.suffix.encode())
        for name, entry in sorted(self.files.items()):
            digest.update(json.dumps([name, entry.size, self._content(name, entry)]).encode())
        return f"sha256:{digest.hexdigest()}"

    def _content(self, name: str, entry: Entry) -> str:
        if not self.store.is_local:
            return entry.stamp.partition("-")[2]
        return _ends_hash(self.store.path(name), entry.size, entry.stamp)

    def by_key(self) -> Mapping[str, Place]:
        """Every label by each key that it answers to; a key that two labels claim is nobody's."""
        if self._by_key is None:
            found: dict[str, Place] = {}
            twice: set[str] = set()
            for key, place in self._entries():
                if key in found and found[key] != place:
                    twice.add(key)
                found[key] = place
            self._by_key = {key: place for key, place in found.items() if key not in twice}
        return self._by_key

    def example(self) -> str:
        """The name of one label, without reading every tar."""
        return next((place.name for _, place in self._entries()), "")

    def _entries(self) -> Iterator[tuple[str, Place]]:
        for name, entry in sorted(self.files.items()):
            if name.lower().endswith(".tar"):
                for member in self._members(name):
                    key = _member_key(member.name.removeprefix(f"{name}/"), self.suffix)
                    if key:  # by itself, and as the source `webdataset` calls it
                        yield key, member
                        yield f"{name[:-4]}/{key}", member
            elif name.lower().endswith(ENDINGS):
                stem = name.rpartition(".")[0]
                if stem.endswith(self.suffix):
                    yield stem[: len(stem) - len(self.suffix)], Place(name, name, 0, entry.size)

    def _members(self, tar: str) -> Iterator[Place]:
        try:
            with (
                self.store.fs.open(self.store.path(tar), "rb") as stream,
                tarfile.open(fileobj=stream, mode="r:") as archive,
            ):
                for member in archive:
                    if member.isreg() and not member.issparse() and member.name.lower().endswith(ENDINGS):
                        yield Place(f"{tar}/{member.name}", tar, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise SourceError(f"{self.where}: {tar} of {self.url} is no readable tar: {error}") from error

    def read(self, place: Place) -> bytes:
        """I/O errors are raised as they are: they are no fault of the label."""
        if place.size > MAX_BYTES:
            raise BadLabel(f"{place.name} has {place.size} bytes; the limit is {MAX_BYTES}")
        path, end = self.store.path(place.file), place.offset + place.size
        return bytes(self.store.fs.cat_file(path, start=place.offset, end=end))

    def read_json(self) -> Any:
        """The COCO file's content."""
        name = self.json_file
        assert name is not None
        entry = self.files[name]
        if entry.size > MAX_JSON_BYTES:
            raise SourceError(
                f"{self.where}: {self.url} has {entry.size} bytes; the limit is {MAX_JSON_BYTES}"
            )
        try:
            return json.loads(self.store.read(name))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.where}: {self.url} is no JSON: {error}") from error


def _split(url: str) -> tuple[str, str]:
    """(folder, pattern of the file names in it): "" for all of them."""
    wild = min((url.index(mark) for mark in "{*" if mark in url), default=-1)
    if wild < 0 and not url.lower().endswith((".tar", ".json")):
        return url, ""
    slash = url.rfind("/", 0, wild if wild >= 0 else len(url))
    return (url[:slash] or "/", url[slash + 1 :]) if slash >= 0 else (".", url)


def _listed(store: Store, pattern: str) -> dict[str, Entry]:
    """The files that matter by name, hidden ones and links that lead out of the folder left out."""
    wanted: set[str] | None = None
    if pattern and "*" not in pattern:
        try:
            wanted = set(braceexpand(pattern))
        except ValueError as error:
            raise ConfigError(f"url {pattern}: {error}") from error
    inside = os.path.realpath(store.root) + os.sep if store.is_local else ""
    found = {}
    everything = store.entries("") if pattern and "/" not in pattern else store.walk("")
    for name, entry in everything.items():
        chosen = not pattern or (name in wanted if wanted is not None else fnmatch.fnmatch(name, pattern))
        usual = (*ENDINGS, ".tar") if not pattern else (*ENDINGS, ".tar", ".json")
        if not chosen or not name.lower().endswith(usual) or any(p.startswith(".") for p in name.split("/")):
            continue
        path = store.path(name)
        if store.is_local and os.path.islink(path):
            if not os.path.realpath(path).startswith(inside) or not os.path.isfile(path):
                continue
            entry = store.entry(name)
        found[name] = entry
    missing = sorted((wanted or set()) - set(found))
    if missing:
        raise SourceError(f"{store.url}/{missing[0]} is missing; correct the URL or restore it")
    return found


def _member_key(name: str, suffix: str) -> str:
    """WebDataset's: up to the first dot of the last part; "" where the suffix is missing."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    key = f"{folder}{slash}{last.partition('.')[0]}"
    return key[: len(key) - len(suffix)] if key.endswith(suffix) else ""


@lru_cache(maxsize=1 << 16)
def _ends_hash(path: str, size: int, stamp: str) -> str:
    """Of a local file's first and last bytes, read once as long as nothing speaks of a change."""
    with open(path, "rb") as stream:
        digest = hashlib.blake2b(stream.read(_EDGE), digest_size=16)
        if size > _EDGE:
            stream.seek(max(_EDGE, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()


# -- decoding -----------------------------------------------------------------------------------------


def decode(data: bytes, name: str) -> np.ndarray:
    """The array of a .png or .npy file's bytes: numbers of any plain dtype, (H, W) or (H, W, C)."""
    try:
        return _png(data) if name.lower().endswith(".png") else _npy(data)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        words = " ".join(str(error).split())[:120]
        raise BadLabel(f"{name} cannot be decoded: {words}") from error


def _png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
        if image.mode in ("L", "P", "1", "I", "I;16", "I;16B"):  # a palette's indices are the class ids
            return np.array(image.convert("L") if image.mode == "1" else image)
        return np.array(image.convert("RGB"))


def _npy(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f".npy version {version}")
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ValueError(f".npy of {dtype}; plain numbers are expected")
    count = 1
    for side in shape:
        if side < 0:
            raise ValueError(f".npy of shape {shape}")
        count *= side
    body = data[stream.tell() :]
    if count * dtype.itemsize != len(body):
        raise ValueError(f".npy claims {dtype} {shape}, but holds {len(body)} bytes")
    array = np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="))


# -- COCO ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coco:
    """Class names in the order of the category ids, and boxes by key: (xyxy, class id, score) normalised, or BadLabel."""

    classes: tuple[str, ...]
    boxes: Mapping[str, list[tuple[list[float], int, float]] | BadLabel]


def parse_coco(content: Any, where: str) -> Coco:
    """Images without annotations have no boxes, and that is a label; crowds are left out."""
    try:
        images = {image["id"]: image for image in content["images"]}
        categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
        annotations = list(content["annotations"])
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{where}: no COCO file: {type(error).__name__}: {error}") from error
    classes = tuple(dict.fromkeys(name for _, name in categories))
    class_of = {number: classes.index(name) for number, name in categories}
    found: dict[Any, list[tuple[list[float], int, float]] | BadLabel] = {number: [] for number in images}
    for annotation in annotations:
        number = annotation.get("image_id") if isinstance(annotation, dict) else None
        boxes = found.get(number) if isinstance(number, (int, str)) else None
        if isinstance(boxes, list) and not annotation.get("iscrowd"):
            try:
                boxes += _coco_box(annotation, images[number], class_of)
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                name = str(images[number].get("file_name"))[:80]
                found[number] = BadLabel(f"annotation {annotation.get('id')} of {name}: {error!r}")
    keys: dict[str, Any] = {}
    for number, boxes_or_fault in found.items():
        name = str(images[number].get("file_name", ""))
        keys[name.rpartition(".")[0] or name] = boxes_or_fault
    return Coco(classes, keys)


def _coco_box(
    annotation: Mapping[str, Any], image: Mapping[str, Any], class_of: Mapping[int, int]
) -> Iterable[tuple[list[float], int, float]]:
    """One box, or none where it has no area within the image."""
    left, top, width, height = (float(value) for value in annotation["bbox"])
    extent = np.array([image["width"], image["height"]] * 2, np.float64)
    corners = np.array([left, top, left + width, top + height], np.float64)
    score = float(annotation.get("score", 1.0))
    if not (np.isfinite(corners).all() and (extent > 0).all() and 0 <= score <= 1):
        raise ValueError(f"bbox {annotation['bbox']}, score {score}, of {extent[0]:g} x {extent[1]:g} pixels")
    xyxy = np.clip(corners / extent, 0, 1).astype(np.float32)
    if xyxy[2] > xyxy[0] and xyxy[3] > xyxy[1]:
        yield xyxy.tolist(), class_of[int(annotation["category_id"])], score
