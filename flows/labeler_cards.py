"""The cards of labelers: `fourmill labelers`, and `fourmill labelers show NAME`.

What a labeler's labels are is read off the contract of its modality, the one that every batch is held against.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill import licenses
from fourmill.checkpoints import SHIPPED, shipped_folder
from fourmill.labelers.base import Labeler, labelers
from fourmill.labelers.card import Card, Weights
from fourmill.modality import LabelContract, Modality

NONE = "none"
_FLIPS = {"mirror": "mirrored", "mirror_negate_x": "mirrored, and x negated", "none": "nothing to do"}
_SHAPES = {
    "map": "(H, W{c}) of the image",
    "features": "(h, w{c}) on the grid of each crop",
    "image": "(H, W{c})",
    "vector": "(C,)",
    "scalar": "one number",
    "text": "a list of strings",
    "boxes": "xyxy (N, 4); class ids (N,) int64; scores (N,) float32 in [0, 1]; best first",
    "metadata": "numbers by name",
    "palette": "palettes of 1 to 7 colours, each (n, 3)",
    "poses": "boxes (N, 4), joints (N, 23, 3, 3) or their tokens (N, 8), orientations, shapes, cameras",
    "instances": "boxes (N, 4) and outlines, or tokens of masks (N, 16)",
}


def output(modality: Modality) -> dict[str, str]:
    """What a label is, in words, from its contract: shape, dtype, units, range, frame, and how it is cropped."""
    contract = modality.contract
    said = {
        "shape": _shape(contract),
        "dtype": contract.dtype,
        "units": contract.units,
        "range": _range(contract),
        "frame": contract.frame,
    }
    if contract.form == "map":
        said |= {"resized": contract.resample, "flipped": _FLIPS[contract.flip]}
    return {key: value for key, value in said.items() if value}


def _shape(contract: LabelContract) -> str:
    channels = "" if contract.channels is None else f", {contract.channels or 'C'}"
    known = "; C is known when the network is loaded" if contract.channels == 0 else ""
    return _SHAPES[contract.form].format(c=channels) + known


def _range(contract: LabelContract) -> str:
    if contract.unit_norm:
        return "vectors of length 1"
    low, high = contract.low, contract.high
    if low is None and high is None:
        return "any finite value" if contract.dtype.startswith("float") else ""
    if low is None or high is None:
        return f"at least {low:g}" if high is None else f"at most {high:g}"
    return f"{low:g} to {high:g}"


def card_json(name: str) -> dict[str, Any]:
    """Everything on a labeler's card. ConfigError for an unknown name."""
    cls = labelers.get(name)
    card, modality = cls.card, cls.modality
    weights = {key: asdict(one) if one else None for key, one in _roles(card)}
    return {
        "name": name,
        "modality": modality.name,
        "doc": modality.doc,
        "reference_name": modality.reference_name,
        "version": cls.version,
        "inputs": list(cls.inputs),
        "expects": card.expects if card else "",
        "output": output(modality),
        "options": dict(cls.options),
        "embedded": _embedded(cls),
        **weights,
        "others": [asdict(one) for one in card.others] if card else [],
        "note": card.note if card else "",
        "about": inspect.getdoc(cls) or "",
    }


def _roles(card: Card | None) -> Iterator[tuple[str, Weights | None]]:
    yield "default", card.default if card else None
    yield "paper", card.paper if card else None


def _embedded(cls: type[Labeler]) -> dict[str, str] | None:
    """The network that is taken where a configuration names none."""
    model = cls.default_model
    if model is None:
        return None
    named = None
    if model.startswith(SHIPPED):
        named = licenses.in_folder(shipped_folder(model.removeprefix(SHIPPED)))
    return {"model": model, "license": named or licenses.UNKNOWN}


def names() -> list[str]:
    return labelers.names()


def cards_table() -> Table:
    """One row per labeler: modality, inputs, the weights for photographs and their licence."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("labeler", "modality", "inputs", "weights for photographs", "licence"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("labeler", "modality"))
    for name, cls in labelers.items():
        weights = cls.card.default if cls.card else None
        cells = (name, cls.modality.name, ", ".join(cls.inputs), weights.model if weights else NONE)
        table.add_row(*map(Text, cells), _license(weights.license) if weights else Text(""))
    return table


def card_report(name: str) -> Group:
    """The card as a page of text."""
    content = card_json(name)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in _lines(content):
        grid.add_row(Text(key), value if isinstance(value, Text) else Text(value))
    return Group(Text(f"{name}: {content['doc']}", style="bold"), grid, Text(""), Text(content["about"]))


def _lines(content: dict[str, Any]) -> Iterator[tuple[str, str | Text]]:
    reference = f", {content['reference_name']} in 4M" if content["reference_name"] else ""
    yield "modality", f"{content['modality']}{reference}"
    yield "inputs", ", ".join(content["inputs"])
    if content["expects"]:
        yield "expects", content["expects"]
    for number, (key, value) in enumerate(content["output"].items()):
        yield "labels" if number == 0 else "", f"{key}: {value}"
    if content["options"]:
        yield "options", ", ".join(f"{key}: {value}" for key, value in content["options"].items())
    if content["embedded"]:
        yield (
            "embedded",
            Text.assemble(
                content["embedded"]["model"],
                " for rendered scenes, ",
                _license(content["embedded"]["license"]),
            ),
        )
    for title, key in (("for photographs", "default"), ("4M took", "paper")):
        if content[key]:
            yield title, _weights(content[key])
    for number, one in enumerate(content["others"], 1):
        yield f"other {number}", _weights(one)
    if content["note"]:
        yield "note", content["note"]


def _weights(one: dict[str, Any]) -> Text:
    loading = "loads through transformers" if one["loads"] else "has no loader here as it is"
    lines = [Text(one["model"], style="bold"), _license(one["license"], loading)]
    if one["revision"]:
        lines.append(Text(f"revision {one['revision']}"))
    elif one["loads"]:
        lines.append(Text("revision: pin the commit of your choice"))
    lines += [Text(one[key]) for key in ("note", "citation") if one[key]]
    return Text("\n").join(lines)


def _license(named: str, more: str = "") -> Text:
    kind = licenses.terms(named)
    style = {"permissive": "green", "non-commercial": "red"}.get(kind, "yellow")
    text = Text(f"licence {named}" if named == licenses.UNKNOWN else named, style=style)
    return text.append(f"; {more}", style="default") if more else text
