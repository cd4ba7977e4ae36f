"""A store's two writes, its listings, and what it does about bad luck."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, NoCredentialsError, ParamValidationError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from fourmill import retries
from fourmill.errors import DatasetError
from fourmill.retries import http_status, is_bad_luck, with_retries
from fourmill.shards.dataset import Dataset
from fourmill.storage import Store


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "ds") if request.param == "folder" else f"memory://{tmp_path.name}")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """How long was waited, without waiting."""
    found: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", found.append)
    yield found


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store in memory that is taken for a remote one with conditional puts."""
    store = Store(f"memory://{tmp_path.name}")
    store.is_remote = True
    original = store.fs.pipe_file

    def pipe_file(path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and store.fs.exists(path):
            raise FileExistsError(path)
        original(path, data)

    monkeypatch.setattr(store.fs, "pipe_file", pipe_file)
    return store


def s3_error(code: str, status: int) -> OSError:
    """As s3fs raises it."""
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "PutObject"))


# -- listing ------------------------------------------------------------------------------------------


def test_names_and_entries(store: Store) -> None:
    for name in ("a/x1.json", "a/x10.json", "a/y.json", "a/.hidden", "a/b/z.json"):
        store.put(name, name.encode())
    assert store.names("a") == ["b", "x1.json", "x10.json", "y.json"]
    assert store.names("a", "x1") == ["x1.json", "x10.json"]
    assert store.names("a", "x1.") == ["x1.json"]
    assert store.names("a", "q") == store.names("nothing") == store.names("nothing", "x") == []
    entries = store.entries("a")
    assert {n: e.size for n, e in entries.items()} == {"x1.json": 9, "x10.json": 10, "y.json": 8}
    assert store.entries("nothing") == store.walk("nothing") == {}
    assert set(store.walk("a")) == {"a/x1.json", "a/x10.json", "a/y.json", "a/.hidden", "a/b/z.json"}
    assert store.walk("a")["a/y.json"] == entries["y.json"] == store.entry("a/y.json")
    store.put("a/y.json", b"other...")
    assert store.entries("a")["y.json"].stamp != entries["y.json"].stamp
    assert abs(store.now() - store.entry("a/y.json").modified) < 60
    assert store.names("") == ["a"], "nothing is left of looking at the clock"
    with pytest.raises(FileNotFoundError):
        store.entry("a/none.json")


def test_a_path_cannot_leave_the_store(store: Store) -> None:
    for name in ("/etc/passwd", "../x", "a/../../x"):
        with pytest.raises(DatasetError, match="is not a path inside"):
            store.read(name)


# -- writing ------------------------------------------------------------------------------------------


def test_of_many_writers_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.put_if_absent("a/b", b"%d" % i), range(32)))
    assert sum(won) == 1 and store.read("a/b") == b"%d" % won.index(True)
    assert store.names("a") == ["b"] and set(store.walk("a")) == {"a/b"}


def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.put_if_absent("a/b", b"x" * 100)
    assert store.walk("") == {}


def test_a_data_file_that_is_damaged_is_replaced(store: Store) -> None:
    dataset = Dataset.create(store.url, {"shard_size": 4})
    name = dataset.put_data("tokens/depth", 0, b"values", "arrow")
    before = store.entry(name)
    assert dataset.put_data("tokens/depth", 0, b"values", "arrow") == name
    after = store.entry(name)
    if store.is_local:  # it is the same file, and only younger
        assert after.stamp.split("-")[1] == before.stamp.split("-")[1] and after.modified > before.modified
    else:
        assert after == before
    store.put(name, b"val")
    assert dataset.put_data("tokens/depth", 0, b"values", "arrow") == name
    assert store.read(name) == b"values"


def test_a_remote_file_that_is_old_is_written_again_to_be_young(
    remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put("a", b"x")
    young = remote.entry("a")
    remote.refresh("a", b"x")
    assert remote.entry("a") == young
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 86_400)
    remote.refresh("a", b"x")
    assert remote.entry("a").modified > young.modified and remote.read("a") == b"x"


