"""What people schedule and watch: building, fitting and training as Prefect flows.

    run_flow(build_dataset, use_prefect=True, config="cc12m", limit=2000)

A flow run belongs to the configured server or, without one, to Prefect's own ephemeral server. No state that matters
is in either: when the server cannot be reached, or dies in the middle, the work is done without it.
"""

from __future__ import annotations

import os

for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "ERROR",  # progress is shown by fourmill itself
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}.items():
    os.environ.setdefault(_name, _value)

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx
from prefect import flow, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL

from fourmill.config import Config, check_config, load_config
from fourmill.errors import FourmillError
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.interrupts import interruptible
from fourmill.flows.progress import say, watching
from fourmill.flows.training import train_model

logging.getLogger("prefect").setLevel(logging.CRITICAL)  # such as "Error flushing 1 events" at exit

T = TypeVar("T")
ARTIFACT_EVERY_S = 15.0
_UNREACHABLE = (httpx.HTTPError, PrefectException, ConnectionError)


@flow(name="build_dataset", validate_parameters=False, persist_result=False)
def build_dataset(
    config: str | dict[str, Any],
    overrides: list[str] | None = None,
    limit: int | None = None,
    shards: tuple[int, int] | None = None,
    redo_stale: bool = False,
    only_labels: list[str] | None = None,
    only_tokens: list[str] | None = None,
    retry_rejects: bool | str = False,
    slice: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Make what is missing of a dataset; returns its status. Fails with WorkMissing when something still is."""
    options = BuildOptions(
        limit=limit,
        shards=tuple(shards) if shards else None,  # type: ignore[arg-type]
        redo_stale=redo_stale,
        only_labels=None if only_labels is None else tuple(only_labels),
        only_tokens=None if only_tokens is None else tuple(only_tokens),
        retry_rejects=retry_rejects,
        slice=tuple(slice) if slice else None,  # type: ignore[arg-type]
    )
    with _artifacts():
        return build(_config(config, overrides), options, stage).status.to_json()


@flow(name="fit_tokenizers", validate_parameters=False, persist_result=False)
def fit_tokenizers(
    config: str | dict[str, Any], overrides: list[str] | None = None, modalities: list[str] | None = None
) -> dict[str, Any]:
    """Label the fit set of a dataset and fit the tokenizers that it lacks, or those of ``modalities`` alone."""
    options = BuildOptions(fit_only=True, fitted=None if modalities is None else tuple(modalities))
    with _artifacts():
        return build(_config(config, overrides), options, stage).status.to_json()


@flow(name="train_model", validate_parameters=False, persist_result=False)
def train(
    config: str | dict[str, Any],
    overrides: list[str] | None = None,
    out: str | None = None,
    snapshot: str | None = None,
) -> dict[str, Any]:
    """Train on the finished shards of a dataset, or go on with the run in ``out``."""
    with _artifacts():
        result = stage("Train", lambda: train_model(_config(config, overrides), out, snapshot=snapshot))
    return {"checkpoint": str(result.checkpoint), "step": result.step, "loss": result.loss}


def run_flow(flow_object: Any, *, use_prefect: bool = True, **parameters: Any) -> Any:
    """Call a flow of this module as a flow run, or as a plain function where no server answers.

    A server that dies in the middle is no reason to stop: what is committed stays, and the function goes on with the rest.
    """
    if use_prefect and server_answers():
        with interruptible() as interrupt:
            try:
                return flow_object(**parameters)
            except _UNREACHABLE as error:
                if interrupt.happened:  # Ctrl-C reached Prefect's own server too
                    raise KeyboardInterrupt from None
                say(f"Prefect: {type(error).__name__}; going on without it (nothing finished is done again)")
    return flow_object.fn(**parameters)


def server_answers() -> bool:
    """Whether the configured server does. Without one, Prefect starts its own, which is fine too."""
    url = PREFECT_API_URL.value()
    if not url:
        return True
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=5.0).raise_for_status()
    except httpx.HTTPError as error:
        say(f"Prefect: no server answers at {url} ({type(error).__name__}); this run will not be shown there")
        return False
    return True


def stage(name: str, call: Callable[[], T]) -> T:
    """Run one stage: as a task inside a flow run, as a plain call elsewhere."""
    if FlowRunContext.get() is None:
        return call()
    result: T = task(name=name, cache_policy=NO_CACHE, persist_result=False)(call)()
    return result


@contextlib.contextmanager
def _artifacts() -> Iterator[None]:
    """Progress artifacts of the flow run, renewed every now and then: an API call must not slow the work down."""
    if FlowRunContext.get() is None:
        yield
        return
    made: dict[str, Any] = {}
    shown: dict[str, float] = {}

    def watcher(title: str, unit: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - shown.get(title, 0.0) < ARTIFACT_EVERY_S and done < total:
            return
        shown[title] = now
        percent = 100.0 * done / max(total, 1)
        try:
            if title in made:
                update_progress_artifact(made[title], percent, description=f"{done} of {total} {unit}")
            else:
                key = "fourmill-" + "".join(c if c.isalnum() else "-" for c in title.lower())
                made[title] = create_progress_artifact(
                    percent, key=key, description=f"{done} of {total} {unit}"
                )
        except _UNREACHABLE as error:
            say(f"Prefect: progress is not shown ({type(error).__name__})")
            shown[title] = float("inf")

    with watching(watcher):
        yield


def _config(config: str | dict[str, Any], overrides: list[str] | None) -> Config:
    if isinstance(config, str):
        return load_config(config, overrides)
    if overrides:
        raise FourmillError("overrides go with a configuration's file, not with its content")
    return check_config(config, "config")
