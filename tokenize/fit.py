"""Fitting: from kept labels to a complete tokenizer folder, for every codec family.

`fit_codec` is the one entry that a flow needs. Tokenizers that are fitted see training labels alone; what they
are worth is measured on labels that were held out, and written into the tokenizer's card.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fourmill.errors import ConfigError, ContractError, nearest
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import codecs
from fourmill.tokenize.pixels import PixelsCodec
from fourmill.tokenize.scalar import ScalarCodec
from fourmill.tokenize.spaces import Depth, Features, Vector, space_name
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vocabulary import MAX_VOCABULARY, Vocabulary, train_vocabulary
from fourmill.tokenize.vqvae import VQVAE, VQConfig

Progress = Callable[[int, int, dict[str, Any]], None]

#: Network sizes by preset: "4m" is the paper's ViT-B, "demo" runs on one core in minutes.
PRESETS: dict[str, dict[str, Any]] = {
    "4m": {},
    "demo": {
        "dim": 96,
        "encoder_depth": 2,
        "decoder_depth": 2,
        "heads": 3,
        "mlp_ratio": 3.0,
        "latent_dim": 16,
        "refine": 32,
        "class_dim": 8,
    },
}
#: Codebook sizes by preset and modality; other modalities take what ``""`` says.
CODEBOOKS: dict[str, dict[str, int]] = {
    "4m": {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192, "": 8192},
    "demo": {"rgb": 512, "depth": 256, "normal": 256, "semseg": 128, "clip": 256, "": 256},
}

_VOCABULARY_OPTIONS = ("vocabulary", "vocabulary_captions", "vocabulary_classes", "vocabulary_size")
_PIXEL_OPTIONS = ("format", "quality", "lossless", "patch_size")
_FLOW_OPTIONS = ("samples",)  # under `fit:` too, and the caller's affair


@dataclass(frozen=True, kw_only=True, slots=True)
class FitOptions:
    """How a network is fitted. ``steps`` or ``minutes``, whichever ends first; 0 minutes: steps alone."""

    preset: str = "4m"
    steps: int = 20_000
    minutes: float = 0.0  # wall-clock; a fit that ends by the clock is not reproducible
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the run in which the learning rate rises
    relaxed: float = (
        0.15  # share of the run before quantisation begins: codes start from latents that mean something
    )
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"  # or "bf16": autocast, the quantizer excepted; for GPUs


def fit_needed(modality: Modality) -> bool:
    """Whether this modality's codec has to be fitted on labels before anything can be tokenized."""
    return bool(modality.codec) and codecs.get(modality.codec).needs_fit


def default_config(modality: Modality, preset: str, image_size: int, **changes: Any) -> VQConfig:
    """The network of a preset for a modality; ``changes`` override single fields.

    Patches have 16 pixels (less where the image is smaller than 32), as everywhere in 4M.
    """
    if preset not in PRESETS:
        raise ConfigError(f"fit.preset: unknown preset {preset!r}{nearest(preset, PRESETS)}")
    sizes = CODEBOOKS[preset]
    values = {**PRESETS[preset], "codebook_size": sizes.get(modality.name, sizes[""])}
    values["patch_size"] = 16 if image_size >= 32 else 4
    if space_name(modality.contract) == Depth.name:
        values["normalisation"] = "log" if modality.contract.units == "metres" else "robust"
        if preset == "demo":
            values["depth_range"] = (0.4, 20.0)
    return VQConfig.from_mapping({**values, **changes}, f"modalities.{modality.name}.tokenizer")


def fit_codec(
    modality: Modality,
    labels: Sequence[Label],
    held_out: Sequence[Label],
    *,
    image_size: int,
    options: Mapping[str, Any],
    out: Path,
    progress: Progress | None = None,
) -> Path:
    """Fit (or just set up) the codec of ``modality`` and write its folder ``out``; returns ``out``.

    ``labels`` and ``held_out`` are cropped labels, read one by one by index (they may be lazy); families that
    need no fit ignore them. ``options``: fields of `FitOptions` and `VQConfig`; for what is written as text
    ``vocabulary`` (path of a tokenizer file or folder), or ``vocabulary_captions``, ``vocabulary_classes`` and
    ``vocabulary_size`` to train one, and the family's own; for pixels ``format``, ``quality``, ``lossless``, ``patch_size``.
    """
    family = modality.codec
    if family == "vqvae":
        fit, network = _split_options(options, modality)
        codec = _fit_labels(modality, labels, held_out, fit, network, image_size, progress)
        codec.save(out)
    elif family in codecs and issubclass(written := codecs.get(family), VocabularyCodec):
        _check_options(options, modality, (*_VOCABULARY_OPTIONS, *written.options))
        chosen = {name: options[name] for name in written.options if name in options}
        written.make(modality, image_size, _vocabulary(options, modality), chosen).save(out)
    elif family == "pixels":
        _check_options(options, modality, _PIXEL_OPTIONS)
        chosen = {name: options[name] for name in _PIXEL_OPTIONS if name in options}
        PixelsCodec(modality, image_size, **chosen).save(out)
    elif family == "scalar":
        _check_options(options, modality, ())
        ScalarCodec(modality, image_size).save(out)
    else:
        raise ConfigError(f"modality {modality.name!r}: no way to fit the codec family {family!r}")
    return out


