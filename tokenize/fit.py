"""Fitting: from kept labels to a complete tokenizer folder, for every codec family.

`fit_codec` is the one entry that a flow needs. Tokenizers that are fitted see training labels alone; what they
are worth is measured on labels that were held out, and written into the tokenizer's card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.errors import ConfigError, nearest
from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import codec_hash, codecs, load_codec
from fourmill.tokenize.fit_loop import FitOptions, Progress, fit_vqvae
from fourmill.tokenize.options import ENCODER, FIRST, typed
from fourmill.tokenize.peers import ALONE, Peers
from fourmill.tokenize.pixels import PixelsCodec
from fourmill.tokenize.scalar import ScalarCodec
from fourmill.tokenize.spaces import Bounded, Depth, Vector, space_name
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vocabulary import MAX_VOCABULARY, Vocabulary, train_vocabulary
from fourmill.tokenize.vqvae import VQVAE, VQConfig
from fourmill.tokenize.vqvae_network import DIFFUSION_FIELDS, VIT_FIELDS

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
#: of a diffusion decoder in "demo": minutes on one core; in "4m" the fields' defaults are the paper's
_SMALL_UNET: dict[str, Any] = {
    "unet_width": 32,
    "unet_multipliers": [1, 2],
    "unet_blocks": 1,
    "ddim_steps": 10,
}
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
    if preset == "demo" and changes.get("decoder") == "diffusion":
        values |= _SMALL_UNET
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
    With ``decoder: diffusion`` the option ``encoder`` is the folder of a fitted tokenizer of which encoder and codes are taken
    as they are, or "first": such a tokenizer is fitted first, with the same options.

    ``labels`` are of ``image_size``, or of the largest of the option ``sizes``; ``held_out`` of ``image_size``. ``scratch``
    and ``peers`` as in `fit_vqvae`; of several workers only the first writes ``out``.
    """
    family = modality.codec
    if family == "vqvae":
        run = partial(
            fit_vqvae,
            modality,
            labels,
            image_size=image_size,
            progress=progress,
            scratch=scratch,
            peers=peers,
        )
        codec = _fit_network(run, modality, image_size, options)
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


def _fit_network(
    run: Callable[..., VQVAE], modality: Modality, image_size: int, options: Mapping[str, Any]
) -> VQVAE:
    """A codec fitted by ``run`` (`fit_vqvae` with what does not depend on the options), after its encoder if need be."""
    given = options.get(ENCODER)
    check_fit(modality, options, image_size)
    if given is None:
        fit, network = _split_options(options, modality)
        return run(default_config(modality, fit.preset, image_size, **network), options=fit)
    decoder = ("decoder", *DIFFUSION_FIELDS)
    if given == FIRST:
        first = {k: v for k, v in options.items() if k not in (ENCODER, *decoder)}
        encoder = _fit_network(run, modality, image_size, first)
    else:
        encoder = _given_encoder(Path(given), modality, image_size)
    fit, network = _split_options(options, modality)
    chosen = {k: v for k, v in network.items() if k in decoder}
    unet = _SMALL_UNET if fit.preset == "demo" else {}
    config = encoder.config.with_changes({**unet, **chosen}, f"modalities.{modality.name}.tokenizer")
    codec = run(config, options=fit, encoder=encoder)
    codec.card[ENCODER] = "fitted first" if given == FIRST else codec_hash(Path(given))[:12]
    return codec


def _given_encoder(folder: Path, modality: Modality, image_size: int) -> VQVAE:
    codec = load_codec(folder, modality, image_size)
    if not isinstance(codec, VQVAE):
        raise ConfigError(
            f"modalities.{modality.name}.tokenizer.{ENCODER}: {folder} is of the family {codec.family!r}; "
            "a diffusion decoder is fitted here to tokenizers that were fitted here"
        )
    return codec


def check_fit(modality: Modality, options: Mapping[str, Any], image_size: int) -> None:
    """ConfigError, which names the key, where no network can be fitted with these options. Looks at no label."""
    where = f"modalities.{modality.name}.tokenizer"
    fit, network = _split_options(options, modality)
    is_diffusion = network.get("decoder") == "diffusion"
    given = options.get(ENCODER)
    own = [field.name for field in fields(VQConfig) if field.name in options]
    of_encoder = [name for name in own if name not in ("decoder", *DIFFUSION_FIELDS)]
    if given is not None and (not isinstance(given, str | Path) or not str(given)):
        raise ConfigError(
            f"{where}.{ENCODER}: expected is a folder, a tokenizer's hash or {FIRST!r}, got {given!r}"
        )
    if given is not None and not is_diffusion:
        raise ConfigError(f"{where}.{ENCODER}: is for `decoder: diffusion`, which is fitted to it")
    if given not in (None, FIRST) and of_encoder:
        raise ConfigError(f"{where}.{of_encoder[0]}: is settled by the given `{ENCODER}`; remove the key")
    idle = VIT_FIELDS if is_diffusion and given is None else () if is_diffusion else DIFFUSION_FIELDS
    for name in idle:
        if name in own:
            raise ConfigError(
                f"{where}.{name}: no option of this decoder; remove the key, or choose another `decoder`"
            )
    config = default_config(modality, fit.preset, image_size, **network)
    if is_diffusion and space_name(modality.contract) not in (Bounded.name, Depth.name):
        raise ConfigError(
            f"{where}.decoder: 'diffusion' is for images, normals, edges and depth; take 'vit' for {modality.name!r}"
        )
    for size in fit.sizes_at(image_size) if is_diffusion else ():
        if size % config.unet_patch:
            raise ConfigError(f"{where}.unet_patch: image_size {size} is no multiple of {config.unet_patch}")


def _check_options(options: Mapping[str, Any], modality: Modality, own: tuple[str, ...]) -> None:
    known = {
        *own,
        ENCODER,
        *_VOCABULARY_OPTIONS,
        *_FLOW_OPTIONS,
        *(field.name for field in fields(FitOptions)),
    }
    for name in options:
        if name not in known:
            raise ConfigError(
                f"modalities.{modality.name}.tokenizer.{name}: unknown option{nearest(name, own)}"
            )


def _split_options(options: Mapping[str, Any], modality: Modality) -> tuple[FitOptions, dict[str, Any]]:
    """Fit options, and overrides of the network."""
    where = f"modalities.{modality.name}.tokenizer"
    _check_options(options, modality, tuple(field.name for field in fields(VQConfig)))
    known = {field.name for field in fields(FitOptions)}
    chosen = typed(FitOptions, {k: v for k, v in options.items() if k in known}, where)
    try:
        fit = FitOptions(**chosen)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
    other = {*known, ENCODER, *_VOCABULARY_OPTIONS, *_FLOW_OPTIONS}
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
