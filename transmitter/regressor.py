"""The latent regressor: what the guide would see on a face, said from its latent alone.

    w [B,512] --Linear, GELU--> [B,width] --Linear, GELU--> [B,width] --Linear--> + --> scores [B,5]
         `--------------------------- Linear ------------------------------------'

A picture takes 3 GFLOP to draw and 1 to judge, this takes a thousandth. It is wrong by a tenth of
what a score moves along a walk, so it says where to look, and what is seen there counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shared.attributes import ATTRIBUTES
from shared.bundle import Bundle

NET = "regressor"


@dataclass(frozen=True)
class RegressorConfig:
    """Sizes: numbers of a latent, and of the two hidden layers."""

    w_dim: int = 512
    width: int = 512

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RegressorConfig:
        """Reads the fields it knows."""
        return cls(int(values["w_dim"]), int(values["width"]))


class Regressor(nn.Module):
    """Latents [B,512] -> scores [B,5] in P's units, as `Opinions.steady_scores` gives them on G."""

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(config.w_dim, config.width)
        self.second = nn.Linear(config.width, config.width)
        self.last = nn.Linear(config.width, len(ATTRIBUTES))
        self.straight = nn.Linear(config.w_dim, len(ATTRIBUTES))

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Regressor | None:
        """The bundle's regressor, weights frozen; None for a bundle that has none."""
        if not bundle.has(NET):
            return None
        return bundle.load_into(NET, cls(RegressorConfig.from_json(bundle.config(NET))))

    def forward(self, w: Tensor) -> Tensor:
        hidden = F.gelu(self.second(F.gelu(self.first(w))))
        scores: Tensor = self.last(hidden) + self.straight(w)
        return scores
