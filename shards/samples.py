"""The samples table: one row per *source* row, readable or not, with everything that is settled once and for all.

=========  ==================================================================================================
column     is
=========  ==================================================================================================
key        string: the row's name for ever
key64      uint64: its hash, the seed of every random choice about it
status     string: "ok", or why the row is set aside
captions   list<string>: cleaned, none where there are none or where the row could not be read
width      int32: of the original, upright image; null where set aside, as is height
crops      FixedSizeList<int32>[n_crops * 5]: top, left, height, width, flip in pixels of that image
split      string: "train" or "val"
position   string: JSON with which the source finds the row again
=========  ==================================================================================================

The table is a pure function of its arguments; null slots are zero-filled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pyarrow as pa

from fourmill.crops import draw_crops
from fourmill.labels import DUPLICATE
from fourmill.seeds import key64, split_of
from fourmill.shards.decode import Frame, RejectedImage
from fourmill.shards.sources.base import Row

OK = "ok"
MAX_CAPTION_CHARS = 10_000
MAX_CAPTIONS = 64  # of one image; more are cut off

Outcome = tuple[int, int] | Frame | RejectedImage | str  # (width, height), or why the row is set aside

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def samples_schema(n_crops: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("key64", pa.uint64(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("captions", pa.list_(pa.string()), nullable=False),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("crops", pa.list_(pa.int32(), n_crops * 5)),
            pa.field("split", pa.string(), nullable=False),
            pa.field("position", pa.string(), nullable=False),
        ]
    )


def sample_table(
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    captions: Sequence[Iterable[str]],
    *,
    seed: int,
    n_crops: int,
    val_fraction: float,
    taken: Collection[str] = (),
) -> pa.Table:
    """The samples of one shard, in the order of ``rows``.

    ``outcomes``: per row its size as (width, height) or a `Frame`, or the reject or reason for which it is set
    aside. A second row with a key, here or in ``taken`` (keys of earlier shards), is set aside as `DUPLICATE`.
    """
    status, sizes = _statuses(rows, outcomes, set(taken))
    hashes = [key64(row.key) for row in rows]
    ok = np.array([text == OK for text in status], dtype=bool)
    crops = np.zeros((len(rows), n_crops * 5), np.int32)
    for i in np.flatnonzero(ok):
        crops[i] = draw_crops(seed, hashes[i], int(sizes[i, 0]), int(sizes[i, 1]), n_crops).reshape(-1)
    cleaned = [clean_captions(texts) if good else [] for texts, good in zip(captions, ok, strict=True)]
    schema = samples_schema(n_crops)
    columns = [
        pa.array([row.key for row in rows], pa.string()),
        pa.array(hashes, pa.uint64()),
        pa.array(status, pa.string()),
        pa.array(cleaned, schema.field("captions").type),
        pa.array(sizes[:, 0], pa.int32(), mask=~ok),
        pa.array(sizes[:, 1], pa.int32(), mask=~ok),
        pa.FixedSizeListArray.from_arrays(pa.array(crops.reshape(-1)), n_crops * 5, mask=pa.array(~ok)),
        pa.array([split_of(seed, value, val_fraction) for value in hashes], pa.string()),
        pa.array([row.position for row in rows], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _statuses(
    rows: Sequence[Row], outcomes: Sequence[Outcome], seen: set[str]
) -> tuple[list[str], np.ndarray]:
    """Status per row, and int32 (rows, 2) width and height, zeros where set aside."""
    status, sizes = [], np.zeros((len(rows), 2), np.int32)
    for i, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        if row.key in seen:
            status.append(DUPLICATE)
        elif isinstance(outcome, RejectedImage):
            status.append(outcome.reason)
        elif isinstance(outcome, str):
            status.append(outcome)
        else:
            sizes[i] = (outcome.width, outcome.height) if isinstance(outcome, Frame) else outcome
            status.append(OK)
        seen.add(row.key)
    return status, sizes


def clean_captions(texts: Iterable[str]) -> list[str]:
    """Captions fit to be stored: valid Unicode, no control characters, at most `MAX_CAPTION_CHARS`, not empty."""
    cleaned = (clean_caption(text) for text in texts)
    return [text for text in cleaned if text][:MAX_CAPTIONS]


def clean_caption(text: str) -> str:
    valid = (
        text[: 2 * MAX_CAPTION_CHARS].encode("utf-8", "replace").decode("utf-8")
    )  # lone surrogates become "?"
    return _CONTROL.sub(" ", valid).strip()[:MAX_CAPTION_CHARS].rstrip()
