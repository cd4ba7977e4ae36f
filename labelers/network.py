"""What labelers with a network share: preprocessing, loading with nothing left to chance, running.

Networks are `transformers` checkpoints loaded through an Auto class, safetensors only. The library
fills weights that a checkpoint lacks with random numbers and a warning; here that is an error.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import numpy as np

from fourmill.checkpoints import Checkpoint, fetch, read_json
from fourmill.errors import CheckpointError, ConfigError, nearest
from fourmill.labelers.base import LabelBatch, Labeler, LabelerSettings
from fourmill.labelers.letterbox import Placement, letterbox, letterbox_on
from fourmill.labels import Label

PRECISIONS = ("fp32", "bf16", "fp16")
#: Options of every network labeler. ``input_size``: side of the square that the network sees (None: what its
#: preprocessor says). ``attention``: "auto" lets transformers choose; "sdpa" and "eager" insist. ``channels_last``: the
#: order of an image in memory that convolutions on a GPU like ("auto": there, for families with many of them; true, false).
#: ``compile``: by torch.compile, some minutes at first. ``resize`` on the "host" (Pillow) or the "device": the same but for a few
#: pixels' rounding, and no time of the processor; for a GPU that waits for it.
NETWORK_OPTIONS: Mapping[str, Any] = {
    "input_size": None,
    "attention": "auto",
    "channels_last": "auto",
    "compile": False,
    "resize": "host",
}
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "attention": ("auto", "sdpa", "eager"),
    "channels_last": ("auto", True, False),
    "compile": (True, False),
    "resize": ("host", "device"),
}

#: Families whose time goes into convolutions.
_CONVOLUTIONAL = (
    "upernet",
    "rt_detr",
    "rt_detr_v2",
    "d_fine",
    "detr",
    "table-transformer",
    "conditional_detr",
)

#: Parameters that a checkpoint may lack because no forward pass in evaluation reads them: batch counters, and the
#: residual unit of a DPT neck's first fusion layer (which has no residual; the MiDaS checkpoints omit it).
_NEVER_READ = re.compile(r"num_batches_tracked$|^neck\.fusion_stage\.layers\.0\.residual_layer1\.")

#: Families whose published checkpoints hold the heads of several tasks: which one they were saved from says nothing
#: of which can be loaded. One that lacks the head is refused for its missing weights.
_MANY_HEADS = ("tipsv2_dpt",)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """pixels = (uint8 * rescale - mean) / std, on a square of ``size`` pixels (None: not said)."""

    size: int | None
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour around a letterboxed frame: what normalises to zero, or mid-grey without a mean."""
        if not any(self.mean):
            return (127, 127, 127)
        red, green, blue = (int(np.clip(round(mean / self.rescale), 0, 255)) for mean in self.mean)
        return (red, green, blue)


def read_preprocessing(checkpoint: Checkpoint, where: str) -> Preprocessing:
    """From preprocessor_config.json (or the image processor within processor_config.json)."""
    try:
        raw = read_json(checkpoint, "preprocessor_config.json", where)
    except CheckpointError as missing:
        try:
            raw = read_json(checkpoint, "processor_config.json", where)["image_processor"]
        except (CheckpointError, KeyError):
            raise CheckpointError(
                f"{where}: {checkpoint.source} lacks preprocessor_config.json, which says how its pixels are "
                "normalised; save the image processor beside the network"
            ) from missing
    rescale = float(raw.get("rescale_factor", 1 / 255)) if raw.get("do_rescale", True) else 1.0
    mean, std = raw.get("image_mean"), raw.get("image_std")
    if not raw.get("do_normalize", mean is not None):
        return Preprocessing(_side(raw), rescale, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if not (_is_triple(mean) and _is_triple(std)):
        raise CheckpointError(
            f"{where}: preprocessor_config.json of {checkpoint.source} normalises, but its image_mean and image_std "
            f"are {mean} and {std}, not three numbers each"
        )
    return Preprocessing(_side(raw), rescale, tuple(mean), tuple(std))


def _is_triple(value: Any) -> TypeGuard[Sequence[float]]:
    return isinstance(value, (list, tuple)) and len(value) == 3


def _side(raw: Mapping[str, Any]) -> int | None:
    """The side of the square: the crop where the preprocessor crops, else the longest fixed side."""
    size = raw.get("crop_size") if raw.get("do_center_crop") and raw.get("crop_size") else raw.get("size")
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping):
        sides = [size[name] for name in ("height", "width") if size.get(name)]
        if sides:
            return int(max(sides))
        for name in ("shortest_edge", "longest_edge"):
            if size.get(name):
                return int(size[name])
    return None


