"""`fourmill fit-tokenizers`: which it fits, what it says of them, how it goes on, and by how many workers."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from small_builds import ORACLES, call_main, data_files, small_config, small_content, without_ray

from fourmill.flows import fit_labels, fit_pictures
from fourmill.flows.build import BuildOptions, build
from fourmill.flows.fitting import fit_tokenizers
from fourmill.flows.resolve import fit_origin, resolve
from fourmill.modality import LabelContract, Modality
from fourmill.shards.dataset import Dataset
from fourmill.tokenize.base import load_codec
from fourmill.tokenize.fit import default_config
from fourmill.tokenize.vqvae import VQVAE

DENSE = {name: ORACLES[name] for name in ("depth", "normal")}


def fitted(dataset: Path) -> dict[str, list[str]]:
    root = dataset / "tokenizers"
    names = sorted(root.iterdir()) if root.is_dir() else []
    return {folder.name: [one.name for one in folder.iterdir()] for folder in names}


def test_only_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_content(tmp_path / "data", {"rgb": {}, **DENSE})))
    with without_ray():
        assert call_main("fit-tokenizers", path, "-m", "depth", "--no-prefect") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert list(fitted(tmp_path / "data")) == ["depth"]
    assert not list((tmp_path / "data" / "fits").iterdir()), "labels and state of the fit are gone"
    card = yaml.safe_load((next((tmp_path / "data/tokenizers/depth").iterdir()) / "card.yaml").read_text())
    figures = card["held_out"]
    assert (next((tmp_path / "data/tokenizers/depth").iterdir()) / "reconstructions.png").is_file()
    for text in ("depth 512", f"{figures['perplexity']:.1f}", f"{figures['codebook_use']:.1%}"):
        assert text in said, said
    assert f"delta1 {figures['delta1']:.4g}" in said.replace(" , ", ", ") and "abs_rel" in said
    assert str(tmp_path / "data/tokenizers/depth") in said
    with without_ray():
        assert call_main("fit-tokenizers", path, "--no-prefect") == 0
    assert list(fitted(tmp_path / "data")) == ["depth", "normal", "rgb"]
    assert call_main("fit-tokenizers", path, "-m", "dpeth", "--no-prefect") == 2


def test_an_interrupted_fit_goes_on(tmp_path: Path) -> None:
    """The state of a fit is found by what is asked for, its labels are not read again, and the bytes are the same."""
    fit = {
        "preset": "demo",
        "steps": 30,
        "samples": 8,
        "batch_size": 4,
        "checkpoint_minutes": 0,
        "ema": 0.9,
        "sizes": [64, 96],
    }
    config = small_config(tmp_path / "data", {"depth": ORACLES["depth"]}, fit=fit)
    with without_ray():
        build(config, BuildOptions(fit_only=True, fitted=()))  # nothing but the dataset itself
        with pytest.raises(RuntimeError, match="stopped in step 20"):
            _fit(config, stop_at=20)
        left = {file.name for file in next((tmp_path / "data/fits").glob("*/labels-64")).parent.iterdir()}
        assert {"labels-64", "labels-96"} < left
        steps = _fit(config)
        assert steps == [30], "it began behind step 20"
        other = small_config(tmp_path / "other", {"depth": ORACLES["depth"]}, fit=fit)
        build(other, BuildOptions(fit_only=True))
    names = [[k for k in data_files(tmp_path / d) if "tokenizers" in k] for d in ("data", "other")]
    assert names[0] == names[1] and names[0]
    assert not list((tmp_path / "data" / "fits").iterdir())
    wanted = resolve(config).wanted["depth"]
    folder = next((tmp_path / "data/tokenizers/depth").iterdir())
    assert load_codec(folder, wanted.modality, 96).modality.num_tokens == 36


def test_two_builds_at_once_fit_a_tokenizer_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would work in the same folder, which the first to end removes: the other waits, and finds the tokenizer."""
    fit = {"preset": "demo", "steps": 30, "samples": 8, "batch_size": 4, "checkpoint_minutes": 0}
    config = small_config(tmp_path / "data", {"depth": ORACLES["depth"]}, fit=fit)
    with without_ray():
        build(config, BuildOptions(fit_only=True, fitted=()))
        with pytest.raises(RuntimeError, match="stopped in step 20"):
            _fit(config, stop_at=20)
        with ThreadPoolExecutor(2) as pool:
            steps = sorted(len(run) for run in pool.map(lambda _: _fit(config), range(2)))
    assert steps[0] == 0 < steps[1]
    assert "depth: another process fits its tokenizer; waiting for it" in capsys.readouterr().out
    assert len(fitted(tmp_path / "data")["depth"]) == 1
    assert not list((tmp_path / "data" / "fits").iterdir())


