"""StyleGAN2 in plain torch operations: the same file and the same numbers on CPU and CUDA.

::

    z [B, 512] --mapping: 8 x (Linear, LeakyReLU)--> w [B, 512], |w| = sqrt(512)
                                                      |
    const 4x4 --conv--> 4 --up, conv--> 8 -- ... --> S |   every convolution is modulated by A(w)
                 |           |                  |
                toRGB       toRGB              toRGB       pictures are summed on the way up
                 `----up-----+------up----------+--> image [B, 3, S, S]

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), with choices that
this link needs or that CPUs like:

* w lies on the sphere |w| = sqrt(w_dim): the power constraint loses nothing, no scalar crosses;
* weights are initialised with the gain that equalised learning rates would apply each time;
* modulation scales the activations and demodulation the outputs (Eqs. 1 to 3 of that paper: the
  same numbers as scaling the weights, without one set of weights per sample);
* with `draft_size`, a linear draft of the picture (`Draft`) joins the sum at that resolution and is
  shown to the layers up to it. A constant and styles alone have to learn where in the picture
  things are; a draft starts where principal components end. Without it: StyleGAN2 as published.
"""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.bundle import Bundle
from shared.errors import InvalidRequest

GAIN = math.sqrt(
    2
)  # keeps the variance through a leaky ReLU of slope 0.2, as the paper's code does


