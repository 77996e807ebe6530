"""Augmentations for nets that judge our generator's pictures: shifts, colours, softness, noise.

All randomness comes from the given CPU generator; geometry and colours differ from picture to
picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)  # [n]


def jitter_geometry(
    image: Tensor,
    generator: torch.Generator,
    *,
    flip: bool = True,
    shift: float = 0.06,
    turn_deg: float = 6.0,
    zoom: float = 0.08,
) -> Tensor:
    """Random flip, shift (fraction of the side), turn and zoom of [B,C,H,W], borders mirrored."""
    n = len(image)
    angle = _uniform(n, -turn_deg, turn_deg, generator) * (math.pi / 180)
    size = 1 + _uniform(n, -zoom, zoom, generator)
    mirror = (
        torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0) if flip else torch.ones(n)
    )
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    dx = 2 * _uniform(n, -shift, shift, generator)
    dy = 2 * _uniform(n, -shift, shift, generator)
    theta = torch.stack(
        [torch.stack([cos * mirror, -sin, dx], 1), torch.stack([sin * mirror, cos, dy], 1)], 1
    ).to(image)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)


def jitter_colour(image: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Random brightness, contrast, saturation, tint of [B,3,H,W] in [-1,1]; some go grey."""
    n, shape = len(image), (len(image), 1, 1, 1)
    bright = strength * _uniform(n, -0.25, 0.25, generator).view(shape).to(image)
    contrast = 1 + strength * _uniform(n, -0.3, 0.3, generator).view(shape).to(image)
    saturation = 1 + strength * _uniform(n, -0.5, 0.4, generator).view(shape)
    grey_out = torch.rand(n, generator=generator).view(shape) < strength / 12
    saturation = torch.where(grey_out, 0.0, saturation).to(image)
    tint = (1 + strength * _uniform(3 * n, -0.08, 0.08, generator)).view(n, 3, 1, 1).to(image)
    grey = image.mean(1, keepdim=True)
    middle = grey.mean((2, 3), keepdim=True)
    out = (grey + saturation * (image - grey) - middle) * contrast * tint + middle + bright
    return out.clamp(-1, 1)


def resample(image: Tensor, side: int) -> Tensor:
    """Down to side x side and up again: as soft as a small or heavily compressed picture."""
    full = image.shape[-2:]
    small = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, full, mode="bilinear", align_corners=False)


def blur(image: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur, standard deviation in pixels, mirrored borders."""
    radius = max(1, math.ceil(2.5 * sigma_px))
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (x / sigma_px) ** 2)
    kernel = kernel / kernel.sum()
    channels = image.shape[1]
    across = kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1)
    padded = F.pad(image, (radius, radius, radius, radius), mode="reflect")
    rows = F.conv2d(padded, across, groups=channels)
    return F.conv2d(rows, across.transpose(2, 3), groups=channels)


def soften(image: Tensor, generator: torch.Generator) -> Tensor:
    """Soften parts of a batch: about a third stays sharp, a third is resampled, a third is blurred.

    Softened pictures are what a short-trained generator draws: a judge that has only seen sharp
    photographs reads their softness as youth and as a missing beard.
    """
    order = torch.randperm(len(image), generator=generator)
    _, low, smooth = order.tensor_split(3)
    out = image.clone()
    if len(low):
        for part in low.tensor_split(2):
            if len(part):
                side = int(
                    torch.randint(
                        image.shape[-1] // 4, 3 * image.shape[-1] // 4, (), generator=generator
                    )
                )
                out[part] = resample(image[part], max(side, 4))
    if len(smooth):
        for part in smooth.tensor_split(2):
            if len(part):
                out[part] = blur(image[part], float(_uniform(1, 0.5, 2.2, generator)))
    return out


def add_noise(image: Tensor, generator: torch.Generator, largest: float = 0.08) -> Tensor:
    """Gaussian noise, its standard deviation 0..largest drawn per picture; half stay clean."""
    n = len(image)
    level = _uniform(n, -largest, largest, generator).clamp(min=0).view(n, 1, 1, 1).to(image)
    noise = torch.randn(image.shape, generator=generator).to(image)
    return image + level * noise


def erase(image: Tensor, generator: torch.Generator, largest: float) -> Tensor:
    """Paint a grey rectangle into half of the pictures: sides up to `largest` of the picture's.

    Whoever has to read a face with parts missing cannot rest on one spot of it.
    """
    n, height, width = len(image), *image.shape[-2:]
    side = _uniform(2 * n, 0.3 * largest, largest, generator).view(2, n, 1)
    corner = torch.rand(2, n, 1, generator=generator) * (1 - side)
    rows = (torch.arange(height) + 0.5) / height  # [H]
    columns = (torch.arange(width) + 0.5) / width  # [W]
    in_rows = (rows >= corner[0]) & (rows < corner[0] + side[0])  # [B, H]
    in_columns = (columns >= corner[1]) & (columns < corner[1] + side[1])  # [B, W]
    hidden = in_rows[:, :, None] & in_columns[:, None] & _half(n, generator)[:, None, None]
    return torch.where(
        hidden[:, None].to(image.device), torch.zeros((), device=image.device), image
    )


def _half(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) < 0.5  # [n]


@dataclass(frozen=True)
class Augmentation:
    """How strongly faces are varied: see the functions of the same names; `erased` 0 hides nothing.

    Two judges that are to be independent differ in this, too.
    """

    shift: float = 0.06
    turn_deg: float = 6.0
    zoom: float = 0.08
    colour: float = 1.0
    noise: float = 0.08
    erased: float = 0.0

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """All of the above on [B,3,H,W] in [-1,1]; differentiable in the image."""
        image = jitter_geometry(
            image, generator, shift=self.shift, turn_deg=self.turn_deg, zoom=self.zoom
        )
        image = soften(jitter_colour(image, generator, self.colour), generator)
        if self.erased > 0:
            image = erase(image, generator, self.erased)
        return add_noise(image, generator, self.noise)


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """`Augmentation` as the shipped predictor's recipe has it."""
    return Augmentation()(image, generator)
