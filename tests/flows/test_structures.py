"""Metadata, palettes, people and instances in a dataset of two crops: labelled, tokenized, kept, trained on and reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_builds import call_main, small_content, without_ray, write_config
from tokenize_released import config_of, write_released

from fourmill.crops import crop_instances, crop_poses, draw_palette
from fourmill.flows.report.view import View, open_model
from fourmill.labelers.base import LabelBatch, Labeler, labelers
from fourmill.labelers.contract import check_labeler, failures
from fourmill.labels import Instances, Label, Metadata, Palettes, Poses
from fourmill.modality import LabelContract, Modality
from fourmill.seeds import generator, key64
from fourmill.shards.dataset import Dataset
from fourmill.shards.tar import read_labels
from fourmill.tokenize.published_network import PublishedNetwork, ReleasedConfig
from fourmill.tokenize.published_releases import LICENSE

FORMS = ("metadata", "palette", "poses", "instances")


def declared(form: Any) -> Modality:
    return Modality(
        name=form,
        kind="sequence",
        codec=form,
        reference_name=form,
        contract=LabelContract(form=form, dtype=""),
    )


class Facts(Labeler):
    """The mean colour, three times over."""

    modality = declared("metadata")

    def label(self, batch: LabelBatch) -> list[Label]:
        return [Metadata({"brightness": float(f.mean()), "original_width": f.shape[1]}) for f in batch.frames]


class Colours(Labeler):
    modality = declared("palette")

    def label(self, batch: LabelBatch) -> list[Label]:
        found = []
        for frame in batch.frames:
            pixels = np.resize(frame.reshape(-1, 3), (7, 3)).astype(np.uint8)
            found.append(Palettes(tuple(pixels[:n] for n in range(1, 8))))
        return found


class People(Labeler):
    """One who stands in the left half, arms drawn from the picture's brightness."""

    modality = declared("poses")

    def label(self, batch: LabelBatch) -> list[Label]:
        return [
            Poses.of(
                [[0.1, 0.2, 0.5, 0.9]],
                body_pose=np.tile(np.eye(3), (1, 23, 1, 1)) * (frame.mean() + 1) / 256,
                betas=np.full((1, 10), frame.mean() / 100),
            )
            for frame in batch.frames
        ]


class Things(Labeler):
    """A triangle over most of the picture."""

    modality = declared("instances")

    def label(self, batch: LabelBatch) -> list[Label]:
        outline = [[0.05, 0.1], [0.95, 0.1], [0.05, 0.9]]
        return [Instances.of([[0.05, 0.1, 0.95, 0.9]], [outline]) for _ in batch.frames]


CLASSES: dict[str, type[Labeler]] = dict(zip(FORMS, (Facts, Colours, People, Things), strict=True))


def write_pose_tokenizer(folder: Path) -> Path:
    """Random weights, of the published kind."""
    write_released("global_memcodes", folder, n_channels=207, num_codebooks=8)
    values = {**config_of("global_memcodes"), "n_channels": 207, "num_codebooks": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PublishedNetwork(ReleasedConfig.from_mapping(values))
        weights = {name: torch.randn_like(w) * 0.2 for name, w in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    root = tmp_path_factory.mktemp("structures")
    parts = {
        "poses": {"pose_tokenizer": str(write_pose_tokenizer(root / "pose"))},
        "instances": {"mask_tokenizer": str(write_released("sam_mask", root / "mask"))},
    }
    modalities: dict[str, Any] = {"caption": {}, "rgb": {}}
    modalities |= {form: {"keep_labels": True, "tokenizer": parts.get(form, {})} for form in FORMS}
    train = {
        "steps": 2, "batch_size": 4, "lr": 1e-3, "warmup_steps": 1, "device": "cpu", "num_input_tokens": 24,
        "num_target_tokens": 24, "log_every": 1, "eval_every": 2,
    }  # fmt: skip
    content = small_content(root / "ds", modalities, count=8, n_crops=2, val_fraction=0.3, train=train)
    config = write_config(root / "c.yaml", content)
    with pytest.MonkeyPatch.context() as patch, without_ray():
        patch.setattr(labelers, "_known", {**dict(labelers.items()), **CLASSES})
        assert call_main("build", config, "--no-prefect") == 0
        yield SimpleNamespace(root=root, url=str(root / "ds"), config=config)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_the_kept_labels_crop_by_crop(chain: SimpleNamespace, form: str) -> None:
    """And what was drawn follows from the dataset's seed, the sample's key and the crop."""
    dataset, view = Dataset(chain.url), View.open(chain.url, None)
    wanted = view.resolved.wanted[form]
    flips = 0
    for shard in range(2):
        receipt = dataset.receipt(form, wanted.label_recipe.short, shard)
        kept = read_labels(dataset.store.read(receipt.file), wanted.modality)
        table, column = dataset.samples(shard), view.column(form, shard)
        assert column is not None and column.present.all()
        for row, key in enumerate(table["key"].to_pylist()):
            for index, crop in enumerate(np.array(table["crops"][row].as_py()).reshape(2, 5)):
                rng, flips = generator(0, f"crop of {form}", key64(key), index), flips + int(crop[4])
                label: Any = kept[row]
                if form == "palette":
                    label = draw_palette(label, rng)
                elif form == "poses":
                    label = crop_poses(label, crop, (64, 64), rng)
                elif form == "instances":
                    label = crop_instances(label, crop, (64, 64), rng)
                expected = view.codecs[form].encode([label])[0]
                assert np.array_equal(column.cells(row, index), expected)
    assert flips, "the seed has to give some"


def test_the_licence_of_published_parts_is_remembered(chain: SimpleNamespace) -> None:
    dataset, view = Dataset(chain.url), View.open(chain.url, None)
    found = {}
    for form in FORMS:
        recipe = view.resolved.wanted[form].token_recipe()
        assert recipe is not None
        found[form] = dataset.receipt(form, recipe.short, 0).provenance.get("tokenizer_license")
    assert found == {"metadata": None, "palette": None, "poses": LICENSE, "instances": LICENSE}


def test_it_can_be_trained_on_and_shown(chain: SimpleNamespace) -> None:
    assert call_main("train", chain.config, "--out", chain.root / "run", "--no-prefect") == 0
    model = open_model(chain.root / "run").model
    assert all(model.config.spec(form).is_target for form in FORMS)
    assert [model.config.spec(form).num_tokens for form in FORMS] == [40, 23, 275, 290]
    assert call_main("report", chain.url, "--samples", "1") == 0
    page = (Path(chain.url) / "reports" / "index.html").read_text()
    assert all(form in page for form in FORMS)
    assert "brightness 1" in page and "1 people" in page and "#" in page
    assert call_main("inspect", chain.url) == 0


@pytest.mark.parametrize("form", FORMS)
def test_such_a_labeler_keeps_its_contract(form: str) -> None:
    assert failures(check_labeler(CLASSES[form], alone=False)) == []
