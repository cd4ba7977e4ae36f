"""The contract suite: what every labeler owes to the flow, as a library.

``check_labeler("depth")`` loads the labeler, shows it made-up pictures in every way in which the flow may, and gives
one verdict per point. The tests run it on every labeler here, ``fourmill check-labeler`` on any, and the test of a
labeler in somebody else's package should be little more than::

    assert not failures(check_labeler(MyLabeler))
"""

from __future__ import annotations

import json
import pickle
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, labelers
from fourmill.labelers.contract_alone import changes, is_named, process_state, start_alone
from fourmill.labelers.contract_inputs import (
    N_CROPS,
    ODD_SIZES,
    USUAL_SIZES,
    NothingToShow,
    blanked,
    digest_of,
    furthest,
    make_batch,
    take,
    with_upstream,
    wrong_declaration,
)
from fourmill.labelers.quality import check
from fourmill.labels import Absent, Label, is_fault

#: How far labels of another batch shape may be apart, as a share of their range, by precision.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
ALONE_S = 600  # for a process of its own to import, load and label

OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one point. ``detail``: one line; of a failure what was seen, of a skipped point why."""

    point: str
    state: Literal["ok", "FAIL", "skipped"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.point}: {self.state}{f' ({self.detail})' if self.detail else ''}"


class _Broken(Exception):
    """A point that does not hold."""


class _NotAsked(Exception):
    """A point that says nothing about this labeler."""


def failures(verdicts: Sequence[Verdict]) -> list[str]:
    """The points that failed, as lines; [] for a labeler that keeps its contract."""
    return [str(verdict) for verdict in verdicts if verdict.state == FAIL]


def check_labeler(
    labeler: str | type[Labeler], settings: LabelerSettings | None = None, *, alone: bool = True
) -> list[Verdict]:
    """One verdict per point, whatever the labeler raises; ConfigError for an unknown name alone.

    ``settings``: as the configuration would give them; by default those of an empty entry. ``alone=False`` skips
    the two points that take a process of their own (some seconds with a network).
    """
    cls = labelers.get(labeler) if isinstance(labeler, str) else labeler
    try:
        full = with_upstream(cls, settings or LabelerSettings(cls.modality.name))
    except NothingToShow as why:
        return [Verdict("inputs", "skipped", str(why))]
    return list(_Suite(cls, full, alone).verdicts())


class _Suite:
    """One labeler under examination. Points are methods; they return a detail, or raise."""

    def __init__(self, cls: type[Labeler], settings: LabelerSettings, alone: bool) -> None:
        self.cls, self.settings = cls, settings
        self.process = start_alone(cls, settings) if alone else None
        self.said: dict[str, Any] | None = None  # by the process
        self.changed: list[str] = []
        self.first: Labeler | None = None
        self.batch: LabelBatch | None = None
        self.labels: list[Label] = []

    def verdicts(self) -> Iterator[Verdict]:
        points: list[tuple[str, Callable[[], str]]] = [
            ("describes itself", self.describes),
            ("recipe is stable", self.recipe),
            ("labels keep the contract", self.contract),
            ("same labels twice", self.twice),
            ("two instances agree", self.instances),
            ("independent of the batch size", self.batch_size),
            ("independent of the row order", self.row_order),
            ("blank rows", self.blank_rows),
            ("odd sizes", self.odd_sizes),
            ("leaves its inputs alone", self.inputs),
            ("pickles", self.pickles),
            ("leaves global state alone", self.globals),
            ("light to import", self.light),
            ("loads offline", self.offline),
        ]
        try:
            for name, point in points:
                yield _verdict(name, point)
        finally:
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    # -- what it says of itself -----------------------------------------------------------------------

    def describes(self) -> str:
        wrong = wrong_declaration(self.cls, self.cls.modality)
        described = self._new().describe()
        wrong = wrong or wrong_declaration(self.cls, described)
        if (
            described.name != self.cls.modality.name
            or described.contract.form != self.cls.modality.contract.form
        ):
            wrong = (
                f"describe() gives {described.contract.form} {described.name!r}, the class declares "
                f"{self.cls.modality.contract.form} {self.cls.modality.name!r}"
            )
        has_channels = described.contract.form in ("features", "vector") or described.contract.channels == 0
        if not wrong and has_channels and not described.contract.channels:
            wrong = f"describe() leaves contract.channels at {described.contract.channels}; say how many there are"
        if wrong:
            raise _Broken(wrong)
        return f"{described.name}, a {described.kind} of {described.contract.form} labels"

    def recipe(self) -> str:
        recipes = [self._new().recipe() for _ in range(2)]
        loaded = self._loaded()
        loaded.label(self._batch())
        recipes.append(loaded.recipe())
        try:
            texts = [json.dumps(recipe, sort_keys=True) for recipe in recipes]
        except TypeError as error:
            raise _Broken(f"recipe() is no JSON: {error}") from error
        if texts[0] != texts[1]:
            raise _Broken("two instances with the same settings have different recipes")
        if texts[0] != texts[2]:
            raise _Broken("the recipe is another one after load() and label()")
        version = recipes[0].get("version")
        return f"version {version}" if version is not None else ""

    # -- labels ---------------------------------------------------------------------------------------

    def contract(self) -> str:
        labels = self._label(self._loaded(), self._batch())
        self.labels = labels
        absent = [label.reason for label in labels if isinstance(label, Absent)]
        if len(absent) == len(labels):
            if not any(is_fault(reason) for reason in absent):
                raise _NotAsked(f"nothing in the made-up inputs is of its kind: {absent[0]}")
            raise _Broken(f"every label is absent: {absent[0]}")
        return f"{len(labels)} labels" + (f", {len(absent)} of them absent" if absent else "")

    def twice(self) -> str:
        return self._same(self._label(self._loaded(), self._batch()), exact=True)

    def instances(self) -> str:
        other = self._new()
        other.load()
        return self._same(self._label(other, self._batch()), exact=True)

    def batch_size(self) -> str:
        batch = self._batch()
        return self._same(
            [x for row in range(len(batch)) for x in self._label(self._loaded(), take(batch, [row]))]
        )

    def row_order(self) -> str:
        batch, per_row = self._batch(), self._per_row
        order = list(reversed(range(len(batch))))
        made = self._label(self._loaded(), take(batch, order))
        return self._same([x for row in order for x in made[row * per_row : (row + 1) * per_row]])

    def blank_rows(self) -> str:
        """Rows that were set aside: nothing of them is used, the others' labels are what they were."""
        batch, per_row = self._batch(), self._per_row
        gone, kept = [1, 3], [0, 2]
        made = self._label(self._loaded(), blanked(batch, gone))
        rows = [i for row in kept for i in range(row * per_row, (row + 1) * per_row)]
        said = self._same([made[i] for i in rows], reference=[self._reference()[i] for i in rows])
        self._label(self._loaded(), blanked(batch, range(len(batch))))
        return said

    def odd_sizes(self) -> str:
        if self.cls.sees == "crops":
            raise _NotAsked("it sees crops, which have one size")
        for number, size in enumerate(ODD_SIZES):
            try:
                self._label(self._loaded(), make_batch(self._loaded(), [size], first=50 + number))
            except Exception as error:
                raise _Broken(f"{size[0]} x {size[1]} pixels (height x width): {_words(error)}") from error
        return ", ".join(f"{height} x {width}" for height, width in ODD_SIZES)

    def inputs(self) -> str:
        """In their own memory, where a write shows; the flow's arrays may be read-only."""
        batch = take(self._batch(), range(len(self._batch())))
        before = _inputs_digest(batch)
        self._loaded().label(batch)
        if _inputs_digest(batch) != before:
            raise _Broken("label() wrote into its batch; copy what it changes")
        for array in [*batch.frames, *([] if batch.crops is None else [batch.crops])]:
            array.setflags(write=False)
        self._loaded().label(batch)
        return ""

    # -- where it runs --------------------------------------------------------------------------------

    def pickles(self) -> str:
        if not is_named(self.cls):
            raise _NotAsked("a class in a function or a script cannot be imported by its name")
        try:
            data = pickle.dumps(self._new())
        except Exception as error:  # whatever its attributes raise
            raise _Broken(f"an instance that is not loaded cannot be pickled: {_words(error)}") from error
        other: Labeler = pickle.loads(data)  # noqa: S301 - the bytes are ours, of the line above
        other.load()
        return self._same(self._label(other, self._batch()), exact=True)

    def globals(self) -> str:
        self._loaded()
        if self.changed:
            raise _Broken(f"load() or label() changed {', '.join(self.changed)}")
        return ""

    def light(self) -> str:
        heavy = self._alone().get("heavy", [])
        if heavy:
            raise _Broken(f"importing {self.cls.__module__} imports {', '.join(heavy)}; import it in load()")
        return ""

    def offline(self) -> str:
        said = self._alone()
        if said.get("failed"):
            raise _Broken(str(said["failed"]))
        if self._per_row and said["labels"] != digest_of(self._reference()):
            raise _Broken("the labels that a process of its own makes are not those that were made here")
        return "in a process of its own, the same labels"

    # -- what they share ------------------------------------------------------------------------------

    @property
    def _per_row(self) -> int:
        return N_CROPS if self.cls.sees == "crops" else 1

    def _new(self) -> Labeler:
        return self.cls(self.settings)

    def _loaded(self) -> Labeler:
        """The instance that most points ask. Its first steps are watched for what they do to this process."""
        if self.first is None:
            labeler = self._new()
            before = process_state()
            labeler.load()
            self.batch = make_batch(labeler, USUAL_SIZES)
            labeler.label(self.batch)
            self.changed = changes(before, process_state())
            self.first = labeler
        return self.first

    def _batch(self) -> LabelBatch:
        self._loaded()
        assert self.batch is not None
        return self.batch

    def _reference(self) -> list[Label]:
        if not self.labels:
            raise _NotAsked("there are no labels to compare with")
        return self.labels

    def _label(self, labeler: Labeler, batch: LabelBatch) -> list[Label]:
        """Labels, checked against the contract where the row is present."""
        labels = labeler.label(batch)
        if not isinstance(labels, list) or len(labels) != len(batch) * self._per_row:
            found = f"{len(labels)} labels" if isinstance(labels, list) else f"a {type(labels).__name__}"
            raise _Broken(
                f"label() gave {found}, not a list of {len(batch) * self._per_row} ({_shape(self.cls)})"
            )
        live = [i for i in range(len(labels)) if batch.present[i // self._per_row]]
        check(
            labeler.describe(),
            [labels[i] for i in live],
            [batch.frames[i // self._per_row] for i in live],
            [batch.keys[i // self._per_row] for i in live],
        )
        return labels

    def _same(self, made: Sequence[Label], reference: Sequence[Label] = (), exact: bool = False) -> str:
        distance = furthest(reference or self._reference(), made)
        if distance == 0:
            return "" if exact else "to the last bit"
        allowed = TOLERANCE.get(self.settings.precision, TOLERANCE["fp32"])
        if exact or distance > allowed:
            most = "the same bytes are expected" if exact else f"allowed is {allowed:g}"
            how = "other labels altogether" if distance >= 1 else f"apart by {distance:.2g} of their range"
            raise _Broken(f"{how}; {most}")
        return f"not to the last bit: apart by {distance:.1g} of their range, allowed is {allowed:g}"

    def _alone(self) -> dict[str, Any]:
        """What the process of its own says."""
        if self.process is None:
            raise _NotAsked("no process of its own was asked for, or its class cannot be imported by name")
        if self.said is None:
            try:
                out, problems = self.process.communicate(timeout=ALONE_S)
                self.said = dict(json.loads(out.strip().splitlines()[-1]))
            except subprocess.TimeoutExpired:
                self.said = {"failed": f"it took more than {ALONE_S} s"}
            except (ValueError, IndexError):
                last = problems.strip().splitlines()
                self.said = {
                    "failed": last[-1] if last else f"it ended with status {self.process.returncode}"
                }
        return self.said


def _verdict(name: str, point: Callable[[], str]) -> Verdict:
    try:
        return Verdict(name, "ok", point())
    except (_NotAsked, NothingToShow) as why:
        return Verdict(name, "skipped", str(why))
    except _Broken as why:
        return Verdict(name, "FAIL", str(why))
    except Exception as error:  # noqa: BLE001 - somebody else's code: whatever it raises is the finding
        return Verdict(name, "FAIL", _words(error))


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def _shape(cls: type[Labeler]) -> str:
    return "one per row and crop" if cls.sees == "crops" else "one per row"


def _inputs_digest(batch: LabelBatch) -> str:
    upstream = [label for labels in batch.upstream.values() for label in labels]
    truth = [value for row in batch.truth for value in (row or {}).values()]
    crops = [] if batch.crops is None else [batch.crops]
    rest = [list(batch.keys), list(batch.captions), sorted(batch.upstream)]
    return digest_of([*batch.frames, *crops, batch.present, *upstream, *truth, *rest])


def with_options(cls: type[Labeler], **options: Any) -> LabelerSettings:
    """Settings of an empty entry with these options (and ``model``, ``revision``, ``precision``) set."""
    known = {
        name: options.pop(name) for name in ("model", "revision", "precision", "device") if name in options
    }
    return replace(LabelerSettings(cls.modality.name, options=options), **known)