def load_pretrained(
    auto_class: str, checkpoint: Checkpoint, where: str, expected: str, attention: str = "auto"
) -> Any:
    """A network in float32 and evaluation mode, with every weight from the checkpoint, or `CheckpointError`."""
    import torch
    import transformers
    from safetensors import SafetensorError

    local = fetch(checkpoint, where)
    arguments: dict[str, Any] = {**local.kwargs(), "use_safetensors": True, "dtype": torch.float32}
    if attention != "auto":
        arguments["attn_implementation"] = attention
    try:
        with _quiet():
            network, info = getattr(transformers, auto_class).from_pretrained(
                local.source, output_loading_info=True, **arguments
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{where}: cannot load {expected} from {checkpoint.source}: {type(error).__name__}: {reason}"
        ) from error
    missing = sorted(name for name in info["missing_keys"] if not _NEVER_READ.search(name))
    broken = missing + [str(name) for name in info["mismatched_keys"]] + list(info["error_msgs"])
    if broken:
        raise CheckpointError(
            f"{where}: {checkpoint.source} lacks {len(broken)} weights of {expected} "
            f"({type(network).__name__}), among them {', '.join(broken[:3])}"
        )
    return network.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's load report and progress bar: what matters of them becomes an error above."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def class_names(config: Mapping[str, Any], source: str, where: str) -> dict[int, str]:
    """id2label of a config.json, by id."""
    raw = config.get("id2label")
    if not isinstance(raw, Mapping) or not raw:
        raise CheckpointError(f"{where}: config.json of {source} has no class names (id2label)")
    return dict(sorted((int(key), str(name)) for key, name in raw.items()))


