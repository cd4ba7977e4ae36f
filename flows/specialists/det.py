"""Trains the small detector that ships with fourmill: `python -m fourmill.flows.specialists.det --minutes 32 --out DIR`.

An RT-DETR (Zhao et al. 2023) with a small ResNet and two feature levels. A DETR learns slowly from scratch, because
its losses touch few places of the image. So the backbone, the encoder and the proposal heads first learn alone,
from every place: what is there, and the box of the object it belongs to. The decoder joins afterwards, with the
denoising queries and the matching loss of the architecture.
"""

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fourmill.flows.specialists.folder import (
    adamw,
    count_params,
    milliseconds,
    one_cycle,
    save_half,
    write_card,
)
from fourmill.flows.specialists.pool import (
    HELD_OUT_COUNT,
    HELD_OUT_SEED,
    TRAIN_SEED,
    Pool,
    Progress,
    open_pool,
)
from fourmill.labels import Boxes
from fourmill.shards.sources.scenes import DET_CLASSES
from fourmill.train.metrics import ap50, box_iou

SIZE = 128
STRIDES = (8, 16)
WIDTH = 64
PER_LEVEL = 1  # places by level that propose an object, while the proposal heads learn alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    minutes: float = 32.0
    scenes: int = 20480
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    alone: float = 0.2  # share of the time before the decoder joins
    dense: float = 1.0  # weight of the throw-away head
    seed: int = 0
    init: Path | None = None  # a checkpoint to go on from, at half the learning rate


def make_model() -> Any:
    """About 2 million parameters."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[64, 128],
        depths=[2, 2],
        layer_type="basic",
        downsample_in_first_stage=True,
        out_features=["stage1", "stage2"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[64, 128],
        feat_strides=list(STRIDES),
        encode_proj_layers=[1],
        encoder_hidden_dim=WIDTH,
        encoder_ffn_dim=256,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=WIDTH,
        decoder_in_channels=[WIDTH, WIDTH],
        num_feature_levels=2,
        decoder_layers=2,
        decoder_ffn_dim=256,
        decoder_attention_heads=4,
        num_queries=20,
        num_denoising=12,
        id2label=dict(enumerate(DET_CLASSES)),
        label2id={name: i for i, name in enumerate(DET_CLASSES)},
    )
    model = RTDetrForObjectDetection(config)
    _wake(model.model)
    return model


# linear layers of the encoder and the decoder, but not what starts the deformable attention's sampling pattern
_ASLEEP = r"^(encoder\.|enc_output|decoder\.layers)(?!.*(sampling_offsets|attention_weights))"


@torch.no_grad()
def _wake(model: Any) -> None:
    """The architecture's initial weights suit a pretrained backbone: its other norms start near zero. Undo that."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1.0)
        elif isinstance(module, nn.Linear) and re.search(_ASLEEP, name):
            nn.init.xavier_uniform_(module.weight)
    for head in (model.enc_bbox_head, *model.decoder.bbox_embed, model.decoder.query_pos_head):
        for layer in head.layers[:-1]:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    nn.init.xavier_uniform_(model.decoder.query_pos_head.layers[-1].weight)


def load(folder: Path) -> Any:
    from transformers import AutoModelForObjectDetection

    return AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32)


def make_processor() -> Any:
    from transformers import RTDetrImageProcessor

    return RTDetrImageProcessor(size={"height": SIZE, "width": SIZE})


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [0, 1]."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)  # channels last: 15% faster
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(255.0)


@dataclass(slots=True)
class Batch:
    """``labels`` as the architecture takes them: class_labels int64 (N,), boxes (N, 4) as centre, width, height."""

    pixels: torch.Tensor
    corners: torch.Tensor  # (B, 8, 4) x0 y0 x1 y1
    classes: torch.Tensor  # (B, 8), -1 where there is none
    instance: torch.Tensor  # (B, S, S)
    shares: torch.Tensor  # (B, 5, 16, 16): of scene classes
    labels: list[dict[str, torch.Tensor]]


