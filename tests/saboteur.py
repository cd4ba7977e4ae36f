"""Processes that end in the middle of something: real SIGKILLs at chosen moments, in processes that tests do not start.

`packages` writes a ``sitecustomize`` that every Python process with it on its path runs first. It watches what the process
opens, links and removes, and what it notes in its journal (audit events of Python's and of ours), keeps a log of that,
and where an order says so, kills its own process.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SITE = '''
import os, sys

FOLDER = os.environ.get("SABOTEUR", "")
BUSY = False
ROLES = {b"ray::RunnerActor": "runner", b"ray::Specialist": "specialist"}


def role():
    with open("/proc/self/cmdline", "rb") as stream:
        title = stream.read()
    found = next((name for start, name in ROLES.items() if title.startswith(start)), "other")
    return "driver" if found == "other" and b"fourmill\\0build" in title else found


def hook(event, arguments):
    global BUSY
    if BUSY or event not in ("open", "os.link", "os.remove", "os.rename", "fourmill.begins", "fourmill.ends"):
        return
    path = arguments[1] if event in ("os.link", "os.rename") else arguments[0]
    path = path.decode() if isinstance(path, bytes) else path if isinstance(path, str) else ""
    if not any(part in path for part in ("/photos/", "/fourmill-", "/ds/")):
        return
    BUSY = True
    try:
        me = role()
        with open(FOLDER + "/log", "a") as log:
            log.write(me + " " + event + " " + path + "\\n")
        strike(me, event, path)
    finally:
        BUSY = False


def strike(me, event, path):
    """One process takes the first order that fits, and ends."""
    import json, signal
    for name in sorted(os.listdir(FOLDER)):
        if not name.startswith("order-"):
            continue
        try:
            with open(FOLDER + "/" + name) as stream:
                whom, what, where = json.load(stream)
            if (whom, what) == (me, event) and where in path:
                os.rename(FOLDER + "/" + name, FOLDER + "/done-" + name)
            else:
                continue
        except FileNotFoundError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)


if FOLDER:
    sys.addaudithook(hook)
'''


@dataclass(frozen=True)
class Order:
    """Kill the first process of this role that does ``event`` to a path with ``part`` in it."""

    role: str
    event: str
    part: str

    def __str__(self) -> str:
        return f"{self.role} {self.event} {self.part}"


#: moments of a shard's life, by who lives through them
RUNNER = {
    "reads an image": Order("runner", "open", "/photos/"),
    "has half written data": Order("runner", "os.link", "/ds/tokens/"),
    "has data and no receipt": Order("runner", "os.remove", "/ds/tokens/"),
    "has half written a receipt": Order("runner", "os.link", "/ds/receipts/"),
    "has a receipt": Order("runner", "os.remove", "/ds/receipts/"),
    "has samples and no receipt": Order("runner", "os.remove", "/ds/samples/"),
}
SPECIALIST = {
    "begins a modality": Order("specialist", "fourmill.begins", ".now"),
    "ends a modality": Order("specialist", "fourmill.ends", ".now"),
    "loads": Order("specialist", "open", "/ds/tokenizers/"),
}
DRIVER = {
    "has planned": Order("driver", "os.rename", "/ds/runs/"),
    "adds a tokenizer": Order("driver", "os.remove", "/ds/tokenizers/"),
    "sees a receipt": Order("driver", "open", "/ds/receipts/"),
}


class Saboteur:
    """A folder of orders and the log of what was done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "packages").mkdir(parents=True)
        (folder / "packages" / "sitecustomize.py").write_text(SITE)
        self._count = 0

    def environment(self) -> dict[str, str]:
        return {"SABOTEUR": str(self.folder), "PYTHONPATH": str(self.folder / "packages")}

    def order(self, *orders: Order) -> None:
        for order in orders:
            self._count += 1
            path = self.folder / f"new-{self._count:04d}"
            path.write_text(json.dumps([order.role, order.event, order.part]))
            os.replace(path, self.folder / f"order-{self._count:04d}")

    def open_orders(self) -> list[str]:
        return sorted(path.read_text() for path in self.folder.glob("order-*"))

    def withdraw(self) -> None:
        for path in self.folder.glob("order-*"):
            path.unlink(missing_ok=True)

    def kills(self) -> Counter[str]:
        """By role, since the beginning."""
        return Counter(json.loads(path.read_text())[0] for path in self.folder.glob("done-*"))

    def count(self, role: str, event: str, part: str) -> int:
        """How often processes of this role did such a thing."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return sum(1 for line in lines if line.startswith(f"{role} {event} ") and part in line)

    def forget(self) -> None:
        (self.folder / "log").unlink(missing_ok=True)


def random_orders(draw: random.Random, count: int) -> list[Order]:
    """Any role, any moment."""
    moments = [*RUNNER.values(), *SPECIALIST.values(), *DRIVER.values()]
    return [draw.choice(moments) for _ in range(count)]
