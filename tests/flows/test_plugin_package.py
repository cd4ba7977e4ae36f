"""A labeler in somebody else's package: built as a wheel, installed beside fourmill, and found by its entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_builds import environment, small_content, write_config

from fourmill.flows.new_labeler import new_labeler
from fourmill.shards.dataset import Dataset

HERE = Path(__file__).parents[1]  # where small_builds is


def run(*arguments: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process that sees what is installed in ``path`` beside what this one sees."""
    found = [str(entry) for entry in (path, HERE) if entry is not None]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment(PYTHONPATH=":".join(found)), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def install(package: Path, target: Path) -> Path:
    """Its wheel, built by its own build system and installed into a folder; nothing is fetched."""
    wheels = package.parent / "wheels"
    pip = ["-m", "pip", "--disable-pip-version-check"]
    built = run(
        *pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", wheels, package, cwd=package.parent
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    done = run(
        *pip, "install", "-q", "--no-deps", "--no-index", "--target", target, wheel, cwd=package.parent
    )
    assert done.returncode == 0, done.stderr
    wheel.unlink()
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("package")
    new_labeler("shiny", "vector", root)
    return install(root / "shiny", root / "site")


def test_it_is_listed_and_keeps_the_contract(installed: Path, tmp_path: Path) -> None:
    listed = run("-m", "fourmill", "labelers", "--json", cwd=tmp_path, path=installed)
    assert listed.returncode == 0, listed.stderr
    assert "shiny" in {card["name"] for card in json.loads(listed.stdout)}
    checked = run("-m", "fourmill", "check-labeler", "shiny", "--json", cwd=tmp_path, path=installed)
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)
    assert found["passed"]
    states = {point["point"]: point["state"] for point in found["points"]}
    assert states.pop("odd sizes") == "skipped" and set(states.values()) == {"ok"}
    without = run("-m", "fourmill", "check-labeler", "shiny", cwd=tmp_path)
    assert without.returncode == 2 and "unknown labeler 'shiny'" in without.stderr


def test_a_build_labels_and_tokenizes_with_it(installed: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", small_content(tmp_path / "ds", {"shiny": {}}, count=8))
    built = run("-m", "small_builds", "build", config, "--no-prefect", cwd=tmp_path, path=installed)
    assert built.returncode == 0, built.stderr
    dataset = Dataset(str(tmp_path / "ds"))
    columns = [
        dataset.column("shiny", short, 0) for short in dataset.recipes("shiny") if _is_token(dataset, short)
    ]
    assert [column.present.all() and column.tokens is not None for column in columns] == [True]


def _is_token(dataset: Dataset, short: str) -> bool:
    return dataset.receipt("shiny", short, 0).file.startswith("tokens/")


def test_a_name_that_is_taken_and_a_module_that_is_broken_are_one_line(tmp_path: Path) -> None:
    for name, module, says in (
        ("depth", "class Mine: pass", "labeler 'depth' is registered twice"),
        ("odd", "import nothing_like_this", "labeler 'odd' of the package odd-one cannot be imported"),
        (
            "even",
            "Mine = 3",
            "labeler 'even' of the package even-one: even_module:Mine is of type int, not a class",
        ),
    ):
        site = tmp_path / name
        info = site / f"{name}_one-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}_module.py").write_text(module)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-one\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fourmill.labelers]\n{name} = {name}_module:Mine\n")
        done = run("-m", "fourmill", "check-labeler", "oracle_depth", cwd=tmp_path, path=site)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
