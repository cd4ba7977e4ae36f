"""`fourmill verify`: what is damaged, as a table, and set aside if asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill.flows.progress import progress
from fourmill.flows.status import human_bytes
from fourmill.shards.dataset import Dataset
from fourmill.shards.repair import set_aside
from fourmill.shards.verify import Verification, verify

MB = 1_000_000
SHOWN = 100


@dataclass(frozen=True)
class Verified:
    """``aside``: the folder in the dataset that holds what was ``moved``."""

    url: str
    found: Verification
    aside: str = ""
    moved: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "found": asdict(self.found)}


def verify_dataset(url: str, repair: bool) -> Verified:
    dataset = Dataset(url)
    with progress("Verify", "MB") as advance:
        found = verify(dataset, lambda done, total: advance(done // MB, total // MB, ""))
    if not (repair and found.problems):
        return Verified(url, found)
    return Verified(url, found, *set_aside(dataset, found.problems))


def verification_report(done: Verified) -> Group:
    found = done.found
    read = (
        f"{found.files} data files, {human_bytes(found.bytes)}, with their receipts, tokenizers and snapshots"
    )
    parts: list[Any] = [Text(done.url, style="bold"), Text(read)]
    if not found.problems:
        return Group(*parts, Text("all are what they were when they were committed", style="green"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("modality", "shard", "file", "what is wrong"):
        table.add_column(heading, justify="right" if heading == "shard" else "left", overflow="fold")
    for problem in found.problems[:SHOWN]:
        shard = "" if problem.shard is None else str(problem.shard)
        table.add_row(problem.column, shard, problem.file, problem.what)
    parts.append(table)
    if len(found.problems) > SHOWN:
        parts.append(Text(f"and {len(found.problems) - SHOWN} more; --json has them all"))
    for advice, count in Counter(p.advice for p in found.problems if p.advice).items():
        parts.append(Text(f"{count}: {advice}", style="yellow"))
    if done.aside:
        parts.append(
            Text(
                f"{len(done.moved)} files were moved to {done.url}/{done.aside}; build again to make them anew"
            )
        )
    elif any(problem.aside for problem in found.problems):
        parts.append(Text("--repair moves what is damaged aside, so that the next build makes it again"))
    return Group(*parts)
