"""The JSON schema that editors read: configs/ has the one that is printed, and it knows what a recipe may say."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mnist_dist.cli import main
from mnist_dist.commands.schema import json_schema
from mnist_dist.config.parse import build_config
from mnist_dist.config.schema import Config
from mnist_dist.errors import RequestError
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "null": type(None)}


def accepts(rule: dict[str, Any], value: Any) -> bool:
    """Whether a value is as a property's schema says: as much of JSON schema as ours uses."""
    if "anyOf" in rule:
        return any(accepts(choice, value) for choice in rule["anyOf"])
    return (
        isinstance(value, TYPES[rule["type"]])
        and not (isinstance(value, bool) and rule["type"] != "boolean")
        and value in rule.get("enum", [value])
        and not ("minimum" in rule and value < rule["minimum"])
        and not ("maximum" in rule and value > rule["maximum"])
        and not ("exclusiveMinimum" in rule and value <= rule["exclusiveMinimum"])
        and not ("exclusiveMaximum" in rule and value >= rule["exclusiveMaximum"])
    )


def test_the_file_in_configs_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_DIST_DATA_DIR", "/elsewhere")  # which must not come into it
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "configs/schema.json").read_text(), (
        "run mnist-dist schema > configs/schema.json"
    )


def test_every_key_is_described() -> None:
    properties = json_schema()["properties"]
    assert list(properties) == list(Config.model_fields)
    assert json_schema()["additionalProperties"] is False
    for key, field in Config.model_fields.items():
        assert properties[key]["description"] == field.description
        assert "default" in properties[key]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_the_schema_and_passes_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert (path.parent / "schema.json").is_file()
    properties = json_schema()["properties"]
    loader = yaml.SafeLoader(text)  # editors read YAML 1.2, in which `no` is text
    values = loader.get_data()
    for key, value in values.items():
        assert accepts(properties[key], "no" if value is False and key == "precision" else value), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("lr", value) for value in (0, -1, 1e-3, 5)],
        *[("momentum", value) for value in (0, 0.5, 1, -0.1)],
        *[("batch_size", value) for value in (0, 1, 2**20, 2**20 + 1)],
        *[("precision", value) for value in ("no", "fp32", "fp8")],
        *[("log_with", value) for value in (["tensorboard"], "tensorboard,wandb", [])],
        *[("run_dir", value) for value in (None, "runs/x")],
        ("model", "vgg"),
        ("timeout_s", 4.9),
    ],
)
def test_the_schema_takes_what_the_configuration_takes(key: str, value: Any) -> None:
    given = value.split(",") if key == "log_with" and isinstance(value, str) else value  # as a file's text is read
    try:
        build_config({key: given})
        is_right = True
    except RequestError:
        is_right = False
    assert accepts(json_schema()["properties"][key], value) == is_right


def test_every_default_passes() -> None:
    for key, rule in json_schema()["properties"].items():
        assert accepts(rule, rule["default"]), key


def test_more_than_the_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "mlp"]) == 2
    assert capsys.readouterr().err.startswith("mnist-dist: there is 'mlp', but schema takes nothing; it lies in ")
