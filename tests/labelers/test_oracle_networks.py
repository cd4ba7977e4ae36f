"""Networks that cannot be wrong: torch modules that read the truth out of the colours of the pixels they are given.

They stand in for the trained network behind the real labeler, so what is left to err is ours: normalisation,
letterboxing, the half pixels of every resampling, axes and signs, box corners, class ids. Frames are never square.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import DepthEstimatorOutput, SemanticSegmenterOutput
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from fourmill.labelers.depth import _relative
from fourmill.labelers.letterbox import place
from fourmill.labelers.semseg import _from_masks
from fourmill.labels import Boxes
from fourmill.shards.sources.scenes import render

SHAPES = [(37, 53), (53, 37), (100, 64)]
SIDE = 256
CLASS_COLOURS = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]) / 255


class Reader(torch.nn.Module):
    """Undoes the normalisation that the checkpoint's preprocessor asks for."""

    def __init__(self, kit: Any, config: Any) -> None:
        super().__init__()
        self.config = config
        self.mean = torch.tensor(kit.mean).view(3, 1, 1)
        self.std = torch.tensor(kit.std).view(3, 1, 1)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        assert pixel_values.shape[1:] == (3, SIDE, SIDE) and pixel_values.dtype == torch.float32
        colours = pixel_values * self.std + self.mean
        assert colours.min() > -1e-4 and colours.max() < 1 + 1e-4
        return self.answer(colours)

    def answer(self, colours: torch.Tensor) -> Any:
        raise NotImplementedError


def labeler_with(kit: Any, name: str, kind: str, network: type[Reader], **options: Any) -> Any:
    labeler = kit.labeler(name, kit.checkpoint(kind), input_size=SIDE, **options)
    labeler.load()
    labeler.network = network(kit, labeler.network.config)
    return labeler


