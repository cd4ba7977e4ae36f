"""One writer at a time, on a store that cannot refuse a second one by itself.

Where there is no conditional put, two flows on one dataset could both win. A flow that is told to be the only one therefore
keeps a small file there, and writes it again every few seconds. Another one that finds it younger than two minutes, by the
store's own clock, is refused; an older one is what a flow that died has left, and is taken over. Two that begin at the
same moment both write, wait, and look whose words are still there. This is a net for mistakes and no lock: a flow that was stopped
for minutes and goes on does not know that it lost its place until it looks again.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fourmill.errors import ConfigError, WorkMissing
from fourmill.retries import is_bad_luck
from fourmill.storage import Store

LEASE = ".writer.json"
EXPIRES_S = 120.0
RENEW_S = 20.0
SETTLE_S = 1.0
_log = logging.getLogger(__name__)


class Lease:
    """A lease that is held. ``is_lost`` becomes true when another flow has taken it over; `check` raises then."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="writer-lease", daemon=True)
        self._broken: Exception | None = None  # what ended the thread that was to renew it
        self.is_lost = False

    def acquire(self) -> None:
        """ConfigError where another flow holds it."""
        self._refuse(_age(self._store))
        self._write()
        self._stop.wait(SETTLE_S)
        if not self._is_mine():
            self._refuse(0.0)

    def start(self) -> None:
        """Renew it in the background until `release`."""
        self._thread.start()

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if not self._is_mine():
                    self.is_lost = True
                    return
                self._write()
            except Exception as error:  # noqa: BLE001 what is no bad luck is raised by `check`, in the flow's thread
                if not (isinstance(error, OSError) or is_bad_luck(error)):
                    self._broken = error
                    return
                _log.warning("%s/%s could not be renewed: %s", self._store.url, LEASE, error)

    def check(self) -> None:
        """Raises WorkMissing where another flow has taken over, and what keeps the lease from being renewed."""
        if self._broken is not None:
            raise self._broken
        if self.is_lost:
            raise WorkMissing(
                f"{self._store.url}: another flow took over while this one stood still for more than "
                f"{EXPIRES_S / 60:.0f} minutes; let that one finish, and then run this command again"
            )

    def release(self) -> None:
        """Give it back. The thread ends first: it must not write after that."""
        self._stop.set()
        self._thread.join()
        if self._is_mine():
            self._store.remove(LEASE)
        else:
            self.is_lost = True

    def _refuse(self, age: float | None) -> None:
        if age is not None and age < EXPIRES_S:
            holder = _content(self._store).get("owner", "another process")
            raise ConfigError(
                f"{self._store.url} is being written by {holder} (engine.single_writer), last seen {age:.0f} s ago; "
                f"wait for it, or stop it and try again {EXPIRES_S / 60:.0f} minutes later"
            )

    def _write(self) -> None:
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._store.put(LEASE, json.dumps({"owner": owner, "token": self._token}).encode())

    def _is_mine(self) -> bool:
        return _content(self._store).get("token") == self._token


@contextmanager
def single_writer_lease(store: Store) -> Iterator[Lease]:
    """Be the only writer of ``store`` inside the block.

    ConfigError: another flow is at work there. WorkMissing, at the end: another one has taken over meanwhile.
    """
    lease = Lease(store)
    lease.acquire()
    lease.start()
    try:
        yield lease
    finally:
        lease.release()
    lease.check()


def _age(store: Store) -> float | None:
    """Seconds since the lease was written, by the store's clock; None where nobody holds it."""
    if _content(store).get("token") is None:
        return None
    now = store.now()
    try:
        return max(0.0, now - store.entry(LEASE).modified)
    except FileNotFoundError:
        return None  # it was released meanwhile


def _content(store: Store) -> dict[str, str]:
    """Of the lease that is there; {} where there is none, or none that can be read."""
    try:
        found = json.loads(store.read_if_exists(LEASE) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
