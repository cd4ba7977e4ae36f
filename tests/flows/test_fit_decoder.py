"""`fourmill fit-tokenizers` with a diffusion decoder: to a tokenizer of the dataset, by its hash, and what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_builds import ORACLES, call_main, listing, small_content, write_config

from fourmill.config import load_config
from fourmill.flows.resolve import resolve
from fourmill.shards.dataset import Dataset
from fourmill.tokenize.base import load_codec
from fourmill.tokenize.vqvae import VQVAE

UNET = {"decoder": "diffusion", "unet_multipliers": [1], "unet_blocks": 1, "ddim_steps": 2}


def config_with(tmp_path: Path, **tokenizer: Any) -> Path:
    fit = {"preset": "demo", "steps": 3, "samples": 16, "batch_size": 4}
    modalities = {"depth": {**ORACLES["depth"], "tokenizer": tokenizer}}
    content = small_content(tmp_path / "ds", modalities, count=20, val_fraction=0.1, fit=fit)
    return write_config(tmp_path / "c.yaml", content)


def test_a_decoder_for_a_tokenizer_of_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main("fit-tokenizers", config_with(tmp_path), "-m", "depth", "--no-prefect") == 0
    dataset = Dataset(str(tmp_path / "ds"))
    (first,) = dataset.tokenizers("depth")
    path = config_with(tmp_path, **UNET, encoder=first)
    capsys.readouterr()
    assert call_main("fit-tokenizers", path, "-m", "depth", "--no-prefect") == 0
    (second,) = set(dataset.tokenizers("depth")) - {first}
    assert second in capsys.readouterr().out.replace("\n", "")
    folder = dataset.tokenizer_folder("depth", second)
    assert {f.name for f in folder.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "card.yaml",
        "reconstructions.png",
    }
    card = yaml.safe_load((folder / "card.yaml").read_text())
    assert card["encoder"] == first and card["held_out"]["abs_rel"] > 0
    wanted, key = resolve(load_config(path)).wanted["depth"], dataset.samples(0)["key"][0].as_py()
    assert wanted.tokenizer is not None and wanted.tokenizer.startswith(second), (
        "it is the one that is asked for"
    )
    truth = resolve(load_config(path)).source.truth(key)["depth"]
    old, new = (
        load_codec(dataset.tokenizer_folder("depth", s), wanted.modality, 64) for s in (first, second)
    )
    assert np.array_equal(old.encode([truth])[0], new.encode([truth])[0])
    assert isinstance(new, VQVAE) and new.config.decoder == "diffusion"
    assert json.loads((folder / "config.json").read_text())["network"]["ddim_steps"] == 2
    before = listing(tmp_path / "ds")
    assert call_main("fit-tokenizers", path, "-m", "depth", "--no-prefect") == 0
    assert {k for k in listing(tmp_path / "ds") if "tokenizers" in k} == {
        k for k in before if "tokenizers" in k
    }


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (
            {**UNET, "encoder": "0123456789ab"},
            "modalities.depth.tokenizer.encoder: the dataset has no tokenizer 0123456789ab",
        ),
        (
            {**UNET, "encoder": "EPFL-VILAB/4M_tokenizers_depth_8k_224-448"},
            "modalities.depth.tokenizer.encoder: 'EPFL-VILAB/4M_tokenizers_depth_8k_224-448' is neither",
        ),
        (
            {**UNET, "encoder": "./nowhere"},
            "modalities.depth.tokenizer.encoder: './nowhere' is neither",
        ),
        ({**UNET, "unet_width": 33}, "modalities.depth.tokenizer.unet_width 33 must be a multiple of 32"),
        ({"encoder": "first"}, "modalities.depth.tokenizer.encoder: is for `decoder: diffusion`"),
    ],
)
def test_it_is_refused_before_a_label_is_made(
    tokenizer: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main("fit-tokenizers", config_with(tmp_path, **tokenizer), "--no-prefect") in (2, 3)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "ds" / "receipts").exists()
