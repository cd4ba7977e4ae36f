"""The dense specialists: their losses, their training loop on a handful of scenes, and the shipped checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fourmill.labelers
from fourmill.flows.specialists import dense
from fourmill.flows.specialists.dense_networks import SIZE, TASKS, make_network
from fourmill.flows.specialists.dense_pool import open_dense_pool
from fourmill.flows.specialists.evaluate import HELD_OUT_SEED, load, predict, score
from fourmill.flows.specialists.muon import Together, orthogonal
from fourmill.shards.sources.scenes import SCENE_CLASSES, Scene, render

SHIPPED = Path(fourmill.labelers.__file__).resolve().parent / "specialists"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render(HELD_OUT_SEED, index, SIZE) for index in range(32)]


@pytest.mark.parametrize(
    ("task", "metric", "limit"),
    [("depth", "abs_rel", 0.07), ("normal", "mean_angular_error_deg", 6.0), ("semseg", "mean_iou", 0.85)],
)
def test_shipped_checkpoints_are_as_good_as_their_cards(
    task: str, metric: str, limit: float, scenes: list[Scene]
) -> None:
    card = yaml.safe_load((SHIPPED / task / "card.yaml").read_text())
    predicted = predict(task, load(task, SHIPPED / task), np.stack([scene.image for scene in scenes]))
    found = score(task, predicted, scenes)[metric]
    assert found == pytest.approx(card["held_out"][metric], rel=0.25)  # these are 32 of the card's 256 scenes
    assert found > limit if metric == "mean_iou" else found < limit


def test_checkpoint_folders_are_complete() -> None:
    for task in TASKS:
        folder = SHIPPED / task
        assert (folder / "model.safetensors").stat().st_size < 4_000_000
        config = json.loads((folder / "config.json").read_text())
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        assert processor["image_mean"] == processor["image_std"] == [0.5, 0.5, 0.5]
        assert processor["size"] == {"height": SIZE, "width": SIZE}
        if task == "semseg":
            assert [config["id2label"][str(k)] for k in range(5)] == list(SCENE_CLASSES)
        if task == "depth":
            assert config["depth_estimation_type"] == "metric"


def test_losses_vanish_at_the_truth(scenes: list[Scene]) -> None:
    depth = torch.from_numpy(scenes[0].depth)[None, None]
    normal = torch.from_numpy(scenes[0].normal).permute(2, 0, 1)[None]
    assert dense.depth_loss(depth, depth).item() < 1e-6
    assert dense.normal_loss(3.0 * normal, normal).item() < 5e-3
    assert dense.normal_loss(-normal, normal).item() == pytest.approx(2.0, abs=1e-3)


def test_depth_at_zero_still_learns() -> None:
    raw = torch.zeros(1, 1, 16, 16, requires_grad=True)
    dense.depth_loss(raw, torch.full((1, 1, 16, 16), 3.0)).backward()
    assert raw.grad is not None and (raw.grad < 0).all()


def test_mirroring_negates_the_normals_x(scenes: list[Scene]) -> None:
    normal = torch.from_numpy(scenes[0].normal).permute(2, 0, 1)[None]
    mirrored = dense._mirror({"pixels": torch.zeros(1, 3, SIZE, SIZE), "normal": normal})["normal"]
    expected = scenes[0].normal[:, ::-1] * np.array([-1.0, 1.0, 1.0], np.float32)
    np.testing.assert_array_equal(mirrored[0].permute(1, 2, 0).numpy(), expected)


def test_pool_is_the_scenes(tmp_path: Path) -> None:
    pool = open_dense_pool(5, 3, 32, tmp_path)
    again = open_dense_pool(5, 3, 32, tmp_path)
    scene = render(5, 2, 32)
    for one in (pool, again):
        assert len(one) == 3
        np.testing.assert_array_equal(one.image[2], scene.image)
        np.testing.assert_array_equal(one.semseg[2], scene.semseg)
        np.testing.assert_allclose(one.depth[2], scene.depth, rtol=1e-3)
        np.testing.assert_allclose(one.normal[2] / 127.0, scene.normal, atol=0.5 / 127 + 1e-6)


def test_a_few_steps_lower_the_loss_and_share_the_trunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = {task: make_network(task) for task in TASKS}
    dense._share_trunks(networks)
    assert networks["normal"].neck is networks["depth"].neck
    optimizer = Together(torch.nn.ModuleList(networks.values()), 3e-4, 0.02)
    pool = open_dense_pool(1, 4, SIZE, tmp_path)
    settings = dense.Settings(tasks=TASKS, out=tmp_path, batch=4)
    batch = next(dense._batches(pool, settings))
    history = [dense._step(networks, optimizer, batch, SIZE // 2, 3e-4) for _ in range(10)]
    for task in TASKS:
        assert history[-1][task] < history[0][task]


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_orthogonal_moves_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert 0.6 < values.min() and values.max() < 1.3
