"""The doctor: what would go wrong after hours of work, looked for before it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Literal

from packaging.version import Version
from rich import box
from rich.table import Table

from fourmill.checkpoints import Checkpoint, cached_snapshot
from fourmill.config import Config
from fourmill.errors import FourmillError
from fourmill.flows.engine import device_of
from fourmill.flows.resolve import Resolved, resolve
from fourmill.flows.status import human_bytes
from fourmill.shards.decode import RejectedImage, decode_frame
from fourmill.shards.sources.base import make_source
from fourmill.storage import Store

State = Literal["ok", "warn", "fail"]
GB = 10**9
#: resident memory of a process that has imported torch and transformers, and of Ray with its object store
ACTOR_BYTES, RAY_BYTES = 0.5 * GB, 1.0 * GB
PROBES = 16  # source rows that are looked at


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    state: State
    found: str  # and, unless all is well, what to do


def examine(config: Config) -> list[Finding]:
    """Run every check; one that cannot even run is a finding too."""
    findings: list[Finding] = []
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _versions),
        ("device", lambda: _device(config)),
        ("storage", lambda: _storage(config)),
        ("prefect", _prefect),
        ("source", lambda: _source(config)),
    ]
    for name, check in checks:
        findings += _guarded(name, check)
    try:
        resolved = resolve(config)
    except FourmillError as error:
        return [*findings, Finding("modalities", "fail", str(error))]
    findings += _guarded("checkpoints", lambda: _checkpoints(resolved))
    findings += _guarded("memory", lambda: _memory(resolved))
    return findings


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except (FourmillError, OSError, ValueError) as error:
        return [Finding(name, "fail", " ".join(str(error).split()) or type(error).__name__)]


def findings_table(findings: list[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "check", "found"):
        table.add_column(heading)
    marks = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]FAIL[/red]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.check, finding.found.replace("[", r"\["))
    return table


def _versions() -> Iterator[Finding]:
    """Versions that are known to break the work together, and a torchvision that does not fit its torch."""
    names = ("torch", "transformers", "ray", "prefect", "pyarrow")
    yield Finding("versions", "ok", ", ".join(f"{name} {version(name)}" for name in names))
    for name, below, why in (
        ("fastapi", "0.155", "no Prefect server starts with it"),
        ("sqlalchemy", "2.1", "Prefect schedules silently never fire with it"),
    ):
        if Version(version(name)) >= Version(below):
            yield Finding(name, "fail", f"{version(name)}: {why}; pip install '{name}<{below}'")
    try:
        vision = version("torchvision")
    except PackageNotFoundError:
        return
    # a mismatched build can end the process that imports it, so another process does
    probe = subprocess.run(
        [sys.executable, "-c", "import torchvision; torchvision.ops.nms"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        yield Finding(
            "torchvision", "fail",
            f"{vision} does not work beside torch {version('torch')} ({last}); "
            "install the build made for this torch, or uninstall it: fourmill works without",
        )  # fmt: skip
    else:
        yield Finding("torchvision", "ok", vision)


def _device(config: Config) -> Iterator[Finding]:
    import torch

    device = device_of(config)
    if device == "cuda" and not torch.cuda.is_available():
        yield Finding("device", "fail", "engine.device is cuda and torch sees no GPU; check the driver")
    elif device == "cuda":
        yield Finding("device", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    else:
        yield Finding("device", "ok", f"cpu, {os.cpu_count()} cores")


def _storage(config: Config) -> Iterator[Finding]:
    """Write access, conditional put, and room on a local disk."""
    store = Store(config.dataset)
    local = store.local_path("")
    fresh = local is not None and not local.exists()
    try:
        honest = store.probe_conditional_put()
    except (OSError, FourmillError) as error:
        yield Finding("storage", "fail", f"cannot write to {config.dataset}: {' '.join(str(error).split())}")
        return
    finally:
        if fresh and local is not None and local.is_dir() and not any(local.iterdir()):
            local.rmdir()
    if honest:
        yield Finding("storage", "ok", f"{config.dataset} can be written, and refuses a second first write")
    elif config.engine.single_writer:
        yield Finding(
            "storage", "warn", f"{config.dataset} has no conditional put; never run two builds of it"
        )
    else:
        yield Finding(
            "storage", "fail",
            f"{config.dataset} lets a second writer replace a receipt (no conditional put); use another store, or "
            "set engine.single_writer: true and never run two builds of it",
        )  # fmt: skip
    if local is not None:
        there = next(p for p in [local, *local.parents] if p.exists())
        free = shutil.disk_usage(there).free
        state: State = "ok" if free > 5 * GB else "warn" if free > GB else "fail"
        hint = "" if state == "ok" else "; free some, or build elsewhere"
        yield Finding("disk", state, f"{human_bytes(free)} free at {there}{hint}")


def _prefect() -> Iterator[Finding]:
    from fourmill.flows import flow_runs

    url = flow_runs.PREFECT_API_URL.value()
    if not url:
        yield Finding("prefect", "ok", "no server configured: every run starts one of its own")
    elif flow_runs.server_answers():
        yield Finding("prefect", "ok", url)
    else:
        yield Finding("prefect", "warn", f"no server answers at {url}; runs will not be shown there")


def _checkpoints(resolved: Resolved) -> Iterator[Finding]:
    """Every labeler's weights: on this machine, or on a hub that can be reached."""
    for name, wanted in resolved.wanted.items():
        checkpoint = wanted.make_labeler().checkpoint if wanted.settings is not None else None
        if checkpoint is None:
            continue
        if checkpoint.folder is not None:
            yield Finding(name, "ok", f"{checkpoint.folder} ({_folder_size(checkpoint.folder)})")
            continue
        yield on_hub(name, checkpoint)
    unfitted = resolved.unfitted()
    if unfitted:
        yield Finding("tokenizers", "ok", f"to be fitted on this dataset: {', '.join(unfitted)}")


