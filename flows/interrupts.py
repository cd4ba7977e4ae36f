"""Ctrl-C and SIGTERM stop a run the same way: in good order, with exit status 3."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Interrupt:
    happened: bool = False


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
        interrupt.happened = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
