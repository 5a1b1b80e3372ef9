"""Pictures become what MNIST's images are, whatever format, size, colours and turn they come in."""

import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mnist_dist.data.picture import BOX, SIDE, prepare, thicken
from mnist_dist.data.synthetic import draw_digits
from mnist_dist.errors import RequestError
from tests.pictures import cut_free, encode, photograph, place, to_picture, turn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def ink(generator: torch.Generator) -> Tensor:
    """A drawn 5, enlarged and off centre."""
    images, labels = draw_digits(30, seed=5)
    return place(images[labels == 5][0], generator)


@pytest.fixture
def expected(ink: Tensor) -> Tensor:
    """What every picture of it should become."""
    return prepared(encode(to_picture(255 * (1 - ink)), "PNG"))


def prepared(data: bytes) -> Tensor:
    return prepare(io.BytesIO(data), "picture")


def refusal(data: bytes) -> str:
    with pytest.raises(RequestError) as refused:
        prepared(data)
    assert str(refused.value).startswith("picture ")
    return str(refused.value)


def assert_alike(image: Tensor, other: Tensor, tolerance: float = 8) -> None:
    """Equal but for what noise and compression leave: the mean difference, of 255. The centre may be rounded apart."""
    moved = [image.float().roll(move, (0, 1)) for move in itertools.product((-1, 0, 1), repeat=2)]
    assert min(float((other - one).abs().mean()) for one in moved) < tolerance


def test_an_image_is_as_mnist_has_them(expected: Tensor) -> None:
    assert (expected.dtype, expected.shape, expected.max()) == (torch.uint8, (SIDE, SIDE), 255)
    rows, columns = (expected > 0).any(1).nonzero(), (expected > 0).any(0).nonzero()
    assert max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 == BOX
    mass = expected.float()
    for axis in (0, 1):
        centre = (mass.sum(1 - axis) * torch.arange(SIDE)).sum() / mass.sum()
        assert 13.5 <= centre < 14.5


@pytest.mark.real_data
def test_mnists_own_images_come_back_as_they_are(mnist_dir: object) -> None:
    from mnist_dist.data.dataset import load_dataset

    images = load_dataset("mnist", mnist_dir).eval_split.images[:100]  # type: ignore[arg-type]
    for image in images:
        assert_alike(prepared(encode(to_picture(255 - image.float()), "PNG")), image, tolerance=8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_every_format_is_read(kind: str, mode: str, ink: Tensor, expected: Tensor) -> None:
    data = encode(to_picture(255 * (1 - ink)).convert(mode), kind)
    assert_alike(prepared(data), expected)


def test_sixteen_bits_floats_and_printers_colours_are_read(ink: Tensor, expected: Tensor) -> None:
    grey = to_picture(255 * (1 - ink))
    deep = Image.frombytes("I;16", grey.size, (4000 * (1 - ink)).to(torch.uint16).numpy().tobytes())
    assert_alike(prepared(encode(deep, "PNG")), expected)
    assert_alike(prepared(encode(Image.frombytes("F", grey.size, ink.numpy().tobytes()), "TIFF")), expected)
    assert_alike(prepared(encode(grey.convert("CMYK"), "JPEG")), expected)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_camera_that_was_turned(orientation: int, ink: Tensor, expected: Tensor, generator: torch.Generator) -> None:
    assert_alike(prepared(turn(photograph(ink, generator), orientation)), expected)


@pytest.mark.parametrize(("pen", "paper", "tolerance"), [(40, 200, 8), (220, 60, 8), (255, 0, 8), (110, 180, 22)])
def test_dark_on_light_light_on_dark_and_faint(
    pen: int, paper: int, tolerance: float, ink: Tensor, expected: Tensor, generator: torch.Generator
) -> None:
    assert_alike(prepared(encode(photograph(ink, generator, pen=pen, paper=paper), "JPEG")), expected, tolerance)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 30)])
def test_ink_on_nothing(colour: tuple[int, int, int], ink: Tensor, expected: Tensor) -> None:
    picture = cut_free(ink, colour)
    assert_alike(prepared(encode(picture, "PNG")), expected)
    assert_alike(prepared(encode(picture.convert("LA"), "PNG")), expected)
    assert_alike(prepared(encode(picture.quantize(16), "PNG")), expected)  # a palette with transparency
    assert_alike(prepared(encode(picture, "WEBP")), expected)


def test_a_card_with_transparent_corners_has_its_own_background(ink: Tensor, expected: Tensor) -> None:
    card = to_picture(255 - 200 * ink).convert("RGBA")
    mask = Image.new("L", card.size, 255)
    mask.paste(0, (0, 0, 30, 30))
    card.putalpha(mask)
    assert_alike(prepared(encode(card, "PNG")), expected)


