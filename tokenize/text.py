"""The codec family "text": a caption <-> the ids of its words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fourmill.labels import Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Codec, Value, check_made_for, read_config, register
from fourmill.tokenize.vocabulary import FILE_NAME, Vocabulary


class VocabularyCodec(Codec):
    """What text and boxes share: a vocabulary beside the configuration, and nothing to fit on labels."""

    def __init__(self, modality: Modality, image_size: int, vocabulary: Vocabulary) -> None:
        self.image_size, self.vocabulary = image_size, vocabulary
        self.modality = modality.resolved(vocab_size=vocabulary.size, num_tokens=modality.num_tokens or 256)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "family": self.family,
            "modality": self.modality.name,
            "image_size": self.image_size,
            "classes": list(self.modality.contract.classes),
            "vocab_size": self.modality.vocab_size,
            "num_tokens": self.modality.num_tokens,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        self.vocabulary.save(folder / FILE_NAME)
        (folder / "card.yaml").write_text(
            f"modality: {self.modality.name}\nvocabulary: {self.vocabulary.size}\n"
        )

    @classmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> VocabularyCodec:
        check_made_for(folder, read_config(folder), modality, image_size)
        return cls(modality, image_size, Vocabulary.load(folder))


@register("text")
class TextCodec(VocabularyCodec):
    """A str, or a list of str of which the first counts <-> uint16 (n,), whole and without EOS."""

    family = "text"

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return [np.array(self.vocabulary.encode_text(_first(label)), dtype=np.uint16) for label in labels]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [self.vocabulary.decode_text(np.asarray(value).tolist()) for value in values]


def _first(label: Label) -> str:
    return label if isinstance(label, str) else next(iter(label), "")
