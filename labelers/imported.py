"""Labels that people have already, as labelers without a network: matched to images by key, held to the same contracts.

    modalities:
      semseg: {labeler: imported_semseg, url: "s3://bucket/masks", classes: [background, cat, dog]}

A label of another size than its image is resized to the frame by the contract's rule: it is taken to cover the whole image.
``fourmill import-labels`` looks at such a URL first and writes these lines.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from fourmill.crops import resize_map
from fourmill.errors import ConfigError, ContractError
from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings, register
from fourmill.labelers.card import Card
from fourmill.labelers.depth import DEPTH, MIN_DEPTH_M
from fourmill.labelers.det import DET
from fourmill.labelers.imported_files import BadLabel, Coco, Shelf, decode, parse_coco
from fourmill.labelers.normal import NORMAL
from fourmill.labelers.quality import check
from fourmill.labelers.semseg import SEMSEG
from fourmill.labels import NOT_APPLICABLE, Absent, Boxes, Label
from fourmill.modality import Modality

#: a fact about the image: who has masks of half of them may build the others
NO_LABEL = f"{NOT_APPLICABLE}no imported label"
PREFIX = "imported_"
#: At most this share of a depth map may be without a depth; the rest is filled from its nearest neighbours.
MOST_HOLES = 0.5


class Imported(Labeler):
    """Options of all: ``url``: a folder, a tar or several (``masks-{000..099}.tar``), for boxes a COCO JSON file;
    ``suffix``: what label files have behind the key (``_depth`` of ``0001_depth.png``).

    A file's key is its path without the ending; a tar's member answers to its own key and to ``tar name/key``.
    """

    options: ClassVar[Mapping[str, Any]] = {"url": None, "suffix": ""}
    card: ClassVar[Card | None] = Card(
        expects="files that answer to the keys of the source's images",
        note="no weights: labels that you have",
    )

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        if settings.model is not None:
            raise ConfigError(f"{self.where}.model: imported labels have no network; remove the key")

    @cached_property
    def shelf(self) -> Shelf:
        url = self.params["url"]
        if not isinstance(url, str) or not url:
            raise ConfigError(f"{self.where}.url: say where the labels are: a folder or any fsspec URL")
        return Shelf(url, str(self.params["suffix"] or ""), f"{self.where}.url")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("shelf", "coco", "made")}

    def describe(self) -> Modality:
        """The modality under the name that the configuration gives it: a second set of masks may be called `parts`."""
        return replace(self.modality, name=self.settings.modality)

    @cached_property
    def made(self) -> Modality:
        return self.describe()

    def recipe(self) -> dict[str, Any]:
        """The labels' contents stand for the URL: they may move."""
        params = {name: value for name, value in self.params.items() if name != "url"}
        return {**super().recipe(), "params": params, "labels": self.shelf.digest()}

    def names(self) -> dict[str, str]:
        """What each label is called, by every key that it answers to."""
        return {key: place.name for key, place in self.shelf.by_key().items()}

    def label(self, batch: LabelBatch) -> list[Label]:
        rows = zip(batch.keys, batch.frames, batch.present, strict=True)
        return [self.one(key, frame) if there else Absent(NO_LABEL) for key, frame, there in rows]

    def one(self, key: str, frame: np.ndarray) -> Label:
        """The label of one image whose frame is uint8 (H, W, 3); `Absent` says what is wrong with the file."""
        try:
            label = self.read(key, frame)
            if not isinstance(label, Absent):
                check(self.made, [label], [frame], [key])
        except BadLabel as why:
            return Absent(f"imported label: {why}")
        except ContractError as why:
            return Absent(f"imported label: {why}"[:300])
        return label

    def read(self, key: str, frame: np.ndarray) -> Label:
        place = self.shelf.by_key().get(key)
        if place is None:
            return Absent(NO_LABEL)
        return self.fit(
            decode(self.shelf.read(place), place.name), place.name, (frame.shape[0], frame.shape[1])
        )

    @abstractmethod
    def fit(self, array: np.ndarray, name: str, size: tuple[int, int]) -> Label:
        """The file's array -> the label of a frame of ``size`` = (H, W), or BadLabel."""


