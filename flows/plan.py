"""What is left to do: a function of the configuration, the source's listing and the receipts.

Which source rows make a shard is decided once, when its samples file is committed. Until then a shard
is the next `shard_size` rows that no committed shard holds, so an interrupted run plans the same again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fourmill.errors import ConfigError, SourceError
from fourmill.flows.resolve import Resolved, recipe_diff
from fourmill.labels import DUPLICATE, is_fault
from fourmill.seeds import generator
from fourmill.shards.dataset import SAMPLES, ColumnListing, Dataset
from fourmill.shards.receipts import Receipt, Recipe
from fourmill.shards.sources.base import Row


@dataclass(frozen=True, slots=True)
class Job:
    """One shard's work: decode it once, make these columns. Pickles; holds no more than it must.

    ``rows`` and ``duplicates`` are given while the shard's samples are not committed yet.
    ``labels`` are modalities whose labels are to be kept, ``tokens`` those to be tokenized. Of these, ``retry`` names the
    ones that are finished but for null cells: they alone are made again (those of one ``reason``, if it is given), and
    committed under the epoch after that of the shard's receipt.
    """

    shard: int
    rows: tuple[Row, ...] | None
    duplicates: frozenset[int]  # positions in `rows` whose key was seen before
    labels: tuple[str, ...]
    tokens: tuple[str, ...]
    retry: tuple[str, ...] = ()
    reason: str | None = None
    careful: frozenset[int] = frozenset()  # starts of micro-batches whose images are decoded apart
    shrink: int = 0  # how often the batch shape was halved


@dataclass(frozen=True, slots=True)
class ColumnState:
    """Where one modality stands, by shard number."""

    finished: frozenset[int]
    stale: frozenset[int]  # committed under another recipe only
    parked: frozenset[int]
    stale_recipes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """``shards``: rows per shard number, for all shards of the source (or of the pilot)."""

    shards: dict[int, int]
    committed: frozenset[int]  # shards with a samples receipt
    states: dict[str, ColumnState]
    jobs: list[Job]
    listing: tuple[str, int]  # the source's digest, and how many rows it lists in all
    vanished: int = 0  # committed rows that the source no longer lists
    listings: Mapping[str, ColumnListing] = field(
        default_factory=dict
    )  # of all wanted columns, once there are any


def column_state(
    dataset: Dataset | None,
    name: str,
    recipe: Recipe | None,
    shards: Sequence[int],
    listing: ColumnListing | None = None,
    parked: Collection[int] | None = None,
) -> ColumnState:
    """Compare one column's receipts with the wanted recipe. ``parked``: shards that were parked at some time."""
    if dataset is None:
        return ColumnState(frozenset(), frozenset(), frozenset())
    listing = listing or dataset.listing(name)
    kind = recipe.kind if recipe else "token"
    short = recipe.short if recipe else None
    finished = listing.finished(short)
    stale: set[int] = set()
    others = []
    for other, receipts in listing.folders.items():
        left = receipts.keys() - finished
        if left and other != short and dataset.recipe(name, other)["kind"] == kind:
            others.append(other)
            stale |= left
    if parked is None:
        parked = dataset.parked(name, short) if short else ()
    only = set(shards)
    return ColumnState(
        frozenset(finished & only),
        frozenset(stale & only),
        frozenset(only.intersection(parked) - finished),
        tuple(others),
    )


def column_states(
    dataset: Dataset | None, recipes: Mapping[str, Recipe | None], shards: Sequence[int]
) -> tuple[dict[str, ColumnState], dict[str, ColumnListing]]:
    """Of several columns: what is finished, stale and parked, and the listings that said so, one of each column."""
    if dataset is None:
        return {name: column_state(None, name, recipe, shards) for name, recipe in recipes.items()}, {}
    listings = dataset.listings(recipes)
    parked = dataset.all_parked()
    states = {
        name: column_state(
            dataset,
            name,
            recipe,
            shards,
            listings[name],
            parked.get((name, recipe.short if recipe else ""), ()),
        )
        for name, recipe in recipes.items()
    }
    return states, listings


