"""The licence of weights on its way: configuration, receipt, snapshot, `fourmill status --licenses`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_builds import ORACLES, call_main, receipts, small_content, without_ray

from fourmill.checkpoints import Checkpoint, shipped_folder
from fourmill.config import Config, check_config
from fourmill.flows import doctor
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.resolve import resolve
from fourmill.flows.training import make_snapshot

COMMIT = "0123456789" * 4
NC = "---\nlicense: cc-by-nc-4.0\n---\n"


def folder_of(name: str, out: Path, readme: str | None = None) -> str:
    """The shipped network as somebody else's folder: without our card."""
    shutil.copytree(shipped_folder(name), out)
    (out / "card.yaml").unlink()
    if readme is not None:
        (out / "README.md").write_text(readme)
    return str(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A dataset of two shards, and its configuration: the second was built when somebody had named a licence for depth."""
    root = tmp_path_factory.mktemp("licenses")
    tokenizer = root / "tokenizer"
    shutil.copytree(shipped_folder("scenes/caption"), tokenizer)
    (tokenizer / "card.yaml").unlink()
    config = json.loads((tokenizer / "config.json").read_text())
    (tokenizer / "config.json").write_text(json.dumps({**config, "image_size": 64}))
    modalities: dict[str, Any] = {
        "caption": {"tokenizer": {"model": str(tokenizer)}},
        "depth": {"model": folder_of("depth", root / "depth"), "keep_labels": True},
        "normal": ORACLES["normal"],
        "semseg": {"model": folder_of("semseg", root / "semseg", NC)},
        "clip": {},
    }
    content = small_content(root / "ds", modalities, count=8)
    build_here(content, limit=4)
    content["modalities"]["depth"]["license"] = "MIT"
    build_here(content)
    return root / "ds", content


def build_here(content: dict[str, Any], limit: int | None = None) -> None:
    with without_ray():
        assert build(config_of(content), BuildOptions(limit=limit)).status.complete


def config_of(content: dict[str, Any]) -> Config:
    return check_config(content, "test")


def test_the_licence_is_no_part_of_a_recipe(made: tuple[Path, dict[str, Any]]) -> None:
    """Naming it makes nothing stale: the second build found the first one's shard and fitted nothing anew."""
    other = json.loads(json.dumps(made[1]))
    other["modalities"]["depth"]["license"] = "something else"
    other["modalities"]["caption"]["tokenizer"]["license"] = "something else"
    before, after = resolve(config_of(made[1])), resolve(config_of(other))
    assert after.wanted["depth"].license == "something else"
    assert {n: r.hash for n, r in after.token_recipes().items()} == {
        n: r.hash for n, r in before.token_recipes().items()
    }


def test_receipts_name_it(made: tuple[Path, dict[str, Any]]) -> None:
    found = [receipt for receipt in receipts(made[0]).values() if "provenance" in receipt]
    said = {
        name: {json.dumps(r["provenance"].get("license")) for r in found if r["column"] == name}
        for name in ("samples", "caption", "depth", "normal", "semseg", "clip")
    }
    assert said == {
        "samples": {"null"},
        "caption": {"null"},
        "depth": {'"unknown"', '"MIT"'},
        "normal": {"null"},
        "semseg": {'"CC-BY-NC-4.0"'},
        "clip": {'"Apache-2.0"'},
    }
    caption = next(r for r in found if r["column"] == "caption")["provenance"]
    assert caption == {"tokenizer": str(made[0].parent / "tokenizer"), "tokenizer_license": "unknown"}
    labels = [n for n, r in receipts(made[0]).items() if r.get("file", "").startswith("labels/depth")]
    assert len(labels) == 2


def test_a_snapshot_names_every_one_once(made: tuple[Path, dict[str, Any]]) -> None:
    snapshot = make_snapshot(config_of(made[1]))
    entries = snapshot.content["modalities"]
    depth = entries["depth"]["provenance"]
    assert sorted(one["license"] for one in depth) == ["MIT", "unknown"]
    assert {one["labeler"] for one in depth} == {"depth"} and len({one["weights"] for one in depth}) == 1
    assert [one["license"] for one in entries["semseg"]["provenance"]] == ["CC-BY-NC-4.0"]
    assert entries["normal"]["provenance"] == [
        {"labeler": "oracle_normal", "model": None, "weights": None, "license": None}
    ]
    assert [one["tokenizer_license"] for one in entries["caption"]["provenance"]] == ["unknown"]
    assert make_snapshot(config_of(made[1])).digest == snapshot.digest


def test_status_sums_them_up(
    made: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call_main("status", made[0], "--licenses", "--json") == 0
    found = {(u["modality"], u["labeler"], u["license"]): u for u in json.loads(capsys.readouterr().out)}
    assert {key: use["shards"] for key, use in found.items()} == {
        ("caption", "(tokenizer)", "unknown"): 2,
        ("depth", "depth", "MIT"): 2,  # the first shard's was unknown, and is named since
        ("normal", "oracle_normal", None): 2,
        ("semseg", "semseg", "CC-BY-NC-4.0"): 2,
        ("clip", "clip", "Apache-2.0"): 2,
    }
    clip = found["clip", "clip", "Apache-2.0"]
    assert clip["model"] == "shipped:clip" and clip["revision"].startswith("sha256:")
    assert clip["terms"] == "permissive" and found["normal", "oracle_normal", None]["terms"] is None
    monkeypatch.setenv("COLUMNS", "200")
    assert call_main("status", made[0], "--licenses") == 0
    said = capsys.readouterr().out
    assert "semseg: CC-BY-NC-4.0, for non-commercial use only" in said
    assert "caption: licence unknown" in said
    assert "clip: " not in said, "what is free needs no sentence"


def test_all_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = small_content(tmp_path / "ds", {"depth": {}}, count=4)
    build_here(content)
    assert call_main("status", tmp_path / "ds", "--licenses") == 0
    assert "allows any use" in capsys.readouterr().out


def test_licenses_and_watch_are_two_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main("status", tmp_path, "--licenses", "--watch") == 2
    assert "--watch" in capsys.readouterr().err


def test_a_source_modality_has_no_weights_to_license(tmp_path: Path) -> None:
    content = small_content(tmp_path / "ds", {"rgb_pixels": {"license": "MIT"}})
    with pytest.raises(Exception, match=r"modalities\.rgb_pixels\.license: unknown key"):
        resolve(config_of(content))


# -- the doctor and the hub's cache -------------------------------------------------------------------


def test_a_config_alone_in_the_cache_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that only resolved its configuration leaves config.json there; offline, the weights are still missing."""
    from huggingface_hub import HfApi, constants

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    checkpoint = Checkpoint("some/net", COMMIT, COMMIT)
    snapshot = tmp_path / "models--some--net" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    ours = shipped_folder("depth")
    shutil.copy(ours / "config.json", snapshot)
    found = doctor.on_hub("depth", checkpoint)
    assert found.state == "fail" and "not whole in the local cache" in found.found
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    assert "to be fetched" in doctor.on_hub("depth", checkpoint).found
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    for name in ("preprocessor_config.json", "model.safetensors"):
        shutil.copy(ours / name, snapshot)
    found = doctor.on_hub("depth", checkpoint)
    assert found.state == "ok" and "in the local cache (" in found.found
