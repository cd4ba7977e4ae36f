"""What the 4M reference's loader costs, for `loader.py`: masked batches of apple/ml-4m's own code, from a checkout of it.

    python benchmarks/loader_reference.py --make TREE --samples 4000
    python benchmarks/loader_reference.py --reference ml-4m --data TREE --batches 8 --repeats 1

The first writes synthetic data in the reference's layout: a folder per modality, USTAR files of 1,000 samples, one crop, and
vocab.json, a tokenizer of our own with its id layout. The second builds `build_wds_fm_pretraining_dataloader` as its training
script does (shuffle buffers of 1,000 and 1,000, no workers, one thread), takes batches until both buffers are full, then times
``--batches`` of them in processor time. The last line is JSON:

samples_per_cpu_s            samples per second of processor time
bytes_per_sample_of_batch    bytes of all tensors of a batch, per sample
input_share, target_share    tokens that are not padding, of 128 and 128 per sample

Batches of 256; half RGB to all, half all to all, alpha 0.5, where RGB is its tokens: no pixel is read. The reference imports
torchvision, cv2, albumentations, einops and much of its own. Here they are stand-ins that hold the few functions which these
batches call: clipping boxes costs less than the original, in the reference's favour. All else runs as it was published.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import io
import json
import math
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import reduce
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fourmill.tokenize.vocabulary import FILE_NAME, train_vocabulary

SIZES = {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}
GRIDS = {f"tok_{name}@224": size for name, size in SIZES.items()}
TEXTS = ("caption", "det")
GRID_TOKENS, TEXT_TOKENS, BUDGET = 196, 256, 128
BATCH, BUFFER, PER_TAR = 256, 1000, 1000
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
Box = Sequence[Any]  # left, top, right, bottom as shares of the image, and what else is known of it
Sample = dict[str, tuple[str, bytes]]  # a modality's extension and content
Batch = dict[str, dict[str, torch.Tensor]]  # a modality's tensor and masks


def array_bytes(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def make_sample(rng: np.random.Generator, words: Sequence[str], classes: Sequence[str]) -> Sample:
    """Uniform tokens, a caption of 8 to 24 words, and 0 to 8 boxes that the score threshold keeps."""
    sample = {
        name: ("npy", array_bytes(rng.integers(0, size, (1, GRID_TOKENS)).astype(np.int16)))
        for name, size in GRIDS.items()
    }
    boxes = []
    for _ in range(rng.integers(0, 9)):
        corners = np.sort(rng.random((2, 2)), axis=0).ravel().tolist()
        kind, score = str(rng.choice(classes)), float(rng.uniform(0.6, 1.0))
        boxes.append({"boxes": corners, "class_name": kind, "score": score})
    caption = " ".join(words[i] for i in rng.integers(0, len(words), rng.integers(8, 25)))
    sample["caption"] = ("json", json.dumps([caption]).encode())
    sample["det"] = ("json", json.dumps({"instances": boxes}).encode())
    sample["crop_settings"] = ("npy", array_bytes(np.array([[0, 0, 224, 224, 0]])))  # all of it, not mirrored
    return sample


def write_tar(file: Path, entries: Iterator[tuple[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make(tree: Path, samples: int) -> None:
    """Writes TREE/<modality>/<number>.tar and TREE/vocab.json."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(3000)]
    classes = [f"{word}class" for word in sorted(set(words))[:80]]
    texts = []
    for number in range(math.ceil(samples / PER_TAR)):
        rows = range(number * PER_TAR, min((number + 1) * PER_TAR, samples))
        made = [make_sample(rng, words, classes) for _ in rows]
        for name in made[0]:
            entries = ((f"{row:09d}.{s[name][0]}", s[name][1]) for row, s in zip(rows, made, strict=True))
            write_tar(tree / name / f"{number:05d}.tar", entries)
        texts += [json.loads(sample["caption"][1])[0] for sample in made]
    train_vocabulary(texts, classes).save(tree / FILE_NAME)


def crop_box(box: Box, x_min: int, y_min: int, x_max: int, y_max: int, rows: int, cols: int) -> Box:
    """The box as shares of the crop."""
    wide, high, (left, top, right, bottom) = x_max - x_min, y_max - y_min, box
    return (
        *((left * cols - x_min) / wide, (top * rows - y_min) / high),
        *((right * cols - x_min) / wide, (bottom * rows - y_min) / high),
    )


def keep_visible(boxes: Sequence[Box], rows: int, cols: int, min_visibility: float) -> list[Box]:
    """Boxes clipped to the crop, less those of which no more than a share of ``min_visibility`` is in it."""
    kept: list[Box] = []
    for left, top, right, bottom, *rest in boxes:
        inside = [min(max(v, 0.0), 1.0) for v in (left, top, right, bottom)]
        area = (inside[2] - inside[0]) * (inside[3] - inside[1])
        if area > min_visibility * (right - left) * (bottom - top):
            kept.append((*inside, *rest))
    return kept


