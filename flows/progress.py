"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()
errors = Console(stderr=True)
#: seconds between lines where there is no terminal
EVERY = 5.0

Advance = Callable[[int, int, str], None]  # (done, total, note)
Watcher = Callable[[str, str, int, int], None]  # (title, unit, done, total)
_watchers: list[Watcher] = []


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Have all progress reported to ``watcher`` too, within the block."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._started = self._shown = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
        if now - self._shown < EVERY and done < total:
            return
        if done >= total and self._shown == float("inf"):
            return
        rate = (done - self._first) / max(now - self._started, 1e-6)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        console.print(
            f"{self._title}: {done}/{total} {self._unit}, {rate:.1f}/s{left} {note}", highlight=False
        )
        self._shown = float("inf") if done >= total else now


@contextmanager
def progress(title: str, unit: str, below: RenderableType = "") -> Iterator[Advance]:
    """``with progress("Labeling", "images") as advance: advance(done, total, note)``

    ``below`` is drawn under the bar, anew each time, on a terminal.
    """
    with _bar(title, unit, below) if console.is_terminal else nullcontext(_Lines(title, unit)) as show:

        def advance(done: int, total: int, note: str = "") -> None:
            show(done, total, note)
            for watcher in _watchers:
                watcher(title, unit, done, total)

        yield advance


class _Bar(Progress):
    """With something below."""

    below: RenderableType = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield self.below


@contextmanager
def _bar(title: str, unit: str, below: RenderableType) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with _Bar(*columns, console=console, refresh_per_second=4) as bar:
        bar.below = below
        task = bar.add_task(title, total=None, rate="", note="")
        started = time.monotonic()
        first: int | None = None

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal first, started
            if first is None:
                first, started = done, time.monotonic()
            rate = (done - first) / max(time.monotonic() - started, 1e-6)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f}/s", note=note)

        yield advance


def say(text: str) -> None:
    """One line for a person, between progress bars."""
    console.print(text, highlight=False, soft_wrap=True)
