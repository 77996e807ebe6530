"""The channel: y = h x + n, one differentiable function for training, evaluation and the service.

                 snr_db ---> N0 = 10^(-snr_db / 10)
                               |
                          n ~ CN(0, N0)
                               |
    x [B, n] ------(x)--------(+)------> y [B, n] ------------------.
                    |                                               |
    draw_fading --> h                                               +--> Reception
                    |                                               |
    ones [B, P] ---(x)--------(+)------> pilots [B, P] -------------'
                               |         (estimated CSI; h itself otherwise)
                          n ~ CN(0, N0)

The symbols are expected at unit power per message (`shared.symbols.normalise_power`); the channel
does not scale them, for what it repaired the transmitter would not have paid for.
"""

import torch
from torch import Tensor

from channel_sim.fading import ChannelConfig, complex_normal, draw_fading
from shared.errors import InvalidRequest
from shared.symbols import Reception, check_snr_db, snr_db_to_noise_variance

__all__ = ["Channel", "ChannelConfig", "apply_channel", "channel"]


def apply_channel(
    x: Tensor, h: Tensor, noise_variance: Tensor, generator: torch.Generator
) -> Tensor:
    """y = h x + n with n ~ CN(0, N0): N0 per complex symbol, N0/2 per real dimension.

    x: [B, n] complex64. h: [B, 1] or [B, n] complex64. noise_variance: [B] float32, N0.
    Returns y [B, n] complex64; gradients reach x (and h).
    """
    noise = complex_normal(x.shape[0], x.shape[1], generator, x.device)  # [B, n]
    return h * x + noise_variance.sqrt().unsqueeze(1) * noise


class Channel:
    """A channel of one configuration; stateless, so one object serves any number of threads."""

    def __init__(self, config: ChannelConfig) -> None:
        self.config = config

    def __call__(self, x: Tensor, snr_db: float | Tensor, generator: torch.Generator) -> Reception:
        """Send messages.

        x: [B, n] complex64, unit power per message.
        snr_db: Es/N0 averaged over fading, finite, -20..40 dB; one number or [B].
        generator: the only source of randomness: its seed decides h, noise and pilots.

        Returns what the receiver gets; under estimated CSI that holds pilots instead of h.
        Raises InvalidRequest for symbols of another type or shape and for an SNR out of range.
        """
        if x.ndim != 2 or x.dtype != torch.complex64 or x.shape[1] < 1:
            raise InvalidRequest(
                f"symbols have shape {list(x.shape)}, {x.dtype}; expected [B, n] complex64"
            )
        batch, uses = x.shape
        check_snr_db(snr_db)
        snr = torch.as_tensor(snr_db, dtype=torch.float32, device=x.device)
        if snr.ndim > 1 or (snr.ndim == 1 and snr.shape[0] != batch):
            raise InvalidRequest(
                f"snr_db has shape {list(snr.shape)}; expected one number or [{batch}]"
            )
        noise_variance = snr_db_to_noise_variance(snr).expand(batch).clone()  # [B]
        h = draw_fading(self.config, batch, uses, generator, x.device)  # [B, 1 or n]
        y = apply_channel(x, h, noise_variance, generator)  # [B, n]
        if self.config.csi == "perfect":
            return Reception(y=y, h=h, pilots=None, noise_variance=noise_variance)
        # Drawn after the message, so perfect and estimated CSI see the same h and the same noise.
        ones = torch.ones(batch, self.config.pilots, dtype=x.dtype, device=x.device)
        pilots = apply_channel(ones, h, noise_variance, generator)  # [B, P]
        return Reception(y=y, h=None, pilots=pilots, noise_variance=noise_variance)


channel = Channel(ChannelConfig("awgn"))
"""The plain channel: additive white Gaussian noise, h = 1."""
