"""The command line's outside: help for everything, one entry point three ways, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_builds import call_main, environment

from fourmill.config import find_config, load_config
from fourmill.errors import (
    CheckpointError,
    ConfigError,
    ContractError,
    DatasetError,
    FourmillError,
    SourceError,
    WorkMissing,
)
from fourmill.flows import cli

COMMANDS = (
    "demo", "plan", "build", "label", "tokenize", "fit-tokenizers", "train",
    "status", "report", "export", "inspect", "gc", "doctor", "labelers",
    "new-labeler", "check-labeler", "import-labels", "import-webdataset",
)  # fmt: skip


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main("--help") == 0
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert name in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence, its arguments, and an example that begins with the command itself."""
    assert call_main(name, "-h") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Usage: fourmill {name}" in said
    assert f"Example: fourmill {name}" in said


def test_help_costs_no_network_library() -> None:
    """Torch, Ray and Prefect are imported by what needs them: help is there at once."""
    code = (
        "import sys; from fourmill.flows import cli; sys.argv = ['fourmill', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'ray', 'prefect', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start", [["-m", "fourmill"], ["-c", "from fourmill.flows.cli import main; main()"]])
def test_entry_points(start: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *start, "status", str(tmp_path)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("fourmill: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FourmillError, 1),
        (CheckpointError, 1),
        (ContractError, 1),
        (DatasetError, 1),
        (ConfigError, 2),
        (SourceError, 2),
        (WorkMissing, 3),
        (KeyboardInterrupt, 3),
    ],
)
def test_every_way_of_ending_has_its_status(
    error: type[BaseException],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error("[bold]what[/bold] happened, and what to do")

    monkeypatch.setattr(cli, "app", fails)
    assert call_main("status") == status
    said = capsys.readouterr().err
    if error is KeyboardInterrupt:
        assert "goes on from here" in said
    else:
        assert "[bold]what[/bold] happened, and what to do" in said, "names may hold brackets"


@pytest.mark.parametrize("name", sorted(p.stem for p in find_config("demo").parent.glob("*.yaml")))
def test_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(name)
    assert config.modalities
    again = yaml.safe_load(config.resolved_yaml())
    assert again["dataset"] == config.dataset


def test_overrides_reach_everything() -> None:
    overrides = ["seed=7", "engine.batch_size=3", "modalities.depth.keep_labels=true", "modalities.extra={}"]
    config = load_config("demo", overrides)
    assert (config.seed, config.engine.batch_size) == (7, 3)
    assert config.modalities["depth"].keep_labels
    assert config.modalities["depth"].tokenizer.model == "shipped:scenes/depth", "the rest stays"
    assert config.modalities["extra"].options == {}


def test_a_configuration_survives_being_written_down() -> None:
    """As JSON and back, as flows get it: the same values and types, so that the same hashes come of them."""
    config = load_config("demo")
    again = type(config).model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert json.dumps(again.model_dump(mode="json")) == json.dumps(config.model_dump(mode="json"))
