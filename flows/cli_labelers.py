"""Commands about labelers; part of ``fourmill.flows.cli``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fourmill.flows.progress import console

app = typer.Typer()
cards = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(cards, name="labelers")

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text")]


@cards.callback(
    invoke_without_command=True,
    epilog="Example: [bold]fourmill labelers[/bold], [bold]fourmill labelers show depth[/bold]",
)
def list_labelers(context: typer.Context, as_json: AsJson = False) -> None:
    """Every labeler with its modality, its weights for photographs and their licence; `show NAME` for its card."""
    from fourmill.flows import labeler_cards

    if context.invoked_subcommand is None:
        if as_json:
            print(json.dumps([labeler_cards.card_json(name) for name in labeler_cards.names()]))
        else:
            console.print(labeler_cards.cards_table())


@cards.command(epilog="Example: [bold]fourmill labelers show depth[/bold]")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a labeler, as `fourmill labelers` lists them")],
    as_json: AsJson = False,
) -> None:
    """A labeler's card: its weights and their licences, what it expects, what its labels are, whom to cite."""
    from fourmill.flows import labeler_cards

    if as_json:
        print(json.dumps(labeler_cards.card_json(name)))
    else:
        console.print(labeler_cards.card_report(name))
