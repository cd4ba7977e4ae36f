"""The codec family "text": a caption <-> the ids of its words. And what all families share that write text.

Their values are uint16 (n,), whole and without EOS: training appends it, and cuts at the modality's ``num_tokens``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from fourmill.checkpoints import fetch, resolve
from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.labels import MAX_TOKEN_ID, Label
from fourmill.modality import Modality
from fourmill.tokenize.base import Codec, Value, check_made_for, load_codec, read_config, register
from fourmill.tokenize.vocabulary import FILE_NAME, WORDS, Vocabulary


class VocabularyCodec(Codec):
    """What they share: a vocabulary beside the configuration, and nothing to fit on labels."""

    #: of a sequence with EOS, where the modality does not say: as in the published models
    max_tokens: ClassVar[int] = 256
    #: what a configuration may say beside the vocabulary
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, modality: Modality, image_size: int, vocabulary: Vocabulary) -> None:
        self.image_size, self.vocabulary = image_size, vocabulary
        self.modality = modality.resolved(
            vocab_size=vocabulary.size, num_tokens=modality.num_tokens or self.max_tokens
        )

    @classmethod
    def make(
        cls, modality: Modality, image_size: int, vocabulary: Vocabulary, options: Mapping[str, Any]
    ) -> VocabularyCodec:
        """With a configuration's ``options``."""
        return cls(modality, image_size, vocabulary, **options)

    def stored(self) -> dict[str, Any]:
        """What config.json says of this family's options; `load` passes it to the constructor."""
        return {}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "family": self.family,
            "modality": self.modality.name,
            "image_size": self.image_size,
            "classes": list(self.modality.contract.classes),
            "vocab_size": self.modality.vocab_size,
            "num_tokens": self.modality.num_tokens,
            **self.stored(),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        self.vocabulary.save(folder / FILE_NAME)
        (folder / "card.yaml").write_text(
            f"modality: {self.modality.name}\nvocabulary: {self.vocabulary.size}\n"
        )

    @classmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> VocabularyCodec:
        config = read_config(folder)
        check_made_for(folder, config, modality, image_size)
        options = {name: config[name] for name in cls.options if name in config}
        return cls(modality, image_size, Vocabulary.load(folder), **options)


class WithInner(VocabularyCodec):
    """One that needs another tokenizer for a part of its labels: of bodies, of masks.

    It lies beside the vocabulary, its files' names led by `prefix`. Without it, labels must bring its tokens along.
    Options ``<prefix>tokenizer``, a folder or the hub id `published`, and of an id ``<prefix>tokenizer_revision``.
    """

    prefix: ClassVar[str]
    part: ClassVar[Modality]
    part_tokens: ClassVar[int]
    #: hub id of the published one
    published: ClassVar[str]

    def __init__(
        self, modality: Modality, image_size: int, vocabulary: Vocabulary, inner: Codec | None = None
    ) -> None:
        super().__init__(modality, image_size, vocabulary)
        for word in WORDS:
            vocabulary.word(word)  # refused here, not in the middle of a shard
        self.inner = inner
        made = inner.modality if inner is not None else None
        if made is not None and (made.num_tokens != self.part_tokens or made.vocab_size > MAX_TOKEN_ID):
            raise CheckpointError(
                f"{modality.name!r}: its tokenizer of {self.part.name} gives {made.num_tokens} tokens below "
                f"{made.vocab_size}; {self.part_tokens} below {MAX_TOKEN_ID} are expected"
            )

    @classmethod
    def make(
        cls, modality: Modality, image_size: int, vocabulary: Vocabulary, options: Mapping[str, Any]
    ) -> WithInner:
        given, revision = (options.get(f"{cls.prefix}tokenizer{ending}") for ending in ("", "_revision"))
        where = f"modalities.{modality.name}.tokenizer.{cls.prefix}tokenizer"
        for key, value in ((where, given), (f"{where}_revision", revision)):
            if not isinstance(value, str | Path | None):
                raise ConfigError(f"{key}: expected is a word, got {value!r}")
        if not given:
            return cls(modality, image_size, vocabulary)
        folder = fetch(
            resolve(str(given), str(revision or "") or None, where), where, preprocessed=False
        ).folder
        assert folder is not None
        return cls(modality, image_size, vocabulary, load_codec(folder, cls.part, image_size))

    def tokens_of_parts(self, ids: np.ndarray, parts: Callable[[int], np.ndarray]) -> np.ndarray:
        """``ids`` int64 (N, part_tokens), with its rows of -1 filled in: ``parts(row)`` is what is tokenized."""
        unknown = np.flatnonzero((ids < 0).any(1))
        if not len(unknown):
            return ids
        if self.inner is None:
            raise ContractError(
                f"{self.modality.name!r}: a label without tokens of its {self.part.name} (cutting and mirroring an image "
                f"takes them away); give modalities.{self.modality.name}.tokenizer.{self.prefix}tokenizer: {self.published}, "
                f"with its {self.prefix}tokenizer_revision, or a folder"
            )
        out = ids.copy()
        out[unknown] = np.stack([np.asarray(v) for v in self.inner.encode([parts(int(i)) for i in unknown])])
        return out

    def to(self, device: str) -> WithInner:
        if self.inner is not None:
            self.inner = self.inner.to(device)
        return self

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.inner is not None:
            with TemporaryDirectory(prefix="fourmill-inner-") as scratch:
                self.inner.save(Path(scratch))
                for file in Path(scratch).iterdir():
                    (folder / f"{self.prefix}{file.name}").write_bytes(file.read_bytes())

    @classmethod
    def load(cls, folder: Path, modality: Modality, image_size: int) -> WithInner:
        check_made_for(folder, read_config(folder), modality, image_size)
        return cls(modality, image_size, Vocabulary.load(folder), cls.load_inner(folder, image_size))

    @classmethod
    def load_inner(cls, folder: Path, image_size: int) -> Codec | None:
        files = sorted(file for file in folder.iterdir() if file.name.startswith(cls.prefix))
        if not files:
            return None
        with TemporaryDirectory(prefix="fourmill-inner-") as scratch:
            for file in files:
                (Path(scratch) / file.name.removeprefix(cls.prefix)).symlink_to(file.resolve())
            return load_codec(Path(scratch), cls.part, image_size)


@register("text")
class TextCodec(VocabularyCodec):
    """A str, or a list of str of which the first counts <-> uint16 (n,), whole and without EOS.

    A caption may also be a mapping that has it as ``caption``, as in the published collections.
    """

    family = "text"

    def encode(self, labels: Sequence[Label]) -> list[Value]:
        return [np.array(self.vocabulary.encode_text(_first(label)), dtype=np.uint16) for label in labels]

    def decode(self, values: Sequence[Value]) -> list[Label]:
        return [self.vocabulary.decode_text(np.asarray(value).tolist()) for value in values]


def _first(label: Label) -> str:
    if isinstance(label, str):
        return label
    return str(label.get("caption", "")) if isinstance(label, Mapping) else _first(next(iter(label), ""))
