"""What a tokenizer makes of labels that it was not fitted on: each above its reconstruction, as a picture beside its card."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from fourmill.flows.report.pictures import Painter, Palette, png_bytes
from fourmill.labels import Label
from fourmill.tokenize.robust import middle
from fourmill.tokenize.spaces import Depth
from fourmill.tokenize.vqvae import VQVAE

PICTURE = "reconstructions.png"
_SIDE, _GAP, _SHOWN = 128, 4, 8


def reconstructions(codec: VQVAE, held_out: Sequence[Label]) -> bytes | None:
    """PNG of two rows: up to eight labels, and below each what its tokens stand for. None where there is nothing to draw."""
    count = min(_SHOWN, len(held_out))
    labels = [held_out[i] for i in np.linspace(0, len(held_out) - 1, count).astype(int).tolist()]
    painter = Painter(codec.modality, codec.image_size, Palette(), labels)
    if not labels or not painter.is_drawn:
        return None
    rows = (labels, _on_their_scale(codec, labels, codec.decode(codec.encode(labels))))
    sheet = np.full((2 * _SIDE + _GAP, count * (_SIDE + _GAP) - _GAP, 3), 255, np.uint8)
    for row, shown in enumerate(rows):
        for column, label in enumerate(shown):
            pixels = painter.paint(label)
            if pixels is not None:
                top, left = row * (_SIDE + _GAP), column * (_SIDE + _GAP)
                tile = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
                sheet[top : top + _SIDE, left : left + _SIDE] = np.asarray(tile)
    return png_bytes(sheet)


def _on_their_scale(codec: VQVAE, labels: Sequence[Label], made: Sequence[Label]) -> list[Label]:
    """Relative depth is decoded on a scale of its own."""
    if not isinstance(codec.space, Depth) or codec.space.normalisation == "log":
        return list(made)
    mean, deviation = middle(np.stack(labels))
    return list(np.stack(made) * deviation + mean)
