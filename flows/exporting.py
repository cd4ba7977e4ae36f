"""Export of a dataset: its newest run's modalities, pinned in a snapshot, in a form that others read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fourmill.config import Config, check_config
from fourmill.errors import ConfigError, nearest
from fourmill.flows.exporting_fiftyone import export_fiftyone
from fourmill.flows.importing_datasets import imported_snapshot
from fourmill.flows.status import latest_run
from fourmill.flows.training import make_snapshot
from fourmill.shards.dataset import Dataset
from fourmill.shards.export import ExportReport, export_webdataset
from fourmill.shards.export_cells import CENTRE, WHOLE, Decode
from fourmill.shards.export_coco import export_coco
from fourmill.shards.export_parquet import export_parquet
from fourmill.shards.snapshot import Snapshot
from fourmill.tokenize.base import load_codec


def config_of(dataset: Dataset, run: Mapping[str, Any] | None = None) -> Config:
    """The configuration of the newest run, or of ``run``; the dataset may have been moved since."""
    run = run or latest_run(dataset)
    if "config" not in run:
        raise ConfigError(
            f"{dataset.url} was imported, so there is no configuration and no source to look at"
        )
    return check_config({**run["config"], "dataset": dataset.url}, f"{dataset.url}/runs")


FORMATS = ("webdataset", "parquet", "coco", "fiftyone")


def export_dataset(
    url: str,
    out: str,
    modalities: Sequence[str] | None = None,
    split: str | None = None,
    layout: str = "webdataset",
) -> ExportReport:
    """Export what is finished in the given modalities (default: all that the format holds), one split (default: train as
    WebDataset, else all).

    Where labels were not kept, boxes, people and metadata are decoded from their tokens.
    """
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout}: unknown{nearest(layout, FORMATS)}")
    dataset = Dataset(url)
    snapshot = snapshot_of(dataset, modalities)
    if layout == "parquet":
        return export_parquet(snapshot, out, modalities, split=split or "all")
    if layout == "coco":
        return export_coco(snapshot, out, modalities, split=split or "all")
    if layout == "fiftyone":
        return export_fiftyone(snapshot, config_of(dataset), out, modalities, split=split or "all")
    return export_webdataset(
        snapshot, out, modalities, split=split or "train", decode=decoders(snapshot, modalities)
    )


def snapshot_of(
    dataset: Dataset, modalities: Sequence[str] | None = None, where: Sequence[str] | None = None
) -> Snapshot:
    """Pin what is finished in the newest run's modalities, or in some of them. ``where`` None: as the run's configuration
    says."""
    run = latest_run(dataset)
    if "imported" in run:
        return imported_snapshot(dataset, run, modalities, where or ())
    config = config_of(dataset)
    if where is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"where": tuple(where)})})
    for name in modalities or ():
        if name not in config.modalities:
            raise ConfigError(f"{dataset.url} has no modality {name!r}{nearest(name, config.modalities)}")
    return make_snapshot(config, tuple(modalities) if modalities else None)


def decoders(snapshot: Snapshot, names: Sequence[str] | None = None) -> dict[str, Decode]:
    """Of the modalities whose labels can be made from tokens."""
    found: dict[str, Any] = {}
    for name, modality in snapshot.modalities.items():
        short = snapshot.tokenizer(name)
        if short and modality.contract.form in (*WHOLE, *CENTRE) and (names is None or name in names):
            folder = snapshot.dataset.tokenizer_folder(name, short)
            found[name] = load_codec(folder, modality, snapshot.image_size).decode
    return found
