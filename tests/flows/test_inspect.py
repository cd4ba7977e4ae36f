"""`inspect` knows every kind of file and folder, shows hostile text as text, and says what is damaged."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fourmill.config import Config
from fourmill.errors import CheckpointError, ConfigError, DatasetError, FourmillError
from fourmill.flows.inspecting import describe
from fourmill.flows.inspecting_show import fact_table, plain, short_text
from fourmill.labelers.depth import DEPTH
from fourmill.labelers.det import DET
from fourmill.labelers.semseg import SEMSEG
from fourmill.labels import Absent, Boxes
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.sources.scenes import render
from fourmill.shards.tar import write_labels
from fourmill.storage import Store

Built = tuple[Config, str]


def shown(target: Any, **options: Any) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        for part in describe(target, **options):
            console.print(part)
    return captured.get()


def files(url: str, pattern: str) -> list[Path]:
    found = sorted(Path(url).glob(pattern))
    assert found, f"{url} has no {pattern}"
    return found


# -- what it knows ------------------------------------------------------------------------------------


def test_a_dataset(built: Built, trained: Path) -> None:
    text = shown(built[1])
    assert text.startswith("a dataset")
    for word in ("shard_size", "samples", "depth", "token", "vqvae", "snapshot", "rgb, caption, depth"):
        assert word in text
    assert Snapshot.load(built[1]).digest[:12] in text
    assert shown(f"{built[1]}/dataset.yaml") == text == shown(f"{built[1]}/")


def test_a_shard_of_tokens_is_decoded(built: Built) -> None:
    text = shown(files(built[1], "tokens/depth/shard-000000.*.arrow")[0])
    assert text.startswith("a shard of depth tokens") and "fixed_size_list" in text
    assert text.count(" m, median ") == 5  # its first five rows, in metres
    caption = shown(files(built[1], "tokens/caption/shard-000000.*.arrow")[0])
    assert render(0, 0, 128).caption[:60] in " ".join(caption.split())


def test_a_shard_outside_its_dataset_still_shows_tokens(built: Built, tmp_path: Path) -> None:
    file = files(built[1], "tokens/depth/shard-000000.*.arrow")[0]
    shutil.copy(file, tmp_path)
    text = shown(tmp_path / file.name)
    assert "… (64)" in text and "median" not in text


def test_a_shard_of_samples_and_one_with_nulls(photographed: Any) -> None:
    text = shown(files(photographed.url, "samples/shard-000000.*.arrow")[0])
    assert text.startswith("a shard of samples") and "status: ok" in text and "split val" in text
    counts = [shown(file) for file in files(photographed.url, "tokens/depth/*.arrow")]
    assert any("absent: no image" in text or "absent: truncated" in text for text in counts)


def test_kept_labels(tmp_path: Path) -> None:
    labels = [np.full((8, 6), 2.0, np.float32), Absent("too dark"), np.full((8, 6), 3.0, np.float32)]
    folder = tmp_path / "labels/depth"
    folder.mkdir(parents=True)
    data = write_labels(["a", "b", "c"], labels, DEPTH)
    (folder / "shard-000000.0.tar").write_bytes(data)
    text = shown(folder / "shard-000000.0.tar")
    assert text.startswith("kept labels of depth") and "(8, 6)" in text and "damaged" not in text
    (folder / "cut.tar").write_bytes(data[:1800])
    assert "damaged" in shown(folder / "cut.tar")


def test_a_receipt_and_whether_its_data_is_there(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built[1], tmp_path / "demo")
    receipt = files(str(tmp_path / "demo"), "receipts/depth/*/shard-000001.json")[0]
    text = shown(receipt)
    assert text.startswith("a receipt") and "sound" in text and "provenance: labeler" in text
    data = tmp_path / "demo" / json.loads(receipt.read_text())["file"]
    raw = bytearray(data.read_bytes())
    raw[-100] ^= 1
    data.write_bytes(raw)
    assert "damaged: another sha256" in shown(receipt)
    data.unlink()
    assert "missing" in shown(receipt)
    receipt.write_text(receipt.read_text().replace('"shard": 1', '"shard": 2'))
    with pytest.raises(DatasetError, match="the receipt is damaged"):
        describe(receipt)


def test_recipes_snapshots_and_parked_shards(built: Built, trained: Path, tmp_path: Path) -> None:
    recipe = files(built[1], "receipts/det/*/recipe.json")[0]
    text = shown(recipe)
    assert text.startswith("a token recipe") and "min_score: 0.5" in text and "it hashes to" in text
    (tmp_path / "recipe.json").write_text(recipe.read_text())
    assert "damaged: it does not hash" in shown(tmp_path / "recipe.json")
    snapshot = files(built[1], "snapshots/*.json")[0]
    text = shown(snapshot)
    assert text.startswith("a snapshot") and "it hashes to its name" in text and "depth" in text
    shutil.copy(snapshot, tmp_path / f"{'0' * 64}.json")
    assert "damaged: it does not hash to its name" in shown(tmp_path / f"{'0' * 64}.json")
    (tmp_path / "parked.json").write_text(json.dumps({"error": "boom", "attempt": "ab"}))
    assert "boom" in shown(tmp_path / "parked.json")


def test_a_tokenizer_and_a_model(built: Built, trained: Path) -> None:
    text = shown(files(built[1], "tokenizers/semseg/*")[0])
    assert text.startswith("a tokenizer of semseg") and "cylinder" in text and "held_out" in text
    text = shown(trained)
    assert text.startswith("a model") and "step-00000006" in text and "files" in text and "sound" in text
    assert "loss of" in text and "held out" in text
    assert shown(trained / "checkpoints/step-00000006").split()[:2] == ["a", "model"]


# -- one sample ---------------------------------------------------------------------------------------


def test_a_sample_and_its_pictures(built: Built, tmp_path: Path) -> None:
    text = shown(built[1], key="00000005", out=tmp_path / "looked")
    assert "a sample" in text and "x 128 x 3" in text and " m, median " in text
    assert render(0, 5, 128).caption[:50] in " ".join(text.split())
    names = {path.name for path in (tmp_path / "looked").iterdir()}
    assert {"image.png", "depth.label.png", "depth.tokens.png", "det.tokens.png", "clip.label.png"} <= names
    with Image.open(tmp_path / "looked/image.png") as picture:
        assert np.array_equal(np.asarray(picture), render(0, 5, 128).image)
    for name in names:
        with Image.open(tmp_path / "looked" / name) as picture:
            assert min(picture.size) >= 128


def test_hostile_keys_are_shown_as_they_are(photographed: Any, tmp_path: Path) -> None:
    text = shown(photographed.url, key=photographed.hostile, out=tmp_path / "out")
    assert photographed.hostile in text and photographed.caption in text
    assert all(path.parent == tmp_path / "out" for path in (tmp_path / "out").rglob("*.png"))
    text = shown(photographed.url, key=photographed.broken)  # rich would take [bold] for markup
    assert photographed.broken in text and "no image" in text


def test_what_a_terminal_would_act_on_is_written_out() -> None:
    assert plain("a\x1b[31mb\nc\u202e") == "a\\x1b[31mb\\nc\\u202e"
    assert plain("grün 猫") == "grün 猫"
    console = Console(file=io.StringIO(), width=80)
    console.print(fact_table({"key": "\x1b]0;evil\x07[red]x"}))
    assert "\x1b" not in console.file.getvalue() and "[red]x" in console.file.getvalue()  # type: ignore[attr-defined]


def test_labels_in_a_few_words() -> None:
    classes = np.array([[0, 0], [0, 1]], np.uint8)
    assert short_text(SEMSEG.with_classes(("floor", "wall")), classes) == "floor 75%, wall 25%"
    depth = np.array([[1, 2], [3, 4]], np.float32)
    assert short_text(DEPTH, depth) == "1.00 to 4.00 m, median 2.50 m"
    boxes = Boxes(np.zeros((3, 4), np.float32), np.array([1, 1, 0]), np.ones(3, np.float32))
    assert short_text(DET.with_classes(("cat", "dog")), boxes) == "2 dog, 1 cat"
    assert short_text(DET, Boxes.empty()) == "no object"
    assert short_text(DEPTH, Absent("too dark")) == "absent: too dark"


# -- what it does not know ----------------------------------------------------------------------------


def test_errors_are_one_line_and_name_the_thing(built: Built, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.json").write_text('{"a": 1}')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.arrow").write_bytes(b"no arrow")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    cases: list[tuple[Any, dict[str, Any], type[FourmillError], str]] = [
        (tmp_path / "nowhere", {}, ConfigError, "there is nothing"),
        (tmp_path / "nowhere.arrow", {}, ConfigError, "there is nothing"),
        (tmp_path / "empty", {}, ConfigError, "nothing that fourmill knows"),
        (__file__, {}, ConfigError, "nothing that fourmill knows"),
        (tmp_path / "some.json", {}, ConfigError, "no receipt"),
        (tmp_path / "bad.json", {}, DatasetError, "not valid JSON"),
        (tmp_path / "list.json", {}, DatasetError, "expected a JSON object"),
        (tmp_path / "bad.arrow", {}, DatasetError, "damaged"),
        (tmp_path / "run", {}, CheckpointError, "no complete checkpoint"),
        (built[1], {"key": "99"}, DatasetError, "no sample with the key '99'"),
        (tmp_path / "empty", {"key": "99"}, ConfigError, "not a dataset"),
        (built[1], {"out": tmp_path}, ConfigError, "--out needs --key"),
    ]
    for target, options, error, text in cases:
        with pytest.raises(error, match=text) as caught:
            describe(target, **options)
        assert "\n" not in str(caught.value)


def test_on_object_storage(built: Built) -> None:
    store = Store("memory://inspect/demo")
    receipt = files(built[1], "receipts/samples/*/shard-000000.json")[0]
    data = json.loads(receipt.read_text())["file"]
    for name in ("dataset.yaml", data, str(receipt.relative_to(built[1]))):
        store.put(name, (Path(built[1]) / name).read_bytes())
    assert shown(store.url).startswith("a dataset")
    assert "status: ok" in shown(f"{store.url}/{data}")
    text = shown(f"{store.url}/{receipt.relative_to(built[1])}")
    assert text.startswith("a receipt") and "data file" in text and "missing" not in text