def make_batch(pool: Pool, rows: np.ndarray, mirror: np.ndarray) -> Batch:
    """Scenes of a pool, mirrored where ``mirror`` (bool, B) says so."""
    images, instance = pool.image[rows], pool.instance[rows]
    shares, corners = pool.cells[rows][..., :5], pool.boxes[rows].copy()
    for array in (images, instance, shares):
        array[mirror] = array[mirror][:, :, ::-1]
    corners[mirror] = corners[mirror][..., [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0]
    xyxy, classes = torch.from_numpy(corners), torch.from_numpy(pool.box_classes[rows])
    centres = torch.cat([(xyxy[..., :2] + xyxy[..., 2:]) / 2, xyxy[..., 2:] - xyxy[..., :2]], -1)
    labels = [{"class_labels": c[c >= 0], "boxes": b[c >= 0]} for c, b in zip(classes, centres, strict=True)]
    cells = torch.from_numpy(shares).float().permute(0, 3, 1, 2)
    return Batch(to_pixels(images), xyxy, classes, torch.from_numpy(instance).long(), cells, labels)


def giou_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - generalised IoU (Rezatofighi et al. 2019) of boxes (N, 4) as x0 y0 x1 y1, pairwise: (N,)."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    around = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    inter = (high - low).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter
    return 1.0 - inter / union.clamp(min=1e-9) + (around - union) / around.clamp(min=1e-9)


def _grid(side: int) -> torch.Tensor:
    """Centres of a grid's cells, (side * side, 2) as x, y in [0, 1], row by row."""
    line = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _under(instance: torch.Tensor, side: int) -> torch.Tensor:
    """The object at the middle of each cell of a grid: (B, side * side), 0 where there is none."""
    step = instance.shape[-1] // side
    return instance[:, step // 2 :: step, step // 2 :: step].flatten(1)


class DenseHead(nn.Module):
    """Thrown away after training: at each place of the finest level, class shares and the object's four edges."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.shares = nn.Conv2d(WIDTH, 5, 1)
        self.edges = nn.Conv2d(WIDTH, 4, 1)

    def forward(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        hidden = self.mix(features)
        side = features.shape[-1]
        classes = -(batch.shares * F.log_softmax(self.shares(hidden), dim=1)).sum(1).mean()
        owner = _under(batch.instance, side)
        edges = (self.edges(hidden).flatten(2).transpose(1, 2) - 1.5).exp().clamp(max=2.0)
        row, place = torch.nonzero(owner, as_tuple=True)
        if len(row) == 0:
            return classes
        middle, edge = _grid(side)[place], edges[row, place]
        boxes = torch.cat([middle - edge[:, :2], middle + edge[:, 2:]], 1)
        return classes + giou_loss(boxes, batch.corners[row, owner[row, place] - 1]).mean()


def assign(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which places propose which object: indices (batch row, place, object), `PER_LEVEL` places by level and object.

    The nearest to the middle of the box are taken, and visible parts of the object before others.
    """
    rows, places, objects, offset = [], [], [], 0
    middle = (batch.corners[..., :2] + batch.corners[..., 2:]) / 2
    extent = (batch.corners[..., 2:] - batch.corners[..., :2]).clamp(min=1e-3)
    row, item = torch.nonzero(batch.classes >= 0, as_tuple=True)
    for stride in STRIDES:
        side = SIZE // stride
        away = ((_grid(side)[None] - middle[row, item][:, None]) / extent[row, item][:, None]).norm(dim=2)
        hidden = _under(batch.instance, side)[row] != item[:, None] + 1
        nearest = (away + 2.0 * hidden).topk(PER_LEVEL, dim=1, largest=False).indices
        rows.append(row.repeat_interleave(PER_LEVEL))
        objects.append(item.repeat_interleave(PER_LEVEL))
        places.append(nearest.flatten() + offset)
        offset += side * side
    return torch.cat(rows), torch.cat(places), torch.cat(objects)


class Trainer:
    """The model, its throw-away head, and one step."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.pool = settings, pool
        model = load(settings.init) if settings.init else make_model()
        self.model, self.head = model.train(), DenseHead()
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = adamw([self.model, self.head], settings.lr, settings.weight_decay)
        self.random = np.random.default_rng(settings.seed)

    def proposals(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of the proposal heads without the decoder, and the finest features."""
        model = self.model.model
        maps = model.backbone(batch.pixels, torch.ones(len(batch.pixels), SIZE, SIZE))
        levels = [
            project(source) for project, (source, _) in zip(model.encoder_input_proj, maps, strict=True)
        ]
        levels = model.encoder(levels).last_hidden_state
        flat = [
            project(x).flatten(2).transpose(1, 2)
            for project, x in zip(model.decoder_input_proj, levels, strict=True)
        ]
        anchors, valid = model.generate_anchors(tuple((SIZE // s, SIZE // s) for s in STRIDES))
        memory = model.enc_output(valid * torch.cat(flat, 1))
        row, place, item = assign(batch)
        scores = model.enc_score_head(memory)
        target = torch.zeros_like(scores)
        target[row, place, batch.classes[row, item]] = 1.0
        chance = scores.sigmoid()
        weight = torch.where(target > 0, 1.0, 0.75 * chance.detach() ** 2)
        score = F.binary_cross_entropy_with_logits(scores, target, weight, reduction="sum") / max(len(row), 1)
        centre = (model.enc_bbox_head(memory)[row, place] + anchors[0, place].clamp(-9.0, 9.0)).sigmoid()
        corners = torch.cat([centre[:, :2] - centre[:, 2:] / 2, centre[:, :2] + centre[:, 2:] / 2], 1)
        truth = batch.corners[row, item]
        boxes = 5.0 * (corners - truth).abs().sum(1) + 2.0 * giou_loss(corners, truth)
        return score + boxes.mean(), levels[0]

    def step(self, rows: np.ndarray, lr: float, alone: bool) -> dict[str, float]:
        batch = make_batch(self.pool, rows, self.random.random(len(rows)) < 0.5)
        if alone:
            loss, features = self.proposals(batch)
        else:
            out = self.model(batch.pixels, labels=batch.labels)
            loss, features = out.loss, out.encoder_last_hidden_state[0]
        dense = self.head(features, batch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        (loss + self.settings.dense * dense).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": float(loss.detach()), "dense": float(dense.detach())}


def train(settings: Settings, pool: Pool, held_out: Pool) -> tuple[Any, int]:
    """The trained model and the number of images that it saw."""
    trainer = Trainer(settings, pool)
    seconds = settings.minutes * 60.0
    clock, images, epoch, measured = Progress("det (seconds)", seconds), 0, 0, 0.0
    started = time.process_time()  # of the processor: a busy machine takes longer and learns as much
    while True:
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(pool))
        epoch += 1
        for start in range(0, len(order) - settings.batch + 1, settings.batch):
            spent = time.process_time() - started
            if spent >= seconds:
                return trainer.model.eval(), images
            share = spent / seconds
            rows = np.sort(order[start : start + settings.batch])
            lr = settings.lr * one_cycle(share) * (0.5 if settings.init else 1.0)
            losses = trainer.step(rows, lr, settings.init is None and share < settings.alone)
            images += settings.batch
            note = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            clock.tick(
                spent, f"| {images / max(spent, 1e-9):.0f} images/s, epoch {images / len(pool):.2f} | {note}"
            )
            if share - measured > 0.2 and share > settings.alone:
                measured = share
                print("held out:", measure(trainer.model.eval(), held_out), flush=True)
                trainer.model.train()


@torch.inference_mode()
def detect(model: Any, images: np.ndarray, min_score: float = 0.0) -> list[Boxes]:
    """One class by query: boxes of uint8 images (B, S, S, 3), best first."""
    found = []
    for start in range(0, len(images), 16):
        out = model(to_pixels(images[start : start + 16]))
        scores, classes = out.logits.sigmoid().max(-1)
        half = out.pred_boxes[..., 2:] / 2
        corners = torch.cat([out.pred_boxes[..., :2] - half, out.pred_boxes[..., :2] + half], -1).clamp(
            0.0, 1.0
        )
        for xyxy, ids, score in zip(corners.numpy(), classes.numpy(), scores.numpy(), strict=True):
            order = np.argsort(-score, kind="stable")
            found.append(Boxes(xyxy[order], ids[order], score[order]).keep(score[order] >= min_score))
    return found


def measure(model: Any, pool: Pool) -> dict[str, float]:
    """AP50 over all queries; precision and recall of the boxes with a score of at least 0.5 (IoU 0.5, right class)."""
    found, truth = detect(model, pool.image), pool.truth_boxes()
    sure = [boxes.keep(boxes.scores >= 0.5) for boxes in found]
    right = sum(_matched(a, b) for a, b in zip(sure, truth, strict=True))
    return {
        "ap50": round(ap50(found, truth), 4),
        "precision_at_score_0.5": round(right / max(sum(map(len, sure)), 1), 4),
        "recall_at_score_0.5": round(right / max(sum(map(len, truth)), 1), 4),
    }


def _matched(found: Boxes, truth: Boxes) -> int:
    """How many true boxes are found: one found box (best first) for each, of its class, with an IoU of 0.5."""
    iou = box_iou(found.xyxy, truth.xyxy) * (found.class_ids[:, None] == truth.class_ids[None])
    hits = 0
    for row in iou:
        if len(row) and row.max() >= 0.5:
            hits += 1
            iou[:, row.argmax()] = 0.0
    return hits


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="processor time to train for")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    parser.add_argument("--scenes", type=int, default=defaults.scenes, help="how many scenes to train on")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--init", type=Path, help="a checkpoint folder to go on from")
    parser.add_argument(
        "--cache", type=Path, help="where rendered scenes are kept (default: the temporary folder)"
    )
    args = parser.parse_args()
    settings = Settings(minutes=args.minutes, scenes=args.scenes, seed=args.seed, init=args.init)
    torch.set_num_threads(1)
    pool = open_pool(TRAIN_SEED, settings.scenes, SIZE, args.cache)
    held_out = open_pool(HELD_OUT_SEED, HELD_OUT_COUNT, SIZE, args.cache)
    model, images = train(settings, pool, held_out)
    save_half(model, args.out)
    make_processor().save_pretrained(args.out)
    report(args.out, settings, images, held_out)


def report(folder: Path, settings: Settings, images: int, held_out: Pool) -> None:
    """Measures the checkpoint as it is on disk, and writes its card."""
    model = load(folder).eval()
    card = {
        "name": "det",
        "architecture": f"RTDetrForObjectDetection, ResNet of two stages, {SIZE} px, classes {', '.join(DET_CLASSES)}",
        "params": count_params(model),
        "license": "Apache-2.0",
        "trained_on": f"scenes version 1, seed {TRAIN_SEED}, {settings.scenes} images ({images} seen)",
        "command": f"python -m fourmill.flows.specialists.det --minutes {settings.minutes:g} --out DIR"
        + (" --init PREVIOUS" if settings.init else ""),
        "held_out": {
            "scenes": f"seed {HELD_OUT_SEED}, {HELD_OUT_COUNT} images at {SIZE} px",
            **measure(model, held_out),
            "cpu_ms_per_image_at_batch_16": milliseconds(model, SIZE),
        },
    }
    write_card(folder, card)
    print(card)


if __name__ == "__main__":
    main()
