"""Setting damaged files aside, so that the next build makes them again."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from fourmill.shards.dataset import Dataset
from fourmill.shards.verify import Problem

#: in the dataset; nothing reads it, and `gc` leaves it alone
ASIDE = "damaged"


def set_aside(dataset: Dataset, problems: Iterable[Problem]) -> tuple[str, list[str]]:
    """Move what the problems name, receipts first; the folder that holds it now, and the names that were moved.

    Receipts go first: a data file without a receipt is nothing, a receipt without its file is a promise that is not kept.
    """
    folder = f"{ASIDE}/{datetime.now(UTC).strftime('%Y%m%dT%H%M%S')}"
    names = sorted(
        {n for problem in problems for n in problem.aside}, key=lambda n: (not n.startswith("receipts/"), n)
    )
    moved = [name for name in names if dataset.store.move(name, f"{folder}/{name}")]
    return folder, moved
