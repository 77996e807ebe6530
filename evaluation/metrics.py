"""How far a received picture is from the one that was sent, and how sure that figure is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import InvalidRequest


def psnr_db(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB [B] of pictures [B, 3, H, W] in [-1, 1] (peak to peak 2)."""
    if image.shape != reference.shape:
        raise InvalidRequest(
            f"got pictures of shapes {tuple(image.shape)} and {tuple(reference.shape)}, "
            "expected equal ones"
        )
    mse = (image - reference).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / mse)


@dataclass(frozen=True)
class Figure:
    """A mean over N samples with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (N = {self.count})"


def figure(samples: Tensor, resamples: int = 1000, seed: int = 0) -> Figure:
    """The mean of samples [N] and its percentile bootstrap interval (Efron 1979)."""
    values = samples.double().flatten()
    if not len(values):
        raise InvalidRequest("got 0 samples, expected at least one")
    draws = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (resamples, len(values)), generator=draws)
    means = values[index].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Figure(float(values.mean()), float(low), float(high), len(values))
