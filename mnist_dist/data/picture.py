"""Pictures as people have them, prepared as MNIST's images were (LeCun, Cortes, Burges, "The MNIST database").

    read       decode, turn upright, drop transparency     RGB float [3, h, w]
    zoom       the part of it where the digit is           RGB float [3, h, w]
    find_ink   what differs from the background            float [h, w], 0 to 1
    drop_dirt  ink without specks                          float [h, w]
    fit        20 x 20 pixels, centred in 28 x 28          uint8 [28, 28], ink 255 on 0

The background may be light or dark, of any colour, and change smoothly; the ink may be of any colour too. Each picture
holds one digit, upright. What this does not do: remove the lines of ruled paper, or the edge of a table.
"""

import math
import warnings
from typing import BinaryIO

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mnist_dist.errors import RequestError, one_line

# Those whose decoders only decode: Pillow hands PostScript, say, to another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")  # of their files
MAX_SIDE = 1024  # pixels to which a larger picture is reduced
FINE = 160  # pixels of the side in which ink is found: several for each of an image
SIDE, BOX = 28, 20  # pixels of an image, and of the box that a digit fills
THRESHOLD = 0.35  # of full ink: less is background
SMALLEST = 5  # of these: what is less high and wide is no digit
SPECK = 0.05  # of the largest part's area: less is dirt
GAP = 1 / 8  # of the height: less does not part two digits
STROKE = 1.8  # pixels in the box; thinner strokes than MNIST's are thickened to this


def prepare(file: BinaryIO, name: str) -> Tensor:
    """A picture as an image uint8 [28, 28], ink 255 on 0; `name` says in an error which picture it is.

    Raises RequestError where it is no picture, is blank, or holds several digits.
    """
    pixels = reduce(zoom(read(file, name), name))
    ink, boxes = drop_dirt(find_ink(pixels, name))
    if (count := count_digits(boxes)) > 1:
        raise RequestError(f"{name} holds {count} shapes apart from each other; cut it into pictures of one digit each")
    return fit(crop(ink, join(boxes)))


