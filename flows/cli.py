"""The ``fourmill`` command. Each command parses its arguments and calls one function."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fourmill.errors import FourmillError
from fourmill.flows import cli_datasets, cli_labelers, cli_own_labelers
from fourmill.flows.arguments import known_names, reasons, shard_range, slice_of, with_optional_values
from fourmill.flows.options import (
    ConfigName,
    Limit,
    Modalities,
    NoPrefect,
    Overrides,
    RedoStale,
    RetryRejects,
    Shards,
)  # fmt: skip
from fourmill.flows.progress import console, errors

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


@app.command(
    "fit-tokenizers", epilog="Example: [bold]fourmill fit-tokenizers configs/photos.yaml -m depth[/bold]"
)
def fit_tokenizers(
    config: ConfigName,
    modality: Modalities = None,
    overrides: Overrides = None,
    no_prefect: NoPrefect = False,
) -> None:
    """Label the fit set and fit the tokenizers that the dataset lacks (`build` does this too); a killed fit goes on."""
    from fourmill.config import load_config
    from fourmill.flows import flow_runs
    from fourmill.flows.fitting_show import tokenizers_table

    checked = load_config(config, overrides)
    names = known_names(modality, checked.modalities)
    content = checked.model_dump(mode="json")
    flow_runs.run_flow(flow_runs.fit_tokenizers, use_prefect=not no_prefect, config=content, modalities=names)
    console.print(tokenizers_table(checked, names), soft_wrap=True)


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


app.add_typer(cli_datasets.app)
app.add_typer(cli_labelers.app)
app.add_typer(cli_own_labelers.app)


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
