"""Symbols: what both ends and the channel must agree on about the air interface.

    latent reals            symbols               after the channel
    [B, 2n] --to_complex--> [B, n] --normalise--> x --(h, n)--> Reception(y, h | pilots, N0)

Conventions, the same everywhere in this repository:

* a message is `n` complex channel uses; the first half of the `2n` reals is the real part, the
  second half the imaginary part;
* the power constraint is per message: (1/n) sum |x_i|^2 = P = 1;
* `snr_db` is Es/N0 = 10 log10(P / N0), averaged over fading;
* `noise_variance` is N0 per *complex* symbol, which is N0/2 per real dimension.
"""

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from shared.errors import InvalidRequest

SNR_MIN_DB = -20.0
SNR_MAX_DB = 40.0


@dataclass(frozen=True)
class Reception:
    """What the receiver's antenna hands to its baseband: y = h x + n, and what is known of h.

    y: [B, n] complex64, the received symbols.
    h: [B, 1] (block) or [B, n] (fast) complex64, the true fading (perfect CSI), or None.
    pilots: [B, P] complex64, received pilots p = h * 1 + n (estimated CSI), or None.
    noise_variance: [B] float32, N0 per complex symbol; every receiver measures it.

    Exactly one of `h` and `pilots` is there: a receiver that estimates never sees the true h.
    Raises InvalidRequest when shapes, types or that rule do not hold.
    """

    y: Tensor
    h: Tensor | None
    pilots: Tensor | None
    noise_variance: Tensor

    def __post_init__(self) -> None:
        _check_complex_matrix("y", self.y)
        batch, uses = self.y.shape
        if (self.h is None) == (self.pilots is None):
            got = "neither" if self.h is None else "both"
            raise InvalidRequest(f"a reception carries either h or pilots; got {got}")
        if self.h is not None:
            _check_complex_matrix("h", self.h)
            if self.h.shape[0] != batch or self.h.shape[1] not in (1, uses):
                raise InvalidRequest(
                    f"h has shape {list(self.h.shape)}; expected [{batch}, 1] or [{batch}, {uses}]"
                )
        if self.pilots is not None:
            _check_complex_matrix("pilots", self.pilots)
            if self.pilots.shape[0] != batch:
                raise InvalidRequest(
                    f"pilots have shape {list(self.pilots.shape)}; expected [{batch}, P]"
                )
        if tuple(self.noise_variance.shape) != (batch,):
            raise InvalidRequest(
                f"noise_variance has shape {list(self.noise_variance.shape)}; expected [{batch}]"
            )


@dataclass(frozen=True)
class Cbr:
    """Channel bandwidth ratio, counted both ways, pilots and headers included.

    paper: real numbers sent per source value, 2 (n + P + header) / (C H W): the paper's count.
    complex_uses: complex channel uses per source value, (n + P + header) / (C H W): half of it.
    uses: complex channel uses in all, n + P + header.
    """

    paper: float
    complex_uses: float
    uses: int


def cbr(
    n_uses: int,
    height: int,
    width: int,
    channels: int = 3,
    pilots: int = 0,
    header_uses: int = 0,
) -> Cbr:
    """The one function that counts bandwidth: CBR = k / (C H W).

    256 uses for a 3 x 128 x 128 photo: 0.0104 in the paper's count, 0.0052 in complex uses.
    Raises InvalidRequest for a picture without values or a negative count.
    """
    source = channels * height * width
    if min(channels, height, width) < 1:
        raise InvalidRequest(f"picture is {channels}x{height}x{width}; expected at least 1x1x1")
    if min(n_uses, pilots, header_uses) < 0:
        raise InvalidRequest(
            f"got {n_uses} symbols, {pilots} pilots, {header_uses} header uses; expected none < 0"
        )
    uses = n_uses + pilots + header_uses
    return Cbr(paper=2 * uses / source, complex_uses=uses / source, uses=uses)


