"""One WordPiece vocabulary for captions and everything that is written as text, with 4M's id layout.

==========  ============================================================================================
ids         are
==========  ============================================================================================
0..3        [PAD] [UNK] [SOS] [EOS]
4..203      [S_0] .. [S_199], the sentinels of span masking
204..4203   v0=0 .. v0=999, v1=.., v2=.., v3=..: bins of four coordinates
4204..      class names, one token each, in alphabetical order
the rest    word pieces ("##" continues a word) trained on captions; first `WORDS`, which structures are written with
==========  ============================================================================================

A caption that spells ``[EOS]`` or ``v0=5`` stays plain text: ids below `FIRST_CLASS` are only ever written by id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from fourmill.errors import CheckpointError, ConfigError

PAD, UNK, SOS, EOS = 0, 1, 2, 3
FIRST_SENTINEL, NUM_SENTINELS = 4, 200
FIRST_COORDINATE, NUM_CORNERS, NUM_BINS = 204, 4, 1000
FIRST_CLASS = FIRST_COORDINATE + NUM_CORNERS * NUM_BINS  # 4204
MAX_VOCABULARY = 30_000
FILE_NAME = "vocab.json"
HALF = 512  # ids of other tokenizers are written with coordinates of two corners
#: what people and instances are introduced by: each one ordinary word piece, as in the published vocabulary
WORDS = ("human", "pose", "global", "shape", "camera", "point", "polygon", "none")

_RESERVED = (
    "[PAD]", "[UNK]", "[SOS]", "[EOS]",
    *(f"[S_{i}]" for i in range(NUM_SENTINELS)),
    *(f"v{corner}={value}" for corner in range(NUM_CORNERS) for value in range(NUM_BINS)),
)  # fmt: skip

#: Spaces that the library's own clean-up leaves at punctuation.
_SPACED = re.compile(r" (?=[:;)\]])|(?<=[(\[]) ")


class Vocabulary:
    """``size`` ids; ``classes`` maps a class name to its token."""

    def __init__(self, spec: str, where: str = "vocabulary") -> None:
        """``spec`` is the text of a tokenizer file of the `tokenizers` library, e.g. the 4M reference's own."""
        self._spec = spec
        try:
            tokenizer = Tokenizer.from_str(spec)
            content = json.loads(spec)
            added = {int(t["id"]): str(t["content"]) for t in content["added_tokens"]}
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{where} is not a tokenizer file: {error}") from error
        if tuple(added.get(i) for i in range(FIRST_CLASS)) != _RESERVED:
            raise CheckpointError(
                f"{where} has not the id layout of 4M ([PAD] .. v3=999 in ids 0 to {FIRST_CLASS - 1})"
            )
        self.classes = {name: i for i, name in sorted(added.items()) if i >= FIRST_CLASS}
        self.size = int(tokenizer.get_vocab_size(with_added_tokens=True))
        if self.size > 1 << 16:
            raise CheckpointError(f"{where} has {self.size} entries; token ids are stored as uint16")
        self._text = _plain(content)
        self._decoder = WordPieceDecoder(prefix="##", cleanup=True)
        self._spelt: dict[str, tuple[int, ...]] = {}

    def encode_text(self, text: str) -> list[int]:
        """Plain text to ids, none of them below `FIRST_CLASS` except [UNK]. No EOS."""
        return [int(i) for i in self._text.encode(text, add_special_tokens=False).ids]

    def decode_text(self, ids: Iterable[int]) -> str:
        """Ids to text, up to the first [EOS]. Special tokens, coordinates and unknown ids are left out."""
        pieces: list[str] = []
        for token in ids:
            if token == EOS:
                break
            piece = self._text.id_to_token(int(token)) if FIRST_CLASS <= token < self.size else None
            if piece is not None:
                pieces.append(piece)
        text = str(self._decoder.decode(pieces)) if pieces else ""
        return _SPACED.sub("", text)

    @staticmethod
    def coordinate(corner: int, value: int) -> int:
        """The token ``v<corner>=<value>``, corner 0 to 3 and value 0 to 999."""
        return FIRST_COORDINATE + corner * NUM_BINS + value

    @staticmethod
    def coordinate_of(token: int) -> tuple[int, int] | None:
        """(corner, value) of a coordinate token, None of any other."""
        if not FIRST_COORDINATE <= token < FIRST_CLASS:
            return None
        return divmod(token - FIRST_COORDINATE, NUM_BINS)

    def word(self, word: str) -> tuple[int, ...]:
        """The ids of one of `WORDS`: a single one, unless the vocabulary was trained elsewhere or earlier."""
        if word not in self._spelt:
            ids = tuple(self.encode_text(word))
            if not ids or UNK in ids:
                raise CheckpointError(f"the vocabulary cannot spell the word {word!r}; train a new one")
            self._spelt[word] = ids
        return self._spelt[word]

    def token(self, token: int) -> str:
        """How an id reads, for reports."""
        return str(self._text.id_to_token(token)) if token >= FIRST_CLASS else _RESERVED[token]

    def save(self, file: Path) -> None:
        file.write_text(self._spec)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """From a tokenizer file, or from a folder that holds one as vocab.json."""
        file = path / FILE_NAME if path.is_dir() else path
        try:
            spec = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"vocabulary {file} cannot be read: {error}") from error
        return cls(spec, f"vocabulary {file}")


