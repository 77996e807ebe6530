"""A learned joint source-channel code for whole pictures: what the paper calls DeepSC.

A DeepJSCC-type convolutional codec (Bourtsoulatze, Kurka and Gunduz, 2019) that knows the SNR (Xu
et al., 2022). 16 real numbers for every 8 x 8 pixels of 3 colours: 4096 for a 128 px photo, CBR
0.0833.

::

    image --8x8 patches, principal components, water-filled--(+)--unit power--> x [B, n]
      '--conv 1/4--blocks--conv 1/8--blocks--conv (starts at 0)-'

    x_hat --LMMSE, gain from the message's statistics, patches back--(+)--> image
      '--conv 1/8--blocks--conv 1/4--blocks--conv (starts at 0)-------'

As with the adapters, the linear part is a closed form and the networks start at zero beside it:
what training finds can only be better than transform coding with linear estimation. Everything is
convolutional, so any side that is a multiple of 8 px can be sent.

The power constraint holds per message, and no scale crosses beside it: a constant offset on the
components lets the decoder see by how much the message was scaled.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapters import water_fill
from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.symbols import (
    check_snr_db,
    normalise_power,
    snr_db_to_noise_variance,
    to_complex,
    to_real,
)

NET: Final = "deepsc"
PATCH: Final = 8  # px, side of the patches that the components describe


@dataclass(frozen=True)
class DeepscConfig:
    """Sizes.

    components: real numbers per 8 x 8 patch. wide, narrow: channels at 1/8 and 1/4 of the side.
    blocks: residual blocks at each of the two, at each end. snr_features: bumps over
    snr_low_db..snr_high_db that tell SNRs apart.
    """

    components: int = 16
    wide: int = 128
    narrow: int = 64
    blocks: int = 2
    snr_features: int = 8
    snr_low_db: float = -10.0
    snr_high_db: float = 20.0

    def __post_init__(self) -> None:
        if self.components < 2 or self.components % 2 or min(self.wide, self.narrow) < 4:
            raise InvalidRequest(
                f"got {self.components} components, {self.wide} and {self.narrow} channels;"
                " expected an even number of components and at least 4 channels"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DeepscConfig":
        """Read what `to_json` wrote."""
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `bundle.json`."""
        return asdict(self)


@dataclass(frozen=True)
class PatchCode:
    """Principal components of 8 x 8 patches: colour mean [3], basis [c, 3, 8, 8], spectrum [c]."""

    mean: Tensor
    basis: Tensor
    spectrum: Tensor

    @classmethod
    def fit(cls, images: Tensor, components: int) -> "PatchCode":
        """The strongest components of the patches of images [N, 3, S, S] in [-1, 1]."""
        mean = images.mean((0, 2, 3))  # [3]
        centred = images - mean[:, None, None]
        patches = F.unfold(centred, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2)
        data = patches.double()
        spectrum, axes = torch.linalg.eigh(data.T @ data / len(data))
        spectrum, axes = spectrum.flip(0)[:components], axes.flip(1)[:, :components]
        floor = 1e-6 * float(spectrum[0]) + 1e-12
        return cls(
            mean.float(),
            axes.T.reshape(components, 3, PATCH, PATCH).float(),
            spectrum.clamp_min(floor).float(),
        )


