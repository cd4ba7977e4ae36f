"""Tar files in the WebDataset convention: written reproducibly, scanned with suspicion, and kept labels in them.

Written tars are USTAR with every field that could differ set to a constant (mtime 0, owner 0), so that the same
members give the same bytes. A tar of kept labels has, for row r of the shard, members that start with six digits
(keys may hold dots and slashes, WebDataset's member keys may not)::

    000017.json     {"key": the sample's key, ...}; boxes, texts, scalars, structures and the reason of an absent label are here
    000017.npy      maps, features and vectors, in the contract's `stored` dtype
    000017.png      8-bit maps (class ids, masks)

Reading checks what a file claims against its size before memory is taken, and never unpickles.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fourmill.errors import ContractError, DatasetError
from fourmill.labels import NUM_JOINTS, Absent, Boxes, Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import Modality

BLOCK = 512
MAX_PIXELS = 64 << 20  # of a label map that is read back
MAX_NAME_BYTES = 64 << 10  # of a long member name; longer ones are damage

# -- writing ------------------------------------------------------------------------------------------


def write_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A USTAR file of the members in the order given; names must be unique."""
    sink = io.BytesIO()
    write_tar_to(sink, members)
    return sink.getvalue()


def write_tar_to(sink: BinaryIO, members: Iterable[tuple[str, bytes]]) -> int:
    """Like `write_tar`, into an open binary file; returns the number of bytes."""
    seen: set[str] = set()
    size = 0
    for name, data in members:
        if name in seen:
            raise ValueError(f"tar member {name!r} twice")
        seen.add(name)
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), 0, 0o644
        try:
            header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        except ValueError as error:  # a name over 255 bytes, a member over 8 GiB
            raise ValueError(f"tar member {name!r} does not fit USTAR: {error}") from error
        padding = b"\0" * (-len(data) % BLOCK)
        size += sink.write(header) + sink.write(data) + sink.write(padding)
    return size + sink.write(b"\0" * (2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE))


# -- scanning -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its bytes are at [offset, offset + size). The name is data, never a path to use."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Where a scan had to end: ``at`` is the offset of the header concerned, ``reason`` one line."""

    reason: str
    at: int


