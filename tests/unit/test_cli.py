"""The verbs evaluate and fetch: what they print, and one sentence and exit code 2 for a bad request."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mnist_dist.cli import VERBS, main
from mnist_dist.config.parse import build_config
from mnist_dist.data import download as fetch
from mnist_dist.data import synthetic
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.synthetic import draw_digits
from mnist_dist.models import build_model
from mnist_dist.run import checkpoint
from mnist_dist.training.evaluation import Evaluation, evaluate
from tests.conftest import NUM_TEST, REPOSITORY, TRAIN, clean_environment
from tests.unit.data.test_download import archives, pretend

MAIN = "import sys; from mnist_dist.cli import VERBS, main; sys.exit(main(sys.argv[1:]))"
LONG = "x" * 5000  # no file system takes such a name


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """`evaluate` sets torch's number of threads; leave it as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def weights(cwd: Path) -> Path:
    """A bare model.safetensors, as a tutorial would leave it, in an otherwise empty folder."""
    path = cwd / "model.safetensors"
    save_file(build_model("mlp", seed=4).state_dict(), path)
    return path


@pytest.fixture
def run_dir(cwd: Path, data_dir: Path) -> Path:
    """A run's folder as training leaves it: two checkpoints, the configuration, `latest`."""
    config = build_config({"model": "cnn", "dataset": "mnist", "data_dir": str(data_dir), "missing": "synthetic"})
    path = cwd / "runs/cnn-20250102-030405"
    path.mkdir(parents=True)
    # The digits stood in for mnist, which only the checkpoint knows.
    training = {"format": 1, "dataset": {"name": "synthetic", "fingerprint": "?"}}
    for step in (10, 20):
        checkpoint.save(path / "checkpoints", step, build_model("cnn", seed=step).state_dict(), training, keep=2)
    (path / "config.yaml").write_text(config.to_yaml())
    (path.parent / "latest").symlink_to(path.name)
    return path


@pytest.fixture
def expected(data_dir: Path) -> Evaluation:
    """What the newest checkpoint of `run_dir` is worth."""
    return evaluate(build_model("cnn", seed=20), load_dataset("synthetic", data_dir).eval_split)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a request is refused; what is printed before it are warnings."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *warnings, sentence = captured.err.removesuffix("\n").split("\n")
    assert all(line.startswith("WARNING: ") for line in warnings)
    assert sentence.startswith("mnist-dist: ")
    return sentence


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a request that is answered prints on stdout; it says nothing on stderr."""
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def strict(text: str) -> Any:
    """Parse one line of JSON, in which NaN and Infinity do not exist."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    assert text.endswith("\n")
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)


