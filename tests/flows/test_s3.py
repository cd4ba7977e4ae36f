"""A dataset on a store that speaks the S3 protocol: the bytes of a local one, conditional puts, and training from it.

What must hold wherever a dataset is kept runs on a folder, on S3, and on an S3 where 5% of all requests fail: with a 503 (before
they took effect, or after), with a connection that breaks, or after a while.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from s3_server import Flaky, s3_server
from small_builds import (
    DATA_FOLDERS,
    ORACLES,
    call_main,
    data_files,
    receipts,
    run_command,
    small_config,
    small_content,
    with_tokenizers,
    without_ray,
    write_config,
)

from fourmill import lease
from fourmill.errors import ConfigError
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.plan import make_plan
from fourmill.flows.resolve import resolve
from fourmill.flows.training import make_snapshot
from fourmill.lease import single_writer_lease
from fourmill.shards.dataset import SAMPLES, Dataset
from fourmill.shards.garbage import find_garbage, remove_garbage
from fourmill.shards.receipt_cache import ReceiptCache
from fourmill.shards.receipts import Receipt, Recipe
from fourmill.shards.repair import set_aside
from fourmill.shards.verify import verify
from fourmill.storage import Store
from fourmill.train.trainer import train_on
from fourmill.train_config import TrainConfig

MODALITIES: dict[str, Any] = {
    "caption": {},
    "rgb_pixels": {},
    "depth": {**ORACLES["depth"], "keep_labels": True},
    "det": ORACLES["det"],
}
#: where the S3 that fails shows the same
PLAIN = pytest.param("s3", marks=pytest.mark.long)


@pytest.fixture(scope="module")
def server() -> Iterator[Flaky]:
    with s3_server() as flaky:
        yield flaky


@pytest.fixture
def bucket(server: Flaky, request: pytest.FixtureRequest) -> str:
    """The URL of an empty bucket."""
    name = f"test-{sha256(request.node.name.encode()).hexdigest()[:12]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(params=["folder", "s3", "flaky s3"])
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    bucket: str,
    server: Flaky,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """Where a dataset can be: the URL of nothing yet."""
    if request.param == "folder":
        yield str(tmp_path / "some" / "where")
        return
    requests, failed = server.requests, server.failed
    monkeypatch.setattr(server, "share", 0.05 if request.param == "flaky s3" else 0.0)
    yield f"{bucket}/some/where"
    if request.param == "flaky s3" and server.requests > requests + 300:
        assert server.failed > failed, "nothing went wrong"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(a dataset in a folder, its modalities with tokenizers given)"""
    fitted = tmp_path_factory.mktemp("fitted") / "ds"
    url = tmp_path_factory.mktemp("local") / "ds"
    with without_ray():
        build(small_config(fitted, MODALITIES, count=12))
        modalities = with_tokenizers(fitted, MODALITIES)
        build(small_config(url, modalities, count=12))
    return url, modalities


def all_files(url: str) -> dict[str, str]:
    """sha256 of every data file, wherever the dataset is."""
    store = Store(url)
    names = [name for name in store.walk("") if name.split("/")[0] in DATA_FOLDERS]
    return {name: sha256(store.read(name)).hexdigest() for name in names if "/." not in name}


@pytest.mark.parametrize("place", ["folder", PLAIN, "flaky s3"], indirect=True)
def test_a_build_gives_the_bytes_of_a_local_one(place: str, local: tuple[Path, dict[str, Any]]) -> None:
    """In two goes, with what a crash leaves (data without a receipt) between them; then nothing is left to do."""
    folder, modalities = local
    config = small_config(place, modalities, count=12)
    with without_ray():
        assert build(config, BuildOptions(limit=4)).status.shards == 1
        dataset = Dataset(place)
        (short,) = [r for r in dataset.recipes("depth") if dataset.recipe("depth", r)["kind"] == "token"]
        dataset.store.remove(f"receipts/depth/{short}/shard-000000.json")
        assert build(config).status.complete
        assert build(config).rows_labelled == 0
    assert all_files(place) == data_files(folder)
    assert set(Store(place).walk("receipts")) == set(receipts(folder))
    assert Store(place).read("dataset.yaml") == (folder / "dataset.yaml").read_bytes()


