"""Several machines, simulated: one is lost in the middle of a run, and the run finishes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small_builds import (
    ORACLES,
    data_files,
    environment,
    small_config,
    small_content,
    wait_until,
    with_tokenizers,
    without_ray,
    write_config,
)

from fourmill.config import load_config
from fourmill.flows.build import build

COUNT = 160
STORE_BYTES = 100 * 2**20


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_is_lost(tmp_path: Path) -> None:
    """Three nodes with a cell each; one goes as soon as shards appear, and the others take over."""
    fitted = {"depth": ORACLES["depth"], "rgb_pixels": {}}
    with without_ray():
        build(small_config(tmp_path / "fitted", fitted, count=8))
        modalities: dict[str, Any] = with_tokenizers(tmp_path / "fitted", fitted)
        changes: dict[str, Any] = {"shard_size": 4, "engine": {"batch_size": 2, "device": "cpu"}}
        build(small_config(tmp_path / "expected", modalities, count=COUNT, **changes))
    config = write_config(
        tmp_path / "c.yaml", small_content(tmp_path / "ds", modalities, count=COUNT, **changes)
    )
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    done = subprocess.run(  # in a process of its own: Ray reads the token once
        [sys.executable, __file__, config], env=environment(**auth, PYTHONPATH=str(Path(__file__).parents[1])),
        cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert data_files(tmp_path / "ds") == data_files(tmp_path / "expected")


def main(path: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    config = load_config(path)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES}
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(2)]
    lost: list[int] = []

    def finished() -> int:
        return len(list(Path(config.dataset).glob("receipts/depth/*/shard-*.json")))

    def lose_one() -> None:
        while finished() < 4:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        lost.append(finished())

    thread = threading.Thread(target=lose_one, daemon=True)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        thread.start()
        result = build(config)
        thread.join(60)
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, 60, "the loss to be noticed")
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert lost and lost[0] < COUNT // 4, "the run was over before a node was lost"
    assert result.status.complete


if __name__ == "__main__":
    main(sys.argv[1])
