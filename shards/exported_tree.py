"""Reading the layout of `fourmill.shards.export` with suspicion: one tar of one modality at a time, member by member."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from fourmill.errors import DatasetError
from fourmill.labels import Label
from fourmill.modality import CAPTION, Modality
from fourmill.shards.exchange import captions_of, label_of
from fourmill.shards.export import CROPS, KEY, SIZE, tar_name, written_shards
from fourmill.shards.tar import Damage, npy_array, scan_tar
from fourmill.storage import Store

T = TypeVar("T")
MAX_TAR_BYTES = 2 << 30  # a tar is read whole
MAX_MEMBERS = 1_000_000  # of a tar
MAX_TEXT_BYTES = 4 << 20  # of a .json or .txt member, unpacked
MAX_KEY_BYTES = 4096
NPY_HEADER_BYTES = 4096
MAX_SIDE = 1 << 20  # of an image in pixels
TEXTS = ("json", "json.gz", "txt")

Identity = dict[str, Any]
OnTar = Callable[[int, int], None]  # (tars done, tars in all)


@dataclass(frozen=True)
class Member:
    """``stem``: what is equal in all modalities; ``name``: as the tar has it."""

    stem: str
    ending: str
    name: str
    data: memoryview


@dataclass
class Tree:
    """A tree of tars: ``folders`` of modalities, beside that of the crops, and of keys and sizes where there are any."""

    url: str
    folders: tuple[str, ...]
    tars: list[str] = field(default_factory=list)
    identities: dict[str, dict[str, Identity]] = field(default_factory=dict)  # by folder and tar
    n_crops: int = 0

    @classmethod
    def open(
        cls, url: str, folders: Sequence[str], on_tar: OnTar = lambda done, total: None, n_crops: int = 0
    ) -> Tree:
        """List and identify the tars. ``n_crops`` 0: as many as the first sample has.

        DatasetError where a modality lacks a shard.
        """
        tree = cls(url, tuple(folders))
        entries = {name: tree.store.entries(name) for name in (CROPS, KEY, SIZE, *folders)}
        listed = {
            name: [file for file in sorted(files) if file.endswith(".tar")] for name, files in entries.items()
        }
        tree.tars = listed[CROPS]
        if not tree.tars:
            raise DatasetError(f"{url} has no {CROPS}/shard-00000.tar; is it a tree that 4M trains from?")
        tree._optional = tuple(name for name in (KEY, SIZE) if listed[name])
        for name in (*tree._optional, *folders):
            for other in sorted(set(tree.tars) ^ set(listed[name])):
                has, lacks = (CROPS, name) if other in tree.tars else (name, CROPS)
                raise DatasetError(f"{url}/{lacks}/{other} is missing; {has}/{other} is there")
        known = {
            f"{folder}/{tar}": identity
            for folder, tar, identity in _noted(tree.store, (*tree.row_folders, *folders))
        }
        every = [(name, tar) for name in (*tree.row_folders, *folders) for tar in tree.tars]
        for done, (name, tar) in enumerate(every, 1):
            noted, entry = known.get(f"{name}/{tar}"), entries[name][tar]
            made = noted if noted and noted["bytes"] == entry.size else tree._identify(f"{name}/{tar}", entry)
            tree.identities.setdefault(name, {})[tar] = made
            on_tar(done, len(every))
        tree.n_crops = n_crops or tree._first_n_crops()
        return tree

    def __post_init__(self) -> None:
        self.store = Store(self.url)
        self._optional: tuple[str, ...] = ()

    @property
    def row_folders(self) -> tuple[str, ...]:
        """Those that say what the rows are."""
        return (CROPS, *self._optional)

    def _identify(self, name: str, entry: Any) -> Identity:
        """Size and content hash; on remote storage size and etag, where there is one."""
        tag = entry.stamp.partition("-")[2] if self.store.is_remote else ""
        if tag:
            return {"bytes": entry.size, "etag": tag}
        with self.store.fs.open(self.store.path(name), "rb") as stream:
            return {"bytes": entry.size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}

    def _first_n_crops(self) -> int:
        for tar in self.tars:
            for member in self.members(CROPS, tar):
                return len(self._crops_of(tar, member))
        raise DatasetError(f"{self.url}/{CROPS} holds no sample")

    # -- members --------------------------------------------------------------------------------------

    def wrong(self, folder: str, tar: str, member: str | None, what: str) -> DatasetError:
        named = f": member {member[:200]!r}" if member is not None else ""
        return DatasetError(f"{self.url}/{folder}/{tar}{named}: {' '.join(what.split())[:300]}")

    def members(self, folder: str, tar: str) -> Iterator[Member]:
        """In the order of the tar; DatasetError where it is damaged, too large, changed, or has a sample twice."""
        identity = self.identities[folder][tar]
        if identity["bytes"] > MAX_TAR_BYTES:
            raise self.wrong(
                folder, tar, None, f"has {identity['bytes']} bytes; the limit is {MAX_TAR_BYTES}"
            )
        data = self.store.read(f"{folder}/{tar}")
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != identity["bytes"] or identity.get("sha256", digest) != digest:
            raise self.wrong(folder, tar, None, "is not what it was when it was listed, or exported")
        seen: set[str] = set()
        view = memoryview(data)
        for item in scan_tar(io.BytesIO(data), len(data)):
            if isinstance(item, Damage):
                raise self.wrong(folder, tar, None, f"{item.reason} (at byte {item.at})")
            path, slash, last = item.name.removeprefix("./").rpartition("/")
            stem, _, ending = last.partition(".")
            stem = f"{path}{slash}{stem}"
            if stem in seen:
                raise self.wrong(folder, tar, item.name, "a sample that the tar holds twice")
            seen.add(stem)
            if len(seen) > MAX_MEMBERS:
                raise self.wrong(folder, tar, None, f"has more than {MAX_MEMBERS} members")
            yield Member(stem, ending.lower(), item.name, view[item.offset : item.offset + item.size])

    def _aligned(self, folder: str, tar: str, stems: Sequence[str]) -> Iterator[Member]:
        """The members, which must be those of the crops in the same order."""
        wanted = set(stems)
        count = 0
        for member in self.members(folder, tar):
            if member.stem not in wanted:
                raise self.wrong(folder, tar, member.name, f"there is no such sample in {CROPS}/{tar}")
            if member.stem != stems[count]:
                raise self._out_of_order(folder, tar, member, stems[count])
            count += 1
            yield member
        if count < len(stems):
            what = f"has {count} samples, {CROPS}/{tar} has {len(stems)}: {stems[count]!r} is missing"
            raise self.wrong(folder, tar, None, what)

    def _out_of_order(self, folder: str, tar: str, member: Member, expected: str) -> DatasetError:
        if any(other.stem == expected for other in self.members(folder, tar)):
            return self.wrong(
                folder, tar, member.name, f"is out of order: {expected!r} comes here in {CROPS}/{tar}"
            )
        return self.wrong(folder, tar, member.name, f"stands where {expected!r} should: that one is missing")

    def _each(
        self, folder: str, tar: str, stems: Sequence[str], read: Callable[[int, Member], T]
    ) -> Iterator[T]:
        """``read(row, member)`` of each; its ValueErrors name the member."""
        for row, member in enumerate(self._aligned(folder, tar, stems)):
            try:
                yield read(row, member)
            except (ValueError, SyntaxError, EOFError, RecursionError, zlib.error) as error:
                raise self.wrong(folder, tar, member.name, str(error) or type(error).__name__) from error

    # -- rows -----------------------------------------------------------------------------------------

    def read_crops(self, tar: str) -> tuple[list[str], np.ndarray]:
        """The samples' stems, and int32 (rows, n_crops, 5). There are none in a tar whose samples were all taken down."""
        stems, crops = [], []
        for member in self.members(CROPS, tar):
            stems.append(member.stem)
            crops.append(self._crops_of(tar, member))
            if len(crops[-1]) != self.n_crops:
                what = f"has {len(crops[-1])} crops, where the others have {self.n_crops}"
                raise self.wrong(CROPS, tar, member.name, what)
        return stems, np.array(crops, np.int32).reshape(-1, self.n_crops, 5)

    def _crops_of(self, tar: str, member: Member) -> np.ndarray:
        try:
            table = _array(member, 1 << 16)
            if table.dtype.kind not in "iu" or table.ndim != 2 or table.shape[1] != 5 or not len(table):
                raise ValueError(f"{table.dtype} of shape {table.shape}; integers (n_crops, 5) are expected")
            sides, flips = table[:, 2:4], table[:, 4]
            if table.min() < 0 or table.max() > MAX_SIDE or sides.min() < 1 or flips.max() > 1:
                raise ValueError(f"{table.tolist()} is no top, left, height, width, flip")
        except (ValueError, SyntaxError, EOFError, RecursionError) as error:
            raise self.wrong(CROPS, tar, member.name, str(error)) from error
        return table

    def read_keys(self, tar: str, stems: Sequence[str]) -> list[str]:
        """Where nobody says otherwise a key is the tar's name and the member's."""
        if KEY not in self._optional:
            return [f"{tar.removesuffix('.tar')}/{stem}" for stem in stems]
        seen: set[str] = set()

        def read(row: int, member: Member) -> str:
            key = _text(member, MAX_KEY_BYTES)
            if not key or key in seen:
                raise ValueError("a key that is empty" if not key else f"the key {key[:80]!r} is there twice")
            seen.add(key)
            return key

        return list(self._each(KEY, tar, stems, read))

    def read_sizes(self, tar: str, stems: Sequence[str], crops: np.ndarray) -> np.ndarray:
        """int32 (rows, 2): width, height of the original images.

        Where nobody says so, of the smallest that have all crops, the first of them in the middle.
        """
        corners, sides = crops[:, :, [1, 0]], crops[:, :, [3, 2]]
        least: np.ndarray = (corners + sides).max(axis=1)
        if SIZE not in self._optional:
            return np.maximum(least, 2 * corners[:, 0] + sides[:, 0]).astype(np.int32)

        def read(row: int, member: Member) -> list[int]:
            size = json.loads(_text(member, MAX_KEY_BYTES))
            is_pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
            if not is_pair or min(size) < 1 or max(size) > MAX_SIDE:
                raise ValueError("is no [width, height]")
            if (least[row] > size).any():
                raise ValueError(f"is {size[0]} x {size[1]}, and a crop reaches beyond it")
            return list(size)

        return np.array(list(self._each(SIZE, tar, stems, read)), np.int32)

    # -- modalities -----------------------------------------------------------------------------------

    def read_column(
        self, tar: str, folder: str, modality: Modality, stems: Sequence[str], sizes: np.ndarray
    ) -> Any:
        """Tokens uint16 or floats float16 (rows, n_crops, num_tokens); a list of floats, of captions or of labels."""
        form, classes = modality.contract.form, modality.contract.classes
        if modality.kind in ("grid", "vector", "embedding"):
            shape = (self.n_crops, modality.num_tokens)
            dtype = np.float16 if modality.kind == "embedding" else np.uint16
            read = _floats if modality.kind == "embedding" else _tokens
            found = [
                values.astype(dtype)
                for values in self._each(
                    folder, tar, stems, lambda row, m: read(m, shape, modality.vocab_size)
                )
            ]  # not into one array of the expected size: who wrote the tree may expect anything
            return np.array(found, dtype).reshape(len(stems), *shape)

        def one(row: int, member: Member) -> Label:
            text = _text(member, MAX_TEXT_BYTES)
            value = text if member.ending == "txt" else json.loads(text)
            if modality.name == CAPTION.name:
                return captions_of(value)
            form_of = "scalar" if modality.kind == "scalar" else form
            return label_of(form_of, value, classes, (int(sizes[row][0]), int(sizes[row][1])))

        return list(self._each(folder, tar, stems, one))


