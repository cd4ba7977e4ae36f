"""Trains the small CLIP that ships with fourmill: `python -m fourmill.flows.specialists.clip --minutes 12 --out DIR`.

A CLIPModel (vision transformer, patch 16 at 128 px; a two-layer text tower over whole words) learns to match scenes
with their captions. fourmill uses its projected patch tokens, so two throw-away linear heads teach these what a
contrastive loss alone is slow to teach a transformer from scratch: the geometry of the patch, and the phrases of the
caption.
"""

import argparse
import collections
import itertools
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

SIZE, PATCH, PROJECTION, MAX_TOKENS = 128, 16, 512, 96
GRID = SIZE // PATCH
SPECIAL = (
    "[PAD]",
    "[UNK]",
    "[BOS]",
    "[EOS]",
)  # EOS must not be 2: CLIPTextModel has an old meaning for that id
CELL_VALUES = 12  # shares of 5 classes, log depth, normal, colour; for each of the 2 x 2 cells of a patch
PHRASE_MIN = 40  # a phrase must be in this many captions of the pool
GROUP = 64  # retrieval is among this many captions


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    minutes: float = 12.0
    scenes: int = 20480
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0
    init: Path | None = None  # a checkpoint to go on from, at half the learning rate
    dense: float = 1.0  # weight of the geometry head
    phrase: float = 10.0  # weight of the phrase head
    patch_match: float = 0.5  # weight of matching the mean patch token with the caption


def make_tokenizer(captions: list[str]) -> Any:
    """Whole lower-case words and punctuation marks, padded with 0, wrapped in BOS and EOS."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]+", caption.lower())})
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(num_words: int) -> Any:
    """About 2.3 million parameters."""
    from transformers import CLIPConfig, CLIPModel

    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {
        "vocab_size": num_words,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "gelu",
        "projection_dim": PROJECTION,
        **special,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "projection_dim": PROJECTION,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def load(folder: Path) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder, dtype=torch.float32)


def make_processor() -> Any:
    from transformers import CLIPImageProcessor

    half = [0.5, 0.5, 0.5]
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size, image_mean=half, image_std=half)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def image_tokens(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The image embedding (B, 512) and the projected patch tokens (B, 64, 512), not normalised."""
    hidden = model.vision_model(pixel_values=pixels).last_hidden_state
    tokens = model.visual_projection(model.vision_model.post_layernorm(hidden))
    return tokens[:, 0], tokens[:, 1:]


def text_embedding(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, 512), not normalised."""
    return model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)


def mirrored(caption: str) -> str:
    """The caption of the mirrored image."""
    return re.sub(r"\b(left|right)\b", lambda m: "right" if m[1] == "left" else "left", caption)


def find_phrases(captions: list[str]) -> dict[str, int]:
    """The pairs of neighbouring words that many captions have, without pairs that mirroring would change."""
    counts = collections.Counter(phrase for caption in captions for phrase in _pairs(caption))
    common = sorted(p for p, n in counts.items() if n >= PHRASE_MIN and not re.search("left|right", p))
    return {phrase: i for i, phrase in enumerate(common)}


def _pairs(caption: str) -> set[str]:
    words = re.findall(r"\w+|[^\w\s]+", caption)
    return {f"{a} {b}" for a, b in itertools.pairwise(words)}


def phrase_targets(captions: list[str], phrases: dict[str, int]) -> torch.Tensor:
    """float32 (B, phrases): 1 where the caption has the phrase."""
    target = torch.zeros(len(captions), len(phrases))
    for row, caption in enumerate(captions):
        target[row, [phrases[p] for p in _pairs(caption) if p in phrases]] = 1.0
    return target


def cell_targets(images: np.ndarray, cells: np.ndarray) -> torch.Tensor:
    """float32 (B, 64, 4, 12): what each patch's 2 x 2 cells hold. ``cells`` (B, 16, 16, 9), see `Pool`."""
    batch, fine = len(images), 2 * GRID
    colour = (
        images.reshape(batch, fine, SIZE // fine, fine, SIZE // fine, 3).mean((2, 4), dtype=np.float32)
        / 127.5
    )
    values = np.concatenate([cells.astype(np.float32), colour - 1.0], axis=3)
    values = values.reshape(batch, GRID, 2, GRID, 2, CELL_VALUES).transpose(0, 1, 3, 2, 4, 5)
    return torch.from_numpy(values.reshape(batch, GRID * GRID, 4, CELL_VALUES))


def mirror_cells(cells: np.ndarray) -> np.ndarray:
    """Cells of the mirrored image; the normal's x changes sign."""
    flipped = cells[:, :, ::-1].copy()
    flipped[..., 6] *= -1
    return flipped


def match_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3)."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    target = torch.arange(len(logits))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def dense_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the class shares plus L1 of depth, normal and colour; both (B, 64, 4, 12)."""
    share = -(target[..., :5] * F.log_softmax(predicted[..., :5], dim=-1)).sum(-1).mean()
    return share + 3.0 * (predicted[..., 5:] - target[..., 5:]).abs().mean()


