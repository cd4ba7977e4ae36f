"""Building a dataset: plan, label the fit set, fit tokenizers, label and tokenize the rest.

`build` is a plain function of a configuration; `fourmill.flows.flow_runs` makes it a Prefect flow, whose tasks are
its stages (never samples or shards). What is finished is decided by receipts alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fourmill import __version__
from fourmill.config import Config
from fourmill.errors import ConfigError, SourceError, WorkMissing
from fourmill.flows.engine import EngineReport, run_jobs
from fourmill.flows.fitting import fit_tokenizers, needs_labels
from fourmill.flows.growing import check_webdataset, grow_webdataset
from fourmill.flows.interrupts import interruptible
from fourmill.flows.plan import Plan, column_states, fit_shards, make_plan
from fourmill.flows.progress import progress, say
from fourmill.flows.resolve import Resolved, resolve
from fourmill.flows.status import Status, status
from fourmill.flows.watch_show import BuildLines
from fourmill.lease import Lease, single_writer_lease
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import SHORT, sha256
from fourmill.storage import Store

T = TypeVar("T")
#: runs one stage: (name, function) -> what the function returns
Stage = Callable[[str, Callable[[], Any]], Any]


@dataclass(frozen=True)
class BuildOptions:
    """What one run is asked for, beside the configuration."""

    limit: int | None = None
    shards: tuple[int, int] | None = None
    redo_stale: bool = False
    only_labels: tuple[str, ...] | None = None  # `fourmill label`: keep labels of these, make no tokens
    only_tokens: tuple[str, ...] | None = None  # `fourmill tokenize`
    fit_only: bool = False  # `fourmill fit-tokenizers`
    fitted: tuple[str, ...] | None = None  # of these alone; None: of all that lack one
    slice: tuple[int, int] | None = None  # (i, n): the shards whose number is i modulo n
    retry_rejects: bool | str = False  # null cells are tried again: all (True), or those of one reason


@dataclass
class BuildResult:
    status: Status
    rows_labelled: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def plain_stage(name: str, call: Callable[[], T]) -> T:
    return call()


def build(config: Config, options: BuildOptions = BuildOptions(), stage: Stage = plain_stage) -> BuildResult:
    """Make what is missing. Raises WorkMissing when something still is, once all that could be done is done."""
    with interruptible(), ExitStack() as stack:
        resolved = resolve(config)
        _check_slice(resolved, options)
        check_webdataset(resolved)
        _check_storage(config)
        if not Store(config.dataset).exists("dataset.yaml"):
            make_plan(resolved, None)  # an empty source is refused before the dataset exists
        lease = None
        if config.engine.single_writer:
            lease = stack.enter_context(single_writer_lease(Store(config.dataset)))
        dataset = Dataset.create(config.dataset, resolved.identity)
        _add_given_tokenizers(resolved, dataset)
        _restore_recipes(resolved, dataset)
        total = EngineReport()
        work = _Work(dataset, stage, total, lease)
        if options.only_labels is None and resolved.unfitted():
            _fit(resolved, work, options)
            resolved = resolve(config)
        shards: list[int] = []
        if options.fit_only:
            if not dataset.store.names("runs"):  # there was nothing to fit
                _remember_run(dataset, resolved, plan_of(resolved, dataset, options), {"tokens": []})
        else:
            plan = plan_of(resolved, dataset, options)
            shards = [shard for shard in plan.shards if in_slice(shard, options.slice)]
            _remember_run(dataset, resolved, plan, _asked(resolved, options))
            _say_plan(plan)
            _run(resolved, work, plan, "Label and tokenize")
            if config.webdataset and options.only_labels is None and not resolved.unfitted():
                stage("Write WebDataset", lambda: grow_webdataset(config))
    return _finish(resolved, dataset, options, total, shards)


def _check_slice(resolved: Resolved, options: BuildOptions) -> None:
    """Slices are independent of each other, so none of them may wait for, or repeat, what concerns all."""
    unfitted = resolved.unfitted()
    if options.slice is not None and unfitted:
        raise ConfigError(
            f"--slice: the tokenizers of {', '.join(unfitted)} are yet to be fitted; run `fourmill fit-tokenizers` "
            "first, once for all slices"
        )


def in_slice(shard: int, part: tuple[int, int] | None) -> bool:
    """Depends on the shard's number alone: whoever lists more or fewer shards agrees on it."""
    return part is None or shard % part[1] == part[0]


