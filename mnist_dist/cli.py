"""The verbs, their arguments, and what becomes of what goes wrong: one sentence and an exit code.

0 finished, 1 it went wrong, 2 the request is wrong, 3 stopped on request and resumable. torch is imported only by a
verb that needs it, so `--help` and a refusal come at once.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mnist_dist.api import quieten_libraries, start_training
from mnist_dist.config.parse import describe_keys, load_config
from mnist_dist.config.paths import redact_address
from mnist_dist.config.schema import Config
from mnist_dist.distributed.launch_env import LaunchEnv, read_launch_env
from mnist_dist.errors import JobError, RequestError, RunError
from mnist_dist.versions import VERSION

RANKED = ("train", "doctor", "verify", "bench")  # the verbs that a launcher starts once a rank
WITH_VERDICT = ("doctor", "verify")  # those of them whose exit code 1 is a verdict, and no failure of a rank
EXAMPLES = """\
examples:
  accelerate launch train.py                            the CNN, on every GPU here, or the CPU
  accelerate launch train.py mlp lr=2e-3                another recipe, one key changed
  mnist-dist evaluate runs/latest
  mnist-dist report runs/latest
  mnist-dist predict runs/latest seven.jpg
  mnist-dist fetch fashion-mnist data_dir=/shared/data
"""


class Verb(NamedTuple):
    """What `--help` says of a verb."""

    text: str
    usage: str = ""  # behind [-h]
    epilog: str = ""


VERBS = {
    "train": Verb(
        "train a network", "[--dry-run] [RECIPE] [key=value ...]", "RECIPE is a .yaml file, or the name of one of ours."
    ),
    "doctor": Verb(
        "can this set-up train at all? checks hosts, network, devices and folders, with all ranks",
        "[--json] [RECIPE] [key=value ...]",
        "Start it as training is started: launch/local.sh doctor, launch/node.sh doctor, sbatch slurm/train.sh "
        "doctor.\n"
        "The request is training's; data_dir, dataset and run_dir are looked at. Exit code 1 where a check failed.",
    ),
    "verify": Verb(
        "does it train right? compares bits: each rank alone, all together, again, resumed; plants faults",
        "[--json] [--plant] [seed=N] [precision=...]",
        "Start it as training is started: launch/local.sh verify, launch/node.sh verify, sbatch slurm/train.sh "
        "verify.\nIt trains both networks on drawn digits. Exit code 1 where something differs.",
    ),
    "bench": Verb(
        "how fast does it train, and how does it scale? times the real step on 1, 2, 4 ... ranks",
        "[--json] [--output FILE] [--against FILE] [RECIPE] [key=value ...]",
        "Started alone it starts the ranks of this machine itself: one a GPU, or one a CPU core. Under a launcher,\n"
        "as NPROC=2 launch/local.sh bench or sbatch slurm/train.sh bench, its ranks are the largest world.\n"
        "It trains on drawn digits: both networks at several batch sizes, or those that the request names.\n\n"
        "next: mnist-dist bench --output now.json --against before.json",
    ),
    "evaluate": Verb(
        "exact loss, accuracy and confusion matrix of a run, a checkpoint or a file of weights",
        "[--json] RUN [key=value ...]",
        "RUN is a run's folder, a checkpoint's, or a file of weights (.safetensors, .pt, .pth).\n"
        "keys: dataset, data_dir, validation, threads",
    ),
    "report": Verb(
        "a run on one page of HTML: figures, curves, mistakes; of several runs, how they compare",
        "[-o FILE] RUN [RUN ...]",
        "RUN is a run's folder. Nothing is fetched: the dataset is used where it is there.",
    ),
    "predict": Verb(
        "which digit a picture shows: a photo, a scan, a drawing",
        "[--json | --show] RUN IMAGE ...",
        "RUN is what `evaluate` takes. IMAGE is a file (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM), a folder of them, or -\n"
        "for the standard input: one digit, upright, in any size and colours, on a background without lines.\n"
        "Exit codes: 0; 1 where some of several pictures cannot be read; 2 where none can.\n\n"
        "next: mnist-dist predict --show RUN IMAGE draws what the network saw",
    ),
    "export": Verb(
        "write a run's network as one file: ONNX, torch.export or safetensors",
        "--to {onnx,torch-export,safetensors} RUN FILE",
        "RUN is what `evaluate` takes. FILE is replaced if it is there.\n"
        "onnx and torch-export: images uint8 [n, 28, 28] in, ink 255 on 0, for any n; probabilities float32 [n, 10]\n"
        "out. Before FILE is written, its predictions are compared with torch's on the run's images.\n"
        "safetensors: the weights alone, by the names that the tutorials' own classes have.\n\n"
        "next: mnist-dist export --to onnx runs/latest digits.onnx",
    ),
    "schema": Verb(
        "print the JSON schema of a recipe, for editors",
        epilog="With `# yaml-language-server: $schema=schema.json` as its first line, a recipe is completed and "
        "checked in\neditors that know the YAML language server. Our recipes have it.\n\n"
        "next: mnist-dist schema > schema.json, beside a recipe of your own",
    ),
    "fetch": Verb(
        "bring a dataset to this machine, so that training needs no network",
        "[DATASET] [key=value ...]",
        "keys: dataset, data_dir, mirror",
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise RequestError(f"{message}; {self.prog} --help shows what there is")


def make_parser() -> argparse.ArgumentParser:
    """The verbs and their options; key=value and the like are left to the verbs."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="mnist-dist", description=__doc__.splitlines()[0], epilog=EXAMPLES, formatter_class=plain)
    parser.add_argument("--version", action="version", version=f"mnist-dist {VERSION}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    verbs = {}
    for verb, (text, usage, epilog) in VERBS.items():
        verbs[verb] = subparsers.add_parser(
            verb, help=text, description=text, epilog=epilog, formatter_class=plain, allow_abbrev=False
        )
        if usage:
            verbs[verb].usage = f"%(prog)s [-h] {usage}"
    train = verbs["train"]
    train.epilog = f"{train.epilog}\n\nconfiguration keys, with their defaults:\n{describe_keys()}\n\n{EXAMPLES}"
    train.add_argument("--dry-run", action="store_true", help="print the resolved configuration and the plan, and stop")
    for verb in RANKED:
        verbs[verb].add_argument(
            "--check",
            action="store_true",
            help="only check the arguments, at once; print the recipe's name, run_dir and timeout_s",
        )
    bench = verbs["bench"]
    bench.add_argument("--output", metavar="FILE", help="write everything there as JSON, and a plot beside it as PNG")
    bench.add_argument("--against", metavar="FILE", help="what has changed since an earlier --output")
    for verb in ("doctor", "verify", "bench"):
        verbs[verb].add_argument("--json", action="store_true", help="print one JSON object with everything")
    verbs["verify"].add_argument("--plant", action="store_true", help="only plant faults, each several times")
    verbs["evaluate"].add_argument("--json", action="store_true", help="print one JSON object")
    verbs["report"].add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where to write the page (default: RUN/report.html; of several runs, comparison.html beside the first)",
    )
    form = verbs["predict"].add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object a picture, with all ten probabilities")
    form.add_argument("--show", action="store_true", help="draw what the network saw, 28 x 28 pixels")
    formats = ("onnx", "torch-export", "safetensors")
    verbs["export"].add_argument("--to", required=True, choices=formats, help="the format")
    return parser


