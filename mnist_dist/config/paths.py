"""Paths as people write them: `~` and variables in them are expanded, wherever they come from."""

import os
import re
from pathlib import Path

from mnist_dist.errors import RequestError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expand_path(text: str, name: str) -> str:
    """Expand a leading `~` or `~user`, `$VAR` and `${VAR}`; `name` says in an error which path it is.

    Raises RequestError where a variable is not set or a user is not known.
    """

    def value_of(match: re.Match[str]) -> str:
        variable = match[1] or match[2]
        if not os.environ.get(variable):
            raise RequestError(f"{name}={text} names the variable {variable}, which is not set; set it, or give a path")
        return os.environ[variable]

    if "://" in text:  # an address
        return text
    expanded = _VARIABLE.sub(value_of, text)
    if expanded.startswith("~"):
        try:
            expanded = str(Path(expanded).expanduser())
        except RuntimeError:
            raise RequestError(f"{name}={text} names a user that is not known here; give a path") from None
    return expanded
