"""The verbs, their arguments, and what becomes of what goes wrong: one sentence and an exit code.

0 finished, 1 it went wrong, 2 the request is wrong, 3 stopped on request and resumable. torch is imported only by a
verb that needs it, so `--help` and a refusal come at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mnist_dist.config.schema import check_keys, describe_keys, load, parse_overrides
from mnist_dist.distributed.launch_env import check_batch, check_launcher, launched_world_size
from mnist_dist.errors import RequestError, RunError
from mnist_dist.run import stop

KEYS = "configuration keys, with their defaults:\n" + describe_keys()
EXAMPLES = """\
examples:
  accelerate launch train.py                            the CNN, on every GPU here, or the CPU
  accelerate launch train.py configs/mlp.yaml lr=2e-3   another recipe, one key changed
  mnist-dist evaluate runs/latest
  mnist-dist fetch dataset=fashion-mnist data_dir=/shared/data
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise RequestError(f"{message}; {self.prog} --help shows what there is")


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="mnist-dist", description=__doc__.splitlines()[0], epilog=EXAMPLES, formatter_class=plain)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    text = "train a network"
    train = verbs.add_parser(
        "train", help=text, description=text, epilog=f"{KEYS}\n\n{EXAMPLES}", formatter_class=plain
    )
    train.add_argument(
        "arguments", nargs="*", metavar="[CONFIG.yaml] [key=value ...]", help="what differs from the defaults"
    )
    train.add_argument("--dry-run", action="store_true", help="print the resolved configuration and the plan, and stop")
    train.add_argument(
        "--check", action="store_true", help="only check the arguments, at once; print the recipe's name and run_dir"
    )
    text = "exact loss, accuracy and confusion matrix of a run, a checkpoint or a model.safetensors"
    evaluate = verbs.add_parser("evaluate", help=text, description=text)
    evaluate.add_argument(
        "path", metavar="RUN", type=Path, help="a run's folder, a checkpoint's, or a .safetensors file"
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dataset, data_dir, mirror, missing, validation, threads",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    text = "bring a dataset to this machine, so that training needs no network"
    fetch = verbs.add_parser("fetch", help=text, description=text)
    fetch.add_argument("overrides", nargs="*", metavar="key=value", help="dataset, data_dir, mirror")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Flags first: argparse would take what stands after one for too much. None of them has a value.
    given[1:] = sorted(given[1:], key=lambda argument: not argument.startswith("-"))
    try:
        try:
            return _run(_parser().parse_args(given))
        finally:
            _flush()
    except RequestError as error:
        _complain(error)
        # Where all ranks are refused, rank 0 alone comes here; another rank is refused alone, which is its failure: the
        # launcher must hear of it, and end those that wait for this one.
        return 2 if os.environ.get("RANK", "0") in ("", "0") else 1
    except UnicodeEncodeError as error:
        _complain(RequestError(f"{error.object!a} has characters in it that this terminal's encoding does not"))
        return 2
    except RunError as error:
        _complain(error)
        return 1
    except SystemExit as end:  # --help has been answered; or what this rank has to say, rank 0 says
        return int(end.code or 0)
    except KeyboardInterrupt:  # training notes it and stops in order; here there is nothing to save
        return 130
    except BrokenPipeError:  # the reader of the output went away, as `| head` does
        return 1


def _flush() -> None:
    """Write out what was printed, while a reader that went away or a full disk is still no traceback."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter tries again when it ends
        if isinstance(error, BrokenPipeError):
            raise
        raise RunError(f"the output cannot be written: {error.strerror}") from None


def _complain(error: Exception) -> None:
    print(f"mnist-dist: {error}", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace) -> int:
    if options.verb == "fetch":
        check_keys(options.overrides, ("dataset", "data_dir", "mirror"))
        config, _ = load(options.overrides)
        from mnist_dist.data.dataset import load_dataset
        from mnist_dist.data.download import dataset_file, fetch

        name = fetch(config.dataset, config.data_dir, mirror=config.mirror)
        load_dataset(name, config.data_dir)  # what lay there already may be damaged
        print(f"{name} is in {dataset_file(name, config.data_dir)}")
        return 0
    if options.verb == "evaluate":
        check_keys(options.overrides, ("dataset", "data_dir", "mirror", "missing", "validation", "threads"))
        overrides = parse_overrides(options.overrides)
        from mnist_dist.commands.evaluate import report

        report(options.path, overrides, as_json=options.json)
        return 0
    stop.install()
    try:
        config, recipe = load(options.arguments)
        world_size = launched_world_size(os.environ)
        check_batch(config.batch_size, world_size)
        check_launcher(os.environ)
    except RequestError:
        if os.environ.get("RANK", "0") != "0":
            return 2  # every rank finds the same; rank 0 says it
        raise
    if options.check:
        print(recipe, config.run_dir or "", sep="\n")
        return 0
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # lost connections come with a C++ stack; we name the rank
    from mnist_dist.commands.train import plan, train

    if options.dry_run:
        print(plan(config, world_size), end="")
        return 0
    return train(config, recipe)
