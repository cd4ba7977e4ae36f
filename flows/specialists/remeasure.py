"""Measures what ships again, and renews the figures in its cards: `python -m fourmill.flows.specialists.remeasure`.

Specialists and fitted grid tokenizers, all of them or those named: `depth det tokenizer:rgb`. Weights stay as they are.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from fourmill.checkpoints import shipped_folder
from fourmill.flows.specialists import clip, det
from fourmill.flows.specialists.dense_networks import SIZE, TASKS
from fourmill.flows.specialists.evaluate import evaluate
from fourmill.flows.specialists.folder import write_card
from fourmill.flows.specialists.pool import HELD_OUT_COUNT, HELD_OUT_SEED, TRAIN_SEED, open_pool
from fourmill.flows.specialists.tokenizers import HELD_OUT_COUNT as HELD_OUT_LABELS
from fourmill.flows.specialists.tokenizers import labels_of, modality_of
from fourmill.tokenize.base import load_codec
from fourmill.tokenize.fit import measure
from fourmill.tokenize.vqvae import VQVAE

PROBE_SCENES = 1024  # what CLIP's linear probe is fitted on
TOKENIZERS = tuple(f"tokenizer:{name}" for name in ("rgb", "depth", "normal", "semseg", "clip"))
NAMES = (*TASKS, "det", "clip", *TOKENIZERS)


def figures(name: str, folder: Path) -> dict[str, Any]:
    """What the card says under ``held_out``, measured now."""
    if name in TASKS:
        return evaluate(name, folder)
    if name == "det":
        return det.measure(det.load(folder).eval(), open_pool(HELD_OUT_SEED, HELD_OUT_COUNT, SIZE))
    if name == "clip":
        from transformers import AutoTokenizer

        model, tokenizer = clip.load(folder).eval(), AutoTokenizer.from_pretrained(folder)
        held_out = open_pool(HELD_OUT_SEED, HELD_OUT_COUNT, SIZE)
        probe = clip.patch_probe(model, tokenizer, open_pool(TRAIN_SEED, PROBE_SCENES, SIZE), held_out)
        return {
            **clip.retrieval(model, tokenizer, held_out),
            "patch_class_linear_probe_accuracy": probe,
        }
    modality = name.removeprefix("tokenizer:")
    codec = load_codec(folder, modality_of(modality), SIZE)
    assert isinstance(codec, VQVAE)
    return {
        key: round(value, 4)
        for key, value in measure(codec, labels_of(modality, HELD_OUT_SEED, HELD_OUT_LABELS)).items()
    }


def remeasure(name: str, say: Callable[[str], None] = print) -> None:
    tokenizer = name.startswith("tokenizer:")
    folder = shipped_folder("scenes/" + name.removeprefix("tokenizer:") if tokenizer else name).resolve()
    card = yaml.safe_load((folder / "card.yaml").read_text())
    found = figures(name, folder)
    found.pop("ms_per_image", None)  # of a machine, not of the weights
    card["held_out"] = {**card["held_out"], **found}
    write_card(folder, card)
    say(f"{name}: {card['held_out']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(NAMES)}")
    torch.set_num_threads(1)
    names = parser.parse_args().names or NAMES
    for name in names:
        if name not in NAMES:
            parser.error(f"{name!r} is not one of {', '.join(NAMES)}")
        remeasure(name)


if __name__ == "__main__":
    main()