def _noted(store: Store, folders: Sequence[str]) -> Iterator[tuple[str, str, Identity]]:
    """What an export of fourmill's said of its tars: (folder, tar, identity)."""
    for note in written_shards(store).values():
        try:
            tars: Mapping[str, Any] = note["tars"] if note["number"] is not None else {}
            for folder in (f for f in folders if f in tars):
                identity = {"bytes": int(tars[folder]["bytes"]), "sha256": str(tars[folder]["sha256"])}
                yield folder, tar_name(int(note["number"])), identity
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{store.url}: a note of what was written is damaged: {error!r}") from error


def _array(member: Member, most: int) -> np.ndarray:
    """Of a .npy member of at most ``most`` bytes beside its header."""
    if member.ending != "npy":
        raise ValueError("no .npy member")
    if len(member.data) > most + NPY_HEADER_BYTES:
        raise ValueError(f"{len(member.data)} bytes; at most {most + NPY_HEADER_BYTES} are expected")
    return npy_array(bytes(member.data))


def _tokens(member: Member, shape: tuple[int, int], vocab_size: int) -> np.ndarray:
    table = _array(member, 8 * shape[0] * shape[1])
    if table.dtype.kind not in "iu" or table.ndim != 2:
        raise ValueError(f"{table.dtype} of shape {table.shape}; integers (n_crops, n_tokens) are expected")
    _check_shape(table, shape)
    if table.size and (table.min() < 0 or table.max() >= vocab_size):
        worst = table.min() if table.min() < 0 else table.max()
        raise ValueError(f"token {worst}, outside the vocabulary of {vocab_size}")
    return table


