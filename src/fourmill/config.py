"""One YAML file per dataset, checked by pydantic; errors name the key and suggest the nearest one."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fourmill.errors import ConfigError, nearest
from fourmill.train_config import TrainConfig

NAME = re.compile(r"[a-z][a-z0-9_]*")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DecodeConfig(_Section):
    """The decode frame: every image is decoded once to this and every labeler starts from it."""

    shorter_side: int = Field(default=256, ge=16, le=2048)
    filter: Literal["bilinear", "bicubic"] = "bicubic"


class TokenizerConfig(BaseModel):
    """A given tokenizer (``model``), or options of the one that is fitted on this dataset."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | None = None
    revision: str | None = None
    license: str | None = None  # of a given one, where its folder names none

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LimitConfig(_Section):
    """What the mean of a figure over a shard may be: beyond ``warn_*`` it is said, beyond ``refuse_*`` nothing is committed."""

    warn_below: float | None = None
    warn_above: float | None = None
    refuse_below: float | None = None
    refuse_above: float | None = None


class ModalityConfig(BaseModel):
    """One modality. Keys that are not listed here are options of its labeler, checked by the labeler."""

    model_config = ConfigDict(extra="allow", frozen=True)

    labeler: str | None = None
    model: str | None = None
    revision: str | None = None
    license: str | None = None  # of the weights: goes into receipts and snapshots, and changes no recipe
    batch_size: int | None = Field(default=None, ge=1, le=4096)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    keep_labels: bool = False
    quality: dict[str, LimitConfig] = {}  # by figure, see fourmill.labelers.figures; changes no recipe
    tokenizer: TokenizerConfig = TokenizerConfig()

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class FitConfig(_Section):
    """How tokenizers that are fitted here are fitted."""

    samples: int = Field(default=100_000, ge=1)  # whole shards are taken until there are this many
    minutes: float = Field(default=0.0, ge=0)  # 0: until `steps`
    steps: int = Field(default=20_000, ge=1)
    preset: str = "4m"
    batch_size: int = Field(default=64, ge=1)  # of all workers together
    ema: float = Field(
        default=0.0, ge=0, lt=1
    )  # decay of the running mean of the weights that is kept; 0: none
    sizes: list[int] = []  # image sizes that a tokenizer is fitted for, beside the dataset's own
    # What follows changes no tokenizer beyond its last bits.
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU
    workers: int = Field(default=1, ge=1)  # Ray Train: each with a GPU of its own, or a core
    checkpoint_minutes: float = Field(default=5.0, ge=0)  # between states that a killed fit goes on from

    def identity(self) -> dict[str, Any]:
        """What a fitted tokenizer is found again by."""
        same = {"precision", "workers", "checkpoint_minutes"}
        later = {name for name in ("ema", "sizes") if not getattr(self, name)}  # as if there were no such key
        return self.model_dump(exclude=same | later)

    def options(self) -> dict[str, Any]:
        """Those of `fourmill.tokenize.fit`."""
        return self.model_dump(exclude={"workers"})


class EngineConfig(_Section):
    """Where and how the work runs. Nothing here changes a byte of the dataset."""

    address: str | None = None  # a Ray cluster ("auto", "ray://..."); None: a local one for this run
    groups: list[list[str]] = []  # modalities that share one actor; default: all together
    replicas: int | None = Field(default=None, ge=1)  # actors per group; default: one per GPU, or per core
    gpus_per_actor: float = Field(default=1.0, ge=0)
    # micro-batches that an actor has in work: with 2, one runs its networks while labels of the other are tokenized; what is
    # done twice when an actor dies doubles too
    calls_per_actor: int = Field(default=1, ge=1, le=8)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = Field(default=16, ge=1, le=4096)  # rows in a micro-batch
    single_writer: bool = False
    inflight_mb: int = Field(default=128, ge=1)  # pixels that a runner has decoded ahead of its specialists
    batch_deadline_s: float = Field(default=600.0, gt=0)  # a micro-batch that takes longer hangs
    drain_s: float = Field(default=30.0, ge=0)  # after SIGTERM, for shards under way to finish
    straggler_s: float = Field(
        default=30, ge=0
    )  # no shard is given to a second runner before it has run so long
    max_attempts: int = Field(default=3, ge=1)  # of a shard before it is parked
    max_absent_share: float = Field(default=0.05, ge=0, le=1)
    max_absent_rows: int = Field(default=10, ge=0)  # so small shards are not parked for a row or two


class SourceConfig(BaseModel):
    """``kind`` names the source; the other keys are its options, checked by the source."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Config(_Section):
    """A dataset and everything made of it."""

    dataset: str
    source: SourceConfig
    seed: int = Field(default=0, ge=0)
    shard_size: int = Field(default=1000, ge=1, le=1_000_000)
    decode: DecodeConfig = DecodeConfig()
    image_size: int = Field(default=224, ge=16, le=1024)
    n_crops: int = Field(default=1, ge=1, le=64)
    val_fraction: float = Field(default=0.01, ge=0, lt=1)
    modalities: dict[str, ModalityConfig]
    fit: FitConfig = FitConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    #: where finished shards are also written as the tars that the published 4M code trains from
    webdataset: str | None = None

    @field_validator("modalities", mode="before")
    @classmethod
    def _empty_means_default(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                if not NAME.fullmatch(str(name)):
                    raise ValueError(
                        f"{name!r} is not a modality name (lower case letters, digits, underscores)"
                    )
            return {name: entry or {} for name, entry in value.items()}
        return value

    @field_validator("modalities")
    @classmethod
    def _not_empty(cls, value: dict[str, ModalityConfig]) -> dict[str, ModalityConfig]:
        if not value:
            raise ValueError("name at least one modality")
        return value

    def resolved_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def find_config(name: str) -> Path:
    """A YAML file by path, or one that ships with fourmill by its bare name (``demo``)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(str(files("fourmill"))) / "configs"
    if "/" not in name and (shipped / f"{path.stem}.yaml").is_file():
        return shipped / f"{path.stem}.yaml"
    known = sorted(p.stem for p in shipped.glob("*.yaml")) if shipped.is_dir() else []
    raise ConfigError(f"configuration {name!r} is not a file{nearest(path.stem, known)}")


def load_config(name: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and check a configuration; ``overrides`` are ``a.b=c`` with YAML values."""
    path = find_config(str(name))
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(data).__name__}")
    for override in overrides or []:
        _apply_override(data, override)
    return check_config(data, str(path))


def check_config(data: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_one_line(error)}") from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set engine.batch_size=8")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else {}
        if node is None or not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: not a YAML value: {' '.join(str(error).split())}") from error


def _one_line(error: ValidationError) -> str:
    """The first problem, with the key's full path and, for a misspelt key, the nearest one that exists."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(location[-1], _fields_at(location[:-1]))}"
    if problem["type"] == "missing":
        given = problem.get("input")
        unknown = [k for k in given if k not in _fields_at(location[:-1])] if isinstance(given, dict) else []
        hint = f" (found the unknown key {unknown[0]!r})" if unknown else ""
        return f"{key}: missing{hint}; it is required"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem.get("input"), dict) else f" (got {problem.get('input')!r})"
    return f"{key}: {message}{shown}"


def _fields_at(location: list[str]) -> list[str]:
    model: Any = Config
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
