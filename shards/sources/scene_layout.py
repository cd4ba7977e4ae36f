"""What a rendered scene consists of, drawn from (seed, index) alone: camera, light, room and objects.

World frame: x right, y up, z forward along the camera's heading, metres; the camera stands at (0, height, 0) and is
pitched downwards, so "camera yaw" is the yaw of the room around it. Every parameter comes from the raw 64-bit words
of a Philox generator and is derived with correctly rounded operations only. Angles are drawn as the tangent of their
half, which gives exactly orthonormal sines and cosines without the C library's sin and cos.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

VERSION = 1
# Like bricks and floor tiles, each texture has one cell size in metres: with the haze and the few object sizes, it is
# what makes metric depth something that an image can tell. Floors have the coarse ones alone.
CELL_M = {"checkered": 0.5, "striped": 0.35, "speckled": 0.08}
TEXTURES = tuple(CELL_M)
FLOOR_TEXTURES = TEXTURES[:2]
KINDS = ("sphere", "box", "cylinder")
SIZES = ("small", "medium", "large")

Rgb: TypeAlias = tuple[float, float, float]

OBJECT_COLOURS: dict[str, Rgb] = {
    "red": (0.86, 0.13, 0.12),
    "green": (0.13, 0.62, 0.20),
    "blue": (0.13, 0.27, 0.86),
    "yellow": (0.96, 0.85, 0.12),
    "orange": (0.96, 0.50, 0.08),
    "purple": (0.50, 0.18, 0.68),
    "pink": (0.97, 0.50, 0.70),
    "cyan": (0.15, 0.78, 0.86),
    "brown": (0.45, 0.27, 0.14),
    "white": (0.95, 0.95, 0.95),
    "black": (0.10, 0.10, 0.11),
}
SURFACE_COLOURS: dict[str, Rgb] = {
    "grey": (0.62, 0.62, 0.64),
    "white": (0.92, 0.92, 0.90),
    "beige": (0.87, 0.78, 0.62),
    "brown": (0.60, 0.43, 0.29),
    "green": (0.52, 0.70, 0.48),
    "blue": (0.49, 0.63, 0.82),
    "pink": (0.88, 0.65, 0.68),
    "yellow": (0.90, 0.82, 0.48),
    "purple": (0.66, 0.56, 0.78),
    "teal": (0.38, 0.63, 0.62),
}
HALF_EXTENT_M = {"small": 0.2, "medium": 0.38, "large": 0.65}
HAZE_RGB: Rgb = (0.70, 0.76, 0.86)
HAZE_HALF_M = 7.0  # at this depth half of the colour is haze


class Draws:
    """Uniform numbers from a counter-based stream that is a function of (version, seed, index, purpose)."""

    def __init__(self, seed: int, index: int, purpose: str) -> None:
        text = f"fourmill scenes/{VERSION}/{seed}/{index}/{purpose}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        self._bits = np.random.Philox(key=key)
        self._words: list[int] = []  # a block of the stream, last first

    def unit(self) -> float:
        """The next number in [0, 1), 53 bits."""
        if not self._words:
            self._words = self._bits.random_raw(128).tolist()[::-1]
        return (self._words.pop() >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def below(self, count: int) -> int:
        return int(self.unit() * count)


@dataclass(frozen=True, slots=True)
class Camera:
    height: float
    sin_pitch: float  # positive looks down
    cos_pitch: float
    tan_half_fov: float

    def project(self, x: float, y: float, z: float) -> tuple[float, float, float]:
        """World point to (u, v, depth): u, v are slopes right and up of the optical axis, depth is along it."""
        rise = y - self.height
        depth = z * self.cos_pitch - rise * self.sin_pitch
        safe = max(1e-09, depth)
        return x / safe, (rise * self.cos_pitch + z * self.sin_pitch) / safe, depth


@dataclass(frozen=True, slots=True)
class Surface:
    """How a floor or a wall is painted."""

    colour: str
    rgb: Rgb
    texture: str
    cell_m: float  # edge of a checker field, width of a stripe, grain of the speckle
    contrast: float  # the dark parts have (1 - contrast) of the brightness
    sin: float  # rotation of the pattern in the surface
    cos: float


@dataclass(frozen=True, slots=True)
class Wall:
    """A vertical plane of unlimited height; (nx, nz) is the unit normal towards the camera's side."""

    nx: float
    nz: float
    distance: float  # from the camera, metres
    paint: int  # index into Layout.paints


@dataclass(frozen=True, slots=True)
class Light:
    """Direction towards the light (positional 0) or its position (positional 1)."""

    x: float
    y: float
    z: float
    positional: float
    ambient: float


