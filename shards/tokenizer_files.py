"""The files of a tokenizer in a dataset: which hash to the folder's name, and sums of them all beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fourmill.checkpoints import identity_of
from fourmill.storage import Store

#: as `sha256sum` writes it: the card does not enter a tokenizer's identity, and is to be found when it is damaged too
SUMS = "SHA256SUMS"


def write_sums(store: Store, folder: str, later: Sequence[Path]) -> None:
    """Sums of what lies in the folder and of what will, unless they were written before."""
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in later}
    sums |= {name: _sum(store, f"{folder}/{name}") for name in store.names(folder) if name != SUMS}
    store.put_if_absent(f"{folder}/{SUMS}", _text(sums))


def check_tokenizer(store: Store, folder: str, short: str) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) of every file that is missing or not what it was."""
    there = {name: _sum(store, f"{folder}/{name}") for name in store.names(folder) if name != SUMS}
    if not identity_of(there).startswith(short):
        yield folder, "is damaged: its files do not hash to its name"
    raw = store.read_if_exists(f"{folder}/{SUMS}")
    if raw is None:  # it was added before there were sums
        return
    sums: dict[str, str] = {}
    for line in raw.decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        sums[name] = digest
    if _text(sums) != raw:
        yield f"{folder}/{SUMS}", "is damaged: it is not as it was written"
    for name in sorted({*there, *sums}):
        if there.get(name) != sums.get(name):
            yield f"{folder}/{name}", "is missing" if name not in there else f"is not what {SUMS} says"


def _text(sums: dict[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def _sum(store: Store, name: str) -> str:
    return hashlib.sha256(store.read(name)).hexdigest()
