"""What an actor was doing when it died, written where its successor and its runner on the same node can read it.

A process that is killed by the row it works on cannot say so. It therefore notes each task before it begins. Who finds an
unfinished note of a process that is gone knows the suspect: the task that was running, not the ones that were queued.
The notes survive the process, not the node: when a node is lost nobody is suspected.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """``task`` was given by the caller, ``step`` is what of it was under way (a modality), ``since`` is wall time in s.

    ``hung``: somebody ended the process because this took too long.
    """

    task: str
    step: str
    since: float
    hung: bool = False


class Journal:
    """The notes of one actor. A new one of the same name finds out how the last one ended."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._now, self._deaths = _paths(folder, name)
        unfinished = _read(self._now)
        if unfinished is not None:
            hung = _read(_hung(folder, name))
            known = [unfinished.task, unfinished.step, unfinished.since, hung == unfinished]
            with self._deaths.open("a") as stream:
                stream.write(json.dumps(known) + "\n")
            self._now.unlink()

    @contextmanager
    def entry(self, task: str, step: str) -> Iterator[None]:
        """``task`` is under way inside the block; an exception ends it as well as success does."""
        _write(self._now, Entry(task, step, time.time()))
        try:
            yield
        finally:
            self._now.unlink(missing_ok=True)


def under_way(folder: Path, name: str) -> Entry | None:
    """What the actor of that name is doing now, or was doing when it died. None from another node."""
    return _read(_paths(folder, name)[0])


def note_hanging(folder: Path, name: str, entry: Entry) -> None:
    """To be called before the process is ended because ``entry`` takes too long."""
    _write(_hung(folder, name), entry)


def deaths(folder: Path, name: str, task: str) -> list[Entry]:
    """The times that an actor of that name died while it worked on ``task``."""
    try:
        lines = _paths(folder, name)[1].read_text().splitlines()
    except FileNotFoundError:
        return []
    return [entry for line in lines if (entry := Entry(*json.loads(line))).task == task]


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.now", folder / f"{name}.deaths"


def _hung(folder: Path, name: str) -> Path:
    return folder / f"{name}.hung"


def _write(path: Path, entry: Entry) -> None:
    """Whole or not at all: others read it at any time."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    part.write_text(json.dumps([entry.task, entry.step, entry.since]))
    os.replace(part, path)


def _read(path: Path) -> Entry | None:
    try:
        return Entry(*json.loads(path.read_text()))
    except FileNotFoundError:
        return None
