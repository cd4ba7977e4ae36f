"""The commit protocol under every interleaving that hypothesis can think of.

Two writers commit the same shards through the real `Dataset` and `Store`. They stop before each operation on storage, and a
schedule says who goes on and what befalls them: killed before the operation or after it, in the middle of a write, an answer
that is an error, an answer that gets lost, a listing that is old. Storage is an object store in memory, or a folder.
Whatever happens: a receipt that is seen names data that are there, and stays; running again completes; and then there is
one set of files, byte by byte that of an undisturbed run.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourmill import retries, storage
from fourmill.errors import FourmillError
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.receipts import Receipt, Recipe, data_name, receipt_name, sha256, shard_and_epoch
from fourmill.storage import Store

SHARDS = 2
IDENTITY = {"shard_size": 4}
RECIPES = {SAMPLES: Recipe("samples", {"seed": 0}), "depth": Recipe("token", {"labeler": "depth"})}
FOLDERS = {SAMPLES: SAMPLES, "depth": "tokens/depth"}
#: (column, epoch) in the order of a build: depth has a null cell at first, which is tried again
COMMITS = [(SAMPLES, 0), ("depth", 0), ("depth", 1)]

FAULTS = ["killed before", "killed after", "killed amid", "error", "answer lost", "old listing"]
#: who goes on (by turns where there is no more schedule), and what befalls them
Step = tuple[int, str | None]
STEPS = st.tuples(st.integers(0, 1), st.one_of(st.none(), st.none(), st.none(), st.sampled_from(FAULTS)))
SCHEDULES = st.lists(STEPS, max_size=70)


class Killed(BaseException):
    """SIGKILL: nothing that follows in that writer has an effect."""


class Writer(threading.Thread):
    """Runs ``work`` up to its next operation on storage, whenever it is its turn."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._fault: str | None = None
        self.is_dead = self.is_done = False
        self.error: BaseException | None = None
        self.start()
        self._stopped.acquire()

    def run(self) -> None:
        try:
            self.wait_for_turn()
            self._work()
        except (Killed, FourmillError, OSError) as end:  # the ways in which an attempt ends
            self.error = end
        except BaseException as bug:
            self.error = bug
            raise
        finally:
            self.is_done = True
            self._stopped.release()

    def wait_for_turn(self) -> str | None:
        self._stopped.release()
        self._turn.acquire()
        return self._fault

    def step(self, fault: str | None) -> None:
        self._fault = fault
        self._turn.release()
        self._stopped.acquire()


def operation(
    call: Callable[[], Any], amid: Callable[[], Any] | None = None, old: Callable[[], Any] | None = None
) -> Any:
    """One operation on storage by the writer of this thread, with what befalls it; by others it is just done."""
    writer = threading.current_thread()
    if not isinstance(writer, Writer):
        return call()
    if writer.is_dead:
        raise Killed
    fault = writer.wait_for_turn()
    if fault == "killed amid" and amid is not None:
        amid()
    if fault in ("killed before", "killed amid"):
        writer.is_dead = True
        raise Killed
    if fault == "error":
        raise OSError(errno.EBUSY, "SlowDown")
    result = old() if fault == "old listing" and old is not None else call()
    if fault == "killed after":
        writer.is_dead = True
        raise Killed
    if fault == "answer lost":
        raise ConnectionResetError("after the server did it")
    return result


class Objects(AbstractFileSystem):
    """An object store with conditional puts, whose operations are `operation`s. What is there: ``files``."""

    protocol = "simulated"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    before: ClassVar[list[list[str]]] = []  # earlier listings

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        def put() -> None:
            if mode == "create" and path in self.files:
                raise FileExistsError(path)
            self.before.append(list(self.files))
            self.files[path] = bytes(value)

        operation(put)  # a put that is cut off leaves nothing

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        def get() -> bytes:
            if path not in self.files:
                raise FileNotFoundError(path)
            return self.files[path]

        return bytes(operation(get))

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False,
             prefix: str = "", **kwargs: Any) -> Any:  # fmt: skip
        def listed(names: Sequence[str]) -> list[str]:
            return [name for name in names if name.startswith(f"{path}/{prefix}")]

        def old() -> list[str]:
            return listed(self.before[-5:][0] if self.before else [])

        names = operation(lambda: listed(list(self.files)), old=old)
        return {name: self.info(name) for name in names} if detail else names

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        names = sorted({f"{path}/{n[len(path) + 1 :].split('/')[0]}" for n in self.find(path)})
        return [self.info(n) for n in names] if detail else names

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if path in self.files:
            return {"name": path, "size": len(self.files[path]), "type": "file", "mtime": 1e10}
        return {"name": path, "size": 0, "type": "directory"}


