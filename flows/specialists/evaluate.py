"""How good a dense specialist is on held-out scenes, as measured from its saved checkpoint.

`python -m fourmill.flows.specialists.evaluate depth FOLDER` prints the metrics as JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fourmill.flows.specialists.dense_networks import SIZE, TASKS
from fourmill.shards.sources.scenes import SCENE_CLASSES, Scene, render
from fourmill.train.metrics import abs_rel, delta1, mean_angular_error_deg, mean_iou

HELD_OUT_SEED = 2000
HELD_OUT_SCENES = 256
BATCH = 16


def load(task: str, folder: Path) -> Any:
    """The network of a checkpoint folder in float32, in evaluation mode."""
    import transformers

    kind = "AutoModelForDepthEstimation" if task == "depth" else "AutoModelForSemanticSegmentation"
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [-1, 1]: what the networks expect."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return pixels.div_(127.5).sub_(1.0)


def full_size(task: str, output: Any, size: int) -> torch.Tensor:
    """The raw output at (size, size): metres (B, 1, S, S), vectors (B, 3, S, S) or class logits (B, 5, S, S)."""
    raw = output.predicted_depth[:, None] if task == "depth" else output.logits
    return F.interpolate(raw.float(), size=(size, size), mode="bilinear", align_corners=False)


@torch.inference_mode()
def predict(task: str, network: Any, images: np.ndarray) -> np.ndarray:
    """Labels of uint8 images (N, S, S, 3): depth float32 (N, S, S), normals (N, S, S, 3) or classes uint8 (N, S, S)."""
    parts = []
    for start in range(0, len(images), BATCH):
        out = full_size(task, network(to_pixels(images[start : start + BATCH])), images.shape[1])
        if task == "depth":
            parts.append(out[:, 0].clamp(min=0.01).numpy())
        elif task == "normal":
            parts.append(F.normalize(out, dim=1).permute(0, 2, 3, 1).numpy())
        else:
            parts.append(out.argmax(dim=1).to(torch.uint8).numpy())
    return np.concatenate(parts)


def score(task: str, predicted: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """The metrics of a task, rounded to 4 decimals."""
    if task == "depth":
        true = np.stack([scene.depth for scene in scenes])
        # the scale of a single image is a guess: how good is the shape alone
        scale = np.median(true / predicted, axis=(1, 2), keepdims=True)
        found = {
            "abs_rel": abs_rel(predicted, true),
            "delta1": delta1(predicted, true),
            "abs_rel_median_scaled": abs_rel(predicted * scale, true),
        }
    elif task == "normal":
        true = np.stack([scene.normal for scene in scenes])
        found = {"mean_angular_error_deg": mean_angular_error_deg(predicted, true)}
    else:
        true = np.stack([scene.semseg for scene in scenes])
        found = {
            "mean_iou": mean_iou(predicted, true, len(SCENE_CLASSES)),
            "accuracy": float((predicted == true).mean()),
        }
    return {name: round(value, 4) for name, value in found.items()}


def held_out() -> Iterator[Scene]:
    return (render(HELD_OUT_SEED, index, SIZE) for index in range(HELD_OUT_SCENES))


def evaluate(task: str, folder: Path) -> dict[str, float]:
    """The metrics of a saved checkpoint on the held-out scenes, and its milliseconds per image."""
    scenes = list(held_out())
    network = load(task, folder)
    images = np.stack([scene.image for scene in scenes])
    predict(task, network, images[:BATCH])
    start = time.perf_counter()
    predicted = predict(task, network, images)
    return score(task, predicted, scenes) | {
        "ms_per_image": round((time.perf_counter() - start) / len(images) * 1e3, 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(evaluate(arguments.task, arguments.folder)))


if __name__ == "__main__":
    main()
