"""The channel against theory: noise power, fading laws, error rates, pilots, and Sionna.

Every tolerance is a number of standard errors of the estimate (Z of them), and every draw is
seeded, so a failure means a wrong formula and never bad luck.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from channel_sim.channel import Channel, ChannelConfig
from channel_sim.fading import Csi, Fading, Kind, draw_fading
from receiver.equaliser import equalise, estimate_fading
from shared.symbols import Reception, average_power, normalise_power

Z = 4.5
FADINGS: tuple[Fading, ...] = ("block", "fast")
CONFIGS = [
    *(ChannelConfig("rayleigh", fading) for fading in FADINGS),
    *(ChannelConfig("rician", fading, k) for fading in FADINGS for k in (-10.0, 0.0, 6.0, 15.0)),
]
LAWS = [
    pytest.param(config, id=f"{config.kind}-{config.fading}-{config.k_factor_db:g}dB")
    for config in CONFIGS
]


def _draw(config: ChannelConfig, generator: torch.Generator, count: int = 400_000) -> Tensor:
    """About `count` coefficients; four uses a message under fast fading."""
    columns = 4 if config.fading == "fast" else 1
    return draw_fading(config, count // columns, columns, generator)


def _assert_mean(samples: Tensor, expected: float) -> None:
    """The mean of independent rows is `expected`, within Z standard errors."""
    rows = samples.double().flatten(1).mean(1) if samples.ndim > 1 else samples.double()
    error = float(rows.std()) / math.sqrt(len(rows))
    assert float(rows.mean()) == pytest.approx(expected, abs=Z * error + 1e-12)


# ---- noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", [-20.0, -6.0, 0.0, 6.0, 18.0, 40.0])
def test_noise_power_is_n0_per_symbol_and_half_of_it_per_real_dimension(
    snr_db: float, generator: torch.Generator
) -> None:
    x = torch.ones(2000, 100, dtype=torch.complex64)
    reception = Channel(ChannelConfig("awgn"))(x, snr_db, generator)
    noise_variance = 10 ** (-snr_db / 10)
    assert reception.noise_variance == pytest.approx(torch.full((2000,), noise_variance))
    # Through float32 around 1 the noise of 40 dB would lose digits: send silence to measure it.
    silence = Channel(ChannelConfig("awgn"))(0 * x, snr_db, generator).y
    _assert_mean(silence.abs().square(), noise_variance)
    _assert_mean(silence.real.square(), noise_variance / 2)
    _assert_mean(silence.imag.square(), noise_variance / 2)
    _assert_mean(silence.real * silence.imag, 0.0)  # circular: both parts uncorrelated
    _assert_mean(silence.real, 0.0)


def test_measured_snr_is_the_snr_asked_for_whatever_the_fading(
    generator: torch.Generator,
) -> None:
    x = normalise_power(torch.randn(20_000, 16, dtype=torch.complex64, generator=generator))
    for config in (ChannelConfig("awgn"), ChannelConfig("rayleigh"), CONFIGS[-1]):
        reception = Channel(config)(x, 6.0, generator)
        assert reception.h is not None
        signal, noise = reception.h * x, reception.y - reception.h * x
        _assert_mean(signal.abs().square(), 1.0)
        _assert_mean(noise.abs().square(), 10**-0.6)


# ---- fading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", LAWS)
def test_fading_has_unit_power(config: ChannelConfig, generator: torch.Generator) -> None:
    power = _draw(config, generator).abs().square()
    assert float(power.mean()) == pytest.approx(1.0, rel=0.01)
    _assert_mean(power, 1.0)


@pytest.mark.parametrize("config", LAWS)
def test_fading_phase_is_uniform(config: ChannelConfig, generator: torch.Generator) -> None:
    phase = _draw(config, generator)[:, 0].angle()  # one per message: those are independent
    assert _kolmogorov((phase.double() + math.pi) / (2 * math.pi)) < 1.95  # p = .001


@pytest.mark.parametrize("fading", FADINGS)
def test_rayleigh_power_is_exponential(fading: Fading, generator: torch.Generator) -> None:
    power = _draw(ChannelConfig("rayleigh", fading), generator).abs().square()[:, 0].double()
    assert _kolmogorov(1 - torch.exp(-power)) < 1.95  # p = .001


@pytest.mark.parametrize("fading", FADINGS)
@pytest.mark.parametrize("k_factor_db", [-3.0, 0.0, 3.0, 6.0, 9.0, 12.0])
def test_rician_k_factor_by_moments(
    k_factor_db: float, fading: Fading, generator: torch.Generator
) -> None:
    """Var |h|^2 = (1 + 2K) / (1 + K)^2 when E|h|^2 = 1 (Greenstein et al., 1999)."""
    config = ChannelConfig("rician", fading, k_factor_db)
    power = _draw(config, generator).abs().square().double()
    root = math.sqrt(1 - float(power.var()))
    estimate = root / (1 - root)
    assert 10 * math.log10(estimate) == pytest.approx(k_factor_db, abs=0.15)


def test_rician_line_of_sight_keeps_its_phase_within_a_message(
    generator: torch.Generator,
) -> None:
    h = draw_fading(ChannelConfig("rician", "fast", 40.0), 2000, 8, generator)
    turned = (h * h[:, :1].conj()).angle()
    assert float(turned.abs().max()) < 0.1
    assert draw_fading(ChannelConfig("rayleigh"), 5, 8, generator).shape == (5, 1)


def test_fast_fading_is_independent_from_use_to_use(generator: torch.Generator) -> None:
    h = draw_fading(ChannelConfig("rayleigh", "fast"), 50_000, 2, generator)
    product = h[:, 0] * h[:, 1].conj()
    _assert_mean(product.real, 0.0)
    _assert_mean(product.imag, 0.0)


def _kolmogorov(quantiles: Tensor) -> float:
    """sqrt(n) max |F_n - F| for values that should be uniform on 0..1."""
    ordered, count = quantiles.sort().values, len(quantiles)
    rank = torch.arange(1, count + 1, dtype=torch.float64)
    gap = torch.maximum((rank / count - ordered).abs(), (ordered - (rank - 1) / count).abs())
    return math.sqrt(count) * float(gap.max())


# ---- error rates ----------------------------------------------------------------------------


def _qpsk(messages: int, uses: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random bits [messages, 2 uses] and their Gray-mapped symbols at unit power."""
    bits = torch.randint(0, 2, (messages, 2 * uses), generator=generator)
    real, imaginary = (1 - 2.0 * bits).chunk(2, dim=1)
    return bits, torch.complex(real, imaginary) / math.sqrt(2)


