"""One frozen, validated description of a run, and how it is read.

Defaults < YAML file < key=value arguments. The defaults are the recommended CNN recipe (configs/cnn.yaml).
Everything that a user can get wrong here is answered by a RequestError of one sentence. This module imports
neither torch nor accelerate, so `--help` and a refusal come at once.
"""

import difflib
import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from mnist_dist.config.yaml_file import parse_yaml, read_file
from mnist_dist.errors import RequestError


class Config(BaseModel):
    """A run. Every field has a default; a recipe or key=value names only what differs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

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
    mirror: str = Field("", description="URL or folder to fetch the dataset's files from instead of its own site")
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
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adamw", description="sgd is with Nesterov momentum")
    lr: Annotated[float, Field(gt=0)] = Field(5e-3, description="learning rate at the schedule's peak")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd's momentum; Adam's beta1")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="Adam's beta2; sgd has none")
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        "one-cycle",
        description="learning rate after the warm-up: level, half a cosine to zero, or a line to zero",
    )
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="share of the steps in which the learning rate climbs linearly from lr/25 to lr"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.01, description="decoupled for adamw; added to the gradient for adam and sgd"
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
    precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto",
        description="arithmetic of the forward and backward pass; no: fp32; auto: bf16 where the hardware is "
        "faster with it, else fp32",
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
    log_with: tuple[str, ...] = Field((), description="trackers known to Accelerate, e.g. [tensorboard]")

    # How it uses the machine
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="CPU threads of a rank; 0: its cores divided by the ranks that share them"
    )
    graph: Literal["auto", "off"] = Field(
        "auto", description="auto: replay each step as one CUDA graph where there is one GPU; off: never"
    )
    timeout_s: Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        300.0, description="seconds after which a rank that waits for the others gives up"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.ema and self.ema < 0.5:
            raise ValueError("ema is the decay per step and lies between 0.5 and 1 (0.999, say), or is 0 for none")
        if self.micro_batch > self.batch_size:
            raise ValueError(
                f"micro_batch={self.micro_batch} is larger than batch_size={self.batch_size}; it is a part of it"
            )
        return self

    def to_yaml(self) -> str:
        """The whole configuration as YAML that `load` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# What makes two runs different runs: a checkpoint that differs in one of these is another run's.
IDENTITY = ("model", "dataset", "validation", "batch_size", "optimizer", "seed")


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read key=value arguments into raw values. Raises RequestError."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.strip().removeprefix("--").replace("-", "_")
        if not equals:
            raise RequestError(f"{argument!r} is neither a .yaml file nor key=value{_did_you_mean(key)}")
        if key in values:
            raise RequestError(f"there are two values for {key} on the command line; give one")
        if key in Config.model_fields and _is_text(key):
            if not text:
                raise RequestError(f"{key}= has no value; give one or leave the key out")
            values[key] = (
                text  # a path or word is taken as it stands: `data_dir=1e3` is a folder, `precision=no` a word
            )
        else:
            values[key] = parse_yaml(text, f"the value of {key}")
    return values


def _is_text(key: str) -> bool:
    annotation = Config.model_fields[key].annotation
    return annotation in (str, Path, Path | None) or get_origin(annotation) is Literal


def _did_you_mean(key: str) -> str:
    near = difflib.get_close_matches(key, Config.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; --help lists the keys"


def _sentence(error: ErrorDetails) -> str:
    """One of pydantic's findings, in our words: the key, the value, what is allowed."""
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    key, value, context = str(error["loc"][0]), error["input"], error.get("ctx", {})
    given = f"{key}={value!r}" if not isinstance(value, str) else f"{key}={value}"
    match error["type"]:
        case "extra_forbidden":
            return f"there is no key {key}{_did_you_mean(key)}"
        case "literal_error":
            allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ")
            near = difflib.get_close_matches(str(value), allowed.split(", "), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"{given} is not one of {allowed}{hint}"
        case "greater_than_equal":
            return f"{given} is too small: at least {context['ge']}"
        case "greater_than":
            return f"{given} is too small: more than {context['gt']}"
        case "less_than_equal":
            return f"{given} is too large: at most {context['le']}"
        case "less_than":
            return f"{given} is too large: less than {context['lt']}"
        case "finite_number":
            return f"{given} is not a finite number"
        case "int_from_float" | "int_parsing" | "int_type" | "int_parsing_size":
            return f"{given} is not a whole number"
        case "float_parsing" | "float_type":
            return f"{given} is not a number"
        case "bool_parsing" | "bool_type":
            return f"{given} is neither true nor false"
        case "path_type" | "string_type":
            return f"{given} is not text"
        case "tuple_type":
            return f"{given} is not a list"
        case _:
            return f"{given} is refused: {error['msg']}"


def build(values: dict[str, Any]) -> Config:
    """Validate raw values. Raises RequestError with one sentence for the first thing that is wrong."""
    for key, value in values.items():
        # pydantic would take true for 1 and "3" for 3; what looks like another type is a slip of the pen.
        field = Config.model_fields.get(key)
        if field and isinstance(value, bool) and field.annotation in (int, float):
            raise RequestError(f"{key}={str(value).lower()} is not a number")
        if field and isinstance(value, str) and "\0" in value:
            raise RequestError(f"{key} has a NUL character in it")
    try:
        return Config(**values)
    except ValidationError as error:
        raise RequestError(_sentence(error.errors(include_url=False)[0])) from None


def load(arguments: Sequence[str]) -> tuple[Config, str]:
    """Read `[CONFIG.yaml] [key=value ...]`.

    Returns the configuration and the recipe's name (the file's stem, or the model's name without a file).
    Raises RequestError.
    """
    values: dict[str, Any] = {}
    recipe = ""
    rest = list(arguments)
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        path = Path(rest.pop(0))
        values, recipe = read_file(path), path.stem
    for argument in rest:
        if argument.endswith((".yaml", ".yml")) and "=" not in argument:
            raise RequestError(f"{argument} is a second configuration file, or comes after key=value; give one, first")
    config = build(values | parse_overrides(rest))
    return config, recipe or config.model


def check_keys(arguments: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse key=value arguments that a verb has no use for. Raises RequestError."""
    for argument in arguments:
        key = argument.partition("=")[0]
        if "=" in argument and key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RequestError(f"{key} is no key of this verb, which takes {', '.join(allowed)}{hint}")


def describe_keys() -> str:
    """The keys with default and meaning, for `--help`."""
    lines: list[str] = []
    width = max(shutil.get_terminal_size().columns - 1, 60)
    for key, field in Config.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = str(default).lower() if isinstance(default, bool) else "[]" if default == () else default
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        text = f"{field.description}" + (f" ({', '.join(choices)})" if choices else "")
        pair = f"{key}={'' if shown is None else shown}"
        indent, hang = f"  {pair:<26} ", " " * 29
        lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=hang, break_on_hyphens=False)
    return "\n".join(lines)
