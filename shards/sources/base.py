"""What a source is: an ordered, keyed collection of images with captions.

`rows` lists cheaply (keys and positions, no decoding); `read` fetches one image. A key identifies an
image for ever: the relative path without its ending (folder), ``tar name/member key`` (webdataset),
the id column or ``file/row`` (parquet), the index (scenes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fourmill.registry import Registry

sources: Registry[Source] = Registry("source", "fourmill.shards.sources")
register = sources.register


@dataclass(frozen=True, slots=True)
class Row:
    """One source row. ``position`` is JSON, understood by the source alone, and enough to read the row again."""

    key: str
    position: str


@dataclass(frozen=True, slots=True)
class RawSample:
    """``image``: the encoded bytes of an image file, or uint8 (H, W, 3) where the source renders it."""

    image: bytes | np.ndarray
    captions: tuple[str, ...]


class Source(ABC):
    """Base class. ``options`` come from the configuration under ``source:``, without ``kind``."""

    #: option names with defaults; `...` marks one that must be given
    options: ClassVar[Mapping[str, Any]] = {}
    #: names of the modalities for which `truth` has ground truth
    has_truth: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        self.given = options

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the dataset remembers of its source for ever (kind, url, options that change rows)."""

    @abstractmethod
    def digest(self) -> str:
        """Changes when a file of the source appears, vanishes or changes (names, sizes, etags). Cheap."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Every row in a fixed order. Raises SourceError when there is nothing or it cannot be listed."""

    @abstractmethod
    def read(self, rows: Sequence[Row]) -> Iterator[RawSample | Exception]:
        """The rows' contents, in order. A row whose *bytes* are at fault yields the exception
        (ValueError and the like: a reject); I/O errors are raised (they fail the attempt, not the sample).
        """

    def truth(self, key: str) -> Mapping[str, Any]:
        """Ground truth by modality name, where the source has it. Recomputed, never stored."""
        raise KeyError(key)


def make_source(kind: str, **options: Any) -> Source:
    """A source from its configuration, with option names checked."""
    from fourmill.errors import ConfigError, nearest

    cls = sources.get(kind)
    for name in options:
        if name not in cls.options:
            raise ConfigError(f"source.{name}: unknown option of source {kind!r}{nearest(name, cls.options)}")
    for name, default in cls.options.items():
        if default is ... and name not in options:
            raise ConfigError(f"source.{name}: missing; source {kind!r} needs it")
    filled = {name: default for name, default in cls.options.items() if default is not ...}
    return cls(**{**filled, **options})
