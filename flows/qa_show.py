"""What `fourmill qa` prints."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill.flows.qa import ABSENT, ColumnQuality, Odd, Quality

SHOWN = 40  # odd shards; the rest is counted


def quality_report(found: Quality) -> Group:
    parts: list[Any] = [Text(found.url, style="bold"), _figures(found)]
    for name, column in found.columns.items():
        parts += [Text(line, style="yellow") for line in _remarks(name, column)]
    if not found.odd:
        parts.append(Text("no shard is odd", style="green"))
        return Group(*parts)
    shards = {(odd.column, odd.shard) for odd in found.odd}
    parts.append(Text(f"{len(shards)} column shards are odd, the most first", style="yellow"))
    parts.append(_odd_table(sorted(found.odd, key=lambda odd: -odd.size)[:SHOWN]))
    if len(found.odd) > SHOWN:
        parts.append(Text(f"and {len(found.odd) - SHOWN} more; --json has them all"))
    return Group(*parts)


def _figures(found: Quality) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("modality", "shards", "images"):
        table.add_column(heading, justify="left" if heading == "modality" else "right")
    table.add_column("figures: mean, and how much images differ")
    for name, column in found.columns.items():
        figures = ", ".join(
            f"{figure} {mean:.3g} ± {deviation:.2g}"
            for figure, (mean, deviation) in column.figures.items()
            if figure != ABSENT or mean
        )
        table.add_row(name, str(column.shards), str(column.images), figures)
    return table


def _remarks(name: str, column: ColumnQuality) -> list[str]:
    lines = [
        f"{name}: {figure} was beyond its limit in {count} shards"
        for figure, count in column.warnings.items()
    ]
    if column.measured < column.shards:
        lines.append(f"{name}: {column.shards - column.measured} shards were made before figures were kept")
    for key, values in column.environments.items():
        lines.append(f"{name}: made with different {key}: {', '.join(values)}")
    return lines


def _odd_table(odd: list[Odd]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("modality", "shard", "figure", "is", "usual", "far off", "against", "made with"):
        numbers = heading in ("shard", "is", "usual", "far off")
        table.add_column(heading, justify="right" if numbers else "left")
    for one in odd:
        far = f"{100 * one.size:.0f}% moved" if one.figure == "distribution" else f"{one.size:.1f} sd"
        usual = "" if one.figure == "distribution" else f"{one.usual:.3g}"
        value = "" if one.figure == "distribution" else f"{one.value:.3g}"
        table.add_row(one.column, str(one.shard), one.figure, value, usual, far, one.against, one.note)
    return table
