"""What an actor was at when it died, as those who come after it read it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

from fourmill.flows import journal
from fourmill.flows.journal import Entry, Journal

DIES = """
import os, signal, sys
from pathlib import Path
from fourmill.flows.journal import Journal
notes = Journal(Path(sys.argv[1]), "actor")
with notes.entry("first", "depth"):
    pass
with notes.entry("second", "det"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def doing(folder: Path) -> tuple[str, str] | None:
    entry = journal.under_way(folder, "actor")
    return None if entry is None else (entry.task, entry.step)


def test_what_is_under_way(tmp_path: Path) -> None:
    """A shorter note covers a longer one, and an exception ends one as well as success does."""
    notes = Journal(tmp_path, "actor")
    assert doing(tmp_path) is None
    for task in ("shard 12345 rows 0 to 15", "ü", "a"):
        try:
            with notes.entry(task, "depth"):
                assert doing(tmp_path) == (task, "depth")
                raise ValueError
        except ValueError:
            assert doing(tmp_path) is None
    assert journal.under_way(tmp_path, "another actor") is None


def test_of_two_threads_the_one_that_began_first(tmp_path: Path) -> None:
    notes = Journal(tmp_path, "actor")

    def second() -> None:
        with notes.entry("second", "det"):
            assert doing(tmp_path) == ("first", "depth")

    with notes.entry("first", "depth"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert doing(tmp_path) == ("first", "depth")
    assert doing(tmp_path) is None


def test_a_process_that_is_killed_has_said_at_what(tmp_path: Path) -> None:
    """Its successor notes it for ever, once; what had ended is not suspected."""
    died = subprocess.run([sys.executable, "-c", DIES, tmp_path], check=False)
    assert died.returncode == -signal.SIGKILL
    was = journal.under_way(tmp_path, "actor")
    assert was is not None and was.task == "second"
    journal.note_hanging(tmp_path, "actor", was)
    for _ in range(2):
        Journal(tmp_path, "actor")
        assert journal.deaths(tmp_path, "actor", "second") == [Entry("second", "det", was.since, hung=True)]
    assert journal.deaths(tmp_path, "actor", "first") == []
    assert doing(tmp_path) is None


def test_a_note_is_never_read_half_written(tmp_path: Path) -> None:
    notes = Journal(tmp_path, "actor")
    with notes.entry("first", "depth"):
        (path,) = tmp_path.glob("*.now")
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"first", b"fixst"))
        assert doing(tmp_path) is None
        path.write_bytes(whole)
        assert doing(tmp_path) == ("first", "depth")


def test_readers_and_a_writer_at_the_same_time(tmp_path: Path) -> None:
    """Whoever reads while notes are written over sees one of them, or that nothing is under way."""
    notes, done, seen = Journal(tmp_path, "actor"), threading.Event(), set()

    def write() -> None:
        for number in range(2000):
            with notes.entry(f"task {'x' * (number % 40)}", f"step {'y' * (number % 30)}"):
                pass
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        seen.add(doing(tmp_path))
    thread.join()
    assert seen and all(one is None or one[0].strip("x") == "task " for one in seen)
