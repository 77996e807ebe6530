"""Photo -> latent: one pass of the inversion encoder, then Adam on Eq. (8) of the paper.

::

    image [B, 3, 128, 128] --encoder--> w0 [B, 512] --steps of Adam through G--> w [B, 512]

The paper starts 110 steps from a random z. The encoder's answer is a far better start, so 0
(`fast`) or 10 (`balanced`) steps are enough to send; `paper` keeps the 110.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.bundle import Bundle
from shared.errors import Cancelled, InvalidRequest
from shared.stylegan2 import Generator, to_sphere
from transmitter.predictor import Predictor


@dataclass(frozen=True)
class InversionConfig:
    """Sizes of the inversion encoder: channels at image_size / 2, / 4, ... down to 4 px."""

    image_size: int = 128
    channels: tuple[int, ...] = (64, 128, 192, 256, 384)
    w_dim: int = 512

    def __post_init__(self) -> None:
        expected = int(math.log2(self.image_size)) - 2
        if len(self.channels) != expected:
            raise InvalidRequest(
                f"got {len(self.channels)} channel counts for {self.image_size} px, "
                f"expected {expected}"
            )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "InversionConfig":
        return cls(**{**values, "channels": tuple(values["channels"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RunningNorm(nn.BatchNorm2d):
    """Batch normalisation by running statistics, in training too.

    In a batch of eight, one face before a white wall sets the scale that it is divided by: a
    compression which is not there when a face comes alone. Slow statistics are the same for both.
    """

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None
        assert variance is not None
        assert count is not None
        if self.training:
            with torch.no_grad():
                count += 1
                share = max(self.momentum or 0.0, 1 / int(count))
                values = x.detach().float()
                mean.lerp_(values.mean((0, 2, 3)), share)
                variance.lerp_(values.var((0, 2, 3), unbiased=False), share)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)


class _Residual(nn.Module):
    """Two batch-normalised 3x3 convolutions around a skip; halves the size when `down`.

    The skip is normalised too: left alone, it hands mostly brightness to the head at first, and
    512 copies of brightness are one number.
    """

    def __init__(self, in_channels: int, out_channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = RunningNorm(out_channels, momentum=0.03)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = RunningNorm(out_channels, momentum=0.03)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm3 = RunningNorm(out_channels, momentum=0.03)
        for norm in (self.norm2, self.norm3):  # two branches of half the power each
            nn.init.constant_(norm.weight, math.sqrt(0.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = F.avg_pool2d(x, 2)
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        return F.leaky_relu(self.norm3(self.skip(x)) + self.norm2(self.conv2(y)), 0.2)


class Whiten(nn.Module):
    """h [B, D] -> (h - mean) (C + ridge)^(-1/2): zero mean, and at first no two dimensions alike.

    Per-dimension normalisation alone starts from 512 copies of the three or four things that vary
    most, and keeps them. So the covariance C is measured over the first `settle_steps` training
    batches and the matrix then stands: a generator cannot learn from a code that keeps turning.
    Statistics are running ones, since those of a batch would tie a face's code to the faces beside
    it. No gradient flows through them.
    """

    mean: Tensor
    covariance: Tensor
    root: Tensor
    count: Tensor

    def __init__(
        self, width: int, momentum: float = 0.005, ridge: float = 0.3, settle_steps: int = 400
    ) -> None:
        """ridge: relative to the mean variance; directions far below it are not raised to full
        power, so what the encoder has not learned to use stays quiet.
        """
        super().__init__()
        self.momentum, self.ridge, self.settle_steps = momentum, ridge, settle_steps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("covariance", torch.eye(width))
        self.register_buffer("root", torch.eye(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):  # bf16 is too coarse for small variances
            if self.training:
                with torch.no_grad():
                    self._follow(h)
            return (h - self.mean) @ self.root

    def _follow(self, h: Tensor) -> None:
        self.count += 1
        count = int(self.count)
        self.mean.lerp_(h.mean(0), max(self.momentum, 1 / count))
        if count <= self.settle_steps:
            centred = h - self.mean
            self.covariance.lerp_(centred.t() @ centred / len(h), 1 / count)
            if count % 20 == 0:
                self._refresh()

    def _refresh(self) -> None:
        level = self.covariance.diagonal().mean()
        values, vectors = torch.linalg.eigh(self.covariance)
        raised = values.clamp(min=0) + self.ridge * level
        self.root.copy_((vectors * raised.rsqrt()) @ vectors.t())


class InversionEncoder(nn.Module):
    """image [B, 3, S, S] in [-1, 1] -> w [B, w_dim]: zero mean, unit variance, on the sphere.

    The last normalisation has no learned scale or shift: a latent with a mean would spend transmit
    power on something that both ends know.
    """

    def __init__(self, config: InversionConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.stem = nn.Conv2d(12, channels[0], 3, padding=1)
        blocks = [_Residual(channels[0], channels[0], down=False)]
        for above, here in pairwise(channels):
            blocks.append(_Residual(above, here, down=True))
        blocks.append(_Residual(channels[-1], channels[-1], down=False))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1] * 16, config.w_dim)
        self.whiten = Whiten(config.w_dim)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "InversionEncoder":
        encoder = cls(InversionConfig.from_json(bundle.config("inversion")))
        bundle.load_into("inversion", encoder)
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encoder

    def forward(self, image: Tensor) -> Tensor:
        size = self.config.image_size
        if image.shape[1:] != (3, size, size):
            raise InvalidRequest(
                f"got pictures of shape {tuple(image.shape)}, expected [B, 3, {size}, {size}]"
            )
        return to_sphere(self.whiten(self.raw(image)))  # [B, w_dim]

    def raw(self, image: Tensor) -> Tensor:
        """What is whitened: [B, w_dim], of any mean and covariance."""
        x = F.pixel_unshuffle(image, 2).contiguous(memory_format=torch.channels_last)
        x = self.blocks(F.leaky_relu(self.stem(x), 0.2))  # [B, C, 4, 4]
        raw: Tensor = self.head(x.flatten(1)).float()
        return raw


def invert(
    image: Tensor,
    encoder: InversionEncoder,
    generator: Generator,
    predictor: Predictor | None,
    steps: int,
    *,
    rate: float = 0.05,
    perceptual_weight: float = 1.0,
    cancelled: Callable[[], bool] | None = None,
) -> Tensor:
    """The latent w [B, 512] whose rendering is closest to image [B, 3, S, S].

    Minimises Eq. (8), |G(w) - image|^2 + lambda_inv |F(G(w)) - F(image)|^2 with F the predictor's
    features, by `steps` of Adam from the encoder's answer; every step ends on the sphere of
    latents. Raises Cancelled when `cancelled()` turns true.
    """
    with torch.no_grad():
        start: Tensor = encoder(image)
    if steps == 0:
        return start
    w = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([w], lr=rate, betas=(0.9, 0.99))
    for step in range(steps):
        if cancelled is not None and cancelled():
            raise Cancelled(f"inversion dropped after {step} of {steps} steps: the caller is gone")
        for group in optimiser.param_groups:  # a short ramp down keeps the last steps from jumping
            group["lr"] = rate * min(1.0, 2.0 * (steps - step) / steps)
        rendering = generator.synthesis(to_sphere(w))
        loss = (rendering - image).square().mean((1, 2, 3)).sum()  # Eq. (8), pixel term
        if predictor is not None and perceptual_weight > 0:
            loss = loss + perceptual_weight * predictor.perceptual(rendering, image).sum()
        (gradient,) = torch.autograd.grad(loss, w)
        w.grad = gradient
        optimiser.step()
    return to_sphere(w.detach())
