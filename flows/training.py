"""From finished shards to a training run: the snapshot, the output folder, the progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourmill.config import Config
from fourmill.errors import ConfigError, nearest
from fourmill.flows.progress import progress, say
from fourmill.flows.resolve import Resolved, resolve
from fourmill.shards.dataset import Dataset
from fourmill.shards.filters import parse_conditions
from fourmill.shards.snapshot import Snapshot
from fourmill.storage import Store
from fourmill.tokenize.base import load_codec
from fourmill.train.checkpoint import newest, read_state
from fourmill.train.trainer import TrainResult, train_on


def make_snapshot(config: Config, names: tuple[str, ...] | None = None) -> Snapshot:
    """Pin and register what is finished in all modalities of the configuration (or in ``names``).

    The same shards give the same snapshot. Raises ConfigError while a tokenizer is missing, WorkMissing when no shard
    is finished.
    """
    dataset = Dataset(config.dataset)
    resolved = resolve(config)
    where = parse_conditions(config.train.where, "train.where")
    needed = {condition.name for condition in where}
    wanted = [n for n in resolved.wanted if names is None or n in names or n in needed]
    missing = [n for n in resolved.unfitted() if n in wanted]
    if missing:
        raise ConfigError(
            f"{config.dataset}: no tokenizer yet for {', '.join(missing)}; run `fourmill build` first"
        )
    recipes = {n: r.short for n, r in resolved.token_recipes().items() if n in wanted}
    modalities = {n: codec_of(resolved, dataset, n).modality for n in wanted}
    tokenizers = {n: str(resolved.wanted[n].tokenizer)[:12] for n in wanted}
    for condition in where:
        if condition.name not in wanted or modalities[condition.name].kind != "scalar":
            scalars = [n for n, m in modalities.items() if m.kind == "scalar"]
            raise ConfigError(
                f"train.where: {condition.name!r} is no scalar modality of this configuration"
                f"{nearest(condition.name, scalars)}; there are {', '.join(scalars) or 'none'}"
            )
    found = Snapshot.create(dataset, recipes, modalities, tokenizers, config.image_size, where)
    if where and not found.chosen:
        raise ConfigError(
            f"train.where: not one of {found.rows} rows fulfils {' and '.join(found.where)}; loosen it"
        )
    return found


def codec_of(resolved: Resolved, dataset: Dataset, name: str) -> Any:
    """The codec of a modality, loaded from the dataset."""
    wanted = resolved.wanted[name]
    folder = dataset.tokenizer_folder(name, str(wanted.tokenizer)[:12])
    return load_codec(folder, wanted.modality, resolved.config.image_size)


def default_out(config: Config) -> Path:
    """``runs/<name of the dataset>``"""
    return Path("runs") / (Store(config.dataset).root.rsplit("/", 1)[-1] or "run")


def train_model(config: Config, out: str | Path | None = None, *, snapshot: str | None = None) -> TrainResult:
    """Train, or go on with the run in ``out`` (default: runs/<dataset>) on the snapshot that it began with."""
    folder = Path(out) if out else default_out(config)
    begun = newest(folder)
    if snapshot is None and begun is not None:
        snapshot = read_state(begun).snapshot
    pinned = Snapshot.load(config.dataset, snapshot) if snapshot else make_snapshot(config)
    chosen = f" ({pinned.chosen} where {' and '.join(pinned.where)})" if pinned.where else ""
    say(
        f"snapshot {pinned.digest[:12]}: {pinned.rows} rows in {len(pinned.shards)} shards{chosen}; run {folder}"
    )
    with progress("Train", "steps") as advance:

        def on_step(record: dict[str, Any]) -> None:
            advance(record["step"], record["steps"], f"loss {record['loss']:.3f}")

        return train_on(pinned, folder, config.train, on_step)
