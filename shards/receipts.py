"""Recipes and receipts: what bytes should be, and the proof that they are there.

A recipe is the identity of bytes: everything that we chose and that determines them. Its hash names
a folder that also holds its canonical text. A receipt commits one shard of one column under one recipe;
it is written last, and only if absent: the first writer wins.

Null cells may be tried again later: that makes a second receipt of the same shard, of the next *epoch*, beside the first. The
receipt of the highest epoch is the shard's; what an earlier one names stays, for snapshots that were made of it.
"""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourmill.errors import DatasetError

SHORT = 12  # hex digits of a hash in names

_RECEIPT = re.compile(r"shard-(\d{6,})(?:\.e([1-9]\d*))?\.json")


def canonical(value: Any) -> str:
    """One text per value: sorted keys, one line per entry, so that two recipes compare line by line."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


@dataclass(frozen=True, slots=True)
class Recipe:
    """``kind``: samples, label or token. ``content``: JSON values only."""

    kind: str
    content: dict[str, Any]

    @property
    def text(self) -> str:
        return canonical({"kind": self.kind, **self.content})

    @property
    def hash(self) -> str:
        return sha256(self.text)

    @property
    def short(self) -> str:
        return self.hash[:SHORT]


@dataclass(frozen=True, slots=True)
class Receipt:
    """The commit of one shard of one column."""

    column: str
    recipe: str  # full hash
    shard: int
    rows: int
    absent: dict[str, int]  # rows without a value, by reason
    presence: str  # base64 of the bitmap (np.packbits, little bit order), rows in order
    keys: str  # digest of the key column
    file: str  # name of the data file, relative to the dataset
    sha256: str
    bytes: int
    dataset: str  # sha256 of dataset.yaml
    source: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    epoch: int = 0  # how often null cells of the shard were tried again
    figures: str = (
        ""  # what was measured of its rows (`fourmill.labelers.figures.Tally`): JSON, parsed by who asks
    )
    warnings: list[str] = field(default_factory=list)  # figures that are beyond a limit

    @property
    def present(self) -> int:
        return self.rows - sum(self.absent.values())

    def presence_mask(self) -> np.ndarray:
        """bool (rows,): which rows have a value."""
        return unpack_presence(self.presence, self.rows)

    def to_json(self) -> str:
        body = {name: getattr(self, name) for name in self.__slots__}
        for name in ("epoch", "figures", "warnings"):
            if not body[name]:
                del body[name]  # as it was before there were any: the digest of an old receipt still holds
        if self.figures:
            body["figures"] = json.loads(self.figures)
        return canonical({**body, "format": 1, "digest": sha256(canonical(body))})

    @classmethod
    def from_json(cls, text: str | builtins.bytes, where: str) -> Receipt:
        """Read a receipt and check the digest that it carries of itself."""
        try:
            body = json.loads(text)
            digest = body.pop("digest")
            version = body.pop("format")
            figures = json.dumps(body["figures"], separators=(",", ":")) if "figures" in body else ""
            receipt = cls(**{**body, "figures": figures})
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{where}: not a receipt ({error}); remove it and run the build again"
            ) from error
        if version != 1 or not (_holds_as_written(text, digest) or digest == sha256(canonical(body))):
            raise DatasetError(f"{where}: the receipt is damaged; remove it and run the build again")
        return receipt


def _holds_as_written(text: str | bytes, digest: str) -> bool:
    """Whether the digest is that of the text without its two lines `digest` and `format`: quicker than to write it anew."""
    whole = text.decode() if isinstance(text, bytes) else text
    for line in (f'\n "digest": "{digest}",', '\n "format": 1,'):
        if whole.count(line) != 1:
            return False
        whole = whole.replace(line, "")
    return sha256(whole) == digest


def pack_presence(present: np.ndarray) -> str:
    """bool (rows,) -> base64 bitmap."""
    return base64.b64encode(np.packbits(present.astype(bool), bitorder="little").tobytes()).decode()


def unpack_presence(bitmap: str, rows: int) -> np.ndarray:
    """The inverse of `pack_presence`: bool (rows,)."""
    bits = np.frombuffer(base64.b64decode(bitmap), np.uint8)
    return np.unpackbits(bits, count=rows, bitorder="little").astype(bool)


def receipt_name(column: str, recipe_short: str, shard: int, epoch: int = 0) -> str:
    """``.../shard-000012.json``; of a later epoch ``.../shard-000012.e1.json``."""
    ending = f".e{epoch}.json" if epoch else ".json"
    return f"receipts/{column}/{recipe_short}/shard-{shard:06d}{ending}"


def receipt_prefix(shard: int) -> str:
    """What the names of all of a shard's receipts begin with, inside their folder."""
    return f"shard-{shard:06d}."


def shard_and_epoch(name: str) -> tuple[int, int] | None:
    """(shard, epoch) of a receipt's name inside its folder; None for any other file."""
    match = _RECEIPT.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def newest(names: Iterable[str]) -> dict[int, str]:
    """By shard, the name of its receipt of the highest epoch, among the names of a folder."""
    found: dict[int, str] = {}
    later: dict[int, int] = {}
    for name in names:
        digits = name[6:-5]
        if len(digits) == 6 and digits.isdecimal() and name == f"shard-{digits}.json":
            found.setdefault(int(digits), name)  # by far the most, and the pattern takes four times as long
        elif (parsed := shard_and_epoch(name)) is not None:
            shard, epoch = parsed
            if epoch >= later.get(shard, 0):
                later[shard], found[shard] = epoch, name
    return found


def data_name(folder: str, shard: int, data: bytes, ending: str) -> str:
    """The content-addressed name of a data file, e.g. ``tokens/depth/shard-000000.0123456789ab.arrow``."""
    return f"{folder}/shard-{shard:06d}.{sha256(data)[:SHORT]}.{ending}"


def shard_number(name: str) -> int | None:
    """The shard of ``shard-000012.json`` or ``shard-000012.<anything>``; None for other names."""
    head, _, rest = name.partition(".")
    digits = head.removeprefix("shard-")
    return int(digits) if rest and head.startswith("shard-") and digits.isdigit() else None
