"""What a build would do, and why, without doing any of it: `fourmill plan`.

It compares configuration, source and receipts as `build` does, shard by shard, and only reads.
`fourmill.flows.estimating` says what it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fourmill.errors import ConfigError
from fourmill.flows.build import BuildOptions, plan_of
from fourmill.flows.fitting import needs_labels
from fourmill.flows.plan import Job, Plan, fit_shards, why_stale
from fourmill.flows.resolve import Resolved
from fourmill.shards.dataset import SAMPLES, ColumnListing, Dataset
from fourmill.shards.receipts import Recipe


@dataclass
class Work:
    """One modality, in shards and rows. The first four say where it stands, the others what a build would do."""

    finished: int = 0
    pending: int = 0
    stale: int = 0
    parked: int = 0
    label: int = 0  # shards in which its network labels every image, for itself or for another modality
    label_rows: int = 0  # images that pass through it, in every group that runs it
    from_kept: int = 0  # of the tokenized: shards whose labels are there already
    tokenize: int = 0
    tokenize_rows: int = 0
    redo: int = 0  # of the tokenized: stale ones
    keep: int = 0  # shards whose labels are kept
    keep_rows: int = 0
    retry: int = 0  # finished shards of which null cells are tried again
    fit: bool = False  # its tokenizer is fitted first
    why_stale: list[str] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)  # of parked shards


@dataclass
class Forecast:
    """``decodes``: how many shards are read and decoded, by the number of modalities that share it."""

    url: str
    exists: bool
    samples: int
    shards: int
    committed: int  # shards whose samples are
    vanished: int
    new_rows: int  # rows of shards that are not committed
    fit_shards: int
    decodes: dict[int, int]
    decoded_rows: int
    modalities: dict[str, Work]
    errors: dict[int, str]  # of shards whose samples are parked
    listings: Mapping[str, ColumnListing] = field(default_factory=dict, repr=False)  # no part of `to_json`

    @property
    def nothing_to_do(self) -> bool:
        return not self.decodes

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(replace(self, listings={})).items() if key != "listings"}


def open_dataset(resolved: Resolved) -> Dataset | None:
    """The dataset if there is one. ConfigError, as of `build`, where it was built with another identity."""
    try:
        dataset = Dataset(resolved.config.dataset)
    except ConfigError:
        return None
    dataset.check_identity(resolved.identity)
    return dataset


def forecast(resolved: Resolved, dataset: Dataset | None, options: BuildOptions) -> Forecast:
    """What `build` with these options would do. Raises what `build` would refuse."""
    plan = plan_of(resolved, dataset, options)
    works = {name: _standing(resolved, dataset, plan, name) for name in resolved.wanted}
    kept = _kept(resolved, plan)
    fit, jobs = _jobs(resolved, plan, options, kept)
    decodes: Counter[int] = Counter()
    for job in jobs:
        shared = _count(resolved, plan, job, kept, works)
        decodes[shared] += 1
    errors = {}
    if dataset is not None:
        found = dataset.parked(SAMPLES, resolved.samples_recipe.short)
        errors = {
            s: dataset.parked_error(SAMPLES, resolved.samples_recipe.short, f) for s, f in found.items()
        }
    return Forecast(
        url=resolved.config.dataset,
        exists=dataset is not None,
        samples=sum(plan.shards.values()),
        shards=len(plan.shards),
        committed=len(plan.committed),
        vanished=plan.vanished,
        new_rows=sum(rows for shard, rows in plan.shards.items() if shard not in plan.committed),
        fit_shards=fit,
        decodes=dict(sorted(decodes.items())),
        decoded_rows=sum(plan.shards[job.shard] for job in jobs),
        modalities=works,
        errors={shard: error for shard, error in errors.items() if shard in plan.shards},
        listings=plan.listings,
    )


def _standing(resolved: Resolved, dataset: Dataset | None, plan: Plan, name: str) -> Work:
    state, wanted = plan.states[name], resolved.wanted[name]
    recipe = wanted.token_recipe()
    finished, stale, parked = len(state.finished), len(state.stale), len(state.parked - state.stale)
    work = Work(finished, len(plan.shards) - finished - stale - parked, stale, parked, fit=recipe is None)
    if dataset is None:
        return work
    if state.stale:
        # of a tokenizer that is yet to be fitted, everything else can be compared
        to_be = {"label": wanted.label_recipe.content, "tokenizer": "to be fitted", "crops": wanted.crop_rule}
        work.why_stale = why_stale(dataset, name, recipe or Recipe("token", to_be), state)
    if recipe is not None and state.parked:
        found = dataset.parked(name, recipe.short)
        work.errors = {
            s: dataset.parked_error(name, recipe.short, found[s]) for s in sorted(state.parked) if s in found
        }
    return work


def _kept(resolved: Resolved, plan: Plan) -> dict[str, set[int]]:
    """By modality, the shards whose labels are there."""
    listings = plan.listings
    return {
        name: listings[name].finished(wanted.label_recipe.short) if listings else set()
        for name, wanted in resolved.wanted.items()
    }


def _jobs(
    resolved: Resolved, plan: Plan, options: BuildOptions, kept: dict[str, set[int]]
) -> tuple[int, list[Job]]:
    """Shards of the fit set, and the jobs of both stages; labels that the first one keeps are there in the second."""
    unfitted = resolved.unfitted()
    if not unfitted:
        return 0, plan.jobs
    chosen = fit_shards(resolved, plan.shards)
    labelled = [name for name in unfitted if needs_labels(resolved.wanted[name])]
    always = [name for name, wanted in resolved.wanted.items() if wanted.keep_labels]
    first = []
    for shard in sorted(chosen):
        names = tuple(n for n in resolved.wanted if n in {*labelled, *always} and shard not in kept[n])
        if names or shard not in plan.committed:
            first.append(Job(shard, None, frozenset(), names, ()))
    asked = {job.shard: job for job in plan.jobs}
    second = []
    for shard in plan.shards:
        before = asked.get(shard)
        late = {n for n in unfitted if options.redo_stale or shard not in plan.states[n].stale}
        tokens = tuple(n for n in resolved.wanted if n in late or (before is not None and n in before.tokens))
        labels = tuple(n for n in (before.labels if before else ()) if shard not in chosen)
        if tokens or labels or (before is not None and shard not in chosen):
            retry = before.retry if before else ()
            second.append(Job(shard, None, frozenset(), labels, tokens, retry))
    return len(chosen), [*first, *second]


def _count(
    resolved: Resolved, plan: Plan, job: Job, kept: dict[str, set[int]], works: Mapping[str, Work]
) -> int:
    """Add a job to the modalities' work; returns how many share its decoding."""
    shard, rows = job.shard, plan.shards[job.shard]
    given = {n for n in resolved.closure(list(job.tokens)) if shard in kept[n] and n not in job.retry}
    whole = [n for n in dict.fromkeys([*job.labels, *job.tokens]) if n not in job.retry]
    labelled: set[str] = set()
    for group in resolved.groups():  # each hosts what its modalities need, so a network may run in two
        needed = {name for name in whole if name in group}
        for name in reversed(resolved.wanted):
            if name in needed and name not in given:
                needed.update(resolved.wanted[name].upstream)
        run = {name for name in needed - given if resolved.wanted[name].labeler is not None}
        for name in run:
            works[name].label_rows += rows
        labelled |= run
    for name in labelled:
        works[name].label += 1
    for name in job.tokens:
        work = works[name]
        if name in job.retry:
            work.retry += 1
            continue
        work.tokenize += 1
        work.tokenize_rows += rows
        work.from_kept += name in given
        work.redo += shard in plan.states[name].stale
    for name in job.labels:
        works[name].keep += 1
        works[name].keep_rows += rows
        kept[name].add(shard)
    return len({*job.labels, *job.tokens})
