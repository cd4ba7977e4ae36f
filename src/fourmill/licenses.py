"""Licences of weights: where a checkpoint names its own, and what a name means for whoever uses what was made.

A licence is an SPDX id ("Apache-2.0") where there is one, else a short name. What nobody named is `UNKNOWN`, never
taken to be free.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from fourmill.checkpoints import CONFIG, Checkpoint, cached_file

UNKNOWN = "unknown"
#: ids as SPDX writes them, of licences that allow any use; some of them ask to be named
PERMISSIVE = (
    "Apache-2.0", "MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib", "BSL-1.0", "CC0-1.0",
    "CC-BY-3.0", "CC-BY-4.0", "Unlicense",
)  # fmt: skip
_OTHERS = (
    "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "GPL-3.0", "AGPL-3.0",
)  # fmt: skip
_SPDX = {name.lower(): name for name in (*PERMISSIVE, *_OTHERS)}  # the hub writes them in lower case
_NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?commercial|research", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(\n|\Z)", re.DOTALL)

Terms = Literal["permissive", "non-commercial", "conditions", "unknown"]
#: what each kind of terms means for a dataset
ADVICE: dict[Terms, str] = {
    "permissive": "",
    "non-commercial": "read its terms before labels or models made with it are sold or served",
    "conditions": "its terms have conditions that fourmill does not know: read them",
    "unknown": "nobody named it: look it up, and name it with `license:` in the configuration",
}


def terms(license: str) -> Terms:
    """What kind of licence a name stands for; one that is not known here has conditions."""
    if not license or license.lower() in (UNKNOWN, "other"):
        return "unknown"
    if _SPDX.get(license.lower()) in PERMISSIVE:
        return "permissive"
    return "non-commercial" if _NON_COMMERCIAL.search(license) else "conditions"


def in_checkpoint(checkpoint: Checkpoint) -> str | None:
    """The licence that a checkpoint names for itself, or None. Of a hub id only what the local cache holds is read."""
    if checkpoint.folder is not None:
        return in_folder(checkpoint.folder)
    readme = cached_file(checkpoint, "README.md")
    return _named(_front_matter(readme)) if readme is not None else None


def in_folder(folder: Path) -> str | None:
    """``license`` of card.yaml, of README.md's front matter, or of config.json; the first that has one."""
    return (
        _named(_yaml(_text(folder / "card.yaml")))
        or _named(_front_matter(folder / "README.md"))
        or _named(_json(_text(folder / CONFIG)))
    )


def _named(content: Any) -> str | None:
    """The hub's cards say ``license: other`` and ``license_name: ...`` for what has no SPDX id."""
    if not isinstance(content, dict):
        return None
    named = content.get("license")
    if str(named).lower() == "other":
        named = content.get("license_name") or named
    if isinstance(named, list):
        return " and ".join(_spelt(one) for one in named) or None
    return _spelt(named) if named else None


def _spelt(name: Any) -> str:
    return _SPDX.get(str(name).lower(), str(name))


def _front_matter(readme: Path) -> Any:
    found = _FRONT_MATTER.match(_text(readme))
    return _yaml(found[1]) if found else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _yaml(text: str) -> Any:
    """None for what cannot be read: it names no licence, and the licence stays `UNKNOWN`, which is shown."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _json(text: str) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None
