"""The training job as a library: `train`, `load_run` and `predict`, of api.py, which is imported when they are used."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_dist.api import Run, load_run, predict, train
    from mnist_dist.errors import JobError

__all__ = ["JobError", "Run", "load_run", "predict", "train"]

# A module of this package that is run as a program would define its functions, do nothing, and end with exit code 0.
_words = getattr(sys, "orig_argv", []) if sys.argv[:1] == ["-m"] else []  # Python 3.9 has none
_module = next((word for word in _words if word.startswith("mnist_dist.") and word != "mnist_dist.__main__"), "")
_script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
if _module or (_script.name != "__main__.py" and Path(__file__).parent in _script.absolute().parents):
    print(
        f"mnist-dist: {_module or _script} is no program; use python -m mnist_dist VERB, or train.py", file=sys.stderr
    )
    sys.exit(2)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mnist_dist import api

    return getattr(api, name)
