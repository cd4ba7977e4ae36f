"""Files of a remote dataset on this machine: fetched once, never seen half written, never more than the limit."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import s3fs
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import Flaky, s3_server

from fourmill import storage
from fourmill.errors import ConfigError, DatasetError
from fourmill.shards import cache as module
from fourmill.shards.arrow import write_table
from fourmill.shards.cache import LEDGER, PART, FileCache
from fourmill.storage import Store


class Counting(Store):
    """A folder taken for something far away; notes what is read, and can be told to wait in the middle."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fetched: list[str] = []
        self.pause_s = 0.0

    def parts(self, name: str, size: int) -> Iterator[bytes]:
        self.fetched.append(name)
        for data in super().parts(name, size):
            yield data[: len(data) // 2]
            time.sleep(self.pause_s)
            yield data[len(data) // 2 :]


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting(str(tmp_path / "far"))


@pytest.fixture
def cache(tmp_path: Path, store: Store) -> Iterator[FileCache]:
    with FileCache(store, 1000, tmp_path / "near") as cache:
        yield cache


def content(number: int, size: int = 100) -> bytes:
    return np.random.default_rng(number).bytes(size)


def put(store: Store, number: int, size: int = 100) -> tuple[str, str]:
    """(name, sha256) of a file in the store."""
    name = f"tokens/{number}.arrow"
    store.put(name, content(number, size))
    return name, sha256(content(number, size)).hexdigest()


def held(folder: Path) -> dict[str, int]:
    """Sizes of what is in the cache, by name, its own notes left out."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != LEDGER}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_file_is_fetched_once_and_has_its_hash_for_a_name(cache: FileCache, store: Counting) -> None:
    file = put(store, 1)
    path = cache.get(*file)
    assert path == cache.folder / file[1] and path.read_bytes() == content(1)
    assert cache.get(*file) == path and store.fetched == [file[0]]
    assert held(cache.folder) == {file[1]: 100}
    assert cache.get("other/name", file[1]) == path, "the same bytes, whatever their name"


def test_the_default_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert FileCache(Store("memory://d"), 1).folder == tmp_path / "x" / "fourmill" / "shards"


def test_a_file_of_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 7)
    for url in (str(tmp_path / "far"), f"memory://{tmp_path.name}"):
        store = Store(url)
        cache = FileCache(store, 1000, tmp_path / url[:6])
        for size in (0, 1, 7, 100):
            assert cache.get(*put(store, size, size)).read_bytes() == content(size, size)


def test_what_the_store_does_not_have_or_has_damaged(cache: FileCache, store: Counting) -> None:
    name, digest = put(store, 1)
    store.put(name, content(2))
    found = sha256(content(2)).hexdigest()
    for _ in range(2):
        with pytest.raises(
            DatasetError, match=f"{name} is damaged: its sha256 is {found}, wanted is {digest}"
        ):
            cache.get(name, digest)
    with pytest.raises(DatasetError, match="none.arrow is missing"):
        cache.get("none.arrow", digest)
    for bad in ("../../etc/passwd", digest[:-1], digest.upper()):
        with pytest.raises(DatasetError, match="is no sha256"):
            cache.get(name, bad)
    with pytest.raises(DatasetError, match="not a path inside"):
        cache.get("../x", digest)
    assert held(cache.folder) == {}
    store.put(name, content(1))
    assert cache.get(name, digest).read_bytes() == content(1), "mended there, it is fine here"


def test_a_disk_that_refuses(cache: FileCache, store: Counting, tmp_path: Path) -> None:
    small, large = put(store, 1), put(store, 2, 200_000)
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="another folder on a local disk"):
        FileCache(store, 1000, tmp_path / "file" / "x").get(*small)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DatasetError, match="File too large"):
            cache.get(*large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert held(cache.folder) == {}
    with pytest.raises(ConfigError, match="at least 0 bytes"):
        FileCache(store, -1)


# -- room ---------------------------------------------------------------------------------------------


def test_a_mapped_file_is_read_after_it_was_pushed_out(
    tmp_path: Path, store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOUCH_S", 0.0)
    data = write_table(pa.table({"a": np.arange(500)}))
    store.put("a", data)
    cache = FileCache(store, 20_000, tmp_path / "near")
    table = cache.table("a", sha256(data).hexdigest())
    for number in range(20):
        cache.get(*put(store, number, 3000))
        assert sum(held(cache.folder).values()) <= 20_000
    assert sha256(data).hexdigest() not in held(cache.folder)
    assert table.column("a").to_pylist() == list(range(500))


def test_a_copy_that_this_disk_damaged_is_fetched_again(
    tmp_path: Path, store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_table(pa.table({"a": [1, 2]}))
    store.put("a", data)
    store.put("b", b"no table")
    cache = FileCache(store, 10_000, tmp_path / "near")
    path = cache.get("a", sha256(data).hexdigest())
    path.write_bytes(b"")
    assert cache.table("a", path.name).num_rows == 2 and len(store.fetched) == 2
    real = cache.get

    def get_and_lose(name: str, digest: str) -> Path:
        """Somebody pushes it out before it is opened."""
        monkeypatch.setattr(cache, "get", real)
        real(name, digest).unlink()
        return path

    monkeypatch.setattr(cache, "get", get_and_lose)
    assert cache.table("a", path.name).num_rows == 2
    with pytest.raises(DatasetError, match="b is damaged"):
        cache.table("b", sha256(b"no table").hexdigest())


def test_a_file_larger_than_the_limit(cache: FileCache, store: Counting) -> None:
    small, large, after = put(store, 1), put(store, 2, 5000), put(store, 3)
    cache.get(*small)
    assert cache.get(*large).read_bytes() == content(2, 5000)
    assert held(cache.folder) == {large[1]: 5000}
    cache.get(*after)
    assert held(cache.folder) == {after[1]: 100}


def test_a_use_is_noted_at_most_once_a_minute(cache: FileCache, store: Counting) -> None:
    path = cache.get(*put(store, 1))
    now = time.time()
    for age, noted in ((30, False), (90, True)):
        os.utime(path, (now - age, now - age))
        cache.get("", path.name)
        assert (path.stat().st_mtime > now - 1) is noted


def test_what_killed_downloads_left_goes_when_it_is_old(cache: FileCache, store: Counting) -> None:
    file = put(store, 1)
    cache.folder.mkdir()
    old, young = (cache.folder / f"{letter * 64}{PART}" for letter in "ab")
    for part in (old, young):
        part.write_bytes(bytes(300))
    os.utime(old, (1, 1))
    other = cache.folder / "somebody's notes"
    other.write_bytes(bytes(5000))
    cache.get(*file)
    assert set(held(cache.folder)) == {young.name, other.name, file[1]}, (
        "what is not ours stays, and does not count"
    )


_SIZES = (0, 10, 200, 450, 900, 1001)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counting, list[tuple[str, str]]]:
    store = Counting(str(tmp_path_factory.mktemp("far")))
    return store, [put(store, number, _SIZES[number % len(_SIZES)]) for number in range(len(_SIZES) * 3)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_SIZES) * 3 - 1), st.booleans()), max_size=25))
def test_the_oldest_go_and_no_more_than_must(
    tmp_path_factory: pytest.TempPathFactory,
    far: tuple[Counting, list[tuple[str, str]]],
    asked: list[tuple[int, bool]],
) -> None:
    """Against a list in the order of last use; in between, files are removed by other hands."""
    store, files = far
    size = {digest: _SIZES[number % len(_SIZES)] for number, (_, digest) in enumerate(files)}
    cache = FileCache(store, 1000, tmp_path_factory.mktemp("near"))
    model: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOUCH_S", -1.0)
        for number, is_removed in asked:
            name, digest = files[number]
            if is_removed and model:
                (cache.folder / model.pop(number % len(model))).unlink()
            before = len(store.fetched)
            assert cache.get(name, digest).stat().st_size == size[digest]
            assert (len(store.fetched) > before) is (digest not in model)
            if digest in model:
                model.remove(digest)
            elif sum(size[one] for one in model) + size[digest] > 1000:
                while model and sum(size[one] for one in model) > max(0, 900 - size[digest]):
                    model.pop(0)
            model.append(digest)
            assert set(held(cache.folder)) == set(model)


# -- ahead --------------------------------------------------------------------------------------------


def test_fetched_ahead(cache: FileCache, store: Counting) -> None:
    files = [put(store, number, 50) for number in range(12)]
    store.put(files[3][0], b"damaged")
    cache.prefetch([*files, *files])
    wait_for(lambda: not cache._threads)
    assert len(held(cache.folder)) == 11
    assert sorted(store.fetched) == sorted(name for name, _ in files)
    for number, file in enumerate(files):
        if number == 3:
            with pytest.raises(DatasetError, match="is damaged"):
                cache.get(*file)
        else:
            assert cache.get(*file).read_bytes() == content(number, 50)
    assert len(store.fetched) == 13


def test_a_file_on_its_way_is_waited_for(cache: FileCache, store: Counting) -> None:
    files = [put(store, number) for number in range(2)]
    store.pause_s = 0.3
    cache.prefetch(files)
    wait_for(lambda: len(store.fetched) == 2)
    assert not any((cache.folder / digest).exists() for _, digest in files)
    for number, file in enumerate(files):
        assert cache.get(*file).read_bytes() == content(number)
    assert len(store.fetched) == 2


def test_closing_stops_downloads(tmp_path: Path, store: Counting) -> None:
    files = [put(store, number) for number in range(9)]
    cache = FileCache(store, 1000, tmp_path / "near", threads=2)
    store.pause_s = 0.2
    with cache:
        cache.prefetch(files)
        wait_for(lambda: len(store.fetched) == 2)
        begun = time.monotonic()
    assert time.monotonic() - begun < 2 and not cache._threads
    assert held(cache.folder) == {} and len(store.fetched) == 2, "two at a time, and nothing is left of them"
    store.pause_s = 0
    assert cache.get(*files[8]).exists()
    cache.prefetch(files)
    wait_for(lambda: not cache._threads)
    assert len(held(cache.folder)) == 9


def test_it_pickles_and_forks_without_its_threads(tmp_path: Path, store: Counting) -> None:
    """A child that was forked while its parent fetched must not keep the parent's lock, nor wait for its threads."""
    first, second, third = (put(store, number) for number in range(3))
    cache = FileCache(store, 1000, tmp_path / "near", threads=2)
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert (again.folder, again.limit_bytes, again.store.url) == (cache.folder, 1000, store.url)
    store.pause_s = 0.4
    cache.prefetch([first, second])
    wait_for(lambda: len(store.fetched) == 2)
    child = os.fork()
    if child == 0:  # no exception may reach pytest's copy
        code = 1
        try:
            cache.prefetch([third])
            wait_for(lambda: not cache._threads)
            code = 0 if (cache.folder / third[1]).exists() and cache.get(*first).exists() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    cache.close()


# -- processes ----------------------------------------------------------------------------------------

STUCK = """
import os, sys, time
from fourmill.shards.cache import FileCache
from fourmill.storage import Store

class Stuck(Store):
    def parts(self, name, size):
        yield self.read(name)[:40]
        child = os.fork()  # as a data loader may while another thread fetches; it lives on
        if child:
            print("half", child, flush=True)
        time.sleep(3600)

FileCache(Stuck(sys.argv[1]), 1000, sys.argv[2]).get(*sys.argv[3:])
"""

READER = """
import random, sys
from pathlib import Path
from fourmill.shards.cache import FileCache
from fourmill.storage import Store

def main():
    url, folder, *files = sys.argv[1:]
    pairs = list(zip(files[::2], files[1::2]))
    with FileCache(Store(url), 1 << 30, folder, threads=2) as cache:
        print("ready", flush=True)
        sys.stdin.readline()
        cache.prefetch(pairs)
        random.shuffle(pairs)
        for name, digest in pairs:
            assert cache.get(name, digest).stat().st_size == 100_000
main()
"""


def start(script: str, *arguments: str | Path) -> tuple[subprocess.Popen[str], str]:
    """The process, and what it says when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout.readline()


def test_a_download_that_is_killed_blocks_nobody(cache: FileCache, store: Counting) -> None:
    file = put(store, 1)
    process, said = start(STUCK, store.url, cache.folder, *file)
    try:
        assert set(held(cache.folder)) == {file[1] + PART} and not (cache.folder / file[1]).exists()
        cache.prefetch([file])
        wait_for(lambda: not cache._threads)
        assert store.fetched == [], "somebody is at it"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert cache.get(*file).read_bytes() == content(1)
    finally:
        os.kill(int(said.split()[1]), signal.SIGKILL)
        process.kill()
        process.communicate()
    assert held(cache.folder) == {file[1]: 100}


@pytest.fixture(scope="module")
def server() -> Iterator[Flaky]:
    with s3_server() as flaky:
        yield flaky


def test_processes_fetch_each_file_once(tmp_path: Path, server: Flaky) -> None:
    s3fs.S3FileSystem().mkdir("remote")
    store = Store("s3://remote/ds")
    files = [put(store, number, 100_000) for number in range(12)]
    arguments = [text for file in files for text in file]
    processes = [start(READER, store.url, tmp_path, *arguments)[0] for _ in range(4)]
    server.reads.clear()
    for process in processes:
        process.communicate("go\n", timeout=60)
        assert process.returncode == 0
    assert server.reads == {f"/remote/ds/{name}": 1 for name, _ in files}
    assert {digest: 100_000 for _, digest in files} == held(tmp_path)


def test_bad_luck_is_tried_again(tmp_path: Path, server: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 20_000)
    s3fs.S3FileSystem().mkdir("flaky")
    store = Store("s3://flaky/ds")
    files = [put(store, number, 100_000) for number in range(3)]
    monkeypatch.setattr(server, "share", 0.2)
    failed = server.failed
    with FileCache(store, 1 << 30, tmp_path) as cache:
        for number, file in enumerate(files):
            assert cache.get(*file).read_bytes() == content(number, 100_000)
    assert server.failed > failed
