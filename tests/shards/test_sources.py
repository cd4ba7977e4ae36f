import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photographs import tar_bytes

from fourmill.errors import ConfigError, SourceError
from fourmill.labels import Boxes
from fourmill.shards import decode
from fourmill.shards.decode import RejectedImage
from fourmill.shards.sources import webdataset as webdataset_module
from fourmill.shards.sources.base import RawSample, Row, Source, make_source, sources
from fourmill.shards.sources.scenes import DET_CLASSES, SCENE_CLASSES, VERSION

#: sources do not look into images
FILES = {"b.jpg": b"bee", "a/x.png": b"ex", "a/y.JPEG": b"why", "c.d.webp": b"see"}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_all(source: Source) -> dict[str, Any]:
    """Key -> (bytes, captions), or the reason of a reject."""
    rows = list(source.rows())
    found = list(source.read(rows))
    assert len(found) == len(rows)
    return {row.key: outcome(sample) for row, sample in zip(rows, found, strict=True)}


def outcome(sample: RawSample | Exception) -> Any:
    if isinstance(sample, RawSample):
        return sample.image, sample.captions
    assert isinstance(sample, RejectedImage)
    return sample.reason


def check_contract(source: Source) -> None:
    """What every source must do: repeatable listings, reading in any portions, a life in another process."""
    rows = list(source.rows())
    assert rows == list(source.rows()) and source.digest() == source.digest()
    whole = [outcome(sample) for sample in source.read(rows)]
    assert [outcome(s) for at in range(len(rows)) for s in source.read(rows[at : at + 1])] == whole
    assert [outcome(s) for at in range(0, len(rows), 3) for s in source.read(rows[at : at + 3])] == whole
    assert [outcome(sample) for sample in source.read(rows[::-1])] == whole[::-1]
    elsewhere = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert [outcome(sample) for sample in elsewhere.read(rows[1:])] == whole[1:]
    assert json.loads(json.dumps(source.identity())) == source.identity()
    assert all(isinstance(json.loads(row.position), (dict, int)) for row in rows)


# -- scenes -------------------------------------------------------------------------------------------


def test_scenes() -> None:
    source = make_source("scenes", count=3, size=32, seed=5)
    rows = list(source.rows())
    assert [row.key for row in rows] == ["00000000", "00000001", "00000002"]
    for row, sample in zip(rows, source.read(rows), strict=True):
        assert isinstance(sample, RawSample) and isinstance(sample.image, np.ndarray)
        truth = source.truth(row.key)
        assert sample.image.shape == (32, 32, 3) and sample.image.dtype == np.uint8
        assert list(sample.captions) == truth["caption"] and sample.captions[0]
        assert truth["depth"].shape == (32, 32) and (truth["depth"] > 0).all()
        assert np.allclose(np.linalg.norm(truth["normal"], axis=-1), 1, atol=1e-5)
        assert truth["semseg"].max() < len(SCENE_CLASSES) and truth["instance"].max() == len(truth["det"])
        assert isinstance(truth["det"], Boxes) and (truth["det"].scores == 1).all()
        assert truth["det"].class_ids.dtype == np.int64 and set(truth["det"].class_ids) <= set(
            range(len(DET_CLASSES))
        )
    assert source.has_truth and source.identity() == {
        "kind": "scenes",
        "version": VERSION,
        "size": 32,
        "seed": 5,
    }


def test_more_scenes_are_the_same_dataset_with_more_rows() -> None:
    few, many = make_source("scenes", count=3, size=32), make_source("scenes", count=5, size=32)
    assert few.identity() == many.identity() and few.digest() != many.digest()
    assert list(many.rows())[:3] == list(few.rows())
    assert few.identity() != make_source("scenes", count=3, size=32, seed=1).identity()


