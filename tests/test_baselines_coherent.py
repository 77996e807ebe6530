"""4-QAM, soft bits, equalising and the header: closed forms, brute force, and the real receiver."""

import math

import pytest
import torch

import receiver.equaliser
from baselines.coherent import (
    HEADER_USES,
    equalise,
    header_symbols,
    matched_filter,
    part,
    qam4,
    read_header,
    soft_bits,
)
from channel_sim.channel import Channel, ChannelConfig
from shared.errors import InvalidRequest
from shared.symbols import Reception, average_power, snr_db_to_noise_variance

CONFIGS = [
    ChannelConfig("awgn"),
    ChannelConfig("rayleigh"),
    ChannelConfig("rician", "fast"),
    ChannelConfig("rayleigh", csi="estimated", pilots=4),
]


def random_bits(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (1, count), generator=generator).float()


def test_4qam_is_the_standards_constellation() -> None:
    """3GPP 38.211 5.1.3: 00, 01, 10, 11 in this order."""
    bits = torch.tensor([[0.0, 0, 0, 1, 1, 0, 1, 1]])
    root = math.sqrt(0.5)
    expected = torch.tensor([[1 + 1j, 1 - 1j, -1 + 1j, -1 - 1j]]) * root
    assert torch.allclose(qam4(bits), expected.to(torch.complex64))
    assert average_power(qam4(bits)) == pytest.approx(1.0)
    with pytest.raises(InvalidRequest, match="2n"):
        qam4(torch.zeros(1, 3))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_soft_bits_have_the_sign_of_the_bits(
    config: ChannelConfig, generator: torch.Generator
) -> None:
    bits = random_bits(2000, generator)
    reception = Channel(config)(qam4(bits), 30.0, generator)
    decided = (soft_bits(reception) < 0).float()  # ln p(0) / p(1): negative says 1
    assert (decided != bits).float().mean() < 0.01


def test_soft_bits_are_the_ratio_of_the_likelihoods(generator: torch.Generator) -> None:
    """Against p(y | x) of all four points, with a fading coefficient for every use."""
    y, h = (torch.randn(1, 50, dtype=torch.complex64, generator=generator) for _ in range(2))
    noise = 0.7
    found = soft_bits(Reception(y, h, None, torch.tensor([noise])))
    points = {(a, b): qam4(torch.tensor([[float(a), float(b)]])) for a in (0, 1) for b in (0, 1)}
    likelihood = {
        bits: torch.exp(-(y - h * x).abs().double().square() / noise) for bits, x in points.items()
    }
    for index in (0, 1):
        zero, one = (
            torch.stack([p for bits, p in likelihood.items() if bits[index] == value]).sum(0)
            for value in (0, 1)
        )
        assert torch.allclose(found[:, index::2].double(), torch.log(zero / one), atol=1e-3)


def test_soft_bits_grow_with_the_fadings_power() -> None:
    """The same direction, twice the amplitude: y = h x and L ~ |h|^2, so four times the ratio."""
    x = qam4(torch.tensor([[0.0, 1.0]]))
    ratios = []
    for gain in (0.5, 1.0):
        h = torch.tensor([[gain * (0.6 + 0.8j)]])
        ratios.append(soft_bits(Reception(h * x, h, None, torch.tensor([0.3]))))
    assert torch.allclose(4 * ratios[0], ratios[1])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equalising_is_what_the_receiver_does(
    config: ChannelConfig, generator: torch.Generator
) -> None:
    bits = random_bits(600, generator)
    reception = Channel(config)(qam4(bits), 3.0, generator)
    ours, theirs = equalise(reception), receiver.equaliser.equalise(reception)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    assert torch.allclose(ours[1], theirs[1], atol=1e-4)


def test_fewer_pilots_mean_more_noise(generator: torch.Generator) -> None:
    x = qam4(random_bits(20, generator))
    variances = []
    for pilots in (2, 64):
        config = ChannelConfig("rayleigh", csi="estimated", pilots=pilots)
        reception = Channel(config)(x, 0.0, generator)
        variances.append(float(matched_filter(reception)[2]))
    expected = [1 + (1 / p) / (1 + 1 / p) for p in (2, 64)]  # N0 + Var[h | pilots], N0 = 1
    assert variances == pytest.approx(expected)


def test_every_header_comes_through_at_minus_6_db() -> None:
    channel = Channel(ChannelConfig("awgn"))
    for value in range(256):
        symbols = header_symbols(value)
        assert symbols.shape == (1, HEADER_USES)
        assert average_power(symbols) == pytest.approx(1.0)
        draws = torch.Generator().manual_seed(value)
        assert read_header(channel(symbols, -6.0, draws)) == value
    with pytest.raises(InvalidRequest, match="256"):
        header_symbols(256)


def test_header_errors_keep_to_the_union_bound() -> None:
    """At -12 dB the bound 254 Q(sqrt(128 Es/N0)) is 0.58; nobody should do worse than it says."""
    channel, draws = Channel(ChannelConfig("awgn")), torch.Generator().manual_seed(5)
    energy = HEADER_USES / snr_db_to_noise_variance(-12.0)
    bound = 254 * 0.5 * math.erfc(math.sqrt(energy / 2))
    wrong = [
        read_header(channel(header_symbols(v % 256), -12.0, draws)) != v % 256 for v in range(400)
    ]
    assert sum(wrong) / len(wrong) < bound
    assert sum(wrong) > 0  # the noise is real


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_part_of_a_message_keeps_its_csi(
    config: ChannelConfig, generator: torch.Generator
) -> None:
    header, body = header_symbols(77), qam4(random_bits(400, generator))
    reception = Channel(config)(torch.cat((header, body), dim=1), 20.0, generator)
    assert read_header(part(reception, 0, HEADER_USES)) == 77
    rest = part(reception, HEADER_USES, HEADER_USES + 200)
    whole = soft_bits(reception)[:, 2 * HEADER_USES :]
    assert torch.equal(soft_bits(rest), whole)
