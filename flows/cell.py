"""What one node hosts, and how long it is waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fourmill.errors import FourmillError
from fourmill.flows.ray_errors import lost_errors, unwrapped

REVIVAL_POLL_S = 0.2
REVIVAL_S = 600.0  # an actor that died is back by then, its networks loaded, or will not be
LOADINGS = 4  # of a cell's specialists, when they die in the middle of it


@dataclass
class Cell:
    """What one node hosts. ``loading``: what its specialists will answer -> specialist: that their networks are there or,
    in ``reviving``, that the process which follows a dead one is up."""

    node: str
    specialists: list[Any]
    names: list[list[str]]
    loading: dict[Any, Any]
    runners: list[Any] = field(default_factory=list)
    reviving: dict[Any, Any] = field(default_factory=dict)
    deaths: int = 0  # while they loaded
    died_at: float = 0.0  # the last time

    def is_loaded(self, wait_s: float) -> bool:
        """Look which specialists are ready; one that died is asked again once it is back. Raises what loading raised."""
        import ray

        asked = [*self.loading, *self.reviving]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=wait_s) if asked else ([], [])
        for answer in done:
            if answer in self.reviving:
                self._look_whether_back(answer, self.reviving.pop(answer))
                continue
            specialist = self.loading.pop(answer)
            try:
                unwrapped(lambda: ray.get(answer))  # noqa: B023 it is called here
            except lost_errors() as error:
                self.deaths, self.died_at = self.deaths + 1, time.monotonic()
                if self.deaths >= LOADINGS:
                    raise FourmillError(
                        f"specialists died {self.deaths} times while they loaded their networks; is there memory enough? "
                        f"({' '.join(str(error).split())[:200]})"
                    ) from error
                self.reviving[specialist.is_up.remote()] = specialist
        return not (self.loading or self.reviving)

    def _look_whether_back(self, answer: Any, specialist: Any) -> None:
        """A call to an actor that is being restarted fails as one does in which it dies: only what follows an answer counts."""
        import ray

        try:
            ray.get(answer)
        except lost_errors():
            if time.monotonic() - self.died_at > REVIVAL_S:
                raise
            time.sleep(REVIVAL_POLL_S)
            self.reviving[specialist.is_up.remote()] = specialist
        else:
            self.loading[specialist.ready.remote()] = specialist