def _check_storage(config: Config) -> None:
    """Two writers must not both win. Local links and stores in memory keep that; of others it is found out."""
    store = Store(config.dataset)
    if store.is_local or config.engine.single_writer or store.probe_conditional_put():
        return
    raise ConfigError(
        f"{config.dataset} lets a second writer replace a receipt (no conditional put); use another store, or set "
        "engine.single_writer: true and never run two builds of it"
    )


def plan_of(resolved: Resolved, dataset: Dataset | None, options: BuildOptions) -> Plan:
    """Of all shards, with the jobs of this slice."""
    plan = make_plan(
        resolved,
        dataset,
        limit=options.limit,
        shard_range=options.shards,
        redo_stale=options.redo_stale,
        retry_rejects=options.retry_rejects,
        only_labels=options.only_labels or (),
        only_tokens=() if options.only_labels is not None else options.only_tokens,
    )
    return replace(plan, jobs=[job for job in plan.jobs if in_slice(job.shard, options.slice)])


def _say_plan(plan: Plan) -> None:
    if plan.vanished:
        say(f"{plan.vanished} committed rows are no longer in the source; what is finished stays as it is")
    stale = {name: len(s.stale) for name, s in plan.states.items() if s.stale}
    for name, count in stale.items():
        say(f"{name}: {count} shards were made with another recipe; --redo-stale makes them again")


@dataclass(frozen=True, slots=True)
class _Work:
    """What the stages of one build share. ``lease``: of a declared single writer."""

    dataset: Dataset
    stage: Stage
    total: EngineReport
    lease: Lease | None

    def check(self) -> None:
        """Raises once another flow has become the only writer."""
        if self.lease is not None:
            self.lease.check()


def _fit(resolved: Resolved, work: _Work, options: BuildOptions) -> None:
    """Label the fit set, keep those labels, and fit the tokenizers that are missing."""
    dataset, total = work.dataset, work.total
    whole = plan_of(resolved, dataset, options)
    chosen = fit_shards(resolved, whole.shards)
    wanted = [n for n in resolved.unfitted() if options.fitted is None or n in options.fitted]
    if not wanted:
        return
    names = tuple(n for n in wanted if needs_labels(resolved.wanted[n]))
    plan = make_plan(resolved, dataset, only_labels=names, only_tokens=(), only_shards=chosen)
    labels = {n: {"recipe": resolved.wanted[n].label_recipe.short, "shards": sorted(chosen)} for n in names}
    _remember_run(
        dataset, resolved, whole, {"labels": labels, **({"tokens": []} if options.fit_only else {})}
    )
    _run(resolved, work, plan, "Label the fit set")
    missing = make_plan(resolved, dataset, only_labels=names, only_tokens=(), only_shards=chosen).jobs
    if missing:
        why = next(iter(total.parked.values()), "see the parked shards")
        raise WorkMissing(f"{len(missing)} of {len(chosen)} shards of the fit set have no labels: {why}")
    _check_readable(dataset)
    with progress("Fit tokenizers", "steps") as advance:

        def on_fit(name: str, done: int, steps: int, figures: dict[str, Any]) -> None:
            work.check()
            loss = figures.get("loss")
            advance(done, steps, f"{name}" + (f" loss {loss:.3f}" if isinstance(loss, float) else ""))

        work.stage(
            "Fit tokenizers", lambda: fit_tokenizers(resolved, dataset, sorted(chosen), on_fit, wanted)
        )


def _run(resolved: Resolved, work: _Work, plan: Plan, title: str) -> None:
    if not plan.jobs:
        return
    dataset, total = work.dataset, work.total
    with BuildLines(dataset.url) as lines, progress(title, "images", lines) as advance:

        def on_progress(done: int, rows: int) -> None:
            work.check()
            advance(done, rows, "")

        report: EngineReport = work.stage(title, lambda: run_jobs(resolved, plan, on_progress))
        lines.finish()
    attempt = secrets.token_hex(4)
    recipes = resolved.token_recipes()
    for (column, shard), why in report.parked.items():
        recipe = resolved.samples_recipe if column == SAMPLES else recipes.get(column)
        recipe = recipe or resolved.wanted[column].label_recipe
        try:
            dataset.park(column, recipe.short, shard, attempt, why)
        except OSError as error:  # it is missing all the same, and this run says so at its end
            say(f"{column} shard {shard}: parked, but the dataset cannot be written to ({error})")
    total.rows += report.rows
    total.parked |= report.parked
    for phase, seconds in report.seconds.items():
        total.seconds[phase] = total.seconds.get(phase, 0.0) + seconds


