"""Finding the rows that a specialist cannot take, and saving the rest of their micro-batch.

A labeler that raises, breaks its contract, kills its process or hangs does so for some rows or for all. Rows are blanked, not
taken out: a micro-batch always has one shape, so what the other rows give is what they would have given anyway. Halving
finds k bad rows of B in about 2 k log2 B calls. Nothing here knows of Ray: a call either returns or raises `Died`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fourmill.errors import FourmillError
from fourmill.flows.micro_batch import Failure, MicroBatch, MicroResult

#: (micro-batch, modalities whose labels are wanted, modalities to tokenize) -> result; may raise Died
Attempt = Callable[[MicroBatch, Sequence[str], Sequence[str]], MicroResult]
#: a modality -> the modalities that cannot be made without it, itself among them
Dependents = Callable[[str], Iterable[str]]


class Died(Exception):
    """The process that ran this very micro-batch ended, or was ended, while it worked on the modality ``step``."""

    def __init__(self, step: str, how: str) -> None:
        super().__init__(f"{step} {how}")
        self.failure = Failure(step, f"{step} {how}", f"{step} {how}", fatal=True)


class LabelerFailed(FourmillError):
    """``names`` cannot be made: it is not the rows, or more rows are bad than may be."""

    def __init__(self, names: Sequence[str], why: str) -> None:
        super().__init__(why)
        self.names = tuple(names)


def settle(
    first: Callable[[], MicroResult],
    batch: MicroBatch,
    labels: Sequence[str],
    tokens: Sequence[str],
    *,
    again: Attempt,
    dependents: Dependents,
    limit: int,
) -> tuple[MicroResult, list[LabelerFailed]]:
    """What can be made of a micro-batch, and what cannot be made at all.

    ``first`` gives the result of the call that is under way. At most ``limit`` rows are set aside for one cause.
    """
    total, given_up = MicroResult(), []
    names = [*dict.fromkeys([*labels, *tokens])]
    died: set[str] = set()
    call: Callable[[], MicroResult] = first
    while names:
        try:
            made = call()
            failed = made.failed
            total.add(made)
            names = [name for name in failed if name in names]
        except Died as death:
            step = death.failure.step
            failed = {name: death.failure for name in dependents(step) if name in names}
            if step not in died:  # an innocent process is killed once in a while: the same again
                died.add(step)
                failed = {}
        for step in dict.fromkeys(failure.step for failure in failed.values()):
            part = [name for name in names if name in failed and failed[name].step == step]
            try:
                total.add(
                    _halve(failed[part[0]], batch, _only(labels, part), _only(tokens, part), again, limit)
                )
            except LabelerFailed as error:
                given_up.append(error)
        names = [name for name in names if name not in failed]

        def call(names: Sequence[str] = names) -> MicroResult:
            return again(batch, _only(labels, names), _only(tokens, names))

    return total, given_up


def _halve(
    failure: Failure, batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str], again: Attempt, limit: int
) -> MicroResult:  # fmt: skip
    """Find the rows that these modalities cannot be made of, set them aside, and make the others."""
    names = [*dict.fromkeys([*labels, *tokens])]

    def attempt(rows: Sequence[int]) -> MicroResult | Failure:
        try:
            made = again(batch.blanked(rows), labels, tokens)
        except Died as death:
            return death.failure
        return next(iter(made.failed.values()), made)

    result = attempt([])
    if isinstance(result, Failure):
        raise LabelerFailed(names, f"{failure.text}; with blank images alone: {result.text}")
    work = _halves([int(row) for row in np.flatnonzero(batch.present)])
    bad = 0
    while work:
        rows = work.pop()
        made = attempt(rows)
        if isinstance(made, Failure) and made.fatal and len(rows) == 1:
            made = attempt(rows)  # in another process: twice is proof
        if isinstance(made, MicroResult):
            result.take_rows(made, rows)
        elif len(rows) > 1:
            work += _halves(rows)
        else:
            bad += 1
            if bad > limit:
                raise LabelerFailed(names, f"more than {limit} rows are set aside, the last for: {made.text}")
            result.set_aside(rows[0], made.reason)
    return result


def _halves(rows: list[int]) -> list[list[int]]:
    middle = (len(rows) + 1) // 2
    return [part for part in (rows[:middle], rows[middle:]) if part]


def _only(names: Sequence[str], some: Sequence[str]) -> list[str]:
    return [name for name in names if name in some]
