"""The ray caster: which surface each ray hits, its normal, shadows and colour. NumPy only.

Version 1 of the scenes stays bit-identical for ever, so everything per ray is made of correctly rounded IEEE
operations (+ - * / sqrt, comparisons, floor) in float64: no sin, exp or pow on arrays, no BLAS, no float reductions.
Objects and their shadows are cast only inside the screen rectangle that bounds them.

A ray is camera + t * (dx, dy, dz) in the world frame of `scene_layout`, scaled such that t is the z-depth in metres.
"""

import math
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from fourmill.shards.sources.scene_layout import (
    HAZE_HALF_M,
    HAZE_RGB,
    Camera,
    Item,
    Layout,
    Light,
    Surface,
)

Array: TypeAlias = np.ndarray
Index: TypeAlias = tuple[slice, slice] | np.ndarray
Rect: TypeAlias = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, edge coordinates

FLOOR, FIRST_WALL, FIRST_ITEM = 0, 1, 16  # surface ids: 1..3 walls, 16 + 4 * k + face for object k


@dataclass(slots=True)
class Rays:
    """A bundle of rays: a grid of pixel centres (dx by column, dy and dz by row) or a list."""

    dx: Array
    dy: Array
    dz: Array
    px: Array  # pixel coordinates, edge convention
    py: Array
    shape: tuple[int, ...]

    def inside(self, rect: Rect) -> Index | None:
        """An index of the rays within a screen rectangle; None when there are none."""
        x0, y0, x1, y1 = rect
        if len(self.shape) == 1:
            chosen = np.flatnonzero((self.px >= x0) & (self.px <= x1) & (self.py >= y0) & (self.py <= y1))
            return chosen if chosen.size else None
        rows, columns = self.shape
        top, bottom = max(0, math.floor(y0)), min(rows, math.ceil(y1))
        left, right = max(0, math.floor(x0)), min(columns, math.ceil(x1))
        return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None

    def directions(self, index: Index) -> tuple[Array, Array, Array]:
        if isinstance(index, tuple):
            rows, columns = index
            return self.dx[:, columns], self.dy[rows], self.dz[rows]
        return self.dx[index], self.dy[index], self.dz[index]


@dataclass(slots=True)
class Hits:
    """What the rays of a bundle hit; all arrays have the bundle's shape."""

    depth: Array  # float64, metres along the optical axis
    surface: Array  # uint8, surface ids
    nx: Array  # float32, unit normal in the world frame
    ny: Array
    nz: Array
    lit: Array = field(default_factory=lambda: np.empty(0, bool))


def grid_rays(camera: Camera, size: int) -> Rays:
    """One ray through each pixel centre of a square image."""
    centres = np.arange(size, dtype=np.float64) + 0.5
    return _rays(camera, size, centres[None, :], centres[:, None], (size, size))


def list_rays(camera: Camera, size: int, px: Array, py: Array) -> Rays:
    """Rays through given points of the screen."""
    return _rays(camera, size, px, py, px.shape)


def _rays(camera: Camera, size: int, px: Array, py: Array, shape: tuple[int, ...]) -> Rays:
    focal = size / 2.0 / camera.tan_half_fov
    right, up = (px - size / 2.0) / focal, (size / 2.0 - py) / focal
    dy = up * camera.cos_pitch - camera.sin_pitch
    dz = up * camera.sin_pitch + camera.cos_pitch
    return Rays(right, dy, dz, px, py, shape)


def cast(layout: Layout, rays: Rays, size: int) -> Hits:
    """The nearest surface along each ray, and whether the light reaches it."""
    hits = _cast_room(layout, rays)
    for k, item in enumerate(layout.items):
        index = rays.inside(screen_rect(layout.camera, item.corners(), size))
        if index is not None:
            _cast_item(item, FIRST_ITEM + 4 * k, layout.camera, rays, index, hits)
    hits.lit = np.ones(rays.shape, bool)
    for k, item in enumerate(layout.items):
        hull = item.corners() + _footprint_of_shadow(item, layout.light)
        index = rays.inside(screen_rect(layout.camera, hull, size))
        if index is not None:
            _shadow(item, FIRST_ITEM + 4 * k, layout, rays, index, hits)
    return hits


def screen_rect(camera: Camera, points: list[tuple[float, float, float]], size: int) -> Rect:
    """Bounds of the points' convex hull on the screen; everything if the hull reaches behind the camera."""
    seen = [camera.project(*point) for point in points]
    if min(depth for _, _, depth in seen) < 0.05:
        return 0.0, 0.0, float(size), float(size)
    scale = size / 2.0 / camera.tan_half_fov
    us, vs = [u for u, _, _ in seen], [v for _, v, _ in seen]
    half = size / 2.0
    slack = 1e-6 * size
    return (
        half + scale * min(us) - slack,
        half - scale * max(vs) - slack,
        half + scale * max(us) + slack,
        half - scale * min(vs) + slack,
    )


