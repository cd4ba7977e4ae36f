"""What an actor was doing when it died, written where its successor and its runner on the same node can read it.

A process that is killed by the row it works on cannot say so. It therefore notes each task before it begins. Who finds
unfinished notes of a process that is gone knows the suspects: the tasks that were running (each thread has its own), not the
ones that were queued. The notes survive the process, not the node: when a node is lost nobody is suspected.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READS = 50  # of a note that is being written at the same moment


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
        self._mine = threading.local()
        hung = _read(folder / f"{name}.hung")
        for note in _notes(folder, name):
            if (entry := _read(note)) is not None:
                known = [entry.task, entry.step, entry.since, hung == entry]
                with (folder / f"{name}.deaths").open("a") as stream:
                    stream.write(json.dumps(known) + "\n")
            note.unlink()

    @contextmanager
    def entry(self, task: str, step: str) -> Iterator[None]:
        """``task`` is under way inside the block; an exception ends it as well as success does.

        Both moments are audit events (``fourmill.begins``, ``fourmill.ends``), by which tests kill processes at them.
        """
        note = self._note()
        sys.audit("fourmill.begins", note.path)
        note.write(Entry(task, step, time.time()))
        try:
            yield
        finally:
            sys.audit("fourmill.ends", note.path)
            note.write(None)

    def _note(self) -> _Note:
        """This thread's own."""
        note: _Note | None = getattr(self._mine, "note", None)
        if note is None:
            path = self._folder / f"{self._name}.{threading.get_ident()}.now"
            note = self._mine.note = _Note(str(path))
        return note


class _Note:
    """A file that stays open and is written over: a tenth of what making and removing one for each task costs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  it is closed with its thread
        self._size = 0

    def write(self, entry: Entry | None) -> None:
        """In one call, so that a process that is killed leaves the old note or the new one. None: nothing is under way."""
        line = _line(entry)
        self._size = max(self._size, len(line))  # what was longer is covered with blanks
        os.pwrite(self._file.fileno(), line.ljust(self._size), 0)


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
    """None where there is no such folder: on another node."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(folder / file for file in names if file.startswith(f"{name}.") and file.endswith(".now"))


def _write(path: Path, entry: Entry) -> None:
    """Whole or not at all: others read it at any time."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    part.write_bytes(_line(entry))
    os.replace(part, path)


def _line(entry: Entry | None) -> bytes:
    """With a checksum, by which a reader knows that it met a writer."""
    text = b"" if entry is None else json.dumps([entry.task, entry.step, entry.since]).encode()
    return b"%08x %b" % (zlib.crc32(text), text)


def _read(path: Path) -> Entry | None:
    """None where there is no such note, or nothing is under way."""
    for _ in range(READS):
        try:
            check, _, text = path.read_bytes().rstrip().partition(b" ")
        except FileNotFoundError:
            return None
        if not text:
            return None
        if check == b"%08x" % zlib.crc32(text):
            return Entry(*json.loads(text))
    return None
