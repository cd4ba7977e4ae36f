"""The state of a dataset, derived from its receipts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill.errors import ConfigError
from fourmill.flows.plan import ColumnState, column_states, retryable, why_stale
from fourmill.labels import DUPLICATE, is_fault
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Receipt, Recipe

#: the safe one, where there is one written in C: a run of 12,000 shards is a long file
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class ModalityStatus:
    finished: int
    pending: int
    stale: int
    parked: int
    rows: int
    absent: int
    bytes: int


@dataclass(frozen=True)
class Status:
    """``rejected``: unique keys that have no image or fail in any modality."""

    samples: int
    shards: int
    complete: bool
    rejected: int
    modalities: dict[str, ModalityStatus]
    reasons: dict[str, dict[str, int]]  # column -> reason -> rows
    parked: dict[str, dict[int, str]]  # column -> shard -> error
    why_stale: dict[str, list[str]] = field(default_factory=dict)  # column -> what its recipe had instead
    warnings: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # column -> figure beyond its limit -> shards

    def to_json(self) -> dict[str, Any]:
        fields = ModalityStatus.__dataclass_fields__
        return {
            "samples": self.samples,
            "shards": self.shards,
            "complete": self.complete,
            "rejected": self.rejected,
            "modalities": {n: {f: getattr(m, f) for f in fields} for n, m in self.modalities.items()},
        }


def latest_run(dataset: Dataset) -> dict[str, Any]:
    """What the newest run asked for: ``recipes`` (modality -> recipe), ``shards`` and ``samples`` in all."""
    names = dataset.store.names("runs")
    if not names:
        raise ConfigError(f"{dataset.url}: nothing was built here yet; run `fourmill build`")
    return dict(yaml.load(dataset.store.read(f"runs/{names[-1]}"), _Loader))


def status(dataset: Dataset, run: dict[str, Any] | None = None) -> Status:
    """Compare the receipts with what the run (by default the newest) asked for."""
    run = run or latest_run(dataset)
    shards = {int(k): int(v) for k, v in run["shards"].items()}
    short = dataset.samples_recipe()
    samples = dataset.receipts(SAMPLES, short) if short else {}
    samples = {shard: receipt for shard, receipt in samples.items() if shard in shards}
    recipes = {name: recipe_of(content) for name, content in run["recipes"].items()}
    states, listings = column_states(dataset, recipes, list(shards))
    modalities, reasons, parked, why, warnings = {}, {}, {}, {}, {}
    bad = {shard: ~receipt.presence_mask() for shard, receipt in samples.items() if receipt.absent}
    if samples:
        reasons[SAMPLES] = _sum(receipt.absent for receipt in samples.values())
    for name, recipe in recipes.items():
        state = states[name]
        receipts = {}
        if recipe and state.finished:
            receipts = dataset.receipts(name, recipe.short, listings[name])
            receipts = {shard: receipt for shard, receipt in receipts.items() if shard in state.finished}
        modalities[name] = _modality(state, receipts, len(shards))
        reasons[name] = _sum(receipt.absent for receipt in receipts.values())
        if warned := warnings_of(receipts.values()):
            warnings[name] = warned
        if recipe and state.parked:
            found = dataset.parked(name, recipe.short)
            parked[name] = {
                s: dataset.parked_error(name, recipe.short, found[s])
                for s in sorted(state.parked)
                if s in found
            }
        if recipe and state.stale:
            why[name] = why_stale(dataset, name, recipe, state)
        for shard, receipt in receipts.items():
            if shard in samples and retryable(receipt, samples[shard]):
                bad[shard] = bad.get(shard, False) | _failed_rows(dataset, receipt)
    complete = bool(shards) and len(samples) == len(shards)
    complete = complete and all(m.finished == len(shards) for m in modalities.values())
    rejected = sum(int(rows.sum()) - samples[shard].absent.get(DUPLICATE, 0) for shard, rows in bad.items())
    return Status(
        sum(shards.values()), len(shards), complete, rejected, modalities, reasons, parked, why, warnings
    )


def recipe_of(content: dict[str, Any] | None) -> Recipe | None:
    """From what a run remembers of it; None where its tokenizer was yet to be fitted."""
    return Recipe(content["kind"], {k: v for k, v in content.items() if k != "kind"}) if content else None


def _modality(state: ColumnState, receipts: dict[int, Receipt], shards: int) -> ModalityStatus:
    finished, stale, parked = len(state.finished), len(state.stale), len(state.parked - state.stale)
    return ModalityStatus(
        finished=finished,
        pending=shards - finished - stale - parked,
        stale=stale,
        parked=parked,
        rows=sum(r.rows for r in receipts.values()),
        absent=sum(r.rows - r.present for r in receipts.values()),
        bytes=sum(r.bytes for r in receipts.values()),
    )


def _failed_rows(dataset: Dataset, receipt: Receipt) -> np.ndarray:
    """bool (rows,): rows without a value, less those where that is no fault. The file is read only where both occur."""
    absent = ~receipt.presence_mask()
    if not all(is_fault(reason) for reason in receipt.absent):
        reasons = dataset.table(receipt.file).column("reason").to_pylist()
        absent &= np.array([reason is None or is_fault(reason) for reason in reasons], bool)
    return absent


def warnings_of(receipts: Iterable[Receipt]) -> dict[str, int]:
    """By figure, the shards in which it is beyond its limit."""
    return dict(Counter(warning.split(" is ")[0] for r in receipts for warning in r.warnings))


def _sum(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for reason, count in part.items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def status_report(report: Status, url: str) -> Group:
    """The table of a dataset's columns, why rows were set aside, and why shards were parked."""
    done = "[green]complete[/green]" if report.complete else "[yellow]work missing[/yellow]"
    head = Text.from_markup(f"{report.samples} samples in {report.shards} shards, {done}")
    parts: list[Any] = [Text(url, style="bold"), head, status_table(report)]
    for column, reasons in own_reasons(report).items():
        shown = ", ".join(f"{reason} ({rows})" for reason, rows in reasons.items())
        parts.append(Text(f"no image: {shown}" if column == SAMPLES else f"no {column}: {shown}"))
    if report.rejected:
        parts.append(
            Text(f"{report.rejected} samples set aside in all; the reasons stand in the files, row by row")
        )
    for column, figures in report.warnings.items():
        for figure, shards in figures.items():
            said = f"{column}: {figure} is beyond its limit in {shards} shards (fourmill qa {url})"
            parts.append(Text(said, style="yellow"))
    for column, changes in report.why_stale.items():
        parts.append(Text(f"stale {column}: {'; '.join(changes)}", style="yellow"))
    for column, errors in report.parked.items():
        for shard, error in errors.items():
            parts.append(Text(f"  parked: {column} shard {shard}: {error}", style="yellow"))
    return Group(*parts)


def own_reasons(report: Status) -> dict[str, dict[str, int]]:
    """Why rows have no value, by column; a row without an image counts under samples alone."""
    none = report.reasons.get(SAMPLES, {})
    found = {SAMPLES: none}
    for column, reasons in report.reasons.items():
        if column != SAMPLES:
            found[column] = {r: n - none.get(r, 0) for r, n in reasons.items() if n > none.get(r, 0)}
    return {column: reasons for column, reasons in found.items() if reasons}


def status_table(report: Status) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("modality", "finished", "pending", "stale", "parked", "rows", "absent", "size"):
        table.add_column(heading, justify="left" if heading == "modality" else "right")
    for name, m in report.modalities.items():
        cells = (m.finished, m.pending, m.stale, m.parked, m.rows, m.absent)
        table.add_row(name, *(str(cell) for cell in cells), human_bytes(m.bytes))
    return table


def human_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