def _footprint_of_shadow(item: Item, light: Light) -> list[tuple[float, float, float]]:
    """The top corners carried down to the floor along the light: with the object they span its shadow volume."""
    points = []
    for x, y, z in item.corners():
        if y > 0.0:
            lx, ly, lz = (
                light.x - light.positional * x,
                light.y - light.positional * y,
                light.z - light.positional * z,
            )
            points.append((x - lx * y / ly, 0.0, z - lz * y / ly))
    return points


def _cast_room(layout: Layout, rays: Rays) -> Hits:
    depth = np.full(rays.shape, np.inf)
    surface = np.zeros(rays.shape, np.uint8)
    with np.errstate(divide="ignore"):
        for k, wall in enumerate(layout.walls):
            speed = rays.dx * wall.nx + rays.dz * wall.nz
            reach = np.where(speed < 0.0, -wall.distance / speed, np.inf)
            np.copyto(surface, FIRST_WALL + k, where=reach < depth)
            np.minimum(depth, reach, out=depth)
        floor = np.where(rays.dy < 0.0, -layout.camera.height / rays.dy, np.inf)
    np.copyto(surface, FLOOR, where=floor <= depth)
    np.minimum(depth, floor, out=depth)
    normals = np.zeros((3, 4), np.float32)
    normals[1, FLOOR] = 1.0
    for k, wall in enumerate(layout.walls):
        normals[0, FIRST_WALL + k], normals[2, FIRST_WALL + k] = wall.nx, wall.nz
    return Hits(depth, surface, *(np.take(row, surface) for row in normals))


def _cast_item(item: Item, surface_id: int, camera: Camera, rays: Rays, index: Index, hits: Hits) -> None:
    """Replaces the hits at `index` where the object is nearer."""
    directions = rays.directions(index)
    with np.errstate(divide="ignore", invalid="ignore"):
        if item.kind == "sphere":
            t, nx, ny, nz, face = _sphere(item, camera, *directions)
        elif item.kind == "box":
            t, nx, ny, nz, face = _box(item, camera, *directions)
        else:
            t, nx, ny, nz, face = _cylinder(item, camera, *directions)
        closer = t < hits.depth[index]
    _put(hits.depth, index, closer, t)
    _put(hits.nx, index, closer, nx)
    _put(hits.ny, index, closer, ny)
    _put(hits.nz, index, closer, nz)
    _put(hits.surface, index, closer, face + np.uint8(surface_id))


def _put(target: Array, index: Index, where: Array, values: Array) -> None:
    if isinstance(index, tuple):
        np.copyto(target[index], values, where=where, casting="unsafe")
    else:
        target[index[where]] = values[where]


_Found: TypeAlias = tuple[
    np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray
]  # t (inf = missed), normal, face number


def _sphere(item: Item, camera: Camera, dx: Array, dy: Array, dz: Array) -> _Found:
    radius = item.half_x
    rise = camera.height - radius
    a = dx * dx + (dy * dy + dz * dz)
    b = dy * rise - (dx * item.x + dz * item.z)
    c = item.x * item.x + rise * rise + item.z * item.z - radius * radius
    inner = b * b - a * c
    root = np.sqrt(np.maximum(inner, 0.0))
    t = np.where(inner > 0.0, (-b - root) / a, np.inf)
    nx, ny, nz = (t * dx - item.x) / radius, (t * dy + rise) / radius, (t * dz - item.z) / radius
    return t, nx, ny, nz, np.zeros(t.shape, np.uint8)


def _slabs(
    item: Item, ox: Array | float, oy: Array | float, oz: Array | float, ray: tuple[Array, ...]
) -> _Found:
    """Entry and exit of a box: (entry, entry x, entry y, entry z, exit), the object's own frame, origin on the floor."""
    dx, dy, dz = ray
    sx, sy, sz = (np.where(d == 0.0, 1e-30, d) for d in (dx, dy, dz))
    ax, bx = (-item.half_x - ox) / sx, (item.half_x - ox) / sx
    ay, by = (0.0 - oy) / sy, (item.height - oy) / sy
    az, bz = (-item.half_z - oz) / sz, (item.half_z - oz) / sz
    ex, ey, ez = np.minimum(ax, bx), np.minimum(ay, by), np.minimum(az, bz)
    leave = np.minimum(np.minimum(np.maximum(ax, bx), np.maximum(ay, by)), np.maximum(az, bz))
    return np.maximum(np.maximum(ex, ey), ez), ex, ey, ez, leave


