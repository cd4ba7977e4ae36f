"""The ``fourmill`` command. Each command parses and calls one function."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from fourmill.errors import FourmillError
from fourmill.flows.progress import console, errors

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)


@app.callback()
def about() -> None:
    """Build pseudo-labeled, tokenized multimodal datasets, and train any-to-any masked models on them."""


@app.command()
def status(
    dataset: Annotated[str, typer.Argument(help="URL of the dataset")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Where a dataset stands, from its receipts.   Example: [bold]fourmill status data/demo[/bold]"""
    from fourmill.flows.status import status as read_status
    from fourmill.flows.status import status_table
    from fourmill.shards.dataset import Dataset

    report = read_status(Dataset(dataset))
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        console.print(status_table(report, dataset))


def main() -> None:
    """Entry point: errors of ours are one line, and every way of ending has its exit status."""
    try:
        app(standalone_mode=True)
    except FourmillError as error:
        errors.print(f"fourmill: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("fourmill: stopped; the same command goes on from here", highlight=False)
        sys.exit(3)