class NetworkLabeler(Labeler):
    """A labeler around one `transformers` network that sees letterboxed squares.

    Subclasses name their ``auto_classes`` with the ``families`` (model types) they accept, and turn the
    network's output into labels in `read`.
    """

    auto_classes: ClassVar[Mapping[str, tuple[str, ...]]]  # Auto class -> model types that it may load
    expected: ClassVar[str]  # for messages: "a depth network"
    options: ClassVar[Mapping[str, Any]] = NETWORK_OPTIONS
    later_options: ClassVar[frozenset[str]] = frozenset({"channels_last", "compile", "resize"})

    network: Any
    preprocessing: Preprocessing
    side: int
    _compiled: Any = None
    _order: Any  # of an image in memory

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        if settings.precision not in PRECISIONS:
            hint = nearest(settings.precision, PRECISIONS)
            raise ConfigError(f"{self.where}.precision: unknown precision {settings.precision!r}{hint}")
        if settings.precision == "fp16" and settings.device == "cpu":
            raise ConfigError(
                f"{self.where}.precision: fp16 on a CPU is many times slower than fp32; use fp32 or bf16"
            )
        for name, known in _CHOICES.items():
            if not any(self.params[name] is one or self.params[name] == one != 1 for one in known):
                shown = ", ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in known)
                raise ConfigError(f"{self.where}.{name}: {self.params[name]!r} is not one of {shown}")

    @property
    def weights(self) -> Checkpoint:
        checkpoint = self.checkpoint
        if checkpoint is None:
            raise ConfigError(
                f"{self.where}.model: {self.expected} is needed: a folder, a hub id or shipped:NAME"
            )
        return checkpoint

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json, once its family is known to be one that this labeler can read."""
        config = read_json(self.weights, "config.json", f"{self.where}.model")
        self._choose(config)
        return config

    def _choose(self, config: Mapping[str, Any]) -> str:
        """The Auto class for this checkpoint: the one whose network it was saved from, else the first of its family."""
        from transformers.models.auto import modeling_auto

        family, saved = config.get("model_type", "(none)"), config.get("architectures") or []
        found = [name for name, families in self.auto_classes.items() if family in families]
        made = {name: modeling_auto.__dict__[_MAPPINGS[name]][family] for name in found if name in _MAPPINGS}
        any_head = not saved or family in _MANY_HEADS
        matching = [name for name in found if name not in made or any_head or made[name] in saved]
        if matching:
            return matching[0]
        known = sorted(
            {*made.values()} or {one for families in self.auto_classes.values() for one in families}
        )
        raise CheckpointError(
            f"{self.where}.model: {self.weights.source} holds {', '.join(saved) or 'a network'} (model type {family}); "
            f"{self.expected} is expected: {', '.join(known)}"
        )

    def load(self) -> None:
        import torch

        config = self.config()
        where, checkpoint = f"{self.where}.model", self.weights
        fetch(checkpoint, where)  # whole, so that no file below is missing for want of a connection
        self.preprocessing = read_preprocessing(checkpoint, where)
        self.side = self._input_side(config)
        network = load_pretrained(
            self._choose(config), checkpoint, where, self.expected, self.params["attention"]
        )
        self._order = self._memory_format(config)
        self.network = self.prepare(network.to(self.settings.device, memory_format=self._order))
        self._compiled = torch.compile(self.network) if self.params["compile"] else None

    def prepare(self, network: Any) -> Any:
        """For families that can do with less than their whole `forward`."""
        return network

    def _memory_format(self, config: Mapping[str, Any]) -> Any:
        import torch

        wanted = self.params["channels_last"]
        if wanted == "auto":
            wanted = self.settings.device.startswith("cuda") and config.get("model_type") in _CONVOLUTIONAL
        return torch.channels_last if wanted else torch.contiguous_format

    def _input_side(self, config: Mapping[str, Any]) -> int:
        side = self.params["input_size"] or self.preprocessing.size
        if not side:
            raise ConfigError(
                f"{self.where}.input_size: the preprocessor of {self.weights.source} gives no size; set it (pixels)"
            )
        step = _patch_size(config)
        if side % step:
            near = max(step, side // step * step)
            raise ConfigError(
                f"{self.where}.input_size: {side} is no multiple of the network's patch of {step} pixels; use {near}"
            )
        return int(side)

    def run(self, pixels: Any, **arguments: Any) -> Any:
        """The network's output for uint8 (B, R, R, 3), or a tensor (B, 3, R, R). Call within `torch.inference_mode`."""
        import torch

        device = torch.device(self.settings.device)
        values = self.normalise(pixels)
        with self._numerics(device):
            return (self._compiled or self.network)(pixel_values=values, **arguments)

    def normalise(self, pixels: Any) -> Any:
        """The network's float32 (B, 3, R, R) of what `run` takes, in the network's order in memory.

        In place and, on the host, image by image: an image stays in the cache, and a batch is allocated once.
        """
        import torch

        device, how = torch.device(self.settings.device), self.preprocessing
        mean = torch.tensor(how.mean, device=device).view(3, 1, 1)
        std = torch.tensor(how.std, device=device).view(3, 1, 1)
        order = self._order
        if device.type != "cpu" or isinstance(pixels, torch.Tensor):
            if not isinstance(pixels, torch.Tensor):
                pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
            return pixels.to(torch.float32, memory_format=order).mul_(how.rescale).sub_(mean).div_(std)
        count, side = len(pixels), pixels.shape[1]
        values = torch.empty((count, 3, side, side), dtype=torch.float32, memory_format=order)
        for row, image in zip(values, pixels, strict=True):
            planes = image.transpose(2, 0, 1)
            if order == torch.contiguous_format:
                planes = np.ascontiguousarray(planes)
            row.copy_(torch.from_numpy(planes)).mul_(how.rescale).sub_(mean).div_(std)
        return values

    def canvas(self, frames: Sequence[np.ndarray]) -> tuple[Any, list[Placement]]:
        """Frames on the network's square, resized where the options say, and where they lie there."""
        if self.params["resize"] == "device":
            return letterbox_on(self.settings.device, frames, self.side, self.preprocessing.fill)
        return letterbox(frames, self.side, self.preprocessing.fill)

    @contextmanager
    def _numerics(self, device: Any) -> Iterator[None]:
        """The precision of the recipe; on a GPU no autotuning and no silent TF32."""
        import torch

        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.precision]
        cast = torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()
        flags = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with cast, flags if device.type == "cuda" else nullcontext():
            yield

    def label(self, batch: LabelBatch) -> list[Label]:
        import torch

        with torch.inference_mode():
            canvas, placements = self.canvas(batch.frames)
            return self.read(self.run(canvas), placements)

    @abstractmethod
    def read(self, output: Any, placements: Sequence[Placement]) -> list[Label]:
        """The network's output for a batch -> one label per row, in the frame of each row's image."""


_MAPPINGS = {
    "AutoModelForDepthEstimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "AutoModelForNormalEstimation": "MODEL_FOR_NORMAL_ESTIMATION_MAPPING_NAMES",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForUniversalSegmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
}


def _patch_size(config: Mapping[str, Any]) -> int:
    """Pixels per patch of a transformer, else 32, the stride of convolutional pyramids."""
    for part in (config, config.get("backbone_config"), config.get("vision_config")):
        if isinstance(part, Mapping) and isinstance(part.get("patch_size"), int):
            return int(part["patch_size"])
    return 32
