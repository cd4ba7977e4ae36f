"""Export of a dataset: its newest run's modalities, pinned in a snapshot, as WebDataset tars."""

from __future__ import annotations

from collections.abc import Sequence

from fourmill.config import Config, check_config
from fourmill.errors import ConfigError, nearest
from fourmill.flows.resolve import resolve
from fourmill.flows.status import latest_run
from fourmill.flows.training import codec_of, make_snapshot
from fourmill.shards.dataset import Dataset
from fourmill.shards.export import ExportReport, export_webdataset
from fourmill.shards.export_parquet import export_parquet


def config_of(dataset: Dataset) -> Config:
    """The configuration of the newest run; the dataset may have been moved since."""
    content = {**latest_run(dataset)["config"], "dataset": dataset.url}
    return check_config(content, f"{dataset.url}/runs")


FORMATS = ("webdataset", "parquet")


def export_dataset(
    url: str,
    out: str,
    modalities: Sequence[str] | None = None,
    split: str | None = None,
    layout: str = "webdataset",
) -> ExportReport:
    """Export what is finished in the given modalities (default: all), one split (default: train; of Parquet all).

    As WebDataset, boxes are decoded from their tokens.
    """
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout}: unknown{nearest(layout, FORMATS)}")
    dataset = Dataset(url)
    config = config_of(dataset)
    for name in modalities or ():
        if name not in config.modalities:
            raise ConfigError(f"{url} has no modality {name!r}{nearest(name, config.modalities)}")
    snapshot = make_snapshot(config, tuple(modalities) if modalities else None)
    if layout == "parquet":
        return export_parquet(snapshot, out, modalities, split=split or "all")
    resolved = resolve(config)
    decode = {
        name: codec_of(resolved, dataset, name).decode
        for name in snapshot.modalities
        if resolved.wanted[name].modality.contract.form == "boxes"
    }
    return export_webdataset(snapshot, out, modalities, split=split or "train", decode=decode)
