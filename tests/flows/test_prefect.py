"""Flow runs on a real Prefect server: they show what happened, and a server that dies stops nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from small_builds import (
    ORACLES,
    environment,
    family,
    kill_all,
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

MODALITIES: dict[str, Any] = {"rgb_pixels": {}, "depth": ORACLES["depth"]}
TESTS = Path(__file__).resolve().parent.parent


@contextmanager
def prefect_server(home: Path) -> Iterator[tuple[str, int]]:
    """(API's URL, the server's process), up and healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.txt").open("w") as log:
        process = subprocess.Popen(
            command, env=server_environment(home), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: answers(url), 150, "the server", process)
        assert process.poll() is None, (home / "server.txt").read_text()[-2000:]
        yield url, process.pid
    finally:
        kill_all(process.pid)
        process.wait()


def server_environment(home: Path) -> dict[str, str]:
    return environment(PREFECT_HOME=str(home), PREFECT_SERVER_ANALYTICS_ENABLED="false")


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        time.sleep(0.2)
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home) as (url, _):
        yield url, home


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    url = tmp_path_factory.mktemp("fitted") / "ds"
    with without_ray():
        build(small_config(url, MODALITIES, count=8))
    return with_tokenizers(url, MODALITIES)


def run_here(*arguments: str | Path, cwd: Path, url: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The command line on that server, in a process that does without Ray."""
    env = server_environment(home) | {"PREFECT_API_URL": url, "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [sys.executable, "-m", "small_builds", *map(str, arguments)], env=env, cwd=cwd, capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip


def filtered(url: str, what: str) -> list[dict[str, Any]]:
    response = httpx.post(f"{url}/{what}/filter", json={})
    response.raise_for_status()
    return list(response.json())


def test_runs_are_shown_with_their_tasks(
    tmp_path: Path, server: tuple[str, Path], given: dict[str, Any]
) -> None:
    """A finished build is Completed; one with work missing is Failed, and exits with 3."""
    url, home = server
    dataset = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", small_content(dataset, given, count=8))
    done = run_here("build", config, cwd=tmp_path, url=url, home=home)
    assert done.returncode == 0, done.stderr
    assert status(Dataset(str(dataset))).complete
    (run,) = filtered(url, "flow_runs")
    assert run["state_name"] == "Completed"
    (flow,) = filtered(url, "flows")
    assert flow["name"] == "build_dataset" and run["flow_id"] == flow["id"]
    tasks = {task["name"].rsplit("-", 1)[0]: task["state_name"] for task in filtered(url, "task_runs")}
    assert tasks == {"Label and tokenize": "Completed"}
    (artifact,) = filtered(url, "artifacts")
    assert artifact["type"] == "progress" and artifact["flow_run_id"] == run["id"]
    assert "8 of 8 images" in artifact["description"]

    stale = {**given, "depth": {**given["depth"], "precision": "bf16"}}
    config = write_config(tmp_path / "stale.yaml", small_content(dataset, stale, count=8))
    done = run_here("build", config, cwd=tmp_path, url=url, home=home)
    assert done.returncode == 3
    assert "--redo-stale" in done.stderr and "Traceback" not in done.stderr + done.stdout
    states = sorted(run["state_name"] for run in filtered(url, "flow_runs"))
    assert states == ["Completed", "Failed"]


def test_a_server_that_is_not_there(tmp_path: Path, given: dict[str, Any]) -> None:
    """The work is done without it, and says so."""
    config = write_config(tmp_path / "c.yaml", small_content(tmp_path / "ds", given, count=4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    done = run_here("build", config, cwd=tmp_path, url=nobody, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"no server answers at {nobody}" in done.stdout
    assert status(Dataset(str(tmp_path / "ds"))).complete


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_server_that_dies_in_the_middle(tmp_path: Path, given: dict[str, Any]) -> None:
    """Killed when the first receipt appears: the build goes on, and ends with exit status 0."""
    dataset = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", small_content(dataset, given, count=80))
    with prefect_server(tmp_path) as (url, pid):
        env = {"PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path)}
        with started("build", config, cwd=tmp_path, **env) as process:
            wait_until(lambda: any(dataset.glob("receipts/*/*/shard-*.json")), 200, "a receipt", process)
            assert process.poll() is None
            assert kill_all(pid) > 0
            assert process.wait(300) == 0, (tmp_path / "output.txt").read_text()
    assert status(Dataset(str(dataset))).complete


@pytest.mark.long
@pytest.mark.timeout(600)
def test_without_a_server_prefect_starts_its_own(tmp_path: Path, given: dict[str, Any]) -> None:
    dataset = tmp_path / "ds"
    config = write_config(tmp_path / "c.yaml", small_content(dataset, given, count=8))
    with started("build", config, cwd=tmp_path, PREFECT_HOME=str(tmp_path / "home")) as process:
        assert process.wait(300) == 0, (tmp_path / "output.txt").read_text()
        wait_until(lambda: not family(process.pid), 30, "the end of its server")
    assert status(Dataset(str(dataset))).complete
    assert (tmp_path / "home").is_dir() and not os.path.exists(tmp_path / "prefect.db")
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
