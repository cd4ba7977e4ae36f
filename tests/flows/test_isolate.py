"""Finding the rows that a specialist cannot take: every pattern of bad rows, without any process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.flows.isolate import Died, settle
from fourmill.flows.micro_batch import Failure, MicroBatch, MicroResult
from fourmill.labels import Absent

NEEDS = {"depth": ["depth", "normal"], "normal": ["normal"], "semseg": ["semseg"]}


def batch_of(count: int, absent: Sequence[int] = ()) -> MicroBatch:
    frames = [np.full((2, 2, 3), row + 1, np.uint8) for row in range(count)]
    present = np.array([row not in absent for row in range(count)])
    sizes, crops = np.full((count, 2), 2, np.int32), np.zeros((count, 1, 5), np.int32)
    keys = [str(row) for row in range(count)]
    return MicroBatch("shard 0 rows 0 to 9", keys, frames, present, sizes, crops, [("a",)] * count)


class Network:
    """Answers with what it sees. ``bad``: step -> rows that it fails at, as ``how`` says."""

    def __init__(self, bad: dict[str, set[int]], how: str = "raises", innocent: int = 0) -> None:
        self.bad, self.how, self.innocent, self.calls = bad, how, innocent, 0

    def __call__(self, batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str]) -> MicroResult:
        self.calls += 1
        result = MicroResult()
        assert [*labels, *tokens], "nothing to do"
        seen = {row for row in range(len(batch.keys)) if batch.present[row]}
        for row in set(range(len(batch.keys))) - seen:
            assert not batch.frames[row].any() or row in self.absent
        for step, rows in self.bad.items():
            hurt = [name for name in [*labels, *tokens] if name in NEEDS[step]]
            if hurt and (seen & rows or -1 in rows):
                if self.how == "dies":
                    raise Died(step, "killed its process")
                for name in hurt:
                    result.failed[name] = Failure(step, f"{step} raised ValueError", "ValueError: no")
        if self.innocent:
            self.innocent -= 1
            raise Died("depth", "killed its process")
        for names, columns in ((labels, result.labels), (tokens, result.values)):
            for name in names:
                if name not in result.failed:
                    columns[name] = [int(frame[0, 0, 0]) for frame in batch.frames]  # type: ignore[misc]
        return result

    absent: frozenset[int] = frozenset()


def run(
    network: Network, batch: MicroBatch, names: Sequence[str], limit: int = 99
) -> tuple[MicroResult, list[str]]:
    result, failed = settle(
        lambda: network(batch, [], names), batch, [], names,
        again=network, dependents=lambda step: NEEDS[step], limit=limit,
    )  # fmt: skip
    return result, [name for error in failed for name in error.names]


@given(
    count=st.integers(1, 20),
    data=st.data(),
    how=st.sampled_from(["raises", "dies"]),
    limit=st.integers(0, 20),
)
def test_exactly_the_bad_rows_are_set_aside(count: int, data: st.DataObject, how: str, limit: int) -> None:
    rows = st.sets(st.integers(0, count - 1))
    absent = data.draw(rows)
    bad = {"depth": data.draw(rows) - absent, "semseg": data.draw(rows) - absent}
    network = Network({step: found for step, found in bad.items() if found}, how)
    network.absent = frozenset(absent)
    batch = batch_of(count, sorted(absent))
    result, failed = run(network, batch, ["depth", "normal", "semseg"], limit)
    for name, step in (("depth", "depth"), ("normal", "depth"), ("semseg", "semseg")):
        if len(bad[step]) > limit:
            assert name in failed and name not in result.values
            continue
        assert name not in failed
        for row in set(range(count)) - absent:
            cell = result.values[name][row]
            if row in bad[step]:
                why = "raised ValueError" if how == "raises" else "killed its process"
                assert isinstance(cell, Absent) and cell.reason == f"{step} {why}"
            else:
                assert cell == row + 1
    assert set(result.failed) == set()


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_one_bad_row_costs_few_calls(how: str) -> None:
    """Halving: two calls per level, one with blanks, and where a process died each once more."""
    for count in (16, 64, 255):
        network = Network({"depth": {count // 3}}, how)
        result, _ = run(network, batch_of(count), ["depth"])
        assert isinstance(result.values["depth"][count // 3], Absent)
        assert network.calls <= 2 * ceil(log2(count)) + 5


def test_a_process_that_is_killed_once_is_no_suspicion() -> None:
    network = Network({}, innocent=1)
    result, failed = run(network, batch_of(8), ["depth", "semseg"])
    assert network.calls == 2 and not failed
    assert result.values == {"depth": list(range(1, 9)), "semseg": list(range(1, 9))}


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_labeler_that_fails_on_blanks_too_is_given_up_at_once(how: str) -> None:
    network = Network({"depth": {-1}}, how)
    result, failed = run(network, batch_of(64), ["depth", "normal", "semseg"])
    assert sorted(failed) == ["depth", "normal"]
    assert result.values["semseg"] == list(range(1, 65)), "the others are made"
    assert network.calls <= 5


def test_rows_that_are_bad_together_alone_are_all_made() -> None:
    """Two rows that do no harm one by one: nothing is set aside."""

    def pair(batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str]) -> MicroResult:
        if batch.present[1] and batch.present[6]:
            return MicroResult(failed={"depth": Failure("depth", "depth raised", "no")})
        return MicroResult(values={"depth": [int(frame[0, 0, 0]) for frame in batch.frames]})  # type: ignore[misc]

    batch = batch_of(8)
    first: Callable[[], MicroResult] = lambda: pair(batch, [], ["depth"])
    result, failed = settle(
        first, batch, [], ["depth"], again=pair, dependents=lambda step: NEEDS[step], limit=0
    )
    assert result.values["depth"] == list(range(1, 9)) and not failed
