"""Configuration files: `key: value` lines, read strictly. Every value is the text that stands there, or a list of it.

What a text means is the key's own matter, so that a key takes the same text in a file as on the command line. YAML by
itself would take `off` for false, 1e-3 for a string, 010 for 8, 1:30 for 90 and 2026-11-25 for a date.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml

from mnist_dist.errors import RequestError

MAX_CONFIG_BYTES = 64 * 1024  # a recipe is about one kilobyte; anything near this is the wrong file


class _TextLoader(yaml.BaseLoader):
    """YAML without types: every scalar is its text. Two values for one key, an alias or a merge are errors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError("a key is not a word")
            if key_node.value == "<<":
                raise yaml.YAMLError("merges (<<) are not allowed")
            if key_node.value in seen:
                raise yaml.YAMLError(f"there are two values for the key {key_node.value}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """The texts of a YAML text; `where` names it in an error. Raises RequestError."""
    try:
        return yaml.load(text, Loader=_TextLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        if isinstance(error, RecursionError):
            problem = "it is nested too deeply"
        raise RequestError(f"{where}{line} is not valid YAML: {' '.join(problem.split())}") from None


def read_file(path: Path) -> dict[str, Any]:
    """The `key: value` lines of a configuration file. Raises RequestError."""
    try:
        if path.is_dir():
            raise RequestError(f"{path} is a folder, not a configuration file")
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        text = raw.decode("utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RequestError(f"there is no configuration file {path}{hint}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not a text file in UTF-8, so it is no configuration") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RequestError(f"the configuration file {path} cannot be read: {reason}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise RequestError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, so it is no configuration")
    values = parse_yaml(text, str(path))
    if not values:
        raise RequestError(f"{path} is empty; give it key: value lines or leave it out")
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds {'a list' if isinstance(values, list) else 'text'}, not key: value lines")
    return values