class Trainer:
    """The model, its throw-away heads, and one step."""

    def __init__(self, settings: Settings, pool: Pool, tokenizer: Any) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.pool, self.tokenizer = settings, pool, tokenizer
        self.model = load(settings.init).train() if settings.init else make_model(len(tokenizer))
        self.phrases = find_phrases(pool.captions)
        self.dense_head = nn.Linear(PROJECTION, 4 * CELL_VALUES)
        self.phrase_head = nn.Linear(PROJECTION, len(self.phrases))
        modules = [self.model, self.dense_head, self.phrase_head]
        self.optimizer = adamw(modules, settings.lr, settings.weight_decay)
        self.random = np.random.default_rng(settings.seed)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images, cells and captions; the whole batch is mirrored every other time."""
        images, cells = self.pool.image[rows], self.pool.cells[rows]
        captions = [self.pool.captions[row] for row in rows]
        if self.random.random() < 0.5:
            return images[:, :, ::-1], mirror_cells(cells), [mirrored(caption) for caption in captions]
        return images, cells, captions

    def step(self, rows: np.ndarray, lr: float) -> dict[str, float]:
        images, cells, captions = self.batch(rows)
        words = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        whole, patches = image_tokens(self.model, to_pixels(images))
        text = text_embedding(self.model, words["input_ids"], words["attention_mask"])
        scale = self.model.logit_scale.exp()
        dense = self.dense_head(patches).view(*patches.shape[:2], 4, CELL_VALUES)
        phrase = F.binary_cross_entropy_with_logits(
            self.phrase_head(whole), phrase_targets(captions, self.phrases)
        )
        losses = {
            "match": match_loss(whole, text, scale),
            "patch_match": match_loss(patches.mean(1), text, scale),
            "dense": dense_loss(dense, cell_targets(images, cells)),
            "phrase": phrase,
        }
        s = self.settings
        total = (
            losses["match"]
            + s.patch_match * losses["patch_match"]
            + s.dense * losses["dense"]
            + s.phrase * phrase
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6)  # a temperature of 0.01, as in the paper's section 2.5
        return {name: float(loss.detach()) for name, loss in losses.items()}


def train(settings: Settings, pool: Pool, held_out: Pool, tokenizer: Any) -> tuple[Any, int]:
    """The trained model and the number of images that it saw."""
    trainer = Trainer(settings, pool, tokenizer)
    seconds = settings.minutes * 60.0
    clock, images, epoch = Progress("clip (seconds)", seconds), 0, 0
    started = time.process_time()  # of the processor: a busy machine takes longer and learns as much
    while True:
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(pool))
        epoch += 1
        for start in range(0, len(order) - settings.batch + 1, settings.batch):
            spent = time.process_time() - started
            if spent >= seconds:
                return trainer.model.eval(), images
            rows = np.sort(order[start : start + settings.batch])
            lr = settings.lr * one_cycle(spent / seconds) * (0.5 if settings.init else 1.0)
            losses = trainer.step(rows, lr)
            images += settings.batch
            note = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            clock.tick(
                spent, f"| {images / max(spent, 1e-9):.0f} images/s, epoch {images / len(pool):.2f} | {note}"
            )
        if epoch % 2 == 0:
            print("held out:", retrieval(trainer.model.eval(), tokenizer, held_out), flush=True)
            trainer.model.train()


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, pool: Pool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised image (N, 512) and text (N, 512) embeddings, and raw patch tokens (N, 64, 512)."""
    whole, patch, text = [], [], []
    for start in range(0, len(pool), 64):
        part = slice(start, start + 64)
        words = tokenizer(pool.captions[part], padding=True, truncation=True, return_tensors="pt")
        image, patches = image_tokens(model, to_pixels(pool.image[part]))
        whole.append(F.normalize(image, dim=1))
        patch.append(patches)
        text.append(F.normalize(text_embedding(model, words["input_ids"], words["attention_mask"]), dim=1))
    return torch.cat(whole), torch.cat(text), torch.cat(patch)


