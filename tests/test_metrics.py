"""Metrics of depth, normals and segmentation, against values worked out by hand."""

import numpy as np
import pytest

from fourmill.train.metrics import abs_rel, confusion, delta1, mean_angular_error_deg, mean_iou


def test_abs_rel() -> None:
    assert abs_rel(np.array([2.0, 3.0, 1.0]), np.array([2.0, 2.0, 4.0])) == pytest.approx(
        (0 + 0.5 + 0.75) / 3
    )


def test_delta1_is_a_ratio_either_way() -> None:
    true = np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    assert delta1(np.array([1.2, 1.3, 0.81, 0.79, -1.0]), true) == pytest.approx(2 / 5)


def test_angles() -> None:
    true = np.array([[0.0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]])
    predicted = np.array([[0.0, 0, 2], [1, 0, 1], [0, 0, -3], [0, 0, 0]])
    assert mean_angular_error_deg(predicted, true) == pytest.approx((0 + 45 + 180 + 90) / 4)
    tiny = np.array([[1e-7, 0.0, 1.0]])
    assert mean_angular_error_deg(tiny, true[:1]) == pytest.approx(np.degrees(1e-7))


def test_mean_iou() -> None:
    true = np.array([[0, 0, 1, 1]], np.uint8)
    predicted = np.array([[0, 1, 1, 1]], np.uint8)
    assert mean_iou(predicted, true, 5) == pytest.approx((1 / 2 + 2 / 3) / 2)  # absent classes don't count
    assert mean_iou(true, true, 2) == 1.0


def test_void_and_foreign_ids() -> None:
    true = np.array([0, 0, 1, 255], np.uint8)
    predicted = np.array([0, 9, 1, 0], np.uint8)
    assert confusion(predicted, true, 2).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert mean_iou(predicted, true, 2) == pytest.approx((1 / 2 + 1) / 2)
    assert np.isnan(mean_iou(predicted, np.full(4, 255), 2))
