"""Pictures without a face, drawn by code: noise of every colour, and patterns that repeat or wind.

Round things in pairs and rows are among them, since a finder of faces looks for eyes. None of it is
drawn as the face finder's training scenes are.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDES = (128, 160, 200, 256, 320)


def faceless(count: int, seed: int = 0) -> list[Tensor]:
    """`count` pictures uint8 [3, S, S], always the same for a seed; S from 128 to 320 px."""
    draws = torch.Generator().manual_seed(seed)
    pictures = []
    for number in range(count):
        side = _SIDES[int(torch.randint(len(_SIDES), (), generator=draws))]
        draw = _KINDS[number % len(_KINDS)]
        low, high = torch.rand(2, 3, 1, 1, generator=draws)
        shape = draw(side, draws)  # [3 or 1, S, S], about 0..1
        painted = low + (high - low) * shape.clamp(0, 1) if len(shape) == 1 else shape
        pictures.append((255 * painted.clamp(0, 1)).round().to(torch.uint8))
    return pictures


def _number(low: float, high: float, draws: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=draws))


def _grid(side: int) -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def _white(side: int, draws: torch.Generator) -> Tensor:
    return torch.rand(3, side, side, generator=draws)


def _coloured(side: int, draws: torch.Generator) -> Tensor:
    """Noise whose power falls with frequency to a power of 1..4: grain, marble, clouds."""
    spectrum = torch.fft.rfft2(torch.randn(3, side, side, generator=draws))
    vertical = torch.fft.fftfreq(side)[:, None]
    far = (vertical.square() + torch.fft.rfftfreq(side)[None].square()).sqrt().clamp(min=1 / side)
    noise = torch.fft.irfft2(spectrum / far ** _number(0.5, 2.0, draws), s=(side, side))
    noise = noise - noise.mean((1, 2), keepdim=True)
    grey: Tensor = 0.5 + 0.2 * noise / noise.std((1, 2), keepdim=True).clamp(min=1e-6)
    return grey


def _stripes(side: int, draws: torch.Generator) -> Tensor:
    y, x = _grid(side)
    angle, pitch = _number(0, math.pi, draws), _number(4, 40, draws)
    wave = torch.sin(pitch * (math.cos(angle) * x + math.sin(angle) * y))
    return (0.5 + 0.5 * wave * _number(1, 4, draws))[None]


def _checks(side: int, draws: torch.Generator) -> Tensor:
    y, x = _grid(side)
    pitch = _number(6, 40, draws)
    return ((torch.sin(pitch * x) * torch.sin(pitch * y) > 0).float())[None]


def _rings(side: int, draws: torch.Generator) -> Tensor:
    y, x = _grid(side)
    far = torch.hypot(x - _number(-0.5, 0.5, draws), y - _number(-0.5, 0.5, draws))
    return (0.5 + 0.5 * torch.sin(_number(8, 60, draws) * far))[None]


def _dots(side: int, draws: torch.Generator) -> Tensor:
    """Equal discs in rows, soft or hard, on a lattice that may be turned."""
    y, x = _grid(side)
    angle, pitch = _number(0, math.pi, draws), _number(1.5, 8, draws)
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    far = torch.hypot((u * pitch) % 1 - 0.5, (v * pitch) % 1 - 0.5)
    return torch.sigmoid((_number(0.15, 0.4, draws) - far) * _number(10, 200, draws))[None]


def _gradient(side: int, draws: torch.Generator) -> Tensor:
    y, x = _grid(side)
    angle = _number(0, 2 * math.pi, draws)
    return (0.5 + 0.5 * (math.cos(angle) * x + math.sin(angle) * y))[None]


def _blobs(side: int, draws: torch.Generator) -> Tensor:
    """Up to twelve soft spots of any size and colour."""
    y, x = _grid(side)
    out = torch.rand(3, 1, 1, generator=draws).expand(3, side, side).clone()
    for _ in range(int(torch.randint(2, 13, (), generator=draws))):
        far = torch.hypot(x - _number(-1, 1, draws), y - _number(-1, 1, draws))
        spot = torch.exp(-((far / _number(0.05, 0.5, draws)) ** 2))
        out = out + spot * (torch.rand(3, 1, 1, generator=draws) - out)
    return out


def _bricks(side: int, draws: torch.Generator) -> Tensor:
    y, x = _grid(side)
    rows, joint = _number(3, 12, draws), _number(0.05, 0.2, draws)
    row = torch.floor(y * rows)
    along = (x * rows / 2 + 0.5 * (row % 2)) % 1
    wall = ((y * rows) % 1 > joint) & (along > joint / 2)
    grain = 0.15 * torch.randn(side, side, generator=draws)
    return (wall.float() + F.avg_pool2d(grain[None, None], 3, 1, 1)[0, 0])[None]


def _tiles(side: int, draws: torch.Generator) -> Tensor:
    """Random colours on a coarse grid, smooth or not."""
    cells = int(torch.randint(3, 16, (), generator=draws))
    small = torch.rand(1, 3, cells, cells, generator=draws)
    mode = "nearest" if _number(0, 1, draws) < 0.5 else "bicubic"
    return F.interpolate(small, (side, side), mode=mode)[0]


_KINDS: tuple[Callable[[int, torch.Generator], Tensor], ...] = (
    _white,
    _coloured,
    _stripes,
    _checks,
    _rings,
    _dots,
    _gradient,
    _blobs,
    _bricks,
    _tiles,
)
