"""How things are shown on a terminal: tables of plain text, and a label in a few words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from fourmill.flows.report.measures import family_of, first_text
from fourmill.labels import Absent, Boxes, Label
from fourmill.modality import Modality


def plain(text: str, keep: str = "") -> str:
    """The text with what a terminal would act on written out (escape sequences, newlines but those in ``keep``)."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def title(text: str) -> Text:
    return Text(text, style="bold")


def new_table(*headings: str) -> Table:
    """Columns by name; one that ends in > is aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(
            heading.removesuffix(">"), justify="right" if heading.endswith(">") else "left", overflow="fold"
        )
    return table


def cells(*values: Any) -> list[Text]:
    return [Text(plain(str(value))) for value in values]


def fact_table(facts: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        text = (
            json.dumps(value, ensure_ascii=False, default=str)
            if isinstance(value, (dict, list, tuple))
            else str(value)
        )
        table.add_row(Text(plain(str(name))), Text(plain(text)))
    return table


def short_text(modality: Modality, label: Label) -> str:
    """A label in a few words: what is in it, not what it looks like."""
    if isinstance(label, Absent):
        return f"absent: {label.reason}"
    family = family_of(modality.contract)
    if family in ("text", "metadata", "palette", "poses", "instances"):
        return first_text(label)
    if family == "boxes":
        return _boxes_text(modality, label)
    if family == "scalar":
        return f"{float(label):.4g}"
    values = np.asarray(label)
    if family == "classes":
        return _classes_text(modality, values)
    if family in ("depth", "relative"):
        unit = " m" if family == "depth" else ""
        return f"{values.min():.2f} to {values.max():.2f}{unit}, median {np.median(values):.2f}{unit}"
    if family == "normal":
        mean = values.reshape(-1, 3).mean(0)
        return "mean direction ({:.2f}, {:.2f}, {:.2f})".format(*mean)
    shape = " x ".join(str(side) for side in values.shape)
    return f"{shape} {values.dtype}, mean {values.mean():.3g}, deviation {values.std():.3g}"


def _classes_text(modality: Modality, values: np.ndarray) -> str:
    names = modality.contract.classes
    counts = Counter(values.reshape(-1).tolist())
    shares = [
        (names[i] if i < len(names) else f"class {i}", n / values.size) for i, n in counts.most_common(5)
    ]
    more = f", {len(counts) - 5} more" if len(counts) > 5 else ""
    return ", ".join(f"{name} {share:.0%}" for name, share in shares) + more


def _boxes_text(modality: Modality, boxes: Boxes) -> str:
    names = modality.contract.classes
    counts = Counter(names[i] if i < len(names) else str(i) for i in boxes.class_ids.tolist())
    if not counts:
        return "no object"
    return ", ".join(f"{count} {name}" for name, count in counts.most_common(6))


def token_text(cell: Any) -> str:
    """``12 403 7 ... (64)``, or the number of bytes of a picture."""
    if isinstance(cell, bytes):
        return f"{len(cell)} bytes"
    values = [f"{value:g}" for value in cell[:6].tolist()]
    return " ".join(values) + (f" … ({len(cell)})" if len(cell) > 6 else "")