def default_channels(image_size: int, base: int = 16384, maximum: int = 512) -> tuple[int, ...]:
    """Channels at 4, 8, ..., image_size: base / resolution, at most `maximum` (as StyleGAN2)."""
    return tuple(min(base // 2**k, maximum) for k in range(2, image_size.bit_length()))


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a generator.

    image_size: 32 ... 1024, a power of two. channels: one number per resolution from 4 px on.
    draft_size: resolution of the linear draft, a power of two of 4 ... image_size; 0: none.
    """

    image_size: int = 128
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    channels: tuple[int, ...] = (256, 256, 256, 192, 96, 48)
    synthesis_noise: bool = False
    draft_size: int = 0

    def __post_init__(self) -> None:
        size = self.image_size
        if size < 32 or size > 1024 or size & (size - 1):
            raise InvalidRequest(f"got image_size {size}, expected a power of two in 32..1024")
        if len(self.channels) != size.bit_length() - 2:
            raise InvalidRequest(
                f"got {len(self.channels)} channel counts for {size} px, "
                f"expected {size.bit_length() - 2} (4 px, 8 px, ...)"
            )
        draft = self.draft_size
        if draft and (draft < 4 or draft > size or draft & (draft - 1)):
            raise InvalidRequest(
                f"got draft_size {draft}, expected 0 or a power of two in 4..{size}"
            )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "GeneratorConfig":
        return cls(**{**values, "channels": tuple(values["channels"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def num_ws(self) -> int:
        """Modulated layers: one at 4 px, two at each further resolution, one for the last RGB."""
        return 2 * len(self.channels)


def to_sphere(w: Tensor) -> Tensor:
    """Scale each vector of w [..., D] to length sqrt(D): mean square 1 per component."""
    return F.normalize(w, dim=-1) * math.sqrt(w.shape[-1])


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * GAIN


def _taps(x: Tensor) -> Tensor:
    """The FIR [1, 3, 3, 1] x [1, 3, 3, 1] with gain 4, one copy per channel of x: [C, 1, 4, 4]."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 4
    return (taps[:, None] * taps[None, :]).expand(x.shape[1], 1, 4, 4)


def _double(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W]: zeros between the samples, then the FIR."""
    return F.conv_transpose2d(x, _taps(x), stride=2, padding=1, groups=x.shape[1])


class Mapping(nn.Module):
    """z [B, z_dim] ~ N(0, I)  ->  w [B, w_dim] on the sphere."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        sizes = [config.z_dim] + [config.w_dim] * config.mapping_layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor) -> Tensor:
        x = to_sphere(z)  # [B, z_dim]
        for layer in self.layers:
            x = _activate(layer(x))
        return to_sphere(x - x.mean(1, keepdim=True))  # [B, w_dim]


class ModulatedConv(nn.Module):
    """Convolution whose input channels are scaled by a style A(w), with or without demodulation."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, w_dim: int, demodulate: bool = True
    ) -> None:
        super().__init__()
        self.demodulate = demodulate
        self.weight = nn.Parameter(
            torch.randn(out_channels, in_channels, kernel, kernel)
            / math.sqrt(in_channels * kernel * kernel)
        )
        self.style = nn.Linear(w_dim, in_channels)
        # Small, so that a face is at first a nearly linear function of its latent: an encoder that
        # faces thirteen products of random styles hides in the few directions that stay calm.
        nn.init.normal_(self.style.weight, std=0.2 / math.sqrt(w_dim))
        nn.init.ones_(self.style.bias)

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        up: bool = False,
        bias: Tensor | None = None,
        gain: float = 1.0,
    ) -> Tensor:
        """gain (convolution + bias): one pass over the features instead of one for each factor."""
        style = self.style(w)  # [B, I]
        x = x * style.to(x.dtype)[:, :, None, None]
        if up:  # a stride-2 transposed convolution leaves a checkerboard, which the FIR removes
            x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
            x = F.conv2d(x, _taps(x), padding=1, groups=x.shape[1])
        else:
            x = F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)
        if self.demodulate:
            energy = self.weight.float().square().sum((2, 3))  # [O, I]
            scale = gain * (style.float().square() @ energy.t() + 1e-8).rsqrt()  # [B, O]
            factor = scale.to(x.dtype)[:, :, None, None]
            if bias is None:
                modulated: Tensor = x * factor
                return modulated
            shift = (gain * bias).to(x.dtype)[:, None, None]
            if torch.is_grad_enabled():
                return torch.addcmul(shift, x, factor)
            # In place: of a batch of tensors, fresh memory costs more than the arithmetic.
            scaled: Tensor = x.mul_(factor).add_(shift)
            return scaled
        return x if bias is None else x + bias.to(x.dtype)[:, None, None]


class StyledLayer(nn.Module):
    """Modulated 3x3 convolution, synthesis noise where configured, bias, leaky ReLU."""

    noise: Tensor  # [1, 1, S, S], where there is synthesis noise

    def __init__(
        self, in_channels: int, out_channels: int, size: int, up: bool, config: GeneratorConfig
    ) -> None:
        super().__init__()
        self.up = up
        self.conv = ModulatedConv(in_channels, out_channels, 3, config.w_dim)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength: nn.Parameter | None = None
        if config.synthesis_noise:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            self.register_buffer("noise", torch.randn(1, 1, size, size))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.conv(x, w, self.up, self.bias, GAIN)
        if self.noise_strength is not None:
            x = x + (GAIN * self.noise_strength * self.noise).to(x.dtype)
        # The gain is in already: the slope does not mind.
        return F.leaky_relu(x, 0.2, inplace=not torch.is_grad_enabled())


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to three channels, without demodulation."""

    def __init__(self, in_channels: int, w_dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, 3, 1, w_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            rgb: Tensor = self.conv(x, w).float() + self.bias[:, None, None]
            return rgb
        # The same with the style in the weights: no modulated copy of all the features.
        weight = self.conv.weight[:, :, 0, 0] * self.conv.style(w)[:, None]  # [B, 3, I]
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H W, I], no copy in channels-last
        drawn = (pixels @ weight.to(x.dtype).transpose(1, 2)).float() + self.bias  # [B, H W, 3]
        return torch.unflatten(drawn.transpose(1, 2), 2, x.shape[2:])


class Draft(nn.Module):
    """w [B, D] -> a picture [B, 3, R, R] that is linear in the first D - 1 numbers of w.

        draft = mean + sum_i basis_i w_i exp(spread w_D)

    basis: how the picture moves with each number; at the start of the training, principal
    components times their standard deviations. The last number restores the length that the sphere
    takes from the others: the logarithm of their norm, in standard deviations (`spread`).
    """

    spread: Tensor

    def __init__(self, size: int, w_dim: int) -> None:
        super().__init__()
        self.size = size
        self.mean = nn.Parameter(torch.zeros(3, size, size))
        self.basis = nn.Parameter(torch.randn(w_dim - 1, 3, size, size) / math.sqrt(8 * w_dim))
        self.register_buffer("spread", torch.tensor(0.2))

    def forward(self, w: Tensor) -> Tensor:
        scaled = w[:, :-1] * torch.exp(self.spread * w[:, -1:].clamp(-4, 4))  # [B, D - 1]
        # In channels-last order, in which the weights lie: 25 MB that need not be copied each time.
        mean = self.mean.permute(1, 2, 0).flatten()
        basis = self.basis.permute(0, 2, 3, 1).flatten(1)
        flat = torch.addmm(mean, scaled, basis)  # [B, R R 3]
        draft: Tensor = torch.unflatten(flat, 1, (self.size, self.size, 3)).permute(0, 3, 1, 2)
        return draft


class Synthesis(nn.Module):
    """w [B, w_dim], or one per layer ws [B, num_ws, w_dim] -> image [B, 3, S, S], about [-1, 1]."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.num_ws = config.num_ws
        channels = config.channels
        self.constant = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        self.layers = nn.ModuleList([StyledLayer(channels[0], channels[0], 4, False, config)])
        self.to_rgb = nn.ModuleList([ToRGB(channels[0], config.w_dim)])
        for level in range(1, len(channels)):
            size, above, here = 4 << level, channels[level - 1], channels[level]
            self.layers.append(StyledLayer(above, here, size, True, config))
            self.layers.append(StyledLayer(here, here, size, False, config))
            self.to_rgb.append(ToRGB(here, config.w_dim))
        self.draft: Draft | None = None
        self.draft_level = config.draft_size.bit_length() - 3  # 0 is 4 px
        if config.draft_size:
            self.draft = Draft(config.draft_size, config.w_dim)
            self.see_draft = nn.ModuleList(
                nn.Conv2d(3, width, 3, padding=1) for width in channels[: self.draft_level + 1]
            )
            for layer in self.to_rgb:  # the picture is the draft until the layers know better
                assert isinstance(layer, ToRGB)
                nn.init.zeros_(layer.conv.weight)

    def _shown(self, level: int, draft: Tensor, x: Tensor) -> Tensor:
        """Add what the features [B, C, H, W] of this level are shown of the draft."""
        reduced = F.avg_pool2d(draft, draft.shape[-1] // x.shape[-1])
        seen: Tensor = self.see_draft[level](reduced.contiguous(memory_format=torch.channels_last))
        return x + seen.to(x.dtype)

    def forward(self, w: Tensor) -> Tensor:
        if w.dim() == 2:
            w = w[:, None].expand(-1, self.num_ws, -1)  # [B, num_ws, w_dim]
        if w.dim() != 3 or w.shape[1] != self.num_ws:
            raise InvalidRequest(
                f"got w of shape {tuple(w.shape)}, expected [B, D] or [B, {self.num_ws}, D]"
            )
        x = self.constant.expand(len(w), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        draft: Tensor | None = None
        if self.draft is not None:
            with torch.autocast(w.device.type, enabled=False):  # 8 bits would be seen in a sky
                draft = self.draft(w[:, 2 * self.draft_level + 1].float())
        rgb: Tensor | None = None
        for level, to_rgb in enumerate(self.to_rgb):
            if level > 0:
                x = self.layers[2 * level - 1](x, w[:, 2 * level - 1])
            if draft is not None and level <= self.draft_level:
                x = self._shown(level, draft, x)
            x = self.layers[2 * level](x, w[:, 2 * level])
            colours: Tensor = to_rgb(x, w[:, 2 * level + 1])
            rgb = colours if rgb is None else _double(rgb) + colours
            if draft is not None and level == self.draft_level:
                rgb = rgb + draft
        assert rgb is not None  # a generator has at least four resolutions
        return rgb


class Generator(nn.Module):
    """`generator(z)` draws faces that never were; `generator.synthesis(w)` renders a latent."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping = Mapping(config)
        self.synthesis = Synthesis(config)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "Generator":
        generator = cls(GeneratorConfig.from_json(bundle.config("generator")))
        bundle.load_into("generator", generator)
        generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return generator

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.synthesis(self.mapping(z))
        return image


class Discriminator(nn.Module):
    """Residual discriminator: image [B, 3, S, S] -> logit [B], large for real pictures."""

    def __init__(self, image_size: int, channels: tuple[int, ...], group: int = 4) -> None:
        """channels: one number per resolution from 4 px to image_size, as for the generator."""
        super().__init__()
        if len(channels) != image_size.bit_length() - 2:
            raise InvalidRequest(
                f"got {len(channels)} channel counts for {image_size} px, "
                f"expected {image_size.bit_length() - 2} (4 px, 8 px, ...)"
            )
        self.group = group
        down = channels[::-1]  # from image_size to 4 px
        self.from_rgb = nn.Conv2d(3, down[0], 1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Conv2d(a, a, 3, padding=1),
                    nn.Conv2d(a, b, 3, padding=1),
                    nn.Conv2d(a, b, 1, bias=False),
                ]
            )
            for a, b in pairwise(down)
        )
        self.last = nn.Conv2d(down[-1] + 1, down[-1], 3, padding=1)
        self.head = nn.Linear(down[-1] * 16, down[-1])
        self.out = nn.Linear(down[-1], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = _activate(self.from_rgb(image))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleList)
            first, second, skip = block
            y = _activate(second(F.avg_pool2d(_activate(first(x)), 2)))
            x = (y + skip(F.avg_pool2d(x, 2))) * math.sqrt(0.5)
        x = _activate(self.last(_with_batch_deviation(x, self.group)))
        x = _activate(self.head(x.flatten(1)))
        logit: Tensor = self.out(x)[:, 0].float()
        return logit


def _with_batch_deviation(x: Tensor, group: int) -> Tensor:
    """Append the mean standard deviation over groups of the batch as one more channel."""
    count = len(x)
    group = math.gcd(group, count)
    grouped = x.reshape(group, count // group, *x.shape[1:]).float()
    deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # [B / group]
    plane = deviation.repeat(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.cat([x, plane.to(x.dtype)], 1)
