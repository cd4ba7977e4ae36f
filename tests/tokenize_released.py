"""The golden data of tokenize/data/README.md, as tests read it."""

import json
import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fourmill.tokenize.published_network import PublishedNetwork, build

DATA = Path(__file__).parent / "tokenize" / "data"
VQ = ("clip_like", "depth", "global_memcodes", "rgb", "sam_mask", "semseg")
#: tokens whose best code is less than this ahead of the second may come out either way in float32
MARGIN = 5e-6


def folder_of(name: str) -> Path:
    return DATA / ("divae" if name == "divae" else f"vq/{name}")


@lru_cache(maxsize=8)
def weights_bytes(name: str) -> bytes:
    return lzma.decompress((folder_of(name) / "model.safetensors.xz").read_bytes())


def config_of(name: str) -> dict[str, Any]:
    return dict(json.loads((folder_of(name) / "config.json").read_text()))


@lru_cache(maxsize=8)
def network_of(name: str) -> PublishedNetwork:
    """Shared between tests: never trained, never changed."""
    return build(config_of(name), safetensors.torch.load(weights_bytes(name)))


def arrays_of(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """The arrays whose names begin with ``prefix``, without it."""
    with np.load(file, allow_pickle=False) as arrays:
        return {k.removeprefix(prefix): torch.from_numpy(arrays[k]) for k in arrays if k.startswith(prefix)}


def write_released(name: str, folder: Path, **changes: Any) -> Path:
    """A local copy of a release, as its repository on the hub holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config_of(name), **changes}))
    (folder / "model.safetensors").write_bytes(weights_bytes(name))
    return folder
