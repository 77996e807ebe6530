"""Bounds against closed forms, and against what channel and code really do."""

import math

import pytest
import torch
from scipy.special import exp1

from channel_sim.fading import ChannelConfig, Kind, draw_fading
from evaluation.bounds import (
    capacity_bits,
    ergodic_capacity_bits,
    gain_cdf,
    gain_quantiles,
    least_snr_db,
    lmmse_left,
    outage_bound,
    rate_distortion_left,
    rate_distortion_over_fading,
)
from shared.errors import InvalidRequest

SNRS_DB = (-6.0, 0.0, 6.0, 12.0, 18.0)


@pytest.mark.parametrize(
    ("snr_db", "bits"), [(-6.0, 83), (0.0, 256), (6.0, 593), (12.0, 1043), (18.0, 1537)]
)
def test_512_reals_carry_this_many_bits(snr_db: float, bits: int) -> None:
    assert capacity_bits(snr_db) == pytest.approx(bits, abs=1)


@pytest.mark.parametrize("snr_db", SNRS_DB)
def test_for_white_latents_linear_coding_meets_the_bound(snr_db: float) -> None:
    white = torch.ones(512)
    expected = 1 / (1 + 10 ** (snr_db / 10))
    assert lmmse_left(white, snr_db) == pytest.approx(expected, rel=1e-6)
    assert rate_distortion_left(white, capacity_bits(snr_db)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("snr_db", SNRS_DB)
def test_for_uneven_latents_linear_coding_is_above_the_bound(snr_db: float) -> None:
    spectrum = torch.exp(-torch.arange(512) / 60.0)
    bound = rate_distortion_left(spectrum, capacity_bits(snr_db))
    assert 0 < bound < lmmse_left(spectrum, snr_db) < 1 / (1 + 10 ** (snr_db / 10))


def test_reverse_water_filling_of_two_components_by_hand() -> None:
    # One bit: theta = 1 leaves the second of variance 1 uncoded and takes R = log2(4)/2 = 1.
    assert rate_distortion_left(torch.tensor([4.0, 1.0]), 1.0) == pytest.approx(2 / 5)
    # Two more bits are shared: theta = 1/4, R = log2(16)/2 + log2(4)/2 = 3.
    assert rate_distortion_left(torch.tensor([1.0, 4.0]), 3.0) == pytest.approx(0.5 / 5)
    assert rate_distortion_left(torch.tensor([4.0, 1.0]), 0.0) == pytest.approx(1.0)


def test_ergodic_capacity_of_rayleigh_is_its_closed_form() -> None:
    for snr_db in SNRS_DB:
        inverse = 10 ** (-snr_db / 10)
        exact = 256 * math.exp(inverse) * exp1(inverse) / math.log(2)
        assert ergodic_capacity_bits(snr_db, "rayleigh") == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("kind", ["rayleigh", "rician"])
def test_law_of_the_gain_is_that_of_the_channel(kind: Kind, generator: torch.Generator) -> None:
    drawn = draw_fading(ChannelConfig(kind, k_factor_db=3.0), 40_000, 1, generator).abs().square()
    for g in (0.1, 0.5, 1.0, 2.0):
        share = float((drawn <= g).double().mean())
        assert gain_cdf(g, kind, 3.0) == pytest.approx(share, abs=0.01)
    assert float(gain_quantiles(kind, 3.0).mean()) == pytest.approx(1, abs=5e-3)


def test_outage_of_rayleigh_is_its_closed_form() -> None:
    # 4-QAM at rate 1/2 is one bit a use: P(log2(1 + g s) < 1) = 1 - e^(-1/s).
    assert outage_bound(100, 100, 6.0, "rayleigh") == pytest.approx(1 - math.exp(-(10**-0.6)))
    assert outage_bound(100, 100, 0.1, "awgn") == 0
    assert outage_bound(100, 100, -0.1, "awgn") == 1
    assert least_snr_db(100, 100) == pytest.approx(0)
    assert outage_bound(100, 100, 6.0, "rician", 40.0) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["rayleigh", "rician"])
def test_fading_leaves_more_than_none(kind: Kind) -> None:
    spectrum = torch.exp(-torch.arange(64) / 20.0)
    for snr_db in SNRS_DB:
        left = lmmse_left(spectrum, snr_db, kind)
        assert lmmse_left(spectrum, snr_db) < left < 1
        assert rate_distortion_over_fading(spectrum, snr_db, kind, uses=32) < left
    white = torch.ones(64)
    gains = gain_quantiles(kind, count=400)
    assert lmmse_left(white, 6.0, kind) == pytest.approx(
        float((1 / (1 + gains * 10**0.6)).mean()), rel=1e-6
    )


def test_bounds_refuse_what_has_none() -> None:
    with pytest.raises(InvalidRequest, match="-1 bits"):
        rate_distortion_left(torch.ones(4), -1)
    with pytest.raises(InvalidRequest, match="variance"):
        rate_distortion_left(torch.tensor([1.0, 0.0]), 3)
    with pytest.raises(InvalidRequest, match="0 uses"):
        outage_bound(3, 0, 0.0, "awgn")
