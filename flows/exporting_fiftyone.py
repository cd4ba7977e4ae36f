"""Export of kept labels as a FiftyOne dataset: detections, segmentation maps, captions beside the images.

FiftyOne is no dependency: it is imported when it is asked for. Its datasets refer to image files, so the images are read from the
source once more, and written to a folder.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from fourmill.config import Config
from fourmill.errors import ConfigError, SourceError, WorkMissing, first_line
from fourmill.labels import Absent, Boxes, Label
from fourmill.modality import CAPTION, Modality
from fourmill.shards.export import ExportReport, chosen_modalities
from fourmill.shards.export_cells import kept_labels
from fourmill.shards.samples import OK
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.sources.base import Row, Source, make_source
from fourmill.shards.tar import read_labels

IMAGES = "images"
ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}


def export_fiftyone(
    snapshot: Snapshot,
    config: Config,
    out: str,
    modalities: Sequence[str] | None = None,
    *,
    split: str = "all",
) -> ExportReport:
    """Make the persistent FiftyOne dataset that is called like the folder ``out``, whose images are written to it.

    ``modalities`` None: captions, and the boxes and class maps whose labels were kept. Raises ConfigError without FiftyOne.
    """
    fiftyone = _fiftyone()
    if split not in ("all", "train", "val"):
        raise ConfigError(f"--split {split}: train, val or all")
    kept = {n: kept_labels(snapshot, n) for n, m in snapshot.modalities.items() if _is_shown(m)}
    whole = [n for n, (_, shards) in kept.items() if all(s.index in shards for s in snapshot.shards)]
    known = [n for n in snapshot.modalities if n in whole or n == CAPTION.name]
    names = chosen_modalities(snapshot, modalities, known)
    for name in names:
        if name not in known:
            why = (
                "its labels were not kept; set keep_labels: true" if name in kept else "it is not shown there"
            )
            raise ConfigError(f"modality {name!r}: {why}, or leave it out")
    folder = Path(out).absolute()
    name = folder.name
    if fiftyone.dataset_exists(name):
        raise ConfigError(f"there is a FiftyOne dataset {name!r} already; choose another name for OUT")
    dataset = fiftyone.Dataset(name, persistent=True)
    dataset.mask_targets = {
        n: dict(enumerate(snapshot.modalities[n].contract.classes))
        for n in names
        if _is_map(snapshot.modalities[n])
    }
    report = ExportReport()
    source = make_source(config.source.kind, **config.source.options)
    try:
        for shard in range(len(snapshot.shards)):
            before = report.rows
            labels = {n: kept[n][0] for n in names if n in kept}
            made = _samples(fiftyone, snapshot, shard, source, labels, names, folder, split, report)
            dataset.add_samples(list(made))
            report.shards += report.rows > before
        if not report.rows:
            raise WorkMissing(f"{snapshot.dataset.url}: no row of split {split!r} is left to export")
    except BaseException:  # half of one would stand in the way of the next attempt
        dataset.delete()
        raise
    return report


def _fiftyone() -> ModuleType:
    try:
        return importlib.import_module("fiftyone")
    except ImportError as error:
        raise ConfigError(
            f"--format fiftyone needs FiftyOne ({first_line(error)}); install it with: pip install fiftyone"
        ) from error


def _is_map(modality: Modality) -> bool:
    return modality.contract.form == "map" and bool(modality.contract.classes)


def _is_shown(modality: Modality) -> bool:
    return modality.contract.form == "boxes" or _is_map(modality)


def _samples(
    fiftyone: Any, snapshot: Snapshot, shard: int, source: Source, labels: dict[str, str], names: Sequence[str],
    folder: Path, split: str, report: ExportReport,
) -> Iterator[Any]:  # fmt: skip
    dataset, ref = snapshot.dataset, snapshot.shards[shard]
    table = dataset.table(ref.files["samples"]).to_pylist()
    made = {
        n: read_labels(dataset.store.read(dataset.receipt(n, short, ref.index).file), snapshot.modalities[n])
        for n, short in labels.items()
    }
    kept = snapshot.is_kept(shard)
    rows = [r for r, s in enumerate(table) if kept[r] and s["status"] == OK and split in ("all", s["split"])]
    report.leave_out("set aside, of another split, or dropped", ref.rows - len(rows))
    read = source.read([Row(table[row]["key"], table[row]["position"]) for row in rows])
    for row, raw in zip(rows, read, strict=True):
        if isinstance(raw, Exception):
            raise SourceError(
                f"{table[row]['key']}: its image cannot be read any more: {first_line(raw)}"
            ) from raw
        path = _put_image(folder / IMAGES / f"{ref.index:06d}_{row:06d}", raw.image)
        sample = fiftyone.Sample(filepath=str(path), tags=[table[row]["split"]])
        sample["key"] = table[row]["key"]
        if CAPTION.name in names:
            sample["captions"] = table[row]["captions"]
        for name, by_row in made.items():
            if not isinstance(by_row[row], Absent):
                sample[name] = _label(fiftyone, by_row[row], snapshot.modalities[name])
        report.rows += 1
        yield sample


def _put_image(stem: Path, image: bytes | np.ndarray) -> Path:
    """The file as it was, or PNG of what was rendered."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, np.ndarray):
        path = stem.with_suffix(".png")
        Image.fromarray(image).save(path)
        return path
    with Image.open(io.BytesIO(image)) as opened:
        path = stem.with_suffix(ENDINGS.get(opened.format or "", ".img"))
    path.write_bytes(image)
    return path


def _label(fiftyone: Any, label: Label, modality: Modality) -> Any:
    """Boxes as [left, top, width, height] in shares of the image; a map of class ids, which it stretches over the image."""
    if not isinstance(label, Boxes):
        return fiftyone.Segmentation(mask=np.asarray(label, np.uint8))
    classes = modality.contract.classes
    found = [
        fiftyone.Detection(label=classes[int(number)], bounding_box=[x0, y0, x1 - x0, y1 - y0], confidence=float(score))
        for (x0, y0, x1, y1), number, score in zip(label.xyxy.tolist(), label.class_ids, label.scores, strict=True)
    ]  # fmt: skip
    return fiftyone.Detections(detections=found)
