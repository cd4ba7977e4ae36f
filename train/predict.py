"""Labels from a trained model: depth in metres, unit normals, class maps, captions, boxes.

model, codec = load_model("runs/demo"), load_codec(folder, modality, 128)
depth = predict(model, {"rgb": tokens}, "depth", codec)      # [float32 (S, S), ...] in metres
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from fourmill.errors import ConfigError
from fourmill.labels import Label
from fourmill.modality import LabelContract
from fourmill.seeds import generator
from fourmill.tokenize.base import Codec
from fourmill.train.generate import Tokens, generate, probabilities
from fourmill.train.model import FourMill

How = Literal["expectation", "sample", "greedy"]


@runtime_checkable
class HasCodebook(Protocol):
    """A codec that can decode a mixture of its codes."""

    def decode_expected(self, probabilities: np.ndarray) -> list[Label]: ...


def predict(
    model: FourMill,
    inputs: Mapping[str, Tokens],
    target: str,
    codec: Codec,
    *,
    seed: int = 0,
    keys: np.ndarray | None = None,
    how: How = "expectation",
    samples: int = 8,
    steps: int = 1,
    batch_size: int = 32,
) -> list[Label]:
    """One label per row of ``inputs`` (see `generate`), in the contract of the target's modality.

    ``expectation``: one parallel pass gives the probabilities of all codes at all places, and the codec decodes their
    mean: the best guess of a model that is not sure, and without chance. Classes have no mean (halfway between two
    lies a third): class maps, and codecs without a codebook, get ``greedy``.
    ``greedy``: the most probable token at each place. ``sample``: the mean of the labels of ``samples`` draws (of class
    maps each pixel's most frequent class; of unit vectors the mean's direction), each drawn in ``steps`` passes.

    Sequences are written token by token, the most probable one each time, or with ``sample`` one draw. Captions are
    strings, boxes have score 1. ``keys`` uint64 (B,) name the rows for random choices; a row's label does not depend
    on ``batch_size`` beyond rounding. Raises ConfigError for a codec that is not the target's.
    """
    _check(model, target, codec, how, samples)
    names = list(inputs)
    rows = max((len(inputs[name]) for name in names), default=0)
    keys = np.arange(rows, dtype=np.uint64) if keys is None else np.asarray(keys, np.uint64)
    labels: list[Label] = []
    for start in range(0, max(rows, 1), batch_size):
        part = slice(start, start + batch_size)
        given = {name: inputs[name][part] for name in names}
        labels += _predict(model, given, target, codec, how, seed, keys[part], samples, steps)
    return labels


def _predict(
    model: FourMill,
    inputs: Mapping[str, Tokens],
    target: str,
    codec: Codec,
    how: How,
    seed: int,
    keys: np.ndarray,
    samples: int,
    steps: int,
) -> list[Label]:
    spec = model.config.spec(target)
    if spec.is_sequence:
        temperature = 1.0 if how == "sample" else 0.0
        return codec.decode(generate(model, inputs, target, seed=seed, keys=keys, temperature=temperature))
    if how == "expectation" and isinstance(codec, HasCodebook) and not _is_classes(codec.modality.contract):
        return codec.decode_expected(probabilities(model, inputs, target))
    if how != "sample":
        return codec.decode(list(generate(model, inputs, target, keys=keys, steps=steps)))
    seeds = [int(generator(seed, "predict", number).integers(2**62)) for number in range(samples)]
    draws = [
        codec.decode(list(generate(model, inputs, target, seed=one, keys=keys, steps=steps, temperature=1.0)))
        for one in seeds
    ]
    return [average(row, codec.modality.contract) for row in zip(*draws, strict=True)]


def average(labels: tuple[np.ndarray, ...], contract: LabelContract) -> np.ndarray:
    """The mean of maps or vectors of one row, as its contract has it; of class ids the most frequent, of equals the lowest."""
    stack = np.stack(labels)
    if _is_classes(contract):
        values = np.unique(stack)
        votes = np.stack([(stack == value).sum(0) for value in values])
        return values[votes.argmax(0)].astype(contract.dtype)
    mean = stack.astype(np.float64).mean(0)
    if contract.unit_norm:
        mean /= np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
        # opposite vectors may cancel: then the first draw's stands
        mean = np.where(np.linalg.norm(mean, axis=-1, keepdims=True) > 0.5, mean, stack[0])
    if np.issubdtype(np.dtype(contract.dtype), np.integer):
        mean = np.rint(mean)
    return mean.astype(contract.dtype)


def _is_classes(contract: LabelContract) -> bool:
    return bool(contract.classes) or contract.units == "class id"


def _check(model: FourMill, target: str, codec: Codec, how: str, samples: int) -> None:
    if how not in ("expectation", "sample", "greedy"):
        raise ConfigError(f"predict: how is {how!r}; known are 'expectation', 'sample' and 'greedy'")
    if samples < 1:
        raise ConfigError(f"predict: {samples} samples; at least one is needed")
    spec, made_for = model.config.spec(target), codec.modality
    same_size = spec.is_sequence or spec.num_tokens == made_for.num_tokens
    if made_for.name != target or made_for.vocab_size != spec.vocab_size or not same_size:
        raise ConfigError(
            f"predict: the model's {target!r} has {spec.num_tokens} tokens below {spec.vocab_size}, the codec is for "
            f"{made_for.name!r} with {made_for.num_tokens} below {made_for.vocab_size}"
        )