# -- bad luck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (s3_error("SlowDown", 503), True), (s3_error("ServiceUnavailable", 503), True),
        (s3_error("InternalError", 500), True), (s3_error("ConditionalRequestConflict", 409), True),
        (s3_error("RequestTimeout", 408), True), (s3_error("PreconditionFailed", 412), False),
        (s3_error("NoSuchKey", 404), False), (s3_error("NoSuchBucket", 404), False),
        (s3_error("AccessDenied", 403), False), (FileNotFoundError("x"), False), (FileExistsError("x"), False),
        (TimeoutError(), True), (FSTimeoutError(), True), (ConnectionResetError(), True),
        (OSError(errno.ENOSPC, "full"), False), (ConnectionClosedError(endpoint_url="x"), True),
        (NoCredentialsError(), False), (ParamValidationError(report="x"), False), (ValueError("x"), False),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_bad_luck(error: Exception, again: bool) -> None:
    assert is_bad_luck(error) == again


def test_waits_grow_and_end(waits: list[float]) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise ConnectionResetError("reset")

    with pytest.raises(ConnectionResetError):
        with_retries(fail, "x")
    assert len(calls) == retries.ATTEMPTS == len(waits) + 1
    for step, wait in enumerate(waits):
        most = min(retries.FIRST_WAIT_S * 2**step, retries.LONGEST_WAIT_S)
        assert most / 2 <= wait <= most
    with pytest.raises(FileNotFoundError):
        with_retries(lambda: open("/no/such/file"), "x")  # noqa: SIM115
    assert len(waits) == retries.ATTEMPTS - 1, "an answer is an answer"


def flaky(call: Callable[..., Any], error: Exception, before: bool) -> Callable[..., Any]:
    """Fails once, before it has done its work or after it."""
    failed: list[int] = []

    def wrapped(*args: Any, **options: Any) -> Any:
        if failed:
            return call(*args, **options)
        failed.append(1)
        if not before:
            call(*args, **options)
        raise error

    return wrapped


@pytest.mark.parametrize("before", [True, False])
def test_a_put_whose_answer_got_lost(
    remote: Store, waits: list[float], monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """The second attempt meets the first: read back, it is this call's own."""
    monkeypatch.setattr(remote.fs, "pipe_file", flaky(remote.fs.pipe_file, ConnectionResetError(), before))
    assert remote.put_if_absent("a", b"mine")
    assert remote.read("a") == b"mine" and len(waits) == 1
    assert not remote.put_if_absent("a", b"another's") and remote.read("a") == b"mine"


@pytest.mark.parametrize("code", [("PreconditionFailed", 412), ("ConditionalRequestConflict", 409)])
def test_a_name_that_is_taken_however_the_store_says_it(
    remote: Store, waits: list[float], monkeypatch: pytest.MonkeyPatch, code: tuple[str, int]
) -> None:
    """A 412 is the answer; after a 409 (two at the same moment) it is asked again, and then there is one."""
    error, original = s3_error(*code), remote.fs.pipe_file
    assert http_status(error) == code[1]

    def racing(path: str, data: bytes, mode: str = "overwrite") -> None:
        if not remote.fs.exists(path):
            original(path, b"another's")
            raise error
        original(path, data, mode=mode)

    monkeypatch.setattr(remote.fs, "pipe_file", racing)
    assert not remote.put_if_absent("a", b"mine")
    assert remote.read("a") == b"another's" and len(waits) == (code[1] == 409)


def test_reads_and_listings_are_tried_again(
    remote: Store, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put("a/b", b"x")
    calls: list[tuple[str, Callable[[], Any], Any]] = [
        ("cat_file", lambda: remote.read("a/b"), b"x"),
        ("exists", lambda: remote.exists("a/b"), True),
        ("ls", lambda: remote.names("a"), ["b"]),
        ("find", lambda: list(remote.walk("a")), ["a/b"]),
        ("info", lambda: remote.size("a/b"), 1),
    ]
    for method, call, expected in calls:
        with monkeypatch.context() as patch:
            patch.setattr(
                remote.fs, method, flaky(getattr(remote.fs, method), s3_error("SlowDown", 503), True)
            )
            assert call() == expected, method
    assert len(waits) == len(calls)


def test_local_errors_are_not_tried_again(tmp_path: Path, waits: list[float]) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory"):
        store.put("a", b"x")
    assert not store.exists("b") and store.read_if_exists("b") is None and waits == []
