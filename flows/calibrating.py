"""What an image costs on this machine: a small build with the real networks, in a temporary folder that is removed.

Tokenizers that are yet to be fitted are stood for by ones of the same size that were hardly fitted: as fast, and as large.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourmill.config import Config, check_config
from fourmill.errors import WorkMissing
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.costs import Costs, measured
from fourmill.flows.progress import say
from fourmill.flows.resolve import Resolved, resolve
from fourmill.shards.dataset import Dataset
from fourmill.shards.sources.base import Row

IMAGES = 200
SHARD_ROWS = 100  # about: full micro-batches, and more than one shard


def calibrate(resolved: Resolved, names: Sequence[str]) -> Costs:
    """Label and tokenize some images of the source in these modalities. Raises what a build raises."""
    with tempfile.TemporaryDirectory(prefix="fourmill-calibration-") as scratch:
        config = calibration_config(resolved, names, Path(scratch))
        try:
            build(config, BuildOptions(limit=IMAGES))
        except WorkMissing as error:
            say(f"calibration: {error}")
        return measured(
            resolve(config), Dataset(config.dataset), f"{IMAGES} images on this machine", steady=False
        )


def calibration_config(resolved: Resolved, names: Sequence[str], folder: Path) -> Config:
    """The configuration for a dataset in ``folder``, with these modalities and what they need."""
    content = resolved.config.model_dump(mode="json")
    chosen = resolved.closure(list(names))
    batch = resolved.config.engine.batch_size
    content["dataset"] = str(folder / "dataset")
    content["shard_size"] = batch * max(1, SHARD_ROWS // batch)
    content["val_fraction"] = 0.0
    content["modalities"] = {n: _given(resolved, n, content["modalities"][n]) for n in chosen}
    content["fit"] |= {"samples": content["shard_size"], "steps": 1, "minutes": 0, "batch_size": 4}
    groups = [[n for n in group if n in chosen] for group in content["engine"]["groups"]]
    content["engine"] |= {"address": None, "single_writer": False, "max_absent_share": 1.0}
    content["engine"]["groups"] = [group for group in groups if group]
    if not resolved.source.has_truth:  # else they are rendered: the same, and nothing to list
        _copy_images(resolved, folder / "images")
        content["source"] = {"kind": "folder", "path": str(folder / "images")}
    return check_config(content, "calibration")


def _given(resolved: Resolved, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The modality with the tokenizer that it has, or with one that is fitted in no time."""
    wanted = resolved.wanted[name]
    if wanted.tokenizer_folder is not None:
        return {**entry, "tokenizer": {"model": wanted.tokenizer_folder}}
    options = {k: v for k, v in entry["tokenizer"].items() if v is not None and k not in ("steps", "minutes")}
    return {**entry, "tokenizer": options}


def _copy_images(resolved: Resolved, folder: Path) -> None:
    """The first images of the source, without listing the rest."""
    folder.mkdir(parents=True)
    rows: list[Row] = list(islice(resolved.source.rows(), IMAGES))
    for number, raw in enumerate(resolved.source.read(rows)):
        if isinstance(raw, Exception):
            continue
        name = folder / f"{number:06d}.jpg"  # of whatever kind it is: nobody looks at the ending again
        if isinstance(raw.image, np.ndarray):
            Image.fromarray(raw.image).save(name, format="PNG")
        else:
            name.write_bytes(raw.image)
        if raw.captions:
            name.with_suffix(".txt").write_text("\n".join(raw.captions), encoding="utf-8")
