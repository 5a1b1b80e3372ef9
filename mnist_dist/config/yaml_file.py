"""YAML as configurations use it: small files of `key: value` lines, read strictly.

Everything that can be wrong with one is a RequestError of one sentence.
"""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from mnist_dist.errors import RequestError

MAX_CONFIG_BYTES = 64 * 1024  # a recipe is about one kilobyte; anything near this is the wrong file


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as SafeLoader reads it, but two values for one key, an alias or a merge are errors, and numbers are what
    they look like: YAML 1.1 would take 1e-3 for a string, 010 for 8 and 1:30 for 90."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError("merges (<<) are not allowed")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} is not a word")
            if key in seen:
                raise yaml.YAMLError(f"there are two values for the key {key}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _UniqueKeyLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in an error. Raises RequestError."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error) or "it is nested too deeply"
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
    if values is None:
        raise RequestError(f"{path} is empty; give it key: value lines or leave it out")
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds a {type(values).__name__}, not key: value lines")
    return values
