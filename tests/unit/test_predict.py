"""The verb predict: pictures of digits are read as well as the images themselves; what it prints; what it refuses."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mnist_dist.cli import main
from mnist_dist.commands.predict import show
from mnist_dist.data.dataset import Split, load_dataset
from mnist_dist.data.picture import prepare
from mnist_dist.errors import RequestError
from mnist_dist.models import Classifier, build_model
from mnist_dist.run import checkpoint
from mnist_dist.run.weights import build_network, read_source
from tests.pictures import KINDS, draw, encode, to_picture

pytestmark = pytest.mark.usefixtures("one_thread")


def measure(run: Path, split: Split, kind: str) -> tuple[float, float]:
    """Accuracy on the images themselves, and on pictures of them; one that is refused counts as wrong."""
    classifier = Classifier(build_network(read_source(run))[0])
    prepared = []
    for number, data in enumerate(draw(split.images, kind)):
        try:
            prepared.append(prepare(io.BytesIO(data), f"picture {number}"))
        except RequestError:
            prepared.append(torch.zeros(28, 28, dtype=torch.uint8))
    pictures = torch.stack(prepared)
    with torch.inference_mode():
        bare, seen = (classifier(images).argmax(1) == split.labels for images in (split.images, pictures))
        seen &= (pictures > 0).flatten(1).any(1)
    return float(bare.float().mean()), float(seen.float().mean())


@pytest.mark.real_data
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_mnists_digits_are_read_as_well_as_its_images(kind: str, mnist_run: Path, mnist_dir: Path) -> None:
    count = 1000 if kind == "dark on light" else 200
    split = load_dataset("mnist", mnist_dir).eval_split
    bare, seen = measure(mnist_run, Split(split.images[:count], split.labels[:count]), kind)
    print(f"{kind}: {100 * bare:.2f} % of {count} images, {100 * seen:.2f} % of pictures of them")
    assert bare > 0.95
    assert seen >= 0.98 * bare


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_drawn_digits_are_read_as_well_as_the_images(kind: str, drawn_run: Path) -> None:
    split = load_dataset("synthetic", drawn_run.parent / "data").eval_split
    bare, seen = measure(drawn_run, Split(split.images[:50], split.labels[:50]), kind)
    print(f"{kind}: {100 * bare:.2f} % of 50 images, {100 * seen:.2f} % of pictures of them")
    assert bare > 0.9
    assert seen >= 0.94 * bare  # two of the fifty


@pytest.fixture
def pictures(cwd: Path, drawn_run: Path) -> Path:
    """A folder with pictures of a 3 and a 7, and a file that is none; beside it, blank.png and text.png."""
    split = load_dataset("synthetic", drawn_run.parent / "data").eval_split
    folder = cwd / "pictures"
    folder.mkdir()
    with torch.inference_mode():
        clearest = Classifier(build_network(read_source(drawn_run))[0])(split.images).argmax(0)
    for digit in (7, 3):
        image = split.images[clearest[digit]]
        (folder / f"{digit}.JPG").write_bytes(next(draw(image[None], "dark on light")))
    (folder / "notes.txt").write_text("none")
    Image.new("L", (90, 90), 255).save(cwd / "blank.png")
    (cwd / "text.png").write_text("no picture")
    return folder


def printed(arguments: list[object], capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[list[str], list[str]]:
    """The lines on stdout and on stderr."""
    assert main(["predict", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def test_a_line_a_picture(pictures: Path, drawn_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, errors = printed([drawn_run, "pictures", pictures / "7.JPG"], capsys)
    assert errors == []
    assert [line.split(" (")[0] for line in lines] == ["pictures/3.JPG: 3", "pictures/7.JPG: 7", f"{pictures}/7.JPG: 7"]
    assert all(line.endswith(" %)") and " %, then " in line for line in lines)


def test_json_has_all_probabilities(pictures: Path, drawn_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = printed(["--json", drawn_run, "pictures"], capsys)
    answers = [json.loads(line) for line in lines]
    assert [answer["digit"] for answer in answers] == [3, 7]
    for answer in answers:
        assert answer.keys() == {"file", "digit", "probability", "probabilities"}
        assert answer["probability"] == answer["probabilities"][answer["digit"]] == max(answer["probabilities"])
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_the_standard_input(
    pictures: Path, drawn_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.TextIOWrapper(io.BytesIO((pictures / "7.JPG").read_bytes()))
    monkeypatch.setattr("sys.stdin", data)
    lines, _ = printed([drawn_run, "-"], capsys)
    assert lines[0].startswith("standard input: 7 (")


def test_what_the_network_saw_is_drawn(pictures: Path, drawn_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = printed([drawn_run, "--show", pictures / "7.JPG"], capsys)
    assert len(lines) == 1 + 14
    assert all(len(line) == 2 + 28 for line in lines[1:])
    assert set("".join(lines[1:])) == set(" ▀▄█")


def test_a_terminal_shows_greys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    show(torch.full((28, 28), 128, dtype=torch.uint8))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14
    assert all("38;2;128;128;128" in line and line.count("▀") == 28 for line in lines)


def test_what_cannot_be_read_is_named_and_the_others_are_answered(
    pictures: Path, drawn_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, errors = printed([drawn_run, "blank.png", "gone.png", "pictures", "text.png"], capsys, code=1)
    assert [line[:17] for line in lines] == ["pictures/3.JPG: 3", "pictures/7.JPG: 7"]
    assert errors == [
        "mnist-dist: blank.png is blank, or its digit fills all of it; leave some background around the digit",
        "mnist-dist: gone.png cannot be read: No such file or directory",
        "mnist-dist: text.png is no picture that can be read; give PNG, JPEG, WebP, GIF, BMP, TIFF or PPM",
    ]
    lines, errors = printed([drawn_run, "blank.png", "gone.png"], capsys, code=2)
    assert (len(lines), len(errors)) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give a RUN and one IMAGE or more: files, folders, or - for the standard input"),
        (["RUN"], "give a RUN and one IMAGE or more"),
        (["RUN", "--jsn", "a.png"], "there is no option --jsn; a file of that name is ./--jsn"),
        (["RUN", "--json", "--show", "a.png"], "not allowed with argument"),
        (["RUN", "a=1.png"], "a=1.png cannot be read: No such file or directory"),
        (["RUN", "blank.png"], "blank.png is blank"),
        (["RUN", "text.png"], "text.png is no picture that can be read"),
        (["RUN", "empty"], "the folder empty has no pictures in it (.png, .jpg"),
        (["RUN", "x" * 5000], "File name too long"),
        (["RUN", "$NO_SUCH_VARIABLE"], "names the variable NO_SUCH_VARIABLE, which is not set"),
        (["nowhere", "blank.png"], "there is no nowhere; give a run's folder, a checkpoint's, or a file of weights"),
        (["blank.png", "RUN"], "blank.png is not a safetensors file of weights"),
    ],
)
def test_bad_requests(
    arguments: list[str], sentence: str, pictures: Path, drawn_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    lines, errors = printed([drawn_run if word == "RUN" else word for word in arguments], capsys, code=2)
    assert (lines, len(errors)) == ([], 1)
    assert errors[0].startswith("mnist-dist: ")
    assert sentence in errors[0]


def test_a_run_on_clothes_reads_no_digits(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = {"dataset": {"name": "fashion-mnist", "fingerprint": "?"}}
    path = checkpoint.save(Path("clothes"), 1, build_model("mlp", seed=0).state_dict(), training, keep=1)
    _, errors = printed([path, "pictures"], capsys, code=2)
    assert "was trained on fashion-mnist, which has no digits; give another RUN" in errors[0]


def test_a_bare_file_of_weights_will_do(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(build_model("mlp", seed=0).state_dict(), "model.safetensors")
    Path("one.png").write_bytes(encode(to_picture(255 * (torch.rand(28, 28) > 0.5)), "PNG"))
    assert len(printed(["model.safetensors", pictures / "3.JPG"], capsys)[0]) == 1
