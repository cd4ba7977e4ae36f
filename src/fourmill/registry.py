"""Named plug-ins: explicit names, duplicates are errors, unknown names suggest the nearest.

A folder's modules are imported on first look-up, so one file in ``labelers/`` (or a package that
declares the entry point group) is all it takes. Heavy imports belong inside a plug-in's ``load()``.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from fourmill.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name. ``package`` is scanned for modules, ``group`` for other people's entry points."""

    def __init__(self, what: str, package: str, group: str | None = None) -> None:
        self.what = what
        self._package = package
        self._group = group
        self._known: dict[str, type[T]] = {}
        self._scanned = self._scanning = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        def add(cls: type[T]) -> type[T]:
            old = self._known.get(name)
            if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(
                    f"{self.what} {name!r} is registered twice: {old.__module__}.{old.__qualname__} and "
                    f"{cls.__module__}.{cls.__qualname__}; rename one of them"
                )
            self._known[name] = cls
            return cls

        return add

    def _scan(self) -> None:
        """Import every plug-in there is, once; where one of them cannot be imported, each look-up says so again."""
        with self._lock:
            if self._scanned or self._scanning:
                return
            self._scanning = True  # a plug-in's module may look others up while it is imported
            try:
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__):
                    if not module.name.startswith("_"):
                        importlib.import_module(f"{self._package}.{module.name}")
                for entry in entry_points(group=self._group) if self._group else ():
                    self._take(entry)
                self._scanned = True
            finally:
                self._scanning = False

    def _take(self, entry: EntryPoint) -> None:
        """A plug-in of somebody else's package, under the name of its entry point."""
        whose = f"{self.what} {entry.name!r} of the package {entry.dist.name if entry.dist else entry.value}"
        try:
            loaded = entry.load()
        except ConfigError:
            raise
        except Exception as error:  # whatever their module raises
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(f"{whose} cannot be imported ({words}); mend or uninstall it") from error
        if not isinstance(loaded, type):
            raise ConfigError(f"{whose}: {entry.value} is of type {type(loaded).__name__}, not a class")
        self.register(entry.name)(loaded)

    def get(self, name: str) -> type[T]:
        self._scan()
        if name not in self._known:
            raise ConfigError(f"unknown {self.what} {name!r}{nearest(name, self._known)}")
        return self._known[name]

    def names(self) -> list[str]:
        self._scan()
        return sorted(self._known)

    def items(self) -> Iterator[tuple[str, type[T]]]:
        self._scan()
        return iter(sorted(self._known.items()))

    def __contains__(self, name: str) -> bool:
        self._scan()
        return name in self._known
