"""The published tokenizers of bodies and masks inside those of people and instances: by hub id, pinned, under their licence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_hub import COMMIT, Hub, local_hub
from structures import modality, same
from tokenize_released import write_released

from fourmill.checkpoints import shipped_folder
from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.labels import Instances, Poses
from fourmill.tokenize import published
from fourmill.tokenize.base import codec_hash, load_codec
from fourmill.tokenize.fit import fit_codec
from fourmill.tokenize.poses import PosesCodec
from fourmill.tokenize.published_releases import LICENSE
from fourmill.tokenize.sam_instances import InstancesCodec

MASKS = "EPFL-VILAB/4M_tokenizers_sam-instance_1k_64"
BODIES = "EPFL-VILAB/4M_tokenizers_human-poses_1k_8"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(published, "_shown", set())
    with local_hub(tmp_path, monkeypatch) as hub:
        hub.repos[MASKS] = write_released("sam_mask", tmp_path / "masks")
        yield hub


def make(out: Path, form: str = "instances", **options: Any) -> Path:
    vocabulary = shipped_folder("scenes/caption")
    return fit_codec(
        modality(form), [], [], image_size=224, options={"vocabulary": str(vocabulary), **options}, out=out
    )


def test_the_ids_are_those_of_the_releases() -> None:
    assert (InstancesCodec.published, PosesCodec.published) == (MASKS, BODIES)


def test_by_hub_id(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "made", mask_tokenizer=MASKS, mask_tokenizer_revision=COMMIT)
    assert f"under the {LICENSE}" in capsys.readouterr().err
    local = make(tmp_path / "local", mask_tokenizer=str(tmp_path / "masks"))
    assert codec_hash(folder) == codec_hash(local)
    hub.stop()
    codec = load_codec(folder, modality("instances"), 224)
    assert isinstance(codec, InstancesCodec) and codec.inner is not None and codec.inner.license == LICENSE
    outline = np.array([[0.1, 0.2], [0.7, 0.2], [0.1, 0.9]])
    label = Instances.of([[0.1, 0.2, 0.7, 0.9]], [outline], points=[[0.2, 0.3]], hits=[[0]])
    found = codec.decode(codec.encode([label]))[0]
    assert (found.mask_ids >= 0).all() and not same(found, label)


def test_an_id_must_be_pinned(hub: Hub, tmp_path: Path) -> None:
    for options in ({}, {"mask_tokenizer_revision": "main"}):
        with pytest.raises(
            ConfigError, match=r"^modalities\.instances\.tokenizer\.mask_tokenizer: hub id .* 40-digit commit"
        ):
            make(tmp_path / "made", mask_tokenizer=MASKS, **options)
    assert not hub.requests
    with pytest.raises(ConfigError, match=r"tokenizer\.mask_tokenizer_revision: expected is a word, got 7"):
        make(tmp_path / "made", mask_tokenizer=MASKS, mask_tokenizer_revision=7)
    with pytest.raises(
        ConfigError, match=r"tokenizer\.mask_tokenizer_revison: unknown option.*'mask_tokenizer_revision'"
    ):
        make(tmp_path / "made", mask_tokenizer_revison=COMMIT)


def test_masks_are_no_bodies(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"tokenizer of sam-instance; for 'body_pose' take {BODIES}"):
        make(tmp_path / "made", "poses", pose_tokenizer=MASKS, pose_tokenizer_revision=COMMIT)


def test_who_lacks_one_is_told_which(tmp_path: Path) -> None:
    codec = load_codec(make(tmp_path / "made", "poses"), modality("poses"), 224)
    with pytest.raises(ContractError, match=rf"give modalities\.poses\.tokenizer\.pose_tokenizer: {BODIES}"):
        codec.encode([Poses.of([[0, 0, 1, 1]], body_pose=np.zeros((1, 23, 3, 3)))])
