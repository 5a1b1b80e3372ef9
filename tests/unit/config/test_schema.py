"""Every bad request gets one sentence that names it and exit code 2."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mnist_dist.cli import main
from mnist_dist.config.parse import build_config, load_config
from mnist_dist.config.paths import redact_address
from mnist_dist.config.schema import Config
from mnist_dist.errors import RequestError
from tests.conftest import REPOSITORY, TRAIN, clean_environment

# arguments of `train`, and what the sentence must hold
BAD = [
    (["epoch=3"], "there is no key epoch; did you mean epochs?"),
    (["learning_rate=0.1"], "there is no key learning_rate"),
    (["batchsize=64"], "did you mean batch_size?"),
    (["xyzzy=1"], "--help lists the keys"),
    (["lr=fast"], "lr=fast is not a number"),
    (["lr=0"], "lr=0 is too small: more than 0"),
    (["lr=-1e-3"], "lr=-1e-3 is too small"),
    (["lr=nan"], "not a finite number"),
    (["lr=inf"], "not a finite number"),
    (["lr=.nan"], "is not a number"),
    (["lr="], "lr= has no value"),
    (["lr=[1, 2]"], "is not a number"),
    (["lr={a: 1}"], "is not a number"),
    (["lr=true"], "lr=true is not a number"),
    (["lr=1:30"], "lr=1:30 is not a number"),
    (["epochs=1.5"], "epochs=1.5 is not a whole number"),
    (["epochs=0"], "at least 1"),
    (["epochs=-3"], "at least 1"),
    (["epochs=ten"], "epochs=ten is not a whole number"),
    (["epochs=false"], "epochs=false is not a whole number"),
    (["batch_size=0"], "at least 1"),
    (["batch_size=64.5"], "not a whole number"),
    (["batch_size=1e2000"], "batch_size"),
    (["batch_size=1000000000000"], "at most 1048576"),
    (["micro_batch=-1"], "at least 0"),
    (["micro_batch=128"], "micro_batch=128 is larger than batch_size=64"),
    (["micro_batch=32", "bit_exact=4"], "a shard of batch_size=64 and bit_exact=4, 16 images"),
    (
        ["bit_exact=3"],
        "bit_exact=3 is not a power of two that divides batch_size=64; use one of 1, 2, 4, 8, 16, 32, 64,",
    ),
    (["bit_exact=128"], "bit_exact=128 is not a power of two that divides batch_size=64"),
    (["bit_exact=8", "batch_size=60"], "use one of 1, 2, 4, or 0 for none"),
    (["bit_exact=2048", "batch_size=2048"], "at most 1024"),
    (["bit_exact=-1"], "at least 0"),
    (["bit_exact=yes"], "is not a whole number"),
    (["max_steps=-1"], "at least 0"),
    (["model=resnet"], "model=resnet is not one of mlp, cnn"),
    (["model=cn"], "did you mean cnn?"),
    (["model=CNN"], "is not one of mlp, cnn"),
    (["model=1"], "is not one of mlp, cnn"),
    (["dataset=minst"], "did you mean mnist?"),
    (["dataset=cifar10"], "dataset=cifar10 is not one of"),
    (["dataset=[mnist]"], "is not one of"),
    (["precision="], "precision= has no value"),
    (["precision=true"], "is not one of"),
    (["missing=ignore"], "is not one of download, fail, synthetic"),
    (["optimizer=lion"], "is not one of adam, adamw, muon, sgd"),
    (["schedule=linear"], "is not one of constant, cosine, one-cycle"),
    (["schedule=onecycle"], "did you mean one-cycle?"),
    (["warmup=1.5"], "at most 1"),
    (["warmup=-0.1"], "at least 0"),
    (["momentum=1"], "less than 1"),
    (["beta2=1.0"], "less than 1"),
    (["weight_decay=-0.1"], "at least 0"),
    (["label_smoothing=1"], "less than 1"),
    (["label_smoothing=-0.1"], "at least 0"),
    (["clip_grad_norm=-1"], "at least 0"),
    (["ema=1"], "less than 1"),
    (["ema=0.1"], "between 0.5 and 1"),
    (["shift=15"], "at most 14"),
    (["rotate=181"], "at most 180"),
    (["scale=1"], "less than 1"),
    (["elastic=-1"], "at least 0"),
    (["precision=fp8"], "is not one of auto, fp32, tf32, bf16, fp16"),
    (["precision=bf61"], "did you mean bf16?"),
    (["seed=-1"], "at least 0"),
    (["seed=2147483648"], "less than 2147483648"),
    (["seed=99999999999999999999999999"], "seed="),
    (["seed=nan"], "not a whole number"),
    (["validation=-5"], "at least 0"),
    (["evaluate_train=maybe"], "neither true nor false"),
    (["keep=0"], "at least 1"),
    (["checkpoint_every_s=-1"], "at least 0"),
    (["log_every_steps=0"], "at least 1"),
    (["log_with="], "log_with= has no value"),
    (["graph=no"], "graph=no is not one of auto, off"),
    (["threads=-1"], "at least 0"),
    (["threads=20000"], "at most 1024"),
    (["timeout_s=4.9"], "timeout_s=4.9 is too small: at least 5"),
    (["timeout_s=1e300"], "at most 1000000"),
    (["run_dir="], "run_dir= has no value"),
    (["data_dir="], "data_dir= has no value"),
    (["resume="], "resume= has no value"),
    (["data_dir=a\0b"], "NUL"),
    (["run_dir=$NO_SUCH_VARIABLE/x"], "names the variable NO_SUCH_VARIABLE, which is not set"),
    (["data_dir=${NO_SUCH_VARIABLE}"], "names the variable NO_SUCH_VARIABLE, which is not set"),
    (["mirror=https://me:s3cret@host", "mirror=x"], "there are two values for mirror"),
    (["https://me:s3cret@host"], "'https://***@host' is no recipe"),
    (["mirror=~no-such-user/x"], "names a user that is not known here"),
    (["keep=*anchor"], "keep=*anchor is not a whole number"),
    (["lr=[1"], "lr=[1 is not a number"),
    (["lr=!!python/object/apply:os.system [ls]"], "is not a number"),
    (["lr"], "lr has no value; write lr=VALUE"),
    (["--lr"], "--lr has no value; write lr=VALUE"),
    (["lr=1", "lr=2"], "there are two values for lr"),
    (["batch-size=32", "--batch_size=32"], "there are two values for batch_size"),
    (["lr=1", "resnet"], "'resnet' is no recipe, no .yaml file and no key=value; our recipes are best-cnn, "),
    (["cnn-fsat"], "did you mean cnn-fast?"),
    (["cnn", "mlp"], "'mlp' is a second recipe beside 'cnn', or no key=value; give one recipe"),
    (["missing.yaml"], "there is no configuration file missing.yaml"),
    (["lr=1", "other.yaml"], "there is no configuration file other.yaml"),
    (["--learning-rate"], "there is no option --learning-rate; did you mean lr?"),
    (["--learning-rate=1"], "there is no key learning_rate; did you mean lr?"),
    (["--lr", "--epochs=2"], "lr=--epochs=2 is not a number"),
    (["num_workers=4"], "the whole dataset lies in memory, so there are no loader workers"),
    (["device=cuda"], "ACCELERATE_USE_CPU=true forces the CPU"),
]

# content of a configuration file, and what the sentence must hold
BAD_FILES = [
    ("", "is empty"),
    ("# only a comment\n", "is empty"),
    ("- a\n- b\n", "holds a list"),
    ("just words\n", "holds text"),
    ("epochs: 3\nepochs: 4\n", "two values for the key epochs"),
    ("epochs: [1\n", "line"),
    ("epochs: \t- x: {\n", "is not valid YAML"),
    ("batch-size: 3\nbatch_size: 4\n", "two values for batch_size"),
    ("1: 2\n", "there is no key 1"),
    ("? [a]\n: 2\n", "is not a word"),
    ("lr: '1e-3'\nepochs: x\n", "epochs=x is not a whole number"),
    ("lr: 1.2.3\n", "lr=1.2.3 is not a number"),
    ("a: &a [x]\nb: *a\n", "aliases"),
    ("<<: {lr: 1}\n", "merges (<<) are not allowed"),
    ("model: !!python/name:os.system\n", "model= has no value"),
    ("model: !!python/name:os.system x\n", "model=x is not one of mlp, cnn"),
    ("model: null\n", "is not one of"),
    ("lr:\n", "lr= has no value"),
    ("run_dir: [a]\n", "is not text"),
    ("lr: {a: 1}\n", "is not a number"),
    ("run_dir: $NO_SUCH_VARIABLE\n", "names the variable NO_SUCH_VARIABLE, which is not set"),
    ("x: " + "[" * 3000 + "\n", "is not valid YAML"),
    ("x" * 70_000, "larger than"),
]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused request prints."""
    assert main(["train", "--check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mnist-dist: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "")
def test_bad_arguments(arguments: list[str], sentence: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refusal(arguments, capsys)


@pytest.mark.parametrize(("content", "sentence"), BAD_FILES, ids=lambda v: repr(v)[:30])
def test_bad_files(content: str, sentence: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "bad.yaml").write_text(content)
    assert sentence in refusal(["bad.yaml"], capsys)


def test_files_that_are_none(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "folder.yaml").mkdir()
    assert "is a folder" in refusal(["folder.yaml"], capsys)
    (cwd / "image.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert "is not a text file" in refusal(["image.yaml"], capsys)
    (cwd / "link.yaml").symlink_to("link.yaml")
    assert "cannot be read" in refusal(["link.yaml"], capsys)
    (cwd / "cnn.yaml").write_text("epochs: 1\n")
    assert "did you mean cnn.yaml?" in refusal(["cmn.yaml"], capsys)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "0", "WORLD_SIZE": "3"}, "1, 2, 4, 8, 16, 32, 64 ranks"),
        ({"RANK": "0", "WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        ({"RANK": "0"}, "WORLD_SIZE is not set in the environment"),
        ({"WORLD_SIZE": "2"}, "RANK is not set in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "do not fit together"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"MASTER_ADDR": "127.0.0.1"}, "launch/local.sh"),
        ({"ACCELERATE_USE_FSDP": "true"}, "told to use FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "told to use DEEPSPEED"),
    ],
)
def test_bad_launches(
    environment: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sentence in refusal([], capsys)


def test_shards_that_the_ranks_cannot_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    sentence = refusal(["bit_exact=4", "batch_size=60"], capsys)
    assert "bit_exact=4 shards cannot be shared equally by 3 ranks; use 1, 2, 4 ranks" in sentence


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--check", "epoch=3"]) == 2
    assert capsys.readouterr().err == ""


def test_defaults_are_the_cnn_recipe() -> None:
    written = yaml.safe_load((REPOSITORY / "configs/cnn.yaml").read_text())
    assert build_config(written) == Config()
    assert load_config([])[1] == "cnn"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid_and_survive_a_round_trip(path: Path, cwd: Path) -> None:
    config, recipe = load_config([str(path)])
    assert recipe == path.stem
    (cwd / "again.yaml").write_text(config.to_yaml())
    assert load_config(["again.yaml"])[0] == config


def test_values_are_read_as_meant(monkeypatch: pytest.MonkeyPatch, cwd: Path) -> None:
    (cwd / "my file.yaml").write_text("lr: 1e-3\nepochs: 2\nprecision: no\nlog_with: [tensorboard]\n")
    config, recipe = load_config(["my file.yaml", "epochs=4", "data_dir=1e3", "run_dir=a b/ü"])
    assert (config.lr, config.epochs, recipe) == (1e-3, 4, "my file")
    assert (config.data_dir, config.run_dir) == (Path("1e3"), Path("a b/ü"))
    assert config.log_with == ("tensorboard",)
    assert config.precision == "fp32"
    numbers = config_of("seed=010", "batch_size=1_024", "lr=.5E-2", "shift=2.", "rotate=+7", "scale=0")  # none is octal
    assert (numbers.seed, numbers.batch_size, numbers.lr) == (10, 1024, 5e-3)
    assert (numbers.shift, numbers.rotate, numbers.scale) == (2.0, 7.0, 0.0)
    monkeypatch.setenv("MNIST_DIST_DATA_DIR", "/elsewhere")
    assert config_of().data_dir == Path("/elsewhere")


def config_of(*arguments: str) -> Config:
    return load_config(arguments)[0]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("graph", "off", "off"),
        ("precision", "no", "fp32"),
        ("run_dir", "2026-11-25", Path("2026-11-25")),
        ("run_dir", "17", Path("17")),
        ("run_dir", "null", None),
        ("resume", "no", "no"),
        ("lr", "1e-3", 1e-3),
        ("seed", "010", 10),
        ("batch-size", "32", 32),
        ("evaluate_train", "yes", True),
        ("evaluate_train", "off", False),
        ("log_with", "tensorboard", ("tensorboard",)),
        ("log_with", "tensorboard,wandb", ("tensorboard", "wandb")),
        ("log_with", "[tensorboard, wandb]", ("tensorboard", "wandb")),
        ("log_with", "[]", ()),
    ],
)
def test_a_key_takes_the_same_text_in_a_file_and_on_the_command_line(
    key: str, text: str, value: object, cwd: Path
) -> None:
    (cwd / "file.yaml").write_text(f"{key}: {text}\n")
    name = key.replace("-", "_")
    for arguments in (["file.yaml"], [f"{key}={text}"], [f"--{key}={text}"], [f"--{key}", text], [key, "=", text]):
        assert getattr(config_of(*arguments), name) == value, arguments


def test_a_quoted_number_is_a_number(cwd: Path) -> None:
    (cwd / "file.yaml").write_text("epochs: \"3\"\nlr: '1e-3'\n")
    config = config_of("file.yaml")
    assert (config.epochs, config.lr) == (3, 1e-3)


def test_recipes_have_names() -> None:
    by_path = load_config([str(REPOSITORY / "configs/mlp.yaml"), "lr=1e-3"])
    assert load_config(["mlp", "lr=1e-3"]) == load_config(["lr=1e-3", "mlp"]) == by_path
    assert by_path[1] == "mlp"


def test_paths_are_expanded(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    (cwd / "file.yaml").write_text("data_dir: ~/data\nrun_dir: ${SCRATCH}/run\nmirror: $SCRATCH/mirror\n")
    config = config_of("file.yaml", "resume=~/old")
    assert (config.data_dir, config.run_dir) == (Path("/home/me/data"), Path("/scratch/run"))
    assert (config.mirror, config.resume) == ("/scratch/mirror", "/home/me/old")
    assert config_of("mirror=https://example.org/~me/$x").mirror == "https://example.org/~me/$x"  # an address
    monkeypatch.setenv("MNIST_DIST_DATA_DIR", "$SCRATCH/data")
    assert config_of().data_dir == Path("/scratch/data")


ADDRESSES = {
    "https://me:s3cret@host:8080/a?b=c#d": "https://***@host:8080/a?b=c#d",
    "https://s3cret@host/~me@x": "https://***@host/~me@x",
    "https://me:s3@cret@host/": "https://***@host/",
    "https://me:s3/cret@host/a": "https://***@host/a",
    "https://me:s3 cret@host/a": "https://***@host/a",
    "https://me:s3?cret#@host/a": "https://***@host/a",
    "http://[::1]:80/a": "http://[::1]:80/a",
    "https://host:8080/~me@x": "https://host:8080/~me@x",
    "https://host/a:b@c": "https://host/a:b@c",
    "/home/me@x/mirror": "/home/me@x/mirror",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_password_in_an_address_is_kept_and_shown_nowhere(address: str, cwd: Path) -> None:
    config = config_of(f"mirror={address}")
    assert config.mirror == address
    assert redact_address(address) == ADDRESSES[address]
    assert redact_address(f"{address} failed") == f"{ADDRESSES[address]} failed"
    assert config.model_dump()["mirror"] == config.model_dump(mode="json")["mirror"] == ADDRESSES[address]
    assert yaml.safe_load(config.to_yaml())["mirror"] == ADDRESSES[address]
    assert not re.search("s3|cret", f"{config!r} {config} {config.to_yaml()} {config.model_dump_json()}")


def test_every_key_is_described() -> None:
    assert all(field.description for field in Config.model_fields.values())
    schema = json.dumps(Config.model_json_schema())
    assert "global batch" in schema


def test_configuration_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Config().epochs = 3  # type: ignore[misc]


def test_help_and_refusals_need_no_torch() -> None:
    code = (
        "import sys; from mnist_dist.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "main(['train', 'epoch=3']); assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "global batch" in result.stdout


@pytest.mark.parametrize("rank", [None, ""])  # some schedulers leave it empty
def test_bad_request_through_the_entry(rank: str | None, cwd: Path) -> None:
    environment = clean_environment() if rank is None else clean_environment(RANK=rank)
    command = [sys.executable, str(TRAIN), "--check", "epoch=3"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "mnist-dist: there is no key epoch; did you mean epochs?\n"


def test_sentences_name_the_key() -> None:
    with pytest.raises(RequestError, match=r"^shift="):
        build_config({"shift": 99})