def scan_tar(stream: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Every regular member of an uncompressed tar of ``size`` bytes, by its headers alone; data is skipped.

    Reads ustar, GNU and pax names. If the file is damaged or cut off, a `Damage` is the last thing that comes;
    a member whose data the file does not wholly hold is not yielded.
    """
    at = 0
    override: dict[str, str] = {}
    while True:
        stream.seek(at)
        block = stream.read(BLOCK)
        if len(block) == BLOCK and block.count(0) == BLOCK:
            return
        if len(block) < BLOCK:
            yield Damage(
                "it is empty" if size == 0 else "it ends without the end-of-archive mark", min(at, size)
            )
            return
        try:
            kind, name, length = _parse_header(block)
            if kind not in b"LKxgX":
                length = int(override.get("size", length))
        except ValueError as error:
            yield Damage(str(error), at)
            return
        data, has_data = at + BLOCK, kind in b"0\0\x37SLKxgX"
        end = data + (length + -length % BLOCK if has_data else 0)
        if length < 0 or (has_data and data + length > size):
            yield Damage(f"member {override.get('path', name)[:200]!r} is cut off", at)
            return
        if kind in b"LKxX":
            if length > MAX_NAME_BYTES:
                yield Damage(f"a header extension of {length} bytes", at)
                return
            extension = stream.read(length)
            try:
                override |= _parse_extension(kind, extension)
            except ValueError as error:
                yield Damage(str(error), at)
                return
        elif kind == b"S":
            yield Damage(f"member {name!r} is sparse, which is not supported", at)
            return
        else:
            if kind in b"0\0\x37":
                yield Member(override.get("path", name), data, length)
            if kind != b"g":
                override = {}
        at = end


def _parse_header(block: bytes) -> tuple[bytes, str, int]:
    """(type flag, name, size); ValueError where the block is not a tar header."""
    try:
        stated = int(block[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ValueError("not a tar header") from None
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if stated != unsigned and stated != _signed_sum(block):
        raise ValueError("not a tar header (wrong checksum)")
    field = block[124:136]
    try:
        length = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ValueError("a tar header whose size is not a number") from None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return block[156:157], _text(name), length


def _signed_sum(block: bytes) -> int:
    values = np.frombuffer(block, np.int8).astype(np.int64)
    return int(values.sum() - values[148:156].sum()) + 8 * 32


def _parse_extension(kind: bytes, data: bytes) -> dict[str, str]:
    """What a GNU long name or a pax header says of the next member's path and size."""
    if kind == b"L":
        return {"path": _text(data.split(b"\0", 1)[0])}
    found: dict[str, str] = {}
    at = 0
    while kind in b"xX" and at < len(data) and data[at]:
        digits, separator, _ = data[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() and separator else 0
        record = data[at + len(digits) + 1 : at + length]
        name, separator, value = record.rstrip(b"\n").partition(b"=")
        if not length or not separator or at + length > len(data):
            raise ValueError("a pax header that does not parse")
        if name in (b"path", b"size"):
            found[name.decode()] = _text(value)
        at += length
    return found


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


# -- kept labels --------------------------------------------------------------------------------------


def write_labels(keys: Sequence[str], labels: Sequence[Label], modality: Modality) -> bytes:
    """The tar of one shard's labels, in row order; `Absent` is kept with its reason. Lossless, or ContractError."""
    return write_tar(_members(keys, labels, modality))


def _members(keys: Sequence[str], labels: Sequence[Label], modality: Modality) -> Iterator[tuple[str, bytes]]:
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        facts: dict[str, Any] = {"key": key}
        payload: tuple[str, bytes] | None = None
        if isinstance(label, Absent):
            facts["absent"] = label.reason
        elif isinstance(label, Boxes):
            facts |= _boxes_json(label, modality.contract.classes)
        elif isinstance(label, (Metadata, Palettes, Poses, Instances)):
            facts["label"] = _structure_json(label)
        elif isinstance(label, np.ndarray):
            payload = _array_bytes(label, modality, key)
        elif modality.contract.form == "text":
            facts["texts"] = list(label)
        else:
            facts["value"] = float(label)
        yield f"{row:06d}.json", json.dumps(facts, sort_keys=True).encode()
        if payload is not None:
            yield f"{row:06d}.{payload[0]}", payload[1]


def _boxes_json(boxes: Boxes, classes: Sequence[str]) -> dict[str, Any]:
    """float32 survives JSON: Python prints the shortest digits that read back as the same double."""
    ids = boxes.class_ids.tolist()
    facts = {
        "boxes": boxes.xyxy.astype(float).tolist(),
        "class_ids": ids,
        "scores": boxes.scores.astype(float).tolist(),
    }
    return facts | ({"class_names": [classes[i] for i in ids]} if classes else {})


def _structure_json(label: Metadata | Palettes | Poses | Instances) -> dict[str, Any]:
    """Numbers survive JSON, see `_boxes_json`; NaN of joints that are not known is written as null."""
    if isinstance(label, Metadata):
        return {
            name: value if isinstance(value, int) else float(value) for name, value in label.values.items()
        }
    if isinstance(label, Palettes):
        return {"colours": [colours.tolist() for colours in label.colours]}
    if isinstance(label, Poses):
        known = np.isfinite(label.body_pose).all((1, 2, 3))
        rest = {
            name: getattr(label, name).astype(float).tolist()
            for name in ("xyxy", "orient", "betas", "camera")
        }
        body = [
            joints.astype(float).tolist() if k else None
            for joints, k in zip(label.body_pose, known, strict=True)
        ]
        ids = {"pose_ids": label.pose_ids.tolist(), "orders": label.orders.tolist()}
        return {**rest, **ids, "body_pose": body}
    return {
        "xyxy": label.xyxy.tolist(),
        "polygons": [polygon.tolist() for polygon in label.polygons],
        "mask_ids": label.mask_ids.tolist(),
    }


def _structure(form: str, facts: dict[str, Any]) -> Label:
    if form == "metadata":
        return Metadata(dict(facts))
    if form == "palette":
        return Palettes(tuple(np.array(colours, np.uint8).reshape(-1, 3) for colours in facts["colours"]))
    if form == "poses":
        unknown = np.full((NUM_JOINTS, 3, 3), np.nan)
        body = [unknown if joints is None else joints for joints in facts["body_pose"]]
        return Poses.of(**{**facts, "body_pose": np.array(body, np.float64)})
    return Instances.of(**facts)


def _array_bytes(label: np.ndarray, modality: Modality, key: str) -> tuple[str, bytes]:
    contract = modality.contract
    if label.dtype == np.uint8 and contract.form in ("map", "image"):
        image = label[:, :, 0] if label.ndim == 3 and label.shape[2] == 1 else label
        if image.ndim == 2 or image.shape[2] == 3:
            sink = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(sink, "PNG", compress_level=6)
            return "png", sink.getvalue()
    stored = label.astype(contract.stored) if contract.stored else label
    if not np.array_equal(stored.astype(label.dtype), label):
        raise ContractError(
            f"label {modality.name!r} of {key}: not representable as {stored.dtype}, in which it is kept; "
            "round it first, so that kept and fresh labels are the same"
        )
    return "npy", npy_bytes(stored)


def npy_bytes(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def npy_array(data: bytes) -> np.ndarray:
    """The array of a .npy file's bytes. ValueError unless the data is exactly what the header claims."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f".npy version {version}, expected (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or fortran or any(side < 0 for side in shape):
        raise ValueError(f".npy of {dtype}, shape {shape}: not an array in C order of plain numbers")
    count = 1
    for side in shape:
        count *= side
    body = data[stream.tell() :]
    if count * dtype.itemsize != len(body):
        raise ValueError(f".npy claims {dtype} {shape}, but holds {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape).copy()


def read_labels(data: bytes, modality: Modality) -> dict[int, Label]:
    """The labels of `write_labels` by row; `Absent` where they were. DatasetError where the file is damaged."""
    files: dict[int, dict[str, bytes]] = {}
    for item in scan_tar(io.BytesIO(data), len(data)):
        if isinstance(item, Damage):
            raise DatasetError(
                f"kept labels of {modality.name!r} are damaged: {item.reason}; remove their receipt"
            )
        row, _, ending = item.name.partition(".")
        if row.isascii() and row.isdigit():
            files.setdefault(int(row), {})[ending] = data[item.offset : item.offset + item.size]
    try:
        return {row: _label(parts, modality) for row, parts in sorted(files.items())}
    except (ValueError, KeyError, TypeError, OSError, SyntaxError, RecursionError) as error:
        raise DatasetError(
            f"kept labels of {modality.name!r} are damaged or of another contract: {error}; remove their receipt"
        ) from error


def label_keys(data: bytes) -> dict[int, str]:
    """The sample keys in a tar of kept labels, by row."""
    keys: dict[int, str] = {}
    for item in scan_tar(io.BytesIO(data), len(data)):
        if isinstance(item, Member) and item.name.endswith(".json"):
            facts = json.loads(data[item.offset : item.offset + item.size])
            keys[int(item.name.removesuffix(".json"))] = str(facts["key"])
    return keys


def _label(parts: dict[str, bytes], modality: Modality) -> Label:
    facts = json.loads(parts["json"])
    contract = modality.contract
    if "absent" in facts:
        return Absent(str(facts["absent"]))
    if "png" in parts:
        return _checked(_png_array(parts["png"], channels=contract.channels), modality)
    if "npy" in parts:
        array = npy_array(parts["npy"])
        expected = np.dtype(contract.stored or contract.dtype)
        if array.dtype != expected:
            raise ValueError(f"dtype {array.dtype}, expected {expected}")
        return _checked(array.astype(contract.dtype, copy=False), modality)
    if contract.form == "boxes":
        count = len(facts["class_ids"])
        xyxy = np.array(facts["boxes"], np.float32).reshape(count, 4)
        scores = np.array(facts["scores"], np.float32).reshape(count)
        return Boxes(xyxy, np.array(facts["class_ids"], np.int64).reshape(count), scores)
    if contract.form in ("metadata", "palette", "poses", "instances"):
        return _structure(contract.form, facts["label"])
    if contract.form == "text":
        return [str(text) for text in facts["texts"]]
    return float(facts["value"])


def _png_array(data: bytes, channels: int | None) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.mode not in ("L", "RGB") or image.width * image.height > MAX_PIXELS:
            raise ValueError(f"PNG of mode {image.mode}, {image.width}x{image.height}")
        array = np.array(image)
    return array[:, :, None] if channels == 1 else array


def _checked(array: np.ndarray, modality: Modality) -> np.ndarray:
    if array.dtype != np.dtype(modality.contract.dtype):
        raise ValueError(f"dtype {array.dtype}, expected {modality.contract.dtype}")
    return array
