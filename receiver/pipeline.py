"""The receiver: symbols in, photograph out.

    Reception --equalise--> x_hat, SNR --A_CD--> w_hat --StyleGAN2 synthesis--> image

The receiver sees what its antenna gives it and the bundle; nothing of the sender's photograph, its
power scalar or (under estimated CSI) the true fading.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from receiver.equaliser import Method, equalise
from shared.adapters import ChannelDecoder
from shared.bundle import Bundle
from shared.compute import most_in_a_pass, multiplying_in
from shared.stylegan2 import Generator
from shared.symbols import Reception, noise_variance_to_snr_db


class Receiver:
    """Inference only: `receiver(reception)` is the whole of it."""

    def __init__(
        self,
        decoder: ChannelDecoder,
        generator: Generator,
        device: torch.device | str = "cpu",
        method: Method = "mmse",
        precision: torch.dtype = torch.float32,
    ) -> None:
        """precision: of the products in convolutions; see `shared.compute.precision_of`."""
        self.device = torch.device(device)
        self.decoder = decoder.to(self.device).eval()
        self.generator = generator.to(self.device).eval()
        self.method: Method = method
        self.precision = precision
        self.most = most_in_a_pass(self.device)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        device: torch.device | str = "cpu",
        method: Method = "mmse",
        precision: torch.dtype = torch.float32,
    ) -> "Receiver":
        """Load the channel decoder and the generator. Raises BundleError where one is broken."""
        return cls(
            ChannelDecoder.from_bundle(bundle),
            Generator.from_bundle(bundle),
            device,
            method,
            precision,
        )

    @property
    def uses(self) -> int:
        """Symbols in a message, n."""
        return self.decoder.config.latent // 2

    @torch.inference_mode()
    def decode(self, reception: Reception) -> Tensor:
        """Equalise and decode: the posterior-mean latent w_hat [B, 512].

        Raises InvalidRequest for messages of another length.
        """
        return self._decode([reception])

    def _decode(self, receptions: Sequence[Reception]) -> Tensor:
        """Equalise each in its own way (they may have been told different things), decode all."""
        here = [_to(reception, self.device) for reception in receptions]
        equalised = [equalise(one, self.method) for one in here]  # [B, n], [B] each
        w_hat: Tensor = self.decoder(
            torch.cat([x_hat for x_hat, _ in equalised]),
            torch.cat([snr_db for _, snr_db in equalised]),
            noise_variance_to_snr_db(torch.cat([one.noise_variance for one in here])),
        )
        return w_hat

    @torch.inference_mode()
    def __call__(self, reception: Reception) -> Tensor:
        """Reception of B messages -> images [B, 3, S, S] float32 in [-1, 1]."""
        return self.draw([reception])[0]

    @torch.inference_mode()
    def draw(self, receptions: Sequence[Reception]) -> Sequence[Tensor]:
        """Several receptions -> the images of each, in passes of at most `most` pictures."""
        passes = self._decode(receptions).split(self.most)
        with multiplying_in(self.precision, self.device):
            image = torch.cat([self.generator.synthesis(w_hat) for w_hat in passes])
        counts = [len(reception.y) for reception in receptions]
        return list(torch.split(image.float().clamp(-1, 1), counts))


def _to(reception: Reception, device: torch.device) -> Reception:
    h, pilots = reception.h, reception.pilots
    return Reception(
        y=reception.y.to(device),
        h=None if h is None else h.to(device),
        pilots=None if pilots is None else pilots.to(device),
        noise_variance=reception.noise_variance.to(device),
    )
