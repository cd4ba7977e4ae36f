"""A dataset written by hand, of all kinds of modalities, with what a build leaves of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.labels import Absent, Boxes, Label
from fourmill.modality import CAPTION, RGB, RGB_PIXELS, LabelContract, Modality
from fourmill.seeds import keys_digest
from fourmill.shards.arrow import column_table, write_table
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Receipt, Recipe, pack_presence
from fourmill.shards.samples import OK, sample_table
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.sources.base import Row
from fourmill.shards.tar import write_labels

ROWS, SHARDS = 6, 3
BOXES = Modality(
    name="det", kind="sequence", codec="boxes", num_tokens=16, vocab_size=99, reference_name="det",
    contract=LabelContract(form="boxes", dtype="float32", classes=("cat", "dog")),
)  # fmt: skip
SCORE = Modality(
    name="score", kind="scalar", contract=LabelContract(form="scalar", dtype="float32"), num_tokens=1
)
FEATURE = Modality(
    name="feature", kind="embedding", contract=LabelContract(form="vector", dtype="float32"), num_tokens=5
)
MODALITIES = {
    "rgb": RGB.resolved(vocab_size=16384, num_tokens=4), "caption": CAPTION.resolved(vocab_size=99), "det": BOXES,
    "score": SCORE, "feature": FEATURE, "rgb_pixels": RGB_PIXELS,
}  # fmt: skip


@dataclass
class Built:
    """A dataset written by hand: what is in it, by shard and row."""

    snapshot: Snapshot
    samples: list[list[dict[str, Any]]]
    cells: dict[str, list[list[Any]]]
    boxes: list[list[Label]]


def build(url: str, *, n_crops: int = 2, keep_labels: bool = True, val_fraction: float = 0.3) -> Built:
    dataset = Dataset.create(url, {"n_crops": n_crops, "seed": 1})
    recipes = {SAMPLES: Recipe("samples", {})}
    label = {"labeler": "hand"}
    recipes |= {name: Recipe("token", {"label": label, "of": name}) for name in MODALITIES}
    built = Built(None, [], {name: [] for name in MODALITIES}, [])  # type: ignore[arg-type]
    for shard in range(SHARDS):
        rng = np.random.default_rng(shard)
        rows = [Row(f"some/dir.{shard}/{row}", "{}") for row in range(ROWS)]
        outcomes: list[Any] = [(90, 60)] * (ROWS - 1) + ["no image"]
        texts = [[f"caption {shard} {row} ünïcode", "another"] if row != 1 else [] for row in range(ROWS)]
        table = sample_table(rows, outcomes, texts, seed=1, n_crops=n_crops, val_fraction=val_fraction)
        status = table["status"].to_pylist()

        def absent(row: int, status: Sequence[str] = status) -> Absent | None:
            return Absent(status[row]) if status[row] != OK else None

        cells: dict[str, list[Any]] = {name: [] for name in MODALITIES}
        boxes: list[Label] = []
        for row in range(ROWS):
            count = int(rng.integers(0, 3))
            found = Boxes(
                rng.random((count, 4)).astype(np.float32),
                rng.integers(0, 2, count),
                rng.random(count).astype(np.float32),
            )
            boxes.append(absent(row) or found)
            cells["rgb"].append(absent(row) or [rng.integers(0, 16384, 4) for _ in range(n_crops)])
            cells["caption"].append(
                absent(row) or (Absent("no caption") if row == 1 else [np.arange(row)] * n_crops)
            )
            cells["det"].append(absent(row) or [np.arange(5 * count)] * n_crops)
            cells["score"].append(absent(row) or (Absent("broke") if row == 2 else [0.25 * row]))
            cells["feature"].append(absent(row) or [rng.random(5).astype(np.float16) for _ in range(n_crops)])
            cells["rgb_pixels"].append(absent(row) or [b"pixels"] * n_crops)
        commit(dataset, recipes[SAMPLES], SAMPLES, SAMPLES, shard, rows, write_table(table), "arrow", status)
        for name, modality in MODALITIES.items():
            data = write_table(column_table(modality, cells[name], n_crops, {}))
            commit(dataset, recipes[name], name, f"tokens/{name}", shard, rows, data, "arrow", cells[name])
            built.cells[name].append(cells[name])
        if keep_labels:
            data = write_labels([row.key for row in rows], boxes, BOXES)
            commit(dataset, Recipe("label", label), "det", "labels/det", shard, rows, data, "tar", boxes)
        built.samples.append(table.to_pylist())
        built.boxes.append(boxes)
    shorts = {name: recipe.short for name, recipe in recipes.items() if name != SAMPLES}
    built.snapshot = Snapshot.create(dataset, shorts, MODALITIES, {}, image_size=32)
    return built


def commit(
    dataset: Dataset, recipe: Recipe, column: str, folder: str, shard: int, rows: Sequence[Row], data: bytes,
    ending: str, cells: Sequence[Any],
) -> None:  # fmt: skip
    present = np.array([not isinstance(cell, Absent) for cell in cells])
    receipt = Receipt(
        column=column, recipe=recipe.hash, shard=shard, rows=len(rows), absent={}, presence=pack_presence(present),
        keys=keys_digest(row.key for row in rows), file=dataset.put_data(folder, shard, data, ending),
        sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), dataset=dataset.digest,
    )  # fmt: skip
    assert dataset.commit(recipe, receipt)