def why_stale(dataset: Dataset, name: str, recipe: Recipe, state: ColumnState) -> list[str]:
    """Which lines of the recipe are other ones than of the stale receipts, as ``label.weights: sha256:ab.. -> sha256:cd..``.

    Several recipes' differences follow each other, each line once.
    """
    wanted = {"kind": recipe.kind, **recipe.content}
    found = [
        line for other in state.stale_recipes for line in recipe_diff(dataset.recipe(name, other), wanted)
    ]
    return list(dict.fromkeys(found))


def make_plan(
    resolved: Resolved,
    dataset: Dataset | None,
    *,
    limit: int | None = None,
    shard_range: tuple[int, int] | None = None,
    redo_stale: bool = False,
    only_labels: Sequence[str] = (),
    only_tokens: Sequence[str] | None = None,
    only_shards: frozenset[int] | None = None,
    retry_rejects: bool | str = False,
) -> Plan:
    """The jobs that are left. Touches nothing.

    ``limit`` rounds up to whole shards, so that the full build reuses a pilot. ``only_labels`` asks for kept labels
    of these modalities; ``only_tokens`` restricts the tokenized modalities (None: all that have a tokenizer).
    ``retry_rejects`` asks for the null cells of finished shards too, all of them (True) or those of one reason.
    """
    digest = resolved.source.digest()
    new, committed, vanished = _allot(resolved, dataset, digest)
    rows_of = {**committed, **{shard: len(rows) for shard, (rows, _) in new.items()}}
    chosen = _choose(rows_of, resolved.config.shard_size, limit, shard_range)
    if only_shards is not None:
        chosen &= only_shards
    recipes = resolved.token_recipes()
    tokens = [n for n in resolved.wanted if n in recipes and (only_tokens is None or n in only_tokens)]
    states, listings = column_states(dataset, {n: recipes.get(n) for n in resolved.wanted}, sorted(chosen))
    keep = {n: w.label_recipe for n, w in resolved.wanted.items() if n in only_labels or w.keep_labels}
    kept = {n: listings[n].finished(r.short) if listings else set() for n, r in keep.items()}
    again = _rejects(resolved, dataset, states, listings, tokens, retry_rejects)
    reason = retry_rejects if isinstance(retry_rejects, str) else None
    jobs = []
    for shard in sorted(chosen):
        retry = tuple(n for n in tokens if shard in again.get(n, ()))
        todo = tuple(
            n
            for n in tokens
            if n in retry
            or (shard not in states[n].finished and (redo_stale or shard not in states[n].stale))
        )
        labels = tuple(n for n in resolved.wanted if n in keep and shard not in kept[n])
        if todo or labels or shard not in committed:
            rows, duplicates = new.get(shard, (None, frozenset()))
            jobs.append(Job(shard, rows, duplicates, labels, todo, retry, reason if retry else None))
    shards = {shard: rows_of[shard] for shard in sorted(chosen)}
    listing = digest, sum(rows_of.values()) - vanished
    return Plan(shards, frozenset(set(committed) & chosen), states, jobs, listing, vanished, listings)


def _rejects(
    resolved: Resolved,
    dataset: Dataset | None,
    states: dict[str, ColumnState],
    listings: dict[str, ColumnListing],
    tokens: Sequence[str],
    wanted: bool | str,
) -> dict[str, set[int]]:
    """By modality, the finished shards with null cells that neither their samples nor the source explain."""
    short = dataset.samples_recipe() if dataset is not None and wanted is not False else None
    if dataset is None or short is None:
        return {}
    samples = dataset.receipts(SAMPLES, short)
    recipes = resolved.token_recipes()
    return {
        name: {
            shard
            for shard, receipt in dataset.receipts(name, recipes[name].short, listings[name]).items()
            if shard in states[name].finished & samples.keys() and retryable(receipt, samples[shard], wanted)
        }
        for name in tokens
    }


def retryable(receipt: Receipt, samples: Receipt, wanted: bool | str = True) -> int:
    """How many of a column's null cells another attempt may fill: not those of rows that have no image."""
    return sum(
        count - samples.absent.get(reason, 0)
        for reason, count in receipt.absent.items()
        if is_fault(reason) and wanted in (True, reason)
    )


