"""What a tree of tars says of itself (export.json), and what a file for ``--modalities`` says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fourmill.errors import ConfigError, DatasetError
from fourmill.shards.export import MARKER
from fourmill.storage import Store

T = TypeVar("T")
MAX_TOKENS, MAX_VOCABULARY = 1 << 20, 1 << 16  # of a crop; ids are stored as uint16


class ModalityEntry(BaseModel):
    """One modality of a tree, as a file says it. What is not said comes from export.json, or from the name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str | None = None
    kind: Literal["grid", "vector", "sequence", "embedding", "scalar"] | None = None
    form: Literal["boxes", "text", "metadata", "palette", "poses"] | None = None
    vocab_size: int | None = Field(default=None, ge=1, le=MAX_VOCABULARY)
    num_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    classes: list[str] | None = None
    tokenizer: str | None = None
    vocabulary: str | None = None


class TreeConfig(BaseModel):
    """A file for ``--modalities``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int | None = Field(default=None, ge=16, le=1024)
    seed: int | None = Field(default=None, ge=0)
    val_fraction: float | None = Field(default=None, ge=0, lt=1)
    n_crops: int | None = Field(default=None, ge=1, le=64)
    modalities: dict[str, ModalityEntry | None] = {}


def facts_of(url: str) -> dict[str, Any]:
    """The tree's export.json; {} where it has none."""
    raw = Store(url).read_if_exists(MARKER)
    if raw is None:
        return {}
    try:
        facts = dict(json.loads(raw))
        if not isinstance(facts.get("modalities", {}), dict) or not isinstance(
            facts.get("dataset", {}), dict
        ):
            raise TypeError("no modalities")
    except (ValueError, TypeError, RecursionError) as error:
        raise DatasetError(f"{url}/{MARKER} is damaged: {error}") from error
    if not facts.get("complete"):
        raise DatasetError(f"{url}: this export is not complete; run the same export again first")
    return facts


def told_by(facts: Mapping[str, Any], url: str) -> TreeConfig:
    """The numbers of the dataset that was exported."""
    try:
        said = facts.get("dataset", {})
        return TreeConfig.model_validate(
            {k: said.get(k) for k in TreeConfig.model_fields if k != "modalities"}
        )
    except ValidationError as error:
        raise DatasetError(f"{url}/{MARKER} is damaged: {' '.join(str(error).split())[:200]}") from error


def first(*values: T | None) -> T:
    """The first that is not None; the last never is."""
    return next(value for value in values if value is not None)


def given_in(file: str | None) -> TreeConfig:
    if file is None:
        return TreeConfig()
    try:
        return TreeConfig.model_validate(yaml.safe_load(Path(file).read_text()) or {})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(
            f"{file}: {'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r:.60})"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
