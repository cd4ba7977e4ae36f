"""Captions of scenes: colours, sizes, kinds, relations, floor and walls, from a varied set of templates."""

from collections.abc import Sequence

from fourmill.shards.sources.scene_layout import Draws, Item, Layout, Surface

_KIND_WORDS = {"sphere": ("sphere", "ball"), "box": ("box", "block"), "cylinder": ("cylinder", "pillar")}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_TEMPLATES = (
    "{first} {more}on {floor} in front of {wall}",
    "{first} {more}in {place} with {floor} and {wall}",
    "{wall} behind {first} {more}on {floor}",
    "{floor} with {first} {more}, and {wall} at the back",
    "{count} on {floor}: {first} {more}, {wall}",
    "{place} with {wall}: {first} {more}on {floor}",
    "on {floor} in front of {wall}, {first} {more}",
    "a picture of {first} {more}. the scene has {floor} and {wall}",
)
_PLACES = {"open": "an open space", "corner": "a corner", "room": "a room"}


def describe(layout: Layout, seen: Sequence[int], seed: int, index: int) -> str:
    """The caption of the objects `seen` (indices into layout.items). The choices of words don't depend on them."""
    draws = Draws(seed, index, "caption")
    template = _TEMPLATES[draws.below(len(_TEMPLATES))]
    nearest_first = draws.unit() < 0.5
    choices = [draws.unit() for _ in range(3 * len(layout.items))]
    u_and_depth = [layout.camera.project(i.x, i.height / 2.0, i.z) for i in layout.items]
    order = sorted(seen, key=lambda k: u_and_depth[k][2] if nearest_first else u_and_depth[k][0])
    phrases = []
    for place, k in enumerate(order):
        name = _name(layout.items[k], choices[3 * k])
        if place == 0:
            phrases.append(name)
            continue
        before = order[place - 1]
        relation = _relation(layout, u_and_depth[before], u_and_depth[k], choices[3 * k + 1])
        # "A left of B" for the first pair; later ones hang on to the object just named
        phrases.append(f"{relation} {name}" if place == 1 else f"which is {relation} {name}")
    words = {
        "first": phrases[0] if phrases else "nothing",
        "more": "".join(f"{p} " for p in _joined(phrases[1:])),
        "floor": _surface(layout.floor, "floor"),
        "wall": _walls(layout),
        "place": _PLACES[layout.room],
        "count": f"{_NUMBERS[len(order)]} object{'' if len(order) == 1 else 's'}",
    }
    return " ".join(template.format(**words).replace(" ,", ",").replace(" .", ".").split())


def _joined(phrases: list[str]) -> list[str]:
    return [p if k == 0 else f", {p}" for k, p in enumerate(phrases)]


def _name(item: Item, choice: float) -> str:
    word = _KIND_WORDS[item.kind][int(choice * 4.0) // 3]  # the plain word three times out of four
    size = "" if item.size == "medium" and choice * 4.0 % 1.0 < 0.5 else f"{item.size} "
    words = f"{size}{item.colour} {word}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _relation(
    layout: Layout, a: tuple[float, float, float], b: tuple[float, float, float], choice: float
) -> str:
    """Where the object at (u, v, depth) `a` is, seen from `b`."""
    aside = (a[0] - b[0]) / layout.camera.tan_half_fov  # -2 to 2
    deeper = (a[2] - b[2]) / max(a[2], b[2])
    sideways = abs(aside) > 0.15 and (abs(deeper) < 0.15 or choice < 0.5)
    if sideways:
        side = "left" if aside < 0.0 else "right"
        return f"{side} of" if choice < 0.25 else f"to the {side} of"
    if abs(deeper) > 0.1:
        return "behind" if deeper > 0.0 else "in front of"
    return "next to"


def _surface(paint: Surface, noun: str) -> str:
    return f"a {paint.texture} {paint.colour} {noun}"


def _walls(layout: Layout) -> str:
    used = [layout.paints[k] for k in sorted({wall.paint for wall in layout.walls})]
    if len(used) == 1 or used[0] == used[1]:
        return _surface(used[0], "wall" if len(layout.walls) == 1 else "walls").removeprefix(
            "a " if len(layout.walls) > 1 else ""
        )
    return f"{_surface(used[0], 'wall')} and {_surface(used[1], 'wall')}"