def on_hub(name: str, checkpoint: Checkpoint) -> Finding:
    """Whole in the local cache (its config.json alone is there as soon as a configuration was read), or to be fetched."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    where = f"{checkpoint.source} at {str(checkpoint.revision)[:12]}"
    folder = cached_snapshot(checkpoint, f"modalities.{name}.model")
    if folder is not None:
        return Finding(name, "ok", f"{where}, in the local cache ({_folder_size(folder)})")
    try:
        HfApi().model_info(checkpoint.source, revision=checkpoint.revision, timeout=10)
    except (HfHubHTTPError, OSError) as error:
        why = " ".join(str(error).split())[:160]
        return Finding(
            name, "fail", f"{where} is not whole in the local cache, nor can the hub be reached: {why}"
        )
    return Finding(name, "ok", f"{where}, to be fetched from the hub")


def _folder_size(folder: Path) -> str:
    return human_bytes(sum(f.stat().st_size for f in folder.iterdir() if f.is_file()))


def _memory(resolved: Resolved) -> Iterator[Finding]:
    """A rough need: Ray, and for every actor its imports and one copy of its weights in single precision."""
    config = resolved.config
    if device_of(config) != "cpu" or config.engine.address:
        return
    groups = resolved.groups()
    replicas = config.engine.replicas or max(1, (os.cpu_count() or 1) // len(groups))
    weights = 0
    for wanted in resolved.wanted.values():
        checkpoint = wanted.make_labeler().checkpoint if wanted.settings is not None else None
        if checkpoint is not None and checkpoint.folder is not None:
            weights += 2 * sum(f.stat().st_size for f in checkpoint.folder.glob("*.safetensors"))
    need = RAY_BYTES + 2 * ACTOR_BYTES + replicas * (len(groups) * ACTOR_BYTES + weights)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    state: State = "ok" if need < 0.8 * have else "warn" if need < have else "fail"
    hint = "" if state == "ok" else "; lower engine.replicas"
    yield Finding("memory", state, f"about {human_bytes(need)} needed of {human_bytes(have)}{hint}")


def _source(config: Config) -> Iterator[Finding]:
    """The first rows are listed, read and decoded."""
    source = make_source(config.source.kind, **config.source.options)
    rows = list(islice(source.rows(), PROBES))
    decode = config.decode
    readable, reasons = 0, []
    for raw in source.read(rows):
        if isinstance(raw, Exception):
            reasons.append(str(raw))
            continue
        try:
            decode_frame(raw.image, decode.shorter_side, decode.filter)
            readable += 1
        except RejectedImage as error:
            reasons.append(error.reason)
    state: State = "ok" if readable == len(rows) else "warn" if readable else "fail"
    hint = f" ({', '.join(sorted(set(reasons)))})" if reasons else ""
    yield Finding("source", state, f"{readable} of the first {len(rows)} images can be decoded{hint}")