def _plane(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W) of a map without channels."""
    thin = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    thin = thin[0] if thin.ndim == 3 and thin.shape[0] == 1 else thin
    if thin.ndim != 2 or not thin.size:
        raise BadLabel(f"{name} has shape {array.shape}; a map without channels is expected")
    return thin


@register(f"{PREFIX}depth")
class ImportedDepth(Imported):
    """z-depth: ``scale`` metres for each unit of the file (0.001 for PNGs in millimetres; needed for PNGs).

    Pixels of ``void``, not finite or not above 0 have no depth: they take that of the nearest pixel that has one.
    """

    modality: ClassVar[Modality] = DEPTH
    options: ClassVar[Mapping[str, Any]] = {**Imported.options, "scale": None, "void": 0}

    def describe(self) -> Modality:
        if self.params["scale"] is None and self.shelf.example().lower().endswith(".png"):
            raise ConfigError(
                f"{self.where}.scale: PNGs hold integers; say how many metres one unit is, such as 0.001"
            )
        return super().describe()

    def fit(self, array: np.ndarray, name: str, size: tuple[int, int]) -> Label:
        plane, scale = _plane(array, name), self.params["scale"]
        depth_m = plane.astype(np.float32) * np.float32(1 if scale is None else scale)
        holes = (plane == self.params["void"]) | ~np.isfinite(depth_m) | (depth_m <= 0)
        share = float(holes.mean())
        if share > MOST_HOLES:
            raise BadLabel(f"{name}: {share:.0%} of its pixels have no depth")
        filled = _filled(depth_m, holes) if share else depth_m
        return np.maximum(resize_map(filled, size, self.modality.contract.resample), np.float32(MIN_DEPTH_M))


def _filled(values: np.ndarray, holes: np.ndarray) -> np.ndarray:
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(holes, return_distances=False, return_indices=True)
    return values[rows, columns]


@register(f"{PREFIX}normal")
class ImportedNormal(Imported):
    """Normals: x right, y up, z toward the viewer. PNGs hold (n + 1) / 2; npy the vectors themselves.

    ``negate`` names the axes that point the other way in the files, such as "yz". Pixels without a normal look at the viewer.
    """

    modality: ClassVar[Modality] = NORMAL
    options: ClassVar[Mapping[str, Any]] = {**Imported.options, "negate": ""}

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        if set(str(self.params["negate"])) - set("xyz"):
            raise ConfigError(f"{self.where}.negate: {self.params['negate']!r}; name axes, such as yz")

    def fit(self, array: np.ndarray, name: str, size: tuple[int, int]) -> Label:
        if array.ndim == 3 and array.shape[0] == 3 != array.shape[-1]:
            array = array.transpose(1, 2, 0)
        if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            raise BadLabel(f"{name} has shape {array.shape}; three channels are expected")
        vectors = array.astype(np.float32)
        if np.issubdtype(array.dtype, np.unsignedinteger):
            vectors = vectors * np.float32(2 / np.iinfo(array.dtype).max) - 1
        signs = [-1 if axis in str(self.params["negate"]) else 1 for axis in "xyz"]
        vectors = resize_map(vectors * np.array(signs, np.float32), size, self.modality.contract.resample)
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        away = ~(lengths > 0.1) | ~np.isfinite(lengths)  # (128, 128, 128), and what resampling cancelled
        unit = vectors / np.where(away, np.float32(1), lengths)
        return np.where(away, np.array([0, 0, 1], np.float32), unit)


@register(f"{PREFIX}semseg")
class ImportedSemseg(Imported):
    """Class ids (H, W): ``classes`` names them in order. ``void``: an id (often 255) that becomes a class of its own, last."""

    modality: ClassVar[Modality] = SEMSEG
    options: ClassVar[Mapping[str, Any]] = {**Imported.options, "classes": None, "void": None}

    def describe(self) -> Modality:
        return super().describe().with_classes(self._classes())

    def _classes(self) -> tuple[str, ...]:
        given = self.params["classes"]
        if not isinstance(given, (list, tuple)) or not given or len(set(map(str, given))) < len(given):
            raise ConfigError(f"{self.where}.classes: list the names of the class ids in order, each once")
        void = self.params["void"] is not None
        if len(given) + void > 256:
            raise ConfigError(f"{self.where}.classes: {len(given)} classes do not fit 8 bits")
        return (*map(str, given), "void") if void else tuple(map(str, given))

    def fit(self, array: np.ndarray, name: str, size: tuple[int, int]) -> Label:
        plane = _plane(array, name)
        if not np.issubdtype(plane.dtype, np.integer) and plane.dtype != bool:
            raise BadLabel(f"{name} holds {plane.dtype}; class ids are integers")
        ids, count = plane.astype(np.int64), len(self.params["classes"])
        if self.params["void"] is not None:
            ids = np.where(ids == int(self.params["void"]), count, ids)
        if ids.min() < 0 or ids.max() >= len(self.made.contract.classes):
            raise BadLabel(f"{name} has class ids {ids.min()}..{ids.max()}; there are {count} classes")
        return resize_map(ids.astype(np.uint8), size, "nearest")


@register(f"{PREFIX}det")
class ImportedDet(Imported):
    """`Boxes` of a COCO JSON file: keys are the ``file_name`` without its ending, classes the categories in order of their ids.

    Boxes refer to the upright image's width and height as the file gives them. ``min_score`` drops those that say less.
    """

    modality: ClassVar[Modality] = DET
    options: ClassVar[Mapping[str, Any]] = {"url": None, "min_score": 0.0}

    @cached_property
    def shelf(self) -> Shelf:
        url = self.params["url"]
        if not isinstance(url, str) or not url.lower().endswith(".json"):
            raise ConfigError(f"{self.where}.url: expected a COCO file (.json), got {url!r}")
        return Shelf(url, "", f"{self.where}.url")

    @cached_property
    def coco(self) -> Coco:
        return parse_coco(self.shelf.read_json(), f"{self.where}.url: {self.params['url']}")

    def describe(self) -> Modality:
        return super().describe().with_classes(self.coco.classes)

    def names(self) -> dict[str, str]:
        return {key: key for key in self.coco.boxes}

    def read(self, key: str, frame: np.ndarray) -> Label:
        found = self.coco.boxes.get(key)
        if found is None:
            return Absent(NO_LABEL)
        if isinstance(found, BadLabel):
            raise found
        kept = [box for box in found if box[2] >= float(self.params["min_score"])]
        kept.sort(key=lambda box: -box[2])
        if not kept:
            return Boxes.empty()
        xyxy, ids, scores = zip(*kept, strict=True)
        return Boxes(np.array(xyxy, np.float32), np.array(ids, np.int64), np.array(scores, np.float32))

    def fit(self, array: np.ndarray, name: str, size: tuple[int, int]) -> Label:
        raise BadLabel(f"{name} is no box")