def run_main(
    *arguments: object, stdout: int, cwd: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[bytes]":
    """Run a verb as a process of its own, its output buffered as it is for a user."""
    environment = clean_environment(PYTHONPATH=str(REPOSITORY), **environment)
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, cwd=cwd)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: VERB"),
        (["evalute", "model.safetensors"], "invalid choice: 'evalute'"),
        (["evaluate"], "there is no RUN; give a run's folder, a checkpoint's, or a file of weights"),
        (["evaluate", "nowhere"], "there is no nowhere; give a run's folder, a checkpoint's, or a file of weights"),
        (["evaluate", "missing"], "missing has no value; write missing=VALUE"),  # ./missing is a path
        (["evaluate", "missing.safetensors"], "there is no missing.safetensors"),
        (["evaluate", LONG], "File name too long"),
        (["evaluate", "."], "there is no whole checkpoint in ."),
        (["evaluate", "model.safetensors", "lr=1"], "lr is no key of this verb, which takes dataset, data_dir"),
        (["evaluate", "model.safetensors", "datset=mnist"], "did you mean dataset?"),
        (["evaluate", "model.safetensors", "mnist"], "there is 'mnist' beside RUN 'model.safetensors'"),
        (["evaluate", "model.safetensors", "dataset=minst"], "did you mean mnist?"),
        (["evaluate", "model.safetensors", "threads=-1"], "threads=-1 is too small: at least 0"),
        (["evaluate", "model.safetensors", "threads=1", "threads=2"], "two values for threads"),
        (["evaluate", "model.safetensors", "validation=x"], "validation=x is not a whole number"),
        (["evaluate", "model.safetensors", "--yaml"], "there is no option --yaml"),
        (["evaluate", "model.safetensors"], "and evaluate fetches nothing; run `mnist-dist fetch dataset=mnist data_"),
        (["evaluate", "model.safetensors", "missing=fail"], "evaluate fetches nothing"),
        (["evaluate", "model.safetensors", "missing=synthetic"], "evaluate fetches nothing"),
        (["evaluate", "model.safetensors", "mirror=https://a.b"], "evaluate fetches nothing"),
        (
            ["evaluate", "model.safetensors", "dataset=synthetic"],
            "there is no data/synthetic.safetensors, and evaluate",
        ),
        (["evaluate", "model.safetensors", "data_dir=model.safetensors"], "model.safetensors is not a folder"),
        (["evaluate", "model.safetensors", "data_dir=/proc/1"], "there is no /proc/1/MNIST/raw/train-images"),
        (["evaluate", "model.safetensors", f"data_dir={LONG}"], "File name too long"),
        (["fetch", "lr=1"], "lr is no key of this verb, which takes dataset, data_dir, mirror"),
        (["fetch", "missing=fail"], "missing is no key of this verb"),
        (["fetch", "dataset=minst"], "did you mean mnist?"),
        (["fetch", "data_dir="], "data_dir= has no value"),
        (["fetch", "minst"], "did you mean mnist?"),
        (["fetch", "mnist", "kmnist"], "'kmnist' is a second dataset beside 'mnist'; give one"),
        (["fetch", "mnist", "dataset=kmnist"], "two values for dataset"),
        (["fetch", "--dataset", "minst"], "did you mean mnist?"),
        (["fetch", "--json"], "there is no option --json"),
        (["evaluate", "$NO_SUCH_VARIABLE"], "names the variable NO_SUCH_VARIABLE, which is not set"),
        (["fetch", "data_dir=model.safetensors"], "model.safetensors is not a folder); mend that, or give another"),
        (["fetch", "data_dir=/proc/data"], "data_dir=/proc/data cannot be written"),
        (["fetch", "data_dir=/proc/1"], "data_dir=/proc/1 cannot be written ("),
        (["train", "data_dir=/proc/1"], "data_dir=/proc/1 cannot be written ("),
        (["fetch", "https://me:s3cret@a.b"], "dataset=https://***@a.b is not one of"),
        (["fetch", "mirror", "https://me:s3cret@a.b"], "mirror has no value; write mirror=VALUE"),
        (["fetch", f"data_dir={LONG}"], "File name too long"),
    ],
    ids=lambda value: " ".join(value).replace(LONG, "xxx") if isinstance(value, list) else "",
)
def test_bad_requests(arguments: list[str], sentence: str, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refusal(arguments, capsys)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_verb(verb: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed([verb, flag], capsys).startswith(f"usage: mnist-dist {verb} ")


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["--help"], capsys)
    assert all(f"\n    {verb} " in text for verb in VERBS)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "model.safetensors is not a safetensors file"),
        (b"\x80\x02}q\x00.", "model.safetensors is not a safetensors file"),
        (bytes(range(256)) * 8, "model.safetensors is not a safetensors file"),
        ({}, "0.weight is missing, not (512, 784)"),
        ({"conv1.weight": torch.zeros(1)}, "conv1.weight is (1,), not (32, 1, 3, 3)"),
        ({"fc.weight": torch.zeros(10, 784)}, "does not hold the weights of a network of this program: 0.weight"),
    ],
    ids=["empty", "pickle", "binary", "nothing", "half", "other"],
)
def test_a_file_without_our_weights_is_refused(
    content: Any, sentence: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, bytes):
        weights.write_bytes(content)
    else:
        save_file(content, weights)
    assert sentence in refusal(["evaluate", "model.safetensors", "missing=fail"], capsys)


def test_a_damaged_dataset_is_refused(weights: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "data").mkdir()
    (cwd / "data/mnist.safetensors").write_bytes(b"\0" * 100)
    assert "data/mnist.safetensors cannot be read" in refusal(["evaluate", "model.safetensors"], capsys)


