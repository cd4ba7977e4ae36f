"""What an actor was doing when it died, written where its successor and its runner on the same node can read it.

A process that is killed by the row it works on cannot say so. It therefore notes each task before it begins. Who finds
unfinished notes of a process that is gone knows the suspects: the tasks that were running (each thread has its own), not the
ones that were queued. The notes survive the process, not the node: when a node is lost nobody is suspected.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
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
        self._folder, self._name = folder, name
        hung = _read(folder / f"{name}.hung")
        for note in _notes(folder, name):
            if (entry := _read(note)) is not None:
                known = [entry.task, entry.step, entry.since, hung == entry]
                with (folder / f"{name}.deaths").open("a") as stream:
                    stream.write(json.dumps(known) + "\n")
                note.unlink()

    @contextmanager
    def entry(self, task: str, step: str) -> Iterator[None]:
        """``task`` is under way inside the block; an exception ends it as well as success does."""
        note = self._folder / f"{self._name}.{threading.get_ident()}.now"
        _write(note, Entry(task, step, time.time()))
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


def under_way(folder: Path, name: str) -> Entry | None:
    """What the actor of that name has been at for longest, or was when it died. None from another node."""
    entries = [entry for note in _notes(folder, name) if (entry := _read(note)) is not None]
    return min(entries, key=lambda entry: entry.since, default=None)


def note_hanging(folder: Path, name: str, entry: Entry) -> None:
    """To be called before the process is ended because ``entry`` takes too long."""
    _write(folder / f"{name}.hung", entry)


def deaths(folder: Path, name: str, task: str) -> list[Entry]:
    """The times that an actor of that name died while it worked on ``task``."""
    try:
        lines = (folder / f"{name}.deaths").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [entry for line in lines if (entry := Entry(*json.loads(line))).task == task]


def _notes(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}.*.now"))


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
