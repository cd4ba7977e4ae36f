"""A build that is declared the only writer stops as soon as it no longer is."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small_builds import ORACLES, run_jobs_here, small_config

from fourmill import lease
from fourmill.errors import WorkMissing
from fourmill.flows.build import build
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.storage import Store


def test_a_build_stops_where_another_flow_took_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    url = tmp_path / "ds"

    def run_jobs(resolved: Any, plan: Any, on_progress: Any) -> Any:
        def taken_over_after_a_shard(done: int, rows: int) -> None:
            end = time.monotonic() + 20
            while any(thread.name == "writer-lease" for thread in threading.enumerate()):
                Store(str(url)).put(lease.LEASE, b'{"token": "somebody else"}')  # it may just be renewed
                assert time.monotonic() < end
                time.sleep(0.03)
            on_progress(done, rows)

        return run_jobs_here(resolved, plan, taken_over_after_a_shard)

    monkeypatch.setattr("fourmill.flows.build.run_jobs", run_jobs)
    config = small_config(
        url, {"depth": ORACLES["depth"]}, count=8, engine={"device": "cpu", "single_writer": True}
    )
    with pytest.raises(WorkMissing, match="another flow took over"):
        build(config)
    dataset = Dataset(str(url))
    short = dataset.samples_recipe()
    assert short is not None and len(dataset.receipts(SAMPLES, short)) == 1, "of two shards"
    assert Store(str(url)).read(lease.LEASE) == b'{"token": "somebody else"}'
