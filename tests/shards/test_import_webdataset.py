"""Trees of tars become datasets: ours come back value for value, and what is damaged is named before it is committed."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_builds import ORACLES, small_config, without_ray

from fourmill.config import Config
from fourmill.errors import ConfigError, DatasetError, FourmillError
from fourmill.flows.build import build
from fourmill.flows.importing_datasets import Imported, import_webdataset
from fourmill.flows.resolve import resolve
from fourmill.flows.status import status
from fourmill.shards import import_webdataset as importing
from fourmill.shards.dataset import Dataset
from fourmill.shards.export import export_webdataset
from fourmill.shards.exported_tree import Tree
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tar import npy_bytes, write_tar
from fourmill.shards.verify import verify
from fourmill.storage import Entry, Store
from fourmill.tokenize.vocabulary import Vocabulary, train_vocabulary

MODALITIES: dict[str, Any] = {
    "caption": {},
    "rgb": {},
    "depth": ORACLES["depth"],
    "det": {**ORACLES["det"], "keep_labels": True},
}


def snapshot_of(config: Config) -> Snapshot:
    resolved = resolve(config)
    return Snapshot.create(
        Dataset(config.dataset),
        {name: recipe.short for name, recipe in resolved.token_recipes().items()},
        {name: wanted.modality for name, wanted in resolved.wanted.items()},
        {name: str(wanted.tokenizer)[:12] for name, wanted in resolved.wanted.items()},
        config.image_size,
    )


def samples_of(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """By key: what the samples table says, and the values of every modality by crop."""
    found = {}
    for shard, ref in enumerate(snapshot.shards):
        columns = {name: snapshot.column(shard, name) for name in snapshot.modalities}
        for row, sample in enumerate(snapshot.dataset.table(ref.files["samples"]).to_pylist()):
            kept = {k: v for k, v in sample.items() if k != "position"}
            values = {
                name: [column.cells(row, crop).tolist() for crop in range(column.n_crops)] if column.present[row] else None
                for name, column in columns.items()
            }  # fmt: skip
            found[sample["key"]] = kept | {"values": values}
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    made = small_config(tmp_path_factory.mktemp("made") / "ds", MODALITIES, count=16, n_crops=2)
    with without_ray():
        build(made)
    return snapshot_of(made)


@pytest.fixture(scope="module")
def exported(original: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_webdataset(original, str(out))
    return out


@pytest.fixture(scope="module")
def imported(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return import_webdataset(str(exported), str(tmp_path_factory.mktemp("imported") / "ds"))


def test_what_is_exported_and_imported_is_the_same(original: Snapshot, imported: Imported) -> None:
    before, after = samples_of(original), samples_of(imported.snapshot)
    wanted = {key: sample for key, sample in before.items() if sample["split"] == "train"}
    assert 0 < len(wanted) < 16 and imported.rows == len(wanted)
    assert after == wanted
    assert list(after) == list(wanted), "the order too"
    assert set(imported.snapshot.modalities) == set(MODALITIES)
    for name, modality in original.modalities.items():
        again = imported.snapshot.modalities[name]
        assert not imported.snapshot.licenses([name]), "as it was"
        assert (again.vocab_size, again.num_tokens, again.contract) == (
            modality.vocab_size,
            modality.num_tokens,
            modality.contract,
        )


def test_an_imported_dataset_is_a_dataset(imported: Imported, exported: Path, tmp_path: Path) -> None:
    dataset = imported.snapshot.dataset
    found = verify(dataset)
    assert not found.problems and found.files
    state = status(dataset)
    assert state.complete and state.samples == imported.rows
    recipe = dataset.recipe("depth", imported.snapshot.content["modalities"]["depth"]["recipe"])
    assert recipe["label"]["imported"] == "webdataset" and len(recipe["label"]["tars"]) == 64
    receipt = next(iter(dataset.receipts("depth", dataset.recipes("depth")[0]).values()))
    tar = exported / "depth" / "shard-00000.tar"
    assert receipt.source["depth/shard-00000.tar"]["bytes"] == tar.stat().st_size
    export_webdataset(imported.snapshot, str(tmp_path / "again"), ["det", "depth", "caption", "rgb"])
    for folder in ("depth", "rgb", "caption", "det", "crop_settings", "key", "size"):
        first = contents(exported / folder / "shard-00000.tar")
        assert contents(tmp_path / "again" / folder / "shard-00000.tar") == first, folder


def contents(tar: Path) -> list[bytes]:
    with tarfile.open(tar) as opened:
        return [opened.extractfile(info).read() for info in opened]  # type: ignore[union-attr]


@pytest.mark.long
def test_training_starts_on_it(imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fourmill.train import presets
    from fourmill.train.trainer import train_on
    from fourmill.train_config import TrainConfig

    torch.set_num_threads(1)
    monkeypatch.setitem(presets.PRESETS, "tiny", presets.Size(64, 1, 1))
    config = TrainConfig(
        preset="tiny", steps=1, batch_size=4, warmup_steps=1, num_input_tokens=16, num_target_tokens=16, device="cpu",
        eval_every=None,
    )  # fmt: skip
    assert train_on(imported.snapshot, tmp_path / "run", config).step == 1


def test_an_import_goes_on_where_it_was_stopped(
    exported: Path, original: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, read = str(tmp_path / "ds"), importing.read_rows
    seen: list[str] = []

    def stopping(tree: Any, tar: str) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(tar)
        return read(tree, tar)

    monkeypatch.setattr(importing, "read_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        import_webdataset(str(exported), url)

    def noting(tree: Any, tar: str) -> Any:
        seen.append(tar)
        return read(tree, tar)

    monkeypatch.setattr(importing, "read_rows", noting)
    done = import_webdataset(str(exported), url)
    assert len(seen) == len(set(seen)) == done.shards, "no shard twice"
    import_webdataset(str(exported), url)
    assert len(seen) == done.shards, "and none when all is done"
    train = [key for key, sample in samples_of(original).items() if sample["split"] == "train"]
    assert list(samples_of(done.snapshot)) == train


def test_a_changed_export_is_noticed(exported: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(exported, tree)
    tar = tree / "depth" / "shard-00001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(
        DatasetError, match=r"depth/shard-00001.tar: is not what it was when it was .* exported"
    ):
        import_webdataset(str(tree), str(tmp_path / "ds"))
    (tree / "export.json").write_text(
        json.dumps({**json.loads((tree / "export.json").read_text()), "complete": False})
    )
    with pytest.raises(DatasetError, match="not complete; run the same export again"):
        import_webdataset(str(tree), str(tmp_path / "ds2"))


HOSTILE: dict[str, tuple[tuple[str, ...], Any]] = {
    "path": (("modalities",), {"../../up": {"name": "../../up"}}),
    "other name": (("modalities", "rgb", "name"), "../../up"),
    "no contract": (("modalities", "rgb"), {"name": "rgb"}),
    "more": (("modalities", "rgb", "contract", "surprise"), 1),
    "list": (("modalities", "rgb"), [1]),
    "word": (("modalities", "rgb", "vocab_size"), "many"),
    "pixels": (("modalities", "rgb", "kind"), "pixels"),
    "much": (("modalities", "rgb", "num_tokens"), 1 << 20),
    "too much": (("modalities", "rgb", "num_tokens"), 1 << 60),
    "less": (("modalities", "rgb", "vocab_size"), 1),
    "crops": (("dataset", "n_crops"), 0),
    "seed": (("dataset", "seed"), "x"),
    "dataset": (("dataset",), [1]),
    "tokenizer": (("modalities", "caption", "tokenizer"), "../../../etc"),
    "another tokenizer": (("modalities", "caption", "tokenizer"), "0" * 12),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_export_json_gives_one_line(exported: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(exported, tmp_path / "tree")
    (*path, last), value = HOSTILE[what]
    facts = json.loads((tmp_path / "tree" / "export.json").read_text())
    node = facts
    for part in path:
        node = node[part]
    node[last] = value
    (tmp_path / "tree" / "export.json").write_text(json.dumps(facts))
    with pytest.raises(FourmillError) as caught:
        import_webdataset(str(tmp_path / "tree"), str(tmp_path / "ds"))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "ds").rglob("shard-*")), "nothing of it is committed"
    assert sorted(path.name for path in tmp_path.iterdir()) in (["ds", "tree"], ["tree"])


def test_on_remote_storage_size_and_etag_are_enough() -> None:
    tree = Tree("memory://anywhere", ())
    tree.store.is_remote = True
    assert tree._identify("depth/shard-00000.tar", Entry(5, 12.5, "12-a1b2-3")) == {
        "bytes": 5,
        "etag": "a1b2-3",
    }


# -- trees that others wrote --------------------------------------------------------------------------


@dataclass
class Foreign:
    """Six samples in two shards, of 120 x 80 pixels. ``members``: by folder and tar, what is written there."""

    root: Path
    members: dict[str, dict[str, list[tuple[str, bytes]]]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return str(self.root / "tree")

    @property
    def options(self) -> str:
        return str(self.root / "modalities.yaml")

    def write(self) -> Foreign:
        for folder, tars in self.members.items():
            for tar, members in tars.items():
                path = self.root / "tree" / folder / tar
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(write_tar(members))
        return self

    def go(self, to: str = "ds") -> Imported:
        return import_webdataset(self.url, str(self.root / to), self.options)


VOCABULARY = train_vocabulary(["a small red cat", "two dogs"], ["cat", "dog"], 4400)
TARS = ("shard-00000.tar", "shard-00001.tar")
CROP = np.array([[0, 20, 80, 80, 0], [3, 4, 60, 70, 1]], np.int64)
BOXES = {"instances": [{"boxes": [0.25, 0.25, 0.5, 0.5], "class_name": "dog", "score": 0.5}]}


def grid(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 64, (2, 4)).astype(np.int16)


def foreign(root: Path) -> Foreign:
    tree = Foreign(root)
    rows = [(TARS[row // 3], f"{row:07d}", row) for row in range(6)]

    def put(folder: str, ending: str, data: Callable[[int], bytes]) -> None:
        for tar, stem, row in rows:
            members = tree.members.setdefault(folder, {}).setdefault(tar, [])
            members.append((f"{stem}.{ending}", data(row)))

    put("crop_settings", "npy", lambda row: npy_bytes(CROP))
    put("tok_rgb@224", "npy", lambda row: npy_bytes(grid(row)))
    put("depth", "npy", lambda row: npy_bytes(grid(row + 10).astype(np.int32)))
    put("caption", "json", lambda row: json.dumps(["red cat", "two dogs"]).encode())
    put("det", "json", lambda row: json.dumps(BOXES).encode())
    VOCABULARY.save(root / "vocab.json")
    modalities = {
        "rgb": {"folder": "tok_rgb@224", "vocab_size": 64, "num_tokens": 4},
        "depth": {"vocab_size": 64, "num_tokens": 4},
        "caption": {"vocabulary": str(root / "vocab.json")},
        "det": {"vocabulary": str(root / "vocab.json")},
    }
    content = {"image_size": 32, "val_fraction": 0.0, "modalities": modalities}
    (root / "modalities.yaml").write_text(yaml.safe_dump(content))
    return tree


def test_a_tree_of_somebody_else(tmp_path: Path) -> None:
    tree = foreign(tmp_path)
    zipped = [(f"{n[:-5]}.json.gz", gzip.compress(d)) for n, d in tree.members["caption"][TARS[0]]]
    tree.members["caption"][TARS[0]] = zipped
    tree.members["caption"][TARS[1]] = [
        (f"{n[:-5]}.txt", b"a small red cat") for n, _ in tree.members["caption"][TARS[1]]
    ]
    done = tree.write().go()
    found = samples_of(done.snapshot)
    assert list(found) == [f"{TARS[row // 3][:-4]}/{row:07d}" for row in range(6)]
    assert done.snapshot.licenses() == ["unknown"] and done.snapshot.licenses(["caption"]) == []
    vocabulary = Vocabulary.load(tmp_path / "vocab.json")
    for row, sample in enumerate(found.values()):
        assert (sample["width"], sample["height"]) == (120, 80), (
            "the centre crop leaves as much on both sides"
        )
        assert sample["crops"] == CROP.reshape(-1).tolist()
        assert sample["values"]["rgb"] == grid(row).tolist()
        assert sample["values"]["depth"] == grid(row + 10).tolist()
        texts = ["a small red cat"] if row > 2 else ["red cat", "two dogs"]
        assert sample["captions"] == texts
        assert [vocabulary.decode_text(ids) for ids in sample["values"]["caption"]] == [texts[0], texts[-1]]
    at, dog = Vocabulary.coordinate, vocabulary.classes["dog"]
    whole = np.array([0.25 * 120, 0.25 * 80, 0.5 * 120, 0.5 * 80])
    centre = np.rint((whole - [20, 0, 20, 0]) / 80 * 999)
    assert sample["values"]["det"][0] == [*(at(i, int(v)) for i, v in enumerate(centre)), dog]
    mirrored = np.rint((1 - (whole[[2, 0]] - 4) / 70) * 999)
    assert sample["values"]["det"][1][0::2][:2] == [at(0, int(mirrored[0])), at(2, int(mirrored[1]))]


def test_what_nobody_says_is_asked_for(tmp_path: Path) -> None:
    tree = foreign(tmp_path).write()
    with pytest.raises(
        ConfigError, match=r"no export\.json; say what its modalities are with --modalities FILE"
    ):
        import_webdataset(tree.url, str(tmp_path / "ds"))
    options = yaml.safe_load(Path(tree.options).read_text())
    for change, words in (
        ({"rgb": {"folder": "tok_rgb@224"}}, r"modalities\.rgb\.vocab_size: missing"),
        ({"caption": None}, r"modalities\.caption: its texts .* `vocabulary`"),
        ({"edges": {}}, r"modalities\.edges: say of which `kind`"),
        ({"rgb": {"vocab": 3}}, r"modalities\.rgb\.vocab: Extra inputs"),
        ({"rgb": {"vocab_size": 1 << 17}}, r"modalities\.rgb\.vocab_size: .*65536"),
        ({"rgb": {"vocabulary": str(tmp_path / "vocab.json")}}, "rgb is not written as text"),
        ({"../up": {"kind": "grid", "vocab_size": 4, "num_tokens": 4}}, "not a modality name"),
    ):
        Path(tree.options).write_text(yaml.safe_dump({**options, "modalities": change}))
        with pytest.raises(FourmillError, match=words) as caught:
            tree.go()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ds").exists()


def replaced(folder: str, at: int, data: bytes, ending: str | None = None) -> Callable[[Foreign], None]:
    def change(tree: Foreign) -> None:
        name = tree.members[folder][TARS[1]][at][0]
        name = name if ending is None else f"{name.partition('.')[0]}.{ending}"
        tree.members[folder][TARS[1]][at] = (name, data)

    return change


def cut(folder: str, at: int) -> Callable[[Foreign], None]:
    return lambda tree: tree.members[folder][TARS[1]].pop(at) and None


def swapped(tree: Foreign) -> None:
    members = tree.members["depth"][TARS[1]]
    members[0], members[1] = members[1], members[0]


def more(tree: Foreign) -> None:
    tree.members["depth"][TARS[1]].append(("9999999.npy", npy_bytes(grid(1))))


def twice(tree: Foreign) -> None:
    tree.members["depth"][TARS[1]].append(("0000005.cls", b"1"))


def object_array() -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([{"a": 1}], object), allow_pickle=True)
    return sink.getvalue()


def with_header(text: str, body: bytes = b"") -> bytes:
    header = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


RGB, DEPTH, CAPTION, DET = "tok_rgb@224", "depth", "caption", "det"
DAMAGE: dict[str, tuple[Callable[[Foreign], None], str]] = {
    "missing": (cut(DEPTH, 1), r"depth/shard-00001\.tar: member '0000005\.npy': stands where '0000004' should"),
    "short": (cut(DEPTH, 2), r"depth/shard-00001\.tar: has 2 samples, .* has 3: '0000005' is missing"),
    "order": (swapped, r"depth/shard-00001\.tar: member '0000004\.npy': is out of order: '0000003' comes"),
    "more": (more, r"depth/shard-00001\.tar: member '9999999\.npy': there is no such sample"),
    "twice": (twice, r"depth/shard-00001\.tar: member '0000005\.cls': a sample that the tar holds twice"),
    "tokens": (
        replaced(DEPTH, 1, npy_bytes(np.zeros((2, 5), np.int16))),
        r"depth/shard-00001\.tar: member '0000004\.npy': 5 tokens in a crop, 4 are expected",
    ),
    "crops": (
        replaced(RGB, 1, npy_bytes(np.zeros((3, 4), np.int16))),
        r"rgb@224/shard-00001\.tar: member '0000004\.npy': 3 crops, where crop_settings has 2",
    ),
    "crop count": (
        replaced("crop_settings", 2, npy_bytes(CROP[:1])),
        r"crop_settings/shard-00001\.tar: member '0000005\.npy': has 1 crops, where the others have 2",
    ),
    "crop": (replaced("crop_settings", 2, npy_bytes(CROP - 1)), r"0000005\.npy': .* no top, left, height"),
    "beyond": (
        replaced(RGB, 0, npy_bytes(np.full((2, 4), 64, np.int16))),
        r"member '0000003\.npy': token 64, outside the vocabulary of 64",
    ),
    "negative": (replaced(RGB, 0, npy_bytes(np.full((2, 4), -1, np.int16))), r"0000003\.npy': token -1"),
    "floats": (replaced(RGB, 0, npy_bytes(np.zeros((2, 4)))), r"0000003\.npy': float64 of shape \(2, 4\)"),
    "pickle": (replaced(RGB, 0, object_array()), r"0000003\.npy': .*not an array in C order of plain numbers"),
    "huge": (
        replaced(RGB, 0, with_header("{'descr': '<i2', 'fortran_order': False, 'shape': (9999999999, 4), }")),
        r"0000003\.npy': .*claims int16",
    ),
    "no npy": (replaced(RGB, 0, b"nothing of the kind"), r"0000003\.npy': "),
    "large": (replaced(RGB, 0, b"\x93NUMPY" + bytes(1 << 16)), r"0000003\.npy': 65542 bytes; at most"),
    "ending": (replaced(RGB, 0, npy_bytes(grid(0)), "pkl"), r"0000003\.pkl': no \.npy member"),
    "no json": (replaced(CAPTION, 0, b"[1"), r"caption/shard-00001\.tar: member '0000003\.json': "),
    "deep json": (replaced(CAPTION, 0, b"[" * 100_000), r"0000003\.json': "),
    "no text": (replaced(CAPTION, 0, b"[1]"), r"0000003\.json': holds a caption that is no text"),
    "bomb": (
        replaced(CAPTION, 0, gzip.compress(bytes(8 << 20)), "json.gz"),
        r"0000003\.json\.gz': .*unpacks to more than",
    ),
    "class": (
        replaced(DET, 0, json.dumps(BOXES).replace("dog", "yeti").encode()),
        r"det/shard-00001\.tar: member '0000003\.json': has a box of class 'yeti'",
    ),
    "box": (replaced(DET, 0, b'{"instances": [{"boxes": [0, 0, 2, 1], "class_name": "cat"}]}'), r"beyond 0 to 1"),
    "no boxes": (replaced(DET, 0, b'{"found": []}'), r"0000003\.json': is no boxes: KeyError"),
    "nan": (replaced(DET, 0, b'{"instances": [{"boxes": [0, 0, NaN, 1], "class_name": "cat"}]}'), r"not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_nothing_of_the_shard_is_committed(tmp_path: Path, what: str) -> None:
    tree, (change, words) = foreign(tmp_path), DAMAGE[what]
    change(tree)
    with pytest.raises(DatasetError, match=words) as caught:
        tree.write().go()
    assert "\n" not in str(caught.value) and tree.url in str(caught.value)
    committed = [path.name for path in (tmp_path / "ds" / "receipts").rglob("shard-*.json")]
    assert set(committed) == {"shard-000000.json"}, "the first shard is whole"
    assert len(committed) == 6, "samples, four modalities, and the labels of det"


def test_a_missing_tar_or_folder_is_named(tmp_path: Path) -> None:
    tree = foreign(tmp_path)
    del tree.members["depth"][TARS[1]]
    with pytest.raises(
        DatasetError, match=r"depth/shard-00001.tar is missing; crop_settings/shard-00001.tar is"
    ):
        tree.write().go()
    shutil.rmtree(tmp_path / "tree" / "crop_settings")
    with pytest.raises(DatasetError, match="has no crop_settings/shard-00000.tar; is it a tree"):
        tree.go()
    assert not (tmp_path / "ds").exists()


def test_a_modality_is_added_and_another_tree_is_refused(tmp_path: Path) -> None:
    tree = foreign(tmp_path).write()
    options = yaml.safe_load(Path(tree.options).read_text())
    first = {k: v for k, v in options["modalities"].items() if k != "depth"}
    Path(tree.options).write_text(yaml.safe_dump({**options, "modalities": first}))
    tree.go()
    before = {path: path.read_bytes() for path in (tmp_path / "ds" / "tokens").rglob("*.arrow")}
    Path(tree.options).write_text(yaml.safe_dump(options))
    assert "depth" in tree.go().snapshot.modalities
    assert before and all(path.read_bytes() == data for path, data in before.items())
    tree.members["crop_settings"][TARS[1]][0] = (
        tree.members["crop_settings"][TARS[1]][0][0],
        npy_bytes(CROP + [0, 1, 0, 0, 0]),
    )
    with pytest.raises(ConfigError, match="that can't change: choose another"):
        tree.write().go()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 4), at=st.integers(0, 1 << 16), bit=st.integers(0, 7), end=st.booleans())
def test_any_flipped_bit_gives_one_line_or_a_whole_dataset(
    tmp_path_factory: pytest.TempPathFactory, place: int, at: int, bit: int, end: bool
) -> None:
    """Of tars whose hashes nobody noted: a token may become another one, but nothing breaks."""
    root = tmp_path_factory.mktemp("flipped")
    tree = foreign(root).write()
    tar = root / "tree" / list(tree.members)[place] / TARS[0]
    data = bytearray(tar.read_bytes())
    if end:
        del data[at % len(data) :]
    else:
        data[at % len(data)] ^= 1 << bit
    tar.write_bytes(data)
    try:
        done = tree.go()
    except FourmillError as error:
        assert "\n" not in str(error)
    else:
        assert not verify(Dataset(str(root / "ds"))).problems and done.rows == 6


def test_memory_is_a_place_too(exported: Path) -> None:
    store = Store("memory://imported/tree")
    for path in exported.rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(exported)), path.read_bytes())
    done = import_webdataset("memory://imported/tree", "memory://imported/ds")
    assert done.rows == import_webdataset("memory://imported/tree", "memory://imported/ds").rows
    store.fs.rm("/imported", recursive=True)
