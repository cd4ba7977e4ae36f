"""For all tests."""

from __future__ import annotations

from collections import Counter

import pytest

#: takes minutes and has few tests: begun last, it would keep one worker when the other has nothing left to do
FIRST = "test_kill_matrix.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many tests go first, as pytest-xdist orders them by itself, but for one."""
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name != FIRST, -count[item.path]))
