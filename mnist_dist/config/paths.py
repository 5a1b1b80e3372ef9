"""Paths and addresses as people write them.

`~` and variables in a path are expanded, wherever it comes from. The user name and the password in an address are used,
and neither printed nor stored.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from mnist_dist.errors import RequestError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
# USER:PASSWORD@ in an address. A password may hold what ought to be written %2F, say; after a host there is a number.
_CREDENTIALS = re.compile(r"(?<=://)(?:([^\s/?#]*)|([^\s/?#@:]*:(?!\d+(?:[\s/?#]|$)).*?))@")


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


def redact_address(text: str, by: str = "***@") -> str:
    """The same text, with `by` for the user name and password of each address in it."""
    return _CREDENTIALS.sub(by, text)


def split_credentials(address: str) -> tuple[str, str, str]:
    """An address without its user name and password, and these two, empty where it has none."""
    match = _CREDENTIALS.search(address)
    if not match or match.start() != address.find("://") + len("://"):
        return address, "", ""
    user, _, password = (match[1] or match[2] or "").partition(":")
    return address[: match.start()] + address[match.end() :], unquote(user), unquote(password)
