"""The tokenizers of a configuration as a table: what their cards say, and where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill.config import Config
from fourmill.flows.resolve import resolve
from fourmill.tokenize.base import load_codec

_OF_CODES = ("num_labels", "decoded", "codebook_use", "perplexity")


def tokenizers_table(config: Config, names: Sequence[str] | None) -> Group:
    """Of ``names``, or of all modalities that have one. Folders stand below, whole."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("modality", "codes", "held-out figures", "codebook use", "perplexity"):
        table.add_column(heading, justify="left" if heading in ("modality", "held-out figures") else "right")
    resolved = resolve(config)
    folders = {n: w.tokenizer_folder for n, w in resolved.wanted.items() if w.tokenizer_folder is not None}
    shown = {n: Path(folder) for n, folder in folders.items() if names is None or n in names}
    for name, folder in shown.items():
        codes = load_codec(folder, resolved.wanted[name].modality, config.image_size).modality.vocab_size
        table.add_row(name, f"{codes:,}" if codes else "", *_held_out(folder))
    lines = [Text(f"{name}: {_place(config, name, folder)}", style="dim") for name, folder in shown.items()]
    return Group(table, *lines)


def _held_out(folder: Path) -> tuple[str, str, str]:
    """(figures, codebook use, perplexity) of its card, empty where it has none."""
    card = folder / "card.yaml"
    found: Mapping[str, Any] = (yaml.safe_load(card.read_text()) or {}) if card.is_file() else {}
    figures = found.get("held_out") or {}
    text = ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if key not in _OF_CODES)
    use, perplexity = figures.get("codebook_use"), figures.get("perplexity")
    return text, "" if use is None else f"{use:.1%}", "" if perplexity is None else f"{perplexity:.1f}"


def _place(config: Config, name: str, folder: Path) -> str:
    """The folder in the dataset, also where a copy of remote storage was read."""
    given = config.modalities[name].tokenizer.model
    if given is not None:
        return str(given)
    return str(folder) if "://" not in config.dataset else f"{config.dataset}/tokenizers/{name}"
