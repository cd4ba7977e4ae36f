"""The benchmark of the engine runs, and says what it measured. What it measured is nobody's business here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "engine.py"
FIGURES = {"against", "engine_per_s", "other_per_s", "ratio", "min", "max", "aim", "pairs"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=kept,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
@pytest.mark.long
def test_trivial_networks() -> None:
    """Every side of (c) goes through all of its stages, and each line is the median of its pairs."""
    found = last_line(run("--quick", "--only", "c"))
    assert found["benchmark"] == "engine"
    assert {"c1", "c2"} <= found.keys() and not {"a", "b"} & found.keys()
    for line in (found["c1"], found["c2"]):
        assert line.keys() == FIGURES
        assert line["pairs"] == 1 and line["min"] == line["ratio"] == line["max"]
        assert line["ratio"] == pytest.approx(line["engine_per_s"] / line["other_per_s"], rel=0.01)
    assert found["c1"]["engine_per_s"] == found["c2"]["engine_per_s"]


@pytest.mark.ray
@pytest.mark.long
def test_networks_that_wait_cannot_be_beaten() -> None:
    """No window is faster than its waits: the figure is not made of images that were counted twice."""
    found = last_line(run("--quick", "--only", "a"))
    assert found["a"]["other_per_s"] == 50
    assert 0 < found["a"]["max"] <= 1.001


def test_a_case_that_is_none() -> None:
    done = run("--only", "a,z")
    assert done.returncode == 2
    assert "no case 'z'; there are a, b, c" in done.stderr