class SteppingOs:
    """The module ``os``, whose changes to a folder are `operation`s."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, handle: int) -> None:
        """Nothing is flushed; a writer that is killed here has written half of its file."""
        operation(lambda: None, amid=lambda: _cut(handle))

    def link(self, source: str, target: str) -> None:
        operation(lambda: os.link(source, target))

    def replace(self, source: str, target: str) -> None:
        operation(lambda: os.replace(source, target))

    def unlink(self, path: str) -> None:
        operation(lambda: os.unlink(path))

    def listdir(self, path: str) -> list[str]:
        return list(operation(lambda: os.listdir(path)))


def _cut(handle: int) -> None:
    if not os.path.isdir(f"/proc/self/fd/{handle}"):
        os.ftruncate(handle, os.fstat(handle).st_size // 2)


# -- what is written ----------------------------------------------------------------------------------


def content(column: str, shard: int, epoch: int) -> bytes:
    return f"{column} {shard} {epoch} ".encode() * 9


def data_files() -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    return {
        data_name(FOLDERS[column], shard, content(column, shard, epoch), "arrow"): content(
            column, shard, epoch
        )
        for shard in range(SHARDS)
        for column, epoch in COMMITS
    }


def is_left(dataset: Dataset, column: str, shard: int, epoch: int) -> bool:
    short = RECIPES[column].short
    if not dataset.is_finished(column, short, shard):
        return epoch == 0
    return epoch > dataset.receipt(column, short, shard).epoch


def write_shards(url: str, name: str, shards: Sequence[int], won: list[tuple[str, str]]) -> None:
    """What a build does, as far as storage sees it. ``won``: (receipt, writer) for those that it was told are its own."""
    dataset = Dataset.create(url, IDENTITY)
    for shard in shards:
        for column, epoch in COMMITS:
            if is_left(dataset, column, shard, epoch):
                data = content(column, shard, epoch)
                file = dataset.put_data(FOLDERS[column], shard, data, "arrow")
                receipt = Receipt(
                    column=column, recipe=RECIPES[column].hash, shard=shard, rows=4, absent={} if epoch else {"x": 1},
                    presence="Dw==", keys="k", file=file, sha256=sha256(data.decode()), bytes=len(data),
                    dataset=dataset.digest, environment={"writer": name}, epoch=epoch,
                )  # fmt: skip
                if dataset.commit(RECIPES[column], receipt):
                    won.append((receipt_name(column, RECIPES[column].short, shard, epoch), name))


# -- the test -----------------------------------------------------------------------------------------


def seen(url: str) -> dict[str, bytes]:
    """Every file that is not hidden, by its name."""
    store = Store(url)
    names = [name for name in store.walk("") if not name.rsplit("/", 1)[-1].startswith(".")]
    return {name: store.read(name) for name in names}


def check(files: dict[str, bytes], before: dict[str, bytes]) -> dict[str, bytes]:
    """Receipts name data that are there and sound, and are for ever. Returns the receipts."""
    receipts = {
        n: f for n, f in files.items() if n.startswith("receipts/") and shard_and_epoch(n.rsplit("/", 1)[-1])
    }
    assert before.items() <= receipts.items(), "a receipt was changed"
    for name, raw in receipts.items():
        receipt = Receipt.from_json(raw, name)
        assert sha256(files[receipt.file]) == receipt.sha256, name
        recipe = files[f"{name.rsplit('/', 1)[0]}/recipe.json"]
        assert sha256(recipe) == receipt.recipe
    return receipts


def interleave(
    url: str, schedule: Sequence[Step], elsewhere: bool, won: list[tuple[str, str]]
) -> dict[str, bytes]:
    """Two writers under a schedule, then by turns to their end; ``elsewhere``: from either end. Returns the receipts."""
    orders = [range(SHARDS), range(SHARDS - 1, -1, -1) if elsewhere else range(SHARDS)]
    writers = [
        Writer(lambda i=i, order=order: write_shards(url, f"writer {i}", order, won))  # type: ignore[misc]
        for i, order in enumerate(orders)
    ]
    receipts: dict[str, bytes] = {}
    steps = iter(schedule)
    turn = 0
    while any(not writer.is_done for writer in writers):
        number, fault = next(steps, (turn, None))
        turn = 1 - turn
        writer = writers[number] if not writers[number].is_done else writers[1 - number]
        writer.step(fault)
        receipts = check(seen(url), receipts)
    for writer in writers:
        writer.join()
        assert writer.error is None or isinstance(writer.error, Killed | FourmillError | OSError), (
            writer.error
        )
    return receipts


def run_case(url: str, schedule: Sequence[Step], elsewhere: bool, damaged: Sequence[str]) -> None:
    """``damaged``: data files that are there from the start, with half of their content, and without receipts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries.time, "sleep", lambda seconds: None)
        for name in damaged:
            Store(url).put(name, data_files()[name][:7])
        won: list[tuple[str, str]] = []
        receipts = interleave(url, schedule, elsewhere, won)
        write_shards(url, "last", range(SHARDS), won)
    files = seen(url)
    receipts = check(files, receipts)
    assert len(receipts) == SHARDS * len(COMMITS), "running again completes"
    found = Dataset(url).receipts("depth", RECIPES["depth"].short)
    assert {shard: receipt.epoch for shard, receipt in found.items()} == dict.fromkeys(range(SHARDS), 1)
    assert all(Dataset(url).receipt("depth", r.recipe[:12], shard) == r for shard, r in found.items())
    data = {n: f for n, f in files.items() if n.split("/")[0] in (SAMPLES, "tokens")}
    assert data == data_files(), "one set of files, that of an undisturbed run"
    assert len({name for name, _ in won}) == len(won), "two writers were told that a receipt is theirs"
    for name, writer in won:
        assert Receipt.from_json(files[name], name).environment == {"writer": writer}
    assert set(files) == {"dataset.yaml", *data, *receipts} | {
        f"receipts/{column}/{recipe.short}/recipe.json" for column, recipe in RECIPES.items()
    }


