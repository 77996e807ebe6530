"""The channel's configuration, shapes, randomness and gradients; its statistics are theory's."""

from __future__ import annotations

import math

import pytest
import torch

from channel_sim.channel import Channel, ChannelConfig, apply_channel, channel
from shared.errors import InvalidRequest
from shared.symbols import normalise_power

X = normalise_power(
    torch.randn(3, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
)
CONFIGS = [
    ChannelConfig("awgn"),
    ChannelConfig("awgn", csi="estimated"),
    ChannelConfig("rayleigh"),
    ChannelConfig("rayleigh", "fast"),
    ChannelConfig("rician", "block", 3.0),
    ChannelConfig("rician", "fast", 3.0),
    ChannelConfig("rician", csi="estimated", pilots=4),
]


# ---- configuration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, "channel is None; expected one of awgn, rayleigh, rician"),
        ({"kind": "nakagami"}, "channel is 'nakagami'"),
        ({"kind": "AWGN"}, "channel is 'AWGN'"),
        ({"fading": "slow"}, "fading is 'slow'; expected one of block, fast"),
        ({"csi": "none"}, "csi is 'none'; expected one of perfect, estimated"),
        ({"k_factor_db": math.nan}, r"k_factor_db is nan; .* -20\.\.40 dB"),
        ({"k_factor_db": math.inf}, "k_factor_db is inf"),
        ({"k_factor_db": -100.0}, "k_factor_db is -100"),
        ({"k_factor_db": 1000}, "k_factor_db is 1000"),
        ({"k_factor_db": "6"}, "k_factor_db is '6'"),
        ({"pilots": 0}, r"pilots is 0; expected a whole number 1\.\.1024"),
        ({"pilots": 2.5}, r"pilots is 2\.5"),
        ({"pilots": 10**6}, "pilots is 1000000"),
        ({"fading": "fast", "csi": "estimated"}, "every use has its own h"),
    ],
)
def test_bad_configurations_name_what_was_got_and_expected(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ChannelConfig(**{"kind": "rician", **change})  # type: ignore[arg-type]


def test_pilots_are_counted_only_where_they_are_sent() -> None:
    assert ChannelConfig("rayleigh").pilot_uses == 0
    assert ChannelConfig("rayleigh", csi="estimated", pilots=4).pilot_uses == 4


# ---- what goes in ---------------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", [math.nan, math.inf, -math.inf, -100.0, 1000.0])
def test_bad_snr_is_refused(snr_db: float, generator: torch.Generator) -> None:
    with pytest.raises(InvalidRequest, match="snr_db is"):
        channel(X, snr_db, generator)
    with pytest.raises(InvalidRequest, match="snr_db is"):
        channel(X, torch.tensor([6.0, snr_db, 6.0]), generator)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(8, dtype=torch.complex64),
        torch.zeros(1, 8),
        torch.zeros(1, 8, dtype=torch.complex128),
        torch.zeros(1, 0, dtype=torch.complex64),
        torch.zeros(1, 2, 4, dtype=torch.complex64),
    ],
)
def test_bad_symbols_are_refused(x: torch.Tensor, generator: torch.Generator) -> None:
    with pytest.raises(InvalidRequest, match=r"expected \[B, n\] complex64"):
        channel(x, 6.0, generator)


def test_one_snr_or_one_per_message(generator: torch.Generator) -> None:
    with pytest.raises(InvalidRequest, match=r"snr_db has shape \[2\]"):
        channel(X, torch.tensor([0.0, 6.0]), generator)
    seed = generator.initial_seed()
    each = channel(X, torch.tensor([-6.0, 0.0, 6.0]), generator.manual_seed(seed))
    for row, snr_db in enumerate((-6.0, 0.0, 6.0)):
        alike = channel(X, snr_db, generator.manual_seed(seed))
        assert torch.equal(each.y[row], alike.y[row])
        assert each.noise_variance[row] == alike.noise_variance[row]


# ---- what comes out -------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_and_types(config: ChannelConfig, generator: torch.Generator) -> None:
    reception = Channel(config)(X, 6.0, generator)
    assert (reception.y.shape, reception.y.dtype) == (X.shape, torch.complex64)
    assert reception.noise_variance.shape == (3,)
    assert reception.noise_variance.dtype == torch.float32
    if config.csi == "estimated":
        assert reception.h is None  # the receiver never sees what it has to estimate
        assert reception.pilots is not None
        assert reception.pilots.shape == (3, config.pilots)
    else:
        assert reception.pilots is None
        assert reception.h is not None
        assert reception.h.shape == ((3, 8) if config.fading == "fast" else (3, 1))
        assert reception.h.dtype == torch.complex64


@pytest.mark.parametrize("config", CONFIGS)
def test_the_seed_decides_and_nothing_else(
    config: ChannelConfig, generator: torch.Generator
) -> None:
    seed = generator.initial_seed()
    torch.manual_seed(1)
    one = Channel(config)(X, 6.0, generator.manual_seed(seed))
    torch.manual_seed(2)
    two = Channel(config)(X, 6.0, generator.manual_seed(seed))
    other = Channel(config)(X, 6.0, generator.manual_seed(seed + 1))
    assert torch.equal(one.y, two.y)
    assert not torch.equal(one.y, other.y)
    before = torch.get_rng_state()
    Channel(config)(X, 6.0, generator)
    assert torch.equal(before, torch.get_rng_state())  # the global state is not touched


def test_the_channel_does_not_change_what_it_is_given(generator: torch.Generator) -> None:
    x = 2 * X  # power 4: the channel passes it on, it does not repair it
    copy = x.clone()
    reception = channel(x, 40.0, generator)
    assert torch.equal(x, copy)
    assert float((reception.y - x).abs().max()) < 0.1


@pytest.mark.parametrize("config", CONFIGS)
def test_gradient_is_the_conjugate_of_the_fading(
    config: ChannelConfig, generator: torch.Generator
) -> None:
    x = X.clone().requires_grad_(True)
    reception = Channel(config)(x, 6.0, generator)
    reception.y.real.sum().backward()
    assert x.grad is not None
    if reception.h is not None:
        assert torch.allclose(x.grad, reception.h.conj().expand_as(x))


def test_draw_and_apply_are_separate(generator: torch.Generator) -> None:
    h = torch.full((3, 1), 2j)
    y = apply_channel(X, h, torch.zeros(3), generator)
    assert torch.equal(y, h * X)


def test_an_empty_batch_is_a_batch(generator: torch.Generator) -> None:
    for config in CONFIGS:
        assert Channel(config)(X[:0], 6.0, generator).y.shape == (0, 8)
