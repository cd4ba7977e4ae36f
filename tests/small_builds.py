"""Small datasets for tests: configurations that take seconds, an engine without Ray, and datasets compared by bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from fourmill.config import Config, check_config
from fourmill.flows import cli
from fourmill.flows.engine import EngineReport
from fourmill.flows.micro_batch import MicroBatch
from fourmill.flows.plan import Plan
from fourmill.flows.resolve import Resolved
from fourmill.flows.runner import Call, Runner
from fourmill.flows.specialist import Specialist
from fourmill.shards.sources.scenes import render

#: what ends up in the dataset and must not depend on how often a run was interrupted
DATA_FOLDERS = ("samples", "tokens", "labels", "tokenizers")
#: fields of a receipt that say how and when, not what
CIRCUMSTANCES = ("environment", "timings", "digest")

ORACLES: dict[str, Any] = {
    "depth": {"labeler": "oracle_depth"},
    "normal": {"labeler": "oracle_normal"},
    "semseg": {"labeler": "oracle_semseg"},
    "det": {"labeler": "oracle_det"},
}


def small_content(
    dataset: Path | str, modalities: Mapping[str, Any], *, count: int = 24, **changes: Any
) -> dict[str, Any]:
    """A configuration's content: 64-pixel scenes in shards of four, tokenizers that are fitted in a second."""
    content: dict[str, Any] = {
        "dataset": str(dataset),
        "source": {"kind": "scenes", "count": count, "size": 64},
        "shard_size": 4,
        "decode": {"shorter_side": 64},
        "image_size": 64,
        "val_fraction": 0.2,
        "modalities": {name: dict(entry or {}) for name, entry in modalities.items()},
        "fit": {"preset": "demo", "steps": 3, "samples": 8, "batch_size": 4},
        "engine": {"batch_size": 4, "device": "cpu"},
    }
    return content | changes


def small_config(
    dataset: Path | str, modalities: Mapping[str, Any], *, count: int = 24, **changes: Any
) -> Config:
    return check_config(small_content(dataset, modalities, count=count, **changes), "test")


def with_tokenizers(dataset: Path | str, modalities: Mapping[str, Any]) -> dict[str, Any]:
    """The modalities, with the tokenizers that another dataset's build made (one of each) given by path."""
    folders = {name: list((Path(dataset) / "tokenizers" / name).iterdir()) for name in modalities}
    assert all(len(found) == 1 for found in folders.values()), folders
    return {n: {**dict(e or {}), "tokenizer": {"model": str(folders[n][0])}} for n, e in modalities.items()}


def write_images(folder: Path, names: Sequence[str], seed: int = 1, size: int = 64) -> None:
    """Rendered scenes as image files, with captions beside them; a name decides its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        scene = render(seed, int(sha256(name.encode()).hexdigest()[:6], 16), size)
        Image.fromarray(scene.image).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(scene.caption)


def write_config(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path


# -- an engine without Ray ----------------------------------------------------------------------------


def run_jobs_here(resolved: Resolved, plan: Plan, on_progress: Callable[[int, int], None]) -> EngineReport:
    """What `fourmill.flows.engine.run_jobs` does, in this process, one shard after the other; errors pass through."""
    report = EngineReport()
    if not plan.jobs:
        return report
    config = resolved.config
    specialists = [
        Specialist(
            config.dataset, [resolved.wanted[n] for n in resolved.closure(g)], config.image_size, "cpu"
        )
        for g in resolved.groups()
    ]

    def submit(
        group: int, batch: MicroBatch, labels: Sequence[str], tokens: Sequence[str], alone: bool = False
    ) -> Call:
        made = specialists[group].process(batch, labels, tokens)
        return Call(lambda: made)

    runner = Runner(config, resolved.wanted, submit, specialists[0].ready(), plan.listing)
    total = sum(plan.shards[job.shard] for job in plan.jobs)
    for job in plan.jobs:
        report.add(runner.run(job))
        on_progress(report.rows, total)
    return report


@contextmanager
def without_ray() -> Iterator[None]:
    """`build` runs its jobs in this process, with one thread as everywhere."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fourmill.flows.build.run_jobs", run_jobs_here)
        yield


# -- datasets as bytes --------------------------------------------------------------------------------


def data_files(dataset: Path | str) -> dict[str, str]:
    """sha256 of every data file by its name in the dataset; temporary (hidden) files are none."""
    root = Path(dataset)
    return {
        str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest()
        for folder in DATA_FOLDERS
        for path in sorted((root / folder).rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def receipts(dataset: Path | str) -> dict[str, Any]:
    """Every receipt and recipe by its name, without what says how and when it was made."""
    root = Path(dataset)
    found = {}
    for path in sorted((root / "receipts").rglob("*.json")):
        if not path.name.startswith("."):
            content = json.loads(path.read_text())
            found[str(path.relative_to(root))] = {k: v for k, v in content.items() if k not in CIRCUMSTANCES}
    return found


def listing(folder: Path | str) -> dict[str, str]:
    """sha256 of every file below a folder, hidden ones too: what must not change where something is refused."""
    root = Path(folder)
    return {
        str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# -- the command line ---------------------------------------------------------------------------------


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fourmill", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """One thread per process, no Prefect server of the machine's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_"))}
    return kept | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1"} | more


def call_main(*arguments: str | Path) -> int:
    """The command line in this process, without Ray and without Prefect: its exit status."""
    with without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fourmill", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


def run_command(
    *arguments: str | Path, cwd: Path, timeout: float = 240, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``fourmill ARGUMENTS`` to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**env), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


@contextmanager
def started(*arguments: str | Path, cwd: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """``fourmill ARGUMENTS`` in a session of its own; whatever is left of it is killed at the end."""
    log = cwd / "output.txt"
    with log.open("a") as sink:
        process = subprocess.Popen(
            command(*arguments), cwd=cwd, env=environment(**env), stdout=sink, stderr=sink, text=True,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_all(process.pid)
        process.wait()


def family(pid: int) -> list[int]:
    """A process and all its descendants, with whatever else shares its session; those that still run."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    zombies: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            parents[int(entry.name)], sessions[int(entry.name)] = int(fields[1]), int(fields[3])
            zombies |= {int(entry.name)} if fields[0] == "Z" else set()
    found = {p for p, session in sessions.items() if session == pid} | ({pid} & parents.keys())
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - zombies)


def kill_all(pid: int) -> int:
    """SIGKILL to a process and its whole family; returns how many there were."""
    count = 0
    for _ in range(20):
        alive = family(pid)
        if not alive:
            break
        count = max(count, len(alive))
        for one in alive:
            try:
                os.kill(one, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    return count


def wait_until(
    condition: Callable[[], bool], seconds: float, what: str, process: subprocess.Popen[Any] | None = None
) -> None:
    """Poll quickly; fails after ``seconds``. Comes back early where ``process`` has ended."""
    end = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            return
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.01)


if __name__ == "__main__":  # `python -m small_builds build ...`: the command line of a process without Ray
    sys.exit(call_main(*sys.argv[1:]))