@dataclass(frozen=True, slots=True)
class Item:
    """An object that stands on the floor."""

    kind: str
    size: str
    colour: str
    rgb: Rgb
    x: float
    z: float
    half_x: float  # radius of spheres and cylinders
    half_z: float
    height: float
    sin: float = 0.0  # yaw, boxes only
    cos: float = 1.0

    @property
    def reach(self) -> float:
        """Radius of the smallest upright cylinder around the object."""
        if self.kind == "box":
            return math.sqrt(self.half_x * self.half_x + self.half_z * self.half_z)
        return self.half_x

    def corners(self) -> list[tuple[float, float, float]]:
        """The eight corners of a box around the object, world frame."""
        ground = [
            (self.x + self.cos * a + self.sin * b, self.z - self.sin * a + self.cos * b)
            for a in (-self.half_x, self.half_x)
            for b in (-self.half_z, self.half_z)
        ]
        return [(x, y, z) for x, z in ground for y in (0.0, self.height)]


@dataclass(frozen=True, slots=True)
class Layout:
    camera: Camera
    light: Light
    room: str  # "open", "corner" or "room"
    walls: tuple[Wall, ...]
    floor: Surface
    paints: tuple[Surface, ...]  # of the walls
    items: tuple[Item, ...]


def rotation(half_tangent: float) -> tuple[float, float]:
    """(sin, cos) of the angle whose half has this tangent."""
    square = half_tangent * half_tangent
    return 2.0 * half_tangent / (1.0 + square), (1.0 - square) / (1.0 + square)


def draw_layout(seed: int, index: int) -> Layout:
    """All parameters of one scene. The order of the draws is part of version 1."""
    draws = Draws(seed, index, "layout")
    while True:
        camera = _draw_camera(draws)
        room, walls = _draw_walls(draws)
        if _sees_floor(camera, walls):
            break
    floor = _draw_surface(draws, None, FLOOR_TEXTURES)
    first = _draw_surface(draws, floor.colour, TEXTURES)
    second = _draw_surface(draws, floor.colour, TEXTURES)
    paints = (first, second if draws.unit() < 0.4 else first)
    light = _draw_light(draws)
    items = _draw_items(draws, camera, walls)
    return Layout(camera, light, room, walls, floor, paints, items)


def _draw_camera(draws: Draws) -> Camera:
    sin_pitch, cos_pitch = rotation(draws.between(0.02, 0.24))  # 2 to 27 degrees down
    height = draws.between(0.9, 2.2)
    return Camera(height, sin_pitch, cos_pitch, draws.between(0.53170943, 0.62486935))  # 56 to 64 degrees


def _ahead(walls: tuple[Wall, ...], slope: float) -> float:
    """How far forward the walls are along the ground direction (slope, 1)."""
    return min(w.distance / -(w.nx * slope + w.nz) for w in walls if w.nx * slope + w.nz < -1e-3)


def _sees_floor(camera: Camera, walls: tuple[Wall, ...]) -> bool:
    """Whether the floor's first visible strip is well before the walls."""
    drop = camera.tan_half_fov * camera.cos_pitch + camera.sin_pitch
    first = camera.height * (camera.cos_pitch - camera.tan_half_fov * camera.sin_pitch) / drop
    slopes = (-0.7 * camera.tan_half_fov, 0.0, 0.7 * camera.tan_half_fov)
    far = [_ahead(walls, slope) for slope in slopes]
    return min(far) > 1.1 * first + 0.2 and far[1] > 1.5 * first + 0.5


def _draw_walls(draws: Draws) -> tuple[str, tuple[Wall, ...]]:
    """One far wall, a corner of two, or a back wall between two side walls."""
    choice = draws.unit()
    if choice < 0.3:
        sin, cos = rotation(draws.between(-0.15, 0.15))
        return "open", (Wall(sin, -cos, draws.between(2.6, 8.5), 0),)
    if choice < 0.65:
        sin, cos = rotation(draws.between(0.12, 0.62))
        far, near = draws.between(2.4, 7.0), draws.between(2.4, 7.0)
        return "corner", (Wall(-sin, -cos, far, 0), Wall(cos, -sin, near, 1))
    sin, cos = rotation(draws.between(-0.16, 0.16))
    back = Wall(sin, -cos, draws.between(2.6, 9.0), 0)
    left = Wall(cos, sin, draws.between(1.4, 4.0), 1)
    right = Wall(-cos, -sin, draws.between(1.4, 4.0), 1)
    return "room", (back, left, right)


