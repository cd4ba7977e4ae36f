"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

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

LabelerKind = Literal["image", "features", "vector", "sequence"]
