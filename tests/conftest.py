"""For all tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray take minutes: they go first, so that no worker is left alone with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("ray") is not None}
    items.sort(key=lambda item: item.path not in slow)
