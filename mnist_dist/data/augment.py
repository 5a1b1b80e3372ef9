"""Random shift, rotation, scale and elastic warp of a whole batch on its device.

All that is random is drawn for an epoch's *global* order from (seed, epoch) and then cut per rank, so the same image
meets the same warp at any world size, and resuming needs no random state. The values depend on the kind of device
(its random generator), not on how many there are.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_dist.config.schema import Config
from mnist_dist.models import IMAGE_SHAPE

_, SIDE, _ = IMAGE_SHAPE  # pixels
WARP_SIDE = 7  # knots of the elastic warp along one side: displacements are smooth over about four pixels


class Augmentation:
    """The random warps of a run. `enabled` is False where the configuration asks for none."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.seed = config.seed
        self.max_shift, self.max_rotate, self.max_scale = (
            config.shift,
            math.radians(config.rotate),
            config.scale,
        )
        self.elastic = config.elastic
        self.enabled = bool(config.shift or config.rotate or config.scale or config.elastic)
        self.generator = torch.Generator(device)
        rows = torch.arange(SIDE, device=device, dtype=torch.float32) - (SIDE - 1) / 2
        y, x = torch.meshgrid(rows, rows, indexing="ij")
        self.pixels = torch.stack((x, y), -1).view(1, SIDE * SIDE, 2)  # offsets from the centre, in pixels

    def draw(self, epoch: int, count: int) -> tuple[Tensor, Tensor]:
        """Draw for `count` images of an epoch's global order: affine [count, 4] in [-1, 1), knots [count, 2, 7, 7]
        normal."""
        digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=7).digest()
        self.generator.manual_seed(int.from_bytes(digest, "big"))
        device = self.generator.device
        affine = torch.rand(count, 4, generator=self.generator, device=device) * 2 - 1
        shape = (count, 2, WARP_SIDE, WARP_SIDE) if self.elastic else (count, 2, 0, 0)
        return affine, torch.randn(shape, generator=self.generator, device=device)

    def warp(self, images: Tensor, affine: Tensor, knots: Tensor) -> Tensor:
        """Warp images [n, 28, 28], or with channels [n, c, 28, 28], by drawn rows affine [n, 4] and knots [n, 2, 7, 7].

        Images are float; zeros come in from outside.
        """
        angle, size = affine[:, 0] * self.max_rotate, 1 / (1 + affine[:, 1] * self.max_scale)
        cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
        # Where in the source each target pixel comes from: rotation and scale about the centre, then the shift.
        matrix = torch.stack((cos, -sin, sin, cos), -1).view(-1, 2, 2)
        source = self.pixels @ matrix.transpose(1, 2) + (affine[:, 2:] * self.max_shift).unsqueeze(1)
        source = source.view(-1, SIDE, SIDE, 2)
        if self.elastic:
            field = F.interpolate(knots, size=(SIDE, SIDE), mode="bicubic", align_corners=True)
            source = source + self.elastic * field.permute(0, 2, 3, 1)
        grid = source * (2 / SIDE)  # grid_sample's own coordinates run from -1 to 1 over the image's edges
        warped = F.grid_sample(images.view(-1, *IMAGE_SHAPE), grid, padding_mode="zeros", align_corners=False)
        return warped.view_as(images)
