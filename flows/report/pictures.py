"""Labels as pictures: depth by a perceptual colour table, normals as colours, classes by name, boxes over the image.

Every painter is fitted on the labels of a page, so that one colour means one thing on all of it.
"""

from __future__ import annotations

import base64
import colorsys
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fourmill.flows.report.measures import Family, family_of
from fourmill.labels import Absent, Boxes, Label
from fourmill.modality import Modality

#: the families that are drawn; the others are written
DRAWN: frozenset[Family] = frozenset(
    {"image", "depth", "relative", "normal", "classes", "boxes", "features", "map", "vector"}
)
#: Oklch (lightness, chroma, hue in degrees) from far to near: even steps of lightness
_DEPTH_STOPS = ((0.24, 0.075, 282), (0.42, 0.135, 318), (0.60, 0.165, 8), (0.77, 0.135, 52), (0.95, 0.09, 98))
_CLASS_COLOURS = (
    "#8c9aa8", "#d9c9a3", "#d1495b", "#2e86ab", "#66a182", "#edae49", "#7d5ba6", "#e08e79",
    "#3c6e71", "#b5c267", "#5f6caf", "#c96480",
)  # fmt: skip


def oklch_to_rgb(colours: np.ndarray) -> np.ndarray:
    """float (..., 3) Oklch, hue in degrees -> uint8 (..., 3) sRGB (Ottosson 2020, "A perceptual color space")."""
    lightness, chroma, hue = (colours[..., i] for i in range(3))
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    lms = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        axis=-1,
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(lms**3 @ to_linear.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def _depth_table() -> np.ndarray:
    """uint8 (256, 3), far and dark to near and light."""
    stops = np.array(_DEPTH_STOPS)
    stops[:, 2] = np.degrees(np.unwrap(np.radians(stops[:, 2])))
    at = np.linspace(0, 1, 256)
    columns = [np.interp(at, np.linspace(0, 1, len(stops)), stops[:, i]) for i in range(3)]
    return oklch_to_rgb(np.stack(columns, axis=-1))


DEPTH_COLOURS = _depth_table()


@dataclass
class Palette:
    """Colours by class name, shared by all modalities of a page; more names than colours get further hues."""

    names: list[str] = field(default_factory=list)

    def colour(self, name: str) -> tuple[int, int, int]:
        if name not in self.names:
            self.names.append(name)
        index = self.names.index(name)
        if index < len(_CLASS_COLOURS):
            text = _CLASS_COLOURS[index]
            return (int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16))
        hue = (index * 0.618034) % 1
        red, green, blue = colorsys.hls_to_rgb(hue, 0.5 + 0.12 * (index % 3 - 1), 0.55)
        return (round(255 * red), round(255 * green), round(255 * blue))

    def hex(self, name: str) -> str:
        return "#{:02x}{:02x}{:02x}".format(*self.colour(name))


