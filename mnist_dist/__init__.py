import sys
from pathlib import Path

# A module of this package that is run as a program would define its functions, do nothing, and end with exit code 0.
_words = sys.orig_argv if sys.argv[:1] == ["-m"] else []
_module = next((word for word in _words if word.startswith("mnist_dist.") and word != "mnist_dist.__main__"), "")
_script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
if _module or (_script.name != "__main__.py" and Path(__file__).parent in _script.absolute().parents):
    print(
        f"mnist-dist: {_module or _script} is no program; use python -m mnist_dist VERB, or train.py", file=sys.stderr
    )
    sys.exit(2)