def _finish(
    resolved: Resolved, dataset: Dataset, options: BuildOptions, total: EngineReport, shards: Sequence[int]
) -> BuildResult:
    """``shards``: those that this run was to finish."""
    _check_readable(dataset)
    result = BuildResult(status(dataset), total.rows, total.seconds)
    if total.parked:
        (column, shard), why = next(iter(total.parked.items()))
        raise WorkMissing(
            f"{len(total.parked)} column shards were set aside, such as {column} shard {shard}: {why}; "
            "the same command tries them again"
        )
    stale = _stale(resolved, dataset, result.status, shards)
    if stale and options.only_labels is None and not options.fit_only:
        raise WorkMissing(
            f"{stale} column shards are stale (another recipe made them); --redo-stale makes them again"
        )
    pending = 0 if options.fit_only else _pending(resolved, dataset, options, shards)
    if pending:  # nobody gave them up, and yet they are not there: never end as if all were well
        raise WorkMissing(f"{pending} column shards are still to be made; the same command goes on")
    return result


def _pending(resolved: Resolved, dataset: Dataset, options: BuildOptions, shards: Sequence[int]) -> int:
    """How many column shards this run was to finish and did not, by their receipts."""
    if options.only_labels is not None:
        recipes = {name: resolved.wanted[name].label_recipe for name in options.only_labels}
    else:
        asked = options.only_tokens
        recipes = {n: r for n, r in resolved.token_recipes().items() if asked is None or n in asked}
    listings = dataset.listings(recipes)
    return sum(len(set(shards) - listings[name].finished(recipe.short)) for name, recipe in recipes.items())


def _stale(resolved: Resolved, dataset: Dataset, found: Status, shards: Sequence[int]) -> int:
    """How many column shards of ``shards`` another recipe made; ``found`` is of the whole dataset."""
    stale = sum(m.stale for m in found.modalities.values())
    if not stale or len(shards) == found.shards:
        return stale
    recipes = resolved.token_recipes()
    states, _ = column_states(dataset, {name: recipes.get(name) for name in resolved.wanted}, shards)
    return sum(len(state.stale) for state in states.values())


def _check_readable(dataset: Dataset) -> None:
    """A source none of whose images can be read is a wrong source, not a finished dataset."""
    short = dataset.samples_recipe()
    receipts = dataset.receipts(SAMPLES, short).values() if short else []
    if receipts and not any(receipt.present for receipt in receipts):
        reasons = sorted({reason for receipt in receipts for reason in receipt.absent})
        raise SourceError(
            f"the source {dataset.identity['source']} has no readable image ({', '.join(reasons)})"
        )


def _restore_recipes(resolved: Resolved, dataset: Dataset) -> None:
    """Of everything that is asked for."""
    dataset.restore_recipe(SAMPLES, resolved.samples_recipe)
    for name, wanted in resolved.wanted.items():
        for recipe in (wanted.label_recipe, wanted.token_recipe()):
            if recipe is not None:
                dataset.restore_recipe(name, recipe)


def _add_given_tokenizers(resolved: Resolved, dataset: Dataset) -> None:
    for name, wanted in resolved.wanted.items():
        if wanted.tokenizer_folder is not None:
            dataset.add_tokenizer(name, Path(wanted.tokenizer_folder))


def _asked(resolved: Resolved, options: BuildOptions) -> dict[str, Any]:
    """What a run that is not about all tokens says of itself: ``labels`` to be kept, modalities of its ``tokens``."""
    if options.only_labels is not None:
        chosen = {n: resolved.wanted[n].label_recipe.short for n in options.only_labels}
        return {"labels": {n: {"recipe": r, "shards": None} for n, r in chosen.items()}, "tokens": []}
    return {} if options.only_tokens is None else {"tokens": list(options.only_tokens)}


def _remember_run(dataset: Dataset, resolved: Resolved, plan: Plan, asked: dict[str, Any]) -> None:
    """runs/<id>.yaml: what was asked for, from which `status` derives what is missing, and `watch` how far it is."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    recipes: dict[str, Any] = dict.fromkeys(resolved.wanted)
    recipes |= {name: {"kind": r.kind, **r.content} for name, r in resolved.token_recipes().items()}
    content = {
        "fourmill": __version__,
        "config": resolved.config.model_dump(mode="json"),
        "recipes": recipes,
        "shards": {str(shard): rows for shard, rows in plan.shards.items()},
        **asked,
    }
    note = yaml.safe_dump(content, sort_keys=False)
    dataset.store.put(f"runs/{now}-{sha256(note)[:SHORT]}.yaml", note.encode())