def retrieval(model: Any, tokenizer: Any, pool: Pool) -> dict[str, float]:
    """R@1 among disjoint groups of 64; a caption of identical text counts as the right one."""
    image, text, _ = embed(model, tokenizer, pool)
    same = torch.tensor([[a == b for b in pool.captions] for a in pool.captions])
    to_text, to_image, groups = 0.0, 0.0, len(pool) // GROUP
    for g in range(groups):
        part = slice(g * GROUP, (g + 1) * GROUP)
        similar, right = image[part] @ text[part].T, same[part, part]
        to_text += float(right.gather(1, similar.argmax(1, keepdim=True)).float().mean())
        to_image += float(right.gather(0, similar.argmax(0, keepdim=True)).float().mean())
    return {
        "image_to_caption_r1_of_64": round(to_text / groups, 4),
        "caption_to_image_r1_of_64": round(to_image / groups, 4),
    }


def patch_probe(model: Any, tokenizer: Any, pool: Pool, held_out: Pool) -> float:
    """How well a linear map of a patch token tells the patch's most frequent scene class: accuracy, held out."""
    rows = []
    for part in (pool.first(1024), held_out):
        tokens = embed(model, tokenizer, part)[2].flatten(0, 1)
        share = cell_targets(part.image, part.cells)[..., :5].mean(2).flatten(0, 1)
        rows.append((torch.cat([tokens, torch.ones(len(tokens), 1)], 1).double(), share.argmax(1)))
    (x, y), (x_new, y_new) = rows
    gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ F.one_hot(y, 5).double())
    return round(float(((x_new @ weights).argmax(1) == y_new).double().mean()), 4)


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
    if settings.init:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(settings.init)
    else:
        tokenizer = make_tokenizer(pool.captions)
    model, images = train(settings, pool, held_out, tokenizer)
    save_half(model, args.out)
    make_processor().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report(args.out, settings, images, pool, held_out)


def report(folder: Path, settings: Settings, images: int, pool: Pool, held_out: Pool) -> None:
    """Measures the checkpoint as it is on disk, and writes its card."""
    from transformers import AutoTokenizer

    model = load(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    metrics: dict[str, Any] = retrieval(model, tokenizer, held_out)
    metrics["patch_class_linear_probe_accuracy"] = patch_probe(model, tokenizer, pool, held_out)
    metrics["cpu_ms_per_image_at_batch_16"] = milliseconds(lambda pixels: image_tokens(model, pixels), SIZE)
    card = {
        "name": "clip",
        "architecture": f"CLIPModel, patch {PATCH} at {SIZE} px, projection_dim {PROJECTION}",
        "params": count_params(model),
        "license": "Apache-2.0",
        "trained_on": f"scenes version 1, seed {TRAIN_SEED}, {settings.scenes} images ({images} seen)",
        "command": f"python -m fourmill.flows.specialists.clip --minutes {settings.minutes:g} --out DIR"
        + (" --init PREVIOUS" if settings.init else ""),
        "held_out": {"scenes": f"seed {HELD_OUT_SEED}, {HELD_OUT_COUNT} images at {SIZE} px", **metrics},
    }
    write_card(folder, card)
    print(card)


if __name__ == "__main__":
    main()
