"""Fields M_a: one per attribute, from a latent to the direction in which the attribute grows.

Latents lie on the sphere |w| = sqrt(512), so a step is a turn by a small angle: the result has the
same power, needs no scalar beside it on the air, and 46 steps of 0.02 rad are at most 0.92 rad.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.attributes import ATTRIBUTES, Attribute
from shared.bundle import Bundle


@dataclass(frozen=True)
class FieldsConfig:
    """Sizes of the fields.

    `depth` linear layers of `width` x `width` per attribute; `step_rad` is the turn of one step;
    `slopes` is how fast each attribute's score rises along its field, per radian, as measured on
    training codes: a first guess of how far to walk, where no regressor has a better one.
    """

    width: int = 512
    depth: int = 8
    step_rad: float = 0.03
    slopes: tuple[float, ...] = (8.0, 8.0, 8.0, 8.0, 8.0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FieldsConfig:
        return cls(
            int(values["width"]),
            int(values["depth"]),
            float(values["step_rad"]),
            tuple(float(slope) for slope in values["slopes"]),
        )


class Fields(nn.Module):
    """Five fields M_a: latents to directions, 8 x Linear(512, 512) with LeakyReLU 0.2, batched.

    Parameters `weight` [depth, 5, out, in] and `bias` [depth, 5, out].
    """

    def __init__(self, config: FieldsConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        d, n, k = config.depth, len(ATTRIBUTES), config.width
        gain = math.sqrt(2 / (1 + 0.2**2) / k)
        self.weight = nn.Parameter(gain * torch.randn(d, n, k, k, generator=generator))
        self.bias = nn.Parameter(torch.zeros(d, n, k))

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Fields:
        """The bundle's fields, in evaluation mode, gradients off."""
        return bundle.load_into("fields", cls(FieldsConfig.from_json(bundle.config("fields"))))

    def start_at(self, directions: Tensor) -> None:
        """Make every field constant, its `directions` [5,512]: where training starts."""
        with torch.no_grad():
            self.weight[-1].zero_()
            self.bias[-1].copy_(F.normalize(directions, dim=-1) * math.sqrt(self.config.width))

    def forward(self, w: Tensor) -> Tensor:
        """w [B,512] -> all five directions [B,5,512], not normalised."""
        return self.each(w.expand(len(ATTRIBUTES), *w.shape)).transpose(0, 1)

    def each(self, x: Tensor) -> Tensor:
        """Latents of each attribute [5,B,512] -> the direction of that attribute [5,B,512]."""
        for layer in range(self.config.depth):
            x = torch.baddbmm(self.bias[layer][:, None], x, self.weight[layer].transpose(1, 2))
            if layer < self.config.depth - 1:
                x = F.leaky_relu(x, 0.2)
        return x

    def direction(self, w: Tensor, attribute: Attribute) -> Tensor:
        """w [B,512] -> the direction [B,512] of one attribute: a fifth of the work of `forward`."""
        index, x = attribute.index, w
        for layer in range(self.config.depth):
            x = F.linear(x, self.weight[layer, index], self.bias[layer, index])
            if layer < self.config.depth - 1:
                x = F.leaky_relu(x, 0.2)
        return x

    def step(self, w: Tensor, attribute: Attribute, turn_rad: float | Tensor) -> Tensor:
        """One step along the field (against it where `turn_rad` < 0): w [B,512] -> w' [B,512]."""
        return turn(w, self.direction(w, attribute), turn_rad)


def turn(w: Tensor, direction: Tensor, angle_rad: float | Tensor) -> Tensor:
    """Turn w [B,n] by an angle (a number, or [B,1]) towards a direction [B,n]; |w| is kept.

    Only the part of the direction that is tangent to the sphere counts, its length does not.
    """
    norm = w.norm(dim=-1, keepdim=True)
    unit = w / norm
    tangent = direction - (direction * unit).sum(-1, keepdim=True) * unit
    tangent = F.normalize(tangent, dim=-1)
    angle = torch.as_tensor(angle_rad, dtype=w.dtype, device=w.device)
    turned: Tensor = norm * (torch.cos(angle) * unit + torch.sin(angle) * tangent)
    return turned
