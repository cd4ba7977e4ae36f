"""The codec family "palette": colours of an image <-> ``v1=<how many>`` and ``v0=<value>`` of red, green, blue, as in 4M-21.

An image has palettes of one to seven colours. The published code draws one of them whenever it reads the image; here one is
drawn for each crop when it is cropped (`fourmill.crops.draw_palette`), from the dataset's seed and the sample's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fourmill.labels import MAX_COLOURS, Label, Palettes
from fourmill.tokenize.base import Value, register
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vocabulary import Reader

_CHANNELS = 3


@register("palette")
class PaletteCodec(VocabularyCodec):
    """`Palettes` <-> uint16 (1 + 3 n,) for each palette of n colours; exact. ``max_tokens`` 23 holds the largest and EOS."""

    family = "palette"
    max_tokens: ClassVar[int] = 2 + _CHANNELS * MAX_COLOURS

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return [self._encode(label) for label in labels]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [self._decode(np.asarray(value).tolist()) for value in values]

    def _encode(self, palettes: Palettes) -> np.ndarray:
        at = self.vocabulary.coordinate
        tokens: list[int] = []
        for colours in palettes.colours:
            tokens += [at(1, len(colours)), *(at(0, int(value)) for value in colours.reshape(-1))]
        return np.array(tokens, dtype=np.uint16)

    def _decode(self, tokens: list[int]) -> Palettes:
        reader, found = Reader(self.vocabulary, tokens), []
        while reader:
            start, size = reader.at, reader.values(1)
            count = size[0] if size else 0
            values = reader.values(*[0] * (_CHANNELS * count)) if 1 <= count <= MAX_COLOURS else None
            if values is not None and max(values) <= 255:
                found.append(np.array(values, np.uint8).reshape(count, _CHANNELS))
            else:
                reader.at = start + 1
        return Palettes(tuple(found))