def _bit_errors(
    config: ChannelConfig, snr_db: float, generator: torch.Generator, uses: int, messages: int
) -> Tensor:
    bits, x = _qpsk(messages, uses, generator)
    assert float((average_power(x) - 1).abs().max()) < 1e-6
    x_hat, _ = equalise(Channel(config)(x, snr_db, generator))
    decided = torch.cat((x_hat.real, x_hat.imag), dim=1) < 0
    return (decided != (bits == 1)).double()  # [messages, 2 uses]


@pytest.mark.parametrize("snr_db", [-6.0, 0.0, 4.0, 8.0])
def test_qpsk_bit_error_rate_in_awgn(snr_db: float, generator: torch.Generator) -> None:
    """Q(sqrt(Es / N0)): a bit sees Es/2 of the energy and N0/2 of the noise."""
    errors = _bit_errors(ChannelConfig("awgn"), snr_db, generator, 100, 5000)
    expected = 0.5 * math.erfc(math.sqrt(10 ** (snr_db / 10) / 2))
    _assert_mean(errors, expected)


@pytest.mark.parametrize("fading", FADINGS)
@pytest.mark.parametrize("snr_db", [0.0, 6.0, 12.0, 18.0])
def test_qpsk_bit_error_rate_in_rayleigh(
    snr_db: float, fading: Fading, generator: torch.Generator
) -> None:
    """(1 - sqrt(g / (1 + g))) / 2 with g = Eb / N0 = Es / (2 N0) (Proakis, Eq. 14-3-7)."""
    errors = _bit_errors(ChannelConfig("rayleigh", fading), snr_db, generator, 4, 60_000)
    g = 10 ** (snr_db / 10) / 2
    _assert_mean(errors, 0.5 * (1 - math.sqrt(g / (1 + g))))


# ---- estimated CSI --------------------------------------------------------------------------


