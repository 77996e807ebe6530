"""Coherent reception for the baselines: the matched filter, soft bits, and a short header.

    y = h x + n  --->  h* y = |h|^2 x + h* n          (matched filter: variance |h|^2 N)

4-QAM carries bit b_0 on the real part and b_1 on the imaginary one (3GPP 38.211 5.1.3):

    x = [(1 - 2 b_0) + j (1 - 2 b_1)] / sqrt 2

and their log-likelihood ratios are exact, with the weight |h|^2 already in the filter's output:

    L_0 = ln p(b_0 = 0 | y) / p(b_0 = 1 | y) = 2 sqrt 2 Re(h* y) / N,    L_1 likewise with Im

Under estimated CSI h is the posterior mean given the pilots and N = N0 + Var[h | pilots], the same
Gaussian approximation that the receiver of Editable-DeepSC makes.
"""

import math
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from shared.errors import InvalidRequest
from shared.symbols import Reception

BITS_PER_USE: Final = 2  # 4-QAM
HEADER_BITS: Final = 8
HEADER_USES: Final = 128
_WALSH: Final = 128  # length of a Walsh function: 7 bits choose it, the 8th its sign
# Below -120 dB nothing of the message is left; the floor keeps divisions finite in float32.
_FLOOR: Final = 1e-12


def matched_filter(reception: Reception) -> tuple[Tensor, Tensor, Tensor]:
    """What a coherent receiver keeps: (h* y [B, n] complex, |h|^2 [B, 1 or n], N [B, 1]).

    h is the true one under perfect CSI, E[h | pilots] for h ~ CN(0, 1) otherwise.
    """
    noise = reception.noise_variance.unsqueeze(1)  # [B, 1]
    h = reception.h
    if h is None:
        assert reception.pilots is not None  # Reception carries exactly one of the two
        error = noise / reception.pilots.shape[1]  # [B, 1], of the least-squares estimate
        h = reception.pilots.mean(dim=1, keepdim=True) / (1 + error)
        noise = noise + error / (1 + error)
    return h.conj() * reception.y, h.real.square() + h.imag.square(), noise


def equalise(reception: Reception) -> tuple[Tensor, Tensor]:
    """Unbiased MMSE estimate of the symbols, and the SNR that is left.

    x_hat_i = h_i* y_i / (|h_i|^2 + N) / g,  g = mean_i |h_i|^2 / (|h_i|^2 + N),  SNR = g / (1 - g)

    Returns x_hat [B, n] complex64 and snr_db [B].
    """
    filtered, power, noise = matched_filter(reception)
    gain = power / (power + noise)  # [B, 1 or n]
    average = gain.mean(dim=1, keepdim=True).clamp_min(_FLOOR)  # [B, 1]
    x_hat = filtered / (power + noise) / average
    left = (noise / (power + noise)).mean(dim=1).clamp_min(_FLOOR)
    return x_hat, 10 * torch.log10(average[:, 0] / left)


def qam4(bits: Tensor) -> Tensor:
    """Bits [B, 2n] of 0 and 1 -> symbols [B, n] complex64, |x| = 1. 3GPP 38.211 5.1.3."""
    if bits.ndim != 2 or bits.shape[1] % BITS_PER_USE:
        raise InvalidRequest(f"bits have shape {list(bits.shape)}; expected [B, 2n]")
    signs = (1.0 - 2.0 * bits.float()) * math.sqrt(0.5)  # [B, 2n]
    return torch.complex(signs[:, 0::2].contiguous(), signs[:, 1::2].contiguous())


def soft_bits(reception: Reception) -> Tensor:
    """Log-likelihood ratios ln p(0) / p(1) of the bits of `qam4`: [B, n] uses -> [B, 2n].

    Positive for a 0. Weighted by |h|^2: a faded use says little, and says so.
    """
    filtered, _, noise = matched_filter(reception)
    scaled = 2 * math.sqrt(2) * filtered / noise  # [B, n]
    return torch.view_as_real(scaled).flatten(1)  # re, im, re, im, ...


def header_symbols(value: int) -> Tensor:
    """8 bits as 128 channel uses [1, 128]: a biorthogonal code, every word sent twice.

    Words are the 128 Walsh functions and their negatives, 128 bits each. Over AWGN a header is read
    wrongly with a probability of at most 254 Q(sqrt(128 Es/N0)) (union bound): 2e-6 at -6 dB.
    Raises InvalidRequest outside of 0..255.
    """
    if not 0 <= value < 2**HEADER_BITS:
        raise InvalidRequest(f"header is {value}; expected 0..{2**HEADER_BITS - 1}")
    word = _walsh()[value % _WALSH]
    bits = word if value < _WALSH else 1 - word
    return qam4(bits.repeat(2).unsqueeze(0))  # [1, 128]


def read_header(reception: Reception) -> int:
    """The most likely header value 0..255 of a Reception of one message of 128 uses."""
    if tuple(reception.y.shape) != (1, HEADER_USES):
        raise InvalidRequest(
            f"header has shape {list(reception.y.shape)}; expected [1, {HEADER_USES}]"
        )
    soft = soft_bits(reception).reshape(2, _WALSH).sum(dim=0)  # [128]
    scores = (1 - 2 * _walsh()) @ soft  # [128], correlation with every word
    best = int(scores.abs().argmax())
    return best if float(scores[best]) >= 0 else best + _WALSH


def part(reception: Reception, start: int, stop: int) -> Reception:
    """Uses start..stop of every message, with the CSI that belongs to them."""
    h = reception.h
    if h is not None and h.shape[1] != 1:
        h = h[:, start:stop]
    return Reception(
        y=reception.y[:, start:stop],
        h=h,
        pilots=reception.pilots,
        noise_variance=reception.noise_variance,
    )


@lru_cache(maxsize=1)
def _walsh() -> Tensor:
    """Walsh functions as bits [128, 128]: bit (i, j) is the parity of i AND j."""
    index = torch.arange(_WALSH)
    both = index.unsqueeze(1) & index  # [128, 128]
    parity = sum((both >> bit) & 1 for bit in range(7))
    assert isinstance(parity, Tensor)
    return (parity % 2).float()