def test_scenes_refuse_what_makes_no_sense() -> None:
    for options in (
        {},
        {"count": 0},
        {"count": 3, "size": "big"},
        {"count": True},
        {"count": 1, "colour": 1},
    ):
        with pytest.raises(ConfigError, match="source"):
            make_source("scenes", **options)
    for key in ("7", "0000000x", "²0000000", "../00000"):
        with pytest.raises(KeyError):
            make_source("scenes", count=3).truth(key)


# -- folder -------------------------------------------------------------------------------------------


def test_a_folder_is_listed_by_relative_path_without_ending(tmp_path: Path) -> None:
    put(
        tmp_path,
        FILES
        | {
            "a/x.txt": b"\xef\xbb\xbfone\r\n\n two \n",
            "b.txt": b"",
            "a/notes.md": b"",
            ".b.jpg": b"",
            ".h/z.jpg": b"",
        },
    )
    source = make_source("folder", path=str(tmp_path))
    assert read_all(source) == {
        "a/x": (b"ex", ("one", "two")), "a/y": (b"why", ()), "b": (b"bee", ()), "c.d": (b"see", ()),
    }  # fmt: skip
    check_contract(source)


def test_two_files_with_one_key_are_two_rows_in_a_fixed_order(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": b"2", "a.jpg": b"1", "a.b.jpg": b"3", "a b.jpg": b"4"})
    rows = list(make_source("folder", path=str(tmp_path)).rows())
    assert [(row.key, json.loads(row.position)["file"]) for row in rows] == [
        ("a", "a.jpg"), ("a", "a.png"), ("a b", "a b.jpg"), ("a.b", "a.b.jpg"),
    ]  # fmt: skip


def test_links_stay_inside_the_folder(tmp_path: Path) -> None:
    put(tmp_path, {"in/real.jpg": b"inside", "out/secret.jpg": b"outside"})
    (tmp_path / "in" / "linked.jpg").symlink_to(tmp_path / "in" / "real.jpg")
    (tmp_path / "in" / "escape.jpg").symlink_to(tmp_path / "out" / "secret.jpg")
    (tmp_path / "in" / "dangling.jpg").symlink_to(tmp_path / "in" / "nowhere.jpg")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "out")
    source = make_source("folder", path=str(tmp_path / "in"))
    assert read_all(source) == {"linked": (b"inside", ()), "real": (b"inside", ())}
    for name in ("../out/secret.jpg", "/etc/passwd", "escape.jpg", "folder/secret.jpg", "a//b.jpg", ""):
        with pytest.raises(SourceError):
            list(source.read([Row("k", json.dumps({"file": name, "bytes": 7}))]))


def test_names_that_are_not_unicode_are_spelled_out(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"coffee")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert read_all(make_source("folder", path=str(tmp_path))) == {"caf\\xe9": (b"coffee", ())}


