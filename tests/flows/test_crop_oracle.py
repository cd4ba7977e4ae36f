"""Crops and flips of every kind of modality on images that are not square: the stored tokens of crop k are those of the truth,
cut by an oracle of its own (tests/crop_oracle.py) and tokenized. Each test also meets an oracle that is wrong by half a pixel, one
that forgets flips and, where there is one, one with a wrong sign, and has to refuse them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crop_oracle import JOINTS, Oracle, inside, joints_of, mirrored_places, resized, symmetric_rest
from PIL import Image
from safetensors.torch import save_file
from small_builds import small_config, without_ray
from tokenize_released import config_of, write_released

from fourmill.crops import crop_poses, draw_crops
from fourmill.flows.build import build
from fourmill.flows.crop_labels import crop_label
from fourmill.flows.resolve import resolve
from fourmill.flows.training import codec_of, make_snapshot
from fourmill.labelers.base import LabelBatch, Labeler, labelers
from fourmill.labels import Boxes, Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import RGB, LabelContract, Modality
from fourmill.seeds import generator, key64
from fourmill.shards.dataset import Dataset
from fourmill.tokenize.published_network import PublishedNetwork, ReleasedConfig
from fourmill.tokenize.sam_instances import stretched_mask
from fourmill.tokenize.vqvae import VQVAE, VQConfig

SIDE, N_CROPS = 64, 3
#: (width, height): as the decode frame has it, larger, much longer than wide
SIZES = ((96, 64), (64, 96), (130, 80), (75, 120), (200, 90), (64, 150))
CLASSES = ("cat", "dog", "tree")
RIGHT = Oracle()
#: each is wrong in one way
WRONG = {"half a pixel": Oracle(shift=0.5), "no flips": Oracle(flips=False), "sign of x": Oracle(sign=1.0)}


def grid(
    name: str, form: str = "map", dtype: str = "float32", kind: Any = "grid", **contract: Any
) -> Modality:
    made: dict[str, Any] = {"form": form, "dtype": dtype, **contract}
    return Modality(name=name, kind=kind, codec="vqvae", contract=LabelContract(**made))


def sequence(name: Any, codec: str = "", **contract: Any) -> Modality:
    made: dict[str, Any] = {"form": name, "dtype": "", **contract}
    return Modality(
        name=name, kind="sequence", codec=codec or name, reference_name=name, contract=LabelContract(**made)
    )


MAPS: dict[str, Modality] = {
    "depth": grid("depth", units="metres", low=1e-3),
    "normal": grid("normal", channels=3, low=-1.001, high=1.001, unit_norm=True, flip="mirror_negate_x"),
    "edges": grid("edges", dtype="uint8", low=0, high=255),
    "semseg": grid("semseg", dtype="uint8", units="class id", resample="nearest", classes=CLASSES),
}
BY_CROP = {
    "clip": grid("clip", "features", channels=3, flip="none"),
    "halves": grid("halves", "vector", kind="vector", channels=6, flip="none"),
}
OTHERS: dict[str, Modality] = {
    "det": Modality(
        name="det",
        kind="sequence",
        codec="boxes",
        contract=LabelContract(form="boxes", dtype="", classes=CLASSES),
    ),
    "poses": sequence("poses"),
    "instances": sequence("instances"),
    "palette": sequence("palette"),
    "metadata": sequence("metadata"),
    "score": Modality(
        name="score", kind="scalar", codec="scalar", contract=LabelContract(form="scalar", dtype="float32")
    ),
}
#: how features are made of a crop: single pixels of it, so that each has a place
OF_PIXELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clip": lambda p: p[7::16, 5::16].astype(np.float32) / 64 - 2,
    "halves": lambda p: np.concatenate([p[20, 10], p[41, 49]]).astype(np.float32) / 64 - 2,
}


@cache
def truth_of(name: str, key: str, shape: tuple[int, int]) -> Label:
    """Noise of its own for every sample: no two pixels are alike, so half of one matters."""
    rng = generator(0, f"truth of {name}", key64(key))
    if name == "depth":
        return rng.uniform(0.6, 15, shape).astype(np.float32)
    if name == "normal":
        vectors = rng.normal(size=(*shape, 3)) + [0.8, 0, 0]
        return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    if name == "edges":
        return rng.integers(0, 256, shape).astype(np.uint8)
    if name == "semseg":
        return rng.integers(0, len(CLASSES), shape).astype(np.uint8)
    corner = rng.uniform(0, 0.7, (4, 2))
    xyxy = np.concatenate([corner, corner + rng.uniform(0.1, 0.3, (4, 2))], axis=1)
    if name == "det":
        return Boxes(xyxy.astype(np.float32), rng.integers(0, 3, 4), np.ones(4, np.float32))
    if name == "poses":
        return Poses.of(
            xyxy, body_pose=rng.uniform(-1, 1, (4, 23, 3, 3)), orient=rng.uniform(-1, 1, (4, 3, 3)),
            betas=rng.uniform(-2, 2, (4, 10)), camera=rng.uniform(-1, 1, (4, 3)) + [5, 0, 0],
        )  # fmt: skip
    if name == "instances":
        xyxy[:, 2:] += 0.2
        return Instances.of(xyxy.clip(0, 1), [box[[[0, 1], [2, 1], [0, 3]]].clip(0, 1) for box in xyxy])
    if name == "palette":
        return Palettes((rng.integers(0, 256, (5, 3)).astype(np.uint8),))
    return Metadata({"n_humans": int(rng.integers(9))}) if name == "metadata" else float(rng.normal())


def labeler_of(modality: Modality) -> type[Labeler]:
    def label(self: Labeler, batch: LabelBatch) -> list[Label]:
        if modality.name in OF_PIXELS:
            assert batch.crops is not None
            return [OF_PIXELS[modality.name](crop) for crops in batch.crops for crop in crops]
        return [
            truth_of(modality.name, k, f.shape[:2]) for k, f in zip(batch.keys, batch.frames, strict=True)
        ]

    sees: dict[str, Any] = {"sees": "crops", "inputs": ("crops",)} if modality.name in OF_PIXELS else {}
    return type(modality.name.title(), (Labeler,), {"modality": modality, "label": label, **sees})


def write_tokenizer(modality: Modality, folder: Path) -> Path:
    """Random weights: every pixel counts."""
    config = VQConfig(
        dim=32, encoder_depth=1, decoder_depth=1, heads=2, patch_size=8, latent_dim=8, codebook_size=256, class_dim=4
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features: dict[str, Any] = {"clip": {"grid": (4, 4), "channels": 3}, "halves": {"channels": 6}}
        codec = VQVAE(modality, SIDE, config, **features.get(modality.name, {}))
        for name, weights in codec.network.named_parameters():
            if name.startswith(("embed", "to_latent")):
                weights.data *= 3
        codes = torch.nn.functional.normalize(torch.randn(256, 8), dim=1)
        codec.network.get_buffer("quantizer.codes").copy_(codes)
    codec.freeze().save(folder)
    return folder


class Built:
    """The dataset, opened, row by row."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.frames: dict[int, np.ndarray] = {}
        made = [*MAPS.values(), *BY_CROP.values(), *OTHERS.values()]
        parts = {
            "poses": {"pose_tokenizer": str(_pose_tokenizer(root / "pose"))},
            "instances": {"mask_tokenizer": str(write_released("sam_mask", root / "mask"))},
        }
        modalities: dict[str, Any] = {"caption": {}, "rgb_pixels": {"tokenizer": {"format": "png"}}}
        for modality in (RGB, *made):
            given = (
                {"model": str(write_tokenizer(modality, root / modality.name))}
                if modality.codec == "vqvae"
                else {}
            )
            modalities[modality.name] = {"tokenizer": {**given, **parts.get(modality.name, {})}}
        self.config = small_config(
            root / "ds", modalities, source={"kind": "folder", "path": str(root / "photos")}, n_crops=N_CROPS,
            image_size=SIDE, shard_size=4, decode={"shorter_side": SIDE},
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch, without_ray():
            known = {**dict(labelers.items()), **{m.name: labeler_of(m) for m in made}}
            patch.setattr(labelers, "_known", known)
            assert build(self.config).status.complete
            self.dataset, self.resolved = Dataset(self.config.dataset), resolve(self.config)
            self.snapshot = make_snapshot(self.config)
        tables = [self.dataset.samples(shard) for shard in range(2)]
        self.keys = [key for table in tables for key in table["key"].to_pylist()]
        self.hw = [
            (h, w)
            for t in tables
            for h, w in zip(t["height"].to_pylist(), t["width"].to_pylist(), strict=True)
        ]
        self.crops = np.array([c for t in tables for c in t["crops"].to_pylist()]).reshape(-1, N_CROPS, 5)
        self.places = [(row, index) for row in range(len(self.keys)) for index in range(N_CROPS)]

    def stored(self, name: str) -> list[Any]:
        columns = [self.snapshot.column(shard, name) for shard in range(2)]
        is_scalar = name == "score"
        return [columns[row // 4].cells(row % 4, 0 if is_scalar else index) for row, index in self.places]

    def codec(self, name: str) -> Any:
        return codec_of(self.resolved, self.dataset, name)

    def frame(self, row: int) -> np.ndarray:
        """The image with its shorter side at `SIDE`."""
        if row in self.frames:
            return self.frames[row]
        image, hw = np.asarray(Image.open(self.root / "photos" / f"{self.keys[row]}.png")), self.hw[row]
        scale = SIDE / min(hw)
        made = resized(image, (round(hw[0] * scale), round(hw[1] * scale)), "bicubic")
        return self.frames.setdefault(row, made)

    def shape(self, row: int) -> tuple[int, int]:
        return self.frame(row).shape[:2]

    def cut(self, oracle: Oracle, name: str, row: int, index: int) -> Any:
        """The truth of one crop."""
        crop, hw = self.crops[row, index], self.hw[row]
        if name in ("rgb", "rgb_pixels", *OF_PIXELS):
            pixels = oracle.map(self.frame(row), crop, hw, SIDE, "bicubic")
            return OF_PIXELS[name](pixels) if name in OF_PIXELS else pixels
        truth = truth_of(name, self.keys[row], self.shape(row))
        if name in MAPS:
            contract = MAPS[name].contract
            out = oracle.map(truth, crop, hw, SIDE, contract.resample, contract.flip)
            return out / np.linalg.norm(out, axis=-1, keepdims=True) if contract.unit_norm else out
        return oracle.boxes(truth, crop, hw) if name == "det" else oracle.poses(truth, crop, hw)

    def agreement(self, oracle: Oracle, name: str) -> np.ndarray:
        """Share of equal tokens of each (row, crop)."""
        cut = [self.cut(oracle, name, row, index) for row, index in self.places]
        tokens = np.stack([np.asarray(v) for v in self.codec(name).encode(cut)])
        return np.asarray((tokens == np.stack(self.stored(name))).mean(1))


def _pose_tokenizer(folder: Path) -> Path:
    """Random weights, of the published kind."""
    changes = {"n_channels": 207, "num_codebooks": 8}
    write_released("global_memcodes", folder, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PublishedNetwork(ReleasedConfig.from_mapping({**config_of("global_memcodes"), **changes}))
        weights = {name: torch.randn_like(w) * 0.2 for name, w in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("oracle")
    (root / "photos").mkdir()
    rng = np.random.default_rng(4)
    for number, (width, height) in enumerate(SIZES):
        noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(noise).save(root / "photos" / f"{number}.png")
        texts = [f"photo {number} part {index}" for index in range(N_CROPS)]
        (root / "photos" / f"{number}.txt").write_text("\n".join(texts))
    return Built(root)


def test_the_crops_are_worth_the_test(built: Built) -> None:
    for key, (height, width), crops in zip(built.keys, built.hw, built.crops, strict=True):
        assert (width, height) == SIZES[int(key)]
        assert np.array_equal(crops, draw_crops(0, key64(key), width, height, N_CROPS))
    flips = built.crops[:, 1:, 4]
    assert 3 < flips.sum() < flips.size - 3, "the seed has to give both"
    assert all(h != w for h, w in built.hw) and (built.crops[:, 1:, 2] != built.crops[:, 1:, 3]).any()


@pytest.mark.parametrize("name", [*MAPS, "rgb", *BY_CROP])
def test_tokens_of_a_crop_are_those_of_the_cropped_truth(built: Built, name: str) -> None:
    right = built.agreement(RIGHT, name)
    assert right.mean() > 0.99 and right.min() > 0.9, (name, right)
    flipped = np.array([built.crops[row, index, 4] == 1 for row, index in built.places])
    for what, oracle in WRONG.items():
        wrong = built.agreement(oracle, name)
        where = flipped if what == "no flips" or name == "normal" else np.ones_like(flipped)
        if what != "sign of x" or name == "normal":
            assert wrong[where].max() < 0.85, f"{name}: {what} is not noticed: {wrong}"


def test_pixels_are_stored_as_they_are_cut(built: Built) -> None:
    found = built.codec("rgb_pixels").decode(built.stored("rgb_pixels"))
    for oracle, least, most in ((RIGHT, 0.0, 0.2), (WRONG["half a pixel"], 8.0, 255.0)):
        for (row, index), pixels in zip(built.places, found, strict=True):
            off = np.abs(built.cut(oracle, "rgb_pixels", row, index).astype(int) - pixels).mean()
            assert least <= off <= most, (built.keys[row], index, off)


def distance(found: Any, cut: Any) -> float:
    """Largest of the boxes' corners, in pixels of the crop; infinite where there are others, or of other classes."""
    if len(found) != len(cut):
        return np.inf
    kinds = (found.class_ids, cut.class_ids) if isinstance(cut, Boxes) else (np.zeros(len(cut)),) * 2
    one, two = (
        np.column_stack([kind, x.xyxy])[np.lexsort(np.round(x.xyxy.T, 2))]
        for kind, x in zip(kinds, (found, cut), strict=True)
    )
    return float(np.abs(one - two).max(initial=0)) * SIDE if np.array_equal(one[:, 0], two[:, 0]) else np.inf


def test_boxes_lie_where_they_lie_in_the_crop(built: Built) -> None:
    found = built.codec("det").decode(built.stored("det"))

    def far(oracle: Oracle) -> np.ndarray:
        return np.array(
            [
                distance(f, built.cut(oracle, "det", *place))
                for f, place in zip(found, built.places, strict=True)
            ]
        )

    assert far(RIGHT).max() < 0.07, "a bin is 0.064 pixels"
    flipped = np.array([built.crops[row, index, 4] == 1 for row, index in built.places])
    assert far(WRONG["half a pixel"]).min() > 0.1 and far(WRONG["no flips"])[flipped].min() > 0.3
    assert sum(len(boxes) for boxes in found) > 40


def test_people_are_mirrored_with_their_left_and_right(built: Built) -> None:
    """Boxes, root, camera and shape to half a step; the joints by the ids of the body that a mirror shows."""
    codec, matched = built.codec("poses"), 0
    found = codec.decode(built.stored("poses"))
    for (row, index), people in zip(built.places, found, strict=True):
        cut = built.cut(RIGHT, "poses", row, index)
        assert len(people) == len(cut) and distance(people, cut) < 0.07
        first, second = (np.lexsort(np.round(p.xyxy.T, 2)) for p in (people, cut))
        people, cut = people.keep(first), cut.keep(second)
        assert np.abs(people.orient - cut.orient).max(initial=0) < 0.0011
        assert np.abs(people.betas - cut.betas).max(initial=0) < 0.0031
        assert np.abs(people.camera - cut.camera).max(initial=0) < 0.011
        bodies = (
            [np.asarray(v) for v in codec.inner.encode(list(cut.body_pose.reshape(-1, 207)))]
            if len(cut)
            else []
        )
        assert np.array_equal(people.pose_ids, np.array(bodies).reshape(-1, 8))
        matched += len(cut)
        if built.crops[row, index, 4]:
            for what in ("no flips", "sign of x"):
                wrong = built.cut(WRONG[what], "poses", row, index)
                assert not np.array_equal(wrong.orient, cut.orient) and not np.allclose(
                    wrong.camera, cut.camera
                )
    assert matched > 40


def test_a_mirrored_body_has_its_joints_where_a_mirror_shows_them() -> None:
    """By forward kinematics of somebody of symmetric build, which knows joints by name."""
    rng = np.random.default_rng(0)
    turns, _ = np.linalg.qr(rng.normal(size=(24, 3, 3)))
    turns *= np.linalg.det(turns)[:, None, None]
    rest = symmetric_rest(rng)
    label = Poses.of([[0.1, 0.1, 0.6, 0.9]], body_pose=turns[None, 1:], orient=turns[:1])
    mirrored = crop_poses(label, np.array([0, 0, 64, 96, 1]), (64, 96))
    expected = mirrored_places(joints_of(turns[1:], turns[0], rest))
    found = joints_of(mirrored.body_pose[0], mirrored.orient[0], rest)
    assert set(found) == {*JOINTS, "root"}
    for name, place in expected.items():
        assert np.allclose(found[name], place, atol=1e-5), name
    unmoved = joints_of(turns[1:], turns[0], rest)
    assert any(np.abs(unmoved[name] - place).max() > 0.5 for name, place in expected.items())


def test_instances_are_at_the_points_where_they_are(built: Built) -> None:
    """At every point that is asked, the instances whose outline holds it; their boxes to the pixel, their masks' own tokens."""
    codec = built.codec("instances")
    found = codec.decode(built.stored("instances"))
    held, masks, apart = 0, 0, {name: 0 for name in ("half a pixel", "no flips")}
    for (row, index), seen in zip(built.places, found, strict=True):
        crop, hw = built.crops[row, index], built.hw[row]
        truth = truth_of("instances", built.keys[row], built.shape(row))
        outlines = RIGHT.polygons(truth, crop, hw)
        assert len(seen.points) > 3
        for point, hits in zip(seen.points, seen.hits, strict=True):
            near = [_margin(outline, point) * 224 for outline in outlines]
            there = {n for n, outline in enumerate(outlines) if inside(outline, point)}
            if min(near) > 0.01 and all(_is_large(outlines[n]) for n in there):
                assert len(hits) == len(there), (built.keys[row], index, point)
                held += len(there)
        for number, outline in enumerate(outlines):
            if outline.min() <= 0 or outline.max() >= 1:
                continue  # cut: its box is that of what is left
            box = np.array([*outline.min(0), *outline.max(0)])
            for name in apart:
                other = WRONG[name].polygons(truth, crop, hw)[number]
                apart[name] += np.abs(np.array([*other.min(0), *other.max(0)]) - box).max() * 224 > 1
            match = np.abs(seen.xyxy * 224 - (np.floor(box * 224 + 1e-6) + 0.5)).max(1, initial=0) < 1e-3
            if match.any():
                ids = np.asarray(codec.inner.encode([stretched_mask(outline, box)])[0])
                assert np.array_equal(seen.mask_ids[match.argmax()], ids)
                masks += 1
    assert held > 20 and masks > 8 and min(apart.values()) > 5, (held, masks, apart)


def _margin(outline: np.ndarray, point: np.ndarray) -> float:
    """Distance to the nearest line through two corners that follow each other."""
    edges, to_point = np.roll(outline, -1, axis=0) - outline, point - outline
    cross = edges[:, 0] * to_point[:, 1] - edges[:, 1] * to_point[:, 0]
    return float((np.abs(cross) / np.linalg.norm(edges, axis=1)).min())


def _is_large(outline: np.ndarray) -> bool:
    """Surely not left out for what the crop leaves of it."""
    low, high = outline.min(0).clip(0, 1), outline.max(0).clip(0, 1)
    return bool(np.prod(high - low) > 0.01)


def test_what_has_no_place_is_the_same_in_every_crop(built: Built) -> None:
    for name in ("palette", "metadata", "score"):
        values = built.codec(name).decode(built.stored(name))
        for (row, _), value in zip(built.places, values, strict=True):
            truth: Any = truth_of(name, built.keys[row], (0, 0))
            if name == "palette":
                assert np.array_equal(value.colours[0], truth.colours[0])
            else:
                assert value.values == truth.values if name == "metadata" else value == pytest.approx(truth)


def test_each_crop_has_the_caption_of_its_number(built: Built) -> None:
    for (row, index), text in zip(
        built.places, built.codec("caption").decode(built.stored("caption")), strict=True
    ):
        assert text == f"photo {built.keys[row]} part {index}"


@pytest.mark.parametrize("name", [*MAPS, "rgb"])
def test_maps_at_any_resolution_by_any_crop(name: str) -> None:
    """The rule itself, without a dataset: forty crops of images of random shapes, to a thousandth or one level."""
    rng = np.random.default_rng(9)
    modality = MAPS.get(name, RGB)
    contract, equal = modality.contract, []
    for _ in range(40):
        hw = tuple(int(v) for v in rng.integers(20, 200, 2))
        tall, wide = (int(v * rng.uniform(0.3, 1.5)) for v in hw)
        truth = truth_of(name if name != "rgb" else "edges", str(rng.integers(1 << 30)), (tall, wide))
        truth = np.stack([truth, truth[::-1], truth[:, ::-1]], axis=-1) if name == "rgb" else truth
        (crop,) = draw_crops(int(rng.integers(1 << 30)), 5, hw[1], hw[0], 2)[1:]
        made = crop_label(modality, truth, 0, crop, np.array(hw), 24)
        cut = RIGHT.map(truth, crop, (hw[0], hw[1]), 24, contract.resample, contract.flip)
        if contract.unit_norm:
            cut = cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-6)
        if contract.resample == "nearest":
            equal.append((made == cut).mean())
        else:
            off = np.abs(made.astype(float) - cut)
            assert off.mean() < (1 if contract.dtype == "uint8" else 1e-3), off.mean()
    assert not equal or (
        np.median(equal) == 1 and np.mean(equal) > 0.97
    )  # between two pixels either is right
