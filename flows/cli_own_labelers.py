"""Commands for labelers of one's own; part of ``fourmill.flows.cli``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fourmill.errors import ContractError
from fourmill.flows.options import LabelerKind
from fourmill.flows.progress import console

app = typer.Typer()


@app.command("new-labeler", epilog="Example: [bold]fourmill new-labeler shiny --kind image[/bold]")
def new_labeler(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the labeler and of its modality")],
    kind: Annotated[LabelerKind, typer.Option(help="what its labels are")] = "image",
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="the folder `labelers` of a checkout: one file and its test, no package"
        ),
    ] = None,
) -> None:
    """Write a labeler that works, and its test: a package that can be installed, to be changed into your own."""
    from fourmill.flows.new_labeler import new_labeler as write

    written = write(name, kind, Path(), into)
    for path in written.files:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    console.print("next:", highlight=False)
    for command in written.commands:
        console.print(f"  {command}", soft_wrap=True, highlight=False)
    console.print(f"in a configuration: modalities: {{{name}: {{}}}}", highlight=False, soft_wrap=True)


@app.command(
    "check-labeler", epilog="Example: [bold]fourmill check-labeler det --set min_score=0.3 --json[/bold]"
)
def check_labeler(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a registered labeler")],
    model: Annotated[
        str | None, typer.Option(help="a checkpoint's folder or hub id; default: the labeler's own")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="40-digit commit of a hub id")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="an option of the labeler; may be repeated"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Run the contract suite on one labeler: a verdict per point; exit status 1 where one fails."""
    from fourmill.flows.checking_labeler import check_one, verdicts_json, verdicts_table
    from fourmill.labelers.contract import failures

    verdicts = check_one(name, model, revision, options)
    if as_json:
        print(json.dumps(verdicts_json(name, verdicts)))
    else:
        console.print(verdicts_table(name, verdicts))
    failed = failures(verdicts)
    if failed:
        raise ContractError(f"labeler {name!r}: {len(failed)} of {len(verdicts)} points failed; {failed[0]}")


@app.command(
    "import-labels",
    epilog="Example: [bold]fourmill import-labels semseg masks/ --config my.yaml --set 'classes=[floor, wall]'[/bold]",
)
def import_labels(
    modality: Annotated[str, typer.Argument(metavar="MODALITY", help="what the labels are to be called")],
    url: Annotated[
        str, typer.Argument(metavar="URL", help="a folder, tars or a COCO JSON file, on any fsspec URL")
    ],
    config: Annotated[str, typer.Option(metavar="CONFIG", help="whose source has the images")],
    modality_kind: Annotated[
        str | None, typer.Option(help="depth, normal, semseg or det; default: the modality's own name")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="an option, such as scale=0.001; may be repeated"),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="add the lines to the file CONFIG")] = False,
) -> None:
    """Use labels that you have: match files to images by key, and print the lines that a configuration needs."""
    from fourmill.config import load_config
    from fourmill.errors import SourceError
    from fourmill.flows.importing import add_to_config, examine, found_table

    found = examine(load_config(config), modality, url, modality_kind, options)
    console.print(found_table(found))
    if not found.matched:
        raise SourceError(f"no label at {url} answers to the key of an image; see the examples above")
    if write:
        add_to_config(Path(config), found)
        console.print(f"added to {config}:", soft_wrap=True, highlight=False)
    else:
        console.print("under `modalities:` of the configuration:", highlight=False)
    console.print(found.yaml_lines().rstrip(), soft_wrap=True, highlight=False, markup=False)
