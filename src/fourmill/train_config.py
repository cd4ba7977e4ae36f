"""The ``train:`` section of a configuration: everything that decides a training run.

It lives on the ground floor because the configuration of a dataset embeds it. Modality names are checked
against the snapshot when training starts, since only the snapshot knows them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

KeepScheme = Literal["random", "all", "binary"]

#: Fields that may differ between a run and its resumption: they change no number of the run.
FREE_FIELDS = frozenset(
    {"checkpoint_every", "keep_checkpoints", "log_every", "eval_every", "eval_samples", "workers", "device"}
    | {"activation_checkpointing", "cache_gb", "cache_dir"}
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MixtureComponent(_Section):
    """One component of the masking mixture (4M, section 3.2 of the paper): Dirichlet alphas by modality.

    An alpha of 0 means never; alphas far below 1 put a budget on one modality, far above 1 spread it evenly.
    """

    weight: float = Field(default=1.0, gt=0)
    input_alphas: dict[str, float] = {}  # by modality name
    target_alphas: dict[str, float] = {}
    default_alpha: float = Field(default=0.5, ge=0)  # of the modalities that neither table names
    default_input_alpha: float | None = Field(default=None, ge=0)  # the same for inputs alone
    keep: dict[str, KeepScheme] = {}  # how sequences choose keep_prob: U(0,1), 1, or 0 or 1

    @model_validator(mode="after")
    def _alphas_are_legal(self) -> MixtureComponent:
        for table in (self.input_alphas, self.target_alphas):
            for name, alpha in table.items():
                if not 0 <= alpha < 1e9:
                    raise ValueError(f"alpha of {name} is {alpha}; it must lie in [0, 1e9)")
        return self

    def input_alpha(self, name: str) -> float:
        default = self.default_alpha if self.default_input_alpha is None else self.default_input_alpha
        return self.input_alphas.get(name, default)

    def target_alpha(self, name: str) -> float:
        return self.target_alphas.get(name, self.default_alpha)

    def keep_scheme(self, name: str) -> KeepScheme:
        return self.keep.get(name, "random")


class MixedDataset(_Section):
    """Another dataset to train on: a registered snapshot of it, and how often it is read."""

    url: str
    snapshot: str | None = None  # its digest, or the first digits; None: the only one there is
    weight: float = Field(default=1.0, gt=0)


def default_mixture() -> tuple[MixtureComponent, ...]:
    """Mostly RGB to everything, and everything to everything."""
    return (
        MixtureComponent(
            weight=2.0, input_alphas={"rgb": 1000.0, "rgb_pixels": 1000.0}, default_input_alpha=0.0
        ),
        MixtureComponent(weight=1.0),
    )


class TrainConfig(_Section):
    """How to train. The defaults are a small run; ``4m-b`` and friends want more of everything."""

    preset: str = "demo"  # see fourmill.train.presets
    steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=32, ge=1)  # samples per step over all ranks
    micro_batch: int | None = Field(
        default=None, ge=1
    )  # samples per forward pass of a rank; None: all of them
    lr: float | None = Field(default=None, gt=0)  # peak; None: blr * batch_size / 256
    blr: float = Field(default=1e-4, gt=0)
    min_lr: float = Field(default=0.0, ge=0)  # where the cosine ends
    warmup_steps: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices; AdamW for all else
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip_grad: float | None = Field(default=None, gt=0)  # largest norm of the gradient; None: no clipping
    seed: int = Field(default=0, ge=0)
    num_input_tokens: int = Field(default=128, ge=1)
    num_target_tokens: int = Field(default=128, ge=1)
    min_input_tokens: int | None = Field(
        default=None, ge=0
    )  # budgets are drawn from [min, num]; None: always num
    min_target_tokens: int | None = Field(default=None, ge=1)
    masking: Literal["full", "reference"] = (
        "full"  # reference: lose what cannot be used, as 4M's own code does
    )
    mixture: tuple[MixtureComponent, ...] = Field(default_factory=default_mixture, min_length=1)
    token_init: Literal["random", "codebook"] = "random"  # codebook: similar codes of a tokenizer begin alike
    where: tuple[str, ...] = ()  # rows to train on, by scalar modalities: "clip_score >= 0.2"; all must hold
    weight: float = Field(default=1.0, gt=0)  # of the configuration's own dataset, beside those of `datasets`
    datasets: tuple[
        MixedDataset, ...
    ] = ()  # others to train on; a sample may lack modalities that others have
    inputs: tuple[str, ...] | None = None  # modality names; None: all that can be inputs
    targets: tuple[str, ...] | None = None  # None: all that can be targets
    loss: Literal["mod", "token"] = "mod"
    count_absent: bool = False  # "mod": a modality without targets counts as zero, as in 4M's own code
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on cuda, fp32 elsewhere
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    lanes: int = Field(
        default=64, ge=1
    )  # into which a dataset's shards are dealt; ranks x workers should divide it
    shuffle_window: int = Field(default=4096, ge=1)  # samples of a lane that are shuffled among each other
    cache_gb: float = Field(
        default=100.0, gt=0
    )  # of this machine's disk, for files of datasets on object stores
    cache_dir: str | None = None  # None: ~/.cache/fourmill/shards
    workers: int = Field(default=0, ge=0)  # processes that make batches; 0: a thread of the training process
    checkpoint_every: int = Field(default=200, ge=1)  # steps; the last step always makes one
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=10, ge=1)
    eval_every: int | None = Field(default=None, ge=1)  # steps between losses on the split `val`; None: never
    eval_samples: int = Field(default=512, ge=1)  # at most so many of them

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        for name in ("input", "target"):
            low, high = getattr(self, f"min_{name}_tokens"), getattr(self, f"num_{name}_tokens")
            if low is not None and low > high:
                raise ValueError(f"min_{name}_tokens is {low}, more than num_{name}_tokens {high}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, more than the {self.steps} steps")
        return self

    @property
    def token_bounds(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The least and the most input tokens of a sample, then its target tokens."""
        highs = (self.num_input_tokens, self.num_target_tokens)
        lows = (self.min_input_tokens, self.min_target_tokens)
        first, second = ((high if low is None else low, high) for low, high in zip(lows, highs, strict=True))
        return first, second

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else self.blr * self.batch_size / 256

    def identity(self) -> dict[str, object]:
        """The fields that must be equal for a run to be resumed, as JSON values."""
        return self.model_dump(mode="json", exclude=set(FREE_FIELDS))
