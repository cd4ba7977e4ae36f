"""``fourmill new-labeler``: a labeler that works as it is written, with its test, to be changed into one's own.

By default it is a package of its own: a folder with pyproject.toml (and in it the entry point by which fourmill finds
the labeler), the labeler's file, and its test. In a checkout of fourmill the file and its test alone will do.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jinja2

from fourmill.config import NAME
from fourmill.errors import ConfigError, nearest
from fourmill.flows.options import LabelerKind
from fourmill.labelers.base import labelers
from fourmill.modality import SOURCE_MODALITIES

KINDS = get_args(LabelerKind)
_IMPORTS = (
    "from fourmill.labelers.base import LabelBatch, LabelerSettings",
    "from fourmill.labelers.contract import check_labeler, failures",
    "from fourmill.labels import Label",
)


@dataclass(frozen=True, slots=True)
class Written:
    """The new files, and the commands that come next."""

    files: tuple[Path, ...]
    commands: tuple[str, ...]


def new_labeler(name: str, kind: str, folder: Path, into: Path | None = None) -> Written:
    """Write the labeler ``name`` into ``folder``/name, or ``into`` the labelers of a checkout; overwrites nothing.

    ConfigError for a name that is none or is taken, an unknown kind, files that exist, and an ``into`` that is not
    the folder `labelers` of a checkout.
    """
    if kind not in KINDS:
        raise ConfigError(f"--kind {kind}: unknown kind{nearest(kind, KINDS)}")
    _check_name(name)
    files = _package(name, kind, folder / name) if into is None else _one_file(name, kind, into)
    there = [path for path in files if path.exists()]
    if there:
        raise ConfigError(f"{there[0]} exists already; choose another name, or remove it")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as sink:
            sink.write(text)
    where = folder / name
    first = (f"pip install -e {where}", f"pytest {where}")
    second = tuple(f"pytest {path}" for path in files if path.name.startswith("test_"))
    return Written(tuple(files), (*(second if into else first), f"fourmill check-labeler {name}"))


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        near = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        hint = f"; {near!r} is one" if NAME.fullmatch(near) and not keyword.iskeyword(near) else ""
        raise ConfigError(
            f"{name!r} is not a name for a labeler (lower case letters, digits, underscores){hint}"
        )
    modalities = {cls.modality.name for _, cls in labelers.items()} | set(SOURCE_MODALITIES)
    if name in labelers or name in modalities:
        what = "labeler" if name in labelers else "modality"
        raise ConfigError(f"there is a {what} {name!r} already; choose another name")


def _package(name: str, kind: str, folder: Path) -> dict[Path, str]:
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another name, or remove it")
    module = f"{name}_labeler"
    values = _values(name, kind, module)
    return {
        folder / "pyproject.toml": _render("pyproject.toml.j2", values),
        folder / f"{module}.py": _render(f"labeler_{kind}.py.j2", values),
        folder / f"test_{name}.py": _render("test.py.j2", values),
    }


def _one_file(name: str, kind: str, into: Path) -> dict[Path, str]:
    tests = into.resolve().parent / "tests" / "labelers"
    if not ((into / "base.py").is_file() and tests.is_dir()):
        raise ConfigError(
            f"--into {into}: not the folder `labelers` of a checkout of fourmill; without --into a package is written"
        )
    if name in sys.stdlib_module_names:
        raise ConfigError(f"{name!r} is a module of the standard library; choose another name")
    values = _values(name, kind, f"fourmill.labelers.{name}")
    return {
        into / f"{name}.py": _render(f"labeler_{kind}.py.j2", values),
        tests / f"test_{name}.py": _render("test.py.j2", values),
    }


def _values(name: str, kind: str, module: str) -> dict[str, str]:
    words = name.split("_")
    cls = "".join(word.capitalize() for word in words) + "Labeler"
    own = f"from {module} import {cls}"
    in_checkout = module.startswith("fourmill.")
    imports = sorted([*_IMPORTS, own], key=str.lower) if in_checkout else [*_IMPORTS, own]
    return {
        "name": name,
        "kind": kind,
        "cls": cls,
        "module": module,
        "title": " ".join(words).strip().capitalize(),
        "imports": "\n".join(["", *imports] if in_checkout else imports),
    }


def _render(template: str, values: Mapping[str, str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fourmill.flows", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Python and TOML; the name has been checked
    )
    text = environment.get_template(template).render(**values)
    return text.rstrip("\n") + "\n"
