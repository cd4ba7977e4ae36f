"""Progress as a person sees it: `fourmill status --watch`, and the lines under a build's own progress bar.

Looks are rarer where they take long, as with 250,000 receipts: of a build's driver a fiftieth of its time at most.
"""

from __future__ import annotations

import json
import threading
import time
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fourmill.errors import FourmillError
from fourmill.flows.progress import console, say
from fourmill.flows.watch import Line, Picture, Watch
from fourmill.shards.dataset import Dataset

EVERY_S = 2.0  # between looks of `fourmill status --watch`
BUILD_EVERY_S = 5.0  # between looks of a build at itself
PAUSE, BUILD_PAUSE = 4, 50  # a pause is at least so many times as long as the look before it
UNKNOWN = "-"


def human_seconds(seconds: float) -> str:
    """At most two units: 42 s, 3 min, 2 h 05 min, 3 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def lines_table(picture: Picture) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ("modality", "shards", "images/s", "waits", "rejects", "left", picture.unit, "per 1,000")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "modality" else "right", no_wrap=True)
    for line in picture.lines:
        parked = f" ({line.parked} parked)" if line.parked else ""
        table.add_row(
            line.name,
            f"{line.finished}/{line.total}{parked}",
            _shown(line.rate, "{:.1f}"),
            _shown(line.wait, "{:.0%}"),
            str(line.rejects),
            UNKNOWN if line.left is None else human_seconds(line.left) if line.left else "",
            f"{line.seconds:.0f}",
            _shown(line.per_thousand, "{:.1f}"),
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else form.format(value)


def compact(line: Line, unit: str) -> str:
    """The same as plain text."""
    rate = "" if line.rate is None else f" {line.rate:.1f} images/s,"
    return (
        f"{line.name}: {line.finished}/{line.total} shards,{rate} waited {_shown(line.wait, '{:.0%}')}, "
        f"{line.rejects} rejects, {line.seconds:.1f} {unit} ({_shown(line.per_thousand, '{:.1f}')} per 1,000)"
    )


def _report(picture: Picture) -> RenderableType:
    if picture.complete:
        state = Text("complete", style="green")
    elif not picture.last:
        state = Text("nothing is finished yet", style="yellow")
    else:
        state = Text(f"last commit {human_seconds(picture.now - picture.last)} ago")
    return Group(Text(picture.url, style="bold"), lines_table(picture), state)


def watch(url: str, *, as_json: bool = False) -> None:
    """Show a dataset's progress until it is complete, or until Ctrl-C. Without a terminal: lines, when there is news."""
    view = Watch(Dataset(url))
    try:
        if as_json:
            _follow(view, lambda picture: print(json.dumps(picture.to_json()), flush=True))
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                _follow(view, lambda picture: live.update(_report(picture), refresh=True))
        else:
            _follow(view, _News())
    except KeyboardInterrupt:
        return


class _News:
    """Prints lines that say something new of shards."""

    def __init__(self) -> None:
        self._said: dict[str, int] = {}

    def __call__(self, picture: Picture) -> None:
        for line in picture.lines:
            if self._said.get(line.name) != line.finished:
                say(compact(line, picture.unit))
            self._said[line.name] = line.finished
        if picture.complete:
            say("complete")


def _follow(view: Watch, show: Any) -> None:
    while True:
        began = time.monotonic()
        picture = view.look()
        show(picture)
        if picture.complete:
            return
        time.sleep(max(EVERY_S, PAUSE * (time.monotonic() - began)))


class BuildLines:
    """The same lines under a build's own progress bar: a context manager, and something that rich can draw.

    On a terminal a thread looks every few seconds; elsewhere `finish` looks once, and prints a line per modality.
    """

    def __init__(self, url: str) -> None:
        self._watch = Watch(Dataset(url))
        self._picture: Picture | None = None
        self._trouble = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._halt()

    def __rich__(self) -> RenderableType:
        if self._trouble:
            return Text(f"progress cannot be read now: {self._trouble}", style="yellow")
        return lines_table(self._picture) if self._picture else Text("")

    def finish(self) -> None:
        """The last look, when the work is done."""
        self._halt()
        self._look()
        if not console.is_terminal and self._picture is not None:
            for line in self._picture.lines:
                if line.rate is not None:  # this run has done something of it
                    say(compact(line, self._picture.unit))

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=60)

    def _look_on(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            began = time.monotonic()
            self._look()
            pause = max(BUILD_EVERY_S, BUILD_PAUSE * (time.monotonic() - began))

    def _look(self) -> None:
        """What is shown beside the work must not end it: trouble is shown instead, and the next look tries again."""
        try:
            self._picture, self._trouble = self._watch.look(), ""
        except (OSError, FourmillError) as error:
            self._trouble = " ".join(str(error).split())[:200]
