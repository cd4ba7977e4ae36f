"""Scenes with their per-pixel truth, rendered once and memory-mapped, for training the dense networks."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fourmill.shards.sources.scenes import VERSION, render

_DTYPES: dict[str, tuple[type, tuple[int, ...]]] = {
    "image": (np.uint8, (3,)),
    "depth": (np.float16, ()),
    "normal": (np.int8, (3,)),
    "semseg": (np.uint8, ()),
}


@dataclass(frozen=True, slots=True)
class DensePool:
    """N scenes of S x S pixels, memory-mapped."""

    image: np.ndarray  # (N, S, S, 3) uint8 RGB
    depth: np.ndarray  # (N, S, S) float16, metres
    normal: np.ndarray  # (N, S, S, 3) int8, unit normals times 127, camera space
    semseg: np.ndarray  # (N, S, S) uint8

    def __len__(self) -> int:
        return len(self.image)


def open_dense_pool(
    seed: int, count: int, size: int, cache: Path | None = None, say: Callable[[str], None] = print
) -> DensePool:
    """Scenes 0 to `count` - 1 of a seed, from `cache` (default: the temporary folder) or rendered into it.

    The folder is put in place whole, so an interrupted rendering leaves nothing that looks finished.
    """
    root = cache or Path(tempfile.gettempdir()) / "fourmill-dense"
    folder = root / f"v{VERSION}-seed{seed}-{size}px-{count}"
    if not folder.is_dir():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        arrays = {
            name: np.lib.format.open_memmap(part / f"{name}.npy", "w+", dtype, (count, size, size, *tail))
            for name, (dtype, tail) in _DTYPES.items()
        }
        for index in range(count):
            scene = render(seed, index, size)
            arrays["image"][index], arrays["depth"][index] = scene.image, scene.depth
            arrays["normal"][index], arrays["semseg"][index] = np.rint(scene.normal * 127.0), scene.semseg
            if (index + 1) % 2000 == 0:
                say(f"rendered {index + 1} of {count} scenes")
        for array in arrays.values():
            array.flush()
        part.rename(folder)
    return DensePool(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _DTYPES})
