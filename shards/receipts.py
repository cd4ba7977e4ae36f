"""Recipes and receipts: what bytes should be, and the proof that they are there.

A recipe is the identity of bytes: everything that we chose and that determines them. Its hash names
a folder that also holds its canonical text. A receipt commits one shard of one column under one recipe;
it is written last, and only if absent: the first writer wins.
"""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourmill.errors import DatasetError

SHORT = 12  # hex digits of a hash in names


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

    @property
    def present(self) -> int:
        return self.rows - sum(self.absent.values())

    def presence_mask(self) -> np.ndarray:
        """bool (rows,): which rows have a value."""
        bits = np.frombuffer(base64.b64decode(self.presence), np.uint8)
        return np.unpackbits(bits, count=self.rows, bitorder="little").astype(bool)

    def to_json(self) -> str:
        body = {name: getattr(self, name) for name in self.__slots__}
        return canonical({**body, "format": 1, "digest": sha256(canonical(body))})

    @classmethod
    def from_json(cls, text: str | builtins.bytes, where: str) -> Receipt:
        """Read a receipt and check the digest that it carries of itself."""
        try:
            body = json.loads(text)
            digest = body.pop("digest")
            version = body.pop("format")
            receipt = cls(**body)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{where}: not a receipt ({error}); remove it and run the build again"
            ) from error
        if version != 1 or digest != sha256(canonical(body)):
            raise DatasetError(f"{where}: the receipt is damaged; remove it and run the build again")
        return receipt


def pack_presence(present: np.ndarray) -> str:
    """bool (rows,) -> base64 bitmap."""
    return base64.b64encode(np.packbits(present.astype(bool), bitorder="little").tobytes()).decode()


def receipt_name(column: str, recipe_short: str, shard: int) -> str:
    return f"receipts/{column}/{recipe_short}/shard-{shard:06d}.json"


def data_name(folder: str, shard: int, data: bytes, ending: str) -> str:
    """The content-addressed name of a data file, e.g. ``tokens/depth/shard-000000.0123456789ab.arrow``."""
    return f"{folder}/shard-{shard:06d}.{sha256(data)[:SHORT]}.{ending}"


def shard_number(name: str) -> int | None:
    """The shard of ``shard-000012.json`` or ``shard-000012.<anything>``; None for other names."""
    head, _, rest = name.partition(".")
    digits = head.removeprefix("shard-")
    return int(digits) if rest and head.startswith("shard-") and digits.isdigit() else None