def _check_options(options: Mapping[str, Any], modality: Modality, own: tuple[str, ...]) -> None:
    known = {*own, *_VOCABULARY_OPTIONS, *_FLOW_OPTIONS, *(field.name for field in fields(FitOptions))}
    for name in options:
        if name not in known:
            raise ConfigError(
                f"modalities.{modality.name}.tokenizer.{name}: unknown option{nearest(name, own)}"
            )


def _split_options(options: Mapping[str, Any], modality: Modality) -> tuple[FitOptions, dict[str, Any]]:
    """Fit options, and overrides of the network."""
    _check_options(options, modality, tuple(field.name for field in fields(VQConfig)))
    known = {field.name for field in fields(FitOptions)}
    fit = FitOptions(**{k: v for k, v in options.items() if k in known})
    other = {*known, *_VOCABULARY_OPTIONS, *_FLOW_OPTIONS}
    return fit, {**modality.codec_options, **{k: v for k, v in options.items() if k not in other}}


def _vocabulary(options: Mapping[str, Any], modality: Modality) -> Vocabulary:
    if options.get("vocabulary"):
        return Vocabulary.load(Path(options["vocabulary"]))
    captions = options.get("vocabulary_captions")
    if captions is None:
        raise ConfigError(
            f"modality {modality.name!r}: its tokenizer needs a vocabulary: give `vocabulary`, or captions to train one"
        )
    classes = [*options.get("vocabulary_classes", ()), *modality.contract.classes]
    return train_vocabulary(captions, classes, int(options.get("vocabulary_size", MAX_VOCABULARY)))


def _fit_labels(
    modality: Modality,
    labels: Sequence[Label],
    held_out: Sequence[Label],
    fit: FitOptions,
    network: dict[str, Any],
    image_size: int,
    progress: Progress | None,
) -> VQVAE:
    config = default_config(modality, fit.preset, image_size, **network)
    codec = fit_vqvae(modality, labels, config, image_size=image_size, options=fit, progress=progress)
    codec.card["held_out"] = measure(codec, held_out)
    return codec


def fit_vqvae(
    modality: Modality,
    labels: Sequence[Label],
    config: VQConfig,
    *,
    image_size: int,
    options: FitOptions,
    progress: Progress | None = None,
) -> VQVAE:
    """Fit a tokenizer network on cropped labels; the same arguments and ``steps`` give the same weights on one CPU.

    AdamW with betas 0.9 and 0.99, linear warm-up, cosine to zero, gradients clipped at norm 1 (4M's recipe),
    horizontal flips by the modality's rule.
    """
    if not len(labels):
        raise ContractError(f"tokenizer of {modality.name!r}: there are no labels to fit on")
    codec = _fresh_codec(modality, labels, config, image_size, options.seed)
    codec.to(options.device).network.train().requires_grad_(True)
    optimizer = _optimizer(codec.network, options)
    generator = torch.Generator().manual_seed(options.seed)
    started, done, step = time.monotonic(), 0.0, 0
    with closing(_batches(codec, labels, options)) as batches:
        while done < 1.0:
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(done, options.warmup)
            figures = _step(codec, next(batches), optimizer, options, generator, done < options.relaxed)
            step += 1
            elapsed = (time.monotonic() - started) / 60
            done = max(step / options.steps, elapsed / options.minutes if options.minutes else 0.0)
            if progress and (step % 20 == 0 or done >= 1.0):
                total = options.steps if not options.minutes else max(step, round(step / done))
                progress(step, total, {name: float(value) for name, value in figures.items()})
    codec.to("cpu").freeze()
    parameters = sum(p.numel() for p in codec.network.parameters())
    codec.card.update(
        parameters=parameters, fit={**asdict(options), "steps_done": step, "num_labels": len(labels)}
    )
    return codec


