"""Photo -> latent: one pass of the inversion encoder, then Adam on Eq. (8) of the paper.

::

    image [B, 3, 128, 128] --encoder--> w0 [B, 512] --steps of Adam through G--> w [B, 512]

The paper starts 110 steps from a random z. The encoder's answer is a far better start, so 0
(`fast`) or 10 (`balanced`) steps are enough to send; `paper` keeps the 110.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.batching import Operation, Steps, alone, ask_one
from shared.bundle import Bundle
from shared.errors import Cancelled, InvalidRequest
from shared.stylegan2 import Generator, to_sphere
from transmitter.predictor import Predictor, feature_distance


@dataclass(frozen=True)
class InversionConfig:
    """Sizes of the inversion encoder: channels at image_size / 2, / 4, ... down to 4 px.

    draft_size: resolution at which the picture is projected, as the generator's; 0: convolutions
    alone, for a generator without a draft.
    """

    image_size: int = 128
    channels: tuple[int, ...] = (32, 64, 128, 192, 256)
    w_dim: int = 512
    draft_size: int = 0

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


class _Residual(nn.Module):
    """Two batch-normalised 3x3 convolutions around a skip; halves the size when `down`.

    The skip is normalised too: left alone, it hands mostly brightness to the head at first, and
    512 copies of brightness are one number.
    """

    def __init__(self, in_channels: int, out_channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        for norm in (self.norm2, self.norm3):  # two branches of half the power each
            nn.init.constant_(norm.weight, math.sqrt(0.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = F.avg_pool2d(x, 2)
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        return F.leaky_relu(self.norm3(self.skip(x)) + self.norm2(self.conv2(y)), 0.2)


class _Whiten(nn.BatchNorm1d):
    """Zero mean and unit variance per dimension by *running* statistics, in training too.

    Statistics of the batch itself would tie a face's code to the seven faces beside it, which is
    as much noise as a 9 dB channel.
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
                mean.lerp_(x.mean(0), share)
                variance.lerp_((x - mean).square().mean(0), share)
        return (x - mean) * (variance + self.eps).rsqrt()


