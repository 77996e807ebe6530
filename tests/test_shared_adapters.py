"""Adapters: exact power, the closed form against theory, training, and the bundle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from channel_sim.channel import Channel, ChannelConfig, channel
from receiver.equaliser import equalise
from shared.adapters import (
    NET,
    PAPER_SNRS_DB,
    AdapterConfig,
    Adapters,
    ChannelDecoder,
    ChannelEncoder,
    LinearCode,
    undo_scale,
    water_fill,
)
from shared.bundle import Bundle, write_net
from shared.errors import BundleError, InvalidRequest
from shared.stylegan2 import to_sphere
from shared.symbols import average_power, noise_variance_to_snr_db, to_real

# The same examples in every run, however busy the machine is.
REPEATABLE = settings(derandomize=True, deadline=None)
SMALL = AdapterConfig(latent=32)
SNRS_DB = (-20.0, -6.0, 0.0, 6.0, 12.0, 18.0, 40.0)


def _latents(rows: int, generator: torch.Generator, columns: int = 512) -> Tensor:
    return to_sphere(torch.randn(rows, columns, generator=generator))


def _coloured(rows: int, generator: torch.Generator, columns: int = 64) -> Tensor:
    """Correlated latents with a mean: a spectrum over 30 dB, turned by a random rotation."""
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    spread = torch.linspace(0, -1.5, columns).mul(math.log(10)).exp()
    draws = torch.randn(rows, columns, generator=generator) * spread
    return to_sphere(draws @ rotation + 0.1)


def _shaken(config: AdapterConfig, seed: int = 0) -> Adapters:
    """Adapters as training leaves them: no layer is zero any more."""
    torch.manual_seed(seed)
    adapters = Adapters(config)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapters.eval().requires_grad_(False)


# ---- power ----------------------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", SNRS_DB)
def test_power_is_exactly_one_for_every_message(snr_db: float, generator: torch.Generator) -> None:
    w = _coloured(20, generator)
    config = AdapterConfig(latent=64)
    for adapters in (
        Adapters(config).requires_grad_(False),
        Adapters(config, LinearCode.fit(_coloured(500, generator))).requires_grad_(False),
        _shaken(config),
        _shaken(AdapterConfig(latent=64, classes_db=PAPER_SNRS_DB)),
        _shaken(AdapterConfig(latent=64, turned=True)),
    ):
        x = adapters.encoder(w, snr_db)
        assert (x.shape, x.dtype) == ((20, 32), torch.complex64)
        assert average_power(x) == pytest.approx(torch.ones(20), rel=1e-5)


def test_a_message_does_not_depend_on_its_neighbours(generator: torch.Generator) -> None:
    w, snrs = _latents(4, generator, 32), torch.tensor([-6.0, 0.0, 6.0, 18.0])
    turned = AdapterConfig(latent=32, turned=True)
    for config in (SMALL, turned, AdapterConfig(latent=32, classes_db=PAPER_SNRS_DB)):
        adapters = _shaken(config)
        together = adapters.encoder(w, snrs)
        decoded = adapters.decoder(together, snrs)
        for row in range(4):
            alone = adapters.encoder(w[row : row + 1], float(snrs[row]))
            assert torch.allclose(together[row : row + 1], alone, atol=1e-5)
            assert torch.allclose(
                decoded[row : row + 1], adapters.decoder(alone, float(snrs[row])), atol=1e-5
            )


# ---- untrained ------------------------------------------------------------------------------


def test_untrained_the_latent_is_sent_as_it_is_and_shrunk(generator: torch.Generator) -> None:
    w = _latents(5, generator)
    x = ChannelEncoder()(w, 6.0)
    assert torch.allclose(math.sqrt(2) * to_real(x), w, atol=1e-5)
    y = channel(x, 6.0, generator).y
    w_hat = ChannelDecoder()(y, 6.0)
    assert torch.allclose(w_hat, math.sqrt(2) * to_real(y) / (1 + 10**-0.6), atol=1e-5)


@pytest.mark.parametrize("snr_db", SNRS_DB)
def test_round_trip_error_is_n0_over_one_plus_n0(snr_db: float, generator: torch.Generator) -> None:
    w = _latents(400, generator)
    adapters = Adapters()
    with torch.no_grad():
        reception = channel(adapters.encoder(w, snr_db), snr_db, generator)
        w_hat = adapters.decoder(*equalise(reception))
    errors = (w_hat - w).square().mean(1).double()
    n0 = 10 ** (-snr_db / 10)
    spread = float(errors.std()) / math.sqrt(len(errors))
    assert float(errors.mean()) == pytest.approx(n0 / (1 + n0), abs=4.5 * spread + 1e-8)


def test_under_block_fading_the_faded_snr_decides(generator: torch.Generator) -> None:
    """Each message loses 1 / (1 + |h|^2 / N0) of its latent."""
    w = _latents(2000, generator)
    adapters = Adapters()
    with torch.no_grad():
        reception = Channel(ChannelConfig("rayleigh"))(adapters.encoder(w, 6.0), 6.0, generator)
        w_hat = adapters.decoder(*equalise(reception))
    assert reception.h is not None
    faded = reception.h[:, 0].abs().square().double() * 10**0.6
    difference = (w_hat - w).square().mean(1).double() - 1 / (1 + faded)
    spread = float(difference.std()) / math.sqrt(len(difference))
    assert float(difference.mean()) == pytest.approx(0, abs=4.5 * spread)


# ---- the closed form ------------------------------------------------------------------------


def _noise(n0: float) -> Tensor:
    return torch.tensor([n0])


@REPEATABLE
@given(spectrum=st.lists(st.floats(0.01, 10), min_size=1, max_size=32), n0=st.floats(0.001, 100.0))
def test_water_filling_spends_the_power_where_it_helps_most(
    spectrum: list[float], n0: float
) -> None:
    lambdas = torch.tensor(sorted(spectrum, reverse=True), dtype=torch.float64)
    power = water_fill(lambdas, _noise(n0).double())[0]
    assert float(power.sum()) == pytest.approx(len(lambdas), rel=1e-5)
    assert float(power.min()) >= 0
    # Optimality (Karush, Kuhn, Tucker): every component with power gains equally from a little
    # more of it, lambda N0 / (p + N0)^2 = const, and none without power would gain more.
    gain = lambdas * n0 / (power + n0) ** 2
    level = gain[0]
    assert gain[power > 0] == pytest.approx(level.expand(int((power > 0).sum())), rel=1e-4)
    assert float(gain[power == 0].max()) <= float(level) * 1.0001 if (power == 0).any() else True


def test_water_filling_white_components_is_even() -> None:
    assert water_fill(torch.ones(8), _noise(0.25)) == pytest.approx(torch.ones(1, 8))


@pytest.mark.parametrize("snr_db", [-6.0, 0.0, 6.0, 12.0])
def test_the_closed_form_meets_its_own_bound(snr_db: float, generator: torch.Generator) -> None:
    """As water-filling predicts, and below LMMSE, although every message has unit power."""
    w = _coloured(3000, generator)
    code = LinearCode.fit(w)
    adapters = Adapters(AdapterConfig(latent=64), code)
    with torch.no_grad():
        reception = channel(adapters.encoder(w, snr_db), snr_db, generator)
        w_hat = adapters.decoder(*equalise(reception))
    left = float((w_hat - w).square().sum() / (w - w.mean(0)).square().sum())
    n0 = 10 ** (-snr_db / 10)
    assert left == pytest.approx(float(code.distortion(_noise(n0))), rel=0.05)
    assert left < 0.8 * n0 / (1 + n0)


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_the_scale_that_the_power_constraint_took_is_found_again(
    shift: float, generator: torch.Generator
) -> None:
    """A few strong components: message powers differ widely, and yet there is no error floor."""
    spread = torch.full((64,), 0.05)
    spread[:4] = 1.0
    w = to_sphere(torch.randn(2000, 64, generator=generator) * spread + shift)
    code = LinearCode.fit(w)
    adapters = Adapters(AdapterConfig(latent=64), code).requires_grad_(False)
    for snr_db in (18.0, 30.0):
        reception = channel(adapters.encoder(w, snr_db), snr_db, generator)
        error = (adapters.decoder(*equalise(reception)) - w).square().sum()
        left = float(error / (w - w.mean(0)).square().sum())
        assert left < 2 * float(code.distortion(_noise(10 ** (-snr_db / 10)))) < 0.01


def test_even_power_needs_no_scale(generator: torch.Generator) -> None:
    moved = torch.randn(5, 64, generator=generator)
    ones = torch.ones(64)
    for noise in (0.001, 0.25, 10.0):
        u = undo_scale(moved, torch.zeros(64), ones, ones.expand(5, 64), torch.full((5, 1), noise))
        assert torch.equal(u, torch.ones(5, 1))


def test_fit_inverts_and_decorrelates(generator: torch.Generator) -> None:
    w = _coloured(1000, generator)
    factor = torch.randn(64, 64, generator=generator)
    for metric in (None, factor @ factor.T / 64 + 0.1 * torch.eye(64)):
        code = LinearCode.fit(w, metric)
        assert torch.allclose(code.analysis @ code.synthesis, torch.eye(64), atol=1e-4)
        s = (w - code.mean) @ code.analysis.T
        covariance = s.T @ s / 999
        assert torch.allclose(covariance, torch.diag(code.spectrum), atol=0.01)
        assert bool((code.spectrum.diff() <= 0).all())
        if metric is not None:  # |A e|^2 = e^T M e with M scaled to unit mean eigenvalue
            e = torch.randn(64, generator=generator)
            scaled = metric / (metric.diagonal().mean())
            assert float((code.analysis @ e).square().sum()) == pytest.approx(
                float(e @ scaled @ e), rel=1e-3
            )


def test_a_metric_puts_the_power_where_the_picture_looks(generator: torch.Generator) -> None:
    w = _latents(2000, generator, 32)
    looked_at = torch.full((32,), 0.1)
    looked_at[:4] = 10.0
    plain = Adapters(SMALL)
    tuned = Adapters(SMALL, LinearCode.fit(w, torch.diag(looked_at)))
    errors = []
    for adapters in (plain, tuned):
        with torch.no_grad():
            y = channel(adapters.encoder(w, 0.0), 0.0, generator).y
            errors.append(((adapters.decoder(y, 0.0) - w).square() * looked_at).mean())
    assert float(errors[1]) < 0.6 * float(errors[0])


def test_fitting_nothing_or_to_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"expected \[N > 1, k\]"):
        LinearCode.fit(torch.zeros(1, 4))
    with pytest.raises(InvalidRequest, match="positive definite"):
        LinearCode.fit(torch.randn(8, 2), torch.diag(torch.tensor([1.0, -1.0])))


def test_the_decoder_follows_the_allocation_of_the_average_snr(
    generator: torch.Generator,
) -> None:
    """Under fading the sender allocates for the average SNR; the receiver must undo that one."""
    w = _coloured(2000, generator)
    adapters = Adapters(AdapterConfig(latent=64), LinearCode.fit(w))
    with torch.no_grad():
        x = adapters.encoder(w, 0.0)
        reception = Channel(ChannelConfig("rayleigh"))(x, 0.0, generator)
        x_hat, snr_db = equalise(reception)
        sent = noise_variance_to_snr_db(reception.noise_variance)
        right = (adapters.decoder(x_hat, snr_db, sent) - w).square().mean()
        wrong = (adapters.decoder(x_hat, snr_db) - w).square().mean()
    assert float(right) < float(wrong)


# ---- networks -------------------------------------------------------------------------------


def test_size_is_the_papers() -> None:
    linears = [
        m
        for m in Adapters(AdapterConfig(classes_db=(6.0,))).modules()
        if isinstance(m, torch.nn.Linear)
    ]
    assert [(m.in_features, m.out_features) for m in linears] == [(512, 512)] * 8
    assert sum(p.numel() for m in linears for p in m.parameters()) == 8 * (512 * 512 + 512)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("classes", [(), PAPER_SNRS_DB])
def test_gradients_reach_every_parameter_through_the_channel(
    classes: tuple[float, ...], turned: bool, generator: torch.Generator
) -> None:
    adapters = (
        _shaken(AdapterConfig(latent=32, classes_db=classes, turned=turned))
        .train()
        .requires_grad_(True)
    )
    snrs = torch.tensor(PAPER_SNRS_DB)
    reception = Channel(ChannelConfig("rayleigh"))(
        adapters.encoder(_latents(5, generator, 32), snrs), snrs, generator
    )
    adapters.decoder(*equalise(reception), snrs).square().mean().backward()
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_the_nearest_class_is_used(generator: torch.Generator) -> None:
    adapters = _shaken(AdapterConfig(latent=32, classes_db=(-6.0, 6.0)))
    # With white components only the residual depends on the SNR, and only through its class.
    w = _latents(1, generator, 32)
    assert torch.equal(adapters.encoder(w, -20.0), adapters.encoder(w, -1.0))
    assert torch.equal(adapters.encoder(w, 1.0), adapters.encoder(w, 40.0))
    assert not torch.equal(adapters.encoder(w, -1.0), adapters.encoder(w, 1.0))


@pytest.mark.parametrize("snr_db", [-80.0, -21.0, 41.0, 90.0])
def test_the_decoder_survives_deep_fades_and_clear_skies(
    snr_db: float, generator: torch.Generator
) -> None:
    adapters = _shaken(SMALL)
    x_hat = adapters.encoder(_latents(2, generator, 32), 0.0) * 10 ** (max(0, -snr_db) / 20)
    w_hat = adapters.decoder(x_hat, snr_db, 0.0)
    assert torch.isfinite(w_hat).all()
    assert float(w_hat.abs().max()) < 100


# ---- bad input ------------------------------------------------------------------------------


def test_latents_and_messages_of_another_shape_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"latent has shape \[1, 30\]; expected \[B, 32\]"):
        ChannelEncoder(SMALL)(torch.ones(1, 30), 6.0)
    with pytest.raises(InvalidRequest, match=r"message has shape \[1, 17\]; expected \[B, 16\]"):
        ChannelDecoder(SMALL)(torch.ones(1, 17) + 0j, 6.0)
    with pytest.raises(InvalidRequest, match="complex64"):
        ChannelDecoder(SMALL)(torch.ones(1, 16), 6.0)
    with pytest.raises(InvalidRequest, match=r"snr_db has shape \[2\]"):
        ChannelEncoder(SMALL)(torch.ones(3, 32), torch.zeros(2))
    with pytest.raises(InvalidRequest, match="even latent"):
        AdapterConfig(latent=31)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_latents_without_direction_are_refused(value: float) -> None:
    with pytest.raises(InvalidRequest, match="message power"):
        ChannelEncoder(SMALL)(torch.full((1, 32), value), 6.0)


@pytest.mark.parametrize("snr_db", [math.nan, math.inf, -100.0, 1000.0])
def test_the_encoder_refuses_bad_snr(snr_db: float) -> None:
    with pytest.raises(InvalidRequest, match="snr_db is"):
        ChannelEncoder(SMALL)(torch.ones(1, 32), snr_db)


# ---- bundle ---------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("classes", [(), PAPER_SNRS_DB])
def test_a_bundle_gives_back_both_ends(
    classes: tuple[float, ...], turned: bool, tmp_path: Path, generator: torch.Generator
) -> None:
    adapters = _shaken(AdapterConfig(latent=32, classes_db=classes, turned=turned))
    config = json.loads(json.dumps(adapters.config.to_json()))
    assert AdapterConfig.from_json(config) == adapters.config
    write_net(tmp_path, NET, config=config, tensors=adapters.state_dict(), provenance={})
    bundle = Bundle.open(tmp_path)
    w = _latents(3, generator, 32)
    x = ChannelEncoder.from_bundle(bundle)(w, 6.0)
    assert torch.allclose(x, adapters.encoder(w, 6.0), atol=1e-2)  # stored as fp16
    decoder = ChannelDecoder.from_bundle(bundle)
    assert torch.allclose(decoder(x, 6.0), adapters.decoder(x, 6.0), atol=3e-2)
    assert not any(p.requires_grad for p in decoder.parameters())
    assert not decoder.training


def test_a_bundle_without_adapters_gives_the_untrained_code(
    tmp_path: Path, generator: torch.Generator
) -> None:
    write_net(tmp_path, "other", config={}, tensors={"a": torch.ones(1)}, provenance={})
    w = _latents(2, generator)
    encoder = ChannelEncoder.from_bundle(Bundle.open(tmp_path))
    assert torch.equal(encoder(w, 6.0), ChannelEncoder()(w, 6.0))


def test_adapters_of_another_size_are_refused(tmp_path: Path) -> None:
    tensors = Adapters(SMALL).state_dict()
    write_net(tmp_path, NET, config=AdapterConfig().to_json(), tensors=tensors, provenance={})
    with pytest.raises(BundleError, match="adapters"):
        ChannelDecoder.from_bundle(Bundle.open(tmp_path))


def test_what_a_decoder_keeps_follows_its_weights() -> None:
    """The product of its matrices is kept between messages, but not beyond a change of them."""
    generator = torch.Generator().manual_seed(8)
    config = AdapterConfig(latent=32, turned=True)
    symbols = to_sphere(torch.randn(3, 32, generator=generator)).view(torch.complex64)
    decoder, other = ChannelDecoder(config), ChannelDecoder(config)
    turned = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    with torch.inference_mode():
        before = decoder(symbols, 6.0)
        torch.testing.assert_close(decoder(symbols, 6.0), before, rtol=0, atol=0)
    with torch.no_grad():
        other.turn.copy_(turned)
        decoder.turn.copy_(turned)
        torch.testing.assert_close(decoder(symbols, 6.0), other(symbols, 6.0), rtol=0, atol=0)
        assert float((decoder(symbols, 6.0) - before).abs().max()) > 0.1
        decoder.load_state_dict(ChannelDecoder(config).state_dict())
        torch.testing.assert_close(decoder(symbols, 6.0), before, rtol=0, atol=0)
    learning = decoder.requires_grad_(True)(symbols, 6.0)
    (slope,) = torch.autograd.grad(learning.square().sum(), decoder.turn)
    assert float(slope.abs().max()) > 0