def _floats(member: Member, shape: tuple[int, int], vocab_size: int) -> np.ndarray:
    table = _array(member, 8 * shape[0] * shape[1])
    if table.dtype.kind != "f" or table.ndim != 2:
        raise ValueError(f"{table.dtype} of shape {table.shape}; floats (n_crops, n) are expected")
    _check_shape(table, shape)
    with np.errstate(over="ignore"):
        half = table.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a number that is not finite, or too large for float16")
    return half


def _check_shape(table: np.ndarray, shape: tuple[int, int]) -> None:
    if table.shape[0] != shape[0]:
        raise ValueError(f"{table.shape[0]} crops, where crop_settings has {shape[0]}")
    if table.shape[1] != shape[1]:
        raise ValueError(f"{table.shape[1]} tokens in a crop, {shape[1]} are expected")


def _text(member: Member, most: int) -> str:
    if member.ending not in TEXTS:
        raise ValueError("neither .json nor .txt")
    if len(member.data) > most:
        raise ValueError(f"{len(member.data)} bytes; the limit is {most}")
    data = bytes(member.data)
    if member.ending == "json.gz":
        unpack = zlib.decompressobj(wbits=31)
        data = unpack.decompress(data, most)
        if not unpack.eof:
            raise ValueError(f"a .gz that is cut off, or unpacks to more than {most} bytes")
    return data.decode("utf-8")  # UnicodeDecodeError is a ValueError
