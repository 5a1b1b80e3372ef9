"""Digits as pictures that people have: larger, off centre, on a background with a gradient and noise, in any format."""

import io
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 400  # pixels
KINDS = ("dark on light", "exif", "light on dark", "transparent")
_TURNED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def place(digit: Tensor, generator: torch.Generator, side: int = SIDE) -> Tensor:
    """How much ink, float [side, side], 0 to 1, a picture has of an image uint8 [28, 28], enlarged and off centre."""
    size = int(torch.randint(side * 3 // 8, side * 3 // 4, (), generator=generator))
    large = F.interpolate(digit[None, None].float() / 255, (size, size), mode="bicubic")[0, 0].clamp(0, 1)
    top, left = torch.randint(side - size + 1, (2,), generator=generator).tolist()
    ink = torch.zeros(side, side)
    ink[top : top + size, left : left + size] = large
    return ink


def photograph(
    ink: Tensor, generator: torch.Generator, *, pen: int = 40, paper: int = 200, noise: float = 8
) -> Image.Image:
    """Ink float [h, w] on a grey gradient, with noise."""
    height, width = ink.shape
    slope = torch.rand(2, generator=generator) * 100 - 50
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grey = (paper + slope[0] * y + slope[1] * x) * (1 - ink) + pen * ink
    return to_picture(grey + noise * torch.randn(height, width, generator=generator))


def to_picture(values: Tensor) -> Image.Image:
    """A grey picture of values [h, w], 0 to 255."""
    data = values.clamp(0, 255).to(torch.uint8)
    return Image.frombytes("L", (data.shape[1], data.shape[0]), data.numpy().tobytes())


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def turn(picture: Image.Image, orientation: int) -> bytes:
    """A JPEG that a camera held in another way would leave: its EXIF data say how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture.transpose(_TURNED[orientation]).convert("RGB"), "JPEG", exif=exif)


def cut_free(ink: Tensor, colour: tuple[int, int, int]) -> Image.Image:
    """An RGBA picture with nothing but the ink, in one colour."""
    picture = Image.new("RGBA", (ink.shape[1], ink.shape[0]), colour)
    picture.putalpha(to_picture(255 * ink))
    return picture


def draw(images: Tensor, kind: str, seed: int = 0) -> Iterator[bytes]:
    """A file for each of images uint8 [n, 28, 28], of one of KINDS."""
    generator = torch.Generator().manual_seed(seed)
    for number, image in enumerate(images):
        ink = place(image, generator)
        if kind == "dark on light":
            yield encode(photograph(ink, generator), "JPEG")
        elif kind == "exif":
            yield turn(photograph(ink, generator), (3, 6, 8)[number % 3])
        elif kind == "light on dark":
            yield encode(photograph(ink, generator, pen=220, paper=70), "PNG", compress_level=1)
        else:
            yield encode(
                cut_free(ink, ((0, 0, 0), (255, 255, 255), (200, 30, 30))[number % 3]), "PNG", compress_level=1
            )