def _box(item: Item, camera: Camera, dx: Array, dy: Array, dz: Array) -> _Found:
    ox, oz = -item.x * item.cos + item.z * item.sin, -item.x * item.sin - item.z * item.cos
    rx, rz = dx * item.cos - dz * item.sin, dx * item.sin + dz * item.cos
    enter, ex, ey, _, leave = _slabs(item, ox, camera.height, oz, (rx, dy, rz))
    t = np.where((enter < leave) & (enter > 0.0), enter, np.inf)
    by_x, by_y = ex == enter, ey == enter
    by_z = ~(by_x | by_y)
    side_x = np.where(rx < 0.0, 1.0, -1.0) * (by_x & ~by_y)
    side_z = np.where(rz < 0.0, 1.0, -1.0) * by_z
    nx = side_x * item.cos + side_z * item.sin
    nz = side_z * item.cos - side_x * item.sin
    ny = np.where(dy < 0.0, 1.0, -1.0) * by_y
    return t, nx, ny, nz, by_y * np.uint8(1) + by_z * np.uint8(2)


def _cylinder(item: Item, camera: Camera, dx: Array, dy: Array, dz: Array) -> _Found:
    radius, top = item.half_x, item.height - camera.height
    a = dx * dx + dz * dz
    b = dx * item.x + dz * item.z
    inner = b * b - a * (item.x * item.x + item.z * item.z - radius * radius)
    side = (b - np.sqrt(np.maximum(inner, 0.0))) / a
    level = side * dy
    on_side = (inner > 0.0) & (level <= top) & (level >= -camera.height)
    lid = top / dy
    lx, lz = lid * dx - item.x, lid * dz - item.z
    on_lid = (dy < 0.0) & (lid > 0.0) & (lx * lx + lz * lz <= radius * radius)
    t = np.where(on_side, side, np.where(on_lid, lid, np.inf))
    nx = np.where(on_side, (side * dx - item.x) / radius, 0.0)
    nz = np.where(on_side, (side * dz - item.z) / radius, 0.0)
    return t, nx, np.where(on_side, 0.0, 1.0), nz, np.where(on_side, np.uint8(0), np.uint8(1))


def _shadow(item: Item, surface_id: int, layout: Layout, rays: Rays, index: Index, hits: Hits) -> None:
    """Clears `lit` at `index` where the object is between a surface and the light. A convex object's own dark side
    is left to the shading, which knows it from the normal."""
    dx, dy, dz = rays.directions(index)
    t, surface, light = hits.depth[index], hits.surface[index], layout.light
    x, y, z = t * dx, t * dy + layout.camera.height, t * dz
    lx, ly, lz = (
        light.x - light.positional * x,
        light.y - light.positional * y,
        light.z - light.positional * z,
    )
    other = (surface & 0xFC) != surface_id
    with np.errstate(divide="ignore", invalid="ignore"):
        if item.kind == "sphere":
            fx, fy, fz = x - item.x, y - item.half_x, z - item.z
            b = fx * lx + fy * ly + fz * lz
            c = fx * fx + fy * fy + fz * fz - item.half_x * item.half_x
            blocked = (b < 0.0) & (b * b > (lx * lx + ly * ly + lz * lz) * c)
        elif item.kind == "box":
            fx, fz = x - item.x, z - item.z
            ray = (lx * item.cos - lz * item.sin, ly + 0.0 * x, lx * item.sin + lz * item.cos)
            origin = fx * item.cos - fz * item.sin, fx * item.sin + fz * item.cos
            enter, _, _, _, leave = _slabs(item, origin[0], y, origin[1], ray)
            blocked = (enter < leave) & (leave > 1e-9)
        else:
            fx, fz = x - item.x, z - item.z
            a = lx * lx + lz * lz
            b = fx * lx + fz * lz
            inner = b * b - a * (fx * fx + fz * fz - item.half_x * item.half_x)
            root = np.sqrt(np.maximum(inner, 0.0))
            enter = np.maximum((-b - root) / a, -y / ly)
            leave = np.minimum((root - b) / a, (item.height - y) / ly)
            blocked = (inner > 0.0) & (leave > 1e-9) & (enter < leave)
    lit = hits.lit[index] & ~(blocked & other)
    hits.lit[index] = lit


