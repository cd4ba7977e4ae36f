"""What litData's plain reading costs, for `loader.py`. It runs under a Python that has litdata and numpy, and needs nothing of ours.

    python -m venv litenv && litenv/bin/pip install litdata numpy
    litenv/bin/python benchmarks/loader_litdata.py --make DIR --samples 5000 --tokens tokens.npz
    litenv/bin/python benchmarks/loader_litdata.py --data DIR --rounds 2

The first writes samples in litData's chunks: a dict of uint16 arrays each. ``--by-crop`` gives them the shape (1, n), as tokenizers
do that make n tokens of each crop; without it they have one dimension, which litData stores without headers and reads two to
three times as fast. In the npz, an array (rows, tokens) is one modality; an array with another beside
it named "<name>.offsets" (rows + 1) is flat, of sequences of any length. Rows are taken over and over if there are fewer than
``--samples``. The second goes over all samples in shuffled order, once unmeasured and then ``--rounds`` times, in the process
itself, one thread, no batches, no masking: the least that a loader built on it would pay. The last line is JSON:

samples_per_cpu_s    samples per second of processor time; its prefetching thread counts
tokens_per_sample    what was read, to compare with what was written
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from sys import stderr
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DISABLE_VERSION_CHECK"] = "1"  # litdata asks the package index otherwise

import numpy as np

CHUNK = "64MB"  # what its documentation uses
OFFSETS = ".offsets"
Arrays = dict[str, np.ndarray]


def sample_of(row: int, arrays: Arrays, rows: int, by_crop: bool) -> Arrays:
    """The uint16 arrays of one sample, of shape (n,) or (1, n)."""
    row %= rows
    sample = {}
    for name, values in arrays.items():
        if name.endswith(OFFSETS):
            continue
        offsets = arrays.get(name + OFFSETS)
        tokens = values[row] if offsets is None else values[offsets[row] : offsets[row + 1]]
        tokens = np.ascontiguousarray(tokens, np.uint16)
        sample[name] = tokens[None] if by_crop else tokens
    return sample


def make(folder: Path, samples: int, tokens: Path, by_crop: bool) -> None:
    """Litdata's own way of writing; it leaves index.json and chunk-*.bin in ``folder``."""
    with np.load(tokens) as stored:
        arrays = dict(stored)
    rows = min(len(a) - n.endswith(OFFSETS) for n, a in arrays.items() if n + OFFSETS not in arrays)
    with TemporaryDirectory() as cache:
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = cache
        from litdata import optimize  # type: ignore[import-not-found]

        sample = partial(sample_of, arrays=arrays, rows=rows, by_crop=by_crop)
        optimize(sample, list(range(samples)), str(folder), chunk_bytes=CHUNK, num_workers=1)


def read(folder: Path, rounds: int) -> dict[str, float]:
    """Samples per second of processor time, over ``rounds`` epochs after one that warms the page cache."""
    import torch
    from litdata import StreamingDataset

    torch.set_num_threads(1)
    dataset = StreamingDataset(str(folder), shuffle=True)
    values = sum(tokens.size for sample in dataset for tokens in sample.values())
    begin, samples = time.process_time(), 0
    for epoch in range(rounds):
        dataset.set_epoch(epoch + 2)
        samples += sum(1 for _ in dataset)
    took = time.process_time() - begin
    return {"samples_per_cpu_s": round(samples / took, 1), "tokens_per_sample": values * rounds / samples}


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--make", type=Path, metavar="DIR", help="write litData's chunks there")
    parser.add_argument("--samples", type=int, default=5000, help="how many to write")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="the npz that holds their tokens")
    parser.add_argument("--by-crop", action="store_true", help="arrays of shape (1, n) instead of (n,)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="what --make wrote")
    parser.add_argument("--rounds", type=int, default=2, help="epochs that are timed")
    options = parser.parse_args()
    if options.make:
        if options.tokens is None:
            parser.error("--make needs --tokens")
        with redirect_stdout(stderr):
            make(options.make, options.samples, options.tokens, options.by_crop)
    elif options.data:
        with redirect_stdout(stderr):
            result = read(options.data, options.rounds)
        print(json.dumps(result))
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
