"""Conditions on scalar modalities, by which a snapshot chooses rows: ``clip_score >= 0.2``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.errors import ConfigError
from fourmill.labels import NOT_APPLICABLE
from fourmill.shards.arrow import Column

_COMPARE: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*")


@dataclass(frozen=True, slots=True)
class Condition:
    """Rows whose ``name`` compares so with ``value`` are chosen.

    A row without a value is not, except where its reason says that there was nothing to score (`NOT_APPLICABLE`).
    """

    name: str
    compare: str  # >=, <=, > or <
    value: float

    def __str__(self) -> str:
        return f"{self.name} {self.compare} {self.value:g}"

    def keeps(self, column: Column) -> np.ndarray:
        """bool (rows,)"""
        assert column.tokens is not None
        chosen = _COMPARE[self.compare](column.tokens.reshape(-1), np.float32(self.value))
        reasons = column.reasons.to_pylist()
        exempt = [reason is not None and reason.startswith(NOT_APPLICABLE) for reason in reasons]
        kept: np.ndarray = (chosen & column.present) | np.array(exempt, bool)
        return kept


def parse_conditions(texts: Sequence[str], where: str) -> tuple[Condition, ...]:
    """``where`` names the key of the configuration for ConfigError."""
    found = []
    for text in texts:
        match = _FORM.fullmatch(text)
        try:
            value = float(match[3]) if match else 0.0
        except ValueError:
            match = None
        if match is None:
            raise ConfigError(
                f"{where}: {text!r} is no condition; write it as MODALITY >= NUMBER (or <=, >, <)"
            )
        found.append(Condition(match[1], match[2], value))
    return tuple(found)
