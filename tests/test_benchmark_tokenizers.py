"""The benchmark of tokenizers runs, and its name keeps nobody beside it from the library of the same name."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_memory_of_a_quantizer() -> None:
    """One step at 16,384 codes: far less than a matrix of vectors by codes, which would have 392 MiB."""
    command = [sys.executable, str(FOLDER / "tokenizers.py"), "--quick", "--only", "b,c"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["b"] is None and "not measured" in done.stdout
    assert 4 < found["c"]["ours_peak_mib"] < 40


def test_the_library_is_found_from_beside_it() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tokenizers import Tokenizer; assert sys.path[0] == sys.argv[1]"
    done = subprocess.run([sys.executable, "-c", code, FOLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