class _Context(nn.Module):
    """What is the same everywhere in a message: its SNRs and its statistics, as 64 numbers."""

    centres: Tensor

    def __init__(self, config: DeepscConfig, snrs: int, statistics: int) -> None:
        super().__init__()
        low, high, count = config.snr_low_db, config.snr_high_db, config.snr_features
        self.register_buffer("centres", torch.linspace(low, high, count), persistent=False)
        self.net = nn.Sequential(
            nn.Linear(snrs * count + statistics, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()
        )

    def forward(self, snrs_db: Tensor, x: Tensor) -> Tensor:
        """snrs_db [B, snrs], features x [B, C, h, w] -> [B, 64]."""
        low, high = self.centres[0], self.centres[-1]
        step = (high - low) / (len(self.centres) - 1)
        inside = torch.minimum(torch.maximum(snrs_db, low), high).unsqueeze(2)
        bumps = torch.exp(-0.5 * ((inside - self.centres) / step).square()).flatten(1)
        statistics = torch.cat((x.mean((2, 3)), x.square().mean((2, 3)).add(1e-6).sqrt()), dim=1)
        context: Tensor = self.net(torch.cat((bumps, statistics), dim=1))
        return context


class _Block(nn.Module):
    """x + conv(modulate(conv(x))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(64, 2 * channels)
        for zero in (self.conv2, self.film):
            nn.init.zeros_(zero.weight)
            assert zero.bias is not None
            nn.init.zeros_(zero.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        scale, shift = self.film(context)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.leaky_relu(x, 0.2)) * (1 + scale) + shift
        out: Tensor = x + self.conv2(F.leaky_relu(y, 0.2))
        return out


class DeepscEncoder(nn.Module):
    """image [B, 3, S, S] -> x [B, S^2/8] complex64, unit power per message."""

    def __init__(self, config: DeepscConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3 * 16, config.narrow, 3, padding=1)
        self.context = _Context(config, snrs=1, statistics=2 * config.narrow)
        self.fine = nn.ModuleList(_Block(config.narrow) for _ in range(config.blocks))
        self.down = nn.Conv2d(4 * config.narrow, config.wide, 1)
        self.coarse = nn.ModuleList(_Block(config.wide) for _ in range(config.blocks))
        self.head = _zero_conv(config.wide, config.components)

    def forward(self, image: Tensor, snr_db: Tensor) -> Tensor:
        """image [B, 3, S, S], snr_db [B] -> components [B, c, S/8, S/8] to add."""
        x = self.stem(F.pixel_unshuffle(image, 4))  # [B, narrow, S/4, S/4]
        context = self.context(snr_db.unsqueeze(1), x)
        for block in self.fine:
            x = block(x, context)
        x = self.down(F.pixel_unshuffle(x, 2))  # [B, wide, S/8, S/8]
        for block in self.coarse:
            x = block(x, context)
        added: Tensor = self.head(F.leaky_relu(x, 0.2))
        return added


class DeepscDecoder(nn.Module):
    """Received components -> what to add to the linear picture, and by how much to scale that."""

    def __init__(self, config: DeepscConfig) -> None:
        super().__init__()
        c = config.components
        self.context = _Context(config, snrs=2, statistics=2 * c)
        self.gain = nn.Linear(64, 1)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)
        self.stem = nn.Conv2d(2 * c, config.wide, 3, padding=1)
        self.coarse = nn.ModuleList(_Block(config.wide) for _ in range(config.blocks))
        self.up = nn.Conv2d(config.wide, 4 * config.narrow, 1)
        self.fine = nn.ModuleList(_Block(config.narrow) for _ in range(config.blocks))
        self.head = _zero_conv(config.narrow, 3 * 16)

    def forward(self, seen: Tensor, linear: Tensor, snrs_db: Tensor) -> tuple[Tensor, Tensor]:
        """seen [B, c, S/8, S/8] as received, at unit variance; linear: the components estimated
        from it; snrs_db [B, 2] -> (picture to add [B, 3, S, S], gain [B, 1, 1, 1] in 1/2..2).
        """
        context = self.context(snrs_db, seen)
        gain = torch.exp2(torch.tanh(self.gain(context)))[:, :, None, None]
        x = self.stem(torch.cat((seen, linear), dim=1))  # [B, wide, S/8, S/8]
        for block in self.coarse:
            x = block(x, context)
        x = F.pixel_shuffle(self.up(x), 2)  # [B, narrow, S/4, S/4]
        for block in self.fine:
            x = block(x, context)
        return F.pixel_shuffle(self.head(F.leaky_relu(x, 0.2)), 4), gain


class Deepsc(nn.Module):
    """Both ends, as the bundle's net `deepsc`."""

    mean: Tensor
    basis: Tensor
    spectrum: Tensor

    def __init__(self, config: DeepscConfig | None = None, code: PatchCode | None = None) -> None:
        super().__init__()
        self.config = config or DeepscConfig()
        c = self.config.components
        if code is None:  # placeholders of the right shapes, for weights to be loaded into
            basis = torch.eye(3 * PATCH**2)[:c].reshape(c, 3, PATCH, PATCH)
            code = PatchCode(torch.zeros(3), basis, torch.ones(c))
        self.register_buffer("mean", code.mean.clone())
        self.register_buffer("basis", code.basis.clone())
        # As a root: fp16 keeps it, while variances of weak components would underflow.
        self.register_buffer("root", code.spectrum.sqrt())
        self.offset = nn.Parameter(torch.zeros(c))
        with torch.no_grad():
            self.offset[-1] = 1.0  # the weakest component pays for the reference of the scale
        self.encoder = DeepscEncoder(self.config)
        self.decoder = DeepscDecoder(self.config)

    root: Tensor

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "Deepsc":
        """The trained codec. BundleError where the bundle has none (`edsc train deepsc`)."""
        return bundle.load_into(NET, cls(DeepscConfig.from_json(bundle.config(NET))))

    def uses(self, size: int) -> int:
        """Channel uses for a size x size picture. InvalidRequest unless a multiple of 8 px."""
        if size < PATCH or size % PATCH:
            raise InvalidRequest(f"picture is {size} px wide; expected a multiple of {PATCH}")
        return self.config.components * (size // PATCH) ** 2 // 2

    def encode(self, image: Tensor, snr_db: float | Tensor) -> Tensor:
        """image [B, 3, S, S] in [-1, 1], average SNR -20..40 dB (a number or [B]) -> x [B, n].

        (1/n) sum |x_i|^2 = 1 for every message; n = `uses(S)`.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] != image.shape[3]:
            raise InvalidRequest(f"pictures are {list(image.shape)}; expected [B, 3, S, S]")
        self.uses(image.shape[3])
        check_snr_db(snr_db)
        snr = _per_message(snr_db, image)  # [B]
        power = self._power(snr)  # [B, c, 1, 1]
        centred = image - self.mean[:, None, None]
        white = F.conv2d(centred, self.basis / self.root[:, None, None, None], stride=PATCH)
        sent = white * power.sqrt() + self.offset[:, None, None] + self.encoder(image, snr)
        return normalise_power(to_complex(sent.flatten(1)))  # [B, n]

    def decode(
        self, x_hat: Tensor, snr_db: float | Tensor, sent_snr_db: float | Tensor, size: int
    ) -> Tensor:
        """x_hat [B, n] complex64, equalised to gain one -> pictures [B, 3, size, size], unclamped.

        snr_db: after equalisation, any finite value. sent_snr_db: the average one, coded for.
        """
        if x_hat.ndim != 2 or x_hat.shape[1] != self.uses(size):
            raise InvalidRequest(
                f"message has shape {list(x_hat.shape)}; expected [B, {self.uses(size)}]"
            )
        side = size // PATCH
        received = 2**0.5 * to_real(x_hat).unflatten(1, (-1, side, side))  # [B, c, S/8, S/8]
        snr, sent = _per_message(snr_db, received), _per_message(sent_snr_db, received)  # [B]
        power = self._power(sent)
        noise = snr_db_to_noise_variance(snr)[:, None, None, None]
        # The offset took its share of the unit power: the components came weaker by that much.
        c = self.config.components
        share = (c / (c + self.offset.square().sum())).sqrt()
        moved = received - share * self.offset[:, None, None]
        white = moved * share * power.sqrt() / (share.square() * power + noise)  # E[s | r]
        seen = received / (1 + noise).sqrt()
        added, gain = self.decoder(seen, white, torch.stack((sent, snr), dim=1))
        components = gain * white * self.root[:, None, None]
        linear = F.conv_transpose2d(components, self.basis, stride=PATCH)
        image: Tensor = self.mean[:, None, None] + linear + added
        return image

    def _power(self, snr_db: Tensor) -> Tensor:
        """Water-filled powers of the components, sum c: [B] -> [B, c, 1, 1]."""
        noise = snr_db_to_noise_variance(snr_db.clamp(-20.0, 40.0))
        return water_fill(self.root.square(), noise)[:, :, None, None]


def _zero_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _per_message(value: float | Tensor, like: Tensor) -> Tensor:
    """One float32 number per row of `like`: [B]."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    if numbers.ndim > 1 or (numbers.ndim == 1 and numbers.shape[0] != like.shape[0]):
        raise InvalidRequest(
            f"snr_db has shape {list(numbers.shape)}; expected one number or [{like.shape[0]}]"
        )
    each: Tensor = numbers.expand(like.shape[0])
    return each
