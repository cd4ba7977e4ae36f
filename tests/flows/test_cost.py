"""What the engine must not spend its time on."""

from __future__ import annotations

import pickle
import subprocess
import sys

from fourmill.flows.specialist import environment

RUNNER = """
import pickle, sys
import fourmill.flows.pool
found = pickle.load(sys.stdin.buffer)
assert found["torch"], found
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_a_runner_imports_no_network_library() -> None:
    """Two seconds and 300 MB each: it needs nothing of torch, and what specialists say of theirs must not bring it."""
    said = pickle.dumps(environment("cpu"))
    done = subprocess.run([sys.executable, "-c", RUNNER], input=said, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == "[]"
