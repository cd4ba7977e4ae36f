"""Real SIGKILLs of runners, specialists and drivers in each phase of a shard's life, on one cluster that goes on.

Whatever dies: the work is finished, by the run itself or by the same command once more, to the bytes of an undisturbed run,
and no more is done twice than the design says.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from saboteur import DRIVER, RUNNER, SPECIALIST, Order, Saboteur, random_orders
from small_builds import (
    data_files,
    environment,
    kill_all,
    receipts,
    small_config,
    small_content,
    started,
    wait_until,
    with_tokenizers,
    without_ray,
    write_config,
    write_images,
)

from fourmill.flows.build import build
from fourmill.flows.status import status
from fourmill.shards.dataset import Dataset

ROWS, SHARD, BATCH = 24, 4, 2
NAMES = ("caption", "det", "rgb_pixels")


@dataclass
class World:
    """A Ray head that outlives drivers, a saboteur in all of its processes, and a dataset that nobody disturbed."""

    address: str
    saboteur: Saboteur
    photos: Path
    modalities: dict[str, Any]
    expected: Path
    env: dict[str, str]

    def content(self, url: Path, **changes: Any) -> dict[str, Any]:
        engine = {"batch_size": BATCH, "device": "cpu", "address": self.address, "replicas": 1}
        source = {"kind": "folder", "path": str(self.photos)}
        return small_content(url, self.modalities, source=source, engine=engine, shard_size=SHARD, **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    photos = root / "photos"
    write_images(photos, [f"{index:02d}.png" for index in range(ROWS)])
    source = {"kind": "folder", "path": str(photos)}
    plain: dict[str, Any] = {"caption": {}, "det": {"model": "shipped:det"}, "rgb_pixels": {}}
    expected = root / "expected"
    with without_ray():
        fitted = small_config(root / "fitted", plain, source=source, shard_size=SHARD)
        build(fitted)
        modalities = with_tokenizers(root / "fitted", plain)
        changes: dict[str, Any] = {"engine": {"batch_size": BATCH, "device": "cpu"}, "shard_size": SHARD}
        build(small_config(expected, modalities, source=source, **changes))
    saboteur = Saboteur(root / "saboteur")
    token = root / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    env = environment(**saboteur.environment(), **auth)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (root / "head.log").open("w") as sink:
        head = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
                "--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false",
                "--object-store-memory=200000000",
            ],
            env=env, stdout=sink, stderr=sink, start_new_session=True,
        )  # fmt: skip
    try:

        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        wait_until(answers, 60, "the head of the cluster", head)
        extra = {**saboteur.environment(), **auth}
        yield World(f"127.0.0.1:{port}", saboteur, photos, modalities, expected, extra)
    finally:
        kill_all(head.pid)
        head.wait()


def run(world: World, config: Path, cwd: Path) -> int:
    """The command itself, in a session of its own: its exit status."""
    with started("build", config, "--no-prefect", cwd=cwd, **world.env) as process:
        return process.wait(280)


def check(world: World, url: Path) -> None:
    assert data_files(url) == data_files(world.expected)
    assert receipts(url) == receipts(world.expected)
    assert status(Dataset(str(url))).complete


def work(world: World) -> tuple[int, int]:
    """(images read by runners, modalities that specialists began) so far."""
    log = world.saboteur
    return log.count("runner", "open", "/photos/"), log.count("specialist", "fourmill.begins", ".now")


#: an image file and its caption
OPENS_PER_ROW = 2
#: a modality is labelled, then tokenized
STEPS_PER_BATCH = 2 * len(NAMES)


@pytest.mark.ray
def test_runners_and_specialists_are_killed(tmp_path: Path, world: World) -> None:
    """Nine kills in one run, which notices nothing: it ends well, with at most a shard, or a micro-batch, done twice."""
    orders = [*RUNNER.values(), *SPECIALIST.values()]
    world.saboteur.forget()
    world.saboteur.order(*orders)
    before = world.saboteur.kills()
    url = tmp_path / "ds"
    assert run(world, write_config(tmp_path / "c.yaml", world.content(url)), tmp_path) == 0, output(tmp_path)
    assert world.saboteur.open_orders() == []
    kills = world.saboteur.kills() - before
    assert kills == {"runner": len(RUNNER), "specialist": len(SPECIALIST)}
    check(world, url)
    read, steps = work(world)
    assert read <= OPENS_PER_ROW * (ROWS + SHARD * kills["runner"])
    batches = ROWS // BATCH + (SHARD // BATCH) * kills["runner"] + kills["specialist"]
    assert steps <= STEPS_PER_BATCH * batches


@pytest.mark.ray
def test_drivers_are_killed(tmp_path: Path, world: World) -> None:
    """Three runs end in the middle, the fourth finishes; what had a receipt is not made again."""
    world.saboteur.forget()
    url = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", world.content(url))
    for name in ("adds a tokenizer", "has planned"):
        world.saboteur.order(DRIVER[name])
        assert run(world, config, tmp_path) == -signal.SIGKILL, output(tmp_path)
    with started("build", config, "--no-prefect", cwd=tmp_path, **world.env) as process:
        wait_until(lambda: len(list(url.glob("receipts/det/*/shard-*.json"))) >= 2, 120, "receipts", process)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert world.saboteur.open_orders() == []
    assert run(world, config, tmp_path) == 0, output(tmp_path)
    check(world, url)
    read, _ = work(world)
    assert read <= OPENS_PER_ROW * (ROWS + 2 * SHARD), "two runners: two shards in flight"


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_hundred_random_kills(tmp_path: Path, world: World) -> None:
    draw = random.Random(20)
    before = world.saboteur.kills().total()
    for trial in range(100):
        if world.saboteur.kills().total() - before >= 100:
            break
        url = tmp_path / str(trial) / "ds"
        url.parent.mkdir()
        config = write_config(tmp_path / f"{trial}.yaml", world.content(url))
        orders: list[Order] = random_orders(draw, 6)
        world.saboteur.order(*orders)
        for _ in range(10):
            code = run(world, config, tmp_path)
            assert code in (0, -signal.SIGKILL), f"{orders}: {output(tmp_path)}"
            if code == 0:
                break
        world.saboteur.withdraw()
        check(world, url)
    assert world.saboteur.kills().total() - before >= 100


def output(tmp_path: Path) -> str:
    return (tmp_path / "output.txt").read_text()[-3000:]
