"""The tokenizers that ship with fourmill, on scenes that nobody fitted anything on."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from fourmill.checkpoints import resolve
from fourmill.flows.specialists.tokenizers import SIZE, modality_of
from fourmill.labels import Boxes
from fourmill.shards.sources.scenes import render
from fourmill.tokenize.base import Codec, load_codec
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vqvae import VQVAE

SEED, COUNT = 3000, 8
#: Modality, its figure, the bound, and whether larger is better.
BOUNDS = [
    ("rgb", "psnr_db", 21.0, True),
    ("rgb", "ssim", 0.6, True),
    ("depth", "abs_rel", 0.045, False),
    ("depth", "delta1", 0.95, True),
    ("normal", "mean_degrees", 10.0, False),
    ("semseg", "miou", 0.8, True),
]


def shipped(name: str) -> tuple[Path, Codec]:
    folder = resolve(f"shipped:scenes/{name}", None, "test").folder
    assert folder is not None
    return folder, load_codec(folder, modality_of(name), SIZE)


@pytest.mark.parametrize(("name", "figure", "bound", "larger"), BOUNDS)
def test_round_trips_are_as_good_as_the_cards_say(name: str, figure: str, bound: float, larger: bool) -> None:
    folder, codec = shipped(name)
    assert isinstance(codec, VQVAE) and codec.modality.num_tokens == 64
    scenes = [render(SEED, index, SIZE) for index in range(COUNT)]
    labels = [getattr(scene, "image" if name == "rgb" else name) for scene in scenes]
    value = codec.space.figures(labels, [np.asarray(x) for x in codec.decode(codec.encode(labels))])[figure]
    slack = 1.25  # eight scenes are a small sample
    assert value > bound / slack if larger else value < bound * slack
    held_out = yaml.safe_load((folder / "card.yaml").read_text())["held_out"]
    assert held_out[figure] > bound if larger else held_out[figure] < bound


@pytest.mark.parametrize("name", ["rgb", "depth", "normal", "semseg", "clip"])
def test_most_of_many_codes_are_used(name: str) -> None:
    folder, codec = shipped(name)
    held_out = yaml.safe_load((folder / "card.yaml").read_text())["held_out"]
    assert codec.modality.vocab_size >= (128 if name == "semseg" else 512)
    assert held_out["num_labels"] == 2000 and held_out["codebook_use"] > 0.9
    assert held_out["perplexity"] > 0.25 * codec.modality.vocab_size


@pytest.mark.parametrize("name", ["rgb", "depth", "normal", "semseg", "clip", "caption", "det"])
def test_they_are_small(name: str) -> None:
    folder, _ = shipped(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_500_000


def test_captions_and_boxes_share_one_vocabulary() -> None:
    (_, caption), (_, det) = shipped("caption"), shipped("det")
    assert isinstance(caption, VocabularyCodec) and isinstance(det, VocabularyCodec)
    assert caption.vocabulary.size == det.vocabulary.size == caption.modality.vocab_size
    for index in range(COUNT):
        scene = render(SEED, index, SIZE)
        assert caption.decode(caption.encode([[scene.caption]])) == [scene.caption]
        boxes = Boxes(scene.boxes, scene.box_classes.astype(np.int64), np.ones(len(scene.boxes), np.float32))
        (decoded,) = det.decode(det.encode([boxes]))
        assert sorted(decoded.class_ids) == sorted(boxes.class_ids)
