"""Single samples of a snapshot, and its files in the hands of other programs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from handmade import ROWS, SHARDS, Built, build

from fourmill.errors import ConfigError
from fourmill.labels import Absent
from fourmill.shards.samples import OK
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.view import SnapshotView


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(str(tmp_path_factory.mktemp("view") / "dataset"))


def test_every_sample_of_a_split_is_there_once(built: Built) -> None:
    found = {
        sample["key"]: sample
        for split in ("train", "val")
        for sample in SnapshotView(built.snapshot, split=split)
    }
    wanted = [
        (shard, row)
        for shard in range(SHARDS)
        for row in range(ROWS)
        if built.samples[shard][row]["status"] == OK
    ]
    assert len(found) == len(wanted)
    for shard, row in wanted:
        sample = found[built.samples[shard][row]["key"]]
        for name in built.snapshot.modalities:
            cell = built.cells[name][shard][row]
            if isinstance(cell, Absent):
                assert sample[name] is None
            elif name == "score":
                assert sample[name] == cell[0]
            elif name == "rgb_pixels":
                assert sample[name] == cell
            else:
                assert all(np.array_equal(one, two) for one, two in zip(sample[name], cell, strict=True))


def test_it_is_a_map(built: Built) -> None:
    view = SnapshotView(built.snapshot, ["rgb"])
    assert np.array_equal(view[-1]["rgb"], view[len(view) - 1]["rgb"])
    assert [s["key"] for s in view[1:4]] == [view[i]["key"] for i in range(1, 4)]
    again = pickle.loads(pickle.dumps(view))  # noqa: S301 (ours: what a worker process gets)
    assert again[2].keys() == {"key", "rgb"} and again[2]["key"] == view[2]["key"]
    with pytest.raises(IndexError, match=f"sample {len(view)} of {len(view)}"):
        view[len(view)]
    with pytest.raises(ConfigError, match="no modality 'rbg'; did you mean 'rgb'"):
        SnapshotView(built.snapshot, ["rbg"])


def test_sizes_of_splits_are_in_the_snapshot(built: Built) -> None:
    for split, mask in (("train", Snapshot.is_train), ("val", Snapshot.is_val)):
        sizes = built.snapshot.split_sizes(split)
        assert sizes.tolist() == [int(mask(built.snapshot, shard).sum()) for shard in range(SHARDS)]
        assert all(
            shard["sizes"][split] == size
            for shard, size in zip(built.snapshot.content["shards"], sizes, strict=True)
        )


def test_a_shard_is_opened_by_other_programs(built: Built) -> None:
    """By `datasets` as its own file, and by anything that reads Arrow streams, without a line of ours."""
    file = Path(built.snapshot.dataset.url) / built.snapshot.shards[0].files["rgb"]
    code = (
        "import sys, datasets, pyarrow as pa\n"
        "table = datasets.Dataset.from_file(sys.argv[1])\n"
        "assert table.column_names == ['value', 'reason'], table\n"
        "frame = pa.ipc.open_stream(sys.argv[1]).read_pandas()\n"
        "print(len(table), sum(table[0]['value']), len(frame), sum(map(int, frame['value'][0])))\n"
        "assert not [name for name in sys.modules if name.startswith('fourmill')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cell = built.cells["rgb"][0][0]
    total = int(np.sum(cell))
    assert done.stdout.split() == [str(ROWS), str(total), str(ROWS), str(total)]


def test_files_of_the_other_arrow_format_are_read_too(built: Built, tmp_path: Path) -> None:
    from fourmill.shards.arrow import read_table

    file = Path(built.snapshot.dataset.url) / built.snapshot.shards[0].files["rgb"]
    table = read_table(str(file), "here")
    with pa.ipc.new_file(str(tmp_path / "old.arrow"), table.schema) as writer:
        writer.write_table(table)
    for source in (str(tmp_path / "old.arrow"), (tmp_path / "old.arrow").read_bytes()):
        assert read_table(source, "here").equals(table)
