"""Commands about labelers; part of ``fourmill.flows.cli``."""

from __future__ import annotations

import typer

app = typer.Typer()
