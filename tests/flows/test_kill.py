"""The commit protocol: whatever is killed, whenever, running the same command again ends with the same bytes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_builds import ORACLES, data_files, receipts, small_config, without_ray

from fourmill.flows.build import build
from fourmill.flows.status import status
from fourmill.shards.dataset import Dataset
from fourmill.storage import Store

# -- crashes between any two writes, in one process ---------------------------------------------------

#: fast ones: nothing here needs a network to be fitted
QUICK: dict[str, Any] = {
    "caption": {"keep_labels": True},
    "rgb_pixels": {},
    "det": {**ORACLES["det"], "keep_labels": True},
}
FITTED: dict[str, Any] = {**QUICK, "depth": ORACLES["depth"]}


class Crash(BaseException):
    """Power off: no `except Exception` may notice it."""


@contextmanager
def crash_at(write: int) -> Iterator[list[str]]:
    """The n-th write (from 0) does not happen; half a temporary file stays behind, as when the power fails."""
    names: list[str] = []

    def counted(original: Any) -> Any:
        def call(store: Store, name: str, data: bytes) -> Any:
            if len(names) == write:
                path = Path(store.path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp").write_bytes(data[: len(data) // 2])
                raise Crash(name)
            names.append(name)
            return original(store, name, data)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "put", counted(Store.put))
        patch.setattr(Store, "put_if_absent", counted(Store.put_if_absent))
        yield names


@cache
def uninterrupted(names: tuple[str, ...], shard_size: int, count: int) -> tuple[Path, int]:
    """(a dataset that was built in one go, how many writes that took)"""
    url = Path(mkdtemp(prefix="fourmill-test-")) / "ds"
    with without_ray(), crash_at(-1) as writes:
        build(small_config(url, {n: FITTED[n] for n in names}, shard_size=shard_size, count=count))
    return url, len(writes)


def build_with_crashes(url: Path, names: tuple[str, ...], shard_size: int, count: int, crashes: Any) -> int:
    """Build, crashing at the given writes of one attempt after the other, then once to the end; crashes that came."""
    config = small_config(url, {n: FITTED[n] for n in names}, shard_size=shard_size, count=count)
    came = 0
    with without_ray():
        for write in crashes:
            with crash_at(write):
                try:
                    build(config)
                except Crash:
                    came += 1
        assert build(config).status.complete
    return came


def assert_same_dataset(url: Path, expected: Path) -> None:
    assert data_files(url) == data_files(expected)
    assert receipts(url) == receipts(expected)
    assert (url / "dataset.yaml").read_bytes() == (expected / "dataset.yaml").read_bytes()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.sets(st.sampled_from(sorted(QUICK)), min_size=1).map(lambda s: tuple(sorted(s))),
    shard_size=st.sampled_from([3, 5]),
    crashes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
)
def test_crash_between_any_two_writes(
    tmp_path_factory: pytest.TempPathFactory, names: tuple[str, ...], shard_size: int, crashes: list[int]
) -> None:
    expected, writes = uninterrupted(names, shard_size, 9)
    url = tmp_path_factory.mktemp("crash") / "ds"
    build_with_crashes(url, names, shard_size, 9, [write % writes for write in crashes])
    assert_same_dataset(url, expected)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_crash_at_every_single_write(tmp_path: Path) -> None:
    """Every write of a build with kept labels, a fitted network and a vocabulary, one after the other."""
    names = tuple(sorted(FITTED))
    expected, writes = uninterrupted(names, 5, 9)
    for write in range(writes):
        url = tmp_path / f"ds{write}"
        assert build_with_crashes(url, names, 5, 9, [write]) == 1, f"write {write} of {writes} did not come"
        assert_same_dataset(url, expected)


@pytest.mark.parametrize("file", ["vocab.json", "origin.json", "config.json", "card.yaml"])
def test_crash_while_a_tokenizer_is_added(tmp_path: Path, file: str) -> None:
    """Whichever of its files is the last to be there, the next run has a whole tokenizer again."""
    names = ("caption",)
    expected, _ = uninterrupted(names, 5, 9)
    url = tmp_path / "ds"
    config = small_config(url, {"caption": FITTED["caption"]}, shard_size=5, count=9)
    original = Store.put_if_absent

    def cut_off(store: Store, name: str, data: bytes) -> bool:
        if name.startswith("tokenizers/") and name.endswith(file):
            raise Crash(name)
        return original(store, name, data)

    with without_ray():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Store, "put_if_absent", cut_off)
            build(config)
        assert build(config).status.complete
    assert_same_dataset(url, expected)


def test_temporary_files_are_no_data(tmp_path: Path) -> None:
    """What a crash leaves behind is in no listing, no status and no receipt."""
    names = ("det", "rgb_pixels")
    url = tmp_path / "ds"
    _, writes = uninterrupted(names, 5, 9)
    assert build_with_crashes(url, names, 5, 9, range(0, writes, 3)) > 5
    left = [path for path in url.rglob(".*.tmp") if path.is_file()]
    assert len(left) > 5
    dataset = Dataset(str(url))
    found = status(dataset)
    assert found.complete and found.samples == 9
    for path in left:
        folder = str(path.parent.relative_to(url))
        assert not any(name.startswith(".") for name in dataset.store.names(folder))
