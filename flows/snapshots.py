"""`fourmill snapshot` and `fourmill drop-keys`: what training may read, pinned, listed, released and taken down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill.errors import ConfigError
from fourmill.flows.exporting import snapshot_of
from fourmill.flows.status import human_bytes
from fourmill.shards.dataset import Dataset
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tombstones import Tombstone, drop_keys

MAX_KEYS_BYTES = 1 << 30


def take_snapshot(url: str, modalities: Sequence[str] | None, where: Sequence[str]) -> Snapshot:
    """Of what is finished in the newest run's modalities (or in some of them), and of the rows that were asked for."""
    return snapshot_of(Dataset(url), modalities, where)


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "digest": snapshot.digest,
        "shards": len(snapshot.shards),
        "rows": snapshot.rows,
        "chosen": snapshot.chosen,
        "where": snapshot.where,
        "modalities": sorted(snapshot.modalities),
        "licenses": snapshot.licenses(),
    }


def list_snapshots(url: str) -> list[Snapshot]:
    dataset = Dataset(url)
    return [Snapshot.load(url, name.removesuffix(".json")) for name in dataset.store.names("snapshots")]


def release(url: str, digest: str) -> str:
    """Forget a registered snapshot; what it alone named can be collected then. DatasetError where there is none."""
    snapshot = Snapshot.load(url, digest)
    snapshot.dataset.store.remove(f"snapshots/{snapshot.digest}.json")
    return snapshot.digest


def snapshots_report(url: str, snapshots: Sequence[Snapshot]) -> Group:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("snapshot", "shards", "rows", "chosen", "modalities", "where", "licences"):
        numbers = heading in ("shards", "rows", "chosen")
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for one in snapshots:
        table.add_row(
            one.digest[:12], str(len(one.shards)), str(one.rows), str(one.chosen), ", ".join(sorted(one.modalities)),
            " and ".join(one.where), ", ".join(one.licenses()),
        )  # fmt: skip
    return Group(Text(url, style="bold"), table if snapshots else Text("no snapshot is registered"))


# -- take-downs ---------------------------------------------------------------------------------------


def drop(url: str, file: Path) -> tuple[Tombstone, list[Snapshot]]:
    """Drop the keys of a file, one per line; and the registered snapshots that still have some of their samples."""
    dataset = Dataset(url)
    tombstone = drop_keys(dataset, _keys(file))
    return tombstone, [one for one in list_snapshots(url) if _has_any(one, tombstone)]


def _keys(file: Path) -> list[str]:
    try:
        if file.stat().st_size > MAX_KEYS_BYTES:
            raise ConfigError(f"{file} has {human_bytes(file.stat().st_size)}; that is no list of keys")
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot read it as a text of one key per line: {error}") from error
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _has_any(snapshot: Snapshot, tombstone: Tombstone) -> bool:
    for shard, ref in enumerate(snapshot.shards):
        rows = tombstone.rows.get(ref.index)
        if rows and snapshot.is_kept(shard)[list(rows)].any():
            return True
    return False


def drop_report(url: str, tombstone: Tombstone, snapshots: Sequence[Snapshot]) -> Group:
    parts = [
        Text(
            f"{len(tombstone.keys)} keys dropped; {tombstone.found} samples have them ({url}/{tombstone.name})"
        ),
        Text("every new snapshot and export leaves them out; no shard was touched"),
    ]
    missing = len(tombstone.keys) - tombstone.found
    if missing > 0:
        parts.append(
            Text(f"{missing} keys are of no sample yet; they count for shards to come", style="yellow")
        )
    if snapshots:
        names = ", ".join(one.digest[:12] for one in snapshots)
        parts.append(
            Text(
                f"registered snapshots still have some: {names}; take new ones, and release these",
                style="yellow",
            )
        )
    return Group(*parts)
