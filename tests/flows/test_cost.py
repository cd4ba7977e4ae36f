"""What the engine does not spend its time on, and that nothing is lost by it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_builds import small_config

from fourmill.flows.micro_batch import Failure, MicroResult
from fourmill.flows.reading import Reader
from fourmill.flows.resolve import resolve
from fourmill.flows.specialist import environment
from fourmill.labelers.figures import Measures
from fourmill.labels import Absent
from fourmill.shards.decode import Frame, RejectedImage
from fourmill.shards.sources.base import RawSample

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


def test_a_result_travels_as_few_arrays_and_arrives_as_it_was() -> None:
    tokens = np.arange(24, dtype=np.uint16).reshape(6, 4)
    result = MicroResult(
        values={
            "depth": [list(tokens[0:2]), Absent("depth hung"), list(tokens[2:4]), list(tokens[4:6])],
            "det": [[tokens[0][:3]], [tokens[1]], Absent("n/a: none"), [tokens[2][:0]]],
            "pixels": [[b"ab"], [b"c"], [b""], [b"d"]],
            "caption": [Absent("no caption")] * 4,
        },
        labels={"depth": [np.ones((2, 2)), Absent("depth hung"), np.zeros((2, 2)), np.ones((2, 2))]},
        measured={"depth": Measures.of([{"mean": 1.0}] * 4, [{"a": 1.0}] * 4)},
        failed={"clip": Failure("clip", "clip hung", "it hung", fatal=True)},
        seconds={"forward depth": 0.5},
    )
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) <= 1 + 3 + 3 + 3, "one of depth, each of det, of labels, of measures"
    arrived = pickle.loads(sent, buffers=buffers)  # noqa: S301  our own, as Ray would
    assert arrived.failed == result.failed and arrived.seconds == result.seconds
    assert arrived.measured["depth"].seen.all()
    np.testing.assert_equal(arrived.labels, result.labels)
    for name, column in result.values.items():
        for cell, there in zip(arrived.values[name], column, strict=True):
            assert isinstance(cell, Absent) == isinstance(there, Absent)
            np.testing.assert_equal(cell, there)
            if isinstance(there, list) and isinstance(there[0], np.ndarray):
                assert [part.dtype for part in cell] == [part.dtype for part in there]


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_frames_come_back_in_the_order_of_their_rows(count: int, tmp_path: Path) -> None:
    """Whichever thread decoded them, and beside rows that are not read."""
    reader = Reader(resolve(small_config(tmp_path / "ds", {"caption": {}})))
    raw: list[RawSample | Exception] = [
        RawSample(np.full((16 + i, 16 + i, 3), i, np.uint8), (str(i),)) for i in range(count)
    ]
    if count > 2:
        raw[2] = RejectedImage("truncated")
    skip = [None] * count + ["duplicate key"]
    decoded = reader.decode(raw, skip)
    assert decoded.pop() == ("duplicate key", ())
    for i, (frame, captions) in enumerate(decoded):
        if i == 2:
            assert (frame, captions) == ("truncated", ())
        else:
            assert isinstance(frame, Frame) and (frame.width, captions) == (16 + i, (str(i),))
