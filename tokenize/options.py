"""Options of a configuration as fields of a dataclass: known by name, and of the type of their defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from fourmill.errors import ConfigError, nearest

#: the option that names a tokenizer whose encoder and codes are taken as they are, and its value that says: fit one first
ENCODER, FIRST = "encoder", "first"
_TOLD = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "a list"}


def typed(kind: type, values: Mapping[str, Any], where: str, what: str = "option") -> dict[str, Any]:
    """``values``, lists as tuples, to be given to the dataclass ``kind``, all of whose fields have defaults.

    ConfigError names ``where``.key: unknown, of another type, negative or not finite.
    """
    defaults = {field.name: field.default for field in fields(kind)}
    for name, value in values.items():
        if name not in defaults:
            raise ConfigError(f"{where}.{name}: unknown {what}{nearest(name, defaults)}")
        default = defaults[name]
        assert default is not MISSING
        expected = type(default)
        if not _fits(value, default):
            raise ConfigError(f"{where}.{name}: expected is {_TOLD[expected]}, got {value!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        like = default[0] if default else 0
        return isinstance(value, list | tuple) and all(_fits(entry, like) for entry in value)
    if isinstance(default, bool | str) or isinstance(value, bool):
        return type(value) is type(default)
    numbers = (int,) if isinstance(default, int) else (int, float)
    return isinstance(value, numbers) and math.isfinite(value) and value >= 0