def composed(steps: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """One call after the other."""
    return lambda value: reduce(lambda so_far, step: step(so_far), steps, value)


def stand_in(name: str, folder: Path | None = None, **content: Any) -> ModuleType:
    """A module of that name in `sys.modules`; with ``folder``, a package whose modules are read from there."""
    module = module_from_spec(ModuleSpec(name, None, is_package=True))
    module.__path__ = [str(folder)] if folder else []
    vars(module).update(content)
    sys.modules[name] = module
    return module


def import_reference(checkout: Path) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The reference's modules of datasets, transforms and augmenters, without what its packages import besides."""
    if not (checkout / "fourm/data/unified_datasets.py").is_file():
        raise SystemExit(f"{checkout} is no checkout of apple/ml-4m")
    sys.path.insert(0, str(checkout))
    sys.modules["datasets"] = None  # type: ignore[assignment]  # optional there, and slow to import
    for name in ("torchvision", "cv2", "albumentations.core"):
        stand_in(name)
    stand_in("torchvision.transforms", Compose=composed)
    stand_in("torchvision.transforms.functional")
    boxes = stand_in("albumentations.core.bbox_utils", filter_bboxes=keep_visible)
    stand_in("albumentations", bbox_crop=crop_box, core=SimpleNamespace(bbox_utils=boxes))
    stand_in("einops", rearrange=lambda values, _: values.T, repeat=None, reduce=None)
    stand_in("fourm", checkout / "fourm")
    stand_in("fourm.utils", checkout / "fourm/utils", to_2tuple=lambda v: v if np.iterable(v) else (v, v))
    stand_in("fourm.data", checkout / "fourm/data")
    stand_in("fourm.data.multimodal_dataset_folder", MultiModalDatasetFolder=None)
    from fourm.data import image_augmenter, modality_transforms, unified_datasets  # type: ignore[import-not-found]

    return unified_datasets, modality_transforms, image_augmenter


def modality_info() -> dict[str, dict[str, Any]]:
    """What the reference's own table says of the seven, with the mixture's alphas [RGB to all, all to all]."""
    info: dict[str, dict[str, Any]] = {}
    for name in sorted((*GRIDS, *TEXTS)):
        grid = {"type": "img", "max_tokens": GRID_TOKENS, "pretokenized": True}
        text = {"type": "seq", "max_tokens": TEXT_TOKENS, "keep": ["random", "random"]}
        alphas = {"input_alphas": [1000.0 * (name == "tok_rgb@224"), 0.5], "target_alphas": [0.5, 0.5]}
        info[name] = {**(grid if name in GRIDS else text), "min_tokens": 0, **alphas}
    return info


def build(checkout: Path, tree: Path, repeats: int) -> Iterator[Batch]:
    """Batches of the reference, without end."""
    datasets, transforms, augmenters = import_reference(checkout)
    info = modality_info()
    own = {"caption": transforms.CaptionTransform(), "det": transforms.DetectionTransform()}
    crop = augmenters.PreTokenizedImageAugmenter(target_size=224, main_domain="rgb@224")

    def sized(sample: Any, settings: Any) -> tuple[Any, ...]:
        """The reference takes the image's size from its pixels; there are none, and boxes need one."""
        coordinates, flip, _, *rest = crop(sample, settings)
        return coordinates, flip, (224, 224), *rest

    if not (tree / FILE_NAME).is_file():
        raise SystemExit(f"{tree} holds no data: write it with --make {tree}")
    last = len(list((tree / "crop_settings").glob("*.tar"))) - 1
    loader = datasets.build_wds_fm_pretraining_dataloader(
        data_path=f"{tree}/[{','.join([*GRIDS, *TEXTS, 'crop_settings'])}]/{{00000..{last:05d}}}.tar",
        all_domains=list(info), modality_info=info, image_augmenter=sized,
        modality_transforms={**{name.split("@")[0]: transforms.TokTransform() for name in GRIDS}, **own},
        text_tokenizer=Tokenizer.from_file(str(tree / FILE_NAME)),
        input_tokens_range=(BUDGET, BUDGET), target_tokens_range=(BUDGET, BUDGET), num_gpus=1, num_workers=0,
        batch_size=BATCH, epoch_size=None, shuffle_buffer_load=BUFFER, shuffle_buffer_repeat=BUFFER, n_repeats=repeats,
    )  # fmt: skip
    return iter(loader)


def measure(batches: Iterator[Batch], count: int, repeats: int) -> dict[str, float]:
    """Figures of ``count`` batches, once the buffers are full: until then they take in two samples for each they give."""
    for _ in range(math.ceil(BUFFER * repeats / BATCH)):
        next(batches)
    begin = time.process_time()
    measured = [next(batches) for _ in range(count)]
    took = time.process_time() - begin
    parts = [part for batch in measured for part in batch.values()]

    def share(mask: str) -> float:
        return round(sum(int((~part[mask]).sum()) for part in parts) / (count * BATCH * BUDGET), 4)

    size = sum(tensor.nbytes for part in parts for tensor in part.values())
    return {
        "samples_per_cpu_s": round(count * BATCH / took, 1),
        "bytes_per_sample_of_batch": size / (count * BATCH),
        "input_share": share("input_mask"),
        "target_share": share("target_mask"),
    }


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--make", type=Path, metavar="TREE", help="write synthetic data there")
    parser.add_argument("--samples", type=int, default=4000, help="how many to write")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of apple/ml-4m")
    parser.add_argument("--data", type=Path, metavar="TREE", help="what --make wrote")
    parser.add_argument("--batches", type=int, default=8, help="how many are timed")
    parser.add_argument("--repeats", type=int, default=1, help="uses of a sample once it is read; 4M has 4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.make:
        make(options.make, options.samples)
    elif options.reference and options.data:
        with redirect_stdout(sys.stderr):  # the reference prints
            batches = build(options.reference, options.data, options.repeats)
            result = measure(batches, options.batches, options.repeats)
        print(json.dumps(result))
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
