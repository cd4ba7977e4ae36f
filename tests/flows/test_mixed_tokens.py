"""A shard whose tokens are of another tokenizer than the snapshot's does not get into a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_builds import ORACLES, small_config, without_ray

from fourmill.config import Config
from fourmill.errors import DatasetError
from fourmill.flows.build import build
from fourmill.flows.training import make_snapshot
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tokenizer_check import check_tokenizer


def config_of(path: Path, steps: int) -> Config:
    fit = {"preset": "demo", "steps": steps, "samples": 8, "batch_size": 4}
    return small_config(path, {"depth": ORACLES["depth"]}, count=8, fit=fit)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Snapshot]:
    """The same labels, by tokenizers that were fitted for three steps and for four."""
    root = tmp_path_factory.mktemp("mixed")
    configs = [config_of(root / str(steps), steps) for steps in (3, 4)]
    with without_ray():
        assert all(build(config).status.complete for config in configs)
    return [make_snapshot(config) for config in configs]


@contextmanager
def mixed(two: list[Snapshot]) -> Iterator[tuple[str, str]]:
    """Shard 1 of the first has the tokens of the second: (name of its file, what is to be said of it)."""
    ours, theirs = two
    name = ours.shards[1].files["depth"]
    file = Path(ours.dataset.url) / name
    whole = file.read_bytes()
    file.unlink()  # tables that are open keep theirs
    file.write_bytes((Path(theirs.dataset.url) / theirs.shards[1].files["depth"]).read_bytes())
    found, wanted = theirs.tokenizer("depth"), ours.tokenizer("depth")
    assert found and wanted and found != wanted
    try:
        yield name, f"{name}: its tokens are of tokenizer {found}, wanted are those of {wanted}"
    finally:
        file.unlink()
        file.write_bytes(whole)


def test_a_file_says_whose_tokens_it_has(two: list[Snapshot]) -> None:
    ours = two[0]
    for shard in ours.shards:
        check_tokenizer(
            ours.dataset.table(shard.files["depth"]), ours.tokenizer("depth"), shard.files["depth"]
        )
    with mixed(two) as (name, said), pytest.raises(DatasetError, match=said):
        check_tokenizer(ours.dataset.table(name), ours.tokenizer("depth"), name)


def test_a_snapshot_refuses_a_mix(two: list[Snapshot]) -> None:
    ours: Any = two[0]
    assert ours.column(1, "depth").present.any()
    with mixed(two) as (_, said), pytest.raises(DatasetError, match=said):
        ours.column(1, "depth")
    assert ours.column(1, "depth").present.any(), "and nothing else"
