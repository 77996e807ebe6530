"""Equalisation: undo h, and say how noisy what is left is.

    y = h x + n  --->  x_hat = x + e,   snr_db = 10 log10(1 / E|e|^2)   per message

Both equalisers are scaled so that the average gain over the message is one: the decoder behind
them can shrink by the SNR it is told, and nothing is shrunk twice.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from shared.errors import InvalidRequest
from shared.symbols import Reception

Method = Literal["zf", "mmse"]

# Below -120 dB nothing of the message is left; the floor keeps divisions finite in float32.
_FLOOR = 1e-12


def estimate_fading(pilots: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from unit pilots: h_ls = (1/P) sum p_i = h + e, E|e|^2 = N0 / P.

    pilots: [B, P] complex64. noise_variance: [B]. Returns h_ls [B, 1] and N0 / P [B].
    """
    return pilots.mean(dim=1, keepdim=True), noise_variance / pilots.shape[1]


def fading_posterior(pilots: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
    """What is known of h after the pilots, h ~ CN(0, 1) before them.

        E[h | p] = h_ls / (1 + N0/P),      Var[h | p] = (N0/P) / (1 + N0/P)

    |h_ls|^2 is too large by N0 / P on average; at low SNR it would promise an SNR that is not
    there. Returns the mean [B, 1] and the variance [B].
    """
    least_squares, error = estimate_fading(pilots, noise_variance)
    return least_squares / (1 + error).unsqueeze(1), error / (1 + error)


def equalise(reception: Reception, method: Method = "mmse") -> tuple[Tensor, Tensor]:
    """Estimate the symbols, and their SNR after equalisation.

    zf:    x_hat_i = y_i / h_i,                       SNR = 1 / mean_i(N / |h_i|^2)
    mmse:  x_hat_i = h_i* y_i / (|h_i|^2 + N) / g,    SNR = g / (1 - g),
           g = mean_i g_i,  g_i = |h_i|^2 / (|h_i|^2 + N)

    Dividing by the average gain g makes the MMSE estimate unbiased over the message; shrinking it
    by SNR / (1 + SNR) = g, as the decoder does, gives the posterior mean back exactly. Under block
    fading the two are the same and SNR = |h|^2 / N; under fast fading zero forcing amplifies the
    noise of faded uses, MMSE gives them little weight.

    N is N0 under perfect CSI. Under estimated CSI h is the posterior mean and N adds its error,
    which the symbols (unit power) multiply: N = N0 + Var[h | p] (Hassibi & Hochwald, 2003).

    Returns x_hat [B, n] complex64 and snr_db [B] float32. Raises InvalidRequest for any other
    method.
    """
    if method not in get_args(Method):
        raise InvalidRequest(f"equaliser is {method!r}; expected one of zf, mmse")
    if reception.h is not None:
        h, noise = reception.h, reception.noise_variance  # [B, 1 or n], [B]
    else:
        assert reception.pilots is not None  # Reception carries exactly one of the two
        h, uncertainty = fading_posterior(reception.pilots, reception.noise_variance)
        noise = reception.noise_variance + uncertainty
    power = (h.real.square() + h.imag.square()).clamp_min(_FLOOR)  # [B, 1 or n]
    floor = noise.unsqueeze(1)  # [B, 1]
    if method == "zf":
        x_hat = reception.y * h.conj() / power
        snr = 1 / (floor / power).mean(dim=1)
    else:
        gain = power / (power + floor)  # g_i
        average = gain.mean(dim=1, keepdim=True)
        x_hat = reception.y * h.conj() / (power + floor) / average
        # 1 - g as a mean of its own: at high SNR the difference would lose its digits.
        snr = gain.mean(dim=1) / (floor / (power + floor)).mean(dim=1)
    return x_hat, 10 * torch.log10(snr.clamp_min(_FLOOR))
