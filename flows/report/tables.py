"""The report's numbers as a table of the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill.flows.report.links import BASELINE, LABEL, MODEL, ROUND_TRIP
from fourmill.flows.report.measures import FIGURES

LINKS = {
    LABEL: "label to truth",
    ROUND_TRIP: "round trip to label",
    MODEL: "model to {}",
    BASELINE: "baseline to {}",
}


def figure_text(name: str, value: float | None) -> str:
    return "–" if value is None else FIGURES[name].text(value)


def numbers_table(numbers: Mapping[str, Any]) -> Group:
    """One row per modality and figure; what the model has to reach is below."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("modality")
    table.add_column("figure")
    shown = links_of(numbers)
    reference = "truth" if numbers["has_truth"] else "label"
    for link in shown:
        table.add_column(LINKS[link].format(reference), justify="right")
    for name, entry in numbers["modalities"].items():
        for number, (figure, values) in enumerate(entry["figures"].items()):
            title = f"{FIGURES[figure].title} {'↓' if FIGURES[figure].better == 'lower' else '↑'}"
            cells = (figure_text(figure, values.get(link)) for link in shown)
            table.add_row("" if number else name, title, *cells)
    held = f"{numbers['samples_measured']} held-out samples"
    parts: list[Any] = [Text(f"{numbers['dataset']}: {held}", style="bold"), table]
    for target in numbers["targets"]:
        text = f"{target['modality']}: {target['says']}: {target['value']:.3f} (limit {target['limit']:.3f}) "
        passed = target["passed"]
        verdict = Text("reached" if passed else "missed", style="green" if passed else "yellow")
        parts.append(Text(text).append(verdict))
    parts += [Text(f"{name}: {note}", style="yellow") for name, note in numbers["notes"].items()]
    return Group(*parts)


def links_of(numbers: Mapping[str, Any]) -> list[str]:
    """The links for which any modality has a number."""
    there = {
        link
        for entry in numbers["modalities"].values()
        for values in entry["figures"].values()
        for link, value in values.items()
        if value is not None
    }
    return [link for link in LINKS if link in there]