@contextmanager
def object_store() -> Iterator[str]:
    fsspec.register_implementation("simulated", Objects, clobber=True)
    Objects.files, Objects.before = {}, []
    yield "simulated://bucket/ds"


@contextmanager
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", SteppingOs())
        yield f"{temporary}/ds"


DAMAGED = st.sets(st.sampled_from(sorted(data_files())), max_size=2).map(sorted)
EXPENSIVE = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=120, deadline=None, suppress_health_check=EXPENSIVE)
@given(schedule=SCHEDULES, elsewhere=st.booleans(), damaged=DAMAGED)
def test_every_interleaving_on_an_object_store(
    schedule: list[Step], elsewhere: bool, damaged: list[str]
) -> None:
    with object_store() as url:
        run_case(url, schedule, elsewhere, damaged)


@settings(max_examples=60, deadline=None, suppress_health_check=EXPENSIVE)
@given(schedule=SCHEDULES, elsewhere=st.booleans(), damaged=DAMAGED)
def test_every_interleaving_in_a_folder(schedule: list[Step], elsewhere: bool, damaged: list[str]) -> None:
    with folder() as url:
        run_case(url, schedule, elsewhere, damaged)


@pytest.mark.parametrize("place", [object_store, folder])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_at_each_step(place: Callable[[], Any], fault: str) -> None:
    """The one writer alone, from the first operation to the last, and a second one that goes on."""
    for when in range(200):
        with place() as url:
            won: list[tuple[str, str]] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(retries.time, "sleep", lambda seconds: None)
                writer = Writer(lambda url=url, won=won: write_shards(url, "first", range(SHARDS), won))  # type: ignore[misc]
                taken = 0
                while not writer.is_done:
                    writer.step(fault if taken == when else None)
                    taken += 1
                receipts = check(seen(url), {})
                write_shards(url, "second", range(SHARDS), won)
            files = seen(url)
            assert len(check(files, receipts)) == SHARDS * len(COMMITS)
            assert data_files().items() <= files.items() and len({n for n, _ in won}) == len(won)
            if writer.error is None:
                first = {n for n, raw in receipts.items() if b'"first"' in raw}
                assert first == {n for n, name in won if name == "first"}, "it does not know its own receipt"
            if taken <= when:
                return
    pytest.fail("it never ends")
