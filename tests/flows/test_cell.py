"""Specialists that die while they load their networks: asked again, but not for ever. Ray's answers are played by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from fourmill.errors import FourmillError
from fourmill.flows import cell
from fourmill.flows.cell import Cell


class Method:
    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers

    def remote(self) -> Callable[[], Any]:
        answer = self._answers.pop(0)

        def get() -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return get


class Actor:
    """``ready`` and ``is_up``: what its methods answer, one call after the other."""

    def __init__(self, ready: list[Any], is_up: list[Any]) -> None:
        self.ready, self.is_up = Method(ready), Method(is_up)


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda asked, num_returns, timeout: (asked, []))
    monkeypatch.setattr(ray, "get", lambda answer: answer())
    monkeypatch.setattr(cell, "REVIVAL_POLL_S", 0.0)


def restarting() -> ActorUnavailableError:
    return ActorUnavailableError("The actor is restarting", b"0" * 16)


def loaded(actor: Any, looks: int = 20) -> bool:
    on_node = Cell("node", [actor], [["name"]], {actor.ready.remote(): actor})
    return any(on_node.is_loaded(0) for _ in range(looks))


def test_a_process_that_takes_long_to_restart_has_died_once() -> None:
    assert loaded(Actor(ready=[restarting(), {}], is_up=[*[restarting()] * 12, True]))


def test_one_that_dies_each_time_is_given_up() -> None:
    actor = Actor(ready=[restarting()] * 9, is_up=[True] * 9)
    with pytest.raises(FourmillError, match="died 4 times while they loaded"):
        loaded(actor)


def test_one_that_never_comes_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "REVIVAL_S", -1.0)
    with pytest.raises(ActorUnavailableError):
        loaded(Actor(ready=[restarting()], is_up=[restarting()] * 3))
