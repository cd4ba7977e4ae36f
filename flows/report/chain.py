"""The chain as one wide picture for a README: a held-out sample per row, the links of a few modalities side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fourmill.flows.report.links import LABEL, MODEL, ROUND_TRIP, TRUTH, Shown
from fourmill.flows.report.pictures import Painter, png_bytes

CELL, GAP, GROUP_GAP, MARGIN, HEAD = 112, 4, 18, 16, 44
MAX_GROUPS = 3
TITLES = {LABEL: "label", ROUND_TRIP: "tokens, decoded", MODEL: "model", TRUTH: "truth"}
INK, FAINT, PAPER = (32, 34, 40), (112, 116, 124), (255, 255, 255)


def chain_png(
    shown: Sequence[Shown], painters: Mapping[str, Painter], references: Mapping[str, str]
) -> bytes:
    """PNG bytes: image | label, round trip, model, truth of each of up to three modalities (those with truth first)."""
    names = [name for name, painter in painters.items() if painter.is_drawn and painter.family != "image"]
    names = sorted(names, key=lambda name: (painters[name].family == "boxes", references.get(name) != TRUTH))
    groups = {name: _links(shown, name) for name in names[:MAX_GROUPS]}
    groups = {name: links for name, links in groups.items() if links}
    widths = [len(links) * (CELL + GAP) - GAP for links in groups.values()]
    width = 2 * MARGIN + CELL + sum(GROUP_GAP + w for w in widths)
    height = MARGIN + HEAD + max(1, len(shown)) * (CELL + GAP) - GAP + MARGIN
    canvas = Image.new("RGB", (width, height), PAPER)
    _headings(ImageDraw.Draw(canvas), groups)
    for number, one in enumerate(shown):
        top = MARGIN + HEAD + number * (CELL + GAP)
        _paste(canvas, one.image, MARGIN, top)
        left = MARGIN + CELL + GROUP_GAP
        for name, links in groups.items():
            for link in links:
                _paste(canvas, painters[name].paint(one.links[link].get(name), one.image), left, top)
                left += CELL + GAP
            left += GROUP_GAP - GAP
    return png_bytes(np.asarray(canvas))


def _links(shown: Sequence[Shown], name: str) -> list[str]:
    return [link for link in TITLES if any(name in one.links.get(link, {}) for one in shown)]


def _headings(draw: ImageDraw.ImageDraw, groups: Mapping[str, Sequence[str]]) -> None:
    title, small = ImageFont.load_default(15), ImageFont.load_default(12)
    draw.text((MARGIN, MARGIN), "image", font=title, fill=INK)
    draw.text((MARGIN, MARGIN + 20), "held out", font=small, fill=FAINT)
    left = MARGIN + CELL + GROUP_GAP
    for name, links in groups.items():
        draw.text((left, MARGIN), name, font=title, fill=INK)
        for link in links:
            draw.text((left, MARGIN + 20), TITLES[link], font=small, fill=FAINT)
            left += CELL + GAP
        left += GROUP_GAP - GAP


def _paste(canvas: Image.Image, pixels: np.ndarray | None, left: int, top: int) -> None:
    """A picture in its cell; an empty one is a pale field."""
    if pixels is None:
        canvas.paste((240, 240, 242), (left, top, left + CELL, top + CELL))
        return
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    how = Image.Resampling.NEAREST if picture.width < CELL // 2 else Image.Resampling.LANCZOS
    canvas.paste(picture.resize((CELL, CELL), how), (left, top))
