"""Cards: weights, licences, and a statement of what labels are that comes from the contract and holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_builds import call_main

from fourmill import licenses
from fourmill.checkpoints import Checkpoint
from fourmill.config import load_config
from fourmill.errors import CheckpointError
from fourmill.flows.labeler_cards import card_json, card_report, output
from fourmill.labelers.base import LabelerSettings, labelers
from fourmill.labelers.card import Card, Weights, license_of
from fourmill.labelers.network import NetworkLabeler
from fourmill.labelers.quality import check
from fourmill.labels import Boxes
from fourmill.modality import LabelContract, Modality
from fourmill.shards.sources.scenes import render

NAMES = sorted(name for name, cls in labelers.items() if cls.__module__.startswith("fourmill."))
NETWORKS = [  # for modalities that 4M has: scores are ours
    name
    for name in NAMES
    if issubclass(labelers.get(name), NetworkLabeler) and labelers.get(name).modality.kind != "scalar"
]
COMMIT = "0123456789" * 4
README = Path(__file__).parents[2] / "labelers" / "README.md"


def printed(name: str) -> str:
    console = Console(width=100)
    with console.capture() as said:
        console.print(card_report(name))
    return " ".join(said.get().split())


# -- what is on them ----------------------------------------------------------------------------------


def test_all_labelers_are_here() -> None:
    assert NETWORKS == ["clip", "depth", "det", "normal", "semseg"]
    assert all(labelers.get(name).card is not None for name in NAMES)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_networks(name: str) -> None:
    """A permissive choice for photographs, the paper's beside it, and for each a licence and somebody to cite."""
    card = labelers.get(name).card
    assert card is not None and card.default is not None and card.paper is not None
    assert card.default.loads and licenses.terms(card.default.license) == "permissive"
    models = [one.model for one in card.weights()]
    assert len(set(models)) == len(models)
    for one in card.weights():
        assert one.license and one.citation
        assert one.revision is None or re.fullmatch(r"[0-9a-f]{40}", one.revision)
        assert one.model.count("/") == 1 or not one.loads, "what loads has a hub id"


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not issubclass(labelers.get(name), NetworkLabeler)]
)
def test_labelers_without_weights(name: str) -> None:
    card = labelers.get(name).card
    assert card is not None and card.weights() == () and card.expects
    assert labelers.get(name)(LabelerSettings(modality="x")).license is None


@pytest.mark.parametrize("config", ["cc12m", "photos"])
def test_shipped_configurations_take_what_the_cards_do(config: str) -> None:
    for name, entry in load_config(config).modalities.items():
        if entry.model is not None:
            card = labelers.get(entry.labeler or name).card
            assert card is not None
            assert card.default is not None
            assert (entry.model, entry.revision) == (card.default.model, card.default.revision)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_readme_says_the_same(name: str) -> None:
    card = labelers.get(name).card
    assert card is not None and card.default is not None and card.paper is not None
    default, paper = card.default, card.paper
    row = f"| `{name}` | `{default.model}` | {default.license} | {paper.model} | {paper.license} |"
    assert row in README.read_text()


def _upernet() -> Any:
    import transformers as hf

    backbone = hf.ConvNextConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    return hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(
            backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], auxiliary_channels=8,
            auxiliary_in_channels=8, id2label={0: "wall", 1: "sky"},
        )
    )  # fmt: skip


def _rt_detr_v2() -> Any:
    import transformers as hf

    backbone = hf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return hf.RTDetrV2ForObjectDetection(
        hf.RTDetrV2Config(
            backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8] * 3, encoder_layers=1,
            encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, decoder_in_channels=[16] * 3, decoder_layers=2,
            decoder_ffn_dim=16, decoder_attention_heads=2, decoder_n_points=2, num_queries=7, num_denoising=0,
            id2label={0: "cat", 1: "dog"},
        )
    )  # fmt: skip


def _tipsv2() -> Any:
    import transformers as hf

    vision = hf.Tipsv2VisionConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=56, patch_size=14,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    return hf.Tipsv2DptForNormalEstimation(
        hf.Tipsv2DptConfig(backbone_config=vision, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8)
    )


