"""The ``fourmill`` command. Each command parses its arguments and calls one function."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fourmill.errors import ConfigError, FourmillError
from fourmill.flows.arguments import known_names, reasons, shard_range, slice_of, with_optional_values
from fourmill.flows.progress import console, errors

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="a YAML file, or a shipped one by name: demo, photos, cc12m")
]
DatasetUrl = Annotated[
    str, typer.Argument(metavar="DATASET", help="where a dataset was built: a folder or any fsspec URL")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key; may be repeated")
]
NoPrefect = Annotated[bool, typer.Option("--no-prefect", help="run without any Prefect server")]
Modalities = Annotated[
    list[str] | None, typer.Option("--modality", "-m", help="only this modality; may be repeated")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="a pilot of the first N samples, rounded up to whole shards")
]
Shards = Annotated[str | None, typer.Option(metavar="A:B", help="a pilot of the shards A to B - 1")]
RedoStale = Annotated[bool, typer.Option("--redo-stale", help="make again what another recipe made")]

RetryRejects = Annotated[
    str | None,
    typer.Option(
        "--retry-rejects",
        metavar="[REASON]",
        help="try null cells again: all, or those with this reason (see `fourmill status`)",
    ),
]


@app.callback()
def about() -> None:
    """Build pseudo-labeled, tokenized multimodal datasets, and train any-to-any masked models on them."""


@app.command(epilog="Example: [bold]fourmill demo[/bold]")
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder of the training run")] = Path("runs/demo"),
    no_prefect: NoPrefect = False,
) -> None:
    """The main job on the embedded default: label and tokenize rendered scenes, train, and report."""
    from fourmill.flows.demo import run_demo

    run_demo(overrides or [], out, use_prefect=not no_prefect)


@app.command(
    epilog="Example: [bold]fourmill build configs/photos.yaml --set dataset=data/mine --limit 2000[/bold]"
)
def build(
    config: ConfigName,
    limit: Limit = None,
    shards: Shards = None,
    part: Annotated[
        str | None,
        typer.Option("--slice", metavar="I/N", help="only the I-th of N parts of the shards (0 <= I < N)"),
    ] = None,
    redo_stale: RedoStale = False,
    retry_rejects: RetryRejects = None,
    overrides: Overrides = None,
    no_prefect: NoPrefect = False,
) -> None:
    """Label and tokenize everything that is missing; the same command resumes after any interruption."""
    _build(
        config, overrides, no_prefect,
        limit=limit, shards=shard_range(shards), redo_stale=redo_stale, retry_rejects=reasons(retry_rejects),
        slice=slice_of(part),
    )  # fmt: skip


@app.command(
    epilog="Example: [bold]fourmill plan cc12m --limit 20000 --rate depth=120 --rate clip=900[/bold]"
)
def plan(
    config: ConfigName,
    limit: Limit = None,
    shards: Shards = None,
    redo_stale: RedoStale = False,
    retry_rejects: RetryRejects = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="MODALITY=IMAGES_PER_S", help="speed of one specialist; may be repeated"),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="measure what is not known with 200 images on this machine")
    ] = False,
    specialists: Annotated[
        int | None,
        typer.Option(min=1, help="how many of each group work at once; default: as this machine has room"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
    overrides: Overrides = None,
) -> None:
    """What a build would do and redo, why, and what that takes (estimates). Touches nothing."""
    from fourmill.config import load_config
    from fourmill.flows.build import BuildOptions
    from fourmill.flows.planning import parse_rates, plan_build, plan_report

    options = BuildOptions(
        limit=limit, shards=shard_range(shards), redo_stale=redo_stale, retry_rejects=reasons(retry_rejects)
    )
    console.stderr = as_json  # what a calibration says of its progress
    try:
        found = plan_build(
            load_config(config, overrides), options,
            rates=parse_rates(rate), calibrated=calibrate, specialists=specialists,
        )  # fmt: skip
    finally:
        console.stderr = False
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        console.print(plan_report(found), soft_wrap=True)


@app.command(epilog="Example: [bold]fourmill label demo -m depth --limit 300[/bold]")
def label(
    config: ConfigName,
    modality: Modalities = None,
    limit: Limit = None,
    shards: Shards = None,
    overrides: Overrides = None,
    no_prefect: NoPrefect = False,
) -> None:
    """Make and keep labels (as WebDataset tars), without tokens; later tokens spend no forward pass on them."""
    from fourmill.config import load_config
    from fourmill.modality import SOURCE_MODALITIES

    known = load_config(config, overrides).modalities
    names = known_names(modality, known) or [name for name in known if name not in SOURCE_MODALITIES]
    _build(config, overrides, no_prefect, limit=limit, shards=shard_range(shards), only_labels=names)


@app.command(epilog="Example: [bold]fourmill tokenize demo -m depth --redo-stale[/bold]")
def tokenize(
    config: ConfigName,
    modality: Modalities = None,
    limit: Limit = None,
    shards: Shards = None,
    redo_stale: RedoStale = False,
    overrides: Overrides = None,
    no_prefect: NoPrefect = False,
) -> None:
    """Make the tokens of some modalities, from kept labels where there are any."""
    from fourmill.config import load_config

    names = known_names(modality, load_config(config, overrides).modalities)
    _build(
        config, overrides, no_prefect,
        limit=limit, shards=shard_range(shards), redo_stale=redo_stale, only_tokens=names,
    )  # fmt: skip


@app.command("fit-tokenizers", epilog="Example: [bold]fourmill fit-tokenizers configs/photos.yaml[/bold]")
def fit_tokenizers(config: ConfigName, overrides: Overrides = None, no_prefect: NoPrefect = False) -> None:
    """Label the fit set and fit the tokenizers that the dataset lacks (`build` does this too)."""
    from fourmill.config import load_config
    from fourmill.flows import flow_runs

    checked = load_config(config, overrides)
    flow_runs.run_flow(
        flow_runs.fit_tokenizers, use_prefect=not no_prefect, config=checked.model_dump(mode="json")
    )
    _show_tokenizers(checked.dataset)


@app.command(epilog="Example: [bold]fourmill train demo --out runs/second --set train.steps=2000[/bold]")
def train(
    config: ConfigName,
    out: Annotated[Path | None, typer.Option(help="folder of the run; default: runs/<dataset>")] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="digest of a registered snapshot; default: what is finished now")
    ] = None,
    overrides: Overrides = None,
    no_prefect: NoPrefect = False,
) -> None:
    """Train on finished shards, or go on with a run. Several GPUs: torchrun -m fourmill.train CONFIG --out DIR."""
    from fourmill.config import load_config
    from fourmill.flows import flow_runs

    result = flow_runs.run_flow(
        flow_runs.train,
        use_prefect=not no_prefect,
        config=load_config(config, overrides).model_dump(mode="json"),
        out=str(out) if out else None,
        snapshot=snapshot,
    )
    console.print(f"step {result['step']}, loss {result['loss']:.4f}: {result['checkpoint']}", soft_wrap=True)


@app.command(epilog="Example: [bold]fourmill status data/demo --watch[/bold]")
def status(
    dataset: DatasetUrl,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="rates and time left, live, until it is complete or Ctrl-C")
    ] = False,
) -> None:
    """Where a dataset stands, from its receipts; with --watch how fast it grows, whoever builds it."""
    if watch:
        from fourmill.flows.watch_show import watch as watch_dataset

        watch_dataset(dataset, as_json=as_json)
        return
    from fourmill.flows.status import status as read_status
    from fourmill.flows.status import status_report
    from fourmill.shards.dataset import Dataset

    found = read_status(Dataset(dataset))
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        console.print(status_report(found, dataset), soft_wrap=True)


@app.command(epilog="Example: [bold]fourmill report data/demo --model runs/demo[/bold]")
def report(
    dataset: DatasetUrl,
    model: Annotated[Path | None, typer.Option(help="a training run, to show what it predicts")] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="held-out samples to show")] = 8,
    metric_samples: Annotated[int, typer.Option(min=1, help="held-out samples to measure on")] = 128,
) -> None:
    """An HTML page with pictures: every link of the chain side by side, and a number for each."""
    from fourmill.flows.demo import write_report

    made = write_report(dataset, model, samples=samples, metric_samples=metric_samples)
    console.print(f"report: {made.path}", soft_wrap=True)


@app.command(epilog="Example: [bold]fourmill export data/demo exports/demo -m rgb -m depth -m caption[/bold]")
def export(
    dataset: DatasetUrl,
    out: Annotated[str, typer.Argument(metavar="OUT", help="a folder or any fsspec URL")],
    modality: Modalities = None,
    split: Annotated[str, typer.Option(help="train or val")] = "train",
    layout: Annotated[str, typer.Option("--format", help="webdataset, the only one")] = "webdataset",
) -> None:
    """Write finished shards as the WebDataset tars that the published 4M training code reads."""
    from fourmill.flows.exporting import export_dataset

    if layout != "webdataset":
        raise ConfigError(f"--format {layout}: only webdataset is written")
    done = export_dataset(dataset, out, modality, split)
    console.print(f"{done.rows} samples in {done.shards} shards: {out}", soft_wrap=True)
    for reason, rows in done.left_out.items():
        console.print(f"  left out: {rows} ({reason})", markup=False)


@app.command(epilog="Example: [bold]fourmill inspect data/demo --key 000007 --out looked[/bold]")
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="WHAT", help="a dataset, shard file, receipt, tokenizer or training run")
    ],
    key: Annotated[str | None, typer.Option(help="a sample of the dataset, by its key")] = None,
    out: Annotated[Path | None, typer.Option(help="with --key: a folder for pictures of the sample")] = None,
) -> None:
    """Say what a file or folder of fourmill's is, and what is in it."""
    from fourmill.flows.inspecting import describe

    for part in describe(target, key=key, out=out):
        console.print(part)


