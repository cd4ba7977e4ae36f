"""The contract suite's view of processes: what belongs to the whole of one, and a labeler in one of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from fourmill.labelers.base import Labeler, LabelerSettings
from fourmill.labelers.contract_inputs import USUAL_SIZES, digest_of, make_batch, with_upstream

#: Libraries that take seconds to import: `fourmill labelers` and every command line would wait for them.
HEAVY = ("torch", "torchvision", "transformers", "diffusers", "timm", "tensorflow", "jax", "onnxruntime")
#: Environment variables that libraries set when they are imported: where they keep caches.
LIBRARIES_SET = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def process_state() -> dict[str, Any]:
    """What belongs to the whole process, and so to every other labeler in it."""
    import torch

    numpy_state: Any = np.random.get_state()
    return {
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's inference mode": torch.is_inference_mode_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's cudnn settings": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "torch's random state": digest_of([torch.get_rng_state().numpy()]),
        "numpy's random state": digest_of(list(numpy_state)),
        "numpy's error handling": dict(np.geterr()),
        "random's state": random.getstate(),
        "the working directory": os.getcwd(),
    } | {f"the environment variable {k}": v for k, v in os.environ.items() if k not in LIBRARIES_SET}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def is_named(cls: type[Labeler]) -> bool:
    """Whether another process can find the class by its name."""
    return cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def start_alone(cls: type[Labeler], settings: LabelerSettings) -> subprocess.Popen[str] | None:
    """A process that finds this class by its name, without a network; None where it has no name to be found by."""
    if not is_named(cls):
        return None
    said = {name: value for name, value in asdict(settings).items() if name != "upstream"}
    order = {"module": cls.__module__, "class": cls.__qualname__, "settings": said}
    import torch

    changed = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums are added up in the same order
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    code = "from fourmill.labelers.contract_alone import label_alone; label_alone()"
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(order)],
        env={**os.environ, **changed}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def label_alone() -> None:
    """The main function of that process: prints one JSON object as its last line."""
    from importlib import import_module

    order = json.loads(sys.argv[1])
    found: Any = import_module(order["module"])
    said: dict[str, Any] = {"heavy": [name for name in HEAVY if name in sys.modules]}
    for name in order["class"].split("."):
        found = getattr(found, name)
    try:
        with _no_sockets():
            labeler: Labeler = found(with_upstream(found, LabelerSettings(**order["settings"])))
            labeler.load()
            said["labels"] = digest_of(labeler.label(make_batch(labeler, USUAL_SIZES)))
    except Exception as error:  # noqa: BLE001 - it is told to whoever asked
        said["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    print(json.dumps(said))


@contextmanager
def _no_sockets() -> Iterator[None]:
    """Every connection and every look-up of a name fails, as on a machine without a network."""
    import socket

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no network: load() and label() must do without")

    names = ("create_connection", "getaddrinfo", "gethostbyname")
    before = {name: getattr(socket, name) for name in names}
    connect = socket.socket.connect
    try:
        for name in names:
            setattr(socket, name, refuse)
        socket.socket.connect = refuse  # type: ignore[method-assign]
        yield
    finally:
        for name, function in before.items():
            setattr(socket, name, function)
        socket.socket.connect = connect  # type: ignore[method-assign]
