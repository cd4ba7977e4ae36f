"""What Ray raises, told apart: bad luck, and errors of ours that were raised in an actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fourmill.errors import FourmillError


def lost_errors() -> tuple[type[Exception], ...]:
    """What Ray raises when the process or the machine that was to answer is gone: bad luck, never the data's fault."""
    from ray import exceptions as e

    return (
        e.RayActorError, e.ActorUnschedulableError, e.NodeDiedError, e.WorkerCrashedError, e.ObjectLostError,
    )  # fmt: skip


def root_cause(error: BaseException) -> BaseException:
    """The exception that was raised first, however many actors passed it on."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


def unwrapped(call: Callable[[], Any]) -> Any:
    """Run ``call``; an error of ours that was raised in an actor comes out as itself."""
    import ray

    try:
        return call()
    except ray.exceptions.RayTaskError as error:
        cause = root_cause(error)
        if isinstance(cause, FourmillError):
            raise cause from None
        raise