@pytest.mark.parametrize(
    ("name", "make", "side"),
    [("semseg", _upernet, 64), ("det", _rt_detr_v2, 64), ("normal", _tipsv2, 56)],
)
def test_the_architectures_that_cards_choose_load(
    kit: Any, tmp_path: Path, name: str, make: Any, side: int
) -> None:
    make().save_pretrained(tmp_path)
    kit.write_preprocessor(tmp_path, side)
    labeler = kit.labeler(name, tmp_path)
    labeler.load()
    batch = kit.batch_of((40, 60))
    check(labeler.describe(), labeler.label(batch), batch.frames)


def test_a_checkpoint_of_several_heads_is_asked_for_its_weights(kit: Any, tmp_path: Path) -> None:
    """Published ones name the class of all heads together; one that has no head for normals is still refused."""
    _tipsv2().save_pretrained(tmp_path)
    kit.write_preprocessor(tmp_path, 56)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["AllHeadsTogether"]}))
    kit.labeler("normal", tmp_path).load()
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights of a depth network"):
        kit.labeler("depth", tmp_path).load()


# -- what labels are, from the contract ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_card_states_the_contract(name: str) -> None:
    said, contract = printed(name), labelers.get(name).modality.contract
    for fact in (contract.dtype, contract.units, contract.frame):
        assert fact and " ".join(fact.split()) in said
    if not contract.unit_norm:
        for bound in (contract.low, contract.high):
            assert bound is None or f"{bound:g}" in output(labelers.get(name).modality)["range"]


def test_another_contract_makes_another_statement() -> None:
    contract = LabelContract(
        form="map", dtype="float16", channels=2, units="pixels", low=-3.5, frame="x right", flip="mirror_negate_x"
    )  # fmt: skip
    assert output(Modality(name="flow", kind="grid", contract=contract)) == {
        "shape": "(H, W, 2) of the image",
        "dtype": "float16",
        "units": "pixels",
        "range": "at least -3.5",
        "frame": "x right",
        "resized": "bilinear",
        "flipped": "mirrored, and x negated",
    }


@pytest.fixture(scope="module")
def made(kit: Any) -> dict[str, tuple[list[Any], list[Any]]]:
    """By labeler: labels of four held-out scenes by the network that ships, and the truth."""
    scenes = [render(2000, index, 128) for index in range(4)]
    frames = [scene.image for scene in scenes]
    batch = kit.as_batch(frames, crops=np.stack(frames)[:, None])
    found = {}
    for name in NETWORKS:
        labeler = kit.labeler(name)
        labeler.load()
        found[name] = labeler.label(batch), [getattr(scene, name, None) for scene in scenes]
    found["det"] = found["det"][0], [scene.boxes for scene in scenes]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_labels_are_what_the_card_says(made: dict[str, Any], name: str) -> None:
    """dtype, axes and range, measured here and not by the gate that the engine has."""
    said = card_json(name)["output"]
    for label in made[name][0]:
        values = label.xyxy if isinstance(label, Boxes) else label
        assert str(values.dtype) == said["dtype"]
        if said["shape"].startswith("(H, W"):
            assert (
                values.shape[:2] == (128, 128) and values.ndim == said["shape"].split(")")[0].count(",") + 1
            )
        if said["range"] == "vectors of length 1":
            assert np.allclose(np.linalg.norm(values, axis=-1), 1, atol=1e-3)
        elif "to" in said["range"]:
            low, high = map(float, said["range"].split(" to "))
            assert low <= values.min() and values.max() <= high
        elif said["range"].startswith("at least"):
            assert values.min() >= float(said["range"].split()[-1])


def test_depth_is_in_metres_and_larger_is_farther(made: dict[str, Any]) -> None:
    labels, truth = (np.stack(each) for each in made["depth"])
    assert np.median(labels / truth) == pytest.approx(1, abs=0.1)
    assert np.corrcoef(labels.ravel(), truth.ravel())[0, 1] > 0.9


def test_normals_are_x_right_y_up_z_toward_the_viewer(made: dict[str, Any]) -> None:
    """Each axis by itself, so that one wrong sign fails; of the truth too, by what a floor seen from above shows."""
    labels, truth = (np.stack(each) for each in made["normal"])
    for axis in range(3):
        assert np.corrcoef(labels[..., axis].ravel(), truth[..., axis].ravel())[0, 1] > 0.8
    assert truth[:, -1, :, 1].mean() > 0.5, "the floor, lowest in the image, faces up"
    assert truth[..., 2].mean() > 0, "what is seen faces the viewer"