def _choose(
    rows_of: dict[int, int], shard_size: int, limit: int | None, shard_range: tuple[int, int] | None
) -> frozenset[int]:
    if limit is not None:
        return frozenset(shard for shard in rows_of if shard < -(-limit // shard_size))
    if shard_range is not None:
        chosen = frozenset(shard for shard in rows_of if shard_range[0] <= shard < shard_range[1])
        if not chosen:
            raise ConfigError(
                f"--shards {shard_range[0]}:{shard_range[1]}: the source makes shards 0 to {len(rows_of) - 1}"
            )
        return chosen
    return frozenset(rows_of)


Allotment = dict[int, tuple[tuple[Row, ...], frozenset[int]]]


def _allot(resolved: Resolved, dataset: Dataset | None, digest: str) -> tuple[Allotment, dict[int, int], int]:
    """Rows of shards that are not committed yet; rows per committed shard; how many committed rows vanished."""
    receipts = {}
    if dataset is not None and (short := dataset.samples_recipe()) is not None:
        if short != resolved.samples_recipe.short:
            raise ConfigError(
                f"{dataset.url}: its samples were made by another version of fourmill; use another `dataset:`"
            )
        receipts = dataset.receipts(SAMPLES, short)
    committed = {shard: receipt.rows for shard, receipt in receipts.items()}
    if receipts:
        seen = {(r.source["digest"], r.source["rows_total"]) for r in receipts.values()}
        if seen == {(digest, sum(committed.values()))}:
            return {}, committed, 0  # nothing new: no row is listed, no samples file read
    fresh, vanished = _fresh_rows(
        resolved.source.rows(), [_frozen_rows(dataset, r) for r in receipts.values()]
    )
    if not fresh and not receipts:
        raise SourceError(f"source {resolved.source.identity()} lists no image")
    size = resolved.config.shard_size
    new: Allotment = {}
    number = 0
    for start in range(0, len(fresh), size):
        while number in committed:
            number += 1
        part = fresh[start : start + size]
        new[number] = (
            tuple(row for row, _ in part),
            frozenset(i for i, (_, twice) in enumerate(part) if twice),
        )
        number += 1
    return new, committed, vanished


#: a committed row: (key, position, whether it was a second row with its key)
Frozen = tuple[str, str, bool]


def _frozen_rows(dataset: Dataset | None, receipt: Receipt) -> list[Frozen]:
    assert dataset is not None
    table = dataset.table(receipt.file).select(["key", "position", "status"])
    keys, positions, states = (column.to_pylist() for column in table.columns)
    return [(k, p, s == DUPLICATE) for k, p, s in zip(keys, positions, states, strict=True)]


def _fresh_rows(
    listed: Iterable[Row], committed: Iterable[Sequence[Frozen]]
) -> tuple[list[tuple[Row, bool]], int]:
    """Listed rows that no shard holds, each with whether its key is another row's; how many committed rows vanished.

    A row is known by key and position, and by its key alone where its file has changed since: of two rows with one
    key, the second may have been committed before the first.
    """
    exact: Counter[tuple[str, str]] = Counter()
    taken: set[str] = set()
    for rows in committed:
        exact.update((key, position) for key, position, _ in rows)
        taken.update(key for key, _, twice in rows if not twice)
    unmatched: list[Row] = []
    for row in listed:
        if exact[row.key, row.position] > 0:
            exact[row.key, row.position] -= 1
        else:
            unmatched.append(row)
    changed: Counter[str] = Counter()
    for (key, _), count in exact.items():
        changed[key] += count
    fresh: list[tuple[Row, bool]] = []
    for row in unmatched:
        if changed[row.key] > 0:
            changed[row.key] -= 1
        else:
            fresh.append((row, row.key in taken))
            taken.add(row.key)
    return fresh, sum(changed.values())


def fit_shards(resolved: Resolved, shards: dict[int, int]) -> frozenset[int]:
    """The seeded fit set: whole shards, drawn until they hold ``fit.samples`` rows."""
    chosen: list[int] = []
    for shard in generator(resolved.config.seed, "fit set").permutation(sorted(shards)):
        if sum(shards[s] for s in chosen) >= resolved.config.fit.samples:
            break
        chosen.append(int(shard))
    return frozenset(chosen)
