"""What stands behind options of the command line, as values; ConfigError where it cannot be that."""

from __future__ import annotations

from typing import Any

from fourmill.errors import ConfigError, nearest

ALL_REASONS = "all"


def shard_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, separator, last = text.partition(":")
    if not (separator and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ConfigError(f"--shards {text}: write it as A:B with A < B, for example 0:4")
    return int(first), int(last)


def slice_of(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, separator, parts = text.partition("/")
    if not (separator and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ConfigError(f"--slice {text}: write it as I/N with 0 <= I < N, for example 0/8 to 7/8")
    return int(part), int(parts)


def reasons(text: str | None) -> bool | str:
    """All reasons (True), one of them, or none (False)."""
    if text is None:
        return False
    return True if text == ALL_REASONS else text


def known_names(names: list[str] | None, known: Any) -> list[str] | None:
    for name in names or []:
        if name not in known:
            raise ConfigError(f"--modality {name}: not in the configuration{nearest(name, known)}")
    return names or None


def with_optional_values(arguments: list[str]) -> list[str]:
    """``--retry-rejects`` with nothing after it, or with an option, means all reasons; typer knows no such thing."""
    out = []
    for argument, after in zip(arguments, [*arguments[1:], "--"], strict=True):
        out.append(argument)
        if argument == "--retry-rejects" and after.startswith("-"):
            out.append(ALL_REASONS)
    return out