def _fit(config: Any, stop_at: int = 0) -> list[int]:
    steps: list[int] = []

    def watch(name: str, done: int, steps_in_all: int, figures: dict[str, Any]) -> None:
        steps.append(done)
        if done == stop_at:
            raise RuntimeError(f"stopped in step {done}")

    resolved, dataset = resolve(config), Dataset(config.dataset)
    if not stop_at:
        fit_tokenizers(resolved, dataset, _shards(dataset), watch)
        return steps
    from fourmill.flows.build import plain_stage

    def stage(name: str, call: Any) -> Any:
        if name != "Fit tokenizers":
            return plain_stage(name, call)
        return fit_tokenizers(resolved, dataset, _shards(dataset), watch)

    build(config, BuildOptions(fit_only=True), stage)
    return steps


def _shards(dataset: Dataset) -> list[int]:
    (recipe,) = (folder.name for folder in (Path(dataset.url) / "receipts/depth").iterdir())
    return sorted(
        int(file.stem.split("-")[1])
        for file in (Path(dataset.url) / "receipts/depth" / recipe).glob("shard-*.json")
    )


def test_how_it_is_run_does_not_make_another_tokenizer(tmp_path: Path) -> None:
    """Datasets that were fitted before a key existed find their tokenizers again."""
    plain = small_config(tmp_path, DENSE)
    old = {"samples": 8, "minutes": 0.0, "steps": 3, "preset": "demo", "batch_size": 4}
    assert fit_origin(resolve(plain).wanted["depth"], plain)["fit"] == old
    fit = {**old, "workers": 2, "precision": "fp32", "checkpoint_minutes": 1}
    assert small_config(tmp_path, DENSE, fit=fit).fit.identity() == old
    assert small_config(tmp_path, DENSE, fit={**old, "ema": 0.9}).fit.identity() == {**old, "ema": 0.9}


def test_labels_in_a_file_are_the_labels(tmp_path: Path) -> None:
    labels = [np.random.default_rng(i).normal(size=(4, 5)).astype(np.float32) for i in range(3)]
    file = fit_labels._label_file(tmp_path / "labels", iter(labels), "depth")
    assert file is not None and len(file) == 3
    assert all(np.array_equal(a, b) for a, b in zip(file, labels, strict=True))
    again = fit_labels._label_file(tmp_path / "labels", iter(()), "depth")
    assert again == file, "what is there is not written again"
    with pytest.raises(IndexError):
        file[3]
    assert fit_labels._label_file(tmp_path / "none", iter(()), "depth") is None
    assert json.loads((tmp_path / "labels.json").read_text())["count"] == 3


def test_labels_stand_above_their_reconstructions() -> None:
    """Also relative depth, which is decoded on another scale than that of its labels."""
    contract = LabelContract(form="map", dtype="float32", units="disparity")
    modality = Modality(name="depth", kind="grid", codec="vqvae", contract=contract)
    codec = VQVAE(modality, 64, default_config(modality, "demo", 64))
    rows = np.mgrid[0:64, 0:64][0]
    labels = [(5 + rows * (i + 1) / 20).astype(np.float32) for i in range(3)]
    codec.decode = lambda values: codec.space.to_labels(codec.space.to_network(np.stack(labels)))  # type: ignore[method-assign]
    sheet = np.asarray(Image.open(io.BytesIO(fit_pictures.reconstructions(codec, labels) or b"")))
    assert sheet.shape == (260, 3 * 132 - 4, 3)
    assert np.abs(sheet[:128].astype(int) - sheet[132:]).max() < 8, "a perfect decoder: both rows are alike"
    assert len(np.unique(sheet[:128].reshape(-1, 3), axis=0)) > 20
    assert fit_pictures.reconstructions(codec, []) is None


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(600)  # a busy machine takes minutes to start Ray Train
def test_two_workers_fit_one_tokenizer(tmp_path: Path) -> None:
    fit = {"preset": "demo", "steps": 6, "samples": 8, "batch_size": 4, "workers": 2}
    config = small_config(tmp_path / "data", {"depth": ORACLES["depth"]}, fit=fit)
    build(config, BuildOptions(fit_only=True))
    folder = next((tmp_path / "data/tokenizers/depth").iterdir())
    card = yaml.safe_load((folder / "card.yaml").read_text())
    assert card["fit"]["workers"] == 2 and card["fit"]["steps_done"] == 6
    assert load_codec(folder, resolve(config).wanted["depth"].modality, 64).modality.vocab_size == 512