def _draw_surface(draws: Draws, avoid: str | None, textures: tuple[str, ...]) -> Surface:
    names = [name for name in SURFACE_COLOURS if name != avoid]
    colour = names[draws.below(len(names))]
    texture = textures[draws.below(len(textures))]
    contrast = draws.between(0.3, 0.45) * (0.6 if texture == "speckled" else 1.0)
    sin, cos = rotation(draws.between(-0.5, 0.5))
    return Surface(
        colour, _jitter(draws, SURFACE_COLOURS[colour]), texture, CELL_M[texture], contrast, sin, cos
    )


def _jitter(draws: Draws, rgb: Rgb) -> Rgb:
    """The named colour, a little off."""
    gain = draws.between(0.92, 1.05)
    red, green, blue = (min(1.0, c * gain + draws.between(-0.025, 0.025)) for c in rgb)
    return max(0.03, red), max(0.03, green), max(0.03, blue)


def _draw_light(draws: Draws) -> Light:
    """A sun behind the camera's plane, or a lamp above the scene; higher than any object either way."""
    ambient = draws.between(0.48, 0.62)
    if draws.unit() < 0.5:
        sin, cos = rotation(draws.between(-0.9, 0.9))
        x, y, z = sin, draws.between(0.8, 2.2), -cos
        length = math.sqrt(x * x + y * y + z * z)
        return Light(x / length, y / length, z / length, 0.0, ambient)
    return Light(draws.between(-3.0, 3.0), draws.between(3.4, 5.5), draws.between(-2.0, 3.0), 1.0, ambient)


def _draw_items(draws: Draws, camera: Camera, walls: tuple[Wall, ...]) -> tuple[Item, ...]:
    """Two to six objects that stand free of each other, of the walls and of the camera, with their middle in view."""
    wanted = 2 + draws.below(5)
    items: list[Item] = []
    for attempt in range(150):
        item = _draw_item(draws, camera, walls, shrink=attempt >= 60)
        if item is not None and all(_apart(item, other) for other in items):
            items.append(item)
        if len(items) == wanted or (attempt >= 60 and len(items) >= 2):
            break
    return tuple(items)


def _draw_item(draws: Draws, camera: Camera, walls: tuple[Wall, ...], shrink: bool) -> Item | None:
    """One candidate, or None where it doesn't fit; always the same number of draws."""
    kind, size = KINDS[draws.below(3)], SIZES[draws.below(3)]
    colour = list(OBJECT_COLOURS)[draws.below(len(OBJECT_COLOURS))]
    rgb = _jitter(draws, OBJECT_COLOURS[colour])
    size = "small" if shrink else size
    half = HALF_EXTENT_M[size]
    a, b, c = draws.unit(), draws.unit(), draws.unit()
    sin, cos = rotation(draws.between(-1.0, 1.0))
    slope = draws.between(-0.9, 0.9) * camera.tan_half_fov
    z = 0.9 + (_ahead(walls, slope) - 0.9) * draws.unit()
    x = slope * z
    if kind == "sphere":
        item = Item(kind, size, colour, rgb, x, z, half, half, 2.0 * half)
    elif kind == "box":
        sides = half * (0.8 + 0.2 * a), half * (0.8 + 0.2 * b)
        item = Item(kind, size, colour, rgb, x, z, *sides, half * (1.5 + 0.8 * c), sin, cos)
    else:
        radius = half * (0.65 + 0.2 * a)
        item = Item(kind, size, colour, rgb, x, z, radius, radius, half * (1.8 + 0.6 * c))
    return item if _fits(item, camera, walls) else None


def _fits(item: Item, camera: Camera, walls: tuple[Wall, ...]) -> bool:
    u, v, depth = camera.project(item.x, item.height / 2.0, item.z)
    window = 2.0 * depth * camera.tan_half_fov
    share = 2.0 * item.reach * item.height / (window * window)  # of the image, about
    if not 0.008 < share < 0.22:
        return False
    if abs(u) > 0.92 * camera.tan_half_fov or abs(v) > 0.9 * camera.tan_half_fov:
        return False
    reach = item.reach + 0.05
    if any(w.nx * item.x + w.nz * item.z + w.distance < reach for w in walls):
        return False
    return min(camera.project(*corner)[2] for corner in item.corners()) > 0.6


def _apart(item: Item, other: Item) -> bool:
    dx, dz = item.x - other.x, item.z - other.z
    gap = item.reach + other.reach + 0.05
    return dx * dx + dz * dz > gap * gap
