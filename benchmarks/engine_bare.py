"""Bare loops, for `engine.py`: read, decode, call labelers and codecs, and nothing else.

As many processes as the engine has specialists, of one thread each; they take the next batch from a shared counter, so that none
ends much later than another. No shards, no receipts, no checks, and (but for one pass per modality) nothing is written.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.config import Config
from fourmill.flows.resolve import resolve
from fourmill.labelers.base import LabelBatch, Labeler
from fourmill.shards.decode import decode_frame
from fourmill.shards.sources.base import RawSample, Row
from fourmill.tokenize.base import Codec, load_codec

#: labels are made of these rows for these modalities, one after the other
Task = tuple[list[str], list[Row]]


class BareLoops:
    """Processes that wait for work, with their networks loaded."""

    def __init__(self, config: Config, processes: int, one_pass: bool) -> None:
        """``one_pass``: decode once and make all modalities; else each modality decodes again and writes an .npy per row."""
        spawn = multiprocessing.get_context("spawn")
        self._next: Any = spawn.Value("i", 0)
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(config, one_pass, self._next, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def run(self, out: Path, trace: Path) -> float:
        """Go through the source once; returns when the last process was done, in seconds since the epoch."""
        self._next.value = 0
        for pipe in self._pipes:
            pipe.send((out, trace))
        return max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join()


@contextmanager
def bare_loops(config: Config, processes: int, one_pass: bool) -> Iterator[BareLoops]:
    loops = BareLoops(config, processes, one_pass)
    try:
        yield loops
    finally:
        loops.close()


def _work(config: Config, one_pass: bool, counter: Any, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    resolved = resolve(config)
    models: dict[str, tuple[Labeler, Codec]] = {}
    for name, wanted in resolved.wanted.items():
        labeler = wanted.make_labeler()
        labeler.load()
        codec = load_codec(Path(str(wanted.tokenizer_folder)), wanted.modality, config.image_size)
        models[name] = labeler, codec
    rows, size = list(resolved.source.rows()), config.engine.batch_size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    tasks: list[Task] = [(list(models), part) for part in parts]
    if not one_pass:
        tasks = [([name], part) for name in models for part in parts]
    pipe.send("ready")
    while True:
        try:
            out, trace = pipe.recv()
        except EOFError:
            return
        for labeler, _ in models.values():
            if "trace" in labeler.params:
                labeler.params["trace"] = str(trace)
        while (number := _take(counter)) < len(tasks):
            names, part = tasks[number]
            batch = _decoded(config, resolved.source.read(part), part)
            for name in names:
                labeler, codec = models[name]
                values = codec.encode(labeler.label(batch))
                if not one_pass:
                    _save(out / name, part, values)
        pipe.send(time.time())


def _take(counter: Any) -> int:
    with counter.get_lock():
        counter.value += 1
        return int(counter.value) - 1


def _decoded(config: Config, samples: Iterator[RawSample | Exception], part: list[Row]) -> LabelBatch:
    """Square images: their decode frame is their one crop."""
    frames = []
    for sample in samples:
        assert isinstance(sample, RawSample)
        frames.append(decode_frame(sample.image, config.decode.shorter_side, config.decode.filter).pixels)
    crops = np.stack(frames)[:, None]
    return LabelBatch(
        keys=[row.key for row in part], frames=frames, present=np.ones(len(part), bool), crops=crops
    )


def _save(folder: Path, part: list[Row], values: list[Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row, value in zip(part, values, strict=True):
        np.save(folder / f"{row.key}.npy", value)
