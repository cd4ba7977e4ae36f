"""The commit protocol: whatever is killed, whenever, running the same command again ends with the same bytes."""

from __future__ import annotations

import random
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_builds import (
    ORACLES,
    data_files,
    environment,
    family,
    kill_all,
    receipts,
    run_command,
    small_config,
    small_content,
    started,
    wait_until,
    with_tokenizers,
    without_ray,
    write_config,
)

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
    assert build_with_crashes(url, names, 5, 9, range(0, writes, 3)) > 3
    left = [path for path in url.rglob(".*.tmp") if path.is_file()]
    assert len(left) > 3
    dataset = Dataset(str(url))
    found = status(dataset)
    assert found.complete and found.samples == 9
    for path in left:
        folder = str(path.parent.relative_to(url))
        assert not any(name.startswith(".") for name in dataset.store.names(folder))


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Files of more than 3,000 bytes cannot be written: one line, no half file, and later the run finishes."""
    names = ("det", "rgb_pixels")
    expected, _ = uninterrupted(names, 5, 9)
    url = tmp_path / "ds"
    content = small_content(url, {n: FITTED[n] for n in names}, shard_size=5, count=9)
    config = write_config(tmp_path / "c.yaml", content)
    script = Path(__file__).parents[1] / "small_builds.py"
    command: list[str | Path] = [sys.executable, script, "build", config, "--no-prefect"]
    limit = 3000
    full = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert full.returncode == 1, full.stderr
    assert full.stderr.count("\n") == 1 and "OSError" in full.stderr and "File too large" in full.stderr
    assert not list(url.rglob(".*.tmp"))
    with without_ray():
        build(small_config(url, {n: FITTED[n] for n in names}, shard_size=5, count=9))
    assert_same_dataset(url, expected)


# -- real processes, really killed --------------------------------------------------------------------

COUNT = 24


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(a dataset built in one go and without Ray, the modalities with its tokenizers given)"""
    fitted, _ = uninterrupted(tuple(sorted(FITTED)), 4, 12)
    modalities = with_tokenizers(fitted, FITTED)
    url = tmp_path_factory.mktemp("reference") / "ds"
    with without_ray():
        build(small_config(url, modalities, count=COUNT))
    return url, modalities


def count_files(url: Path, pattern: str) -> int:
    return sum(1 for path in url.glob(pattern) if not path.name.startswith("."))


def resumes_after(
    tmp_path: Path, modalities: Mapping[str, Any], moments: list[tuple[str, int]], **changes: Any
) -> Path:
    """Kill one build after the other when so many files of a pattern are there, then let one finish.

    The pattern "seconds" counts tenths of a second since the process began to write.
    """
    url = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", small_content(url, modalities, count=COUNT, **changes))
    for pattern, number in moments:
        there = pattern != "seconds" and count_files(url, pattern) >= number  # a build before it got so far
        with started("build", config, "--no-prefect", cwd=tmp_path) as process:
            if pattern == "seconds":
                runs = count_files(url, "runs/*.yaml")
                wait_until(lambda: count_files(url, "runs/*.yaml") > runs, 120, "a run", process)  # noqa: B023
                time.sleep(number / 10)
            else:
                wait_until(lambda: count_files(url, pattern) >= number, 120, pattern, process)  # noqa: B023
            if process.poll() is None:
                count = kill_all(process.pid)
                assert count > 3 or there or not pattern.startswith("receipts")  # driver, raylet and workers
                assert process.wait() == -signal.SIGKILL
            else:
                assert process.returncode == 0, (tmp_path / "output.txt").read_text()
        assert not family(process.pid)
    done = run_command("build", config, "--no-prefect", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    return url


@pytest.mark.long
def test_build_killed_and_run_again(tmp_path: Path, reference: tuple[Path, dict[str, Any]]) -> None:
    """Driver, raylet and workers die when a receipt appears; the next run finishes, to the same bytes."""
    expected, modalities = reference
    url = resumes_after(tmp_path, modalities, [("receipts/*/*/shard-*.json", 7)])
    assert_same_dataset(url, expected)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_build_killed_at_many_moments(tmp_path: Path, reference: tuple[Path, dict[str, Any]]) -> None:
    """When the k-th data file, tokenizer or receipt appears, and at random times; nothing is given beforehand."""
    expected, _ = uninterrupted(tuple(sorted(FITTED)), 4, COUNT)
    draw = random.Random(7)
    moments = [
        ("dataset.yaml", 1),
        ("receipts/samples/*/recipe.json", 1),
        ("samples/*.arrow", 2),
        ("tokenizers/*/*/card.yaml", 1),
        ("tokenizers/*/*/origin.json", 3),
        ("tokens/*/*.arrow", 1),
        ("seconds", draw.randint(1, 150)),
        ("receipts/*/*/shard-*.json", 13),
        ("labels/*/*.tar", 5),
        ("seconds", draw.randint(1, 150)),
        ("tokens/*/*.arrow", 17),
    ]
    url = resumes_after(tmp_path, FITTED, moments)
    assert_same_dataset(url, expected)


def test_sigterm_stops_in_good_order(tmp_path: Path, reference: tuple[Path, dict[str, Any]]) -> None:
    expected, modalities = reference
    url = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", small_content(url, modalities, count=COUNT))
    with started("build", config, "--no-prefect", cwd=tmp_path) as process:
        wait_until(lambda: count_files(url, "runs/*.yaml") > 0, 120, "a run", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3
        wait_until(lambda: not family(process.pid), 20, "the end of every Ray process")
    assert "the same command goes on from here" in (tmp_path / "output.txt").read_text()
    with without_ray():
        build(small_config(url, modalities, count=COUNT))
    assert_same_dataset(url, expected)


@pytest.mark.ray
def test_two_builds_at_once(tmp_path: Path, reference: tuple[Path, dict[str, Any]], cluster: None) -> None:
    """Both end well, with one set of files, and hardly ever make the same shard."""
    _, modalities = reference
    several = {name: modalities[name] for name in ("caption", "det", "rgb_pixels")}
    count, url, expected = 160, tmp_path / "ds", tmp_path / "expected"
    engine = {"batch_size": 2, "device": "cpu", "replicas": 1}
    config = small_config(url, several, count=count, shard_size=2, engine=engine)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: build(config), range(2)))
    assert all(result.status.complete for result in results)
    assert all(result.rows_labelled for result in results), "one waited for the other"
    assert sum(result.rows_labelled for result in results) <= 1.2 * count
    with without_ray():
        build(config.model_copy(update={"dataset": str(expected)}))
    assert_same_dataset(url, expected)


@pytest.mark.long
def test_two_drivers_at_once(tmp_path: Path) -> None:
    """Two machines that know nothing of each other, fitting included."""
    expected, _ = uninterrupted(tuple(sorted(FITTED)), 4, COUNT)
    url = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", small_content(url, FITTED, count=COUNT))
    with (
        started("build", config, "--no-prefect", cwd=tmp_path) as one,
        started("build", config, "--no-prefect", cwd=tmp_path) as two,
    ):
        codes = one.wait(240), two.wait(240)
    assert codes == (0, 0), (tmp_path / "output.txt").read_text()
    assert_same_dataset(url, expected)
