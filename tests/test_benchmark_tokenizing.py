"""The benchmark of tokenizers runs; nothing in its folder has the name of a library that scripts there import."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_memory_of_a_quantizer() -> None:
    """One step at 16,384 codes: far less than a matrix of vectors by codes, which would have 392 MiB."""
    command = [sys.executable, str(FOLDER / "tokenizing.py"), "--quick", "--only", "b,c"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["b"] is None and "not measured" in done.stdout
    assert 4 < found["c"]["ours_peak_mib"] < 40


def test_no_benchmark_hides_a_library() -> None:
    """Whoever runs a script of a folder finds the modules of that folder first."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    installed = {*packages_distributions(), *sys.stdlib_module_names}
    assert [name for name in names if name in installed] == []
