"""Ctrl-C and SIGTERM stop a run the same way: in good order, with exit status 3.

Ctrl-C stops at once. So does SIGTERM, except where work is handed out in pieces: there the first one asks for no new piece
to be begun (`drainable`), as a machine that is about to be taken away does, and the second one stops at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Interrupt:
    happened: bool = False


@dataclass
class Drain:
    """``asked``: when SIGTERM came, in `time.monotonic` seconds; None while it has not."""

    asked: float | None = None


_drains: list[Drain] = []


@contextmanager
def drainable() -> Iterator[Drain]:
    """In the block the first SIGTERM is noted, and raises nothing."""
    drain = Drain()
    _drains.append(drain)
    try:
        yield drain
    finally:
        _drains.remove(drain)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """SIGINT and SIGTERM raise KeyboardInterrupt in the block, and are remembered.

    Remembered, because a library in between may turn the exception into another one. Outside the main thread, where
    Python handles no signals, this does nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGTERM and _drains and _drains[-1].asked is None:
            _drains[-1].asked = time.monotonic()
            return
        interrupt.happened = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