def test_boxes_are_x0_y0_x1_y1_of_the_image(made: dict[str, Any]) -> None:
    for label, truth in zip(*made["det"], strict=True):
        best = [np.abs(truth - box).max(axis=1).min() for box in label.xyxy]
        assert len(label.xyxy) and np.median(best) < 0.05


# -- licences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("license", "kind"),
    [
        ("Apache-2.0", "permissive"),
        ("mit", "permissive"),
        ("CC-BY-4.0", "permissive"),
        ("CC-BY-NC-4.0", "non-commercial"),
        ("cc-by-nc-sa-4.0", "non-commercial"),
        ("NVIDIA Source Code License (non-commercial)", "non-commercial"),
        ("CC-BY-SA-3.0", "conditions"),
        ("AGPL-3.0", "conditions"),
        ("unknown", "unknown"),
        ("other", "unknown"),
        ("", "unknown"),
    ],
)
def test_terms(license: str, kind: str) -> None:
    assert licenses.terms(license) == kind


def _folder(root: Path, **files: str) -> Checkpoint:
    root.mkdir(exist_ok=True)
    for name, text in {"config_json": "{}", **files}.items():
        (root / name.replace("_", ".")).write_text(text)
    return Checkpoint(str(root), None, "sha256:" + "0" * 64)


def test_who_names_the_licence(tmp_path: Path) -> None:
    """The configuration, then the card if it knows the model, then the folder, else it is unknown."""
    folder = _folder(tmp_path / "a", card_yaml="license: bsd-3-clause")
    card = Card(expects="x", default=Weights(model="a/b", license="MIT"))
    hub = Checkpoint("a/b", COMMIT, COMMIT)
    assert license_of("X-1", card, "a/b", hub) == "X-1"
    assert license_of(None, card, "a/b", hub) == "MIT"
    assert license_of(None, card, str(folder.folder), folder) == "BSD-3-Clause"
    assert license_of(None, None, "a/b", _folder(tmp_path / "b")) == "unknown"
    assert license_of(None, card, None, None) is None


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"README_md": "---\nlicense: apache-2.0\ntags: [x]\n---\n# A"}, "Apache-2.0"),
        ({"README_md": "---\nlicense: other\nlicense_name: some-license\n---\n"}, "some-license"),
        ({"README_md": "---\nlicense: other\n---\n"}, "other"),
        ({"README_md": "---\nlicense: [mit, cc-by-nc-4.0]\n---\n"}, "MIT and CC-BY-NC-4.0"),
        ({"README_md": "# A\nlicense: mit\n"}, None),
        ({"README_md": "---\nlicense: [mit\n---\n"}, None),
        ({"config_json": '{"license": "MIT"}'}, "MIT"),
        ({"card_yaml": "- a list\n", "config_json": "[1]"}, None),
        ({"card_yaml": "license: MIT", "README_md": "---\nlicense: agpl-3.0\n---"}, "MIT"),
    ],
)
def test_what_a_folder_names(tmp_path: Path, files: dict[str, str], named: str | None) -> None:
    assert licenses.in_checkpoint(_folder(tmp_path, **files)) == named


def test_a_hub_checkpoint_names_it_in_the_local_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://nobody.invalid")
    checkpoint = Checkpoint("some/net", COMMIT, COMMIT)
    assert licenses.in_checkpoint(checkpoint) is None
    snapshot = tmp_path / "models--some--net" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert licenses.in_checkpoint(checkpoint) == "CC-BY-NC-4.0"


# -- the commands -------------------------------------------------------------------------------------


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main("labelers") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)
    assert call_main("labelers", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in listed} >= set(NAMES)


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main("labelers", "show", "semseg") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "shipped:semseg" in said and "853c97b51d851289775a7fcc82208fe10167b8ed" in said
    assert call_main("labelers", "show", "depth", "--json") == 0
    card = json.loads(capsys.readouterr().out)
    assert card["embedded"] == {"model": "shipped:depth", "license": "Apache-2.0"}
    assert card["default"]["revision"] == "8078d68a9c75a972131914f6afd0c1723be0da7f"
    assert card["output"]["units"] == "metres"
    assert call_main("labelers", "show", "deepth") == 2
    assert "'depth'" in capsys.readouterr().err
    assert call_main("labelers", "show", "-h") == 0
    assert "Example: fourmill labelers show depth" in " ".join(capsys.readouterr().out.split())
