"""Checkpoints of a training run: whole folders that appear at once, safetensors and JSON only.

    OUT/checkpoints/step-00000200/
      model.safetensors, config.json       the model: all that generation needs
      optimizer.safetensors                of every parameter what its optimizer keeps: AdamW's both moments and step
                                           count, Muon's average
      state.json                           step, position in the data, configuration, snapshot, versions,
                                           and size and sha256 of the other files

A folder is written under a hidden name, flushed and renamed; one that does not match its state.json is skipped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fourmill
from fourmill.errors import CheckpointError, FourmillError
from fourmill.train.model import FourMill
from fourmill.train.optimizer import Optimizers, moments
from fourmill.train.order import Position
from fourmill.train.presets import ModelConfig
from fourmill.train_config import TrainConfig

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_log = logging.getLogger("fourmill.train")


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands: ``step`` steps are done and ``position`` is that of the last batch they read."""

    step: int
    position: Position
    snapshot: str
    config: dict[str, Any]  # TrainConfig.identity()
    versions: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)  # snapshots of other datasets that are mixed in


def versions() -> dict[str, str]:
    """The software that a run depends on; kept for the record, never compared."""
    return {
        "fourmill": fourmill.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def save(out_dir: Path, model: FourMill, optimizer: Optimizers, state: TrainState, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep``. Returns its folder."""
    parent = out_dir / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"step-{state.step:08d}"
    temporary = parent / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(_weights(model), temporary / "model.safetensors", {"format": "pt"})
    save_file(_moments(model, optimizer), temporary / "optimizer.safetensors", {"format": "pt"})
    (temporary / "config.json").write_text(model.config.to_json())
    files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
    content = {"format": FORMAT, **asdict(state), "files": files}
    (temporary / "state.json").write_text(json.dumps(content, indent=1))
    for path in temporary.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        _sync(path)
    _sync(temporary)
    if final.exists():  # a damaged one of the same step
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(parent)
    for old in _folders(out_dir)[keep:]:
        shutil.rmtree(old)
    return final


def newest(out_dir: Path) -> Path | None:
    """The newest complete checkpoint. Damaged ones are skipped with a message."""
    for folder in _folders(out_dir):
        try:
            read_state(folder)
        except CheckpointError as error:
            _log.warning("skipping a damaged checkpoint: %s", error)
            continue
        return folder
    return None


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint, after all of its files were checked against it."""
    path = folder / "state.json"
    try:
        content = json.loads(path.read_text())
        for name, (size, digest) in content["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size or _fingerprint(file)[1] != digest:
                raise CheckpointError(f"{file} is missing, cut short or changed; remove {folder}")
        where = content["position"]
        position = Position(int(where["samples"]), tuple(float(epoch) for epoch in where["epochs"]))
        return TrainState(
            content["step"],
            position,
            content["snapshot"],
            content["config"],
            content["versions"],
            content.get("others", []),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove {folder}") from error


def check_same_run(state: TrainState, snapshots: Sequence[str], config: TrainConfig, out_dir: Path) -> None:
    """Refuse to go on with other snapshots or another configuration than the run began with."""
    begun, asked_for = (
        ", ".join(digest[:12] for digest in digests)
        for digests in ([state.snapshot, *state.others], snapshots)
    )
    if begun != asked_for:
        raise CheckpointError(
            f"{out_dir} was trained on snapshot {begun}, not {asked_for}; give another output folder"
        )
    asked = config.identity()
    for name in sorted(asked.keys() | state.config.keys()):
        if asked.get(name) != state.config.get(name):
            raise CheckpointError(
                f"{out_dir} was trained with {name} = {state.config.get(name)!r}, now it is {asked.get(name)!r}; "
                "restore the value or give another output folder"
            )


def restore(folder: Path, model: FourMill, optimizer: Optimizers) -> None:
    """Put a checkpoint's weights and moments into a model and its optimizer."""
    _load_weights(folder, model)
    tensors = _read(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        owner = optimizer.owner(parameter)
        try:
            entry = {moment: tensors[f"{moment}.{name}"] for moment in moments(owner)}
        except KeyError as error:
            raise CheckpointError(f"{folder}/optimizer.safetensors lacks {error}; remove {folder}") from error
        owner.state[parameter] = {moment: value.to(parameter.device) for moment, value in entry.items()}


def load_model(path: Path | str, device: str = "cpu") -> FourMill:
    """The model of a checkpoint's folder, or of the newest checkpoint of a run's output folder, in eval mode."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        found = newest(folder)
        if found is None:
            raise CheckpointError(
                f"{path} holds no complete checkpoint; give the output folder of a training run"
            )
        folder = found
    try:
        config = ModelConfig.from_json((folder / "config.json").read_text(), str(folder / "config.json"))
    except OSError as error:
        raise CheckpointError(f"{folder}/config.json cannot be read: {error}") from error
    model = FourMill(config, seed=None)
    _load_weights(folder, model)
    return model.to(device).eval()


def _load_weights(folder: Path, model: FourMill) -> None:
    try:
        model.load_state_dict(_read(folder / "model.safetensors"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}/model.safetensors does not fit its config.json: {reason}") from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _weights(model: FourMill) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _moments(model: FourMill, optimizer: Optimizers) -> dict[str, torch.Tensor]:
    def entries() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            owner = optimizer.owner(parameter)
            state = owner.state.get(parameter)
            if not state:
                raise FourmillError(f"the optimizer has no state for {name}; a checkpoint needs a step first")
            for moment in moments(owner):
                yield f"{moment}.{name}", state[moment].contiguous()

    return dict(entries())


def _folders(out_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    parent = out_dir / FOLDER
    found = [path for path in parent.iterdir() if _NAME.fullmatch(path.name)] if parent.is_dir() else []
    return sorted(found, reverse=True)


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as stream:
        return path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
