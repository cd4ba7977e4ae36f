import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from photographs import tar_bytes

from fourmill.errors import ContractError, DatasetError
from fourmill.labels import Absent, Boxes, Label
from fourmill.modality import CAPTION, LabelContract, Modality
from fourmill.shards.tar import (
    Damage,
    Member,
    label_keys,
    npy_array,
    npy_bytes,
    read_labels,
    scan_tar,
    write_labels,
    write_tar,
)

MEMBERS = [
    ("000/a.jpg", b"x" * 700),
    ("000/a.txt", b""),
    ("000/b.jpg", b"y" * 512),
    ("000/" + "n" * 90 + ".json", b"{}"),
]


def scan(data: bytes) -> list[Member | Damage]:
    return list(scan_tar(io.BytesIO(data), len(data)))


def contents(data: bytes) -> list[tuple[str, bytes]]:
    found = scan(data)
    assert not [item for item in found if isinstance(item, Damage)], found
    return [(m.name, data[m.offset : m.offset + m.size]) for m in found if isinstance(m, Member)]


# -- writing and scanning -----------------------------------------------------------------------------


def test_written_tars_are_reproducible_and_plain() -> None:
    data = write_tar(MEMBERS)
    assert data == write_tar(MEMBERS) and len(data) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
        assert [(info.name, tar.extractfile(info).read()) for info in infos] == MEMBERS  # type: ignore[union-attr]
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {
            (0, 0, 0, "", "", 0o644)
        }
        assert not any(info.pax_headers for info in infos)
    assert contents(data) == MEMBERS


def test_unwritable_members_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        write_tar([("a", b""), ("a", b"")])
    with pytest.raises(ValueError, match="does not fit USTAR"):
        write_tar([("n" * 300, b"")])


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_header_style_is_read(style: int) -> None:
    members = list(MEMBERS)
    if style != tarfile.USTAR_FORMAT:
        members += [("deep/" * 60 + "long.jpg", b"long name"), ("bücher/猫.jpg", b"unicode")]
    assert contents(tar_bytes(members, style)) == members


def test_folders_and_links_are_passed_over() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert contents(sink.getvalue()) == [("a.jpg", b"abc")]


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_read_up_to_the_cut(style: int) -> None:
    data = tar_bytes([*MEMBERS, ("deep/" * 30 + "end.jpg", b"z" * 100)], style)
    whole = [item for item in scan(data) if isinstance(item, Member)]
    mark = (whole[-1].offset + whole[-1].size + 511) // 512 * 512
    for cut in range(0, mark + 1, 57):
        found = scan(data[:cut])
        assert isinstance(found[-1], Damage) and found[-1].at < cut + 512  # padding included
        assert found[:-1] == [member for member in whole if member.offset + member.size <= cut]
    assert scan(data[: mark + 512]) == whole


def test_damage_is_named_where_it_is() -> None:
    data = bytearray(write_tar(MEMBERS))
    data[2 * 512 + 512 + 5] ^= 1  # in the header of the second member
    first, damage = scan(bytes(data))
    assert isinstance(first, Member) and isinstance(damage, Damage)
    assert damage.at == 3 * 512 and "checksum" in damage.reason
    assert scan(b"") == [Damage("it is empty", 0)]
    for other in (b"\x1f\x8b" + bytes(range(256)) * 4, b"<html>" * 200):
        assert [type(item) for item in scan(other)] == [Damage]


