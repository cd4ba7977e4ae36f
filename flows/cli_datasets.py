"""Commands that look at a dataset that was built, or write it out; part of ``fourmill.flows.cli``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fourmill.errors import ConfigError, FourmillError
from fourmill.flows.options import DatasetUrl, Modalities
from fourmill.flows.progress import console

app = typer.Typer()


@app.command(epilog="Example: [bold]fourmill status data/demo --watch[/bold]")
def status(
    dataset: DatasetUrl,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="rates and time left, live, until it is complete or Ctrl-C")
    ] = False,
    licenses: Annotated[
        bool, typer.Option("--licenses", help="whose weights it was made with, and under which licences")
    ] = False,
) -> None:
    """Where a dataset stands, from its receipts; with --watch how fast it grows, whoever builds it."""
    if watch and licenses:
        raise ConfigError("--licenses: not together with --watch; leave one of them out")
    if licenses:
        _licenses(dataset, as_json)
        return
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


def _licenses(url: str, as_json: bool) -> None:
    from fourmill.flows.licenses import licenses_json, licenses_report, uses
    from fourmill.shards.dataset import Dataset

    found = uses(Dataset(url))
    if as_json:
        print(json.dumps(licenses_json(found)))
    else:
        console.print(licenses_report(found, url))


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


@app.command(
    epilog="Example: [bold]fourmill export data/demo exports/demo -m rgb -m depth --format parquet[/bold]"
)
def export(
    dataset: DatasetUrl,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="a folder or any fsspec URL; of coco a .json file")
    ],
    modality: Modalities = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, val or, but of webdataset, all. Default: all, of webdataset train"),
    ] = None,
    layout: Annotated[
        str, typer.Option("--format", help="webdataset, parquet, coco or fiftyone")
    ] = "webdataset",
) -> None:
    """Write finished shards as the WebDataset tars that the published 4M code reads, or as Parquet with a dataset card; or
    their kept labels as a COCO file or a FiftyOne dataset."""
    from fourmill.flows.exporting import export_dataset

    done = export_dataset(dataset, out, modality, split, layout)
    console.print(f"{done.rows} samples in {done.shards} shards: {out}", soft_wrap=True)
    for reason, rows in done.left_out.items():
        console.print(f"  left out: {rows} ({reason})", markup=False)


@app.command(
    "import-webdataset",
    epilog="Example: [bold]fourmill import-webdataset s3://bucket/4m-tars data/theirs --modalities theirs.yaml[/bold]",
)
def import_webdataset(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="a tree of MODALITY/shard-00000.tar that 4M trains from")
    ],
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="what it is to become, here")],
    modalities: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="YAML that says what they are, where fourmill did not export it"),
    ] = None,
) -> None:
    """Make a dataset of exported tars, checked in every modality; the same command goes on where it was stopped."""
    from fourmill.flows.importing_datasets import import_webdataset as import_tree

    done = import_tree(url, dataset, modalities)
    console.print(f"{done.rows} samples in {done.shards} shards: {dataset}", soft_wrap=True)
    short = done.snapshot.digest[:12]
    console.print(
        f"train on it: fourmill train CONFIG --set dataset={dataset} --snapshot {short}",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip


@app.command(epilog="Example: [bold]fourmill qa data/demo[/bold]")
def qa(
    dataset: DatasetUrl,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of tables")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit status 1 where a shard is odd")] = False,
) -> None:
    """Which shards are unlike the others or the first ones: labels that keep their contract and are wrong all the same."""
    from fourmill.flows.qa import examine
    from fourmill.flows.qa_show import quality_report
    from fourmill.shards.dataset import Dataset

    found = examine(Dataset(dataset))
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        console.print(quality_report(found), soft_wrap=True)
    if strict and found.odd:
        raise FourmillError(f"{len({(o.column, o.shard) for o in found.odd})} column shards are odd")


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


@app.command(
    epilog="Example: [bold]fourmill snapshot data/cc12m --where 'clip_score >= 0.2' --where 'normal_vs_depth <= 30'[/bold]"
)
def snapshot(
    dataset: DatasetUrl,
    modality: Modalities = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help="rows by a score, such as 'clip_score >= 0.2'; may be repeated"
        ),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="show the registered snapshots, and make none")
    ] = False,
    release: Annotated[
        str | None,
        typer.Option(metavar="DIGEST", help="forget a snapshot: `gc` need not keep its files then"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Pin and register what is finished: shards, recipes, hashes, licences, and the rows that were chosen."""
    from fourmill.flows import snapshots

    if release is not None:
        console.print(f"released {snapshots.release(dataset, release)}", highlight=False)
        return
    found = (
        snapshots.list_snapshots(dataset)
        if listed
        else [snapshots.take_snapshot(dataset, modality, where or ())]
    )
    if as_json:
        print(json.dumps([snapshots.snapshot_json(one) for one in found]))
    else:
        console.print(snapshots.snapshots_report(dataset, found), soft_wrap=True)


@app.command("drop-keys", epilog="Example: [bold]fourmill drop-keys data/cc12m take-downs.txt[/bold]")
def drop_keys(
    dataset: DatasetUrl,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="sample keys, one per line")],
) -> None:
    """Take samples down: every new snapshot and export leaves them out, and no shard is rewritten."""
    from fourmill.flows.snapshots import drop, drop_report

    console.print(drop_report(dataset, *drop(dataset, file)), soft_wrap=True)


@app.command(epilog="Example: [bold]fourmill verify data/demo --repair[/bold]")
def verify(
    dataset: DatasetUrl,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="move what is damaged aside, so that the next build makes it again"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Read every file, and hold it against its hash, its receipt, its shard's keys and its tokenizer."""
    from fourmill.flows.verifying import verification_report, verify_dataset

    console.stderr = as_json  # its progress
    try:
        done = verify_dataset(dataset, repair)
    finally:
        console.stderr = False
    if as_json:
        print(json.dumps(done.to_json()))
    else:
        console.print(verification_report(done), soft_wrap=True)
    if done.found.problems:
        raise FourmillError(f"{dataset}: {len(done.found.problems)} files are not what they should be")


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
