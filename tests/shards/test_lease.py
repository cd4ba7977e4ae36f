"""A declared single writer: a second one is refused where it can be seen, and what a dead one left is taken over."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fourmill import lease
from fourmill.errors import ConfigError, WorkMissing
from fourmill.lease import LEASE, Lease, single_writer_lease
from fourmill.storage import Store


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    yield


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "ds") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_a_second_writer_is_refused(store: Store) -> None:
    with single_writer_lease(store):
        with (
            pytest.raises(ConfigError, match=rf"process {os.getpid()} on .*last seen"),
            single_writer_lease(store),
        ):
            pytest.fail("two writers")
        assert store.names("") == [], "a listing does not show it"
    assert not store.exists(LEASE)
    with single_writer_lease(store):
        pass


def test_it_is_renewed(store: Store) -> None:
    with single_writer_lease(store):
        first = store.entry(LEASE).modified
        end = time.monotonic() + 20
        while store.entry(LEASE).modified == first:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_what_a_dead_writer_left_is_taken_over(tmp_path: Path) -> None:
    """Judged by the store's clock: by what the store says of a file that is written now."""
    store = Store(str(tmp_path / "ds"))
    dead = Lease(store)
    dead.acquire()
    old = time.time() - lease.EXPIRES_S - 5
    os.utime(store.path(LEASE), (old, old))
    with single_writer_lease(store) as held:
        assert not held.is_lost
    recent = time.time() - lease.EXPIRES_S + 60
    dead.acquire()
    os.utime(store.path(LEASE), (recent, recent))
    with pytest.raises(ConfigError, match="is being written by"), single_writer_lease(store):
        pytest.fail("it may be alive")


def test_the_clock_is_the_store_s(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's may be decades off: a living writer stays one."""
    with single_writer_lease(store):
        monkeypatch.setattr(time, "time", lambda: 0.0)
        with pytest.raises(ConfigError), single_writer_lease(store):
            pytest.fail("two writers")


def test_a_writer_that_lost_its_place_says_so_and_leaves_the_other_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 60.0)
    with pytest.raises(WorkMissing, match="another flow took over"), single_writer_lease(store):
        store.put(LEASE, b'{"token": "somebody else"}')
    assert store.read(LEASE) == b'{"token": "somebody else"}'


def test_of_two_that_begin_at_once_one_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writes between this one's look and its own writing: who is overwritten sees it."""
    monkeypatch.setattr(lease, "_age", lambda store: None)
    original = Lease._write

    def both(self: Lease) -> None:
        original(self)
        store.put(LEASE, b'{"token": "somebody else", "owner": "the other"}')

    monkeypatch.setattr(Lease, "_write", both)
    with pytest.raises(ConfigError, match="written by the other"):
        Lease(store).acquire()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_lease_that_cannot_be_read_is_none(store: Store, damage: bytes) -> None:
    store.put(LEASE, damage)
    with single_writer_lease(store):
        pass


def test_a_lost_place_is_noticed_while_the_work_goes_on(store: Store) -> None:
    with pytest.raises(WorkMissing, match="another flow took over"), single_writer_lease(store) as held:
        held.check()

        def noticed() -> bool:
            store.put(LEASE, b'{"token": "somebody else"}')  # again, where it was just being renewed
            time.sleep(0.03)
            return held.is_lost

        _until(noticed)
        held.check()
        pytest.fail("it is not the only writer any more")


def test_what_keeps_it_from_being_renewed_is_raised_where_the_work_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match="a fault of ours"), single_writer_lease(store) as held:

        def broken(self: Lease) -> None:
            raise TypeError("a fault of ours")

        monkeypatch.setattr(Lease, "_write", broken)
        _until(lambda: not held._thread.is_alive())
        held.check()
        pytest.fail("nobody renews it")


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
