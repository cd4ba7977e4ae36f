"""``fourmill import-labels``: what lies at a URL, how much of it answers to the source's keys, and the configuration for it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from rich.table import Table
from rich.text import Text

from fourmill.config import Config, load_config
from fourmill.errors import ConfigError, nearest
from fourmill.labelers.base import LabelerSettings, labelers
from fourmill.labelers.imported import PREFIX, Imported
from fourmill.labels import Absent
from fourmill.modality import SOURCE_MODALITIES
from fourmill.shards.sources.base import make_source

EXAMPLES = 3
TRIED = 16  # labels that are decoded


@dataclass(frozen=True)
class Found:
    """``rows`` of the source, of which ``matched`` have one of the ``labels`` that are in so many ``files``."""

    modality: str
    entry: dict[str, Any]  # for the configuration
    files: int
    labels: int
    rows: int
    matched: int
    without_label: list[str]  # examples of keys
    without_image: list[str]
    tried: int
    faults: list[str] = field(default_factory=list)

    def yaml_lines(self) -> str:
        return yaml.safe_dump(
            {self.modality: self.entry}, sort_keys=False, default_flow_style=None, width=100
        )


def examine(
    config: Config, modality: str, url: str, kind: str | None = None, options: Sequence[str] | None = None
) -> Found:
    """List the labels and the source, match their keys, and decode a few. Touches nothing.

    ``kind``: which of the imported labelers reads them; by default the one that is called like the modality.
    ``options``: KEY=VALUE of that labeler.
    """
    if modality in SOURCE_MODALITIES:
        raise ConfigError(f"{modality} comes from the source itself; it cannot be imported")
    name = _labeler(modality, kind)
    entry = {"labeler": name, "url": url, **_options(name, options)}
    given = {key: value for key, value in entry.items() if key != "labeler"}
    labeler = cast(Imported, labelers.get(name)(LabelerSettings(modality, options=given)))
    labeler.describe()
    names = labeler.names()
    source = make_source(config.source.kind, **config.source.options)
    rows = matched = 0
    claimed: set[str] = set()
    without: list[str] = []
    tried: list[str] = []
    for row in source.rows():
        rows += 1
        if row.key in names:
            matched += 1
            claimed.add(names[row.key])
            tried += [row.key] if len(tried) < TRIED else []
        elif len(without) < EXAMPLES:
            without.append(row.key)
    frame = np.zeros((64, 64, 3), np.uint8)
    made = [labeler.one(key, frame) for key in tried]
    return Found(
        modality=modality,
        entry=entry,
        files=len(labeler.shelf.files),
        labels=len(set(names.values())),
        rows=rows,
        matched=matched,
        without_label=without,
        without_image=sorted(set(names.values()) - claimed)[:EXAMPLES],
        tried=len(made),
        faults=[label.reason for label in made if isinstance(label, Absent)],
    )


def _labeler(modality: str, kind: str | None) -> str:
    kinds = [name.removeprefix(PREFIX) for name in labelers.names() if name.startswith(PREFIX)]
    chosen = kind or modality
    if chosen not in kinds:
        what = f"--modality-kind {kind}" if kind else f"{modality}: say what it is with --modality-kind"
        raise ConfigError(f"{what}{nearest(chosen, kinds) if kind else '; known: ' + ', '.join(kinds)}")
    return f"{PREFIX}{chosen}"


def _options(name: str, options: Sequence[str] | None) -> dict[str, Any]:
    known = [key for key in labelers.get(name).options if key != "url"]
    found = {}
    for text in options or ():
        key, separator, value = text.partition("=")
        if not separator or key not in known:
            raise ConfigError(
                f"--set {text}: {name} has no such option{nearest(key, known)}; write it as key=value"
            )
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: not a YAML value: {' '.join(str(error).split())}") from error
    return found


def found_table(found: Found) -> Table:
    table = Table(
        "", "", title=f"labels for {found.modality}", title_justify="left", box=None, pad_edge=False
    )
    share = found.matched / found.rows if found.rows else 0.0
    lines: list[tuple[str, str]] = [
        ("files", f"{found.files:,}"),
        ("labels in them", f"{found.labels:,}"),
        ("images of the source", f"{found.rows:,}"),
        ("images with a label", f"{found.matched:,} ({share:.1%})"),
    ]
    if found.without_label:
        lines.append(("images without one, such as", ", ".join(found.without_label)))
    if found.without_image:
        lines.append(("labels without an image, such as", ", ".join(found.without_image)))
    lines.append(("labels that were decoded", f"{found.tried}, {len(found.faults)} of them faulty"))
    lines += [("", fault) for fault in found.faults[:EXAMPLES]]
    for name, value in lines:
        table.add_row(Text(name), Text(value, overflow="fold"))
    return table


# -- writing the configuration ------------------------------------------------------------------------


def add_to_config(path: Path, found: Found) -> None:
    """Add the modality's lines to the file, and leave every other line as it is.

    ConfigError, and an untouched file, where the modality is there already or `modalities:` is no block of lines.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} is no file of yours that could be written to; copy the configuration first"
        )
    text = path.read_text()
    before = load_config(path).modalities
    if found.modality in before:
        raise ConfigError(f"{path}: modalities.{found.modality} is there already; put the lines in its place")
    lines = text.splitlines(keepends=True)
    at = next((i for i, line in enumerate(lines) if re.match(r"modalities:\s*(#.*)?$", line)), None)
    if at is None or at + 1 == len(lines):
        raise ConfigError(f"{path}: no block of lines under `modalities:`; add the lines by hand")
    following = next(
        (line for line in lines[at + 1 :] if line.strip() and not line.lstrip().startswith("#")), ""
    )
    indent = following[: len(following) - len(following.lstrip())] or "  "
    added = "".join(f"{indent}{line}\n" for line in found.yaml_lines().splitlines())
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join([*lines[: at + 1], added, *lines[at + 1 :]]))
    try:
        _check_added(load_config(temporary).modalities, before, found, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_added(after: Mapping[str, Any], before: Mapping[str, Any], found: Found, path: Path) -> None:
    others = {name: entry for name, entry in after.items() if name != found.modality}
    if others != dict(before) or found.modality not in after:
        raise ConfigError(f"{path}: its lines cannot be added to safely; add them by hand")