def shade(layout: Layout, rays: Rays, hits: Hits, size: int) -> Array:
    """Colours of the hits, float32 of shape (3, *rays.shape), nominally 0 to 1."""
    light = layout.light
    depth = hits.depth.astype(np.float32)
    x, z = depth * rays.dx.astype(np.float32), depth * rays.dz.astype(np.float32)
    y = depth * rays.dy.astype(np.float32) + np.float32(layout.camera.height)
    if light.positional:
        lx, ly, lz = np.float32(light.x) - x, np.float32(light.y) - y, np.float32(light.z) - z
        towards = (hits.nx * lx + hits.ny * ly + hits.nz * lz) / np.sqrt(lx * lx + ly * ly + lz * lz)
    else:
        towards = (
            hits.nx * np.float32(light.x) + hits.ny * np.float32(light.y) + hits.nz * np.float32(light.z)
        )
    gain = hits.ny * np.float32(0.12 * light.ambient) + np.float32(0.88 * light.ambient)
    gain += np.maximum(towards, np.float32(0.0)) * hits.lit * np.float32(1.12 - light.ambient)
    paints = [layout.floor, *(layout.paints[wall.paint] for wall in layout.walls)]
    flat_surface, flat_gain = hits.surface.ravel(), gain.ravel()
    for surface_id, paint in enumerate(paints):
        chosen = np.flatnonzero(flat_surface == surface_id)
        px, pz, near = x.ravel()[chosen], z.ravel()[chosen], depth.ravel()[chosen]
        scale = np.float32(1.0 / paint.cell_m)
        if surface_id == FLOOR:
            sin, cos = np.float32(paint.sin), np.float32(paint.cos)
            along, across = (px * cos - pz * sin) * scale, (px * sin + pz * cos) * scale
            height = layout.camera.height
        else:
            wall = layout.walls[surface_id - FIRST_WALL]
            along = (px * np.float32(-wall.nz) + pz * np.float32(wall.nx)) * scale
            across, height = y.ravel()[chosen] * scale, wall.distance
        # the pixel's width in cells, stretched where the surface is seen at a grazing angle
        spread = near * np.float32(layout.camera.tan_half_fov * 2.0 / size / paint.cell_m)
        spread *= np.sqrt(np.maximum(near * np.float32(1.0 / height), np.float32(1.0)))
        flat_gain[chosen] *= np.float32(1.0) - np.float32(paint.contrast) * _pattern(
            paint, along, across, spread
        )
    table = np.zeros((3, 256), np.float32)
    for surface_id, paint in enumerate(paints):
        table[:, surface_id] = paint.rgb
    for k, item in enumerate(layout.items):
        table[:, FIRST_ITEM + 4 * k : FIRST_ITEM + 4 * k + 4] = np.array(item.rgb)[:, None]
    # haze: 1 / (1 + depth / half) of the colour is left, which IEEE arithmetic gives bit for bit, unlike exp
    left = np.float32(HAZE_HALF_M) / (depth + np.float32(HAZE_HALF_M))
    veil, gain = np.float32(1.0) - left, gain * left
    return np.stack(
        [
            np.take(row, hits.surface) * gain + veil * np.float32(haze)
            for row, haze in zip(table, HAZE_RGB, strict=True)
        ]
    )


def _pattern(paint: Surface, along: Array, across: Array, spread: Array) -> Array:
    """How dark the paint is, 0 to 1 float32, averaged over a pixel `spread` cells wide: it fades before it aliases."""
    half = np.float32(0.5)
    if paint.texture == "speckled":
        cells = np.floor(along).astype(np.int32).view(np.uint32) * np.uint32(0x27D4EB2F)
        cells += np.floor(across).astype(np.int32).view(np.uint32) * np.uint32(0x165667B1)
        cells = (cells ^ (cells >> np.uint32(15))) * np.uint32(0x85EBCA6B)  # modulo 2**32
        cells = (cells ^ (cells >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        noise = (cells >> np.uint32(24)).astype(np.float32) * np.float32(1.0 / 255.0)
        return half + (noise - half) / (np.float32(1.0) + np.float32(0.25) * spread * spread)
    wave = _square_wave(along, spread)
    if paint.texture == "checkered":
        wave = wave * _square_wave(across, spread)
    return half - half * wave


def _square_wave(x: Array, width: Array) -> Array:
    """A square wave of period 2 between -1 and 1, box-filtered over `width`; float32."""
    half = np.float32(0.5)
    middle, reach = x * half, width * np.float32(0.25)
    low, high = middle - reach, middle + reach
    low, high = np.abs(low - np.floor(low) - half), np.abs(high - np.floor(high) - half)
    return np.float32(2.0) * (low - high) / width
