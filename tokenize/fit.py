"""Fitting: from kept labels to a complete tokenizer folder, for every codec family.

`fit_codec` is the one entry that a flow needs. Tokenizers that are fitted see training labels alone; what they
are worth is measured on labels that were held out, and written into the tokenizer's card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.errors import ConfigError, nearest
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import codecs
from fourmill.tokenize.fit_loop import FitOptions, Progress, fit_vqvae
from fourmill.tokenize.peers import ALONE, Peers
from fourmill.tokenize.pixels import PixelsCodec
from fourmill.tokenize.scalar import ScalarCodec
from fourmill.tokenize.spaces import Depth, Vector, space_name
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vocabulary import MAX_VOCABULARY, Vocabulary, train_vocabulary
from fourmill.tokenize.vqvae import VQVAE, VQConfig

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
    "4m": {"rgb": 16384, "semseg": 4096, "": 8192},
    "demo": {"semseg": 128, "": 512},
}

#: of vectors in "4m", as 4M-21 has for global features: MLPs around memory codes
_GLOBAL: dict[str, Any] = {
    "quantizer": "memory", "dim": 1024, "encoder_depth": 6, "decoder_depth": 6, "latent_dim": 1024, "heads": 16,
}  # fmt: skip
#: held-out labels that are decoded again to be compared; more are only encoded
DECODED = 256

_VOCABULARY_OPTIONS = ("vocabulary", "vocabulary_captions", "vocabulary_classes", "vocabulary_size")
_PIXEL_OPTIONS = ("format", "quality", "lossless", "patch_size")
_FLOW_OPTIONS = ("samples",)  # under `fit:` too, and the caller's affair


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
    if preset == "4m" and space_name(modality.contract) == Vector.name:
        values |= _GLOBAL
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
    scratch: Path | None = None,
    peers: Peers = ALONE,
) -> Path:
    """Fit (or just set up) the codec of ``modality`` and write its folder ``out``; returns ``out``.

    ``labels`` and ``held_out`` are cropped labels, read one by one by index (they may be lazy); families that
    need no fit ignore them. ``options``: fields of `FitOptions` and `VQConfig`; for what is written as text
    ``vocabulary`` (path of a tokenizer file or folder), or ``vocabulary_captions``, ``vocabulary_classes`` and
    ``vocabulary_size`` to train one, and the family's own; for pixels ``format``, ``quality``, ``lossless``, ``patch_size``.

    ``labels`` are of ``image_size``, or of the largest of the option ``sizes``; ``held_out`` of ``image_size``. ``scratch``
    and ``peers`` as in `fit_vqvae`; of several workers only the first writes ``out``.
    """
    family = modality.codec
    if family == "vqvae":
        fit, network = _split_options(options, modality)
        config = default_config(modality, fit.preset, image_size, **network)
        codec = fit_vqvae(
            modality,
            labels,
            config,
            image_size=image_size,
            options=fit,
            progress=progress,
            scratch=scratch,
            peers=peers,
        )
        if peers.rank == 0:
            codec.card["held_out"] = measure(codec, held_out)
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
    chosen: dict[str, Any] = {k: tuple(v) if k == "sizes" else v for k, v in options.items() if k in known}
    fit = FitOptions(**chosen)
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


def measure(codec: VQVAE, held_out: Sequence[Label], batch_size: int = 32) -> dict[str, float]:
    """Round-trip figures on labels that were not fitted on, and how much of the codebook they use.

    The figures are of `DECODED` labels spread over all of them. ``codebook_use`` is the share of codes seen at least
    once, ``perplexity`` 2 to the entropy (bits) of the codes; of several codebooks the mean.
    """
    if not len(held_out):
        return {}
    counts = np.zeros((codec.codebooks, codec.modality.vocab_size), np.int64)
    for start in range(0, len(held_out), batch_size):
        ids = np.stack(
            codec.encode([held_out[i] for i in range(start, min(start + batch_size, len(held_out)))])
        )
        for book, count in enumerate(counts):
            count += np.bincount(ids[:, book :: len(counts)].ravel(), minlength=len(count))
    picked = np.unique(np.linspace(0, len(held_out) - 1, min(DECODED, len(held_out))).astype(int)).tolist()
    labels = [held_out[i] for i in picked]
    chunks = [labels[i : i + batch_size] for i in range(0, len(labels), batch_size)]
    figures = codec.space.figures(labels, [x for chunk in chunks for x in codec.decode(codec.encode(chunk))])
    figures["codebook_use"] = float((counts > 0).mean())
    figures["perplexity"] = float(np.mean([_perplexity(count) for count in counts]))
    sizes = {"num_labels": len(held_out), "decoded": len(labels)}
    return {**sizes, **{name: round(value, 4) for name, value in figures.items()}}


def _perplexity(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(2 ** -(share * np.log2(share)).sum())
