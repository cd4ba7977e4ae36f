"""The codec family "metadata": numbers about an image <-> two tokens for each, as in 4M-21.

``v1=<type> v0=<value>``, in the order of `METADATA`. The published code shuffles the pairs whenever it reads them, and masks
whole pairs: here they are stored in one order, and `CHUNK` says how many tokens belong together, so that training can do both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fourmill.labels import METADATA, Label, Metadata
from fourmill.tokenize.base import Value, register
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vocabulary import NUM_BINS, Reader

#: tokens that are shuffled and masked as one
CHUNK = 2


@dataclass(frozen=True, slots=True)
class Scale:
    """How a field's values become bins and come back, as the middle of their bin.

    Either steps of ``step``, or ``bins`` of which the last holds ``high`` and what lies above, or ``bounds`` between bins that
    come back as ``middles``.
    """

    step: int = 1
    high: float = 0.0
    bins: int = NUM_BINS
    bounds: tuple[float, ...] = ()
    middles: tuple[float, ...] = ()

    def to_bin(self, value: float) -> int:
        if self.bounds:
            return sum(value >= bound for bound in self.bounds)
        if self.high:
            return int(min(max(value, 0.0), self.high) / self.high * (self.bins - 1))
        return int(min(max(value // self.step, 0), self.bins - 1))

    def to_value(self, index: int) -> float | None:
        """None of a bin that there is not."""
        if self.bounds:
            return self.middles[index] if index < len(self.middles) else None
        if self.high:
            middle = (index + 0.5) / (self.bins - 1) if index < self.bins - 1 else 1.0
            return self.high * middle if index < self.bins else None
        return index * self.step + self.step // 2


def _up_to(high: float) -> Scale:
    return Scale(high=high, bins=50)


_SCALES: Mapping[str, Scale] = {
    "original_width": Scale(step=32),
    "original_height": Scale(step=32),
    "colorfulness": _up_to(150),
    "brightness": _up_to(255),
    "contrast": _up_to(127),
    "saturation": _up_to(255),
    "entropy": _up_to(10),
    "walkability": _up_to(1),
    "objectness": _up_to(1),
    "geometric_complexity": _up_to(0.75),
    "occlusion_score": _up_to(0.25),
    "watermark_score": Scale(bounds=(0.5,), middles=(0.25, 0.75)),
    "aesthetic_score": Scale(bounds=(4.5, 5.5), middles=(4.0, 5.0, 6.0)),
}
#: in the order of type ids; fields that are not named above are counts, exact up to 999
FIELDS: Mapping[str, Scale] = {name: _SCALES.get(name, Scale()) for name in METADATA}
_NAMES = tuple(FIELDS)


@register("metadata")
class MetadataCodec(VocabularyCodec):
    """`Metadata` <-> uint16 (2 n,). Fields come back as the middle of their bin; the first of two of a name counts.

    ``max_tokens`` 40 holds 19 fields, a sentinel and EOS.
    """

    family = "metadata"
    max_tokens: ClassVar[int] = 40

    def stored(self) -> dict[str, Any]:
        return {"chunk": CHUNK}

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return [self._encode(label) for label in labels]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [self._decode(np.asarray(value).tolist()) for value in values]

    def _encode(self, metadata: Metadata) -> np.ndarray:
        tokens: list[int] = []
        for number, (name, scale) in enumerate(FIELDS.items()):
            if name in metadata.values:
                value = scale.to_bin(float(metadata.values[name]))
                tokens += [self.vocabulary.coordinate(1, number), self.vocabulary.coordinate(0, value)]
        return np.array(tokens, dtype=np.uint16)

    def _decode(self, tokens: list[int]) -> Metadata:
        found: dict[str, float] = {}
        reader = Reader(self.vocabulary, tokens)
        while reader:
            pair = reader.values(1, 0)
            if pair is None:
                reader.at += 1
            elif pair[0] < len(_NAMES):
                name = _NAMES[pair[0]]
                value = FIELDS[name].to_value(pair[1])
                if value is not None:
                    found.setdefault(name, value)
        return Metadata(found)
