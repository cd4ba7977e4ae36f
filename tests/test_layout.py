"""The rules of the house that no other test would notice: packaging, who may import whom, sizes, no machine's paths."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("labelers", "tokenize", "shards", "train", "flows")
LINKS = (*ROOMS, "configs")
#: room -> the rooms that it may import; the ground floor is open to everybody
MAY_IMPORT = {
    "ground floor": set(),
    "labelers": set(),
    "shards": set(),
    "tokenize": {"shards"},
    "train": {"shards", "tokenize"},
    "flows": {"labelers", "tokenize", "shards", "train"},
}
MOST_LINES = 400
#: a folder of somebody's machine: a home, or where a checkout happened to lie
MACHINE_PATH = re.compile(rb"/(?:home|root|Users|work)/[\w.]|[A-Z]:\\\\?Users")


def room_files(room: str) -> list[Path]:
    if room == "ground floor":
        return sorted((ROOT / "src" / "fourmill").glob("*.py"))
    return sorted((ROOT / room).rglob("*.py"))


def all_files() -> list[Path]:
    """What is in the repository: as git says, or, outside a checkout, what is not hidden or made."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        names = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    else:
        made = {"data", "runs", "build"}
        names = [
            path
            for top in ROOT.iterdir()
            if not top.name.startswith(".") and top.name not in made
            for path in ([top] if top.is_file() else top.rglob("*"))
        ]
    return [path for path in names if path.is_file() and not path.is_symlink()]


def rooms_imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of a room, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            parts = name.split(".")
            if parts[0] == "fourmill" and len(parts) > 1 and parts[1] in ROOMS:
                yield node.lineno, parts[1]


def run_python(code: str, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tokenize_has_no_init_and_the_others_have() -> None:
    assert not (ROOT / "tokenize" / "__init__.py").exists()
    for room in ROOMS:
        assert room == "tokenize" or (ROOT / room / "__init__.py").is_file(), room


@pytest.mark.parametrize("name", LINKS)
def test_rooms_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "src" / "fourmill" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{name}"
    assert link.resolve() == (ROOT / name).resolve()


def test_stdlib_tokenize_wins_at_the_root() -> None:
    """With the root first on the path, as `python -c`, spawned children and Ray's workers have it."""
    where = run_python("import sys, tokenize; assert sys.path[0] == ''; print(tokenize.__file__)", ROOT)
    assert Path(where).name == "tokenize.py"
    assert ROOT not in Path(where).parents or ".venv" in Path(where).parts


def test_our_tokenize_is_a_subpackage_everywhere(tmp_path: Path) -> None:
    code = "import fourmill.tokenize.base as b, traceback, linecache; print(b.__file__)"
    for cwd in (ROOT, tmp_path):
        assert Path(run_python(code, cwd)).resolve() == ROOT / "tokenize" / "base.py"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_floors_below(room: str) -> None:
    files = room_files(room)
    assert files, f"{room} has no files: the test looks in the wrong place"
    wrong = []
    for file in files:
        if room == "ground floor" and file.name == "__main__.py":
            continue  # the door: `python -m fourmill` is the command line
        for line, other in rooms_imported(ast.parse(file.read_text())):
            if other != room and other not in MAY_IMPORT[room]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {other}")
    assert not wrong, wrong


def test_imports_within_the_house_begin_with_its_name() -> None:
    """`import shards.x` from the root also works, and makes a second class of everything in it."""
    wrong = []
    for room in MAY_IMPORT:
        for file in room_files(room):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = ["." * node.level + (node.module or "")]
                heads = {name.split(".")[0] for name in names}
                if heads & ({"", "configs"} | (set(ROOMS) - {"tokenize"})):
                    wrong.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {names}")
    assert not wrong, wrong


def test_no_module_hides_one_of_the_standard_library() -> None:
    modules = [file for room in MAY_IMPORT for file in room_files(room)]
    hiding = [str(file.relative_to(ROOT)) for file in modules if file.stem in sys.stdlib_module_names]
    assert not hiding


def test_files_are_one_idea_each() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for room in MAY_IMPORT
        for file in room_files(room)
        if (lines := len(file.read_text().splitlines())) > MOST_LINES
    }
    assert not long, f"these want to be two ideas: {long}"


def test_nothing_mentions_a_machine() -> None:
    found = []
    for file in all_files():
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            if file.suffix not in (".safetensors", ".png", ".jpg") and MACHINE_PATH.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line[:80]!r}")
    assert not found, found


def test_configurations_and_weights_are_found_through_the_package(tmp_path: Path) -> None:
    code = (
        "from fourmill.config import find_config; from fourmill.checkpoints import shipped_folder;"
        "print(find_config('demo').is_file(), shipped_folder('depth').is_dir(), "
        "shipped_folder('scenes/rgb').is_dir())"
    )
    assert run_python(code, tmp_path) == "True True True"
