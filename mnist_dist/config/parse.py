"""How a request is read: `[RECIPE] [key=value ...]`. Defaults < recipe < key=value.

A recipe is a YAML file, or the name of one of ours. Everything that a user can get wrong here is answered by a
RequestError of one sentence.
"""

import difflib
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mnist_dist.config.paths import expand_path
from mnist_dist.config.schema import Config
from mnist_dist.config.yaml_file import read_file
from mnist_dist.errors import RequestError

SUFFIXES = (".yaml", ".yml")
# What people call a key elsewhere, and its name here.
OTHER_NAMES = {
    "learning_rate": "lr",
    "batch": "batch_size",
    "bs": "batch_size",
    "global_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "micro_batch",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "beta1": "momentum",
    "wd": "weight_decay",
    "grad_clip": "clip_grad_norm",
    "max_grad_norm": "clip_grad_norm",
    "gradient_clipping": "clip_grad_norm",
    "smoothing": "label_smoothing",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "warmup_steps": "warmup",
    "mixed_precision": "precision",
    "amp": "precision",
    "dtype": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "arch": "model",
    "net": "model",
    "network": "model",
    "deterministic": "bit_exact",
    "output_dir": "run_dir",
    "checkpoint_dir": "run_dir",
    "save_dir": "run_dir",
    "log_dir": "run_dir",
    "data": "data_dir",
    "data_path": "data_dir",
    "root": "data_dir",
    "report_to": "log_with",
    "num_threads": "threads",
    "timeout": "timeout_s",
    "cuda_graph": "graph",
}
# What is decided elsewhere, and where.
DECIDED_ELSEWHERE = {
    "num_workers": "the whole dataset lies in memory, so there are no loader workers",
    "workers": "the whole dataset lies in memory, so there are no loader workers",
    "device": "a rank takes the GPU that its launcher gives it, or the CPU; ACCELERATE_USE_CPU=true forces the CPU",
    "gpus": "the launcher decides how many ranks there are: NPROC=N launch/local.sh",
    "nproc": "the launcher decides how many ranks there are: NPROC=N launch/local.sh",
    "num_processes": "the launcher decides how many ranks there are: NPROC=N launch/local.sh",
    "world_size": "the launcher decides how many ranks there are: NPROC=N launch/local.sh",
}


def load_config(arguments: Sequence[str]) -> tuple[Config, str]:
    """Read `[RECIPE] [key=value ...]`.

    Returns the configuration and the recipe's name (a file's stem, or the model's name without a recipe).
    Raises RequestError.
    """
    pairs, words = split_arguments(arguments)
    if len(words) > 1:
        raise RequestError(f"{words[1]!r} is a second recipe beside {words[0]!r}, or no key=value; give one recipe")
    return read_recipe(words[0] if words else "", parse_values(pairs, "on the command line"))


def read_recipe(word: str, overrides: dict[str, Any]) -> tuple[Config, str]:
    """The configuration of a recipe, or of none, with the overrides; and its name, as above. Raises RequestError."""
    if not word:
        config = build_config(overrides)
        return config, config.model
    path = find_recipe(word)
    return build_config(parse_values(read_file(path).items(), f"in {path}") | overrides), path.stem