def test_hostile_headers_end_the_scan() -> None:
    def header(**fields: bytes) -> bytes:
        block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
        places = {"size": (124, 12), "type": (156, 1)}
        for name, value in fields.items():
            start, length = places[name]
            block[start : start + length] = value.ljust(length, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        return bytes(block)

    pax = b"30 path=" + b"p" * 21 + b"\n"
    hostile = [
        header(size=b"77777777777"),  # 8 GiB that are not there
        header(size=b"\x80" + b"\xff" * 11),  # more than the universe holds
        header(size=b"-0000000001"),
        header(size=b"notanumber"),
        header(type=b"L", size=b"77777777"),
        header(type=b"S"),
        header(type=b"x", size=b"00000000036") + pax.replace(b"30 ", b"99 ").ljust(512, b"\0"),
        header(type=b"x", size=b"00000000036") + pax.replace(b"=", b" ").ljust(512, b"\0"),
        header(type=b"x", size=b"00000000015") + b"13 size=-512\n".ljust(512, b"\0") + header(),
        header(type=b"x", size=b"00000000014") + b"12 size=huge\n"[:12].ljust(512, b"\0") + header(),
    ]
    for data in hostile:
        found = scan(data + bytes(4096))
        assert len(found) == 1 and isinstance(found[0], Damage), (data[:60], found)


# -- kept labels --------------------------------------------------------------------------------------


def modality(form: str, dtype: str, **contract: object) -> Modality:
    return Modality(name="thing", kind="grid", contract=LabelContract(form=form, dtype=dtype, **contract))  # type: ignore[arg-type]


RNG = np.random.default_rng(0)
DEPTH = RNG.uniform(0.5, 15, (6, 9)).astype(np.float32)
BOXES = Boxes(RNG.random((3, 4)).astype(np.float32), np.array([0, 2, 2]), RNG.random(3).astype(np.float32))
CASES: dict[str, tuple[Modality, Label]] = {
    "depth": (modality("map", "float32"), DEPTH),
    "depth, kept as float16": (
        modality("map", "float32", stored="float16"),
        DEPTH.astype(np.float16).astype(np.float32),
    ),
    "normal": (modality("map", "float32", channels=3), RNG.random((5, 4, 3)).astype(np.float32)),
    "semseg": (modality("map", "uint8"), RNG.integers(0, 5, (6, 9), dtype=np.uint8)),
    "semseg with a channel": (
        modality("map", "uint8", channels=1),
        RNG.integers(0, 5, (6, 9, 1), dtype=np.uint8),
    ),
    "many classes": (modality("map", "uint16"), RNG.integers(0, 999, (6, 9), dtype=np.uint16)),
    "colours": (modality("map", "uint8", channels=3), RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)),
    "five channels": (modality("map", "uint8", channels=5), RNG.integers(0, 256, (6, 9, 5), dtype=np.uint8)),
    "clip": (modality("features", "float32"), RNG.random((2, 3, 3, 8)).astype(np.float32)),
    "vector": (modality("vector", "float32"), RNG.random(16).astype(np.float32)),
    "score": (modality("scalar", "float32"), 1 / 3),
    "caption": (CAPTION, ["one\nline", "ünïcode 🐈", ""]),
    "det": (modality("boxes", "float32", classes=("a", "b", "c")), BOXES),
    "nothing found": (modality("boxes", "float32"), Boxes.empty()),
}


def equal(a: Label, b: Label) -> bool:
    if isinstance(a, Boxes):
        return isinstance(b, Boxes) and all(
            equal(getattr(a, part), getattr(b, part)) for part in ("xyxy", "class_ids", "scores")
        )
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", CASES)
def test_kept_labels_come_back_exactly(name: str) -> None:
    kind, label = CASES[name]
    keys = ["some/dir/a.b.jpg", "set aside", "ünïcode"]
    labels = [label, Absent("too small"), label]
    data = write_labels(keys, labels, kind)
    assert data == write_labels(keys, labels, kind)
    back = read_labels(data, kind)
    assert list(back) == [0, 1, 2] and back[1] == Absent("too small")
    assert equal(back[0], label) and equal(back[2], label)
    assert label_keys(data) == dict(enumerate(keys))


def test_kept_labels_are_a_webdataset(tmp_path: Path) -> None:
    (tmp_path / "labels.tar").write_bytes(write_labels(["a/1", "a/2"], [DEPTH, DEPTH + 1], CASES["depth"][0]))
    samples = list(webdataset.WebDataset(str(tmp_path / "labels.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["000000", "000001"]
    assert [sample["json"]["key"] for sample in samples] == ["a/1", "a/2"]
    assert np.array_equal(samples[1]["npy"], DEPTH + 1)


def test_labels_are_not_rounded_in_silence() -> None:
    with pytest.raises(ContractError, match="not representable as float16"):
        write_labels(["a"], [DEPTH], modality("map", "float32", stored="float16"))


def test_damaged_labels_are_named_and_never_returned() -> None:
    kind, label = CASES["depth"]
    data = write_labels(["a", "b"], [label, label], kind)
    for cut in (0, 100, 700, len(data) // 8, 2600):
        with pytest.raises(DatasetError, match="thing"):
            read_labels(data[:cut], kind)
    with pytest.raises(DatasetError, match="dtype"):
        read_labels(data, modality("map", "float64"))
    with pytest.raises(DatasetError):
        read_labels(data, CASES["det"][0].resolved(contract=LabelContract(form="boxes", dtype="int8")))
    for member in (
        b"{}",
        b"[",
        b'{"key": "a", "boxes": [[1]], "class_ids": [0], "scores": [1]}',
        b"[" * 100_000,
    ):
        with pytest.raises(DatasetError, match="damaged"):
            read_labels(write_tar([("000000.json", member)]), CASES["det"][0])


def test_arrays_hold_what_they_claim() -> None:
    assert np.array_equal(npy_array(npy_bytes(DEPTH)), DEPTH)
    claims = npy_bytes(DEPTH).replace(b"(6, 9)", b"(6, 999999999)")
    with pytest.raises(ValueError):
        npy_array(claims)
    sink = io.BytesIO()
    np.save(sink, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="plain numbers"):
        npy_array(sink.getvalue())
    with pytest.raises(ValueError):
        npy_array(npy_bytes(DEPTH)[:-1])
