"""What an image costs, by modality: from receipts, from given rates, or from what is known of its tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fourmill.errors import ConfigError, nearest
from fourmill.flows.resolve import Resolved, Wanted
from fourmill.shards.dataset import SAMPLES, ColumnListing, Dataset
from fourmill.shards.receipts import Receipt

LOOKED_AT = 24  # receipts of a column, from all over it: enough for a median
MAX_IDLE = 0.95
TOKEN_BYTES = 2  # uint16


@dataclass(frozen=True)
class Cost:
    """Of one image with all its crops: seconds of a specialist, bytes on storage. None: not known."""

    forward: float | None = None
    tokenize: float | None = None
    label_bytes: float | None = None
    token_bytes: float | None = None
    source: str = ""  # where the seconds come from


@dataclass(frozen=True)
class Costs:
    """``decode``: seconds to read and decode an image; ``idle``: share of the time in which even the busiest
    group's specialists waited for input."""

    modalities: dict[str, Cost] = field(default_factory=dict)
    sample_bytes: float | None = None
    decode: float | None = None
    idle: float = 0.0


def measured(
    resolved: Resolved,
    dataset: Dataset,
    source: str,
    *,
    listings: Mapping[str, ColumnListing] | None = None,
    steady: bool = True,
) -> Costs:
    """Costs as a dataset's receipts tell them.

    ``listings``: of the wanted columns, where they were made already. ``steady``: they are of a run so long that what its specialists waited says something.
    """
    costs: dict[str, Cost] = {}
    receipts: dict[str, list[Receipt]] = {}
    for name, listing in (listings or dataset.listings(resolved.wanted)).items():
        costs[name], receipts[name] = _column(dataset, resolved.wanted[name], listing, source)
    short = dataset.samples_recipe()
    samples = _some(dataset, SAMPLES, short, dataset.listing(SAMPLES)) if short else []
    shares = [_idle([r for name in group for r in receipts[name]]) for group in resolved.groups()]
    return Costs(
        costs,
        _bytes(samples),
        _median((r.timings.get("read", 0.0) + r.timings.get("decode", 0.0)) / r.rows for r in samples),
        min([share for share in shares if share is not None], default=0.0) if steady else 0.0,
    )


def with_rates(costs: Costs, resolved: Resolved, rates: Mapping[str, float]) -> Costs:
    """Replace seconds by given rates (images/s of one specialist), and add the size of a fixed number of tokens."""
    for name in rates:
        if name not in resolved.wanted:
            raise ConfigError(f"--rate {name}: not in the configuration{nearest(name, resolved.wanted)}")
    merged = {}
    for name, wanted in resolved.wanted.items():
        cost = costs.modalities.get(name, Cost())
        if name in rates:
            cost = replace(cost, forward=1 / rates[name], tokenize=0.0, source="given rate")
        if cost.token_bytes is None and wanted.modality.kind in ("grid", "vector") and wanted.tokenizer:
            count = wanted.modality.num_tokens * resolved.config.n_crops
            cost = replace(cost, token_bytes=float(TOKEN_BYTES * count))
        merged[name] = cost
    return replace(costs, modalities=merged)


def _column(
    dataset: Dataset, wanted: Wanted, listing: ColumnListing, source: str
) -> tuple[Cost, list[Receipt]]:
    """From receipts under the wanted recipe, or, where there are none, under another one."""
    recipe, label = wanted.token_recipe(), wanted.label_recipe.short
    shorts = [recipe.short] if recipe is not None and listing.finished(recipe.short) else []
    if not shorts:
        others = sorted(listing.folders, key=lambda short: -len(listing.folders[short]))
        shorts = [
            s for s in others if listing.folders[s] and dataset.recipe(wanted.name, s)["kind"] == "token"
        ]
        source = f"{source} under another recipe" if shorts else source
    tokens = _some(dataset, wanted.name, shorts[0], listing) if shorts else []
    labels = _some(dataset, wanted.name, label, listing)
    kept = listing.finished(label)  # tokens of these shards cost no forward pass
    passes = [r for r in tokens if r.shard not in kept] or labels
    cost = Cost(
        forward=_per_image(passes, "forward"),
        tokenize=_per_image(tokens, "tokenize"),
        label_bytes=_bytes(labels),
        token_bytes=_bytes(tokens),
        source=source if passes or tokens else "",
    )
    return cost, tokens or labels


def _some(dataset: Dataset, column: str, short: str, listing: ColumnListing) -> list[Receipt]:
    """Receipts from all over the column, no more than it takes."""
    files = [file for _, file in sorted(listing.folders.get(short, {}).items())]
    files = files[:: max(1, -(-len(files) // LOOKED_AT))]

    def one(file: str) -> Receipt:
        name = f"receipts/{column}/{short}/{file}"
        return Receipt.from_json(dataset.store.read(name), f"{dataset.url}/{name}")

    return [receipt for receipt in dataset.store.map(one, files) if receipt.rows]


def _per_image(receipts: Sequence[Receipt], phase: str) -> float | None:
    return _median(r.timings[phase] / r.rows for r in receipts if phase in r.timings)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _bytes(receipts: Sequence[Receipt]) -> float | None:
    rows = sum(r.rows for r in receipts)
    return sum(r.bytes for r in receipts) / rows if rows else None


def _idle(receipts: Iterable[Receipt]) -> float | None:
    spent = [(r.timings.get("busy", 0.0), r.timings.get("starved", 0.0)) for r in receipts]
    busy, starved = sum(b for b, _ in spent), sum(s for _, s in spent)
    return min(MAX_IDLE, starved / (busy + starved)) if busy + starved else None