def split_arguments(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Tell `key=value` arguments, as pairs, from other words, in their order.

    `--key=value`, `--key value` and `key = value` are taken too. Raises RequestError.
    """
    pairs: list[tuple[str, str]] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if rest and is_key(argument) and rest[0].startswith("="):  # key = value, key =value
            argument += rest.pop(0)
        elif argument.startswith("--") and is_key(argument) and rest:  # --key value
            argument += f"={rest.pop(0)}"
        key, equals, value = argument.partition("=")
        if not equals or (argument.endswith(SUFFIXES) and not is_key(key)):
            if is_key(argument) and not Path(argument).exists():
                raise RequestError(f"{argument} has no value; write {key_name(argument)}=VALUE")
            if argument.startswith("-"):
                raise RequestError(f"there is no option {argument}{did_you_mean(key_name(argument))}")
            words.append(argument)
            continue
        if not value and rest and "=" not in rest[0]:  # key= value
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs, words


def key_name(text: str) -> str:
    """A key as it is spelled in the list of keys: hyphens count as underscores."""
    return text.strip().removeprefix("--").replace("-", "_")


def is_key(text: str) -> bool:
    """Whether this is the name of a key."""
    return key_name(text) in Config.model_fields


def recipes_folder() -> Path:
    """Where our recipes are: in the checkout, or in the installed package."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "configs"
    return checkout if checkout.is_dir() else package / "configs"


def find_recipe(word: str) -> Path:
    """The file of a recipe that is given by its path or by its name. Raises RequestError."""
    path = Path(expand_path(word, "the recipe"))
    if path.suffix in SUFFIXES:
        return path
    ours = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
    if word in ours:
        return recipes_folder() / f"{word}.yaml"
    near = nearest(word, ours)
    hint = f"; did you mean {near}?" if near else ""
    raise RequestError(
        f"{word!r} is no recipe, no .yaml file and no key=value; our recipes are {', '.join(ours)}{hint}"
    )


def parse_values(pairs: Iterable[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Raw values of keys, from texts (or a list of texts, in a file). Raises RequestError."""
    values: dict[str, Any] = {}
    for given, value in pairs:
        key = key_name(given)
        if key in values:
            raise RequestError(f"there are two values for {key} {where}; give one")
        if key not in Config.model_fields:
            raise RequestError(f"there is no key {key}{did_you_mean(key)}")
        if value == "" and Config.model_fields[key].default != "":
            raise RequestError(f"{key}= has no value; give one or leave the key out")
        annotation = Config.model_fields[key].annotation
        if value == "null" and key == "run_dir":
            continue
        if get_origin(annotation) is tuple and isinstance(value, str):
            inner = value.removeprefix("[").removesuffix("]")
            value = [word.strip() for word in inner.split(",") if word.strip()]
        values[key] = value
    return values


def build_config(values: dict[str, Any]) -> Config:
    """Validate raw values. Raises RequestError with one sentence for the first thing that is wrong."""
    for key, value in values.items():
        if isinstance(value, str) and "\0" in value:
            raise RequestError(f"{key} has a NUL character in it")
    try:
        return Config(**values)
    except ValidationError as error:
        raise RequestError(sentence(error.errors(include_url=False)[0])) from None


def nearest(word: str, choices: Sequence[str]) -> str:
    """The choice that was probably meant, or the empty string."""
    word = word.lower()
    if len(word) > 2 and (longer := [choice for choice in choices if choice.startswith(word)]):
        return longer[0]
    return next(iter(difflib.get_close_matches(word, choices, n=1, cutoff=0.65)), "")


def did_you_mean(key: str) -> str:
    """What to add to a sentence about a key that is none."""
    if key in DECIDED_ELSEWHERE:
        return f"; {DECIDED_ELSEWHERE[key]}"
    near = OTHER_NAMES.get(key) or nearest(key, list(Config.model_fields))
    return f"; did you mean {near}?" if near else "; --help lists the keys"


def sentence(error: ErrorDetails) -> str:
    """One of pydantic's findings, in our words: the key, the value, what is allowed."""
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    key, value, context = str(error["loc"][0]), error["input"], error.get("ctx", {})
    given = f"{key}={value!r}" if not isinstance(value, str) else f"{key}={value}"
    match error["type"]:
        case "literal_error":
            choices = [str(choice) for choice in get_args(Config.model_fields[key].annotation)]
            near = nearest(str(value), choices)
            return f"{given} is not one of {', '.join(choices)}" + (f"; did you mean {near}?" if near else "")
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
        case _:
            return f"{given} is refused: {error['msg']}"


def check_keys(arguments: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse key=value arguments that a verb has no use for. Raises RequestError."""
    for given, _ in split_arguments(arguments)[0]:
        key = key_name(given)
        if key not in allowed:
            near = nearest(key, allowed)
            hint = f"; did you mean {near}?" if near else ""
            raise RequestError(f"{key} is no key of this verb, which takes {', '.join(allowed)}{hint}")


def describe_keys() -> str:
    """The keys with default and meaning, for `--help`."""
    lines: list[str] = []
    width = max(shutil.get_terminal_size().columns - 1, 60)
    for key, field in Config.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = str(default).lower() if isinstance(default, bool) else "" if default in ((), None) else default
        choices = get_args(field.annotation) if get_origin(field.annotation) is not None else ()
        words = [choice for choice in choices if isinstance(choice, str)]
        text = f"{field.description}" + (f" ({', '.join(words)})" if words else "")
        pair = f"{key}={shown}"
        indent, hang = f"  {pair:<26} ", " " * 29
        lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=hang, break_on_hyphens=False)
    return "\n".join(lines)
