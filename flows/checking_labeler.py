"""``fourmill check-labeler``: the contract suite on one labeler, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from fourmill.errors import ConfigError, nearest
from fourmill.labelers.base import labelers
from fourmill.labelers.contract import FAIL, OK, Verdict, check_labeler, with_options

#: keys of --set that are no options of the labeler
_SETTINGS = ("precision", "device")
_STYLES = {OK: "green", FAIL: "bold red"}


def check_one(
    name: str, model: str | None = None, revision: str | None = None, options: Sequence[str] | None = None
) -> list[Verdict]:
    """The suite's verdicts on a registered labeler; ``options`` are KEY=VALUE with YAML values."""
    cls = labelers.get(name)
    given: dict[str, Any] = {"model": model, "revision": revision}
    for text in options or ():
        key, separator, value = text.partition("=")
        if not separator or key not in (*cls.options, *_SETTINGS):
            hint = nearest(key, [*cls.options, *_SETTINGS])
            raise ConfigError(
                f"--set {text}: labeler {name!r} has no such option{hint}; write it as key=value"
            )
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: not a YAML value: {' '.join(str(error).split())}") from error
    settings = with_options(cls, **given)
    cls(settings).describe()  # a wrong option or checkpoint is one line, not a table of failures
    return check_labeler(cls, settings)


def verdicts_table(name: str, verdicts: Sequence[Verdict]) -> Table:
    table = Table("point", "", "", title=f"labeler {name}", title_justify="left", box=None, pad_edge=False)
    for verdict in verdicts:
        state = Text(verdict.state, style=_STYLES.get(verdict.state, "dim"))
        table.add_row(Text(verdict.point), state, Text(verdict.detail, overflow="fold"))
    return table


def verdicts_json(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    passed = all(verdict.state != FAIL for verdict in verdicts)
    return {"labeler": name, "passed": passed, "points": [asdict(verdict) for verdict in verdicts]}
