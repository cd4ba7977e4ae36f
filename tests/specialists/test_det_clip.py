"""The shipped detector and CLIP, and the parts of their training that a mistake would spoil silently."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.checkpoints import shipped_folder
from fourmill.flows.specialists import clip, det
from fourmill.flows.specialists.pool import Pool, open_pool
from fourmill.labels import Boxes
from fourmill.train.metrics import ap50

IDS = ("det", "clip")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return open_pool(2000, 64, 128, tmp_path_factory.mktemp("pool"))


def load(name: str) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForObjectDetection, CLIPModel

    loader = {"det": AutoModelForObjectDetection, "clip": CLIPModel}[name]
    model, info = loader.from_pretrained(shipped_folder(name), output_loading_info=True)
    return model.eval(), info


@pytest.mark.parametrize("name", IDS)
def test_loads_whole_in_float32(name: str) -> None:
    model, info = load(name)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "limit_mb"), [("det", 6), ("clip", 5)])
def test_is_small(name: str, limit_mb: float) -> None:
    assert sum(f.stat().st_size for f in Path(shipped_folder(name)).iterdir()) < limit_mb * 1e6


def test_detector_finds_held_out_objects(held_out: Pool) -> None:
    model, _ = load("det")
    assert model.config.id2label == {0: "sphere", 1: "box", 2: "cylinder"}
    assert det.measure(model, held_out)["ap50"] > 0.5


def test_clip_matches_held_out_captions(held_out: Pool) -> None:
    from transformers import AutoTokenizer

    model, _ = load("clip")
    tokenizer = AutoTokenizer.from_pretrained(shipped_folder("clip"))
    assert clip.retrieval(model, tokenizer, held_out)["image_to_caption_r1_of_64"] > 0.4


def test_clip_embeds_texts_as_the_model_itself_does(held_out: Pool) -> None:
    from transformers import AutoTokenizer

    model, _ = load("clip")
    words = AutoTokenizer.from_pretrained(shipped_folder("clip"))(
        ["a red ball", "two objects on a checkered grey floor: a small box"],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        out = model(**words, pixel_values=clip.to_pixels(held_out.image[:2]))
        text = clip.text_embedding(model, words["input_ids"], words["attention_mask"])
        image, patches = clip.image_tokens(model, clip.to_pixels(held_out.image[:2]))
    assert patches.shape == (2, 64, 512)
    torch.testing.assert_close(out.text_embeds, torch.nn.functional.normalize(text, dim=1))
    torch.testing.assert_close(out.image_embeds, torch.nn.functional.normalize(image, dim=1))


def test_tokenizer_wraps_words_and_knows_unknown_ones() -> None:
    tokenizer = clip.make_tokenizer(["a red ball, left of a box"])
    ids = tokenizer(["A red box", "a zebra"], padding=True)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(row) for row in ids] == [
        ["[BOS]", "a", "red", "box", "[EOS]"],
        ["[BOS]", "a", "[UNK]", "[EOS]", "[PAD]"],
    ]
    assert tokenizer.eos_token_id not in (None, 2)


def test_mirrored_captions() -> None:
    assert (
        clip.mirrored("a ball to the left of a box, right of it")
        == "a ball to the right of a box, left of it"
    )


@pytest.mark.parametrize("mirror", [False, True])
def test_batch_boxes_are_tight(held_out: Pool, mirror: bool) -> None:
    batch = det.make_batch(held_out, np.arange(8), np.full(8, mirror))
    assert (batch.classes >= 0).sum() > 8
    for row, item in torch.nonzero(batch.classes >= 0).tolist():
        y, x = torch.nonzero(batch.instance[row] == item + 1, as_tuple=True)
        edges = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 128
        torch.testing.assert_close(batch.corners[row, item], edges)
        centre, extent = batch.labels[row]["boxes"][item].split(2)
        torch.testing.assert_close(torch.cat([centre - extent / 2, centre + extent / 2]), edges)


def test_proposals_lie_in_their_boxes(held_out: Pool) -> None:
    batch = det.make_batch(held_out, np.arange(8), np.zeros(8, bool))
    row, place, item = det.assign(batch)
    assert len(row) == det.PER_LEVEL * len(det.STRIDES) * int((batch.classes >= 0).sum())
    middle = torch.cat([det._grid(det.SIZE // stride) for stride in det.STRIDES])[place]
    box, half_cell = batch.corners[row, item], 0.5 * det.STRIDES[-1] / det.SIZE
    assert (middle > box[:, :2] - half_cell).all() and (middle < box[:, 2:] + half_cell).all()


def test_giou_loss_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0]])
    torch.testing.assert_close(det.giou_loss(a, b), torch.tensor([0.0, 4.0 / 3.0]))


def boxes(rows: list[tuple[float, int, float]]) -> Boxes:
    """Unit-high boxes at x, of a class, with a score."""
    xyxy = np.array([[x, 0.0, x + 0.2, 1.0] for x, _, _ in rows], np.float32).reshape(-1, 4)
    return Boxes(
        xyxy, np.array([c for _, c, _ in rows], np.int64), np.array([s for *_, s in rows], np.float32)
    )


def test_ap50_by_hand() -> None:
    truth = [boxes([(0.0, 0, 1.0), (0.5, 0, 1.0)]), boxes([])]
    assert ap50([boxes([(0.5, 0, 0.9), (0.0, 0, 0.8)]), boxes([])], truth) == 1.0
    # right, wrong (a second time the same), right: precision 1 and 2/3 at the two steps of recall
    found = [boxes([(0.5, 0, 0.9), (0.51, 0, 0.8), (0.0, 0, 0.7)]), boxes([])]
    assert ap50(found, truth) == pytest.approx((1 + 2 / 3) / 2)
    # a wrong box in the image without objects comes first
    assert ap50([boxes([(0.5, 0, 0.8)]), boxes([(0.0, 0, 0.9)])], truth) == pytest.approx(0.25)
    assert ap50([boxes([(0.0, 1, 0.9)]), boxes([])], truth) == 0.0
    assert np.isnan(ap50([boxes([])], [boxes([])]))
