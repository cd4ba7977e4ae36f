"""The page: what the template is given, and rendering it. Everything that came from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import yaml

from fourmill.errors import FourmillError
from fourmill.flows.report.curve import Chart, loss_chart
from fourmill.flows.report.facts import SetAside, Work, read_records, set_aside, work_of
from fourmill.flows.report.links import LABEL, MODEL, ROUND_TRIP, TRUTH, Links, Reader, Shown
from fourmill.flows.report.measures import FIGURES, first_text, measure_class
from fourmill.flows.report.pictures import (
    DEPTH_COLOURS,
    DRAWN,
    Painter,
    Palette,
    data_uri,
    depth_ticks,
    normal_ball,
)
from fourmill.flows.report.tables import LINKS, figure_text, links_of
from fourmill.flows.report.view import Trained, View
from fourmill.flows.status import Status, human_bytes
from fourmill.labels import Absent, Boxes, Label
from fourmill.shards.dataset import SAMPLES

ROW_TITLES = {
    LABEL: ("label", "what the labeler says"),
    ROUND_TRIP: ("round trip", "its tokens, decoded"),
    MODEL: ("model", "predicted from RGB alone"),
    TRUTH: ("truth", "of the source"),
}
SET_ASIDE_SHOWN, THUMBNAILS, THUMBNAIL_PX = 12, 8, 56
LEGEND_CLASSES = 40


@dataclass
class Page:
    """All that the page shows. Properties are what the template asks for."""

    view: View
    trained: Trained | None
    links: Links
    numbers: dict[str, Any]
    status: Status
    painters: Mapping[str, Painter]
    palette: Palette
    shown_from: str

    @property
    def title(self) -> str:
        return self.view.dataset.url.rstrip("/").rsplit("/", 1)[-1]

    # -- numbers --------------------------------------------------------------------------------------

    @cached_property
    def number_links(self) -> list[tuple[str, str]]:
        reference = "truth" if self.numbers["has_truth"] else "label"
        return [(link, LINKS[link].format(reference)) for link in links_of(self.numbers)]

    @property
    def number_rows(self) -> Iterator[dict[str, Any]]:
        limits = {target["modality"]: target for target in self.numbers["targets"]}
        for name, entry in self.numbers["modalities"].items():
            for number, (figure, values) in enumerate(entry["figures"].items()):
                if not values:
                    continue
                yield {
                    "modality": name,
                    "first": number == 0,
                    "title": FIGURES[figure].title,
                    "arrow": "↓" if FIGURES[figure].better == "lower" else "↑",
                    "better": FIGURES[figure].better,
                    "cells": {link: figure_text(figure, values.get(link)) for link, _ in self.number_links},
                    "target": limits.get(name) if number == 0 else None,
                    "own_label": entry["compared_with"] == LABEL and self.numbers["has_truth"],
                }

    @property
    def targets(self) -> list[dict[str, Any]]:
        return [
            {
                **target,
                "figure": next(iter(self.numbers["modalities"][target["modality"]]["figures"])),
                "shown": self._target_text(target, target["value"]),
                "limit_shown": self._target_text(target, target["limit"]),
            }
            for target in self.numbers["targets"]
        ]

    def _target_text(self, target: Mapping[str, Any], value: float) -> str:
        return figure_text(next(iter(self.numbers["modalities"][target["modality"]]["figures"])), value)

    # -- samples --------------------------------------------------------------------------------------

    @cached_property
    def drawn(self) -> list[str]:
        """The modalities with pictures, the image first."""
        names = [name for name in self.view.names if self.painters[name].family in DRAWN]
        return sorted(names, key=lambda name: self.painters[name].family != "image")

    @cached_property
    def written(self) -> list[str]:
        return [name for name in self.view.names if name not in self.drawn]

    @cached_property
    def rows(self) -> list[tuple[str, str, str]]:
        """(link, title, subtitle) of the links that any sample has."""
        return [
            (link, *ROW_TITLES[link])
            for link in ROW_TITLES
            if any(one.links.get(link) for one in self.links.shown)
        ]

    @property
    def samples(self) -> Iterator[dict[str, Any]]:
        for one in self.links.shown:
            yield {
                "key": one.sample.key,
                "shard": one.sample.shard,
                "row": one.sample.row,
                "pictures": {
                    link: [self._picture(one, link, name) for name in self.drawn] for link, _, _ in self.rows
                },
                "texts": [(name, self._texts(one, name)) for name in self.written],
            }

    def _picture(self, one: Shown, link: str, name: str) -> dict[str, Any]:
        """``src`` a data: URI or None; ``says``: a figure, or why there is no picture."""
        label = one.links[link].get(name)
        if isinstance(label, Absent):
            return {"src": None, "says": label.reason, "alt": "", "small": False}
        painter = self.painters[name]
        pixels = painter.paint(label, one.image)
        if pixels is None:
            return {"src": None, "says": self._why_not(link, name), "alt": "", "small": False}
        return {
            "src": data_uri(pixels, painter.family),
            "says": self._figure(one, link, name, label),
            "alt": f"{name}, {ROW_TITLES[link][0]}",
            "small": pixels.shape[0] < 64,
        }

    def _why_not(self, link: str, name: str) -> str:
        if link == MODEL and self.painters[name].family == "image":
            return "the input"
        return self.links.notes.get(name, "") if link in (LABEL, TRUTH) else ""

    def _figure(self, one: Shown, link: str, name: str, label: Label) -> str:
        """This sample's own first figure, against what the link is compared with."""
        other = LABEL if link == ROUND_TRIP else self.links.references[name]
        reference = one.links.get(other, {}).get(name)
        if link == other or reference is None or isinstance(reference, Absent):
            return f"{len(label)} boxes" if isinstance(label, Boxes) else ""
        measure = measure_class(self.view.modalities[name])(self.view.modalities[name])
        measure.add(label, reference)
        figure = measure.figures[0]
        return f"{figure.title} {figure.text(measure.values()[figure.name])}"

    def _texts(self, one: Shown, name: str) -> list[tuple[str, str]]:
        out = []
        for link, title, _ in self.rows:
            label = one.links[link].get(name)
            if label is not None:
                text = f"({label.reason})" if isinstance(label, Absent) else _as_text(label)
                out.append((title, text))
        return out

    # -- legends --------------------------------------------------------------------------------------

    @property
    def legends(self) -> Iterator[dict[str, Any]]:
        for name in self.drawn:
            painter = self.painters[name]
            if painter.family in ("depth", "relative"):
                bar = np.repeat(DEPTH_COLOURS[::-1][None], 2, axis=0)
                units = "metres" if painter.family == "depth" else "times the nearest surface"
                ticks = [(100 * at, text) for at, text in depth_ticks(painter.low, painter.high)]
                yield {"kind": "bar", "name": name, "src": data_uri(bar), "ticks": ticks, "units": units}
            elif painter.family == "normal":
                yield {"kind": "ball", "name": name, "src": data_uri(normal_ball(96))}
            elif painter.family == "features":
                yield {
                    "kind": "text",
                    "name": name,
                    "text": "first three principal components as red, green, blue",
                }
        names = self.palette.names[:LEGEND_CLASSES]
        if names:
            where = [n for n in self.drawn if self.painters[n].family in ("classes", "boxes")]
            yield {
                "kind": "classes",
                "name": " and ".join(where),
                "classes": [(class_name, self.palette.hex(class_name)) for class_name in names],
                "more": len(self.palette.names) - len(names),
            }

    # -- the dataset ----------------------------------------------------------------------------------

    @property
    def modalities(self) -> Iterator[dict[str, Any]]:
        for name, one in self.status.modalities.items():
            wanted = self.view.resolved.wanted.get(name)
            reasons = {r: n - self.no_image.get(r, 0) for r, n in self.status.reasons.get(name, {}).items()}
            yield {
                "name": name,
                "labeler": (wanted.labeler or "source") if wanted else "",
                "tokens": self._token_text(name),
                "finished": one.finished,
                "pending": one.pending,
                "stale": one.stale,
                "parked": one.parked,
                "rows": one.rows,
                "absent": one.absent,
                "size": human_bytes(one.bytes),
                "reasons": {reason: rows for reason, rows in reasons.items() if rows > 0},
                "errors": self.status.parked.get(name, {}),
            }

    @property
    def no_image(self) -> dict[str, int]:
        """Rows of the source without an image, by reason; they are absent in every modality."""
        return self.status.reasons.get(SAMPLES, {})

    def _token_text(self, name: str) -> str:
        modality = self.view.modalities.get(name)
        if modality is None or not modality.vocab_size:
            return ""
        most = "up to " if modality.kind == "sequence" else ""
        return f"{most}{modality.num_tokens} of {modality.vocab_size}"

    @cached_property
    def set_aside(self) -> list[dict[str, Any]]:
        thumbnails = 0
        out = []
        for one in set_aside(self.view, SET_ASIDE_SHOWN):
            src = self._thumbnail(one) if one.column != SAMPLES and thumbnails < THUMBNAILS else None
            thumbnails += src is not None
            where = "no image" if one.column == SAMPLES else f"no {one.column}"
            out.append(
                {
                    "key": one.key,
                    "where": where,
                    "reason": one.reason,
                    "src": src,
                }
            )
        return out

    def _thumbnail(self, one: SetAside) -> str | None:
        """A small picture of a row that has an image but no label; None where it can't be read now."""
        reader, sample = Reader(self.view, []), self.view.sample(one.shard, one.row)
        try:
            raw = next(iter(self.view.resolved.source.read([sample.source_row])))
            picture = reader.picture(reader.frame(sample, raw), sample)
        except (FourmillError, OSError):
            return None
        step = max(1, picture.shape[0] // THUMBNAIL_PX)
        return data_uri(picture[::step, ::step], "image")

    @cached_property
    def work(self) -> Work:
        return work_of(self.view)

    @property
    def phases(self) -> list[tuple[str, float, float]]:
        """(phase, seconds, share in per cent)"""
        total = sum(self.work.seconds.values()) or 1.0
        return [(phase, seconds, 100 * seconds / total) for phase, seconds in self.work.seconds.items()]

    # -- training and configuration --------------------------------------------------------------------

    @cached_property
    def chart(self) -> Chart | None:
        return loss_chart(read_records(self.trained.records)) if self.trained else None

    @property
    def training(self) -> str:
        state = self.trained.state if self.trained else None
        return yaml.safe_dump(state.config, sort_keys=False) if state else ""

    @property
    def versions(self) -> Mapping[str, str]:
        state = self.trained.state if self.trained else None
        return state.versions if state else {}

    @property
    def config(self) -> str:
        content = self.view.config.model_dump(mode="json", exclude={"train"})
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _as_text(label: Label) -> str:
    return f"{label:.4g}" if isinstance(label, (float, np.floating)) else first_text(label)


def render(page: Page) -> str:
    """The whole page, self-contained: styles and pictures are in it, and no script is."""
    here = files("fourmill.flows.report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (here / name).read_text()),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["format_count"] = lambda count: f"{count:,}".replace(",", "\u202f")
    return environment.get_template("page.j2").render(page=page, css=(here / "page.css").read_text())
