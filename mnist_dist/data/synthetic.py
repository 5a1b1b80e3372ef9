"""Drawn digits: a dataset in the place of MNIST where there is no network.

Each class has a few ways of writing it, given as strokes through control points. An image moves the control points
at random (slant, rotation, scale, bend, a shaky hand), lays a smooth curve through them, and drags a round, soft nib
of random width along it.

Promises: an image is a pure function of (seed, its position), so a shorter draw is the start of a longer one; the
same bytes come out on any number of threads and, with the same torch, with any of a CPU's vector instructions; no
global random state is read or changed. For that, only operations that IEEE 754 rounds in one way are used: no sine,
exponential or normal draw, and no sum whose order could matter.

It leaves to others: normalisation, further augmentation.
The digits are about as hard for a small network as MNIST's, but accuracies on them compare with no published one.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 28  # pixels
NUM_CLASSES = 10
_NUM_POINTS = 48  # places of the nib along a digit: about a pixel apart, so a stroke shows no beads
_NUM_MOVES = 13  # random numbers that one image spends on the digit as a whole
_CHUNK = 500  # images drawn at once: their intermediate tensors stay within about 20 MB

# The ways of writing each class. Strokes are divided by "/", points are "x,y" in a box of 20 × 20 pixels, y down.
# A stroke is smooth; a corner is where the next one begins at the same point. A stroke that ends at its own start
# is a closed loop.
_GLYPHS: tuple[tuple[str, ...], ...] = (
    (
        "10,1 5,4 3.5,10 5,16 10,19 15,16 16.5,10 15,4 10,1",
        "13,3 9,1 5,4 3.5,10 5,16 10,19 15,16 16,10 14,4 10,2 7,3",
    ),
    (
        "10,1 10,7 10,13 10,19",
        "6,5 8,3.5 10,1 / 10,1 10,10 10,19",
        "6,5 8,3.5 10,1 / 10,1 10,10 10,19 / 5,19 10,19 15,19",
    ),
    (
        "4,5 7,1.5 12,1.5 15,5 13,10 8,15 4,18.5 / 4,18.5 10,18.5 17,18.5",
        "4,5 8,1.5 13,2 15,6 12,12 7,17.5 3.5,18 4,15.5 8,16 12,18.5 17,17",
    ),
    (
        "4,3 9,1 14,3 14,7 8,9.5 / 8,9.5 14,11 16,15 11,19 6,18.5 3,16",
        "4,2 10,2 15,2 / 15,2 12,5.5 9,9 / 9,9 14,10 16,14 13,18 8,19 3,16.5",
    ),
    (
        "5,2 4,7 4,11 / 4,11 10,11 17,10.5 / 14,2 13,10 12.5,19",
        "13,1 8,6 3,12 / 3,12 10,12.5 17,12 / 13,1 13,10 13,19",
    ),
    (
        "15,1.5 10,1.5 5,2 / 5,2 4.5,5 4.5,8.5 / 4.5,8.5 9,7 14,9 16,13 13,18 8,19 3.5,17",
        "15,2 9,1.5 6,4 7,8 12,10 15,14 12,18 7,19 4,17",
    ),
    (
        "13,1 8,5 4.5,11 5,16 9,19 14,17 15,13 11,10.5 7,11.5 4.8,14.5",
        "8,1 5,8 4,14 7,18.5 12,18.5 15,15 12.5,11.5 8,11.5 4.5,14",
    ),
    (
        "3,2.5 9,2 16,2 / 16,2 12,9 8,19",
        "3,2.5 9,2 16,2 / 16,2 12,9 8,19 / 6.5,10 11,10 15.5,9.5",
        "3,5 6,2 11,3 16,2 / 16,2 11,9 10,19",
    ),
    (
        "10,9.5 5,6 6,2 10,1 14,2 15,6 10,9.5 4.5,14 6,18 10,19 14,18 15.5,14 10,9.5",
        "10,1 6,3 6,7 10,9.5 14,7 14,3 10,1 / 10,9.5 5,12 5,17 10,19 15,17 15,12 10,9.5",
        "15,3.5 10,1 6,4 8,8 13,12 14,16 10,19 6,17 6.5,13 11,9 15,5",
    ),
    (
        "15,5 11,1.5 6,2.5 4,6.5 7,10 12,9.5 15,5 / 15,5 15,12 13,19",
        "15,5 11,1.5 6,2.5 4,6.5 7,10 12,9.5 15,5 / 15,5 15.5,11 13,17 8,19 4,17.5",
    ),
)


class _Glyphs(NamedTuple):
    """All ways of writing, one a row: v rows, k control points (the last of some rows unused), p curve points."""

    first: Tensor  # [10] int64, the row at which a class begins
    num: Tensor  # [10] int64, how many rows it has
    control: Tensor  # [v, k, 2] float32, pixels from the centre, x right, y down
    near: Tensor  # [v, p, 4] int64, the control points on which a curve point depends
    weight: Tensor  # [v, p, 4] float32, how much it depends on each
    spacing: Tensor  # [v] float32, pixels between neighbouring curve points


_CurvePoint = tuple[list[int], tuple[float, float, float, float]]  # near and weight, as in _Glyphs


def _spline(t: float) -> tuple[float, float, float, float]:
    """Uniform Catmull-Rom weights of four control points at t in [0, 1] between the middle two."""
    return (
        ((2 - t) * t - 1) * t / 2,
        ((3 * t - 5) * t * t + 2) / 2,
        ((4 - 3 * t) * t + 1) * t / 2,
        (t - 1) * t * t / 2,
    )


def _sample(glyph: str) -> tuple[list[complex], list[_CurvePoint], float]:
    """Control points x + iy of a glyph; of _NUM_POINTS points evenly along it, (near, weight); their spacing."""
    control: list[complex] = []
    fine: list[tuple[float, _CurvePoint]] = []  # a fine polyline along all strokes, with the length so far
    length = 0.0
    for stroke in glyph.split("/"):
        ids = []
        for x, y in (pair.split(",") for pair in stroke.split()):
            point = complex(float(x) - 10, float(y) - 10)
            if point not in control:  # points at one place are one point, so that corners hold when it moves
                control.append(point)
            ids.append(control.index(point))
        padded = [ids[-2], *ids, ids[1]] if ids[0] == ids[-1] else [ids[0], *ids, ids[-1]]
        last = control[ids[0]]
        for i in range(len(ids) - 1):
            near = padded[i : i + 4]
            for k in range(64):
                weight = _spline((k + 0.5) / 64)
                z = sum((w * control[j] for w, j in zip(weight, near, strict=True)), 0j)
                dx, dy = (z - last).real, (z - last).imag
                length, last = length + math.sqrt(dx * dx + dy * dy), z
                fine.append((length, (near, weight)))
    spacing, at = length / _NUM_POINTS, 0
    chosen = []
    for p in range(_NUM_POINTS):
        while fine[at][0] < (p + 0.5) * spacing:
            at += 1
        chosen.append(fine[at][1])
    return control, chosen, spacing


@cache
def _glyphs() -> _Glyphs:
    sampled = [_sample(glyph) for glyphs in _GLYPHS for glyph in glyphs]
    num = [len(glyphs) for glyphs in _GLYPHS]
    most = max(len(control) for control, _, _ in sampled)
    padded = [control + [0j] * (most - len(control)) for control, _, _ in sampled]
    return _Glyphs(
        first=torch.tensor([sum(num[:label]) for label in range(NUM_CLASSES)]),
        num=torch.tensor(num),
        control=torch.tensor([[(z.real, z.imag) for z in control] for control in padded]),
        near=torch.tensor([[near for near, _ in chosen] for _, chosen, _ in sampled]),
        weight=torch.tensor([[weight for _, weight in chosen] for _, chosen, _ in sampled]),
        spacing=torch.tensor([spacing for _, _, spacing in sampled]),
    )


def _trace(control: Tensor, moves: Tensor, jitter: Tensor) -> Tensor:
    """Move control points [n, k, 2] as one hand would; moves [n, 12, 1] and jitter [n, k, 2] lie in (-1, 1)."""
    x, y = (control + 2 * jitter).unbind(-1)
    (wide, tall, slant, turn, right, down, *bends) = moves.unbind(1)
    xx, xy, yy = x * x, x * y, y * y  # these bend the whole digit: each by up to 2 pixels, 10 from the centre
    x, y = (
        x + 0.02 * (bends[0] * xx + bends[1] * xy + bends[2] * yy),
        y + 0.02 * (bends[3] * xx + bends[4] * xy + bends[5] * yy),
    )
    x, y = x * (0.82 + 0.32 * wide), y * (0.86 + 0.22 * tall)
    x = x - (0.12 + 0.55 * slant) * y  # most hands lean to the right, and y points down
    half = 0.25 * turn  # tangent of half the angle, which turns by up to 28 degrees without a sine
    norm = 1 + half * half
    cos, sin = (1 - half * half) / norm, 2 * half / norm
    return torch.stack((cos * x - sin * y + 2.2 * right, sin * x + cos * y + 2.2 * down), -1)


def _nib(centre: Tensor, width: Tensor) -> Tensor:
    """Whole numbers 0..256 [n, p, 28]: the profile along one axis of a nib of `width` [n, 1, 1] at centre [n, p]."""
    offset = torch.arange(SIDE, dtype=torch.float32) - (SIDE - 1) / 2 - centre.unsqueeze(-1)
    # (1 - d² / 16 w²)^8 stands for the bell exp(-d² / 2 w²): the product of two profiles is then a round nib.
    offset.div_(4 * width).square_().neg_().add_(1).clamp_(min=0)
    return offset.square_().square_().square_().mul_(256).round_()


def _draw(glyphs: _Glyphs, row: Tensor, moves: Tensor, jitter: Tensor) -> Tensor:
    """Images uint8 [n, 28, 28] of rows [n] of the glyphs, moved by moves [n, 13] and jitter [n, k, 2] in (-1, 1)."""
    control = _trace(glyphs.control[row], moves[:, :12, None], jitter)
    near, weight = glyphs.near[row], glyphs.weight[row].unsqueeze(-1)
    points = torch.zeros(len(row), _NUM_POINTS, 2)
    for k in range(4):  # written out, because a matrix product's rounding may depend on the number of threads
        index = near[:, :, k, None].expand(-1, -1, 2)
        points = points + weight[:, :, k] * control.gather(1, index)
    width = (1.05 + 0.3 * moves[:, 12])[:, None, None]
    x, y = (_nib(centre, width) for centre in points.unbind(-1))
    # Summed over the curve points. Whole numbers below 2^24 are exact in float32 in any order, and so is this.
    ink = torch.bmm(y.transpose(1, 2), x) / 65536
    # A nib dragged along a long straight line gives 1 on the line: its bell has the area width * sqrt(2 pi).
    ink = ink * (glyphs.spacing[row, None, None] / (width * 2.5066283))
    # Half of that is the stroke's edge, made steep enough to be about a pixel wide.
    return ((ink - 0.5) * (1.6 * width) + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images uint8 [count, 28, 28] (ink 255 on 0) and their labels int64 [count], each of 0..9 equally likely.

    `seed` may be any that torch.Generator takes. Raises ValueError where count is less than 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least 1 digit must be drawn")
    glyphs = _glyphs()
    num_control = glyphs.control.shape[1]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, 2 + 2 * _NUM_MOVES + 2 * num_control, generator=generator)
    labels = (draws[:, 0] * NUM_CLASSES).long()
    rows = glyphs.first[labels] + (draws[:, 1] * glyphs.num[labels]).long()
    one, other, rest = draws[:, 2:].split((_NUM_MOVES, _NUM_MOVES, 2 * num_control), 1)
    moves = one + other - 1  # the sum of two: small moves are likelier than large ones
    jitter = (rest * 2 - 1).view(count, num_control, 2)
    images = torch.empty(count, SIDE, SIDE, dtype=torch.uint8)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(glyphs, rows[part], moves[part], jitter[part])
    return images, labels


def draw_dataset() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw the dataset called synthetic: 60,000 images and labels for training, 10,000 for testing."""
    return draw_digits(60_000, seed=0), draw_digits(10_000, seed=1)