def smooth(shape: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) in [0, 1]: ramps along x, along y, and both. Half a pixel is 0.5 / W."""
    height, width = shape
    x = (np.arange(width) + 0.5) / width
    y = (np.arange(height)[:, None] + 0.5) / height
    return np.stack([x + 0 * y, y + 0 * x, (2 * x + y) / 3], axis=-1)


def to_bytes(colours: np.ndarray) -> np.ndarray:
    return np.round(colours * 255).astype(np.uint8)


class DepthReader(Reader):
    """Depth is red plus twice green, in metres, at a quarter of the resolution."""

    def answer(self, colours: torch.Tensor) -> Any:
        small = F.avg_pool2d(colours, 4)
        return DepthEstimatorOutput(predicted_depth=small[:, 0] + 2 * small[:, 1])


@pytest.mark.parametrize("shape", SHAPES)
def test_depth(kit: Any, shape: tuple[int, int]) -> None:
    labeler = labeler_with(kit, "depth", "dpt_metric", DepthReader)
    colours = smooth(shape)
    (depth,) = labeler.label(kit.as_batch([to_bytes(colours)]))
    off = (depth - (colours[..., 0] + 2 * colours[..., 1]))[2:-2, 2:-2]
    assert np.abs(off).max() < 0.01  # 3 * 0.5 / 255 is rounding
    assert np.abs(off.mean()) < 0.001  # half a pixel would be 0.5 / W or 1 / H, at least 0.008


def test_relative_depth_points_the_same_way(kit: Any) -> None:
    """Where the network says nearer (larger), the label is smaller; the scale of the network does not matter."""
    labeler = labeler_with(kit, "depth", "dpt_plain", DepthReader)
    colours = smooth((64, 64))
    (depth,) = labeler.label(kit.as_batch([to_bytes(colours)]))
    inverse = colours[..., 0] + 2 * colours[..., 1]
    assert depth.min() == 1 and np.abs(1 / depth - inverse / inverse.max())[2:-2, 2:-2].max() < 0.01


def test_relative_depth_of_nothing_is_far() -> None:
    assert np.allclose(_relative(torch.zeros(2, 3)), 100) and np.allclose(_relative(-torch.ones(2, 3)), 100)


def scene_part(index: int, top: int, bottom: int) -> Any:
    """A scene without its upper and lower rows: not square, so height and width cannot be mistaken."""
    scene = render(1000, index, 128)
    return scene.image[top:bottom], scene.normal[top:bottom], scene.semseg[top:bottom]


class NormalReader(Reader):
    """The usual picture of normals: colour = normal / 2 + 1 / 2. Unnormalised on purpose."""

    def answer(self, colours: torch.Tensor) -> Any:
        return SemanticSegmenterOutput(logits=5 * (2 * colours - 1))


@pytest.mark.parametrize("transposed", [False, True])
def test_normals(kit: Any, transposed: bool) -> None:
    labeler = labeler_with(kit, "normal", "dpt_normal", NormalReader)
    _, truth, _ = scene_part(3, 20, 120)
    truth = truth.swapaxes(0, 1) if transposed else truth
    (normal,) = labeler.label(kit.as_batch([to_bytes(truth / 2 + 0.5)]))
    assert normal.shape == truth.shape and normal.dtype == np.float32
    off = np.degrees(np.arccos(np.clip((normal * truth).sum(-1), -1, 1)))
    assert np.median(off) < 0.5 and off.mean() < 2


def test_normals_of_a_known_room(kit: Any) -> None:
    """Our axes in words: the floor looks up, its normal is +y; a wall across the room looks at us, +z."""
    labeler = labeler_with(kit, "normal", "dpt_normal", NormalReader)
    frame = np.zeros((40, 60, 3), np.uint8)
    frame[:20] = to_bytes(np.array([0.5, 0.5, 1.0]))
    frame[20:] = to_bytes(np.array([0.5, 1.0, 0.5]))
    (normal,) = labeler.label(kit.as_batch([frame]))
    assert np.allclose(normal[5, 30], [0, 0, 1], atol=0.02) and np.allclose(
        normal[35, 30], [0, 1, 0], atol=0.02
    )
    opencv = labeler_with(kit, "normal", "dpt_normal", NormalReader, axis_signs=[1, -1, -1])
    (turned,) = opencv.label(kit.as_batch([frame.copy()]))
    assert np.allclose(turned, normal * [1, -1, -1], atol=1e-6)


def nearest_class(colours: torch.Tensor) -> torch.Tensor:
    """(B, 5, h, w) one-hot: the class whose colour is nearest."""
    distance = (colours[:, None] - CLASS_COLOURS.view(1, 5, 3, 1, 1)).square().sum(2)
    return F.one_hot(distance.argmin(1), 5).permute(0, 3, 1, 2).float()


class PixelReader(Reader):
    def answer(self, colours: torch.Tensor) -> Any:
        return SemanticSegmenterOutput(logits=F.avg_pool2d(nearest_class(colours), 4))


class MaskReader(Reader):
    """One query per class in reverse order, one query that is nothing, and one that is everything but unsure."""

    def answer(self, colours: torch.Tensor) -> Any:
        of = F.avg_pool2d(nearest_class(colours), 4).flip(1)
        nothing, everything = torch.ones_like(of[:, :1]), torch.ones_like(of[:, :1])
        classes = torch.full((len(colours), 7, 6), -10.0)
        for query in range(5):
            classes[:, query, 4 - query] = 10
        classes[:, 5, 5] = 10  # "no object"
        classes[:, 6] = 0
        masks = torch.cat([of, nothing, everything], dim=1) * 20 - 10
        return Mask2FormerForUniversalSegmentationOutput(
            class_queries_logits=classes, masks_queries_logits=masks
        )


@pytest.mark.parametrize(("kind", "network"), [("segformer", PixelReader), ("mask2former", MaskReader)])
@pytest.mark.parametrize("shape", SHAPES)
def test_semseg(kit: Any, kind: str, network: type[Reader], shape: tuple[int, int]) -> None:
    """Blocks of classes: with whole-pixel borders kept, only corners may differ; half a pixel would cost a tenth."""
    labeler = labeler_with(kit, "semseg", kind, network)
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    truth = ((x // 7 + 2 * (y // 9)) % 5).astype(np.uint8)
    frame = to_bytes(CLASS_COLOURS.numpy()[truth])
    (ids,) = labeler.label(kit.as_batch([frame]))
    assert ids.shape == shape and ids.dtype == np.uint8
    assert (ids == truth).mean() > 0.975


def test_two_likely_masks_outvote_one_certain_mask() -> None:
    """Scores are sums of probabilities, not of logits; "no object" (the last column) has no score."""
    classes = torch.tensor([[[30.0, 0, 0], [0, 30.0, 0], [0, 30.0, 0], [0, 0, 30.0]]])
    masks = torch.tensor([20.0, 1.0, 1.0, 20.0]).view(1, 4, 1, 1).expand(1, 4, 8, 8)
    output = Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=classes, masks_queries_logits=masks
    )
    ids, confidence = _from_masks(output, 0, place((6, 8), 8))
    assert tuple(ids.shape) == (6, 8) and (ids == 1).all()  # 2 / (1 + 1/e) against 1; as logits 2 against 20
    assert confidence == 1  # cut there
    masks = masks - torch.tensor([0, 2, 2, 0.0]).view(1, 4, 1, 1)
    output = Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=classes, masks_queries_logits=masks
    )
    ids, _ = _from_masks(output, 0, place((6, 8), 8))
    assert (ids == 0).all()  # 2 / (1 + e) against 1


def test_semseg_of_scenes(kit: Any) -> None:
    labeler = labeler_with(kit, "semseg", "segformer", PixelReader)
    _, _, truth = scene_part(5, 30, 128)
    (ids,) = labeler.label(kit.as_batch([to_bytes(CLASS_COLOURS.numpy()[truth])]))
    assert (ids == truth).mean() > 0.99


OBJECT_COLOURS = {"sphere": (255, 0, 0), "box": (0, 255, 0), "cylinder": (0, 0, 255)}
#: (x0, y0, x1, y1) in pixels of a 37 x 53 frame, right and bottom exclusive
RECTANGLES = {"sphere": (0, 0, 9, 30), "box": (20, 5, 50, 11), "cylinder": (33, 25, 53, 37)}


class BoxReader(Reader):
    """One query per colour with its extent on the canvas; a doubtful query, an empty one, one outside the frame."""

    #: by channel of the picture: the network's class id, and its logit
    network_ids: tuple[int, int, int]
    num_classes: int
    no_object: bool

    def answer(self, colours: torch.Tensor) -> Any:
        queries, boxes = [], []
        for row in colours:
            found = [self.extent(row, channel) for channel in range(3)]
            found += [found[0], torch.tensor([0.3, 0.3, 0.3, 0.5]), torch.tensor([0.0, 0.0, 0.1, 0.02])]
            corners = torch.stack(found)
            boxes.append(
                torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
            )
            queries.append(self.scores())
        return DetrObjectDetectionOutput(logits=torch.stack(queries), pred_boxes=torch.stack(boxes))

    def extent(self, row: torch.Tensor, channel: int) -> torch.Tensor:
        others = [other for other in range(3) if other != channel]
        mask = (row[channel] > 0.6) & (row[others] < 0.6).all(0)
        y, x = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        return torch.stack([x[0], y[0], x[-1] + 1, y[-1] + 1]) / SIDE

    def scores(self) -> torch.Tensor:
        width = self.num_classes + int(self.no_object)
        logits = torch.full((6, width), -12.0)
        for query, (one, logit) in enumerate(
            zip(self.network_ids * 2, (2.0, 4.0, 3.0, -1.0, 9.0, 9.0), strict=True)
        ):
            logits[query, one] = logit
        if self.no_object:
            logits[:, -1] = 0.0  # softmax against "no object" is then the sigmoid of the logit
        else:
            logits[:, 0] = torch.maximum(logits[:, 0], torch.tensor(-5.0))
        return logits


class SoftmaxReader(BoxReader):
    network_ids, num_classes, no_object = (1, 5, 4), 6, True

    def scores(self) -> torch.Tensor:
        logits = super().scores()
        logits[5, 3] = 9.0
        return logits + 1.0  # which a softmax does not notice


class SigmoidReader(BoxReader):
    network_ids, num_classes, no_object = (0, 1, 2), 3, False


@pytest.mark.parametrize(("kind", "network"), [("detr", SoftmaxReader), ("rt_detr", SigmoidReader)])
@pytest.mark.parametrize("transposed", [False, True])
def test_det(kit: Any, kind: str, network: type[Reader], transposed: bool) -> None:
    labeler = labeler_with(kit, "det", kind, network)
    frame = np.zeros((37, 53, 3), np.uint8)
    for name, (x0, y0, x1, y1) in RECTANGLES.items():
        frame[y0:y1, x0:x1] = OBJECT_COLOURS[name]
    scale = np.array([53, 37, 53, 37])
    order = [0, 1, 2, 3]
    if transposed:
        frame, scale, order = frame.swapaxes(0, 1).copy(), scale[[1, 0, 3, 2]], [1, 0, 3, 2]
    (boxes,) = labeler.label(kit.as_batch([frame]))
    assert isinstance(boxes, Boxes)
    classes = labeler.describe().contract.classes
    assert [classes[one] for one in boxes.class_ids] == ["box", "cylinder", "sphere"]  # best first
    assert np.allclose(boxes.scores, 1 / (1 + np.exp(-np.array([4.0, 3.0, 2.0]))), atol=1e-3)
    want = np.array([RECTANGLES[name] for name in ("box", "cylinder", "sphere")])[:, order] / scale
    assert np.abs(boxes.xyxy - want).max() < 0.5 / 53 * 0.6  # half a pixel of the frame is 0.5 / 53


def test_det_threshold(kit: Any) -> None:
    frame = np.zeros((37, 53, 3), np.uint8)
    for name, (x0, y0, x1, y1) in RECTANGLES.items():
        frame[y0:y1, x0:x1] = OBJECT_COLOURS[name]
    labeler, counts = labeler_with(kit, "det", "rt_detr", SigmoidReader), []
    for score in (0.0, 0.2, 0.5, 0.9, 0.97, 0.99):
        labeler.params["min_score"] = score
        counts.append(len(labeler.label(kit.as_batch([frame]))[0]))
    assert counts == [4, 4, 3, 2, 1, 0]  # never the empty box, nor the one in the padding


class PatchReader(torch.nn.Module):
    """A vision tower whose hidden states are the mean colours of the patches, after a class token of ones."""

    def __init__(self, kit: Any, config: Any) -> None:
        super().__init__()
        self.config = config
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (kit.mean, kit.std))
        self.vision_model = torch.nn.Module()
        self.vision_model.post_layernorm = torch.nn.Identity()
        self.visual_projection = torch.nn.Identity()

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> Any:
        assert interpolate_pos_encoding == (pixel_values.shape[-1] != self.config.image_size)
        patches = (
            F.avg_pool2d(pixel_values * self.std + self.mean, self.config.patch_size)
            .flatten(2)
            .transpose(1, 2)
        )
        tokens = torch.cat([torch.ones(len(patches), 1, 3), patches], dim=1)
        return type("Output", (), {"last_hidden_state": tokens})()


def test_clip_grid_is_in_reading_order_and_rows_before_crops(kit: Any) -> None:
    labeler = kit.labeler("clip", kit.checkpoint("clip"))
    labeler.load()
    labeler.network = PatchReader(kit, labeler.network.config)
    crops = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    labels = labeler.label(kit.as_batch([np.zeros((9, 9, 3), np.uint8)] * 2, crops=crops))
    for index, label in enumerate(labels):
        crop = crops[index // 3, index % 3] / 255
        want = crop.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3))
        assert np.abs(label - want).max() < 1e-5
