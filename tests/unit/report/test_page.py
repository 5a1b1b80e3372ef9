"""The page of a run, from real small runs: what stands in it, and what it says of what is missing."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mnist_dist.cli import main
from mnist_dist.data.dataset import load_dataset
from mnist_dist.report.page import make_page, read_run
from mnist_dist.run.run_dir import RunDir
from mnist_dist.training.evaluation import NUM_MISTAKES
from tests.conftest import (
    NUM_TEST,
    REPOSITORY,
    become,
    has_steps,
    make_data,
    metrics,
    run_ranks,
    start_ranks,
    wait_for,
    wait_ranks,
)

RECIPE = ["model=mlp", "dataset=synthetic", "precision=fp32", "threads=1", "log_every_steps=1", "batch_size=250"]


class Page(HTMLParser):
    """A page as a reader has it: its visible text, and its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] and self.elements[-1][0] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of each element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, label: str) -> list[list[str]]:
        """The cells of the table in the box of this name."""
        box = self.html[self.html.index(f'aria-label="{label}"') :]
        box = box[: box.index("</table>")]
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in box.split("<tr>")[1:]]
        return [[Page(f"<p>{cell}</p>").text for cell in row] for row in rows]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The verb sets torch's number of threads; leave it as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_ranks([*RECIPE, f"data_dir={data_dir}", "epochs=2", "run_dir=run"], folder)
    assert result.code == 0, result.output
    assert result.output.splitlines()[-2].startswith("test accuracy ")
    assert result.output.splitlines()[-1] == "report in run/report.html"
    return folder / "run"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to take something away from."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def killed(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed on two ranks, at about a third of its steps."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = [*RECIPE, f"data_dir={data_dir}", "epochs=40", "bit_exact=2", "run_dir=run", "keep=10"]
    processes = start_ranks(arguments, folder / "output.txt", world_size=2)
    wait_for(has_steps(folder / "run", 48))
    for process in processes:
        process.kill()
    wait_ranks(processes, folder / "output.txt")
    assert RunDir(folder / "run").done_step() is None
    return folder / "run"


def report(*words: object) -> Page:
    """The page that the verb makes of runs."""
    path = Path(words[0]) / "report.html"  # type: ignore[arg-type]
    path.unlink(missing_ok=True)
    assert main(["report", *map(str, words)]) == 0
    return Page(path.read_text())