def run_process(arguments: Sequence[str]) -> int:
    """Run a verb as the whole of a process: the exit code for whoever started it."""
    code = main(arguments)
    try:
        has_verdict = bool(arguments) and arguments[0] in WITH_VERDICT
        return read_launch_env(os.environ).exit_code(code, has_verdict=has_verdict)
    except RequestError:  # `main` has said it
        return code


def main(arguments: Sequence[str]) -> int:
    """Run a verb and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal does not have must not end a run
            stream.reconfigure(errors="backslashreplace")
    env = LaunchEnv()
    try:
        try:
            options, rest = make_parser().parse_known_args(list(arguments))
            if options.verb in RANKED:
                env = read_launch_env(os.environ)
            return run_verb(options, rest, env)
        finally:
            flush_output()
    except JobError as error:
        if not error.on_every_rank or env.rank == 0:
            complain(str(error))
        # Where all ranks are refused they all leave; a rank that is refused alone has failed: its launcher must hear of
        # it, and end those that wait for this one.
        return error.exit_code if error.on_every_rank or env.rank == 0 else RunError.exit_code
    except SystemExit as end:  # --help and --version have been answered
        return int(end.code or 0)
    except KeyboardInterrupt:  # training notes it and stops in order; here there is nothing to save
        return 130
    except BrokenPipeError:  # the reader of the output went away, as `| head` does
        return 1


def run_verb(options: argparse.Namespace, rest: list[str], env: LaunchEnv) -> int:
    """Run one verb. Raises JobError."""
    if options.verb not in RANKED:
        command = importlib.import_module(f"mnist_dist.commands.{options.verb}")
        return int(command.run(options, rest))
    config, recipe = read_request(rest, env)
    if options.check:
        print(recipe, config.run_dir or "", int(config.timeout_s), sep="\n")
        return 0
    if options.verb != "train":
        quieten_libraries()
        command = importlib.import_module(f"mnist_dist.commands.{options.verb}")
        return int(command.run(options, config, env))
    if options.dry_run:
        from mnist_dist.commands.train import plan

        print(plan(config, env.world_size), end="")
        return 0
    return start_training(config, recipe, env)[0]


def read_request(rest: list[str], env: LaunchEnv) -> tuple[Config, str]:
    """The configuration and the recipe's name; a wrong request is refused before torch is imported.

    Raises RequestError.
    """
    try:
        config, recipe = load_config(rest)
        if problem := config.world_size_problem(env.world_size):
            raise RequestError(problem)
    except RequestError as error:
        error.on_every_rank = True  # they all have the same request, so that rank 0 alone says it
        raise
    return config, recipe


def flush_output() -> None:
    """Write out what was printed, while a reader that went away or a full disk is still no traceback."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter tries again when it ends
        if isinstance(error, BrokenPipeError):
            raise
        raise RunError(f"the output cannot be written: {error.strerror}") from None


def complain(sentence: str) -> None:
    """Say what went wrong, and leave it where torchrun looks for it, so that its summary ends with it."""
    sentence = redact_address(sentence)  # it may quote what was typed
    print(f"mnist-dist: {sentence}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
        try:
            Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
        except OSError:  # it was said already
            return
