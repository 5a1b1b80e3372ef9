"""The list of keys: one frozen, validated description of a run. The defaults are the recommended CNN recipe.

This imports neither torch nor accelerate, so that `--help` and a refusal come at once.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from mnist_dist.config.paths import expand_path, redact_address


class Config(BaseModel):
    """A run. Every field has a default; a recipe or key=value names only what differs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    # What is trained, on what
    model: Literal["mlp", "cnn"] = Field("cnn", description="the tutorial's MLP or its small CNN")
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits", "synthetic"] = Field(
        "mnist", description="images to train on; synthetic: digits drawn by this program, no download"
    )
    data_dir: Path = Field(
        default_factory=lambda: Path(os.environ.get("MNIST_DIST_DATA_DIR") or "data"),
        description="folder of the datasets; MNIST_DIST_DATA_DIR in the environment changes the default",
    )
    missing: Literal["download", "fail", "synthetic"] = Field(
        "download",
        description="when the dataset is not in data_dir: download it; fail without touching the network; "
        "or try to download it and fall back to drawn digits",
    )
    mirror: str = Field(
        "", repr=False, description="URL or folder to fetch the dataset's files from instead of its own site"
    )
    validation: Annotated[int, Field(ge=0)] = Field(
        0, description="hold out the last N training images and evaluate on them instead of the test set"
    )

    # How it is trained
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = Field(
        64, description="images of one optimizer step over all ranks (the global batch)"
    )
    micro_batch: Annotated[int, Field(ge=0)] = Field(
        0,
        description="images a rank passes through the network at once, accumulating gradients; 0: its whole share",
    )
    epochs: Annotated[int, Field(ge=1)] = Field(1, description="passes over the training images")
    max_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="end after this many steps, the schedule with it; 0: no limit"
    )
    optimizer: Literal["adam", "adamw", "muon", "sgd"] = Field(
        "adamw",
        description="sgd is with Nesterov momentum; muon is for the hidden layers' weights, and adamw for the rest",
    )
    lr: Annotated[float, Field(gt=0)] = Field(5e-3, description="learning rate at the schedule's peak")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd's and muon's momentum; Adam's beta1")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="Adam's beta2; sgd has none")
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        "one-cycle",
        description="learning rate after the warm-up: level, half a cosine to zero, or a line to zero",
    )
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="share of the steps in which the learning rate climbs linearly from lr/25 to lr"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.01, description="decoupled for adamw and muon; added to the gradient for adam and sgd"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the target spread evenly over the ten classes"
    )
    clip_grad_norm: Annotated[float, Field(ge=0)] = Field(
        0.0, description="largest norm of the whole gradient; 0: no clipping"
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay per step of the weights' moving average, which is then evaluated; 0: none"
    )
    shift: Annotated[float, Field(ge=0, le=14)] = Field(0.0, description="augmentation: largest shift, pixels")
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="augmentation: largest rotation, degrees")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="augmentation: largest change of size, as a share of it"
    )
    elastic: Annotated[float, Field(ge=0, le=14)] = Field(
        0.0, description="augmentation: typical displacement of a smooth random warp, pixels"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto",
        description="arithmetic of the forward and backward pass; auto: bf16 where the hardware is faster with it, "
        "else fp32; tf32 and fp16: GPUs only; no: another name of fp32",
    )
    bit_exact: Annotated[int, Field(ge=0, le=1024)] = Field(
        0,
        description="the same weights, bit for bit, as N ranks have, on any number of ranks that divides N: a power of "
        "two that divides batch_size; 0: no such promise",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="decides initial weights, order and augmentation"
    )
    evaluate_train: bool = Field(False, description="at the end, also evaluate on the training images")

    # Where the run lives and what it says
    run_dir: Path | None = Field(
        None,
        description="folder of the run, continued if it exists; default: a new runs/RECIPE-YYYYMMDD-HHMMSS",
    )
    resume: str = Field(
        "auto",
        description="auto: go on where run_dir stands; never: refuse a run_dir that has checkpoints; "
        "or the path of a run or checkpoint to start from, where run_dir has none",
    )
    keep: Annotated[int, Field(ge=1)] = Field(2, description="checkpoints to keep, the newest ones")
    checkpoint_every_s: Annotated[float, Field(ge=0)] = Field(
        300.0,
        description="seconds between checkpoints inside an epoch (each epoch's end has one); 0: none inside",
    )
    log_every_steps: Annotated[int, Field(ge=1)] = Field(50, description="steps between records in metrics.jsonl")
    log_with: tuple[str, ...] = Field((), description="trackers known to Accelerate, e.g. tensorboard,wandb")

    # How it uses the machine
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="CPU threads of a rank; 0: its cores divided by the ranks that share them, or 1 with bit_exact"
    )
    graph: Literal["auto", "off"] = Field(
        "auto", description="auto: replay each step as one CUDA graph on GPUs; off: never"
    )
    timeout_s: Annotated[float, Field(ge=5, le=1_000_000)] = Field(
        300.0, description="seconds after which a rank that waits for the others gives up"
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _rename_no(cls, value: Any) -> Any:
        return "fp32" if value == "no" else value  # Accelerate's word, and this job's first one

    @field_validator("data_dir", "run_dir", "resume", "mirror", mode="before")
    @classmethod
    def _expand(cls, value: Any, info: Any) -> Any:
        return expand_path(str(value), info.field_name) if isinstance(value, str | Path) else value

    @field_serializer("mirror")
    def _redact(self, value: str) -> str:
        return redact_address(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.ema and self.ema < 0.5:
            raise ValueError("ema is the decay per step and lies between 0.5 and 1 (0.999, say), or is 0 for none")
        if self.bit_exact & (self.bit_exact - 1) or (self.bit_exact and self.batch_size % self.bit_exact):
            fitting = [str(2**k) for k in range(11) if self.batch_size % 2**k == 0]
            raise ValueError(
                f"bit_exact={self.bit_exact} is not a power of two that divides batch_size={self.batch_size}; use one "
                f"of {', '.join(fitting)}, or 0 for none"
            )
        shard = self.batch_size // (self.bit_exact or 1)
        if self.micro_batch > shard:
            whole = f"a shard of batch_size={self.batch_size} and bit_exact={self.bit_exact}, {shard} images"
            raise ValueError(
                f"micro_batch={self.micro_batch} is larger than "
                f"{whole if self.bit_exact else f'batch_size={self.batch_size}'}; it is a part of it"
            )
        return self

    def num_shards(self, world_size: int) -> int:
        """Into how many shards a global batch is cut: one a rank, or as many as bit_exact says."""
        return self.bit_exact or world_size

    def world_size_problem(self, world_size: int) -> str:
        """Why so many ranks can't train this, in a sentence, or the empty string."""
        name, whole = ("bit_exact", self.bit_exact) if self.bit_exact else ("batch_size", self.batch_size)
        if whole % world_size == 0:
            return ""
        fitting = ", ".join(str(n) for n in range(1, min(whole, 4096) + 1) if whole % n == 0)
        meaning = "shards" if self.bit_exact else "images, the global batch,"
        return (
            f"{name}={whole} {meaning} cannot be shared equally by {world_size} ranks; use {fitting} ranks, or another "
            f"{name}"
        )

    def to_yaml(self) -> str:
        """The whole configuration as YAML that `load_config` reads back to an equal one, but for a password."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


# What makes two runs different runs: a checkpoint that differs in one of these is another run's.
IDENTITY = ("model", "dataset", "validation", "batch_size", "optimizer", "seed", "bit_exact")
# What the ranks of one job may be asked for differently: where things lie on their machines, and their threads.
MAY_DIFFER = ("data_dir", "mirror", "missing", "run_dir", "resume", "threads")
