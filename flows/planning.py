"""The command `fourmill plan`: what a build would do and redone, why, and what it takes. It touches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fourmill.config import Config
from fourmill.errors import ConfigError
from fourmill.flows.build import BuildOptions
from fourmill.flows.calibrating import calibrate
from fourmill.flows.costs import Cost, Costs, measured, with_rates
from fourmill.flows.estimating import SPEED, Estimate, estimate
from fourmill.flows.forecast import Forecast, forecast, open_dataset
from fourmill.flows.resolve import Resolved, resolve
from fourmill.flows.status import human_bytes
from fourmill.flows.watch_show import human_seconds
from fourmill.shards.dataset import SAMPLES

ERRORS_SHOWN = 5  # parked shards of a column


@dataclass(frozen=True)
class Planned:
    forecast: Forecast
    estimate: Estimate
    redo_stale: bool

    @property
    def end(self) -> datetime | None:
        """If it began now."""
        seconds = self.estimate.seconds
        return None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)

    def to_json(self) -> dict[str, Any]:
        found = {
            **self.estimate.to_json(),
            "end": self.end.isoformat(timespec="seconds") if self.end else None,
        }
        return {"plan": self.forecast.to_json(), "estimate": found}


def plan_build(
    config: Config,
    options: BuildOptions,
    *,
    rates: Mapping[str, float] | None = None,
    calibrated: bool = False,
    specialists: int | None = None,
) -> Planned:
    """``rates``: images/s of one specialist by modality; ``calibrated``: measure what neither they nor receipts tell."""
    return plan_resolved(
        resolve(config), options, rates=rates, calibrated=calibrated, specialists=specialists
    )


def plan_resolved(
    resolved: Resolved,
    options: BuildOptions,
    *,
    rates: Mapping[str, float] | None = None,
    calibrated: bool = False,
    specialists: int | None = None,
) -> Planned:
    dataset = open_dataset(resolved)
    found = forecast(resolved, dataset, options)
    costs = Costs()
    if dataset is not None:
        costs = measured(resolved, dataset, "receipts of this dataset", listings=found.listings)
    costs = with_rates(costs, resolved, rates or {})
    guess = estimate(resolved, found, costs, specialists)
    if calibrated and guess.unknown:
        names = [name for name in guess.unknown if name != SAMPLES] or list(resolved.wanted)[:1]
        costs = _filled(costs, calibrate(resolved, names))
        guess = estimate(resolved, found, costs, specialists)
    return Planned(found, guess, options.redo_stale)


def _filled(costs: Costs, others: Costs) -> Costs:
    """What is not known in one, from the other."""
    merged = dict(costs.modalities)
    for name, other in others.modalities.items():
        cost = merged.get(name, Cost())
        missing = {f: getattr(other, f) for f in Cost.__dataclass_fields__ if getattr(cost, f) in (None, "")}
        merged[name] = replace(cost, **missing)
    return replace(
        costs,
        modalities=merged,
        sample_bytes=others.sample_bytes if costs.sample_bytes is None else costs.sample_bytes,
        decode=others.decode if costs.decode is None else costs.decode,
    )


def parse_rates(texts: list[str] | None) -> dict[str, float]:
    """From ``depth=120``: images/s."""
    rates = {}
    for text in texts or []:
        name, _, value = text.partition("=")
        try:
            rates[name] = float(value)
        except ValueError:
            rates[name] = 0.0
        if not 0 < rates[name] < float("inf"):
            raise ConfigError(f"--rate {text}: write it as MODALITY=IMAGES_PER_S, for example depth=120")
    return rates


# -- showing ------------------------------------------------------------------------------------------


def plan_report(planned: Planned) -> Group:
    found, guess = planned.forecast, planned.estimate
    head = f"{found.samples} samples in {found.shards} shards, {found.committed} of them committed"
    parts: list[RenderableType] = [
        Text(found.url, style="bold"),
        Text(head if found.exists else f"{head}: not built yet"),
    ]
    parts.append(_work_table(found))
    parts += [Text(line, style=style) for line, style in _remarks(planned)]
    if not found.nothing_to_do:
        parts.append(_cost_table(found, guess))
        parts += [Text(line) for line in _estimate_lines(planned)]
    return Group(*parts)


def _work_table(found: Forecast) -> Table:
    """Shards: where each modality stands, and what would be done."""
    table = _new_table("modality", "done", "pending", "stale", "parked", "label", "from kept", "tokenize")
    for name, work in found.modalities.items():
        counts = (work.finished, work.pending, work.stale, work.parked)
        table.add_row(name, *(str(n) for n in (*counts, work.label, work.from_kept, work.tokenize)))
    return table


def _cost_table(found: Forecast, guess: Estimate) -> Table:
    table = _new_table("estimate", "images/s of one specialist", guess.unit, "size")
    for name in [*found.modalities, SAMPLES]:
        unknown, rate = guess.unknown.get(name, []), guess.per_specialist.get(name)
        speed = "?" if name in found.modalities else ""
        table.add_row(
            name,
            f"{rate:.1f}" if rate else speed,
            "?" if SPEED in unknown else f"{guess.hours[name]:.2f}" if name in guess.hours else "",
            "?" if any("size" in what for what in unknown) else human_bytes(guess.bytes[name]),
        )
    return table


def _new_table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _remarks(planned: Planned) -> list[tuple[str, str]]:
    """What is redone and why, what is parked, fitted and decoded: (line, style)."""
    found = planned.forecast
    lines: list[tuple[str, str]] = []
    if found.vanished:
        gone = f"{found.vanished} committed rows are no longer in the source; what is finished stays as it is"
        lines.append((gone, "yellow"))
    for name, work in found.modalities.items():
        if work.stale:
            fate = "made again" if planned.redo_stale else "left as they are; --redo-stale makes them again"
            lines.append(
                (f"stale {name} ({work.stale} shards, {fate}): {'; '.join(work.why_stale)}", "yellow")
            )
        if work.retry:
            lines.append(
                (f"{name}: null cells of {work.retry} shards are tried again (not in the estimate)", "")
            )
        if work.keep and not work.fit:
            lines.append((f"{name}: labels of {work.keep} shards are kept", ""))
    for name, errors in {SAMPLES: found.errors, **{n: w.errors for n, w in found.modalities.items()}}.items():
        for shard, error in list(errors.items())[:ERRORS_SHOWN]:
            lines.append((f"  parked, to be tried again: {name} shard {shard}: {error}", "yellow"))
        if len(errors) > ERRORS_SHOWN:
            lines.append((f"  parked: {len(errors) - ERRORS_SHOWN} more shards of {name}", "yellow"))
    fitted = [name for name, work in found.modalities.items() if work.fit]
    if fitted:
        where = (
            f"on {found.fit_shards} shards, whose labels are kept (the time of that is not in the estimate)"
        )
        lines.append((f"tokenizers to be fitted: {', '.join(fitted)}, {where}", ""))
    if found.nothing_to_do:
        return [*lines, ("nothing is to be done", "green")]
    shared = ", ".join(f"{shards} for {names}" for names, shards in found.decodes.items())
    count = sum(found.decodes.values())
    lines.append((f"to decode: {found.decoded_rows} images in {count} shards ({shared} modalities)", ""))
    return lines


def _estimate_lines(planned: Planned) -> list[str]:
    guess = planned.estimate
    lines = []
    slow = [name for name, parts in guess.unknown.items() if SPEED in parts]
    if guess.seconds is not None and planned.end is not None:
        without = f" (without {', '.join(slow)})" if slow else ""
        lines.append(
            f"estimate{without}: {guess.rate:.1f} images/s with {guess.specialists} specialists of each group, "
            f"{guess.total_hours:.2f} {guess.unit} in all, {human_bytes(guess.total_bytes)}, "
            f"{human_seconds(guess.seconds)}: would end {planned.end.astimezone():%Y-%m-%d %H:%M}"
        )
    by_source: dict[str, list[str]] = {}
    for name, source in guess.sources.items():
        by_source.setdefault(source, []).append(name)
    lines += [f"  speed from {source}: {', '.join(names)}" for source, names in by_source.items()]
    if guess.unknown:
        what = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in guess.unknown.items())
        rate = f"give the speed of one specialist (--rate {slow[0]}=IMAGES_PER_S), or " if slow else ""
        lines.append(f"not known: {what}")
        lines.append(f"  {rate}measure it on this machine with 200 images: --calibrate")
    return lines