def to_complex(reals: Tensor) -> Tensor:
    """Pair reals into symbols: x_i = r_i + j r_{n+i}. [B, 2n] float -> [B, n] complex.

    A plain pairing: nothing is scaled, so sum |x|^2 = sum r^2 and mean |x|^2 = 2 mean r^2.
    """
    if reals.ndim != 2 or reals.shape[1] % 2 or reals.is_complex():
        raise InvalidRequest(
            f"reals have shape {list(reals.shape)}, {reals.dtype}; expected [B, 2n] float"
        )
    real, imaginary = reals.chunk(2, dim=1)
    return torch.complex(real.contiguous(), imaginary.contiguous())  # [B, n]


def to_real(symbols: Tensor) -> Tensor:
    """The inverse of `to_complex`: [B, n] complex -> [B, 2n] float."""
    _check_complex_matrix("symbols", symbols)
    return torch.cat((symbols.real, symbols.imag), dim=1)  # [B, 2n]


def average_power(x: Tensor) -> Tensor:
    """P = (1/n) sum |x_i|^2 of every message. [B, n] complex or real -> [B] float."""
    if x.is_complex():
        # |x|^2 as re^2 + im^2: its gradient is finite at zero, abs() would have none there.
        return torch.view_as_real(x.resolve_conj()).square().sum(-1).mean(1)  # [B]
    return x.square().mean(1)


def normalise_power(x: Tensor) -> Tensor:
    """Scale every message to unit average power: x <- x / sqrt((1/n) sum |x_i|^2).

    [B, n] -> [B, n], per message and never per batch, so a message does not depend on its
    neighbours. Raises InvalidRequest for a message of zero or non-finite power: it has no
    direction to keep, and silence must not be amplified into noise.
    """
    power = average_power(x)  # [B]
    usable = torch.isfinite(power) & (power > torch.finfo(power.dtype).tiny)
    if not bool(usable.all()):
        first = float(power.detach()[~usable][0])
        raise InvalidRequest(f"message power is {first:g}; expected a finite number above 0")
    return x * power.rsqrt().unsqueeze(1)


def check_snr_db(snr_db: float | Tensor) -> None:
    """Raise InvalidRequest unless every SNR is finite and within -20..40 dB."""
    values = torch.as_tensor(snr_db, dtype=torch.float64).detach()
    # NaN fails both comparisons, so it is refused here too.
    inside = (values >= SNR_MIN_DB) & (values <= SNR_MAX_DB)
    if not bool(inside.all()):
        first = float(values[~inside].flatten()[0])
        raise InvalidRequest(
            f"snr_db is {first:g}; expected a finite number in {SNR_MIN_DB:g}..{SNR_MAX_DB:g} dB"
        )


@overload
def snr_db_to_noise_variance(snr_db: float, power: float = 1.0) -> float: ...
@overload
def snr_db_to_noise_variance(snr_db: Tensor, power: float = 1.0) -> Tensor: ...
def snr_db_to_noise_variance(snr_db: float | Tensor, power: float = 1.0) -> float | Tensor:
    """N0 = P 10^(-SNR_dB / 10), per complex symbol (half of it per real dimension)."""
    if isinstance(snr_db, Tensor):
        return power * torch.pow(10.0, -snr_db / 10.0)
    return float(power * 10.0 ** (-snr_db / 10.0))


@overload
def noise_variance_to_snr_db(noise_variance: float, power: float = 1.0) -> float: ...
@overload
def noise_variance_to_snr_db(noise_variance: Tensor, power: float = 1.0) -> Tensor: ...
def noise_variance_to_snr_db(noise_variance: float | Tensor, power: float = 1.0) -> float | Tensor:
    """SNR_dB = 10 log10(P / N0); the inverse of `snr_db_to_noise_variance`. N0 > 0."""
    if isinstance(noise_variance, Tensor):
        return 10.0 * torch.log10(power / noise_variance)
    return 10.0 * math.log10(power / noise_variance)


def capacity(snr_db: float) -> float:
    """C = log2(1 + Es/N0), bits per complex channel use over AWGN (Shannon)."""
    return math.log2(1.0 + 10.0 ** (snr_db / 10.0))


def _check_complex_matrix(name: str, x: Tensor) -> None:
    if x.ndim != 2 or not x.is_complex():
        raise InvalidRequest(
            f"{name} has shape {list(x.shape)}, {x.dtype}; expected [B, n] complex64"
        )
