"""Which tokenizer a decoder is fitted to: `modalities.NAME.tokenizer.encoder`, as a folder on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourmill.checkpoints import SHIPPED, shipped_folder
from fourmill.errors import ConfigError
from fourmill.shards.dataset import Dataset
from fourmill.shards.receipts import SHORT
from fourmill.tokenize.options import ENCODER, FIRST

_HASH = re.compile(rf"[0-9a-f]{{{SHORT},64}}")


def with_encoder(dataset: Dataset | None, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a modality's fit, with its encoder as a folder: of this dataset where a hash is given.

    ``dataset`` None: it is not built yet. ConfigError, which names the key, where there is none.
    """
    given = options.get(ENCODER)
    if not isinstance(given, str) or given == FIRST:
        return dict(options)
    where = f"modalities.{name}.tokenizer.{ENCODER}"
    if not _HASH.fullmatch(given):
        folder = _folder(given)
        if not folder.is_dir():
            raise ConfigError(
                f"{where}: {given!r} is neither a folder of a tokenizer, nor the hash of one in this dataset, nor {FIRST!r}"
            )
        return {**options, ENCODER: str(folder)}
    short = given[:SHORT]
    if dataset is None or short not in dataset.tokenizers(name):
        known = ", ".join(dataset.tokenizers(name) if dataset is not None else ()) or "none"
        raise ConfigError(f"{where}: the dataset has no tokenizer {short} of {name}; there are {known}")
    return {**options, ENCODER: str(dataset.tokenizer_folder(name, short))}


def _folder(given: str) -> Path:
    return (
        shipped_folder(given.removeprefix(SHIPPED)) if given.startswith(SHIPPED) else Path(given).expanduser()
    )
