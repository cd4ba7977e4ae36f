"""What is measured of labels, added up by shard, and judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.labelers.clip import CLIP
from fourmill.labelers.depth import DEPTH
from fourmill.labelers.det import DET
from fourmill.labelers.figures import (
    FIGURES,
    TOKEN_FIGURES,
    Limit,
    Measures,
    Tally,
    figure_names,
    judge,
)
from fourmill.labelers.measure import measure, measure_tokens
from fourmill.labelers.normal import NORMAL
from fourmill.labelers.semseg import SEMSEG
from fourmill.labels import Absent, Boxes
from fourmill.modality import CAPTION, RGB, LabelContract, Modality

CLASSES = SEMSEG.with_classes(("floor", "wall", "sphere"))
BOXES = DET.with_classes(("cat", "dog"))
SCORE = Modality(
    name="score", kind="scalar", contract=LabelContract(form="scalar", dtype="float32", low=-1, high=1)
)
FLAT = np.full((40, 30), 2.0, np.float32)
NORMALS = np.zeros((40, 30, 3), np.float32)
NORMALS[..., 2] = 1


def of_row(measures: Measures, row: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """Figures and shares of one row, without what it does not have."""
    figures = dict(zip(measures.figures, measures.values[row].tolist(), strict=True))
    shares = dict(zip(measures.bins, measures.shares[row].tolist(), strict=True))
    return {n: v for n, v in figures.items() if not np.isnan(v)}, {n: v for n, v in shares.items() if v}


def measured(modality: Modality, label: Any) -> tuple[dict[str, float], dict[str, float]]:
    found = measure(modality, [label])
    assert found.seen.all()
    return of_row(found)


def figures(modality: Modality, label: Any) -> dict[str, float]:
    return measured(modality, label)[0]


def test_a_map_of_numbers() -> None:
    found, shares = measured(DEPTH, np.where(np.arange(30) < 15, FLAT, 4 * FLAT))
    assert found == pytest.approx({"mean": 5.0, "spread": 3.0, "constant": 0.0})
    assert shares == pytest.approx({"2": 0.5, "8": 0.5})
    assert figures(DEPTH, FLAT)["constant"] == 1


def test_a_large_map_is_looked_at_in_parts() -> None:
    large = np.random.default_rng(0).random((1000, 700), np.float32) + 1
    assert figures(DEPTH, large)["mean"] == pytest.approx(1.5, abs=0.02)


def test_unit_vectors() -> None:
    assert figures(NORMAL, NORMALS) == {"x": 0, "y": 0, "z": 1, "spread": 0, "constant": 1}
    half = NORMALS.copy()
    half[:20] = (0, 1, 0)
    assert figures(NORMAL, half) == pytest.approx(
        {"x": 0, "y": 0.5, "z": 0.5, "spread": 1 - np.sqrt(0.5), "constant": 0}
    )


def test_classes() -> None:
    ids = np.zeros((40, 30), np.uint8)
    ids[:10] = 2
    found, shares = measured(CLASSES, ids)
    assert found == pytest.approx({"classes": 2, "largest": 0.75, "constant": 0})
    assert shares == pytest.approx({"floor": 0.75, "sphere": 0.25})


def test_boxes() -> None:
    two = Boxes(
        np.array([[0, 0, 0.5, 0.5], [0, 0, 1, 0.5]], np.float32),
        np.array([1, 1]),
        np.array([0.5, 1], np.float32),
    )
    found, shares = measured(BOXES, two)
    assert found == pytest.approx({"boxes": 2, "empty": 0, "score": 0.75, "area": 0.375})
    assert shares == {"dog": 1.0}
    assert figures(BOXES, Boxes.empty()) == {"boxes": 0, "empty": 1}, "no score to speak of"


def test_features_text_scalars_and_images() -> None:
    features = np.zeros((4, 4, 8), np.float32)
    features[..., 0] = 3
    assert figures(CLIP, features) == pytest.approx({"norm": 3, "spread": 0, "constant": 1})
    assert figures(CAPTION, ["a red box", "one"]) == {"words": 2, "empty": 0}
    assert figures(CAPTION, [" "])["empty"] == 1
    assert measured(SCORE, 0.5) == ({"value": 0.5}, {"0.5": 1.0})
    grey = np.full((20, 20, 3), 51, np.uint8)
    assert figures(RGB, grey) == pytest.approx({"brightness": 0.2, "contrast": 0, "constant": 1})


def test_what_is_absent_is_not_measured() -> None:
    found = measure(DEPTH, [Absent("depth hung"), FLAT, FLAT], present=[True, True, False])
    assert found.seen.tolist() == [False, True, False]
    assert Tally.of(found).sums["mean"] == [1, 2, 4]
    assert Tally.of(measure(DEPTH, [Absent("depth hung")])) == Tally()


def test_what_a_labeler_notes_is_a_figure() -> None:
    found = measure(DEPTH, [FLAT, FLAT], {"confidence": [0.25]})
    assert of_row(found)[0]["confidence"] == 0.25
    assert "confidence" not in of_row(found, 1)[0], "it said nothing of this one"
    assert figure_names(DEPTH, ("confidence",)) == (
        "mean",
        "spread",
        "constant",
        "distinct tokens",
        "confidence",
    )


BATCHES: dict[str, tuple[Modality, Any]] = {
    "map": (DEPTH, lambda rng, size: rng.normal(0, 9, size).astype(np.float32)),
    "vectors": (NORMAL, lambda rng, size: rng.normal(0, 1, (*size, 3)).astype(np.float32)),
    "classes": (CLASSES, lambda rng, size: rng.integers(0, 3, size).astype(np.uint8)),
    "features": (CLIP, lambda rng, size: rng.normal(0, 1, (*size, 8)).astype(np.float32)),
    "image": (RGB, lambda rng, size: rng.integers(0, 256, (*size, 3)).astype(np.uint8)),
    "boxes": (
        BOXES,
        lambda rng, size: (
            Boxes.empty()
            if size[0] == 9
            else Boxes(
                np.array([[0, 0, *rng.uniform(0.1, 1, 2)]], np.float32),
                rng.integers(0, 2, 1),
                rng.random(1).astype(np.float32),
            )
        ),
    ),
    "scalar": (SCORE, lambda rng, size: float(rng.uniform(-1, 1))),
}


@pytest.mark.parametrize("form", BATCHES)
def test_a_row_is_measured_alike_in_any_company(form: str) -> None:
    """Beside rows of its own shape, of others, and beside none."""
    modality, make = BATCHES[form]
    rng = np.random.default_rng(0)
    labels = [make(rng, size) for size in ((8, 8), (9, 7), (8, 8), (200, 300), (8, 8))]
    labels.insert(2, Absent("a hang"))
    together = measure(modality, labels)
    assert together.seen.tolist() == [True, True, False, True, True, True]
    for row, label in enumerate(labels):
        if row != 2:
            assert of_row(together, row) == measured(modality, label)


def test_numbers_without_bounds_are_binned_by_half_octaves() -> None:
    _, shares = measured(DEPTH, np.array([[0, 1, 1.5, -3.0]], np.float32))
    assert shares == {"9.54e-07": 0.25, "1": 0.25, "1.41": 0.25, "-2.83": 0.25}


def test_rows_take_the_place_of_others() -> None:
    """As where a micro-batch is made in halves, or a shard of micro-batches."""
    whole = Measures.none(4)
    whole.put([1, 3], Measures.of([{"mean": 1.0}, {"mean": 2.0}], [{"a": 1.0}, {"b": 1.0}]), [0, 1])
    whole.put([3], Measures.of([{"area": 5.0}, {"area": 6.0}], [{}, {"c": 1.0}]), [1])
    assert whole.seen.tolist() == [False, True, False, True]
    assert of_row(whole, 1) == ({"mean": 1.0}, {"a": 1.0})
    assert of_row(whole, 3) == ({"area": 6.0}, {"c": 1.0})
    assert Tally.of(whole).shares == {"a": 1.0, "c": 1.0}


def test_tokens() -> None:
    grid = [np.array([1, 1, 2, 3], np.uint16), np.array([7, 7, 7, 7], np.uint16)]
    found = Measures.of([{}, {}, {}])
    measure_tokens(DEPTH, [grid, Absent("a hang"), [grid[0], grid[0]]], found)
    assert [of_row(found, row)[0] for row in range(3)] == [{"distinct tokens": 2}, {}, {"distinct tokens": 3}]
    found = Measures.of([{}, {}])
    measure_tokens(CAPTION, [[np.arange(5, dtype=np.uint16)], Absent("no caption")], found)
    assert [of_row(found, row)[0] for row in range(2)] == [{"tokens": 5}, {}]


@pytest.mark.parametrize("modality", [DEPTH, NORMAL, CLASSES, BOXES, CLIP, CAPTION, RGB, SCORE])
def test_every_figure_has_a_known_name(modality: Modality) -> None:
    labels: dict[str, Any] = {
        "depth": FLAT, "normal": NORMALS, "semseg": np.zeros((8, 8), np.uint8), "det": Boxes.empty(),
        "clip": np.ones((2, 2, 4), np.float32), "caption": ["a"], "rgb": np.zeros((8, 8, 3), np.uint8), "score": 0.0,
    }  # fmt: skip
    assert set(figures(modality, labels[modality.name])) <= set(figure_names(modality))
    assert set(figure_names(modality)) <= {
        n for names in (*FIGURES.values(), *TOKEN_FIGURES.values()) for n in names
    }


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 30))
def test_a_shard_is_the_sum_of_its_parts(values: Sequence[float], cut: int) -> None:
    def tally(part: Sequence[float]) -> Tally:
        return Tally.of(Measures.of([{"mean": v} for v in part], [{f"{abs(v):.0g}": 1.0} for v in part]))

    whole, parts = tally(values), tally(values[:cut])
    parts.merge(tally(values[cut:]))
    assert parts.rows == whole.rows == len(values)
    assert parts.mean("mean") == pytest.approx(np.mean(values), abs=1e-6)
    assert parts.variance("mean") == pytest.approx(np.var(values), rel=1e-6, abs=1e-3)
    assert sum(parts.distribution().values()) == pytest.approx(1)
    again = Tally.from_text(parts.to_text())
    assert again.mean("mean") == pytest.approx(parts.mean("mean"), rel=1e-4, abs=1e-3)


def test_text_of_a_tally_is_small_and_the_same_whatever_the_order() -> None:
    first, second = (
        Tally.of(Measures.of([{"mean": i + 0.1, "spread": 1 / 3} for i in order], [{"a": 0.5, "b": 0.5}] * 2))
        for order in ((0, 1), (1, 0))
    )
    assert first.to_text() == second.to_text()
    assert json.loads(first.to_text())["figures"]["spread"] == [2, 0.666667, 0.222222]
    assert Tally.from_text("") == Tally()


def of_rows(rows: int, **figures: float) -> Tally:
    return Tally.of(Measures.of([figures] * rows))


def test_limits_warn_and_refuse() -> None:
    limits = {"confidence": Limit(warn_below=0.5, refuse_below=0.2)}
    assert judge(DEPTH, of_rows(10, confidence=0.6), limits) == judge(DEPTH, of_rows(10), {})
    found = judge(DEPTH, of_rows(10, confidence=0.4), limits)
    assert found.refusal is None and found.warnings == ("confidence is 0.4 on average, below 0.5",)
    found = judge(DEPTH, of_rows(10, confidence=0.1), limits)
    assert found.refusal == "confidence is 0.1 on average over 10 images, below 0.2"


def test_labels_that_are_constant_are_refused_unless_the_configuration_allows_it() -> None:
    broken = of_rows(10, constant=1.0)
    assert "constant is 1" in str(judge(DEPTH, broken, {}).refusal)
    assert judge(DEPTH, broken, {"constant": Limit()}).refusal is None
    assert judge(DEPTH, of_rows(9, constant=1.0), {}).refusal is None, "too few to judge"
    assert judge(replace(DEPTH, contract=CLASSES.contract), broken, {}).warnings, "a sky is one class"
