"""Runs: stopped, killed, resumed, refused."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourmill.errors import CheckpointError, ConfigError, FourmillError, WorkMissing
from fourmill.shards.snapshot import Snapshot
from fourmill.train import checkpoint
from fourmill.train.__main__ import main
from fourmill.train.checkpoint import load_model, newest, read_state
from fourmill.train.order import Position
from fourmill.train.trainer import learning_rate, train_on
from fourmill.train_config import MixtureComponent, TrainConfig

SnapshotOf = Callable[..., Any]


@pytest.fixture
def config(tiny_preset: str) -> TrainConfig:
    torch.set_num_threads(1)
    return TrainConfig(
        preset=tiny_preset, steps=7, batch_size=6, lr=1e-3, warmup_steps=2, num_input_tokens=16, num_target_tokens=20,
        mixture=(MixtureComponent(),), checkpoint_every=3, log_every=2, device="cpu",
    )  # fmt: skip


def _changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**config.model_dump(), **changes})


def _losses(out: Path) -> list[tuple[int, float, dict[str, float]]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["losses"]) for r in records]


def _stop_after(step: int) -> tuple[Callable[[dict[str, Any]], None], Callable[[], bool]]:
    seen = []
    return lambda record: seen.append(record["step"]), lambda: seen[-1] >= step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_and_resumed_equals_uninterrupted(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path, optimizer: str
) -> None:
    """Bit for bit: weights, moments, and every logged loss, hence every mask and every sample."""
    config = _changed(config, optimizer=optimizer)
    snapshot = snapshot_of(
        rows=30, absent=0.1, n_crops=2
    )  # 24 training samples: resumes inside the second epoch
    whole = train_on(snapshot, tmp_path / "whole", config)
    for step in (2, 5):
        with pytest.raises(WorkMissing, match=f"stopped at step {step} of 7"):
            on_step, stop = _stop_after(step)
            train_on(snapshot, tmp_path / "parts", config, on_step, stop=stop)
        assert read_state(newest(tmp_path / "parts") or tmp_path).position == Position(
            step * 6, (step * 6 / 24,)
        )
    parts = train_on(snapshot, tmp_path / "parts", config)
    assert (whole.step, whole.resumed_from, parts.resumed_from) == (7, None, 5)
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = load_file(whole.checkpoint / name), load_file(parts.checkpoint / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (whole.loss, whole.losses) == (parts.loss, parts.losses)


def test_a_killed_run_repeats_nothing_in_its_log(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path
) -> None:
    """Killed at step 5, the run goes on from the checkpoint of step 3; the log reads as if nothing had happened."""
    snapshot = snapshot_of(rows=30)
    train_on(snapshot, tmp_path / "whole", config)

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on(snapshot, tmp_path / "killed", config, kill)
    with (tmp_path / "killed/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "los')  # a line that was cut short
    assert train_on(snapshot, tmp_path / "killed", config).resumed_from == 3
    whole, killed = _losses(tmp_path / "whole"), _losses(tmp_path / "killed")
    assert [r[0] for r in whole] == [r[0] for r in killed] == [2, 4, 6, 7]
    assert (
        whole[0] == killed[0] and whole[2:] == killed[2:]
    )  # the record of step 4 misses step 3 after the kill


def test_a_finished_run_is_not_run_again(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path
) -> None:
    snapshot = snapshot_of(rows=30)
    first = train_on(snapshot, tmp_path, config)
    again = train_on(snapshot, tmp_path, config, lambda record: pytest.fail("made a step"))
    assert (again.step, again.loss, again.losses, again.checkpoint) == (
        7,
        first.loss,
        first.losses,
        first.checkpoint,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_the_run(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(WorkMissing) as caught:
        train_on(snapshot_of(rows=30), tmp_path, config, interrupt)
    assert caught.value.exit_code == 3
    assert signal.getsignal(number) is before
    assert read_state(newest(tmp_path) or tmp_path).step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_a_truncated_checkpoint_is_skipped_with_a_message(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    snapshot = snapshot_of(rows=30)
    last = train_on(snapshot, tmp_path, config).checkpoint
    path = last / name
    path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert train_on(snapshot, tmp_path, config).resumed_from == 6
    assert f"{last}/{name}" in caplog.text and "damaged" in caplog.text
    assert newest(tmp_path) == last  # written anew


def test_old_checkpoints_are_removed_and_leftovers_do_not_count(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints/.step-00000003.tmp").mkdir(parents=True)
    train_on(snapshot_of(rows=30), tmp_path, _changed(config, checkpoint_every=1, keep_checkpoints=3))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006", "step-00000007"]
    files = sorted(path.name for path in (tmp_path / "checkpoints/step-00000007").iterdir())
    assert files == ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_another_snapshot_or_configuration_is_refused(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path
) -> None:
    snapshot = snapshot_of(rows=30)
    train_on(snapshot, tmp_path, config)
    with pytest.raises(CheckpointError, match="trained with lr = 0.001, now it is 0.002"):
        train_on(snapshot, tmp_path, _changed(config, lr=2e-3))
    train_on(snapshot, tmp_path, _changed(config, log_every=1, workers=0, checkpoint_every=50))
    snapshot.digest = "e" * 64
    with pytest.raises(CheckpointError, match="trained on snapshot ffffffffffff, not eeeeeeeeeeee"):
        train_on(snapshot, tmp_path, config)


def test_a_loss_that_is_not_finite_ends_the_run(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(FourmillError, match=r"^step [23]: the loss is .*lower train.lr") as caught:
        train_on(snapshot_of(rows=30), tmp_path, _changed(config, lr=1e30))
    assert "\n" not in str(caught.value)
    assert newest(tmp_path) is None  # what is broken is never saved


def test_micro_batches_do_not_change_the_step(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path
) -> None:
    snapshot = snapshot_of(rows=30, absent=0.2)
    weights = []
    for number, size in enumerate((None, 2, 4)):
        run = train_on(snapshot, tmp_path / str(number), _changed(config, steps=3, micro_batch=size))
        weights.append(load_file(run.checkpoint / "model.safetensors"))
        assert _losses(tmp_path / str(number))[-1][1] == pytest.approx(
            _losses(tmp_path / "0")[-1][1], rel=1e-4
        )
    for other in weights[1:]:
        assert max((weights[0][key] - other[key]).abs().max().item() for key in other) < 2e-3


def test_validation_losses_are_of_the_held_out_samples(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path
) -> None:
    records: list[dict[str, Any]] = []
    train_on(snapshot_of(rows=30), tmp_path, _changed(config, eval_every=3, log_every=50), records.append)
    with_validation = [r for r in records if "val_losses" in r]
    assert [r["step"] for r in with_validation] == [3, 6, 7]
    assert with_validation[-1]["val_losses"].keys() == {"caption", "clip_global", "depth", "rgb"}
    assert with_validation[-1]["val_losses"] != with_validation[-1]["losses"]


def test_the_batch_must_be_shared_evenly(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourmill.train.ranks import Ranks
    from fourmill.train.trainer import Trainer

    with pytest.raises(ConfigError, match="6 samples of 8 lanes make 2 chunks, which 4 ranks cannot share"):
        Trainer(snapshot_of(rows=30), tmp_path, config, Ranks(0, 4, torch.device("cpu")))
    with pytest.raises(ConfigError, match="train.device: 'cuda:77' cannot be used here"):
        train_on(snapshot_of(rows=30), tmp_path, _changed(config, device="cuda:77"))


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup_steps=10, blr=1e-3, batch_size=64, min_lr=1e-5)
    assert config.peak_lr == pytest.approx(1e-3 * 64 / 256)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([config.peak_lr * (i + 1) / 10 for i in range(10)])
    for step in (10, 35, 60, 109):
        wave = 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert rates[step] == pytest.approx(1e-5 + (config.peak_lr - 1e-5) * wave)
    assert max(rates) == config.peak_lr


def test_a_checkpoint_or_a_run_can_be_loaded_for_generation(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path
) -> None:
    run = train_on(snapshot_of(rows=30), tmp_path, config)
    one, two = load_model(run.checkpoint), load_model(tmp_path)
    assert not one.training and one.config.names == ("caption", "clip_global", "depth", "rgb")
    stored = load_file(run.checkpoint / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in two.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        load_model(tmp_path / "elsewhere")
    (run.checkpoint / "config.json").write_text(
        (run.checkpoint / "config.json").read_text().replace("64", "32", 1)
    )
    with pytest.raises(CheckpointError, match="does not fit its config.json"):
        load_model(run.checkpoint)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_crash_while_writing_leaves_no_checkpoint_that_counts(
    snapshot_of: SnapshotOf,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    calls: list[int] = []
    save_file = checkpoint.save_file

    def crash(*args: Any) -> None:
        calls.append(1)
        if len(calls) > failing:
            raise OSError("disk full")
        save_file(*args)

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        train_on(snapshot_of(rows=30), tmp_path, config)
    assert len(calls) == failing + 1
    assert newest(tmp_path) is None


def test_the_command_reports_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-configuration", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


def test_training_on_several_datasets(
    snapshot_of: SnapshotOf, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them without depth. The checkpoint names both, and going on with another one is refused."""
    own, other, third = snapshot_of(rows=60), snapshot_of(rows=40, seed=3), snapshot_of(rows=40, seed=4)
    other.digest, third.digest = "a" * 64, "b" * 64
    del other.modalities["depth"]
    known = {"there": other, "elsewhere": third}
    monkeypatch.setattr(Snapshot, "load", staticmethod(lambda url, digest=None: known[url]))
    mixed = _changed(config, datasets=({"url": "there", "weight": 0.5},))
    mixed = TrainConfig.model_validate(mixed.model_dump())
    with pytest.raises(WorkMissing):
        on_step, stop = _stop_after(3)
        train_on(own, tmp_path / "out", mixed, on_step, stop=stop)
    state = read_state(newest(tmp_path / "out") or tmp_path)
    assert (state.snapshot, state.others) == ("f" * 64, ["a" * 64])
    assert len(state.position.epochs) == 2
    known["there"] = third
    with pytest.raises(CheckpointError, match="was trained on snapshot f{12}, a{12}, not f{12}, b{12}"):
        train_on(own, tmp_path / "out", mixed)
    known["there"] = other
    assert train_on(own, tmp_path / "out", mixed).step == 7
    other.modalities["rgb"] = other.modalities["rgb"].resolved(vocab_size=32)
    with pytest.raises(ConfigError, match="tokens of 'rgb' in a{12} are not those of f{12}: grid, 32 ids"):
        train_on(own, tmp_path / "again", mixed)
