"""From source rows to micro-batches: read, decode once into the decode frame, fill up to the fixed shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from fourmill.crops import draw_crops
from fourmill.flows.micro_batch import MicroBatch
from fourmill.flows.resolve import Resolved
from fourmill.labels import Absent, Label
from fourmill.seeds import key64
from fourmill.shards.decode import Frame, RejectedImage, decode_frame
from fourmill.shards.decode_apart import decode_apart
from fourmill.shards.sources.base import RawSample, Row

#: a frame or the reason why there is none, and the captions
Decoded = tuple[Frame | str, tuple[str, ...]]


class Reader:
    """Reads the rows of one source. Decoding runs in ``threads`` threads; C code that does it lets others run."""

    def __init__(self, resolved: Resolved, threads: int = 2) -> None:
        self._resolved = resolved
        self._truth = any(wanted.needs_truth for wanted in resolved.wanted.values())
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._portions = 2 * threads

    def read(self, rows: Sequence[Row]) -> list[RawSample | Exception]:
        """I/O errors are raised: they fail the attempt, not the sample."""
        return list(self._resolved.source.read(rows)) if rows else []

    def decode(
        self, raw: Sequence[RawSample | Exception], skip: Sequence[str | None], apart: bool = False
    ) -> list[Decoded]:
        """One per row of ``skip``, which says why a row is not read; ``raw`` has the others, in order.

        ``apart``: each image in a process of its own, since one of them is suspected of having killed this one.
        """
        decode = self._resolved.config.decode
        how = decode_apart if apart else decode_frame

        def one(sample: RawSample | Exception) -> Decoded:
            if isinstance(sample, RejectedImage):
                return sample.reason, ()
            if isinstance(sample, Exception):
                return f"unreadable: {type(sample).__name__}", ()
            try:
                return how(sample.image, decode.shorter_side, decode.filter), sample.captions
            except RejectedImage as error:
                return error.reason, sample.captions

        def some(samples: Sequence[RawSample | Exception]) -> list[Decoded]:
            return [one(sample) for sample in samples]

        # a few portions for each thread: to hand over every image by itself costs more than it evens out
        portions = [raw[i :: self._portions] for i in range(min(self._portions, len(raw)))]
        parts = list(self._threads.map(some, portions))
        done = iter([parts[i % self._portions][i // self._portions] for i in range(len(raw))])
        return [next(done) if why is None else (why, ()) for why in skip]

    def micro_batch(
        self,
        name: str,
        size: int,
        rows: Sequence[Row],
        decoded: Sequence[Decoded],
        given: Mapping[str, Sequence[Label]],
    ) -> MicroBatch:
        """Fill up to the fixed batch shape with blanks; rows that were set aside are blank too."""
        config = self._resolved.config
        side = config.decode.shorter_side
        blank = np.zeros((side, side, 3), np.uint8)
        frames, keys = [blank] * size, [""] * size
        captions: list[Sequence[str]] = [()] * size
        truth: list[Mapping[str, object] | None] = [None] * size
        present = np.zeros(size, bool)
        sizes = np.full((size, 2), side, np.int32)
        crops = np.tile(np.array([0, 0, side, side, 0], np.int32), (size, config.n_crops, 1))
        for i, (row, (frame, texts)) in enumerate(zip(rows, decoded, strict=True)):
            keys[i] = row.key
            if isinstance(frame, str):
                continue
            frames[i], captions[i], present[i] = frame.pixels, texts, True
            sizes[i] = frame.height, frame.width
            crops[i] = draw_crops(config.seed, key64(row.key), frame.width, frame.height, config.n_crops)
            if self._truth:
                truth[i] = self._resolved.source.truth(row.key)
        fill = [Absent("blank")] * (size - len(rows))
        filled = {modality: [*labels, *fill] for modality, labels in given.items()}
        return MicroBatch(name, keys, frames, present, sizes, crops, captions, truth, filled)


def positions_of(frozen: pa.Table) -> list[Row]:
    """The source rows of a samples table."""
    keys, positions = (frozen.column(name).to_pylist() for name in ("key", "position"))
    return [Row(key, position) for key, position in zip(keys, positions, strict=True)]
