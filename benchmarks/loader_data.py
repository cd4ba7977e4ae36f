"""Data for benchmarks/loader.py: a dataset of random tokens with everything that a build would leave, and an S3 server."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import s3fs
from moto.server import ThreadedMotoServer

from fourmill.modality import CAPTION, RGB_PIXELS, LabelContract, Modality
from fourmill.seeds import keys_digest
from fourmill.shards.arrow import column_table, write_table
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Receipt, Recipe, pack_presence
from fourmill.shards.samples import sample_table
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.sources.base import Row
from fourmill.tokenize.pixels import PixelsCodec
from fourmill.train_config import MixtureComponent, TrainConfig

#: kind, vocabulary, tokens (of sequences: the most; their lengths are uniform)
Forms = Mapping[str, tuple[str, int, int]]
SEVEN: dict[str, tuple[str, int, int]] = {
    "rgb": ("grid", 16384, 196), "depth": ("grid", 8192, 196), "normal": ("grid", 8192, 196),
    "semseg": ("grid", 4096, 196), "clip": ("grid", 8192, 196),
    "caption": ("sequence", 30000, 256), "det": ("sequence", 30000, 256),
}  # fmt: skip
LENGTHS = {"caption": (8, 25), "det": (6, 41), "palette": (8, 22), "metadata": (20, 39), "poses": (0, 120),
           "instances": (20, 250)}  # fmt: skip
#: the token modalities of 4M-21; its pixels take the place of rgb tokens there, and T5 embeddings are left out
MOD21: dict[str, tuple[str, int, int]] = {
    **SEVEN, "edges": ("grid", 8192, 196), "sam_edges": ("grid", 8192, 196), "dinov2": ("grid", 8192, 256),
    "imagebind": ("grid", 8192, 256), "dinov2_global": ("vector", 8192, 16), "imagebind_global": ("vector", 8192, 16),
    "palette": ("sequence", 30000, 23), "metadata": ("sequence", 30000, 40), "poses": ("sequence", 30000, 275),
    "instances": ("sequence", 30000, 290),
}  # fmt: skip
SHARD, SIZE, SIDE = 1000, 224, 224


def mixture_21(config: TrainConfig) -> TrainConfig:
    """All to all with four alphas, RGB to all, and mostly captions; 256 input and 256 target tokens."""
    parts = [MixtureComponent(default_alpha=alpha) for alpha in (0.01, 0.1, 1.0, 10.0)]
    parts.append(MixtureComponent(input_alphas={"rgb": 1000.0}, default_input_alpha=0.0, default_alpha=0.5))
    captions = MixtureComponent(
        weight=0.5, input_alphas={"caption": 5.0}, default_input_alpha=0.05, default_alpha=0.5
    )
    return config.model_copy(
        update={"mixture": (*parts, captions), "num_input_tokens": 256, "num_target_tokens": 256}
    )


def make_dataset(folder: Path, samples: int, forms: Forms) -> Snapshot:
    """Random tokens in shards of 1,000; every 50th cell of each sequence is absent."""
    dataset = Dataset.create(
        str(folder), {"format": 1, "n_crops": 1, "seed": 0, "source": {"kind": "random"}}
    )
    modalities = {name: _modality(name, *form) for name, form in forms.items()}
    recipes = {name: Recipe("token", {"random": name}) for name in forms}
    rng = np.random.default_rng(0)
    for shard in range(math.ceil(samples / SHARD)):
        rows = [Row(f"{shard:05d}-{i:05d}", str(i)) for i in range(min(SHARD, samples - shard * SHARD))]
        table = sample_table(
            rows, [(SIDE, SIDE)] * len(rows), [[]] * len(rows), seed=0, n_crops=1, val_fraction=0.0
        )
        _commit(dataset, Recipe("samples", {"random": "samples"}), SAMPLES, shard, rows, table)
        for name, form in forms.items():
            cells = [[value] for value in _values(rng, name, form, len(rows), modalities[name])]
            _commit(dataset, recipes[name], name, shard, rows, column_table(modalities[name], cells, 1, {}))
    return Snapshot.create(dataset, {n: r.short for n, r in recipes.items()}, modalities, {}, SIZE)


def _modality(name: str, kind: str, vocabulary: int, tokens: int) -> Modality:
    if kind == "pixels":
        return RGB_PIXELS.resolved(num_tokens=tokens)
    if kind == "sequence":
        return CAPTION.resolved(name=name, vocab_size=vocabulary, num_tokens=tokens)
    contract = LabelContract(form="map" if kind == "grid" else "vector", dtype="float32")
    return Modality(name=name, kind=kind, contract=contract).resolved(
        vocab_size=vocabulary, num_tokens=tokens
    )  # type: ignore[arg-type]


def _values(
    rng: np.random.Generator, name: str, form: tuple[str, int, int], rows: int, modality: Modality
) -> list[Any]:
    kind, vocabulary, tokens = form
    if kind == "sequence":
        lengths = rng.integers(*LENGTHS[name], rows)
        return [rng.integers(204, vocabulary, length).astype(np.uint16) for length in lengths]
    if kind == "pixels":
        codec = PixelsCodec(modality, SIZE, format="jpeg", quality=90)
        smooth = rng.integers(0, 256, (rows, 15, 15, 3)).astype(np.uint8)
        return codec.encode([np.kron(s, np.ones((15, 15, 1), np.uint8))[:SIZE, :SIZE] for s in smooth])
    return list(rng.integers(0, vocabulary, (rows, tokens)).astype(np.uint16))


def _commit(dataset: Dataset, recipe: Recipe, column: str, shard: int, rows: list[Row], table: Any) -> None:
    data = write_table(table)
    folder = column if column == SAMPLES else f"tokens/{column}"
    receipt = Receipt(
        column=column, recipe=recipe.hash, shard=shard, rows=len(rows), absent={},
        presence=pack_presence(np.ones(len(rows), bool)), keys=keys_digest(row.key for row in rows),
        file=dataset.put_data(folder, shard, data, "arrow"), sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data), dataset=dataset.digest,
    )  # fmt: skip
    dataset.commit(recipe, receipt)


def information_bytes(snapshot: Snapshot) -> float:
    """The least bytes of a sample at fixed bits per token: log2 of the vocabulary for each."""
    bits = 0.0
    for name, modality in snapshot.modalities.items():
        each = math.log2(modality.vocab_size)
        if modality.kind != "sequence":
            bits += math.ceil(each) * modality.num_tokens
            continue
        columns = [snapshot.column(shard, name) for shard in range(len(snapshot.shards))]
        bits += each * sum(len(c.flat) for c in columns if c.flat is not None) / snapshot.rows
    return bits / 8


@contextmanager
def S3Endpoint(folder: Path) -> Iterator[str]:
    """The files of a folder behind the S3 protocol on loopback: the URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    s3fs.S3FileSystem.clear_instance_cache()
    store = fsspec.filesystem("s3")
    store.mkdir("bench")
    store.put(str(folder), "bench/dataset", recursive=True)
    try:
        yield "s3://bench/dataset"
    finally:
        server.stop()
