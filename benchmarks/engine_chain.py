"""The same stages as a chain of Ray Data's `map_batches`, for `engine.py`: what one would write without an engine.

read -> decode (tasks) -> a pool of one actor per labeler -> tokenize (an actor, which drops the frames) -> parquet.
It has no shards, no receipts and no way to go on after a failure."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.config import Config
from fourmill.flows.resolve import resolve
from fourmill.labelers.base import LabelBatch
from fourmill.shards.decode import decode_frame
from fourmill.tokenize.base import load_codec

Columns = dict[str, Any]
#: Fewer rows per block are more tasks for the driver, which is busy as it is; more keep the stages from overlapping.
BLOCK_ROWS = 32
#: of a CPU: a whole one for each of six actors would never be scheduled on two cores, and none would be left for tasks
DECODE_CPUS, ACTOR_CPUS = 0.5, 0.1


class Decode:
    def __init__(self, config: Config) -> None:
        self._decode = config.decode

    def __call__(self, columns: Columns) -> Columns:
        frames = [
            decode_frame(data, self._decode.shorter_side, self._decode.filter).pixels
            for data in columns["bytes"]
        ]
        return {"path": columns["path"], "frame": np.stack(frames)}


class LabelOne:
    """Adds the labels of one modality."""

    def __init__(self, config: Config, name: str) -> None:
        self._name, self._labeler = name, resolve(config).wanted[name].make_labeler()
        self._labeler.load()

    def __call__(self, columns: Columns) -> Columns:
        frames = list(columns["frame"])
        batch = LabelBatch(keys=list(columns["path"]), frames=frames, present=np.ones(len(frames), bool))
        return {**columns, self._name: np.stack(self._labeler.label(batch))}


class Tokenize:
    """Replaces the labels with tokens, and drops the frames: what follows is small."""

    def __init__(self, config: Config) -> None:
        self._codecs = {
            name: load_codec(Path(str(w.tokenizer_folder)), w.modality, config.image_size)
            for name, w in resolve(config).wanted.items()
        }

    def __call__(self, columns: Columns) -> Columns:
        tokens = {name: np.stack(codec.encode(columns[name])) for name, codec in self._codecs.items()}
        return {"path": columns["path"], **tokens}


def run_chain(config: Config, out: Path) -> float:
    """Run it to its end, inside a Ray session; returns when the last file was written, in seconds since the epoch."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = 120  # so that no stage starts before all have loaded
    size, folder = config.engine.batch_size, str(config.source.options["path"])
    files = sorted(str(path) for path in Path(folder).iterdir())
    blocks = max(2, len(files) // BLOCK_ROWS)
    data = ray.data.read_binary_files(files, include_paths=True, override_num_blocks=blocks)
    data = data.map_batches(Decode(config).__call__, batch_size=size, num_cpus=DECODE_CPUS)
    for name in config.modalities:
        data = data.map_batches(
            LabelOne, fn_constructor_args=(config, name), batch_size=size, concurrency=1, num_cpus=ACTOR_CPUS
        )
    data = data.map_batches(
        Tokenize, fn_constructor_args=(config,), batch_size=size, concurrency=1, num_cpus=ACTOR_CPUS
    )
    data.write_parquet(str(out))
    written = [path.stat().st_mtime for path in out.rglob("*.parquet")]
    return max(written)
