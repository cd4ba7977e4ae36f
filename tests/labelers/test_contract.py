"""The contract suite: every labeler here keeps it, and each point of it notices what it is for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from small_builds import call_main

from fourmill.errors import ConfigError
from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, labelers
from fourmill.labelers.contract import check_labeler, failures, with_options
from fourmill.labels import Absent, Boxes, Label
from fourmill.modality import LabelContract, Modality

#: every labeler in the folder, a new one too; imported ones need labels to import, and are examined in a test of their own
OURS = {
    name: cls
    for name, cls in labelers.items()
    if cls.__module__.startswith("fourmill.labelers.") and not name.startswith("imported")
}
NETWORKS = [name for name, cls in OURS.items() if cls.default_model is not None]
PLAIN = [name for name in OURS if name not in NETWORKS]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """And no trace of labelers that leave traces."""
    torch.set_num_threads(1)
    state, environment = np.random.get_state(), dict(os.environ)
    yield
    np.random.set_state(state)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("name", ["det", *PLAIN])
def test_labelers_that_ship_keep_the_contract(name: str) -> None:
    """Of one without a network also the two points that take a process."""
    verdicts = check_labeler(name, alone=name == "oracle_semseg")
    assert failures(verdicts) == []
    assert sum(verdict.state == "ok" for verdict in verdicts) >= 12


@pytest.mark.long
def test_what_is_made_of_labels_keeps_the_contract_alone() -> None:
    assert failures(check_labeler("normal_from_depth")) == []


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_ship_keep_the_contract(name: str) -> None:
    verdicts = check_labeler(name)
    assert failures(verdicts) == []
    skipped = {verdict.point for verdict in verdicts if verdict.state == "skipped"}
    assert skipped == ({"odd sizes"} if name == "clip" else set())


# -- each point notices what it is for ----------------------------------------------------------------


class Good(Labeler):
    """float32 (H, W): the mean of the channels."""

    modality: ClassVar[Modality] = Modality(
        name="brightness",
        kind="grid",
        codec="vqvae",
        contract=LabelContract(form="map", dtype="float32", low=0.0, high=1.0),
    )

    def label(self, batch: LabelBatch) -> list[Label]:
        return [self.one(frame) for frame in batch.frames]

    def one(self, frame: np.ndarray) -> Label:
        return frame.mean(-1, dtype=np.float32) / 255


class TooBright(Good):
    def one(self, frame: np.ndarray) -> Label:
        return frame.mean(-1, dtype=np.float32)


class Random(Good):
    def one(self, frame: np.ndarray) -> Label:
        return np.random.default_rng().random(frame.shape[:2], np.float32)


class Moody(Good):
    """Every instance has a mind of its own."""

    made = 0

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        Moody.made += 1
        self.gain = np.float32(1 / (1 + Moody.made))

    def one(self, frame: np.ndarray) -> Label:
        return super().one(frame) * self.gain


class LooksAround(Good):
    """Scaled by the brightest picture of the batch."""

    def label(self, batch: LabelBatch) -> list[Label]:
        brightest = np.float32(max(max(frame.mean() for frame in batch.frames), 1))
        return [frame.mean(-1, dtype=np.float32) / (255 * brightest) for frame in batch.frames]


class CountsRows(Good):
    """The first row of a batch is another one to it."""

    def label(self, batch: LabelBatch) -> list[Label]:
        return [super(CountsRows, self).one(f) / (1 + row) for row, f in enumerate(batch.frames)]


class NoBlanks(Good):
    def one(self, frame: np.ndarray) -> Label:
        if not frame.any():
            raise ZeroDivisionError("a black picture")
        return super().one(frame)


class Wide(Good):
    def one(self, frame: np.ndarray) -> Label:
        return np.gradient(super().one(frame), axis=0).clip(0, 1)


class Scribbles(Good):
    def one(self, frame: np.ndarray) -> Label:
        label = super().one(frame)
        frame[0, 0] ^= 1
        return label


class HoldsAFunction(Good):
    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        self.scale = lambda values: values / 255


class TurnsThingsOff(Good):
    def load(self) -> None:
        torch.set_grad_enabled(False)
        os.environ["SOMETHING_OF_MINE"] = "1"

    def label(self, batch: LabelBatch) -> list[Label]:
        np.random.rand()
        return super().label(batch)


class Forgetful(Good):
    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "loaded": hasattr(self, "network")}

    def load(self) -> None:
        self.network = True


class NotJson(Good):
    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "sizes": np.array([1, 2])}


class OneTooMany(Good):
    def label(self, batch: LabelBatch) -> list[Label]:
        return [*super().label(batch), super().one(batch.frames[0])]


class NothingFound(Good):
    def one(self, frame: np.ndarray) -> Label:
        return Absent("not today")


class NotThatForm(Good):
    modality: ClassVar[Modality] = Modality(
        name="brightness", kind="vector", codec="vqvae", contract=Good.modality.contract
    )


class CropsOfMaps(Good):
    sees: ClassVar[str] = "crops"
    inputs: ClassVar[tuple[str, ...]] = ("crops",)


BAD: Mapping[type[Labeler], tuple[str, str]] = {
    TooBright: ("labels keep the contract", "above 1"),
    Random: ("same labels twice", "the same bytes are expected"),
    Moody: ("two instances agree", "the same bytes are expected"),
    LooksAround: ("independent of the batch size", "allowed is 0.001"),
    CountsRows: ("independent of the row order", "other labels altogether"),
    NoBlanks: ("blank rows", "ZeroDivisionError: a black picture"),
    Wide: ("odd sizes", "1 x 64 pixels"),
    Scribbles: ("leaves its inputs alone", "wrote into its batch"),
    HoldsAFunction: ("pickles", "cannot be pickled"),
    TurnsThingsOff: (
        "leaves global state alone",
        "changed numpy's random state, the environment variable SOMETHING_OF_MINE, torch's gradient mode",
    ),
    Forgetful: ("recipe is stable", "another one after load"),
    NotJson: ("recipe is stable", "no JSON"),
    OneTooMany: ("labels keep the contract", "5 labels, not a list of 4"),
    NothingFound: ("labels keep the contract", "every label is absent: not today"),
    NotThatForm: ("describes itself", "a vector cannot be made of map labels"),
    CropsOfMaps: ("describes itself", "set sees to 'image'"),
}


@pytest.mark.parametrize("cls", BAD, ids=lambda cls: cls.__name__)
def test_each_point_notices(cls: type[Labeler]) -> None:
    point, says = BAD[cls]
    found = {verdict.point: verdict for verdict in check_labeler(cls, alone=False)}
    assert found[point].state == "FAIL" and says in found[point].detail, found[point]


def test_a_good_one_passes_and_says_how_well() -> None:
    verdicts = {v.point: v for v in check_labeler(Good, alone=False)}
    assert failures(list(verdicts.values())) == []
    assert verdicts["independent of the batch size"].detail == "to the last bit"
    assert verdicts["loads offline"].state == verdicts["light to import"].state == "skipped"


def test_a_difference_within_the_tolerance_passes_and_is_named() -> None:
    class Rounds(Good):
        def label(self, batch: LabelBatch) -> list[Label]:
            return [label * np.float32(1 - 1e-6 * len(batch)) for label in super().label(batch)]

    verdicts = {v.point: v for v in check_labeler(Rounds, alone=False)}
    assert verdicts["independent of the batch size"].state == "ok"
    assert "not to the last bit" in verdicts["independent of the batch size"].detail


def test_upstream_labels_and_boxes_are_understood() -> None:
    class Nearest(Labeler):
        """The box around what is nearer than the mean, from depth."""

        modality: ClassVar[Modality] = Modality(
            name="near",
            kind="sequence",
            codec="boxes",
            contract=LabelContract(form="boxes", dtype="float32", classes=("near",)),
        )
        inputs: ClassVar[tuple[str, ...]] = ("label:depth",)

        def label(self, batch: LabelBatch) -> list[Label]:
            return [d if isinstance(d, Absent) else self.one(d) for d in batch.upstream["depth"]]

        def one(self, depth: np.ndarray) -> Boxes:
            rows, columns = np.nonzero(depth <= depth.mean())
            ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            xyxy = np.array([ends], np.float32) / np.array([*depth.shape[::-1]] * 2, np.float32)
            return Boxes(xyxy, np.zeros(1, np.int64), np.ones(1, np.float32))

    assert failures(check_labeler(Nearest, alone=False)) == []


ALONE = """
import {imports}
import socket
import numpy as np
from fourmill.labelers.base import Labeler
from fourmill.modality import LabelContract, Modality