def test_a_bare_file_is_evaluated_as_json(weights: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(weights), "dataset=synthetic", f"data_dir={data_dir}", "--json"]
    figures = strict(printed(arguments, capsys))
    expected = evaluate(build_model("mlp", seed=4), load_dataset("synthetic", data_dir).eval_split)
    assert figures.pop("loss") == pytest.approx(expected.loss, rel=1e-6)
    assert figures == {
        "weights": str(weights),
        "model": "mlp",
        "dataset": "synthetic",
        "split": "test",
        "accuracy": expected.accuracy,
        "count": NUM_TEST,
        "accuracy_95": list(expected.interval()),
        "confusion": expected.confusion.tolist(),
    }


@pytest.mark.parametrize("path", ["", "checkpoints/step-00000020", "../latest"])
def test_a_run_is_evaluated_on_what_it_was_trained_on(
    path: str, run_dir: Path, expected: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = strict(printed(["evaluate", "--json", str(run_dir / path)], capsys))
    assert (figures["model"], figures["dataset"], figures["split"]) == ("cnn", "synthetic", "test")
    assert figures["weights"].endswith("/checkpoints/step-00000020/model.safetensors")
    assert figures["confusion"] == expected.confusion.tolist()
    assert figures["accuracy"] == expected.accuracy
    assert figures["loss"] == pytest.approx(expected.loss, rel=1e-6)


def test_an_older_checkpoint_can_be_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = strict(printed(["evaluate", str(run_dir / "checkpoints/step-00000010"), "--json"], capsys))
    newer = strict(printed(["evaluate", str(run_dir), "--json"], capsys))
    assert older["weights"].endswith("step-00000010/model.safetensors")
    assert older["loss"] != newer["loss"]


def test_the_splits_of_a_run_can_be_overridden(
    run_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = strict(printed(["evaluate", str(run_dir), "validation=300", "--json"], capsys))
    assert (held_out["split"], held_out["count"]) == ("validation", 300)
    config = build_config({"dataset": "synthetic", "data_dir": str(data_dir), "validation": 150})
    (run_dir / "config.yaml").write_text(config.to_yaml())
    held_out = strict(printed(["evaluate", str(run_dir), "--json"], capsys))
    assert (held_out["split"], held_out["count"]) == ("validation", 150)
    tested = strict(printed(["evaluate", str(run_dir), "validation=0", "--json"], capsys))
    assert (tested["split"], tested["count"]) == ("test", NUM_TEST)


def test_a_run_on_other_images_can_be_evaluated(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(run_dir), "dataset=kmnist", "missing=fail"]
    assert "there is no data/KMNIST/raw/" in refusal(arguments, capsys)


def test_a_run_is_evaluated_where_its_machines_folders_are_not(
    run_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"dataset": "synthetic", "data_dir": "not/here", "missing": "fail", "validation": 150, "threads": 999}
    (run_dir / "config.yaml").write_text(build_config(settings).to_yaml())
    monkeypatch.setenv("MNIST_DIST_DATA_DIR", str(data_dir))
    figures = strict(printed(["evaluate", str(run_dir), "--json"], capsys))
    assert (figures["split"], figures["count"]) == ("validation", 150)
    assert torch.get_num_threads() < 999


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run_dir / "checkpoints/step-00000020"
    (newest / "model.safetensors").write_bytes(b"")
    assert main(["evaluate", str(run_dir), "--json"]) == 0
    captured = capsys.readouterr()
    assert strict(captured.out)["weights"].endswith("step-00000010/model.safetensors")
    assert captured.err.startswith(f"WARNING: checkpoint {newest} is damaged (model.safetensors ")
    assert captured.err.count("\n") == 1

    (run_dir / "checkpoints/step-00000010/manifest.json").write_text("{}")
    assert f"there is no whole checkpoint in {run_dir}" in refusal(["evaluate", str(run_dir)], capsys)
    assert newest.exists()  # looking changes nothing


def test_evaluating_leaves_the_run_as_it_is(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def contents() -> dict[Path, tuple[int, bytes]]:
        files = [path for path in run_dir.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = contents()
    printed(["evaluate", str(run_dir)], capsys)
    assert contents() == before


@pytest.mark.parametrize("recorded", [True, False])
def test_archives_are_evaluated_on_without_writing(
    recorded: bool, run_dir: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend("kmnist", ["http://none.invalid/"], monkeypatch.setattr)
    raw = cwd / ("elsewhere" if recorded else "data") / "KMNIST/raw"
    raw.mkdir(parents=True)
    for name, data in archives("kmnist").items():
        (raw / name).write_bytes(data)
    if recorded:
        (run_dir / "config.yaml").write_text(build_config({"data_dir": str(cwd / "elsewhere")}).to_yaml())
    before = sorted(cwd.rglob("*"))
    assert main(["evaluate", str(run_dir), "dataset=kmnist", "--json"]) == 0
    captured = capsys.readouterr()
    assert strict(captured.out)["dataset"] == "kmnist"
    assert captured.err.count("\n") == 1
    assert "kmnist is read from " in captured.err
    assert sorted(cwd.rglob("*")) == before


def test_the_table_for_people_has_the_same_figures(
    run_dir: Path, expected: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(["evaluate", str(run_dir)], capsys).splitlines()
    assert lines[0] == f"{run_dir}/checkpoints/step-00000020/model.safetensors: cnn on synthetic, test"
    assert float(lines[1].split()[1]) == pytest.approx(expected.loss, abs=1e-5)
    low, high = (100 * bound for bound in expected.interval())
    assert lines[2] == (
        f"accuracy  {100 * expected.accuracy:.2f} % ({expected.correct} of {NUM_TEST}), "
        f"95 % interval {low:.2f} to {high:.2f} %"
    )
    assert lines[4].split() == [str(digit) for digit in range(10)]
    rows = [[int(number) for number in line.split()] for line in lines[5:]]
    assert rows == [[digit, *row] for digit, row in enumerate(expected.confusion.tolist())]


def test_weights_that_are_no_numbers_are_refused(
    weights: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build_model("mlp", seed=0).state_dict()
    state["0.bias"][3] = float("nan")
    save_file(state, weights)
    arguments = ["evaluate", str(weights), "dataset=synthetic", f"data_dir={data_dir}", "--json"]
    assert f"{weights} holds weights that are not finite; give an earlier checkpoint" in refusal(arguments, capsys)


def test_somebody_elses_config_yaml_near_a_bare_file_is_not_read(
    weights: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = weights.parent / "project/models/model.safetensors"
    path.parent.mkdir(parents=True)
    weights.rename(path)
    for folder in path.parents[:3]:
        (folder / "config.yaml").write_text("learning_rate: 0.1\n")
    arguments = ["evaluate", str(path), "dataset=synthetic", f"data_dir={data_dir}", "--json"]
    assert strict(printed(arguments, capsys))["count"] == NUM_TEST


def test_options_may_stand_before_between_and_after(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, override = str(run_dir), "validation=20"
    for arguments in (
        ["--json", path, override],
        [path, override, "--json"],
        [path, "--json", override],
        [override, "--json", path],
        ["--validation", "20", path, "--json"],
    ):
        assert strict(printed(["evaluate", *arguments], capsys))["count"] == 20, arguments


def test_fetch_brings_a_dataset_once_and_says_where_it_is(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic, "draw_digits", lambda count, seed: draw_digits(count // 1000, seed))
    first = printed(["fetch", "dataset=synthetic", "data_dir=here"], capsys)
    assert first == "drawing 70,000 digits, once\nsynthetic is in here/synthetic.safetensors\n"
    assert len(load_dataset("synthetic", Path("here")).train.labels) == 60
    monkeypatch.setenv("MNIST_DIST_DATA_DIR", "here")
    for words in (["dataset=synthetic"], ["synthetic"], ["--dataset", "synthetic"], ["data_dir=here", "synthetic"]):
        assert printed(["fetch", *words], capsys) == "synthetic is in here/synthetic.safetensors\n"


def test_fetch_looks_at_what_is_there(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "mnist.safetensors").write_text("junk")
    sentence = refusal(["fetch", "data_dir=."], capsys)
    assert sentence.startswith("mnist-dist: mnist.safetensors cannot be read")
    assert sentence.endswith("; delete it and run `mnist-dist fetch dataset=mnist data_dir=.`")


def test_a_plan_without_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refusal(["train", "--dry-run", "validation=60000"], capsys)
    assert "validation=60000 leaves nothing to train on; mnist has 60000 training images" in sentence


def test_what_a_script_asks_a_request_for(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "my recipe.yaml").write_text("run_dir: a b\n")
    assert printed(["train", "--check", "my recipe.yaml"], capsys) == "my recipe\na b\n300\n"
    assert printed(["train", "--check", "model=mlp"], capsys) == "mlp\n\n300\n"


@pytest.mark.parametrize("make_mirror", [True, False])
def test_a_mirror_without_the_files_is_one_sentence(
    make_mirror: bool, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)  # between the rounds
    if make_mirror:
        (cwd / "mirror").mkdir()
        (cwd / "mirror/train-images-idx3-ubyte.gz").write_text("404")
    assert main(["fetch", "mirror=mirror"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("mnist-dist: train-images-idx3-ubyte.gz could not be fetched (mirror/train-images")
    assert sentence.count("\n") == 1
    assert not any(path.is_file() for path in (cwd / "data/MNIST").rglob("*"))


def test_a_data_dir_with_a_file_in_the_way_is_one_sentence(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "data").mkdir()
    (cwd / "data/MNIST").write_text("")  # where torchvision's folder would be
    assert "data/MNIST" in refusal(["fetch", "mirror=nowhere"], capsys)


@pytest.mark.parametrize("verb", ["help", "evaluate"])
def test_a_reader_that_has_gone_is_no_bug(verb: str, run_dir: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run_main(*(["train", "--help"] if verb == "help" else ["evaluate", run_dir]), stdout=writer)
    finally:
        os.close(writer)
    assert result.stderr == b""
    assert result.returncode == 1


def test_a_full_disk_behind_the_output_is_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        result = run_main("train", "--help", stdout=full.fileno())
    assert result.stderr == b"mnist-dist: the output cannot be written: No space left on device\n"
    assert result.returncode == 1


def test_without_an_output_there_is_no_crash(data_dir: Path, tmp_path: Path) -> None:
    environment = clean_environment(PYTHONPATH=str(REPOSITORY), MNIST_DIST_DATA_DIR=str(data_dir))
    command = f'exec "{sys.executable}" "{TRAIN}" dataset=synthetic max_steps=1 run_dir=run >&-'
    result = subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "test accuracy" in (tmp_path / "run" / "console.log").read_text()


def test_a_path_that_is_no_text_is_no_crash(weights: Path, data_dir: Path) -> None:
    path = weights.with_name(os.fsdecode(b"caf\xe9.safetensors"))
    weights.rename(path)
    arguments = ["evaluate", path.name, "dataset=synthetic", f"data_dir={data_dir}"]
    result = run_main(*arguments, stdout=subprocess.PIPE, cwd=path.parent, PYTHONIOENCODING="utf-8:strict")
    assert b"Traceback" not in result.stderr
    assert result.returncode in (0, 2)  # answered or refused


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["-m", "mnist_dist.cli", "train"], "mnist_dist.cli"),
        (["-m", "mnist_dist.commands.train"], "mnist_dist.commands.train"),
        ([str(REPOSITORY / "mnist_dist/cli.py")], str(REPOSITORY / "mnist_dist/cli.py")),
    ],
)
def test_a_module_that_is_no_program_says_so(command: list[str], name: str, tmp_path: Path) -> None:
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    result = subprocess.run([sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"mnist-dist: {name} is no program; use python -m mnist_dist VERB, or train.py\n"


def test_the_package_is_a_program(tmp_path: Path) -> None:
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    command = [sys.executable, "-m", "mnist_dist", "--version"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("mnist-dist ")


def test_torchrun_finds_the_sentence_for_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["train", "epoch=3"]) == 2
    message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert message == "there is no key epoch; did you mean epochs?"
