"""Two crops and flips for every modality at once: what is stored for crop k is what the crop rule says, decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_builds import ORACLES, small_config, without_ray

from fourmill.config import Config
from fourmill.crops import crop_boxes, crop_map, draw_crops
from fourmill.flows.build import build
from fourmill.flows.resolve import Resolved, resolve
from fourmill.flows.training import codec_of, make_snapshot
from fourmill.labels import Boxes
from fourmill.seeds import key64
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.snapshot import Snapshot

SIZE, COUNT, SHARD = 128, 12, 6
N_CROPS = 2
SHIPPED: dict[str, Any] = {
    name: {**ORACLES.get(name, {}), "tokenizer": {"model": f"shipped:scenes/{name}"}}
    for name in ("rgb", "caption", "depth", "normal", "semseg", "det", "clip")
}
MODALITIES: dict[str, Any] = {**SHIPPED, "rgb_pixels": {"tokenizer": {"format": "png"}}}


class Built:
    """The dataset, opened: rows are (shard, row) pairs in the order of the source."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dataset = Dataset(config.dataset)
        self.resolved: Resolved = resolve(config)
        self.snapshot: Snapshot = make_snapshot(config)
        self.source = self.resolved.source
        tables = [self.dataset.samples(s) for s in range(COUNT // SHARD)]
        self.keys = [key for table in tables for key in table["key"].to_pylist()]
        crops = [np.array(c) for table in tables for c in table["crops"].to_pylist()]
        self.crops = np.stack(crops).reshape(COUNT, N_CROPS, 5)

    def decoded(self, name: str) -> list[list[Any]]:
        """Per row, per crop: the label that the stored value stands for."""
        codec = codec_of(self.resolved, self.dataset, name)
        cells = [
            self.snapshot.column(s, name).cells(r, k)
            for s in range(COUNT // SHARD)
            for r in range(SHARD)
            for k in range(N_CROPS)
        ]
        flat = codec.decode(cells)
        return [flat[i : i + N_CROPS] for i in range(0, len(flat), N_CROPS)]

    def expected(self, name: str, row: int, crop: int) -> Any:
        """From the truth and the crop's five numbers, by nothing that the flow room has written."""
        truth = self.source.truth(self.keys[row])[name]
        return by_hand(name, truth, self.crops[row, crop])


def by_hand(name: str, label: Any, crop: np.ndarray) -> Any:
    """The crop rule once more, in plain NumPy: nearest sampling is close enough to tell a crop from another."""
    top, left, height, width, flip = (int(v) for v in crop)
    if isinstance(label, Boxes):
        xyxy = label.xyxy * SIZE
        xyxy = (xyxy - [left, top, left, top]) / [width, height, width, height]
        if flip:
            xyxy = np.stack([1 - xyxy[:, 2], xyxy[:, 1], 1 - xyxy[:, 0], xyxy[:, 3]], axis=1)
        xyxy = xyxy.clip(0, 1)
        keep = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
        return Boxes(xyxy[keep].astype(np.float32), label.class_ids[keep], label.scores[keep])
    rows = top + ((np.arange(SIZE) + 0.5) * height / SIZE).astype(int)
    columns = left + ((np.arange(SIZE) + 0.5) * width / SIZE).astype(int)
    out = label[rows][:, columns[::-1] if flip else columns]
    return out * np.array([-1, 1, 1], np.float32) if flip and name == "normal" else out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    url = tmp_path_factory.mktemp("crops") / "ds"
    config = small_config(
        url, MODALITIES, count=COUNT, shard_size=SHARD, n_crops=N_CROPS, image_size=SIZE,
        source={"kind": "scenes", "count": COUNT, "size": SIZE, "seed": 5},
        decode={"shorter_side": SIZE}, engine={"batch_size": 6, "device": "cpu"},
    )  # fmt: skip
    with without_ray():
        assert build(config).status.complete
    return Built(config)


def test_crops_are_drawn_from_the_key_alone(built: Built) -> None:
    for key, crops in zip(built.keys, built.crops, strict=True):
        assert np.array_equal(crops, draw_crops(0, key64(key), SIZE, SIZE, N_CROPS))
    assert np.array_equal(built.crops[:, 0], np.tile([0, 0, SIZE, SIZE, 0], (COUNT, 1)))
    flips = built.crops[:, 1, 4]
    assert 0 < flips.sum() < COUNT, "the seed has to give both"
    area = built.crops[:, 1, 2] * built.crops[:, 1, 3] / SIZE**2
    assert (area < 0.999).any() and (area > 0.75).all()


@pytest.mark.parametrize("name", ["rgb", "depth", "normal", "semseg", "clip"])
def test_a_grid_holds_all_crops_in_order(built: Built, name: str) -> None:
    short = built.resolved.token_recipes()[name].short
    for shard in range(COUNT // SHARD):
        receipt = built.dataset.receipt(name, short, shard)
        value = built.dataset.table(receipt.file)["value"]
        num_tokens = built.snapshot.modalities[name].num_tokens
        assert num_tokens == 64
        assert value.type.list_size == N_CROPS * num_tokens
        column = built.snapshot.column(shard, name)
        assert column.tokens is not None and column.tokens.shape == (SHARD, N_CROPS, num_tokens)
        flat = np.array(value.to_pylist())
        assert np.array_equal(flat.reshape(SHARD, N_CROPS, num_tokens), column.tokens)
    assert built.dataset.receipt(SAMPLES, str(built.dataset.samples_recipe()), 0).rows == SHARD


def test_pixels_of_every_crop(built: Built) -> None:
    """Stored without loss: the crop rule's own bicubic, to the byte."""
    found = built.decoded("rgb_pixels")
    for row, key in enumerate(built.keys):
        image = built.source._scene(key).image  # type: ignore[attr-defined]
        for crop in range(N_CROPS):
            rule = crop_map(image, built.crops[row, crop], (SIZE, SIZE), SIZE, "bicubic")
            assert np.array_equal(found[row][crop], rule)
            rough = by_hand("rgb", image, built.crops[row, crop])
            assert np.abs(rule.astype(int) - rough).mean() < 12


def closeness(name: str, decoded: Any, label: np.ndarray) -> float:
    """Larger is closer."""
    if name == "semseg":
        return float((decoded == label).mean())
    if name == "normal":
        return float((decoded * label).sum(-1).mean())
    if name == "depth":
        return -float(np.abs(np.log(decoded / label)).mean())
    return -float(np.abs(decoded.astype(float) - label).mean())


@pytest.mark.parametrize("name", ["rgb", "depth", "normal", "semseg"])
def test_maps_decode_to_their_own_crop(built: Built, name: str) -> None:
    """Closer to the truth of the crop that they stand for than to the same crop flipped the other way."""
    found = built.decoded(name)
    own, mirrored = [], []
    for row in range(COUNT):
        for crop in range(N_CROPS):
            numbers = built.crops[row, crop].copy()
            if name == "rgb":
                truth = built.source._scene(built.keys[row]).image  # type: ignore[attr-defined]
            else:
                truth = built.source.truth(built.keys[row])[name]
            own.append(closeness(name, found[row][crop], by_hand(name, truth, numbers)))
            numbers[4] = 1 - numbers[4]
            mirrored.append(closeness(name, found[row][crop], by_hand(name, truth, numbers)))
    flipped = built.crops.reshape(-1, 5)[:, 4] == 1
    better = np.array(own) > np.array(mirrored)
    assert better[flipped].mean() > 0.8 and better[~flipped].mean() > 0.8, (own, mirrored)
    least = {"semseg": 0.7, "normal": 0.8, "depth": -0.25, "rgb": -40.0}[name]
    assert np.mean(own) > least


def test_flipped_normals_negate_x(built: Built) -> None:
    """Where a surface looks sideways, a flipped crop's tokens say that it looks to the other side."""
    found = built.decoded("normal")
    agree, count = 0, 0
    for row in range(COUNT):
        if not built.crops[row, 1, 4]:
            continue
        expected, decoded = built.expected("normal", row, 1), found[row][1]
        assert np.abs(np.linalg.norm(decoded, axis=-1) - 1).max() < 1e-3
        sideways = np.abs(expected[..., 0]) > 0.4
        agree += int((np.sign(decoded[..., 0]) == np.sign(expected[..., 0]))[sideways].sum())
        count += int(sideways.sum())
    assert count > 500, "the flipped crops here have no sides: choose another seed"
    assert agree / count > 0.7


def test_boxes_are_clipped_and_mirrored(built: Built) -> None:
    found = built.decoded("det")
    boxes = 0
    for row in range(COUNT):
        for crop in range(N_CROPS):
            expected: Boxes = built.expected("det", row, crop)
            rule = crop_boxes(
                built.source.truth(built.keys[row])["det"], built.crops[row, crop], (SIZE, SIZE)
            )
            assert np.allclose(np.sort(rule.xyxy, 0), np.sort(expected.xyxy, 0), atol=1e-5)
            decoded: Boxes = found[row][crop]
            assert len(decoded) == len(expected)
            for box, label in zip(decoded.xyxy, decoded.class_ids, strict=True):
                same = expected.xyxy[expected.class_ids == label]
                assert np.abs(same - box).max(1).min() <= 0.5 / 999 + 1e-6
            boxes += len(decoded)
    assert boxes > COUNT


def test_every_crop_has_a_caption(built: Built) -> None:
    """Captions are not cropped: the image's first, however often it is cut."""
    found = built.decoded("caption")
    captions = [
        text for s in range(COUNT // SHARD) for text in built.dataset.samples(s)["captions"].to_pylist()
    ]
    for texts, (caption,) in zip(found, captions, strict=True):
        assert texts == [caption.lower()] * N_CROPS or texts == [caption] * N_CROPS


def test_features_are_of_the_crop_itself(built: Built) -> None:
    """CLIP sees each crop, flipped as it is: its features come from the very pixels that rgb_pixels holds."""
    from fourmill.labelers.base import LabelBatch

    wanted = built.resolved.wanted["clip"]
    labeler = wanted.make_labeler()
    labeler.load()
    pixels = built.decoded("rgb_pixels")
    codec = codec_of(built.resolved, built.dataset, "clip")
    batch = LabelBatch(
        keys=built.keys[:SHARD],
        frames=[p[0] for p in pixels[:SHARD]],
        present=np.ones(SHARD, bool),
        crops=np.stack([np.stack(p) for p in pixels[:SHARD]]),
    )
    labels = labeler.label(batch)
    assert len(labels) == SHARD * N_CROPS
    stored = wanted.modality.contract.stored
    rounded = [x.astype(stored).astype(np.float32) if stored else x for x in labels]
    column = built.snapshot.column(0, "clip")
    fresh = np.stack([np.asarray(v) for v in codec.encode(rounded)]).reshape(SHARD, N_CROPS, -1)
    assert column.tokens is not None
    assert (fresh == column.tokens).mean() > 0.999
    assert (column.tokens[:, 0] == column.tokens[:, 1]).mean() < 0.9, "both crops cannot look the same"
