"""The verb `schema`: the JSON schema of the configuration, by which editors complete and check a recipe."""

import argparse
import json
from typing import Any

from mnist_dist.config.parse import recipes_folder
from mnist_dist.config.schema import Config
from mnist_dist.errors import RequestError


def run(_options: argparse.Namespace, arguments: list[str]) -> int:
    """Print it. Raises RequestError."""
    if arguments:
        raise RequestError(f"there is {arguments[0]!r}, but schema takes nothing; it lies in {recipes_folder()} too")
    print(json.dumps(json_schema(), indent=2))
    return 0


def json_schema() -> dict[str, Any]:
    """The schema, of draft 2020-12; the same on every machine."""
    schema = Config.model_json_schema()
    properties: dict[str, dict[str, Any]] = schema["properties"]
    for key, field in properties.items():
        properties[key] = {name: value for name, value in field.items() if name not in ("title", "format")}
    properties["data_dir"]["default"] = "data"  # not this machine's
    properties["precision"]["enum"].append("no")  # another name of fp32
    properties["run_dir"] |= {"anyOf": [{"type": "string"}, {"type": "null"}]}
    properties["log_with"] |= {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}
    for name in ("type", "items"):
        del properties["log_with"][name]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a recipe of mnist_dist"}
    return head | {name: schema[name] for name in ("type", "additionalProperties", "properties")}