def test_training_from_s3(tmp_path: Path, bucket: str, local: tuple[Path, dict[str, Any]]) -> None:
    folder, modalities = local
    config = small_config(f"{bucket}/ds", modalities, count=12)
    with without_ray():
        build(config)
    torch.set_num_threads(1)
    brief = TrainConfig(
        steps=2,
        batch_size=4,
        lr=1e-3,
        warmup_steps=1,
        device="cpu",
        num_input_tokens=32,
        num_target_tokens=32,
        cache_dir=str(tmp_path / "cache"),
    )
    snapshot = make_snapshot(config)
    trained = train_on(snapshot, tmp_path / "run", brief)
    assert any((tmp_path / "cache").iterdir()), "files of the store are kept on this machine"
    assert trained.step == 2 and (trained.checkpoint / "model.safetensors").is_file()
    same = train_on(make_snapshot(small_config(folder, modalities, count=12)), tmp_path / "same", brief)
    assert same.loss == trained.loss, "the same snapshot, wherever it is kept"


@pytest.mark.long
@pytest.mark.parametrize("place", ["s3", "flaky s3"], indirect=True)
def test_damage_is_found_and_repaired(place: str, local: tuple[Path, dict[str, Any]]) -> None:
    folder, modalities = local
    config = small_config(place, modalities, count=12)
    with without_ray():
        build(config)
    dataset = Dataset(place)
    assert verify(dataset).problems == []
    (name, *_) = sorted(dataset.store.walk("tokens/depth"))
    dataset.store.put(name, dataset.store.read(name)[:-1] + b"x")
    found = verify(Dataset(place))
    assert [problem.file for problem in found.problems] == [name]
    aside, moved = set_aside(dataset, found.problems)
    assert name in moved and dataset.store.exists(f"{aside}/{name}") and not dataset.store.exists(name)
    with without_ray():
        build(config)
    assert verify(Dataset(place)).problems == []
    assert all_files(place) == data_files(folder)


def test_status_of_a_remote_dataset(
    bucket: str, local: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    modalities = {"rgb_pixels": local[1]["rgb_pixels"]}
    with without_ray():
        build(small_config(f"{bucket}/ds", modalities, count=4))
    capsys.readouterr()
    assert call_main("status", f"{bucket}/ds", "--json") == 0
    assert '"complete": true' in capsys.readouterr().out


@pytest.mark.parametrize("place", ["folder", "s3"], indirect=True)
def test_the_first_writer_wins(place: str) -> None:
    store = Store(place)
    assert store.put_if_absent("receipts/a/b.json", b"first")
    assert not store.put_if_absent("receipts/a/b.json", b"second")
    assert store.put_if_absent("receipts/a/b.json", b"first"), "a retried request meets its own first attempt"
    assert store.read("receipts/a/b.json") == b"first"
    assert store.probe_conditional_put()
    assert store.names("") == ["receipts"]


@pytest.mark.parametrize("place", ["folder", PLAIN, "flaky s3"], indirect=True)
def test_of_many_writers_each_knows_whether_it_won(place: str) -> None:
    """Also those whose first request took effect and was answered with an error."""
    store = Store(place)

    def race(number: int) -> tuple[int, bytes, bool]:
        name, mine = number % 40, b"%d" % number
        return name, mine, store.put_if_absent(f"receipts/{name}.json", mine)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(race, range(160)))
    for name in range(40):
        winners = [mine for which, mine, won in outcomes if which == name and won]
        assert winners == [store.read(f"receipts/{name}.json")]


#: how many keys a listing holds, and how many there are
PAGE, COUNT = 40, 3 * 40 + 10


