"""Training losses as the geometry of an SVG: paths, ticks and labels; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 44, 104, 14, 34
LABEL_GAP = 14  # pixels between the names at the lines' ends
MAX_POINTS = 240


@dataclass(frozen=True, slots=True)
class Line:
    """``path`` is the d of an SVG path; ``val`` the dots of the held-out loss; the name stands at ``label_y``."""

    name: str
    path: str
    val: tuple[tuple[float, float], ...]
    end_y: float
    label_y: float
    last: float
    last_val: float | None


@dataclass(frozen=True, slots=True)
class Chart:
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    steps: int
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def loss_chart(records: Sequence[dict[str, Any]]) -> Chart | None:
    """One line for each modality's mean cross-entropy in nats per token; None with fewer than two records."""
    names = sorted({name for record in records for name in record["losses"]})
    if len(records) < 2 or not names:
        return None
    every = max(1, math.ceil(len(records) / MAX_POINTS))
    thinned = [
        r for i, r in enumerate(records) if i % every == 0 or i == len(records) - 1 or "val_losses" in r
    ]
    values = [v for r in records for v in (*r["losses"].values(), *r.get("val_losses", {}).values())]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    first, last = float(records[0]["step"]), float(records[-1]["step"])
    ticks = round_ticks(0.0, max(finite), 5)
    top = max(ticks[-1], max(finite))

    def x(step: float) -> float:
        return round(LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for name in names:
        points = [
            (x(r["step"]), y(r["losses"][name]))
            for r in thinned
            if math.isfinite(r["losses"].get(name, math.nan))
        ]
        held = [
            (x(r["step"]), y(r["val_losses"][name]))
            for r in thinned
            if math.isfinite(r.get("val_losses", {}).get(name, math.nan))
        ]
        if not points:
            continue
        path = "M" + "L".join(f"{a:g},{b:g}" for a, b in points)
        lasts = [r["losses"][name] for r in records if name in r["losses"]]
        vals = [r["val_losses"][name] for r in records if name in r.get("val_losses", {})]
        lines.append((name, path, tuple(held), points[-1][1], lasts[-1], vals[-1] if vals else None))
    places = spread([line[3] for line in lines], LABEL_GAP, TOP, HEIGHT - BOTTOM)
    return Chart(
        lines=tuple(
            Line(name, path, held, end, place, final, val)
            for (name, path, held, end, final, val), place in zip(lines, places, strict=True)
        ),
        x_ticks=tuple((x(t), f"{t:g}") for t in round_ticks(first, last, 6) if first <= t <= last),
        y_ticks=tuple((y(t), f"{t:g}") for t in ticks),
        steps=int(last),
    )


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from at most ``low`` to at least nearly ``high``."""
    raw = max(high - low, 1e-9) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    start = math.floor(low / step) * step
    ticks = []
    while start <= high + 1e-9:
        ticks.append(round(start, 10))
        start += step
    return ticks


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved apart to at least ``gap``, order kept, inside [low, high] where there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    if moved and moved[-1] > high:
        moved[-1] = high
        for i in range(len(moved) - 2, -1, -1):
            moved[i] = min(moved[i], moved[i + 1] - gap)
    out = [0.0] * len(places)
    for i, place in zip(order, moved, strict=True):
        out[i] = round(max(place, low), 1)
    return out