class Projection(nn.Module):
    """image [B, 3, S, S] -> coordinates [B, D - 1] of unit variance: the inverse of a `Draft`.

    mean [3 R R], analysis [D - 1, 3 R R], level and spread: mean and standard deviation of the
    logarithm of a face's coordinates' norm. Set once from the training faces, never learned.
    """

    mean: Tensor
    analysis: Tensor
    level: Tensor
    spread: Tensor

    def __init__(self, size: int, w_dim: int) -> None:
        super().__init__()
        self.size = size
        inputs = 3 * size * size
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("analysis", torch.randn(w_dim - 1, inputs) / math.sqrt(inputs))
        self.register_buffer("level", torch.tensor(0.5 * math.log(w_dim)))
        self.register_buffer("spread", torch.tensor(0.2))

    def forward(self, image: Tensor) -> Tensor:
        reduced = F.avg_pool2d(image.float(), image.shape[-1] // self.size)
        return (reduced.flatten(1) - self.mean) @ self.analysis.t()

    def to_latent(self, coordinates: Tensor) -> Tensor:
        """Coordinates [B, D - 1] -> w [B, D] on the sphere; the last number keeps their length."""
        norm = coordinates.norm(dim=1, keepdim=True).clamp_min(1e-6)  # [B, 1]
        length = ((norm.log() - self.level) / self.spread).clamp(-4, 4)
        rest = (coordinates.shape[1] + 1 - length.square()).sqrt()
        return torch.cat([coordinates * (rest / norm), length], 1)


class InversionEncoder(nn.Module):
    """image [B, 3, S, S] in [-1, 1] -> w [B, w_dim] on the sphere, about zero mean.

    With a draft, the answer is the picture's projection plus what the convolutions correct of it;
    their head starts at zero. Without, it is the whitened answer of the convolutions. Neither has
    a learned shift: a latent with a mean would spend transmit power on something both ends know.
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
        self.projection: Projection | None = None
        self.whiten: _Whiten | None = None
        if config.draft_size:
            self.projection = Projection(config.draft_size, config.w_dim)
            self.head = nn.Linear(channels[-1] * 16, config.w_dim - 1)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        else:
            self.head = nn.Linear(channels[-1] * 16, config.w_dim)
            self.whiten = _Whiten(config.w_dim, affine=False, momentum=0.03)

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
        x = F.pixel_unshuffle(image, 2).contiguous(memory_format=torch.channels_last)
        x = self.blocks(F.leaky_relu(self.stem(x), 0.2))  # [B, C, 4, 4]
        answer = self.head(x.flatten(1)).float()
        if self.projection is None:
            assert self.whiten is not None
            return to_sphere(self.whiten(answer))  # [B, w_dim]
        with torch.autocast(image.device.type, enabled=False):
            return self.projection.to_latent(self.projection(image) + answer)


@dataclass(frozen=True, eq=False)
class Descent:
    """Where one request stands on Eq. (8): latent w [B, 512], the picture, F(picture) or None."""

    w: Tensor
    image: Tensor
    features: list[Tensor] | None


@dataclass(frozen=True, eq=False)
class Inverting:
    """The networks of the inversion as operations that requests can share.

    encode: pictures [B, 3, S, S] -> w [B, 512]. see: pictures -> features F. descend: the gradient
    [B, 512] of Eq. (8) with respect to w.
    """

    encode: Operation[Tensor, Tensor]
    see: Operation[Tensor, list[Tensor]]
    descend: Operation[Descent, Tensor]

    @classmethod
    def of(
        cls,
        encoder: InversionEncoder,
        generator: Generator,
        predictor: Predictor | None,
        perceptual_weight: float = 1.0,
        most: int = 8,
    ) -> "Inverting":
        """most: pictures in one pass."""
        judge = predictor if perceptual_weight > 0 else None

        @torch.no_grad()
        def encode(images: Sequence[Tensor]) -> Sequence[Tensor]:
            return _rows(encoder(torch.cat(list(images))), images)

        @torch.no_grad()
        def see(images: Sequence[Tensor]) -> Sequence[list[Tensor]]:
            assert judge is not None
            together = [_rows(stage, images) for stage in judge.features(torch.cat(list(images)))]
            return [[stage[number] for stage in together] for number in range(len(images))]

        @torch.enable_grad()
        def descend(places: Sequence[Descent]) -> Sequence[Tensor]:
            w = torch.cat([place.w for place in places]).requires_grad_(True)
            image = torch.cat([place.image for place in places])
            rendering = generator.synthesis(to_sphere(w))
            loss = (rendering - image).square().mean((1, 2, 3)).sum()  # Eq. (8), pixel term
            if judge is not None:
                wanted = [torch.cat(stage) for stage in zip(*_features(places), strict=True)]
                distance = feature_distance(judge.features(rendering), wanted)
                loss = loss + perceptual_weight * distance.sum()
            with torch.autocast(w.device.type, enabled=False):  # backward as each layer was forward
                (gradient,) = torch.autograd.grad(loss, w)  # [sum B, 512], each row's own
            return _rows(gradient, [place.w for place in places])

        return cls(
            Operation("encode", encode, most),
            Operation("see", see, most),
            # A backward pass holds every activation: half as many at once.
            Operation("descend", descend, max(1, most // 2), dear=True),
        )


def _features(places: Sequence[Descent]) -> list[list[Tensor]]:
    return [place.features for place in places if place.features is not None]


def _rows(together: Tensor, items: Sequence[Tensor]) -> list[Tensor]:
    """A batch's result cut into what belongs to each item."""
    return list(together.split([len(item) for item in items]))


def inverting(
    image: Tensor,
    networks: Inverting,
    steps: int,
    *,
    perceptual: bool = True,
    rate: float = 0.05,
    cancelled: Callable[[], bool] | None = None,
) -> Steps[Tensor]:
    """`invert` as a request in steps: one pass of the encoder, then `steps` gradients."""
    start = yield from ask_one(networks.encode, image)
    if steps == 0:
        return start
    # The picture does not move: its features are looked at once, not at every step.
    features = (yield from ask_one(networks.see, image)) if perceptual else None
    w = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([w], lr=rate, betas=(0.9, 0.99))
    for step in range(steps):
        if cancelled is not None and cancelled():
            raise Cancelled(f"inversion dropped after {step} of {steps} steps: the caller is gone")
        for group in optimiser.param_groups:  # a short ramp down keeps the last steps from jumping
            group["lr"] = rate * min(1.0, 2.0 * (steps - step) / steps)
        w.grad = yield from ask_one(networks.descend, Descent(w.detach(), image, features))
        optimiser.step()
    return to_sphere(w.detach())


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
    networks = Inverting.of(encoder, generator, predictor, perceptual_weight, most=len(image))
    perceptual = predictor is not None and perceptual_weight > 0
    return alone(
        inverting(image, networks, steps, perceptual=perceptual, rate=rate, cancelled=cancelled)
    )
