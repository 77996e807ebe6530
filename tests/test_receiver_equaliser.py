"""The equaliser: its estimates, and that the SNR it promises is the SNR that is there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from channel_sim.channel import Channel, ChannelConfig
from receiver.equaliser import Method, equalise, fading_posterior
from shared.errors import InvalidRequest
from shared.symbols import Reception, normalise_power

CONFIGS = [
    ChannelConfig("awgn"),
    ChannelConfig("rayleigh"),
    ChannelConfig("rayleigh", "fast"),
    ChannelConfig("rician", "fast"),
    ChannelConfig("rayleigh", csi="estimated"),
    ChannelConfig("rayleigh", csi="estimated", pilots=1),
]


def _messages(generator: torch.Generator, rows: int = 4000, uses: int = 64) -> Tensor:
    return normalise_power(torch.randn(rows, uses, dtype=torch.complex64, generator=generator))


def _shrunk_error(x: Tensor, x_hat: Tensor, snr_db: Tensor) -> tuple[Tensor, Tensor]:
    """|x - s x_hat|^2 of every message, s = SNR / (1 + SNR), and what the SNR promises of it."""
    shrink = torch.sigmoid(snr_db.double() * math.log(10) / 10)
    error = (x - shrink[:, None] * x_hat).abs().square().mean(1)
    return error.double(), 1 - shrink


@pytest.mark.parametrize("snr_db", [-6.0, 6.0, 18.0])
@pytest.mark.parametrize("method", ["zf", "mmse"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_promised_snr_is_there(
    config: ChannelConfig, method: Method, snr_db: float, generator: torch.Generator
) -> None:
    """E|x - s x_hat|^2 = 1 / (1 + SNR) on average over fading, noise and pilots."""
    x = _messages(generator)
    x_hat, snr = equalise(Channel(config)(x, snr_db, generator), method)
    error, promised = _shrunk_error(x, x_hat, snr)
    difference = error - promised
    spread = float(difference.std()) / math.sqrt(len(difference))
    assert float(difference.mean()) == pytest.approx(0, abs=4.5 * spread)


@pytest.mark.parametrize("snr_db", [0.0, 12.0])
def test_pilots_over_awgn_cost_little_and_promise_nothing_that_is_not_there(
    snr_db: float, generator: torch.Generator
) -> None:
    """h = 1 is not a draw of the CN(0, 1) that the estimator assumes: it errs on the safe side."""
    x = _messages(generator)
    x_hat, snr = equalise(Channel(ChannelConfig("awgn", csi="estimated"))(x, snr_db, generator))
    error, promised = _shrunk_error(x, x_hat, snr)
    assert 1.0 < float(promised.mean()) / float(error.mean()) < 1.1
    assert float(error.mean()) < 1.25 / (1 + 10 ** (snr_db / 10))


@pytest.mark.parametrize("method", ["zf", "mmse"])
def test_block_fading_snr_is_the_faded_one(method: Method, generator: torch.Generator) -> None:
    x = _messages(generator, rows=100)
    reception = Channel(ChannelConfig("rayleigh"))(x, 6.0, generator)
    assert reception.h is not None
    _, snr_db = equalise(reception, method)
    expected = 6.0 + 20 * torch.log10(reception.h[:, 0].abs())
    assert snr_db == pytest.approx(expected, abs=1e-3)


def test_awgn_passes_unchanged(generator: torch.Generator) -> None:
    reception = Channel(ChannelConfig("awgn"))(_messages(generator, rows=10), -6.0, generator)
    for method in ("zf", "mmse"):
        x_hat, snr_db = equalise(reception, method)
        assert torch.allclose(x_hat, reception.y, rtol=1e-5)
        assert snr_db == pytest.approx(torch.full((10,), -6.0), abs=1e-4)


def test_mmse_gain_is_one_on_average_over_the_message(generator: torch.Generator) -> None:
    h = torch.randn(50, 64, dtype=torch.complex64, generator=generator)
    x = _messages(generator, rows=50)
    noiseless = Reception(y=h * x, h=h, pilots=None, noise_variance=torch.full((50,), 0.25))
    x_hat, _ = equalise(noiseless, "mmse")
    gain = (x_hat / x).real
    assert gain.mean(1) == pytest.approx(torch.ones(50), rel=1e-4)


def test_mmse_beats_zero_forcing_under_fast_fading(generator: torch.Generator) -> None:
    x = _messages(generator)
    reception = Channel(ChannelConfig("rayleigh", "fast"))(x, 6.0, generator)
    errors = {}
    for method in ("zf", "mmse"):
        errors[method], _ = _shrunk_error(x, *equalise(reception, method))
    assert float(errors["mmse"].mean()) < 0.7 * float(errors["zf"].mean())


def test_the_posterior_shrinks_and_its_error_is_what_it_says(generator: torch.Generator) -> None:
    x = torch.ones(100_000, 1, dtype=torch.complex64)
    config = ChannelConfig("rayleigh", csi="estimated", pilots=2)
    seed = generator.initial_seed()
    reception = Channel(config)(x, 0.0, generator.manual_seed(seed))
    truth = Channel(ChannelConfig("rayleigh"))(x, 0.0, generator.manual_seed(seed)).h
    assert truth is not None
    assert reception.pilots is not None
    mean, variance = fading_posterior(reception.pilots, reception.noise_variance)
    assert variance == pytest.approx(torch.full((100_000,), 1 / 3))  # (1/2) / (1 + 1/2)
    error = (truth - mean).abs().square()
    assert float(error.mean()) == pytest.approx(1 / 3, rel=4.5 / math.sqrt(100_000))


@pytest.mark.parametrize("method", ["zf", "mmse"])
def test_a_dead_channel_gives_finite_numbers(method: Method) -> None:
    for h in (torch.zeros(1, 1), torch.tensor([[0.0, 1.0, 0.0, 1e-20]])):
        reception = Reception(
            y=torch.ones(1, 4) + 0j, h=h + 0j, pilots=None, noise_variance=torch.ones(1)
        )
        x_hat, snr_db = equalise(reception, method)
        assert torch.isfinite(torch.view_as_real(x_hat)).all()
        assert torch.isfinite(snr_db).all()


def test_other_methods_are_refused() -> None:
    reception = Reception(
        y=torch.ones(1, 4) + 0j,
        h=torch.ones(1, 1) + 0j,
        pilots=None,
        noise_variance=torch.ones(1),
    )
    with pytest.raises(InvalidRequest, match="equaliser is 'dfe'; expected one of zf, mmse"):
        equalise(reception, "dfe")  # type: ignore[arg-type]