class Reader:
    """Walks over token ids, up to the first [EOS]: what decoders of structures read with. It never raises."""

    def __init__(self, vocabulary: Vocabulary, ids: Iterable[int]) -> None:
        self.at = 0
        self._vocabulary = vocabulary
        self._ids = [int(i) for i in ids]
        self._ids = self._ids[: self._ids.index(EOS)] if EOS in self._ids else self._ids

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self.at < len(self._ids)

    def word(self, word: str) -> bool:
        """Whether one of `WORDS` stands here; it is passed if so."""
        spelt = self._vocabulary.word(word)
        found = tuple(self._ids[self.at : self.at + len(spelt)]) == spelt
        self.at += len(spelt) if found else 0
        return found

    def values(self, *corners: int) -> tuple[int, ...] | None:
        """The values of as many coordinate tokens, if those of just these corners stand here; they are passed."""
        here = [Vocabulary.coordinate_of(i) for i in self._ids[self.at : self.at + len(corners)]]
        found = [
            place[1] for place, corner in zip(here, corners, strict=False) if place and place[0] == corner
        ]
        if len(found) != len(corners):
            return None
        self.at += len(corners)
        return tuple(found)

    def halves(self, count: int) -> tuple[int, ...] | None:
        """``count`` ids below 1024 as `halved` writes them; they are passed if they stand here."""
        here = [Vocabulary.coordinate_of(i) for i in self._ids[self.at : self.at + count]]
        found = [place[1] + HALF * place[0] for place in here if place and place[0] < 2 and place[1] < HALF]
        if len(found) != count:
            return None
        self.at += count
        return tuple(found)


def halved(ids: Iterable[int]) -> list[int]:
    """The tokens that ids below 1024 are written with: v0 for those below 512, v1 for the rest."""
    return [Vocabulary.coordinate(*divmod(int(i), HALF)) for i in ids]


def _plain(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer that text goes through: it knows class names and word pieces, but no special token."""
    kept = [t for t in content["added_tokens"] if int(t["id"]) >= FIRST_CLASS]
    return Tokenizer.from_str(json.dumps({**content, "added_tokens": kept}))


def train_vocabulary(
    captions: Iterable[str], class_names: Iterable[str], size: int = MAX_VOCABULARY
) -> Vocabulary:
    """A vocabulary of at most ``size`` ids, trained on ``captions``. The same input gives the same file.

    `WORDS` are in it whatever the captions say, so that modalities that come later can share it.
    """
    classes = sorted({name.strip().lower() for name in class_names})
    fixed = [*_RESERVED, *classes]
    words = [word for word in WORDS if word not in classes]
    if not len(fixed) < size <= 1 << 16:
        raise ConfigError(
            f"vocabulary_size {size}: the special tokens alone are {len(fixed)}, the limit is 65536"
        )
    pieces = _train_pieces(captions, fixed, words, size)
    vocab = {token: i for i, token in enumerate([*fixed, *pieces])}
    tokenizer = _tokenizer(vocab)
    tokenizer.add_tokens([AddedToken(t, single_word=True, normalized=False, special=True) for t in _RESERVED])
    tokenizer.add_tokens([AddedToken(t, single_word=True, normalized=True, special=True) for t in classes])
    return Vocabulary(tokenizer.to_str())


def _tokenizer(vocab: dict[str, int] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(vocab or {}, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder(prefix="##")
    return tokenizer


def _train_pieces(
    captions: Iterable[str], fixed: Sequence[str], words: Sequence[str], size: int
) -> list[str]:
    """``words``, and word pieces in the order in which they were learned, without those in ``fixed``.

    The trainer numbers the continuing letters ("##a") in the order of a hash table that differs between runs,
    and breaks ties by number; given beforehand, in sorted order, they make its result a function of its input.
    """
    normalizer, letters = BertNormalizer(lowercase=True), set[str]()
    kept: list[str] = []
    for caption in captions:
        kept.append(caption)
        letters.update(c for c in normalizer.normalize_str(caption) if not c.isspace())
    alphabet = [*sorted(letters), *(f"##{c}" for c in sorted(letters))]
    scratch = _tokenizer()
    given = list(dict.fromkeys([*fixed, *words, *alphabet]))[:size]
    trainer = WordPieceTrainer(
        vocab_size=size, special_tokens=given, continuing_subword_prefix="##", show_progress=False
    )
    scratch.train_from_iterator(_batches(kept), trainer)
    ranked = sorted(scratch.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    reserved = set(fixed)
    return [token for token, _ in ranked if token not in reserved]


def _batches(texts: Sequence[str], size: int = 1000) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])
