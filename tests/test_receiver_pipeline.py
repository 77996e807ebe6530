"""The receiver end to end, on a small untrained bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from channel_sim.channel import Channel, ChannelConfig, channel
from receiver.pipeline import Receiver
from shared.adapters import AdapterConfig, Adapters
from shared.bundle import Bundle, write_net
from shared.errors import BundleError, InvalidRequest
from shared.stylegan2 import Generator, GeneratorConfig, to_sphere

LATENT = 32


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(32, LATENT, LATENT, 1, channels=(8, 8, 8, 8)))
    for net, module in (
        ("generator", generator),
        ("adapters", Adapters(AdapterConfig(latent=LATENT))),
    ):
        write_net(
            tmp_path,
            net,
            config=module.config.to_json(),
            tensors=module.state_dict(),
            provenance={},
        )
    return Bundle.open(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        ChannelConfig("awgn"),
        ChannelConfig("rician", "fast"),
        ChannelConfig("rayleigh", csi="estimated"),
    ],
)
def test_symbols_become_pictures(
    bundle: Bundle, config: ChannelConfig, generator: torch.Generator
) -> None:
    receiver = Receiver.from_bundle(bundle)
    w = to_sphere(torch.randn(2, LATENT, generator=generator))
    symbols = Adapters.from_bundle(bundle).encoder(w, 6.0)
    assert symbols.shape == (2, receiver.uses)
    image = receiver(Channel(config)(symbols, 6.0, generator))
    assert (image.shape, image.dtype) == ((2, 3, 32, 32), torch.float32)
    assert float(image.min()) >= -1
    assert float(image.max()) <= 1


def test_without_noise_the_picture_is_the_one_that_was_sent(
    bundle: Bundle, generator: torch.Generator
) -> None:
    receiver = Receiver.from_bundle(bundle)
    w = to_sphere(torch.randn(1, LATENT, generator=generator))
    symbols = Adapters.from_bundle(bundle).encoder(w, 40.0)
    image = receiver(channel(symbols, 40.0, generator))
    sent = Generator.from_bundle(bundle).synthesis(w).clamp(-1, 1)
    assert float((image - sent).square().mean()) < 1e-3 * float(sent.square().mean())


def test_messages_of_another_length_are_refused(bundle: Bundle, generator: torch.Generator) -> None:
    reception = channel(torch.ones(1, LATENT, dtype=torch.complex64), 6.0, generator)
    with pytest.raises(InvalidRequest, match=r"expected \[B, 16\]"):
        Receiver.from_bundle(bundle)(reception)


def test_a_receiver_needs_a_generator(tmp_path: Path) -> None:
    write_net(tmp_path, "other", config={}, tensors={"a": torch.ones(1)}, provenance={})
    with pytest.raises(BundleError, match="generator"):
        Receiver.from_bundle(Bundle.open(tmp_path))