def _fresh_codec(
    modality: Modality, labels: Sequence[Label], config: VQConfig, image_size: int, seed: int
) -> VQVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        space = space_name(modality.contract)
        if space in (Features.name, Vector.name):
            shape = np.shape(labels[0])
            grid = (shape[0], shape[1]) if space == Features.name else None
            codec = VQVAE(modality, image_size, config, grid=grid, channels=shape[-1])
            _set_standardisation(codec, labels)
        else:
            codec = VQVAE(modality, image_size, config)
        for module in codec.network.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    return codec


def _set_standardisation(codec: VQVAE, labels: Sequence[Label]) -> None:
    """Mean and deviation of every feature channel, over at most 256 labels spread over the set."""
    picked = np.linspace(0, len(labels) - 1, min(256, len(labels))).astype(int)
    sample = codec.to_network([labels[i] for i in picked])
    codec.network.shift.copy_(sample.mean((0, 2, 3)).view(-1, 1, 1))
    codec.network.scale.copy_(sample.std((0, 2, 3)).clamp_min(1e-3).view(-1, 1, 1))


def _optimizer(network: nn.Module, options: FitOptions) -> torch.optim.AdamW:
    """Matrices decay; biases, norms and embeddings do not."""
    decay = [p for p in network.parameters() if p.ndim >= 2]
    rest = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99))


def _schedule(done: float, warmup: float) -> float:
    """Learning-rate factor at the share ``done`` of the run."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _batches(codec: VQVAE, labels: Sequence[Label], options: FitOptions) -> Generator[Tensor, None, None]:
    """Random batches for ever, flipped by chance; another thread reads one ahead, as labels may come from storage."""
    generator = torch.Generator().manual_seed(options.seed + 1)

    def read(rows: list[int], flipped: Tensor) -> Tensor:
        batch = codec.to_network([labels[row] for row in rows])
        return codec.space.flip(batch, flipped.to(batch.device))

    def submit(pool: ThreadPoolExecutor) -> Future[Tensor]:
        rows = torch.randint(len(labels), (options.batch_size,), generator=generator).tolist()
        return pool.submit(read, rows, torch.rand(options.batch_size, generator=generator) < 0.5)

    with ThreadPoolExecutor(1, thread_name_prefix="fit-labels") as pool:
        ahead = submit(pool)
        while True:
            batch = ahead.result()
            ahead = submit(pool)
            yield batch


def _step(
    codec: VQVAE,
    batch: Tensor,
    optimizer: torch.optim.Optimizer,
    options: FitOptions,
    generator: torch.Generator,
    relaxed: bool,
) -> dict[str, Tensor]:
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
        if relaxed:
            output, ids, commitment = (
                codec.network.forward_relaxed(batch),
                None,
                batch.new_zeros((), dtype=torch.float32),
            )
        else:
            output, ids, commitment = codec.network(batch, generator)
    loss = codec.space.loss(output.float(), batch)
    optimizer.zero_grad(set_to_none=True)
    (loss + commitment).backward()
    torch.nn.utils.clip_grad_norm_(codec.network.parameters(), 1.0)
    optimizer.step()
    codes = 0 if ids is None else len(ids.unique())
    return {"loss": loss.detach(), "commitment": commitment.detach(), "codes": torch.tensor(codes)}


def measure(codec: VQVAE, held_out: Sequence[Label], batch_size: int = 32) -> dict[str, float]:
    """Round-trip figures on labels that were not fitted on, and how much of the codebook they use.

    ``codebook_use`` is the share of codes seen at least once, ``perplexity`` 2 to the entropy (bits) of the codes.
    """
    if not len(held_out):
        return {}
    labels = [held_out[i] for i in range(len(held_out))]
    chunks = [labels[i : i + batch_size] for i in range(0, len(labels), batch_size)]
    tokens = [ids for chunk in chunks for ids in codec.encode(chunk)]
    decoded = [x for i in range(0, len(tokens), batch_size) for x in codec.decode(tokens[i : i + batch_size])]
    counts = np.bincount(np.concatenate([np.asarray(t) for t in tokens]), minlength=codec.modality.vocab_size)
    share = counts[counts > 0] / counts.sum()
    figures = codec.space.figures(labels, decoded)
    figures["codebook_use"] = float((counts > 0).mean())
    figures["perplexity"] = float(2 ** -(share * np.log2(share)).sum())
    return {"num_labels": len(labels), **{name: round(value, 4) for name, value in figures.items()}}
