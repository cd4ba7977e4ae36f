"""For all tests."""

from __future__ import annotations

from collections import Counter

import pytest

#: take minutes and have few tests: begun last, one would keep its worker when the others have nothing left to do
FIRST = ("test_kill_matrix.py", "test_failures.py", "test_generate.py", "test_kill.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many tests go first, as pytest-xdist orders them by itself, but for some."""
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in FIRST, -count[item.path]))
