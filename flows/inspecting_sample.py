"""Everything about one sample: how it was read and cropped, what each modality holds, and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourmill.errors import FourmillError
from fourmill.flows.inspecting_show import cells, fact_table, new_table, short_text, title, token_text
from fourmill.flows.report.links import Reader
from fourmill.flows.report.pictures import make_painters, png_bytes
from fourmill.flows.report.view import Sample, View
from fourmill.labels import Absent, Label
from fourmill.shards.dataset import Dataset


def describe_sample(dataset: Dataset, key: str, out: Path | None) -> list[Any]:
    """Its row of the samples table, and per modality the tokens, or why there are none.

    With ``out``, writes OUT/image.png and for each modality that can be drawn MODALITY.label.png (made again by the
    labeler that made the tokens) and MODALITY.tokens.png. Raises DatasetError for a key that the dataset does not have.
    """
    view = View.open(dataset.url, None)
    sample, entry, shard, row = view.find(key)
    facts = {"key": key, "dataset": dataset.url, "shard": shard, "row": row}
    facts |= {name: entry[name] for name in ("status", "split", "width", "height", "key64", "position")}
    parts: list[Any] = [title("a sample"), fact_table(facts)]
    if sample is None:
        if out is not None:
            parts.append(title("set aside: there are no pictures of it"))
        return parts
    parts.append(_crops(entry))
    parts.append(fact_table({f"caption {i}": text for i, text in enumerate(entry["captions"])}))
    decoded = {name: view.decode(name, [sample])[0] for name in view.names}
    table = new_table("modality", "labeler", "tokens", "decoded")
    for name in view.names:
        cell = view.cell(name, sample)
        tokens = "" if isinstance(cell, Absent) else token_text(cell)
        labeler = view.resolved.wanted[name].labeler or "source"
        table.add_row(*cells(name, labeler, tokens, short_text(view.modalities[name], decoded[name])))
    parts.append(table)
    if out is not None:
        parts.append(fact_table({"written": ", ".join(_write_pictures(view, sample, decoded, out))}))
    return parts


def _crops(entry: dict[str, Any]) -> Any:
    table = new_table("crop>", "top>", "left>", "height>", "width>", "flip>")
    numbers = entry["crops"]
    for crop in range(len(numbers) // 5):
        table.add_row(*cells(crop, *numbers[5 * crop : 5 * crop + 5]))
    return table


def _write_pictures(view: View, sample: Sample, decoded: dict[str, Label], out: Path) -> list[str]:
    """Names of the files. They are made of modality names, never of keys."""
    stand = [name for name in view.names if view.label_recipe_stands(name)]
    reader = Reader(view, stand)
    _, images, made = next(iter(reader.batches([sample])))
    labels = {name: column[0] for name, column in made.items()}
    known = {name: view.modalities[name] for name in view.names}
    references = {name: [labels.get(name, decoded[name])] for name in known}
    painters, _ = make_painters(known, view.image_size, references)
    pictures = {"image": images[0]}
    for name, painter in painters.items():
        for kind, label in (("label", labels.get(name)), ("tokens", decoded[name])):
            pixels = painter.paint(label, images[0])
            if pixels is not None and not (painter.family == "image" and kind == "label"):
                scale = max(1, view.image_size // pixels.shape[0])  # features are small
                pictures[f"{name}.{kind}"] = pixels.repeat(scale, 0).repeat(scale, 1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stem, pixels in pictures.items():
            (out / f"{stem}.png").write_bytes(png_bytes(pixels))
    except OSError as error:
        raise FourmillError(f"--out {out}: cannot write there: {error}") from error
    return [f"{stem}.png" for stem in pictures]