def write_table(path: Path, records: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        names = list(records[0])
        lines = [names] + [[f'"{record[name]}"' for name in names] for record in records]
        path.write_text("".join(",".join(line) + "\n" for line in lines))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_captions_from_a_table(tmp_path: Path, ending: str) -> None:
    put(tmp_path, FILES | {"b.txt": b"not used"})
    records = [
        {"file": "b.jpg", "caption": "by file, with a \u2028 separator"},
        {"file": "a/x", "caption": "by key"},
        {"file": "b.jpg", "caption": "another"},
    ]
    write_table(tmp_path / f"table{ending}", records)
    source = make_source("folder", path=str(tmp_path), captions=f"table{ending}")
    captions = {key: sample[1] for key, sample in read_all(source).items()}
    assert captions == {"a/x": ("by key",), "a/y": (), "b": (records[0]["caption"], "another"), "c.d": ()}
    check_contract(source)
    before = source.digest()
    write_table(tmp_path / f"table{ending}", [*records, {"file": "c.d", "caption": "more"}])
    assert source.digest() != before


def test_caption_tables_with_other_columns_and_lists(tmp_path: Path) -> None:
    put(tmp_path, FILES)
    write_table(
        tmp_path / "t.jsonl", [{"which": "b", "says": ["one", None, "two"]}, {"which": "c.d", "says": None}]
    )
    options = {"path": str(tmp_path), "captions": str(tmp_path / "t.jsonl")}
    source = make_source("folder", **options, file_column="which", caption_column="says")
    assert read_all(source)["b"] == (b"bee", ("one", "two")) and read_all(source)["c.d"] == (b"see", ())
    with pytest.raises(SourceError, match="'which', 'says'.*file_column"):
        read_all(make_source("folder", **options))
    (tmp_path / "t.jsonl").write_text("[1, 2]\n")
    with pytest.raises(SourceError, match="JSON object"):
        read_all(make_source("folder", **options))
    with pytest.raises(ConfigError, match="captions"):
        make_source("folder", path=str(tmp_path), captions="table.xlsx")


def test_a_file_that_changed_since_it_was_listed_is_an_error_not_a_reject(tmp_path: Path) -> None:
    put(tmp_path, FILES)
    source = make_source("folder", path=str(tmp_path))
    rows, digest = list(source.rows()), source.digest()
    for changed in (b"longer than before", b"s", b""):
        (tmp_path / "b.jpg").write_bytes(changed)
        assert source.digest() != digest
        with pytest.raises(SourceError, match=r"b\.jpg had 3 bytes"):
            list(source.read(rows))
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        list(source.read(rows))
    assert source.digest() != digest
    put(tmp_path, FILES)
    assert source.digest() == digest  # times do not count
    put(tmp_path, {"b.txt": b"a caption"})
    assert source.digest() != digest


def test_a_huge_file_is_rejected_unread(tmp_path: Path) -> None:
    with open(tmp_path / "huge.jpg", "wb") as stream:
        stream.truncate(decode.MAX_BYTES + 1)  # a hole: takes no room
    assert read_all(make_source("folder", path=str(tmp_path))) == {"huge": "too large"}


def test_an_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    put(tmp_path, {"notes.txt": b""})
    with pytest.raises(SourceError, match=f"{tmp_path}: no image.*jpg"):
        list(make_source("folder", path=str(tmp_path)).rows())
    with pytest.raises(SourceError, match=r"missing.*does not exist"):
        list(make_source("folder", path=str(tmp_path / "missing")).rows())
    for options in ({}, {"path": "a", "url": "b"}, {"path": "a/{1..3}"}, {"path": "a", "extensions": ".jpg"}):
        with pytest.raises(ConfigError, match="source"):
            make_source("folder", **options)


def test_extensions_can_be_chosen(tmp_path: Path) -> None:
    put(tmp_path, FILES)
    source = make_source("folder", path=str(tmp_path), extensions=["JPG", ".png"])
    assert list(read_all(source)) == ["a/x", "b"]


# -- webdataset ---------------------------------------------------------------------------------------

MEMBERS = [
    ("000.jpg", b"zero"), ("000.txt", b" zero's caption\n"), ("000.json", b'{"caption": "not used"}'),
    ("001.png", b"one"), ("001.json", b'{"caption": "from json"}'),
    ("002.jpg", b"two"), ("002.txt", b""), ("002.json", b'{"caption": ["a", "", "b", 3]}'),
    ("003.txt", b"no image here"),
    ("sub/004.PNG", b"four"), ("sub/004.seg.png", b"a mask"), ("sub/004.json", b"[" * 100_000),
    ("005.webp", b"webp"), ("005.jpg", b"jpeg"),
    ("._006.jpg", b"a Mac was here"), ("no_ending", b""),
    ("007.jpg", b""),
]  # fmt: skip
SAMPLES: dict[str, Any] = {
    "000": (b"zero", ("zero's caption",)),
    "001": (b"one", ("from json",)),
    "002": (b"two", ("a", "b")),
    "003": "no image",
    "sub/004": (b"four", ()),
    "005": (b"jpeg", ()),
    "007": (b"", ()),
}


def put_tars(folder: Path) -> Path:
    second = [("000.jpg", b"zero of the second tar"), ("000.txt", b"second")]
    return put(
        folder, {"s/00000.tar": tar_bytes(MEMBERS), "s/00001.tar": tar_bytes(second, tarfile.GNU_FORMAT)}
    )


@pytest.mark.parametrize("url", ["s/{00000..00001}.tar", "s/*.tar", "s", "s/{00000,00001}.tar", "s/"])
def test_tars_are_listed_and_read_by_offset(tmp_path: Path, url: str) -> None:
    put_tars(tmp_path)
    source = make_source("webdataset", url=f"{tmp_path}/{url}")
    expected = {f"00000/{key}": sample for key, sample in SAMPLES.items()}
    assert read_all(source) == expected | {"00001/000": (b"zero of the second tar", ("second",))}
    check_contract(source)


def test_one_tar_and_tars_in_several_folders(tmp_path: Path) -> None:
    put_tars(tmp_path)
    put(tmp_path, {"t/00000.tar": tar_bytes([("a.jpg", b"a")])})
    assert list(read_all(make_source("webdataset", url=f"{tmp_path}/t/00000.tar"))) == ["00000/a"]
    keys = list(read_all(make_source("webdataset", url=f"{tmp_path}/{{s,t}}/00000.tar")))
    assert keys[0] == "s/00000/000" and keys[-1] == "t/00000/a"


def test_relative_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_tars(tmp_path)
    monkeypatch.chdir(tmp_path / "s")
    assert "00001/000" in read_all(make_source("webdataset", url="{00000..00001}.tar"))
    monkeypatch.chdir(tmp_path)
    assert "00001/000" in read_all(make_source("webdataset", url="s/00001.tar"))


def test_a_key_that_comes_twice_makes_two_rows(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.txt", b"t1"), ("a.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")]
    put(tmp_path, {"x.tar": tar_bytes(members)})
    source = make_source("webdataset", url=f"{tmp_path}/x.tar")
    rows = list(source.rows())
    assert [row.key for row in rows] == ["x/a", "x/a", "x/b", "x/a"]
    assert [outcome(s) for s in source.read(rows)] == [(b"1", ("t1",)), (b"2", ()), (b"3", ()), (b"4", ())]


def test_member_names_are_never_paths(tmp_path: Path) -> None:
    names = ["../../etc/passwd.jpg", "/etc/shadow.jpg", "a/../b.jpg", "nul\\0.jpg", "quote'\".jpg"]
    put(tmp_path, {"x.tar": tar_bytes([(name, name.encode()) for name in names])})
    found = read_all(make_source("webdataset", url=f"{tmp_path}/x.tar"))
    assert [sample[0].decode() for sample in found.values()] == names and len(found) == len(names)
    source = make_source("webdataset", url=f"{tmp_path}/x.tar")
    place = {"tar": "../../etc/passwd", "bytes": 10, "image": [0, 5]}
    with pytest.raises(SourceError, match="not a file of this source"):
        list(source.read([Row("k", json.dumps(place))]))


def test_a_tar_cut_anywhere_loses_its_end_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tar_bytes(
        [(f"{i:03d}.{ending}", os.urandom(300 * i)) for i in range(6) for ending in ("jpg", "txt", "json")]
    )
    put(tmp_path, {"x.tar": data})
    source = make_source("webdataset", url=f"{tmp_path}/x.tar")
    whole = list(read_all(source).items())
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for cut in range(2600, end, 701):
        (tmp_path / "x.tar").write_bytes(data[:cut])
        caplog.clear()
        found = list(read_all(source).items())
        assert found[:-1] == whole[: len(found) - 1] and found[-1] == (whole[len(found) - 1][0], "truncated")
        assert "x.tar is damaged" in caplog.text
    assert len(found) == 6
    check_contract(source)


def test_what_is_no_tar_is_an_error(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz"):
        pass
    for data, reason in ((b"", "empty"), (sink.getvalue(), "not a tar"), (b"<html>" * 200, "not a tar")):
        put(tmp_path, {"x.tar": data})
        with pytest.raises(SourceError, match=rf"x\.tar.*{reason}"):
            list(make_source("webdataset", url=f"{tmp_path}/x.tar").rows())


def test_missing_and_empty_tars_are_named(tmp_path: Path) -> None:
    put_tars(tmp_path)
    source = make_source("webdataset", url=f"{tmp_path}/s/{{00000..00005}}.tar")
    for list_it in (source.digest, lambda: list(source.rows())):
        with pytest.raises(SourceError, match=r"00002\.tar is missing and 3 more"):
            list_it()
    put(tmp_path, {"e/x.tar": tar_bytes([]), "n/readme.md": b""})
    for url, words in (
        ("e/x.tar", "1 tars without"), ("n", r"no tar there.*\.tar"), ("n/*.tar", "no tar there"), ("gone", "does not exist"),
        ("gone/x.tar", r"x\.tar is missing"), ("n/readme.md", "neither a folder nor"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=words):
            list(make_source("webdataset", url=f"{tmp_path}/{url}").rows())
    wrong: list[Any] = [
        "s3://{a,b}/x.tar",
        "",
        7,
        f"{tmp_path}/{{0..99999999}}.tar",
        f"{tmp_path}/{{0..9.tar",
    ]
    for url in wrong:
        with pytest.raises(ConfigError, match="source.url"):
            list(make_source("webdataset", url=url).rows())
    with pytest.raises(SourceError, match="cannot be opened"):
        make_source("webdataset", url="nosuchprotocol://a/b.tar")


def test_a_tar_that_changed_since_it_was_listed_is_an_error(tmp_path: Path) -> None:
    put_tars(tmp_path)
    url = f"{tmp_path}/s/{{00000..00001}}.tar"
    source = make_source("webdataset", url=url)
    rows, digest = list(source.rows()), source.digest()
    put(tmp_path, {"s/00000.tar": tar_bytes(MEMBERS + [("008.jpg", b"8" * 20_000)])})
    assert source.digest() != digest
    with pytest.raises(SourceError, match=r"00000\.tar had \d+ bytes"):
        list(make_source("webdataset", url=url).read(rows))


def test_rows_are_read_in_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    members = [
        (f"{i:04d}.{ending}", bytes([i]) * 3000) for i in range(200) for ending in ("jpg", "txt", "json")
    ]
    fs.pipe_file("/few/x.tar", tar_bytes(members))
    source = make_source("webdataset", url="memory://few/x.tar")
    rows = list(source.rows())
    requests: list[int] = []
    ranged = type(fs).cat_file

    def counted(
        self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        requests.append((end or 0) - (start or 0))
        return ranged(self, path, start, end, **options)

    monkeypatch.setattr(type(fs), "cat_file", counted)
    monkeypatch.setattr(webdataset_module, "WINDOW_BYTES", 1 << 20)
    found = [sample for at in range(0, 200, 16) for sample in source.read(rows[at : at + 16])]
    assert [outcome(sample)[0] for sample in found] == [bytes([i]) * 3000 for i in range(200)]
    total = len(tar_bytes(members))
    assert len(requests) <= total / (1 << 20) + 2 and sum(requests) < 1.2 * total
    requests.clear()
    assert outcome(next(iter(source.read(rows[3:4]))))[0] == bytes([3]) * 3000
    assert len(requests) == 1 and requests[0] < 20_000  # a row by itself fetches no more than itself
    fs.rm("/few", recursive=True)


# -- parquet ------------------------------------------------------------------------------------------


def parquet_file(path: Path, columns: dict[str, Any], row_group_size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def cells(count: int) -> list[bytes]:
    return [f"image {index}".encode() for index in range(count)]


def test_parquet_files_of_bytes(tmp_path: Path) -> None:
    parquet_file(
        tmp_path / "p/a.parquet",
        {"image": cells(10), "caption": [f"c{i}" for i in range(10)], "x": range(10)},
    )
    parquet_file(
        tmp_path / "p/b.parquet",
        {"image": pa.array([b"last", None, b""], pa.large_binary()), "text": ["l", "", ""]},
    )
    source = make_source("parquet", url=f"{tmp_path}/p/*.parquet")
    expected: dict[str, Any] = {f"a/{i}": (f"image {i}".encode(), (f"c{i}",)) for i in range(10)}
    assert read_all(source) == expected | {"b/0": (b"last", ("l",)), "b/1": "no image", "b/2": "no image"}
    check_contract(source)


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": b"pixels", "path": "x.jpg"}, {"bytes": None, "path": "/etc/passwd"}, None]
    captions = pa.array([["one", None, "two"], [], None], pa.list_(pa.string()))
    columns = {
        "picture": pa.array(values, image),
        "captions": captions,
        "alt": ["a", None, "c"],
        "name": [7, 8, 9],
    }
    parquet_file(tmp_path / "hf.parquet", columns)
    source = make_source(
        "parquet", url=str(tmp_path / "hf.parquet"), image="picture", caption=["captions", "alt"], id="name"
    )
    assert read_all(source) == {"7": (b"pixels", ("one", "two", "a")), "8": "no image", "9": "no image"}
    check_contract(source)


def test_parquet_is_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(parquet_file(tmp_path / "a.parquet", {"image": cells(100)}, row_group_size=50))
    source = make_source("parquet", url=url)
    rows = list(source.rows())
    opened: list[str] = []
    seek = type(source)._seek  # type: ignore[attr-defined]

    def counted(self: Source, name: str, size: int, group: int) -> Any:
        opened.append(name)
        return seek(self, name, size, group)

    monkeypatch.setattr(type(source), "_seek", counted)
    found = [outcome(sample)[0] for at in range(0, 100, 16) for sample in source.read(rows[at : at + 16])]
    assert found == cells(100) and len(opened) == 2  # one for each row group
    assert [outcome(sample)[0] for sample in source.read(rows[::-7])] == cells(100)[::-7]


def test_parquet_complaints_name_file_and_column(tmp_path: Path) -> None:
    url = str(
        parquet_file(
            tmp_path / "a.parquet", {"image": cells(2), "n": [1, None], "f": [0.5, 1.5], "s": ["a", "b"]}
        )
    )
    for options, words in (
        ({"image": "img"}, "no column 'img'; it has 'image', 'n'"), ({"image": "s"}, "'s' is string; expected bytes"),
        ({"caption": "alt"}, "no column 'alt'"), ({"id": "n"}, "'n' has nulls"), ({"id": "f"}, "'f' is double"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=rf"a\.parquet.*{words}"):
            list(make_source("parquet", url=url, **options).rows())
    for data in (b"", b"PAR1 but not really PAR1", Path(url).read_bytes()[:-20]):
        put(tmp_path, {"d/x.parquet": data})
        with pytest.raises(SourceError, match=r"d/x\.parquet"):
            list(make_source("parquet", url=f"{tmp_path}/d/x.parquet").rows())
    parquet_file(tmp_path / "e/x.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(SourceError, match="without a row"):
        list(make_source("parquet", url=f"{tmp_path}/e").rows())
    with pytest.raises(ConfigError, match="source.caption"):
        make_source("parquet", url=url, caption=3)


def test_a_parquet_file_that_changed_is_an_error(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "a.parquet", {"image": cells(3)})
    source = make_source("parquet", url=str(path))
    rows, digest = list(source.rows()), source.digest()
    parquet_file(path, {"image": cells(30)})
    assert source.digest() != digest
    with pytest.raises(SourceError, match="restore it"):
        list(source.read(rows))


def test_a_caption_that_is_not_unicode_costs_its_row_alone(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    path = parquet_file(tmp_path / "a.parquet", {"image": cells(3), "caption": broken})
    found = read_all(make_source("parquet", url=str(path)))
    assert [found[f"a/{i}"] for i in (0, 1, 2)] == [
        (b"image 0", ("good",)),
        "unreadable",
        (b"image 2", ("fine",)),
    ]


# -- S3 -----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket behind a real S3 protocol endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("photographs")
    yield "s3://photographs"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def test_sources_on_s3(bucket: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    put_tars(tmp_path)
    for name in ("00000", "00001"):
        fs.pipe_file(f"{bucket}/wds/{name}.tar", (tmp_path / f"s/{name}.tar").read_bytes())
    for name, data in (
        FILES | {"b.txt": b"a bee", "c.d.txt": b"", "empty.jpg": b"", ".h/z.jpg": b"z"}
    ).items():
        fs.pipe_file(f"{bucket}/folder/{name}", data)
    parquet_file(tmp_path / "a.parquet", {"image": cells(9)})
    fs.pipe_file(f"{bucket}/p/a.parquet", (tmp_path / "a.parquet").read_bytes())

    tars = make_source("webdataset", url=f"{bucket}/wds/{{00000..00001}}.tar")
    local = make_source("webdataset", url=f"{tmp_path}/s/{{00000..00001}}.tar")
    assert read_all(tars) == read_all(local) and list(tars.rows()) == list(local.rows())
    check_contract(tars)
    folder = make_source("folder", url=f"{bucket}/folder")
    assert read_all(folder) == {
        "a/x": (b"ex", ()), "a/y": (b"why", ()), "b": (b"bee", ("a bee",)), "c.d": (b"see", ()), "empty": (b"", ()),
    }  # fmt: skip
    check_contract(folder)
    table = make_source("parquet", url=f"{bucket}/p/")
    assert read_all(table) == {f"a/{i}": (f"image {i}".encode(), ()) for i in range(9)}
    check_contract(table)

    rows = list(tars.rows())
    fs.ls(f"{bucket}/wds")  # a listing that is remembered must not hide that the tar has changed
    somebody_else = fsspec.filesystem("s3", skip_instance_cache=True)
    somebody_else.pipe_file(f"{bucket}/wds/00000.tar", tar_bytes(MEMBERS + [("008.jpg", b"8" * 20_000)]))
    with pytest.raises(SourceError, match=r"00000\.tar had \d+ bytes"):
        list(make_source("webdataset", url=f"{bucket}/wds/{{00000..00001}}.tar").read(rows))

    before = folder.digest()
    fs.pipe_file(f"{bucket}/folder/b.jpg", b"eeb")  # the same size: S3's etag tells
    assert folder.digest() != before
    with pytest.raises(SourceError, match=r"00002\.tar is missing"):
        make_source("webdataset", url=f"{bucket}/wds/{{00000..00002}}.tar").digest()
    for url in (f"{bucket}/nothing", "s3://no-such-bucket/x"):
        with pytest.raises(SourceError, match="no image|not exist|cannot be listed"):
            list(make_source("folder", url=url).rows())


def test_all_sources_are_registered() -> None:
    assert set(sources.names()) >= {"folder", "parquet", "scenes", "webdataset"}


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_threads_can_share_a_source(tmp_path: Path, kind: str) -> None:
    names = [f"{i:03d}" for i in range(120)]
    contents = [name.encode() * 50 for name in names]
    if kind == "folder":
        put(tmp_path, {f"{name}.jpg": data for name, data in zip(names, contents, strict=True)})
        source = make_source("folder", path=str(tmp_path))
    elif kind == "webdataset":
        members = [(f"{name}.jpg", data) for name, data in zip(names, contents, strict=True)]
        put(tmp_path, {"0.tar": tar_bytes(members[:50]), "1.tar": tar_bytes(members[50:])})
        source = make_source("webdataset", url=str(tmp_path))
    else:
        parquet_file(tmp_path / "a.parquet", {"image": contents}, row_group_size=40)
        source = make_source("parquet", url=str(tmp_path))
    rows = list(source.rows())

    def read_part(part: int) -> bool:
        order = np.random.default_rng(part).permutation(120)[:30]
        found = source.read([rows[i] for i in order])
        return [outcome(sample)[0] for sample in found] == [contents[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_part, range(16)))
