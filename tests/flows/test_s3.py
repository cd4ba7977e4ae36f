"""A dataset on a store that speaks the S3 protocol: the bytes of a local one, conditional puts, and training from it."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
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

from fourmill.errors import ConfigError
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.training import make_snapshot
from fourmill.shards.dataset import Dataset
from fourmill.storage import Store
from fourmill.train.trainer import train_on
from fourmill.train_config import TrainConfig

MODALITIES: dict[str, Any] = {
    "caption": {},
    "rgb_pixels": {},
    "depth": {**ORACLES["depth"], "keep_labels": True},
    "det": ORACLES["det"],
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server on loopback, which every process of ours takes for the S3 there is."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield f"http://{host}:{port}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty bucket."""
    name = f"test-{sha256(request.node.name.encode()).hexdigest()[:12]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


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


def remote_files(url: str) -> dict[str, str]:
    store = Store(url)
    store.fs.invalidate_cache()
    names = [str(path)[len(store.root) + 1 :] for path in store.fs.find(store.root)]
    return {
        name: sha256(store.read(name)).hexdigest() for name in names if name.split("/")[0] in DATA_FOLDERS
    }


def test_a_build_on_s3_gives_the_bytes_of_a_local_one(
    tmp_path: Path, bucket: str, local: tuple[Path, dict[str, Any]]
) -> None:
    """In two goes, with what a crash leaves (data without a receipt) between them; then nothing is left to do."""
    folder, modalities = local
    url = f"{bucket}/some/where"
    config = small_config(url, modalities, count=12)
    with without_ray():
        assert build(config, BuildOptions(limit=4)).status.shards == 1
        dataset = Dataset(url)
        (short,) = [r for r in dataset.recipes("depth") if dataset.recipe("depth", r)["kind"] == "token"]
        dataset.store.remove(f"receipts/depth/{short}/shard-000000.json")
        result = build(config)
        assert result.status.complete
        assert build(config).rows_labelled == 0
    assert remote_files(url) == data_files(folder)
    names = Store(url).fs.find(f"{Store(url).root}/receipts")
    assert {str(n)[len(Store(url).root) + 1 :] for n in names} == set(receipts(folder))
    assert Store(url).read("dataset.yaml") == (folder / "dataset.yaml").read_bytes()

    torch.set_num_threads(1)
    brief = TrainConfig(
        steps=2,
        batch_size=4,
        lr=1e-3,
        warmup_steps=1,
        device="cpu",
        num_input_tokens=32,
        num_target_tokens=32,
    )
    snapshot = make_snapshot(config)
    trained = train_on(snapshot, tmp_path / "run", brief)
    assert trained.step == 2 and (trained.checkpoint / "model.safetensors").is_file()
    same = train_on(make_snapshot(small_config(folder, modalities, count=12)), tmp_path / "same", brief)
    assert same.loss == trained.loss, "the same snapshot, wherever it is kept"


def test_status_of_a_remote_dataset(
    bucket: str, local: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    modalities = {"rgb_pixels": local[1]["rgb_pixels"]}
    with without_ray():
        build(small_config(f"{bucket}/ds", modalities, count=4))
    capsys.readouterr()
    assert call_main("status", f"{bucket}/ds", "--json") == 0
    assert '"complete": true' in capsys.readouterr().out


def test_the_first_writer_wins(bucket: str) -> None:
    store = Store(f"{bucket}/x")
    assert store.put_if_absent("receipts/a/b.json", b"first")
    assert not store.put_if_absent("receipts/a/b.json", b"second")
    assert store.put_if_absent("receipts/a/b.json", b"first"), "a retried request meets its own first attempt"
    assert store.read("receipts/a/b.json") == b"first"
    assert store.probe_conditional_put()
    assert store.names("") == ["receipts"]


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
        assert build(small_config(url, modalities, count=4, engine=engine)).status.complete
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.long
def test_a_build_with_ray_on_s3(tmp_path: Path, bucket: str, local: tuple[Path, dict[str, Any]]) -> None:
    folder, modalities = local
    url = f"{bucket}/ds"
    config = write_config(tmp_path / "c.yaml", small_content(url, modalities, count=12))
    done = run_command("build", config, "--no-prefect", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert remote_files(url) == data_files(folder)
