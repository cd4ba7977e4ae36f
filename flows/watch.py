"""Progress, one line per modality: from receipts and the newest run's file alone, so that every terminal shows the same.

A finished receipt never changes under its name, so each is read once; a look at a dataset costs one listing per modality.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from heapq import nlargest
from typing import Any, NamedTuple

from fourmill.flows.status import latest_run, recipe_of
from fourmill.labels import is_fault
from fourmill.shards.dataset import Dataset
from fourmill.shards.receipts import Receipt, newest

WINDOW_S = 300.0  # the pace is that of the last few minutes, or, where these saw fewer receipts,
FEW = 8  # of so many
MANY = 32  # new receipts: they are read through the cache of receipts


@dataclass(frozen=True, slots=True)
class Line:
    """One modality, in shards, rows and seconds. None: nothing is known yet.

    ``rate``: images/s in the last minutes of the newest run; ``wait``: the share of their time in which its
    specialists waited for input, in [0, 1]; ``left``: at that rate; ``seconds``: of forward passes and tokenizing,
    for all receipts there are.
    """

    name: str
    finished: int
    total: int
    parked: int
    rejects: int
    rate: float | None
    wait: float | None
    left: float | None
    seconds: float
    per_thousand: float | None


@dataclass(frozen=True)
class Picture:
    """``last``: when the newest receipt was committed, ``now``: when this was seen (s since 1970)."""

    url: str
    lines: list[Line]
    complete: bool
    unit: str  # of ``seconds``: GPU-s, or CPU-s where no other device was used
    last: float
    now: float

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        return {key: content[key] for key in ("complete", "unit", "last", "now", "lines")}


class _Part(NamedTuple):
    """What counts of one receipt."""

    rows: int
    rejects: int
    worked: float
    busy: float
    starved: float
    taken: float  # by its runner
    committed: float
    gpu: bool


def _part(receipt: Receipt) -> _Part:
    spent = receipt.timings
    return _Part(
        rows=receipt.rows,
        rejects=sum(count for reason, count in receipt.absent.items() if is_fault(reason)),
        worked=spent.get("forward", 0.0) + spent.get("tokenize", 0.0),
        busy=spent.get("busy", 0.0),
        starved=spent.get("starved", 0.0),
        taken=sum(spent.get(phase, 0.0) for phase in ("read", "decode", "wait")),
        committed=spent.get("committed", 0.0),
        gpu=receipt.environment.get("device", "cpu") != "cpu",
    )


class _Column:
    """The receipts of one modality under one recipe, as far as they were read."""

    def __init__(self, title: str, name: str, short: str | None, shards: Mapping[int, int]) -> None:
        """``short``: None while the tokenizer is yet to be fitted; ``shards``: rows of those that are asked for."""
        self.title, self.name, self.short, self.shards = title, name, short, shards
        self.parts: dict[int, _Part] = {}
        self._files: dict[int, str] = {}

    def names(self, dataset: Dataset) -> list[str]:
        """What is there now: one listing."""
        return dataset.store.names(f"receipts/{self.name}/{self.short}") if self.short else []

    def read(self, dataset: Dataset, names: Iterable[str]) -> None:
        if self.short is None:
            return
        folder = f"receipts/{self.name}/{self.short}"
        there = {shard: file for shard, file in newest(names).items() if shard in self.shards}
        new = {shard: file for shard, file in there.items() if self._files.get(shard) != file}
        if len(new) >= MANY:
            found = Dataset(dataset.url).receipts(self.name, self.short)
            receipts = {shard: found[shard] for shard in new if shard in found}
        else:

            def one(file: str) -> Receipt:
                path = f"{folder}/{file}"
                return Receipt.from_json(dataset.store.read(path), f"{dataset.url}/{path}")

            receipts = dict(zip(new, dataset.store.map(one, new.values()), strict=True))
        self.parts.update({shard: _part(receipt) for shard, receipt in receipts.items()})
        for shard in self.parts.keys() - there.keys():
            del self.parts[shard]
        self._files = {shard: there[shard] for shard in self.parts}

    def line(self, started: float, now: float, parked: set[int]) -> Line:
        parts = list(self.parts.values())
        finished, total = len(parts), len(self.shards)
        if finished == total and parts:
            now = max(part.committed for part in parts)
        recent, seconds = _pace(parts, started, now)
        rate = sum(part.rows for part in recent) / max(seconds, 1e-3) if recent else None
        rows, worked = sum(part.rows for part in parts), sum(part.worked for part in parts)
        left = sum(self.shards.values()) - sum(self.shards[shard] for shard in self.parts)
        return Line(
            name=self.title,
            finished=finished,
            total=total,
            parked=len((parked & self.shards.keys()) - self.parts.keys()),
            rejects=sum(part.rejects for part in parts),
            rate=rate,
            wait=_wait_share(recent or parts),
            left=left / rate if rate else (None if left else 0.0),
            seconds=worked,
            per_thousand=1000 * worked / rows if rows else None,
        )


def _pace(parts: Iterable[_Part], started: float, now: float) -> tuple[list[_Part], float]:
    """The receipts of this run that say how fast it is at present, and in how many seconds they were committed."""
    of_run = [part for part in parts if part.committed >= started]
    begin = max(started, now - WINDOW_S)
    recent = [part for part in of_run if part.committed >= begin]
    if len(recent) < FEW:
        recent, begin = nlargest(FEW + 1, of_run, key=lambda part: part.committed), started
        if len(recent) > FEW:
            begin = recent.pop().committed
    # starting processes and loading networks is no pace
    work = min((part.committed - part.taken for part in of_run), default=begin)
    return recent, now - max(begin, work)


def _wait_share(parts: Iterable[_Part]) -> float | None:
    parts = list(parts)
    busy, starved = sum(part.busy for part in parts), sum(part.starved for part in parts)
    return starved / (busy + starved) if busy + starved > 0 else None


class Watch:
    """Looks at a dataset again and again, and reads only what is new."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._run = ""
        self._started = 0.0
        self._columns: list[_Column] = []

    def look(self) -> Picture:
        """Raises ConfigError where nothing was built yet, DatasetError where a receipt is damaged, OSError of the store."""
        self._find_run()
        listed = self._dataset.store.map(lambda column: column.names(self._dataset), self._columns)
        for column, names in zip(self._columns, listed, strict=True):
            column.read(self._dataset, names)
        parts = [part for column in self._columns for part in column.parts.values()]
        last = max((part.committed for part in parts), default=0.0)
        now = max(time.time(), last)  # clocks of other machines may be ahead
        parked = self._dataset.all_parked()
        lines = [
            c.line(self._started, now, parked.get((c.name, c.short or ""), set())) for c in self._columns
        ]
        complete = bool(lines) and all(line.finished == line.total for line in lines)
        unit = "GPU-s" if any(part.gpu for part in parts) else "CPU-s"
        return Picture(self._dataset.url, lines, complete, unit, last, now)

    def _find_run(self) -> None:
        names = self._dataset.store.names("runs")
        if names and names[-1] == self._run:
            return
        run = latest_run(self._dataset)
        known = {(c.name, c.short): c for c in self._columns}
        columns = []
        for column in _columns(run):
            before = known.get((column.name, column.short))
            columns.append(before if before is not None and before.shards == column.shards else column)
        self._columns = columns
        self._run, self._started = names[-1], run_started(names[-1])


def _columns(run: Mapping[str, Any]) -> list[_Column]:
    """What a run asks for: labels to be kept (where it says so), and the tokens of its modalities."""
    shards = {int(shard): int(rows) for shard, rows in run["shards"].items()}
    columns = []
    for name, asked in run.get("labels", {}).items():
        only = shards if asked["shards"] is None else {shard: shards[shard] for shard in asked["shards"]}
        columns.append(_Column(f"{name} labels", name, asked["recipe"], only))
    tokens = run.get("tokens")
    for name, content in run["recipes"].items():
        if tokens is None or name in tokens:
            recipe = recipe_of(content)
            columns.append(_Column(name, name, recipe.short if recipe else None, shards))
    return columns


def run_started(name: str) -> float:
    """When a run began (s since 1970), from the name of its file."""
    when = datetime.strptime(name.partition("-")[0], "%Y%m%dT%H%M%S%f")
    return when.replace(tzinfo=UTC).timestamp()