class Painter:
    """Draws the labels of one modality; ``reference`` are the labels (and truths) that its scale is taken from."""

    def __init__(self, modality: Modality, size: int, palette: Palette, reference: Sequence[Label]) -> None:
        self.modality, self.size, self.palette = modality, size, palette
        self.family = family_of(modality.contract)
        self.classes = modality.contract.classes
        for name in self.classes if self.family in ("classes", "boxes") else ():
            palette.colour(name)
        maps = [x for x in reference if isinstance(x, np.ndarray)]
        self.low, self.high = (
            _range(maps) if self.family in ("depth", "relative", "map", "vector") else (0.0, 1.0)
        )
        if self.family == "map" and modality.contract.low is not None and modality.contract.high is not None:
            self.low, self.high = float(modality.contract.low), float(modality.contract.high)
        self._axes = _principal_axes(maps) if self.family == "features" and maps else None

    @property
    def is_drawn(self) -> bool:
        return self.family in DRAWN

    def paint(self, label: Label, image: np.ndarray | None = None) -> np.ndarray | None:
        """uint8 (H, W, 3), None where there is nothing to draw. ``image`` uint8 (S, S, 3) is what boxes are drawn over."""
        if label is None or isinstance(label, Absent) or not self.is_drawn:
            return None
        if self.family == "image":
            return np.asarray(label)
        if self.family in ("depth", "relative"):
            return DEPTH_COLOURS[self.depth_index(label)]
        if self.family == "normal":
            return np.rint((np.clip(label, -1, 1) + 1) * 127.5).astype(np.uint8)
        if self.family == "classes":
            return self._table()[np.asarray(label)]
        if self.family == "boxes":
            return self._boxes(label, image)
        if self.family == "features":
            return self._features(np.asarray(label))
        return self._values(np.asarray(label))

    def depth_index(self, label: np.ndarray) -> np.ndarray:
        """Near is 255, by the logarithm of the depth."""
        logs = np.log(np.maximum(label, 1e-6))
        share = (math.log(self.high) - logs) / max(math.log(self.high) - math.log(self.low), 1e-6)
        return np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)

    def _table(self) -> np.ndarray:
        table = np.full((256, 3), 20, np.uint8)
        count = len(self.classes) or 255
        for index in range(min(count, 256)):
            name = self.classes[index] if self.classes else f"class {index}"
            table[index] = self.palette.colour(name)
        return table

    def _features(self, label: np.ndarray) -> np.ndarray:
        assert self._axes is not None
        mean, axes, low, high = self._axes
        scores = (label.reshape(-1, label.shape[-1]) - mean) @ axes
        scaled = np.clip((scores - low) / np.maximum(high - low, 1e-6), 0, 1)
        return np.rint(255 * scaled).astype(np.uint8).reshape(*label.shape[:2], 3)

    def _values(self, label: np.ndarray) -> np.ndarray:
        """Other maps in grey or colour; a vector as a strip of bars of one shade each."""
        values = np.atleast_1d(label).astype(np.float64)
        values = values[None] if values.ndim == 1 else values
        scaled = np.rint(255 * np.clip((values - self.low) / max(self.high - self.low, 1e-6), 0, 1))
        grey = scaled.astype(np.uint8)
        if grey.ndim == 2:
            return np.repeat(grey[..., None], 3, axis=-1)
        return grey[..., :3] if grey.shape[-1] >= 3 else np.repeat(grey[..., :1], 3, axis=-1)

    def _boxes(self, boxes: Boxes, image: np.ndarray | None) -> np.ndarray:
        """Over the greyed image, at three times a small image's size so that names can be read."""
        base = np.full((self.size, self.size, 3), 128, np.uint8) if image is None else image
        scale = max(1, round(384 / base.shape[0]))
        side = (base.shape[1] * scale, base.shape[0] * scale)
        canvas = Image.fromarray(base).convert("L").convert("RGB").resize(side, Image.Resampling.BICUBIC)
        canvas = Image.blend(canvas, Image.new("RGB", side, (238, 238, 238)), 0.35)
        draw = ImageDraw.Draw(canvas)
        font = ImageFont.load_default(max(10, side[0] // 15))
        for index in np.argsort(boxes.scores, kind="stable")[:64]:
            self._box(draw, boxes.xyxy[index], int(boxes.class_ids[index]), side, font)
        return np.asarray(canvas)

    def _box(
        self,
        draw: ImageDraw.ImageDraw,
        xyxy: np.ndarray,
        class_id: int,
        side: tuple[int, int],
        font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    ) -> None:
        name = self.classes[class_id] if class_id < len(self.classes) else str(class_id)
        colour = self.palette.colour(name)
        x0, x1 = sorted(float(x) * (side[0] - 1) for x in (xyxy[0], xyxy[2]))
        y0, y1 = sorted(float(y) * (side[1] - 1) for y in (xyxy[1], xyxy[3]))
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=max(2, side[0] // 110))
        left, top, right, bottom = draw.textbbox((0, 0), name, font=font)
        width, height = right - left + 8, bottom - top + 8
        at = (min(max(x0, 0), side[0] - width), min(max(y0 - height, 0), side[1] - height))
        draw.rectangle((at[0], at[1], at[0] + width, at[1] + height), fill=colour)
        draw.text((at[0] + 4 - left, at[1] + 4 - top), name, font=font, fill=_ink(colour))


def _ink(colour: tuple[int, int, int]) -> str:
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else "white"


def _range(maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """The middle 98 % of the values."""
    if not maps:
        return 0.1, 10.0
    values = np.concatenate([np.asarray(m, np.float64).ravel() for m in maps])
    low, high = np.percentile(values, [1, 99])
    return float(low), float(max(high, low * 1.01 if low > 0 else low + 1e-6))


def _principal_axes(maps: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Mean (C,), axes (C, 3) and the range of the scores: the first three principal components."""
    rows = np.concatenate([m.reshape(-1, m.shape[-1]) for m in maps]).astype(np.float64)
    mean = rows.mean(0)
    _, _, axes = np.linalg.svd(rows - mean, full_matrices=False)
    axes = axes[:3].T
    axes = axes * np.sign(
        axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])]
    )  # signs are arbitrary: fix them
    if axes.shape[1] < 3:
        axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))
    low, high = np.percentile((rows - mean) @ axes, [2, 98], axis=0)
    return mean, axes, low, high


def normal_ball(side: int = 64) -> np.ndarray:
    """uint8 (side, side, 4): a ball in the colours of normals, transparent around it."""
    at = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(at, -at)
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, None))
    colours = np.rint((np.stack([x, y, z], -1) + 1) * 127.5)
    cover = np.clip((1 - np.sqrt(x**2 + y**2)) * side / 2, 0, 1) * 255
    return np.concatenate([colours, cover[..., None]], -1).clip(0, 255).astype(np.uint8)


def depth_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """(place along the colour bar from near, text) at round numbers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    rounds = [m * 10.0**d for d in decades for m in (1, 1.5, 2, 3, 5, 7)]
    inside = [value for value in rounds if low <= value <= high]
    while len(inside) > 7:
        inside = inside[::2]
    span = max(math.log(high / low), 1e-6)
    return [(math.log(value / low) / span, f"{value:g}") for value in inside]


def data_uri(pixels: np.ndarray, family: Family | None = None) -> str:
    """A picture as a data: URI; photographs and smooth maps as WebP, flat colours and features as PNG."""
    sink = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if family in ("image", "normal", "boxes"):
        picture.save(sink, "WEBP", quality=90, method=4)
        kind = "webp"
    else:
        if family in ("depth", "relative", "classes"):
            picture = picture.quantize(256, dither=Image.Dither.NONE)
        picture.save(sink, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"


def png_bytes(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(sink, "PNG", optimize=True)
    return sink.getvalue()


def make_painters(
    modalities: Mapping[str, Modality], size: int, labels: Mapping[str, Iterable[Label]]
) -> tuple[dict[str, Painter], Palette]:
    """A painter for each modality, on one palette."""
    palette = Palette()
    painters = {
        name: Painter(modality, size, palette, list(labels.get(name, ())))
        for name, modality in modalities.items()
    }
    return painters, palette
