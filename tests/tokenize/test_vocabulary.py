import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.errors import CheckpointError, ConfigError
from fourmill.tokenize.vocabulary import (
    EOS,
    FIRST_CLASS,
    FIRST_SENTINEL,
    NUM_SENTINELS,
    PAD,
    SOS,
    UNK,
    WORDS,
    Vocabulary,
    train_vocabulary,
)

CAPTIONS = [
    "A red sphere, left of two tall cylinders.",
    "the small blue box stands on a striped floor",
    "an unquestionably green wall behind the box",
]
CLASSES = ["sphere", "box", "tennis racket", "floor", "box"]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary(CAPTIONS, CLASSES, size=4400)


def test_the_layout_is_that_of_4m(vocabulary: Vocabulary) -> None:
    assert (PAD, UNK, SOS, EOS, FIRST_SENTINEL, NUM_SENTINELS, FIRST_CLASS) == (0, 1, 2, 3, 4, 200, 4204)
    expected = {
        0: "[PAD]", 1: "[UNK]", 2: "[SOS]", 3: "[EOS]", 4: "[S_0]", 5: "[S_1]", 203: "[S_199]",
        204: "v0=0", 1203: "v0=999", 1204: "v1=0", 2203: "v1=999", 2204: "v2=0", 3204: "v3=0", 4203: "v3=999",
        4204: "box", 4205: "floor", 4206: "sphere", 4207: "tennis racket",
    }  # fmt: skip
    assert {i: vocabulary.token(i) for i in expected} == expected
    assert vocabulary.classes == {"box": 4204, "floor": 4205, "sphere": 4206, "tennis racket": 4207}
    assert 4208 < vocabulary.size <= 4400
    assert Vocabulary.coordinate(2, 999) == 3203 and Vocabulary.coordinate_of(3203) == (2, 999)
    assert Vocabulary.coordinate_of(203) is None and Vocabulary.coordinate_of(4204) is None


def test_words_of_structures_are_one_piece_whatever_the_captions_say(vocabulary: Vocabulary) -> None:
    assert not any(word in caption for word in WORDS for caption in CAPTIONS)
    ids = [vocabulary.word(word) for word in WORDS]
    assert all(len(i) == 1 and i[0] > max(vocabulary.classes.values()) for i in ids)
    assert [vocabulary.token(i) for (i,) in ids] == list(WORDS)
    named = train_vocabulary(CAPTIONS, ["human", "pose"], 4300)  # a class of that name is one token, not two
    assert named.word("human") == (named.classes["human"],)


def test_text_comes_back_in_lower_case(vocabulary: Vocabulary) -> None:
    for caption in CAPTIONS:
        ids = vocabulary.encode_text(caption)
        assert vocabulary.decode_text(ids) == caption.lower()
    punctuated = "a red box (the small one): left; right?"
    assert (
        train_vocabulary([punctuated], []).decode_text(
            train_vocabulary([punctuated], []).encode_text(punctuated)
        )
        == punctuated
    )
    assert vocabulary.encode_text("A Tennis  racket".replace("  ", " "))[-1] == 4207
    assert vocabulary.encode_text("") == []
    assert UNK in vocabulary.encode_text("a box \N{SNOWMAN}")


def test_words_are_pieces_of_words_where_the_vocabulary_is_small() -> None:
    small = train_vocabulary(CAPTIONS, CLASSES, size=4290)
    ids = small.encode_text("unquestionably")
    assert len(ids) > 1 and small.token(ids[1]).startswith("##")
    assert small.decode_text(ids) == "unquestionably"


@pytest.mark.parametrize(
    "spelt", ["[S_1]", "[EOS]", "[PAD]", "[UNK]", "v0=5", "v3=999", "a [SOS] v1=7 [S_199]!"]
)
def test_a_caption_cannot_spell_a_special_token(spelt: str) -> None:
    vocabulary = train_vocabulary(
        [*CAPTIONS, "[S_1] [EOS] v0=5 v3=999 [PAD] [UNK] [SOS] v1=7 [S_199]!"], CLASSES
    )
    ids = vocabulary.encode_text(spelt)
    assert ids and min(ids) >= FIRST_CLASS
    assert vocabulary.decode_text(ids).replace(" ", "") == spelt.lower().replace(" ", "")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 70_000), max_size=30))
def test_any_ids_decode(ids: list[int]) -> None:
    assert isinstance(_SHARED.decode_text(ids), str)


@settings(max_examples=60, deadline=None)
@given(st.text("abxz [S_1]v0=5EO#\u00e9\u4e2d\u0301\u200b\n\x00", max_size=40))
def test_any_text_encodes_without_special_tokens(text: str) -> None:
    ids = _SHARED.encode_text(text)
    assert all(i == UNK or FIRST_CLASS <= i < _SHARED.size for i in ids)


_SHARED = train_vocabulary(CAPTIONS, CLASSES, size=4300)


def test_decoding_stops_at_the_end_and_skips_specials(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode_text("a red box")
    assert vocabulary.decode_text([SOS, 5, *ids, 300, EOS, *ids]) == "a red box"


def test_training_is_a_function_of_its_input() -> None:
    """In another process too: hash tables there have another order."""
    code = (
        "import sys, json, hashlib; from fourmill.tokenize.vocabulary import train_vocabulary, Vocabulary; "
        "from pathlib import Path; c, n = json.loads(sys.argv[1]); "
        "train_vocabulary(c, n, 4330).save(Path(sys.argv[2])); "
        "print(hashlib.sha256(Path(sys.argv[2]).read_bytes()).hexdigest())"
    )
    captions = [f"{caption} {word}ish {word}ly" for caption in CAPTIONS for word in caption.lower().split()]
    spec = json.dumps([captions, CLASSES])
    digests = {_digest(code, spec, "0"), _digest(code, spec, "1")}
    assert len(digests) == 1


def _digest(code: str, spec: str, name: str) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / name)
        done = subprocess.run(
            [sys.executable, "-c", code, spec, out], capture_output=True, text=True, check=True
        )
        assert hashlib.sha256(Path(out).read_bytes()).hexdigest() == done.stdout.strip()
        return done.stdout.strip()


def test_save_and_load(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocab.json")
    for path in (tmp_path, tmp_path / "vocab.json"):
        loaded = Vocabulary.load(path)
        assert loaded.size == vocabulary.size and loaded.classes == vocabulary.classes
        assert loaded.encode_text(CAPTIONS[0]) == vocabulary.encode_text(CAPTIONS[0])


def test_files_that_are_no_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Vocabulary.load(tmp_path / "nothing.json")
    (tmp_path / "vocab.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        Vocabulary.load(tmp_path)
    train_vocabulary(CAPTIONS, CLASSES, 4300).save(tmp_path / "vocab.json")
    spec = json.loads((tmp_path / "vocab.json").read_text())
    spec["added_tokens"][5]["content"] = "[S_one]"
    spec["model"]["vocab"]["[S_one]"] = spec["model"]["vocab"].pop("[S_1]")
    (tmp_path / "vocab.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="id layout"):
        Vocabulary.load(tmp_path)


def test_a_size_that_holds_no_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocabulary_size"):
        train_vocabulary(CAPTIONS, CLASSES, size=4000)
    with pytest.raises(ConfigError, match="65536"):
        train_vocabulary(CAPTIONS, CLASSES, size=70_000)