@pytest.mark.parametrize("place", ["folder", "s3"], indirect=True)
def test_more_keys_than_a_page_holds(
    place: str, server: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shard 7 there are two receipts, and the later one counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", str(PAGE))  # of S3: 1,000
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    dataset = Dataset.create(place, {"shard_size": 1})
    recipe = Recipe("token", {"labeler": "depth"})

    def commit(shard: int, epoch: int = 0) -> bool:
        receipt = Receipt(
            column="depth", recipe=recipe.hash, shard=shard, rows=1, absent={}, presence="AQ==", keys="k",
            file=f"tokens/depth/shard-{shard:06d}.{epoch:012d}.arrow", sha256="s", bytes=1, dataset=dataset.digest,
            epoch=epoch,
        )  # fmt: skip
        return dataset.commit(recipe, receipt)

    assert all(dataset.store.map(commit, range(COUNT))) and commit(7, 1)
    server.listed.clear()
    assert dataset.finished("depth", recipe.short) == set(range(COUNT))
    assert len(server.listed) >= 4 or place.startswith("/"), "one page held them all"
    assert dataset.is_finished("depth", recipe.short, COUNT - 1) and not dataset.is_finished(
        "depth", recipe.short, COUNT + 90
    )
    assert dataset.listing("depth").finished(recipe.short) == set(range(COUNT))
    assert dataset.receipt("depth", recipe.short, 7).epoch == 1
    found = dataset.receipts("depth", recipe.short)
    assert list(found) == list(range(COUNT)) and [s for s, r in found.items() if r.epoch] == [7]
    monkeypatch.setattr(Store, "read_if_exists", lambda self, name: pytest.fail(f"{name} is read again"))
    fresh = object.__new__(Dataset)
    fresh.__dict__.update(dataset.__dict__, _cache=ReceiptCache(dataset.store, dataset.digest))
    assert fresh.receipts("depth", recipe.short, dataset.listing("depth")) == found
    assert fresh.receipts("depth", recipe.short) == found


def test_a_plan_lists_each_column_once(
    bucket: str, server: Flaky, local: tuple[Path, dict[str, Any]]
) -> None:
    config = small_config(f"{bucket}/ds", local[1], count=12)
    with without_ray():
        build(config, BuildOptions(limit=8))
    resolved, dataset = resolve(config), Dataset(config.dataset)
    server.listed.clear()
    assert [job.shard for job in make_plan(resolved, dataset).jobs] == [2]
    columns = [prefix.split("/")[2] for prefix in server.listed if prefix.startswith("ds/receipts/")]
    assert sorted(c for c in columns if c != SAMPLES) == sorted(local[1])
    assert len(server.listed) < len(local[1]) + 8, server.listed


@pytest.mark.parametrize("place", ["folder", PLAIN, "flaky s3"], indirect=True)
def test_garbage_goes(
    place: str, local: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    modalities = {"rgb_pixels": local[1]["rgb_pixels"]}
    with without_ray():
        build(small_config(place, modalities, count=8))
    dataset = Dataset(place)
    kept = all_files(place)
    orphan = dataset.put_data("tokens/rgb_pixels", 0, b"nobody's", "arrow")
    assert find_garbage(dataset, 3600) == []
    real = Store.now
    monkeypatch.setattr(Store, "now", lambda self: real(self) + 8 * 86_400)
    found = find_garbage(dataset, 7 * 86_400)
    assert [g.name for g in found] == [orphan]
    assert [g.name for g in remove_garbage(dataset, found)] == [orphan]
    assert all_files(place) == kept


def test_a_store_without_conditional_put_is_refused(
    bucket: str, local: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two builds there could both win: refused before anything is written, unless there is one writer by contract."""
    original = s3fs.S3FileSystem._pipe_file

    async def forgetful(self: Any, path: str, data: bytes, **options: Any) -> None:
        options.pop("mode", None)
        await original(self, path, data, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", forgetful)
    s3fs.S3FileSystem.clear_instance_cache()  # an instance binds its methods when it is made
    url = f"{bucket}/ds"
    modalities = {"rgb_pixels": local[1]["rgb_pixels"]}
    assert not Store(url).probe_conditional_put()
    with without_ray():
        with pytest.raises(ConfigError, match=r"no conditional put.*engine\.single_writer"):
            build(small_config(url, modalities, count=4))
        assert Store(url).names("") == []
        engine = {"batch_size": 4, "device": "cpu", "single_writer": True}
        config = small_config(url, modalities, count=4, engine=engine)
        monkeypatch.setattr(lease, "SETTLE_S", 0.1)
        with single_writer_lease(Store(url)), pytest.raises(ConfigError, match="is being written by process"):
            build(config)
        assert build(config).status.complete
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.long
def test_a_build_with_ray_on_s3(tmp_path: Path, bucket: str, local: tuple[Path, dict[str, Any]]) -> None:
    folder, modalities = local
    url = f"{bucket}/ds"
    config = write_config(tmp_path / "c.yaml", small_content(url, modalities, count=12))
    done = run_command("build", config, "--no-prefect", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all_files(url) == data_files(folder)