def read(file: BinaryIO, name: str) -> Tensor:
    """Decode a picture, turn it as its EXIF data say, reduce it, and lay it on the background that its ink needs.

    Returns float [3, h, w], 0 to 1. Raises RequestError.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            encoded = Image.open(file, formats=FORMATS)
            encoded.draft("RGB", (MAX_SIDE, MAX_SIDE))  # which lets a JPEG be decoded at a half, or less
            picture: Image.Image = ImageOps.exif_transpose(encoded)
            if picture.mode.startswith(("I", "F")):  # 16 or 32 bits
                picture = _to_8_bits(picture)
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
    except UnidentifiedImageError:
        raise RequestError(
            f"{name} is no picture that can be read; give PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # the decoders raise almost anything
        raise RequestError(f"{name} is a damaged picture: {one_line(error)}") from None
    pixels = _tensor(picture)
    return pixels if len(pixels) == 3 else _remove_transparency(pixels)


def zoom(pixels: Tensor, name: str) -> Tensor:
    """The part of a picture, float [3, h, w], where the digit is, with a rim of background.

    A small digit in a large picture would lose its thin strokes with the noise. Raises RequestError.
    """
    coarse = reduce(pixels)
    _, boxes = drop_dirt(find_ink(coarse, name))
    box = join(boxes)
    if int((box[2:] - box[:2]).max()) < SMALLEST:
        raise RequestError(f"{name} is blank but for specks, or its digit is too small")
    margin = int((box[2:] - box[:2]).max()) // 3 + 2
    sides = torch.tensor(coarse.shape[1:] * 2)
    wide = (box + torch.tensor([-margin, -margin, margin, margin])).clamp(torch.zeros(4, dtype=torch.int64), sides)
    return crop(pixels, (wide * max(pixels.shape[1:]) / max(coarse.shape[1:])).round().long())


def reduce(pixels: Tensor) -> Tensor:
    """A picture, float [3, h, w], whose longer side is FINE or less."""
    scale = FINE / max(pixels.shape[1:])
    if scale >= 1:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


def find_ink(pixels: Tensor, name: str) -> Tensor:
    """How much ink each pixel of RGB float [3, h, w] has: float [h, w], 0 to 1. Raises RequestError where it is blank.

    Ink is what differs from the background in the direction, in colours, of that which differs most.
    """
    height, width = pixels.shape[1:]
    kernel = 3 if min(height, width) >= FINE // 2 else 1  # averages the noise
    for background in (_surface, _corners):  # a curved surface would follow ink that fills the whole picture
        difference = pixels - background(pixels)
        smooth = F.avg_pool2d(difference, kernel, 1, kernel // 2, count_include_pad=False)
        distance = _length(smooth).flatten()
        strongest = distance.topk(math.ceil(height * width / 500)).indices
        direction = smooth.flatten(1)[:, strongest].mean(1)
        contrast = float(direction.norm())
        noise = 4 * float(distance.quantile(0.2))  # about its standard deviation; this much of a picture is no ink
        if contrast >= max(4 * noise, 0.05):
            direction = direction[:, None, None] / contrast
            ink, is_ink = (difference * direction).sum(0), (smooth * direction).sum(0) > THRESHOLD * contrast
            return (ink / ink[is_ink].quantile(0.8)).clamp(0, 1) * is_ink
        if contrast < 0.25:  # the surface fits
            break
    raise RequestError(f"{name} is blank, or its digit fills all of it; leave some background around the digit")


def drop_dirt(ink: Tensor) -> tuple[Tensor, Tensor]:
    """Ink float [h, w] without its specks; and the boxes int64 [n, 4] (top, left, bottom, right) of its parts."""
    labels = label_parts(ink > 0)
    numbers, index, area = labels[labels > 0].unique(return_inverse=True, return_counts=True)
    place = (labels > 0).nonzero()  # [p, 2]: row and column, in the order of index
    corners = torch.zeros(len(numbers), 2, dtype=torch.int64)
    first, last = (
        corners.scatter_reduce(0, index[:, None].expand(-1, 2), place, how, include_self=False)
        for how in ("amin", "amax")
    )
    kept = area >= SPECK * area.max()
    return ink * torch.isin(labels, numbers[kept]), torch.cat((first, last + 1), 1)[kept]


def join(boxes: Tensor) -> Tensor:
    """The box around boxes int64 [n, 4]."""
    return torch.cat((boxes[:, :2].amin(0), boxes[:, 2:].amax(0)))


def crop(picture: Tensor, box: Tensor) -> Tensor:
    """What lies in a box of [h, w] or [3, h, w]."""
    top, left, bottom, right = box.tolist()
    return picture[..., top:bottom, left:right]


def count_digits(boxes: Tensor) -> int:
    """How many of the parts in boxes int64 [n, 4] are digits beside, or below, each other.

    They are of comparable height, and a clear gap lies between them: one digit may be in pieces.
    """
    heights = boxes[:, 2] - boxes[:, 0]
    boxes = boxes[heights * 2 >= heights.max()]
    count = 1
    for starts, ends in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        order = starts.argsort()
        reached = ends[order].cummax(0).values
        count = max(count, 1 + int((starts[order][1:] - reached[:-1] > GAP * heights.max()).sum()))
    return count


def fit(ink: Tensor) -> Tensor:
    """Ink float [h, w] of a digit's box as MNIST's image of it, uint8 [28, 28].

    Scaled into 20 x 20 pixels, its ratio kept, and moved so that its centre of mass is the pixel (14, 14).
    """
    scale = BOX / max(ink.shape)
    ink = thicken(ink, STROKE / scale)[None, None]
    size = [max(1, round(side * scale)) for side in ink.shape[2:]]
    small = F.interpolate(ink, size, mode="bicubic", antialias=True)[0, 0].clamp(0, 1)
    small /= small.max()
    image = torch.zeros(SIDE, SIDE)
    corner = []
    for axis in (0, 1):
        mass = small.sum(1 - axis)
        centre = float((mass * torch.arange(len(mass))).sum() / mass.sum())
        corner.append(min(max(math.ceil(SIDE / 2 - 0.5 - centre), 0), SIDE - len(mass)))
    image[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]] = small
    return (255 * image).round().to(torch.uint8)


def thicken(ink: Tensor, width: float) -> Tensor:
    """Ink float [h, w] whose strokes are `width` pixels or more."""
    stroke = ink > 0.5
    padded = F.pad(stroke.float(), (1, 1, 1, 1))[None]
    inner = -F.max_pool2d(-padded, 3, 1)[0] > 0
    area, edge = int(stroke.sum()), int((stroke & ~inner).sum())
    radius = round((width - 2 * area / max(edge, 1)) / 2)
    if radius < 1:
        return ink
    kernel = 2 * radius + 1
    return F.max_pool2d(F.max_pool2d(ink[None], (kernel, 1), 1, (radius, 0)), (1, kernel), 1, (0, radius))[0]


def label_parts(mask: Tensor) -> Tensor:
    """Number the connected parts of mask bool [h, w], corners included: int64 [h, w], 0 where it is False."""
    height, width = mask.shape
    labels = torch.arange(1, height * width + 1).view(height, width) * mask
    while True:
        # The largest label nearby; then that of the pixel which the label names, so that a long part takes few rounds.
        near = F.max_pool2d(labels[None].float(), 3, 1, 1)[0].long() * mask
        after = F.pad(near.flatten(), (1, 0))[near]
        if after.equal(labels):
            return labels
        labels = after


def _surface(pixels: Tensor) -> Tensor:
    """What a picture, float [3, h, w], would be without ink: a surface of second degree in each colour.

    It is fitted by least squares to the rim, and then to all that is near it, which ink is not.
    """
    height, width = pixels.shape[1:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack((torch.ones_like(x), x, y, x * x, x * y, y * y))
    step = math.ceil(max(height, width) / 80)  # a coarse grid is enough for what is smooth
    values, basis = pixels[:, ::step, ::step], terms[:, ::step, ::step]
    rim = torch.maximum(x.abs(), y.abs())[::step, ::step] > 0.85
    rest = values - values[:, rim].median(1).values[:, None, None]
    for candidates in (rim,) * 3 + (torch.ones_like(rim),) * 4:
        distance = _length(rest)
        limit = max(4 * float(distance[candidates].median()), 0.02)
        chosen = candidates & (distance <= limit)
        surface = _least_squares(basis[:, chosen], values[:, chosen])
        rest = values - torch.einsum("ct,thw->chw", surface, basis)
    return torch.einsum("ct,thw->chw", surface, terms)


def _corners(pixels: Tensor) -> Tensor:
    """The typical colour [3, 1, 1] of the corners of a picture, float [3, h, w]."""
    height, width = (math.ceil(side / 10) for side in pixels.shape[1:])
    patches = [
        pixels[:, rows, columns].flatten(1)
        for rows in (slice(height), slice(-height, None))
        for columns in (slice(width), slice(-width, None))
    ]
    return torch.cat(patches, 1).median(1).values[:, None, None]


def _length(differences: Tensor) -> Tensor:
    """How far colours differ, [h, w] of [3, h, w]; several times as fast as norm."""
    return differences.square().sum(0).sqrt()


def _least_squares(basis: Tensor, values: Tensor) -> Tensor:
    """Coefficients [c, t] of basis [t, n] for values [c, n]; kept small, since a picture one pixel wide does not
    determine them all."""
    moments = basis @ basis.T + 1e-6 * basis.shape[1] * torch.eye(len(basis))
    solution: Tensor = torch.linalg.solve(moments, basis @ values.T)
    return solution.T


def _remove_transparency(pixels: Tensor) -> Tensor:
    """RGB float [3, h, w] of RGBA float [4, h, w]."""
    colours, cover = pixels[:3], pixels[3:]
    opaque = cover[0] > 0.5
    if not opaque.any():
        return 1 - cover.expand_as(colours)
    rows, columns = opaque.any(1).nonzero(), opaque.any(0).nonzero()
    box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    if opaque.sum() < 0.6 * box or colours[:, opaque].std(1, correction=0).norm() < 0.1:
        return 1 - cover.expand_as(colours)  # only the ink is there, of whatever colour
    card = colours[:, opaque].median(1).values[:, None, None]  # which has a background of its own
    return colours * cover + card * (1 - cover)


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 or 32 bits a pixel, its darkest as 0 and its lightest as 255."""
    values = torch.frombuffer(bytearray(picture.convert("F").tobytes()), dtype=torch.float32).nan_to_num()
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-9)
    return Image.frombytes("L", picture.size, (255 * values).round().to(torch.uint8).numpy().tobytes())


def _tensor(picture: Image.Image) -> Tensor:
    """Float [channels, h, w], 0 to 1, of a picture of 8 bits a channel."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, -1).permute(2, 0, 1).float() / 255