@pytest.mark.parametrize("pilots", [1, 8, 32])
def test_least_squares_estimate_has_variance_n0_over_pilots(
    pilots: int, generator: torch.Generator
) -> None:
    x = torch.ones(40_000, 1, dtype=torch.complex64)
    seed, noise_variance = generator.initial_seed(), 10**-0.3
    perfect = Channel(ChannelConfig("rayleigh"))(x, 3.0, generator.manual_seed(seed))
    estimated = Channel(ChannelConfig("rayleigh", csi="estimated", pilots=pilots))(
        x, 3.0, generator.manual_seed(seed)
    )
    assert perfect.h is not None
    assert estimated.pilots is not None
    # The same seed gives the same h, hidden under estimated CSI, and the same symbols.
    assert torch.equal(perfect.y, estimated.y)
    h_ls, variance = estimate_fading(estimated.pilots, estimated.noise_variance)
    assert variance == pytest.approx(torch.full((40_000,), noise_variance / pilots))
    _assert_mean((h_ls - perfect.h).abs().square(), noise_variance / pilots)
    _assert_mean((h_ls - perfect.h).real, 0.0)


# ---- randomness -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "csi"), [("awgn", "perfect"), ("rician", "estimated")])
def test_same_seed_same_samples_under_concurrent_threads(kind: Kind, csi: Csi) -> None:
    channel = Channel(ChannelConfig(kind, csi=csi))
    x = normalise_power(
        torch.randn(1, 256, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    )

    def propagate(seed: int) -> Reception:
        return channel(x, 6.0, torch.Generator().manual_seed(seed))

    seeds = [seed % 16 for seed in range(256)]
    alone = [propagate(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(propagate, seeds))
    for seed, reception in zip(seeds, together, strict=True):
        assert torch.equal(reception.y, alone[seed].y)
        if reception.pilots is not None:
            assert torch.equal(reception.pilots, alone[seed].pilots)  # type: ignore[arg-type]
    assert not torch.equal(alone[0].y, alone[1].y)


# ---- an independent implementation ----------------------------------------------------------


@pytest.mark.filterwarnings("default")  # warnings of third-party code at import are its own
def test_awgn_and_flat_fading_agree_with_sionna(generator: torch.Generator) -> None:
    """The same y for the same h without noise; the same distributions of noise, h and y."""
    phy = pytest.importorskip("sionna.phy", reason="sionna-no-rt is not installed")
    from sionna.phy.channel import AWGN, ApplyFlatFadingChannel, FlatFadingChannel

    phy.config.seed = 20240531
    count, noise_variance = 100_000, 10**-0.6
    x = torch.ones(count, 1, dtype=torch.complex64)

    ours = Channel(ChannelConfig("awgn"))(x, 6.0, generator).y[:, 0] - 1
    theirs = torch.as_tensor(AWGN(device="cpu")(x, noise_variance))[:, 0] - 1
    for part in ("real", "imag"):
        assert _two_samples(getattr(ours, part), getattr(theirs, part)) < 1.95  # p = .001

    reception = Channel(ChannelConfig("rayleigh"))(x, 6.0, generator)
    assert reception.h is not None
    y, h = FlatFadingChannel(1, 1, return_channel=True, device="cpu")(x, noise_variance)
    assert _two_samples(reception.h[:, 0].abs(), h[:, 0, 0].abs()) < 1.95
    assert _two_samples(reception.h[:, 0].angle(), h[:, 0, 0].angle()) < 1.95
    assert _two_samples(reception.y[:, 0].abs(), y[:, 0].abs()) < 1.95

    same = ApplyFlatFadingChannel(device="cpu")(x, reception.h[:, :, None])
    assert torch.allclose(same, reception.h * x)


def _two_samples(a: Tensor, b: Tensor) -> float:
    """The two-sample Kolmogorov statistic sqrt(nm / (n + m)) max |F_a - F_b|."""
    a, b = a.double().sort().values, b.double().sort().values
    both = torch.cat((a, b))
    cumulative = [torch.searchsorted(s, both, right=True) / len(s) for s in (a, b)]
    gap = float((cumulative[0] - cumulative[1]).abs().max())
    return math.sqrt(len(a) * len(b) / (len(a) + len(b))) * gap