def test_colours_that_are_equally_bright_are_told_apart(ink: Tensor, expected: Tensor) -> None:
    mask = to_picture(255 * ink)
    picture = Image.composite(
        Image.new("RGB", mask.size, (200, 80, 60)), Image.new("RGB", mask.size, (60, 140, 60)), mask
    )
    assert_alike(prepared(encode(picture, "PNG")), expected)


def test_a_small_digit_in_a_large_picture(ink: Tensor, expected: Tensor, generator: torch.Generator) -> None:
    large = F.pad(ink, (900, 700, 800, 800))
    assert_alike(prepared(encode(photograph(large, generator, noise=4), "JPEG")), expected, 8)


@pytest.mark.parametrize("side", [28, 60, 120, 700])
def test_any_size(side: int) -> None:
    images, _ = draw_digits(1, seed=1)
    small = to_picture(255 - images[0].float())
    assert_alike(
        prepared(encode(small.resize((side, side), Image.Resampling.BICUBIC), "PNG")),
        prepared(encode(small, "PNG")),
        10,
    )


def test_a_digit_that_fills_its_picture(ink: Tensor, expected: Tensor) -> None:
    grey = to_picture(255 * (1 - ink))
    box = to_picture(255.0 * (ink > 0.2)).getbbox()
    assert_alike(prepared(encode(grey.crop(box), "PNG")), expected)


def test_specks_are_dropped_and_pieces_are_kept(ink: Tensor, expected: Tensor) -> None:
    dirty = ink.clone()
    dirty[5:17, 5:17] = 1
    assert_alike(prepared(encode(to_picture(255 * (1 - dirty)), "PNG")), expected)
    rows = (ink > 0.5).any(1).nonzero()
    cut = int(rows[0] + (rows[-1] - rows[0]) // 4)
    broken = ink.clone()
    broken[cut : cut + 6] = 0  # the top is a piece of its own
    assert_alike(prepared(encode(to_picture(255 * (1 - broken)), "PNG")), expected, 10)


def test_thin_strokes_are_thickened() -> None:
    line = torch.zeros(100, 100)
    line[:, 50] = 1
    assert thicken(line, 9).sum() == 900
    assert thicken(line, 1.5).equal(line)


@pytest.mark.parametrize("gap", [20, 60])
@pytest.mark.parametrize("axis", [0, 1])
def test_several_digits_are_counted(gap: int, axis: int) -> None:
    digit = torch.zeros(100, 60)
    digit[:, :15] = digit[:15] = digit[-15:] = 1
    space = torch.zeros((gap, 60) if axis == 0 else (100, gap))
    several = F.pad(torch.cat((digit, space, digit, space, digit), axis), (40, 40, 40, 40))
    assert "holds 3 shapes apart from each other; cut it into pictures of one digit each" in refusal(
        encode(to_picture(255 * (1 - several)), "PNG")
    )


@pytest.mark.parametrize("noise", [0, 2, 8, 25])
def test_a_blank_picture_is_blank(noise: float, generator: torch.Generator) -> None:
    assert "is blank" in refusal(encode(photograph(torch.zeros(300, 400), generator, paper=150, noise=noise), "JPEG"))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (7, 7)])
def test_a_tiny_picture_is_no_crash(size: tuple[int, int]) -> None:
    assert "is blank" in refusal(encode(Image.new("RGB", size, "white"), "PNG"))
    dotted = Image.new("RGBA", size)
    dotted.putpixel((0, 0), (0, 0, 0, 255))
    assert "blank" in refusal(encode(dotted, "PNG"))


def test_a_transparent_picture_without_ink_is_blank() -> None:
    assert "is blank" in refusal(encode(Image.new("RGBA", (100, 100)), "PNG"))


def test_what_is_no_picture_is_refused(ink: Tensor) -> None:
    whole = encode(to_picture(255 * (1 - ink)), "PNG")
    for data in (
        b"",
        b"hello",
        b"\0" * 1000,
        encode(Image.new("RGB", (9, 9)), "EPS"),
        encode(Image.new("L", (9, 9)), "PDF"),
    ):
        assert "is no picture that can be read; give PNG, JPEG" in refusal(data)
    assert "is a damaged picture: " in refusal(whole[: len(whole) // 2])


def test_a_picture_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch, ink: Tensor) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    sentence = refusal(encode(to_picture(255 * (1 - ink)), "PNG"))
    assert "has more than 100,000 pixels; make it smaller" in sentence
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # which Pillow itself refuses
    assert "has more than 1,000 pixels" in refusal(encode(to_picture(255 * (1 - ink)), "PNG"))
