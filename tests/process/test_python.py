"""The Python API: what docs/PYTHON.md shows works, again and again in one process, in a thread, and on two ranks."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import NUM_TEST, REPOSITORY, clean_environment, free_port, losses, metrics
from tests.pictures import draw

BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/PYTHON.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def mnist_of_drawn_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir in which drawn digits are called mnist."""
    from mnist_dist.data.download import dataset_file, write_dataset
    from mnist_dist.data.synthetic import draw_digits

    folder = tmp_path_factory.mktemp("data")
    write_dataset(dataset_file("mnist", folder), "mnist", draw_digits(1000, 0), draw_digits(NUM_TEST, 1))
    return folder


def execute(code: str, folder: Path, data_dir: Path) -> str:
    """Run Python code as a program of its own: what it prints. A warning is an error there too."""
    environment = clean_environment(PYTHONPATH=str(REPOSITORY), MNIST_DIST_DATA_DIR=str(data_dir), OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "error:::mnist_dist", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_importing_it_imports_next_to_nothing(tmp_path: Path) -> None:
    code = """
        import sys, mnist_dist
        assert not {"torch", "pydantic", "rich", "yaml"} & sys.modules.keys()
        mnist_dist.train
        assert "torch" not in sys.modules
        try:
            mnist_dist.trian
        except AttributeError as error:
            print(error)
    """
    assert execute(code, tmp_path, tmp_path) == "module 'mnist_dist' has no attribute 'trian'\n"


def test_what_the_page_shows_in_one_process(tmp_path: Path, mnist_of_drawn_digits: Path) -> None:
    from mnist_dist.data.synthetic import draw_digits

    images, labels = draw_digits(20, seed=9)
    (tmp_path / "seven.jpg").write_bytes(next(draw(images[labels == 7][:1], "dark on light")))
    output = execute("\n".join(block for block in BLOCKS if "launcher" not in block), tmp_path, mnist_of_drawn_digits)
    assert "Run('runs/first') True 0." in output
    assert "\nmnist 104202\n" in output
    assert "\ntorch.Size([5, 10])\nthere is no key learning_rate; did you mean lr?\n" in output


def test_what_the_page_shows_on_two_ranks(tmp_path: Path, mnist_of_drawn_digits: Path) -> None:
    (block,) = [block for block in BLOCKS if "launcher" in block]
    code = block.replace("num_processes=2", f"num_processes=2, use_port='{free_port()}'")
    output = execute(code, tmp_path, mnist_of_drawn_digits)
    assert "2 ranks on cpu" in output
    assert float(output.splitlines()[-1]) > 0.1
    assert metrics(tmp_path / "runs/two-ranks", "start")[0]["world_size"] == 2


def test_one_run_after_another_and_in_a_thread(tmp_path: Path, data_dir: Path) -> None:
    code = """
        import os, signal, threading
        import torch, mnist_dist
        _, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)  # as an event loop has it
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("medium")
        common = dict(model="mlp", dataset="synthetic", max_steps=4, log_every_steps=1, threads=1)
        runs = []
        def job(name, precision):
            runs.append(mnist_dist.train(run_dir=f"runs/{name}", precision=precision, **common))
        job("fp32", "fp32")
        job("bf16", "bf16")
        thread = threading.Thread(target=job, args=("thread", "fp32"))
        thread.start()
        thread.join()
        assert [run.is_finished for run in runs] == [True] * 3
        try:
            mnist_dist.train(run_dir="runs/fp32", seed=1, **common)
        except mnist_dist.JobError as error:
            kept = error  # and with it all that the call held
        longer = mnist_dist.train(run_dir="runs/fp32", precision="fp32", **common | {"max_steps": 6})
        assert longer.is_finished
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.set_wakeup_fd(-1) == writer
        assert torch.get_num_threads() == 3
        assert torch.get_float32_matmul_precision() == "medium"
        assert 5e-324 * len(runs) > 0  # a number that training takes for zero
        for run in runs:
            assert mnist_dist.predict(run, torch.zeros(3, 28, 28, dtype=torch.uint8).numpy()).shape == (3, 10)
    """
    execute(code, tmp_path, data_dir)
    assert losses(tmp_path / "runs/thread") == losses(tmp_path / "runs/fp32")[:4]
    assert losses(tmp_path / "runs/bf16") != losses(tmp_path / "runs/thread")


def test_a_signal_ends_a_run_and_leaves_the_process(tmp_path: Path, data_dir: Path) -> None:
    code = """
        import os, pathlib, signal, threading, time
        import mnist_dist
        record = pathlib.Path("run/metrics.jsonl")
        def interrupt():
            while not (record.exists() and '"event": "step"' in record.read_text()):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        run = mnist_dist.train(dataset="synthetic", model="mlp", epochs=100000, run_dir="run", log_every_steps=1)
        assert (run.is_finished, run.accuracy) == (False, None)
        assert mnist_dist.load_run("run").dataset == "synthetic"
        print("still here")
    """
    assert execute(code, tmp_path, data_dir).endswith("still here\n")


def test_what_is_wrong_is_one_sentence(tmp_path: Path, data_dir: Path) -> None:
    code = """
        import pathlib, torch, mnist_dist
        from mnist_dist.models import build_model
        from safetensors.torch import save_file
        save_file(build_model("mlp", seed=0).state_dict(), "model.safetensors")
        for call in (
            lambda: mnist_dist.train("mlpp"),
            lambda: mnist_dist.train(lr=None),
            lambda: mnist_dist.train(dataset="minst"),
            lambda: mnist_dist.load_run("nowhere"),
            lambda: mnist_dist.predict("model.safetensors", torch.zeros(2, 28, 28)),
            lambda: mnist_dist.predict("model.safetensors", torch.zeros(28, 28, dtype=torch.uint8)),
            lambda: mnist_dist.predict("model.safetensors", []),
            lambda: mnist_dist.predict("model.safetensors", "seven.jpg"),
            lambda: mnist_dist.predict("model.safetensors", ["gone.jpg"]),
        ):
            try:
                print(call().shape)
            except mnist_dist.JobError as error:
                print(type(error).__name__, error)
    """
    start = [
        "RequestError 'mlpp' is no recipe, no .yaml file and no key=value; our recipes are best-cnn, ",
        "RequestError lr=None is not a number",
        "RequestError dataset=minst is not one of mnist, ",
        "RequestError there is no nowhere; give a run's folder, a checkpoint's, or a file of weights",
        "RequestError the images are float32 [2, 28, 28]; give uint8 [n, 28, 28], ink 255 on 0, or ",
        "RequestError the images are uint8 [28, 28]; give uint8 [n, 28, 28], ",
        "torch.Size([0, 10])",
        "RequestError seven.jpg cannot be read: No such file or directory",
        "RequestError gone.jpg cannot be read: No such file or directory",
    ]
    for line, words in zip(execute(code, tmp_path, data_dir).splitlines(), start, strict=True):
        assert line.startswith(words)