class Shady(Labeler):
    modality = Modality(name="shady", kind="grid", codec="vqvae",
                        contract=LabelContract(form="map", dtype="float32", low=0.0, high=1.0))

    def load(self):
        if {calls}:
            socket.create_connection(("127.0.0.1", 9), timeout=0.1)

    def label(self, batch):
        return [frame.mean(-1, dtype=np.float32) / 255 for frame in batch.frames]
"""


@pytest.mark.parametrize(
    ("imports", "calls", "point", "says"),
    [
        ("torch", False, "light to import", "imports torch"),
        ("json", "__import__('os').environ.get('HF_HUB_OFFLINE')", "loads offline", "no network"),
    ],
)
def test_a_process_of_its_own_notices(
    imports: str, calls: Any, point: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"shady_{imports}"
    (tmp_path / f"{module}.py").write_text(ALONE.format(imports=imports, calls=calls))
    monkeypatch.syspath_prepend(tmp_path)
    verdicts = {v.point: v for v in check_labeler(import_module(module).Shady)}
    assert verdicts[point].state == "FAIL" and says in verdicts[point].detail
    assert len(failures(list(verdicts.values()))) == 1


def test_settings_and_unknown_names() -> None:
    settings = with_options(labelers.get("det"), min_score=0.25, precision="bf16")
    assert (settings.options, settings.precision, settings.modality) == ({"min_score": 0.25}, "bf16", "det")
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        check_labeler("detph")


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelers, "_known", {**dict(labelers.items()), "too_bright": TooBright})
    assert call_main("check-labeler", "oracle_depth", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and len(found["points"]) == 14
    assert call_main("check-labeler", "too_bright") == 1
    said = capsys.readouterr()
    assert "labels keep the contract" in said.out and "above 1" in said.out
    assert said.err.startswith("fourmill: labeler 'too_bright': ") and said.err.count("\n") == 1
    assert call_main("check-labeler", "det", "--set", "min_scoer=0.3") == 2
    assert "did you mean 'min_score'" in capsys.readouterr().err
    assert call_main("check-labeler", "depth", "--model", "./nowhere") == 1
    assert "'./nowhere' does not exist" in capsys.readouterr().err
