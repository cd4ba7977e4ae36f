"""The errors that a user meets. Each message is one line: what, where, and what to do.

``exit_code`` is what the command line returns: 1 failed, 2 wrong usage, config or source,
3 stopped with work missing.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class FourmillError(Exception):
    """Base of every error that is reported as one line, without a traceback."""

    exit_code = 1


class ConfigError(FourmillError):
    """The configuration, the usage or the dataset's identity is wrong."""

    exit_code = 2


class SourceError(FourmillError):
    """The source cannot be listed, is empty, or has no readable image."""

    exit_code = 2


class CheckpointError(FourmillError):
    """A network, tokenizer or training checkpoint is missing, damaged or of the wrong kind."""


class ContractError(FourmillError):
    """A labeler or tokenizer broke its label contract (dtype, shape, range)."""


class DatasetError(FourmillError):
    """The dataset on storage is damaged or disagrees with itself."""


class WorkMissing(FourmillError):
    """The run ended in good order with work missing: parked shards, stale receipts or a stop."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ``"; did you mean 'depth'?"`` or the list of what exists."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else "".join(traceback.format_exception_only(error)).strip()
