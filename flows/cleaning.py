"""`fourmill gc`: what can go from a dataset, as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill.errors import ConfigError
from fourmill.flows.status import human_bytes
from fourmill.shards.dataset import Dataset
from fourmill.shards.garbage import Garbage, find_garbage, remove_garbage

_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
LEAST_S = 3600.0  # what is younger may belong to a build that is running


def clean(url: str, delete: bool, older_than: str) -> Group:
    """Find the garbage of a dataset, remove it if asked, and say what it was."""
    age = _seconds(older_than)
    dataset = Dataset(url)
    found = find_garbage(dataset, age)
    gone = list(remove_garbage(dataset, found)) if delete else found
    parts: list[Table | Text] = [Text(url, style="bold")]
    if not found:
        return Group(*parts, Text(f"nothing here that is older than {older_than} and that nobody names"))
    parts.append(_table(gone))
    parts.append(Text("removed" if delete else "nothing was touched; --delete removes it"))
    if len(gone) < len(found):
        parts.append(Text(f"{len(found) - len(gone)} files stay: they were named or written again meanwhile"))
    return Group(*parts)


def _table(found: Iterable[Garbage]) -> Table:
    sums: dict[str, tuple[int, int]] = {}
    for garbage in found:
        files, size = sums.get(garbage.what, (0, 0))
        sums[garbage.what] = files + 1, size + garbage.entry.size
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("what", "files", "size"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what, (files, size) in sorted(sums.items()):
        table.add_row(what, str(files), human_bytes(size))
    total = [sum(column) for column in zip(*sums.values(), strict=True)] or [0, 0]
    table.add_row("in all", str(total[0]), human_bytes(total[1]), style="bold")
    return table


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)([mhdw])", text)
    if match is None:
        raise ConfigError(f"--older-than {text}: write a number and m, h, d or w, for example 7d")
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds < LEAST_S:
        raise ConfigError(f"--older-than {text}: a running build may still need it; at least 1h")
    return seconds
