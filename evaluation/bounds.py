"""What no code can do better: capacity, rate-distortion, linear estimation, over fading too.

::

    512 reals = 256 complex uses ---- capacity C(SNR) bits ----> JPEG, AVIF: bits / C >= 1 fails
            |
            `--- Gaussian latent, spectrum lambda_i ---- D(R = C)  <=  LMMSE  <= what is measured

D is the share of the latent's variance that is left. For a white latent both curves are
1 / (1 + SNR): sending a Gaussian source uncoded over as many uses as it has numbers is optimal
(Goblick 1965), so nothing is lost by a linear code. For an uneven spectrum the rate-distortion
curve lies below the linear one; only codes of infinite length reach it.

Fading is averaged over the law of g = |h|^2, E g = 1, by its quantiles. The transmitter knows the
average SNR alone, so it fills water by that, and the receiver knows g.
"""

import math
from collections.abc import Callable

import torch
from scipy.stats import ncx2
from torch import Tensor

from channel_sim.fading import Kind
from shared.adapters import LinearCode, water_fill
from shared.errors import InvalidRequest
from shared.symbols import capacity, snr_db_to_noise_variance

_QUANTILES = 2000


def capacity_bits(snr_db: float, uses: int = 256) -> float:
    """n log2(1 + Es/N0): bits that `uses` complex channel uses carry at most, AWGN (Shannon)."""
    return uses * capacity(snr_db)


def gain_cdf(g: float, kind: Kind, k_factor_db: float = 9.0) -> float:
    """P(|h|^2 <= g): a step at 1, 1 - e^-g, or the noncentral chi-square law of Rician fading."""
    if kind == "awgn":
        return float(g >= 1)
    if kind == "rayleigh":
        return 1 - math.exp(-max(g, 0.0))
    k = 10 ** (k_factor_db / 10)
    return float(ncx2.cdf(2 * (k + 1) * g, 2, 2 * k))


def gain_quantiles(kind: Kind, k_factor_db: float = 9.0, count: int = _QUANTILES) -> Tensor:
    """The mid-quantiles of |h|^2 [count] float64: a mean over them is an integral over the law."""
    if kind == "awgn":
        return torch.ones(1, dtype=torch.float64)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if kind == "rayleigh":
        return -torch.log1p(-u)
    k = 10 ** (k_factor_db / 10)
    return torch.from_numpy(ncx2.ppf(u.numpy(), 2, 2 * k)) / (2 * (k + 1))


def over_fading(
    of_snr_db: Callable[[float], float], snr_db: float, kind: Kind, k_factor_db: float = 9.0
) -> float:
    """The mean of a function of the instantaneous SNR in dB, g Es/N0, over block fading."""
    gains = gain_quantiles(kind, k_factor_db, 1 if kind == "awgn" else 200)
    values = [of_snr_db(snr_db + 10 * math.log10(max(float(g), 1e-12))) for g in gains]
    return sum(values) / len(values)


def ergodic_capacity_bits(
    snr_db: float, kind: Kind, uses: int = 256, k_factor_db: float = 9.0
) -> float:
    """E n log2(1 + g Es/N0): the mean over messages of what block fading lets through.

    For Rayleigh, n e^(1/s) E1(1/s) / ln 2 with s = Es/N0.
    """
    snr = 1 / snr_db_to_noise_variance(snr_db)
    gains = gain_quantiles(kind, k_factor_db)
    return float(uses * torch.log2(1 + snr * gains).mean())


def outage_bound(
    bits: float, uses: int, snr_db: float, kind: Kind, k_factor_db: float = 9.0
) -> float:
    """P(n log2(1 + g Es/N0) < bits): the least share of messages that any code loses.

    A step at capacity for AWGN; it holds for long codes, and is a bound for short ones.
    """
    if bits < 0 or uses < 1:
        raise InvalidRequest(f"got {bits} bits in {uses} uses, expected bits >= 0 and uses >= 1")
    needed = (2 ** (bits / uses) - 1) * snr_db_to_noise_variance(snr_db)  # g at which it is enough
    if kind == "awgn":
        return float(needed > 1)
    return gain_cdf(needed, kind, k_factor_db)


def least_snr_db(bits: float, uses: int) -> float:
    """Es/N0 in dB at which `uses` channel uses can just carry `bits`, AWGN."""
    if bits <= 0 or uses < 1:
        raise InvalidRequest(f"got {bits} bits in {uses} uses, expected bits > 0 and uses >= 1")
    return 10 * math.log10(2 ** (bits / uses) - 1)


def lmmse_left(
    spectrum: Tensor, snr_db: float, kind: Kind = "awgn", k_factor_db: float = 9.0
) -> float:
    """Share of the latent's variance that the water-filled linear code leaves, 0..1.

    spectrum: variances lambda [k] of the components, any order. k real numbers cross, one each.
    """
    ordered = spectrum.double().sort(descending=True).values
    noise = torch.tensor([snr_db_to_noise_variance(snr_db)], dtype=torch.float64)
    if kind == "awgn":
        k = len(ordered)
        code = LinearCode(torch.zeros(k), torch.eye(k), torch.eye(k), ordered)
        return float(code.distortion(noise)[0])
    power = water_fill(ordered, noise)  # [1, k], for the average SNR
    faded = (noise / gain_quantiles(kind, k_factor_db, 400).clamp_min(1e-12)).unsqueeze(1)
    left = (ordered * faded / (power + faded)).sum(1)  # [400]
    return float(left.mean() / ordered.sum())


def rate_distortion_left(spectrum: Tensor, bits: float) -> float:
    """Share of a Gaussian latent's variance that `bits` leave at least, 0..1.

        D = sum_i min(theta, lambda_i),  R = sum_i max(0, log2(lambda_i / theta) / 2)

    (reverse water-filling, Cover and Thomas 10.3.3). spectrum: lambda [k] > 0.
    """
    if bits < 0 or float(spectrum.min()) <= 0:
        raise InvalidRequest(
            f"got {bits} bits and a least variance of {float(spectrum.min())}; expected bits >= 0 "
            "and variances above 0"
        )
    lam = spectrum.double().sort(descending=True).values
    logs = lam.log2()
    count = torch.arange(1, len(lam) + 1, dtype=torch.float64)
    # log2 theta if exactly the m strongest components are coded, for every m at once.
    level = (logs.cumsum(0) - 2 * bits) / count
    active = logs >= level  # component m is worth coding at its own level
    m = int(active.nonzero().max()) if bool(active.any()) else 0
    theta = 2 ** level[m]
    return float(torch.minimum(lam, theta).sum() / lam.sum())


def rate_distortion_over_fading(
    spectrum: Tensor,
    snr_db: float,
    kind: Kind = "awgn",
    k_factor_db: float = 9.0,
    uses: int = 256,
) -> float:
    """E D(C(g)): the bound of a sender who would know g, hence below what any of ours can do."""
    return over_fading(
        lambda instant: rate_distortion_left(spectrum, capacity_bits(instant, uses)),
        snr_db,
        kind,
        k_factor_db,
    )
