"""Plug-ins by name: found by a folder's listing, refused when two share a name, and never half known."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from fourmill.errors import ConfigError
from fourmill.registry import Registry


def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> str:
    """A package of plug-ins, importable in this test; `REGISTRY` is the registry that they register in."""
    folder = tmp_path / "plugins_for_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.startswith("plugins_for_a_test")]:
        monkeypatch.delitem(sys.modules, name)
    return "plugins_for_a_test"


def test_a_folder_is_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = package(
        tmp_path, monkeypatch, one="", _two="raise RuntimeError('private modules are not imported')"
    )
    registry: Registry[object] = Registry("thing", name)
    registry.register("first")(type("First", (), {}))
    assert registry.names() == ["first"] and "first" in registry and "second" not in registry
    with pytest.raises(ConfigError, match=r"unknown thing 'firts'.*first"):
        registry.get("firts")
    with pytest.raises(ConfigError, match="registered twice"):
        registry.register("first")(type("Another", (), {}))


def test_a_plug_in_that_cannot_be_imported_is_never_just_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look-up names the fault, not only the first; and once it is mended all are there."""
    name = package(tmp_path, monkeypatch, broken="import a_module_that_is_not_there")
    registry: Registry[object] = Registry("thing", name)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
            registry.get("anything")
    (tmp_path / "plugins_for_a_test" / "broken.py").write_text("")
    with pytest.raises(ConfigError, match="unknown thing 'anything'"):
        registry.get("anything")


def test_threads_see_all_or_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that looks while another one is still importing gets what is there in the end."""
    slow = "import time; time.sleep(0.3); import builtins; builtins.registry_of_a_test.register('late')(dict)"
    name = package(tmp_path, monkeypatch, slow=slow)
    registry: Registry[object] = Registry("thing", name)
    monkeypatch.setattr("builtins.registry_of_a_test", registry, raising=False)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(registry.get("late"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [dict] * 4