@app.command(epilog="Example: [bold]fourmill gc data/demo --older-than 30d --delete[/bold]")
def gc(
    dataset: DatasetUrl,
    delete: Annotated[
        bool, typer.Option("--delete", help="remove it; without this nothing is touched")
    ] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="only what is older, by the store's clock: 7d, 12h")
    ] = "7d",
) -> None:
    """Show, or remove, what crashes and replaced work left: files that no receipt and no snapshot names."""
    from fourmill.flows.cleaning import clean

    console.print(clean(dataset, delete, older_than), soft_wrap=True)


@app.command(epilog="Example: [bold]fourmill doctor configs/cc12m.yaml[/bold]")
def doctor(config: ConfigName, overrides: Overrides = None) -> None:
    """Check disk, memory, versions, checkpoints, source and storage before a long run."""
    from fourmill.config import load_config
    from fourmill.flows.doctor import examine, findings_table

    findings = examine(load_config(config, overrides))
    console.print(findings_table(findings))
    failed = [f.check for f in findings if f.state == "fail"]
    if failed:
        raise FourmillError(f"{len(failed)} checks failed: {', '.join(failed)}")


def _build(config: str, overrides: list[str] | None, no_prefect: bool, **options: Any) -> None:
    """Run the flow, and show where the dataset stands whether or not something is still missing."""
    from fourmill.config import load_config
    from fourmill.errors import WorkMissing
    from fourmill.flows import flow_runs
    from fourmill.flows.status import status as read_status
    from fourmill.flows.status import status_report
    from fourmill.shards.dataset import Dataset

    checked = load_config(config, overrides)
    problem: WorkMissing | None = None
    try:
        flow_runs.run_flow(
            flow_runs.build_dataset,
            use_prefect=not no_prefect,
            config=checked.model_dump(mode="json"),
            **options,
        )
    except WorkMissing as error:
        problem = error
    console.print(status_report(read_status(Dataset(checked.dataset)), checked.dataset), soft_wrap=True)
    if problem is not None:
        raise problem


def _show_tokenizers(url: str) -> None:
    from fourmill.shards.dataset import Dataset

    dataset = Dataset(url)
    for name in dataset.store.names("tokenizers"):
        for short in dataset.tokenizers(name):
            console.print(f"{url}/tokenizers/{name}/{short}", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point: errors of ours are one line, and every way of ending has its exit status."""
    try:
        app(with_optional_values(sys.argv[1:]), prog_name="fourmill")
    except FourmillError as error:
        errors.print(f"fourmill: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(error.exit_code)
    except (
        OSError
    ) as error:  # a disk that is full, a folder that may not be written to, a store that does not answer
        errors.print(f"fourmill: {type(error).__name__}: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_stopped())
    except SystemExit as leaving:
        sys.exit(_stopped() if leaving.code == INTERRUPTED else leaving.code)


def _stopped() -> int:
    errors.print("fourmill: stopped; the same command goes on from here", highlight=False)
    return 3