def refusal(arguments: list[object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one sentence with which a request is refused."""
    assert main(["report", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mnist-dist: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("mnist-dist: ").removesuffix("\n")


# --- a run that is whole ---


def test_a_page_has_what_the_run_came_to(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    done, (begun,) = metrics(finished, "done")[0], metrics(finished, "start")
    correct = round(done["accuracy"] * NUM_TEST)
    assert "Finished after step 8." in page.text
    assert f"test accuracy {100 * done['accuracy']:.2f} % 95 % interval " in page.text
    assert f"{correct} of {NUM_TEST} images, checkpoint of step 8" in page.text
    assert f"training {done['seconds']:.1f} s 8 of 8 steps" in page.text
    assert "world size 1 cpu" in page.text
    assert "bit_exact off" in page.text
    assert ["batch_size", "250"] in page.table("Configuration")
    assert ["torch", begun["torch"]] in page.table("What ran")
    assert "Started at step 0, 1 rank on cpu." in page.text
    assert page.html.count("rank</text>") == 0  # no mark: it started once


def test_the_confusion_matrix_and_the_classes_are_those_of_the_evaluation(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page((finished / "report.html").read_text())
    assert main(["evaluate", str(finished), "--json"]) == 0
    confusion = json.loads(capsys.readouterr().out)["confusion"]
    matrix = page.html[page.html.index('aria-label="Confusion matrix') :]
    counts = [int(number) for number in re.findall(r">(\d+)</text>", matrix[: matrix.index("</svg>")])]
    rows = [counts[12 * digit : 12 * digit + 12] for digit in range(10)]  # the class twice, then its row
    assert rows == [[digit, digit, *confusion[digit]] for digit in range(10)]
    for digit, row in enumerate(page.table("Accuracy of each class")[1:]):
        correct, count = confusion[digit][digit], sum(confusion[digit])
        assert row[:3] == [str(digit), f"{100 * correct / count:.2f} %", f"{count - correct} of {count}"]


def test_mistakes_are_shown_with_their_classes(finished: Path, data_dir: Path) -> None:
    page = Page((finished / "report.html").read_text())
    labels = load_dataset("synthetic", data_dir).eval_split.labels.tolist()
    images = [int(re.findall(r"\d+", image["alt"])[0]) for image in page.all("img")]
    captions = re.findall(r"predicted (\d), true (\d) (\d+\.\d) %", page.text)
    assert len(images) == len(captions) == NUM_MISTAKES
    assert [labels[image] for image in images] == [int(true) for _, true, _ in captions]
    assert all(predicted != true for predicted, true, _ in captions)
    confidences = [float(confidence) for *_, confidence in captions]
    assert confidences == sorted(confidences, reverse=True)
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in page.all("img"))


def test_curves_are_drawn_of_all_that_is_recorded(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    charts = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    steps = metrics(finished, "step")
    evals = metrics(finished, "eval")
    assert charts[:4] == [
        f"Loss by step. from {steps[0]['loss']:.4g} at step 0 to {steps[-1]['loss']:.4g} at step 7; "
        f"from {evals[0]['loss']:.4g} at step 4 to {evals[1]['loss']:.4g} at step 8",
        f"Accuracy by step, in percent. from {100 * evals[0]['accuracy']:.4g} at step 4 to "
        f"{100 * evals[1]['accuracy']:.4g} at step 8",
        f"Learning rate by step. from {steps[0]['lr']:.4g} at step 0 to {steps[-1]['lr']:.4g} at step 7",
        f"Time of a step, in milliseconds. from {250_000 / steps[0]['images_per_s']:.4g} at step 0 to "
        f"{250_000 / steps[-1]['images_per_s']:.4g} at step 7",
    ]


def test_the_verb_makes_the_same_page_as_the_end_of_training(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_dir / "report.html").read_text()
    (run_dir / "report.html").unlink()
    others = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr() == (f"{run_dir}/report.html\n", "")
    assert (run_dir / "report.html").read_text() == before
    (run_dir / "report.html").unlink()
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == others


def test_a_page_needs_nothing_else_and_can_be_read_aloud(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "image"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:", "#")), (tag, value)
            assert "url(" not in value.replace("url(#", ""), (tag, value)
    assert "@import" not in page.html
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(
        svg.get("aria-hidden") or (svg["role"], bool(svg["aria-label"])) == ("img", True) for svg in page.all("svg")
    )
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_text_stands_out_from_what_is_behind_it_in_both_themes() -> None:
    """WCAG 2: a contrast of 4.5 for text, 3 for lines."""
    css = (REPOSITORY / "mnist_dist/report/base.html").read_text()
    light, dark = (dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6})", part)) for part in css.split("@media", 2)[:2])
    assert light.keys() == dark.keys()

    def channels(colour: str) -> list[float]:
        return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]

    def luminance(rgb: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: list[float], other: list[float]) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for theme in (light, dark):
        colour = {name: channels(value) for name, value in theme.items()}
        shaded = [0.44 * w + 0.56 * c for w, c in zip(colour["--wrong"], colour["--card"], strict=True)]
        for behind in (colour["--page"], colour["--card"]):
            assert contrast(colour["--text"], behind) > 7
            assert contrast(colour["--muted"], behind) > 4.5
            for number in range(1, 9):
                assert contrast(colour[f"--series-{number}"], behind) > 3
        assert contrast(colour["--text"], colour["--right"]) > 4.5
        assert contrast(colour["--text"], shaded) > 4.5
        faint = [0.04 * w + 0.96 * c for w, c in zip(colour["--wrong"], colour["--card"], strict=True)]
        assert contrast(colour["--muted"], faint) > 4.5


# --- a run that was killed ---


def test_a_killed_run_says_so(killed: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(killed, tmp_path / "run"))
    last = metrics(run_dir, "step")[-1]["step"]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 4')
    page = report(run_dir)
    assert f"The record breaks off after step {last} without a last word: the run was killed, or it still runs." in (
        page.text
    )
    assert "1 line of metrics.jsonl cannot be read: cut short by a crash, or damaged." in page.text
    saved = max(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    assert f"of {NUM_TEST} images, checkpoint of step {int(saved[5:])}" in page.text
    assert re.search(r"training \d+\.\d s \d+ of 160 steps", page.text)  # as the checkpoint says
    assert "world size 2 cpu" in page.text
    assert "bit_exact 2 the weights have the bits of 2 ranks" in page.text


def test_restarts_and_world_sizes_are_marked(killed: Path, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "run")
    arguments = [*RECIPE, f"data_dir={data_dir}", "epochs=40", "bit_exact=2", "run_dir=run"]
    assert run_ranks(arguments, tmp_path).code == 0
    page = Page((tmp_path / "run/report.html").read_text())
    resumed = metrics(tmp_path / "run", "resume")[0]["step"]
    assert "world size 2, then 1" in page.text
    assert f"Started at step 0, 2 ranks on cpu. Resumed at step {resumed}, 1 rank on cpu. Finished after step 160." in (
        page.text
    )
    assert page.html.count(">2 ranks</text>") == page.html.count(">1 rank</text>") == 4  # once a chart


# --- something is missing ---


def without_evaluation(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    lines = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"eval"' not in line]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n")


def with_other_images(run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    data = make_data(run_dir.parent / "other", num_train=300, seed=7)
    config.write_text(re.sub("data_dir: .*", f"data_dir: {data}", config.read_text()))


def without_dataset(run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    config.write_text(re.sub("data_dir: .*", "data_dir: /nowhere", config.read_text()))


def with_damaged_checkpoints(run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"junk")


def with_only(name: str, run_dir: Path) -> None:
    """Leave one file or folder."""
    for path in run_dir.iterdir():
        if path.name != name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


MISSING = "Confusion matrix, mistakes and the accuracy of each class are missing: "
CASES = {
    "record": (
        lambda run_dir: (run_dir / "metrics.jsonl").unlink(),
        ["metrics.jsonl, which has every figure, cannot be read: No such file", "No step is recorded", "No start is"],
    ),
    "empty record": (
        lambda run_dir: (run_dir / "metrics.jsonl").write_text(""),
        ["No step is recorded: the run was killed before that, or has just begun."],
    ),
    "record of noise": (
        lambda run_dir: (run_dir / "metrics.jsonl").write_bytes(b"\xff\x00\n" * 1234),
        ["1,234 lines of metrics.jsonl cannot be read", "Nothing to draw is recorded."],
    ),
    "configuration": (
        lambda run_dir: (run_dir / "config.yaml").unlink(),
        ["The configuration cannot be read: there is no configuration file", "It follows from batch_size, which is"],
    ),
    "configuration of noise": (
        lambda run_dir: (run_dir / "config.yaml").write_text(f"batch_size: {'9' * 5000}\nbit_exact: [x]\n"),
        ["It follows from batch_size, which is not known", "bit_exact not known"],
    ),
    "checkpoints": (
        lambda run_dir: shutil.rmtree(run_dir / "checkpoints"),
        [MISSING + "the run has no checkpoint.", "images, recorded at step 8"],
    ),
    "damaged checkpoints": (with_damaged_checkpoints, [MISSING + "there is no whole checkpoint in "]),
    "evaluation": (
        without_evaluation,
        ["accuracy not known no evaluation is recorded", "training not known", "breaks off after step 2"],
    ),
    "dataset": (without_dataset, [MISSING + "synthetic is not in data; MNIST_DIST_DATA_DIR in the environment"]),
    "other images": (with_other_images, [" has other images than the run was trained on."]),
    "all but the configuration": (lambda run_dir: with_only("config.yaml", run_dir), [MISSING + "the run has no"]),
    "all but the record": (lambda run_dir: with_only("metrics.jsonl", run_dir), ["The configuration cannot be read"]),
    "all but the checkpoints": (lambda run_dir: with_only("checkpoints", run_dir), ["checkpoint of step 8"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_said(case: str, run_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent)
    if "checkpoints" in case:
        monkeypatch.setenv("MNIST_DIST_DATA_DIR", str(data_dir))
    remove, sentences = CASES[case]
    remove(run_dir)
    page = report(run_dir)
    for sentence in sentences:
        assert sentence in page.text
    assert "Traceback" not in page.text


def test_a_run_that_failed_says_why(run_dir: Path) -> None:
    figures = {"event": "failed", "step": 6, "cause": "not_finite", "reason": "the loss is nan at step 5"}
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[:4]
    diverged = {"event": "step", "step": 5, "epoch": 1, "loss": None, "lr": 0.1, "images_per_s": 0}
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(diverged), json.dumps(figures)]))
    assert "Failed after step 6: the loss is nan at step 5." in report(run_dir).text


# --- what others wrote ---

HOSTILE = "<script>alert(1)</script>\"'&</svg>{{ 7 * 7 }}$\\frac"


def test_nothing_in_a_run_becomes_part_of_the_page(run_dir: Path) -> None:
    name = "<script>alert(1)<&'\"{{ 7 * 7 }}"  # all that a file's name can have
    run_dir = run_dir.rename(run_dir.with_name(name))
    with (run_dir / "config.yaml").open("a") as file:
        file.write(f"{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\n")
        file.write("mirror: https://user:secret@example.org/mnist\n")
    config = (run_dir / "config.yaml").read_text().replace("mirror: ''\n", "")
    (run_dir / "config.yaml").write_text(config)
    begun = {
        "event": "resume",
        "step": 8,
        "world_size": 1,
        "device": HOSTILE,
        HOSTILE: [HOSTILE],
        "total_steps": HOSTILE,
    }
    stop = {"event": "stop", "step": 8, "reason": HOSTILE}
    evaluation = {"event": "eval", "step": 8, "epoch": 1, "split": HOSTILE, "loss": 1, "accuracy": 0.5, "count": 2}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in (begun, evaluation, stop)))
    page = report(run_dir)
    assert not page.all("script")
    assert "alert(1)</script>" not in page.html.lower()
    assert page.html.count("</svg>") == len(page.all("svg"))
    assert page.text.startswith(name)
    assert f"Stopped on request after step 8: {HOSTILE}." in page.text
    assert [HOSTILE, HOSTILE] in page.table("Configuration")
    assert [HOSTILE, HOSTILE] in page.table("What ran")
    assert ["mirror", "https://example.org/mnist"] in page.table("Configuration")
    comparison = run_dir.parent / "both.html"
    assert main(["report", str(run_dir), str(run_dir), "-o", str(comparison)]) == 0
    page = Page(comparison.read_text())
    assert not page.all("script")
    assert name in page.text


def test_a_name_that_is_no_text_is_no_crash(run_dir: Path) -> None:
    run_dir = run_dir.rename(run_dir.with_name(os.fsdecode(b"caf\xe9")))
    assert "caf\\udce9" in Page(make_page([read_run(RunDir(run_dir))])).text


# --- several runs ---


def test_runs_are_compared(finished: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, change in (("slow", "lr=1e-4"), ("short", "max_steps=5")):
        arguments = [*RECIPE, f"data_dir={data_dir}", "epochs=2", f"run_dir={name}", change]
        assert run_ranks(arguments, tmp_path).code == 0
    runs = [Path(shutil.copytree(finished, tmp_path / "base")), tmp_path / "slow", tmp_path / "short"]
    assert main(["report", *map(str, runs)]) == 0
    path = tmp_path / "comparison.html"
    assert capsys.readouterr() == (f"{path}\n", "")
    page = Page(path.read_text())
    assert "3 runs compared" in page.text
    names = ["base", "slow", "short"]
    rows = page.table("Results")[1:]
    for run, name, row in zip(runs, names, rows, strict=True):
        done, rate = metrics(run, "done")[0], sorted(step["images_per_s"] for step in metrics(run, "step"))
        assert row[:2] == [name, f"{100 * done['accuracy']:.2f} %"]
        assert row[4:7] == [f"200 test images at step {done['step']}", str(done["step"]), f"{done['seconds']:.1f}"]
        assert float(row[7].replace(",", "")) == pytest.approx(
            (rate[(len(rate) - 1) // 2] + rate[len(rate) // 2]) / 2, 1
        )
    differences = page.table("What differs in their configurations")
    assert differences == [["key", *names], ["max_steps", "0", "0", "5"], ["lr", "0.005", "0.0001", "0.005"]]
    assert page.table("What differs in what ran") == [["key", *names], ["total_steps", "8", "8", "5"]]
    charts = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert [chart.count("from ") for chart in charts] == [3] * 5
    assert all(f"var(--series-{number})" in page.html for number in (1, 2, 3))


def test_runs_of_one_name_are_told_apart_by_their_folders(
    finished: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "both.html"
    assert main(["report", str(finished), str(killed), "--output", str(path)]) == 0
    page = Page(path.read_text())
    assert [row[0] for row in page.table("Results")[1:]] == [str(finished), str(killed)]
    assert ["bit_exact", "0", "2"] in page.table("What differs in their configurations")
    assert f"{killed}: The record breaks off after step " in page.text


def test_a_run_without_anything_can_be_compared(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    path = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "empty"), str(finished), "-o", str(path)]) == 0
    page = Page(path.read_text())
    assert page.table("Results")[1][:2] == ["empty", "not known"]
    assert "The last checkpoint was not evaluated: the run has no checkpoint." in page.text
    assert main(["report", str(tmp_path / "empty"), str(tmp_path / "empty"), "-o", str(path)]) == 0
    assert Page(path.read_text()).text.count("Nothing to draw is recorded.") == 5


# --- what cannot be answered, and what goes wrong ---


def test_what_is_no_run_is_one_sentence(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal([], capsys).startswith("there is no RUN; give the folder of a run")
    for word in (tmp_path, tmp_path / "nowhere", "x" * 5000, finished / "config.yaml"):
        assert re.match(r"there is no run in .*; give a run's folder$|x+ cannot be read", refusal([word], capsys))
    assert "there is no run in " in refusal([finished, tmp_path], capsys)
    assert "there is no option --json" in refusal([finished, "--json"], capsys)
    assert f"-o {tmp_path} is a folder" in refusal([finished, "-o", tmp_path], capsys)
    sentence = refusal([finished, "-o", tmp_path / "nowhere/page.html"], capsys, code=1)
    assert sentence == (
        f"{tmp_path}/nowhere/page.html cannot be written: No such file or directory; give -o FILE to write elsewhere"
    )


def test_the_latest_run_can_be_named(finished: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "runs").mkdir()
    shutil.copytree(finished, cwd / "runs/mlp-1")
    (cwd / "runs/latest").symlink_to("mlp-1")
    assert main(["report", "runs/latest"]) == 0
    assert capsys.readouterr().out == "runs/mlp-1/report.html\n"
    assert Page((cwd / "runs/mlp-1/report.html").read_text()).text.startswith("mlp-1")


def without_matplotlib(*arguments: object) -> None:
    """Be a run in whose Python a library of the report cannot be imported."""
    sys.modules["mnist_dist.report.page"] = None  # type: ignore[assignment]
    become(*arguments)  # type: ignore[arg-type]


def test_a_report_that_fails_changes_nothing_of_how_a_run_ends(data_dir: Path, tmp_path: Path) -> None:
    arguments = [*RECIPE, f"data_dir={data_dir}", "max_steps=2"]
    (tmp_path / "one/report.html").mkdir(parents=True)
    log = tmp_path / "output.txt"
    blocked = wait_ranks(start_ranks([*arguments, "run_dir=one"], log), log)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/report.html").write_text("of an earlier start, with fewer steps")
    log = tmp_path / "output2.txt"
    processes = start_ranks([*arguments, "run_dir=two"], log, target=without_matplotlib, world_size=2)
    missing = wait_ranks(processes, log)
    for result, run_dir, reason in (
        (blocked, "one", "Is a directory"),
        (missing, "two", "import of mnist_dist.report"),
    ):
        assert result.code == 0, result.output
        assert "Traceback" not in result.output
        last = result.output.splitlines()[-1]
        assert last.startswith(f"note: {run_dir}/report.html could not be written: ")
        assert reason in last
        assert RunDir(tmp_path / run_dir).done_step() == 2
    assert not list((tmp_path / "one").glob(".report*"))
    assert not (tmp_path / "two/report.html").exists()
