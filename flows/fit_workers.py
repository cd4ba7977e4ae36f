"""A fit by several workers of Ray Train: gradients averaged, codebooks summed, the state kept by the first of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourmill.errors import FourmillError, first_line
from fourmill.flows.engine import device_of, ray_session
from fourmill.flows.fit_encoder import with_encoder
from fourmill.flows.fit_labels import fit_labels
from fourmill.flows.resolve import Resolved
from fourmill.shards.dataset import Dataset
from fourmill.tokenize.fit import fit_codec
from fourmill.tokenize.fit_loop import Progress

_POLL_S = 0.5
_ATTEMPTS = 2  # more, after workers died: each goes on from the state that was kept


@dataclass(frozen=True)
class FitJob:
    """What every worker needs to know. Pickles."""

    resolved: Resolved
    name: str
    shards: tuple[int, ...]
    options: Mapping[str, Any]
    scratch: Path


class _Board:
    """An actor on which the first worker writes how far it is and, at the end, the tokenizer's files."""

    def __init__(self) -> None:
        self._state: tuple[int, int, dict[str, Any]] | None = None
        self._files: dict[str, bytes] = {}

    def write(self, step: int, steps: int, figures: dict[str, Any]) -> None:
        self._state = (step, steps, figures)

    def finish(self, files: dict[str, bytes]) -> None:
        self._files = files

    def state(self) -> tuple[int, int, dict[str, Any]] | None:
        return self._state

    def files(self) -> dict[str, bytes]:
        return self._files


def fit_on_workers(job: FitJob, out: Path, progress: Progress) -> Path:
    """Fit on ``fit.workers`` workers and write the folder ``out``. Raises FourmillError where they all fail."""
    import ray

    config = job.resolved.config
    with ray_session(config):
        board = ray.remote(_Board).options(num_cpus=0).remote()
        trainer = _trainer(job, board, device_of(config))
        with ThreadPoolExecutor(1, thread_name_prefix="ray-train") as pool:
            fitting = pool.submit(trainer.fit)
            shown = None
            while not wait([fitting], _POLL_S).done:
                state = ray.get(board.state.remote())
                if state is not None and state != shown:
                    progress(*state)
                    shown = state
        failed = fitting.exception()
        if failed is not None:
            raise FourmillError(
                f"fit of the tokenizer of {job.name!r} by {config.fit.workers} workers: {_why(failed)}"
            ) from failed
        files: dict[str, bytes] = ray.get(board.files.remote())
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    return out


def _why(error: BaseException) -> str:
    cause = getattr(error, "worker_failures", None) or {}
    return first_line(next(iter(cause.values()), error))


def _trainer(job: FitJob, board: Any, device: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    is_gpu = device == "cuda"
    return TorchTrainer(
        _work,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if is_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=job.resolved.config.fit.workers, use_gpu=is_gpu),
        run_config=RunConfig(
            name=job.name,
            storage_path=str(job.scratch / "ray"),
            failure_config=FailureConfig(max_failures=_ATTEMPTS),
        ),
    )


def _work(settings: dict[str, Any]) -> None:
    """What each worker does."""
    import ray
    import ray.train.torch

    from fourmill.tokenize.peers import ProcessGroup

    job, board = settings["job"], settings["board"]
    wanted = job.resolved.wanted[job.name]
    dataset = Dataset(job.resolved.config.dataset)
    sizes: Sequence[int] = job.options.get("sizes", ())
    train, held_out = fit_labels(job.resolved, dataset, wanted, job.shards, sizes, job.scratch)
    out, peers = job.scratch / "made", ProcessGroup.joined()
    fit_codec(
        wanted.modality,
        train,
        held_out,
        image_size=job.resolved.config.image_size,
        options={**with_encoder(dataset, job.name, job.options), "device": str(ray.train.torch.get_device())},
        out=out,
        progress=lambda step, steps, figures: board.write.remote(step, steps, figures),
        scratch=job.scratch,
        peers=peers,
    )
    if peers.rank == 0:
        ray.get(board.finish.remote({file.name: file.read_bytes() for file in sorted(out.iterdir())}))
    peers.wait()
