"""The source ``scenes``: rendered rooms with captions and exact ground truth. See `fourmill.shards.sources.scenes`.

Row i is scene i of the seed whatever the count, so a larger count adds rows and changes none; the count is
therefore in the digest and not in the identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.errors import ConfigError
from fourmill.labels import Boxes
from fourmill.shards.sources.base import RawSample, Row, Source, register
from fourmill.shards.sources.scenes import VERSION, Scene, render


@register("scenes")
class Scenes(Source):
    """``count`` images of ``size`` x ``size`` pixels, drawn from ``seed``."""

    options: ClassVar[Mapping[str, Any]] = {"count": ..., "size": 128, "seed": 0}
    has_truth: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.count = _whole("count", options["count"], least=1, most=99_999_999)
        self.size = _whole("size", options["size"], least=16, most=2048)
        self.seed = _whole("seed", options["seed"], least=0, most=2**63 - 1)

    def identity(self) -> dict[str, Any]:
        return {"kind": "scenes", "version": VERSION, "size": self.size, "seed": self.seed}

    def digest(self) -> str:
        text = json.dumps({**self.identity(), "count": self.count}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def rows(self) -> Iterator[Row]:
        for index in range(self.count):
            yield Row(f"{index:08d}", str(index))

    def read(self, rows: Sequence[Row]) -> Iterator[RawSample | Exception]:
        for row in rows:
            scene = self._scene(row.key)
            yield RawSample(scene.image, (scene.caption,))

    def truth(self, key: str) -> dict[str, Any]:
        """depth, normal, semseg (arrays as in `Scene`), instance, det (`Boxes`, scores 1), caption (list)."""
        scene = self._scene(key)
        boxes = Boxes(
            scene.boxes, scene.box_classes.astype(np.int64), np.ones(len(scene.boxes), dtype=np.float32)
        )
        return {
            "depth": scene.depth,
            "normal": scene.normal,
            "semseg": scene.semseg,
            "instance": scene.instance,
            "det": boxes,
            "caption": [scene.caption],
        }

    def _scene(self, key: str) -> Scene:
        if not (len(key) == 8 and key.isascii() and key.isdigit()):
            raise KeyError(f"{key!r} is not the key of a scene; those are eight digits")
        return render(self.seed, int(key), self.size)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"source.{name}: expected a whole number from {least} to {most}, got {value!r}")
    return value
