"""The schemes on small random nets: what goes where, what is counted, what repeats."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baselines.carriers import COMMANDS, pack_command, unpack_command
from baselines.schemes import Schemes, closed_form
from channel_sim.channel import Channel, ChannelConfig
from receiver.pipeline import Receiver
from shared.adapters import Adapters, LinearCode
from shared.attributes import ATTRIBUTES, Attribute, Edit
from shared.bundle import Bundle
from shared.errors import BundleError, InvalidRequest
from shared.images import encode_png
from shared.schemes import PLANS, Scheme
from shared.stylegan2 import to_sphere
from shared.symbols import Reception, average_power
from transmitter.pipeline import Transmitter

AWGN = Channel(ChannelConfig("awgn"))
SMILE = Edit(Attribute.SMILING, change=2)
ANALOGUE = ("editable-deepsc", "pca-lmmse", "deepsc+edit", "edit+deepsc")


@pytest.fixture(scope="session")
def schemes(baselines_bundle: Path) -> Schemes:
    return Schemes.from_bundle(Bundle.open(baselines_bundle))


@pytest.fixture(scope="module")
def face() -> Tensor:
    draws = torch.Generator().manual_seed(8)
    small = torch.randn(1, 3, 4, 4, generator=draws) * 0.5
    return torch.nn.functional.interpolate(small, 32, mode="bicubic").clamp(-1, 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------- names and commands


def test_every_name_has_a_plan_and_a_sentence() -> None:
    assert set(PLANS) == set(Scheme)
    for scheme, plan in PLANS.items():
        assert plan.scheme is scheme
        assert plan.description
        assert (plan.edit == "after") == scheme.value.endswith("+edit")
        assert (plan.rate is None) == (plan.carrier in ("latent", "deepsc"))
    assert str(PLANS[Scheme.JPEG_EDIT].rate) == "1/3"
    assert str(PLANS[Scheme.EDIT_JPEG_R34].rate) == "3/4"
    assert Scheme.parse("") is Scheme.EDITABLE_DEEPSC
    with pytest.raises(InvalidRequest, match="jpeg2000"):
        Scheme.parse("jpeg2000")


def test_every_edit_and_quality_fits_into_one_byte() -> None:
    edits: list[Edit | None] = [None]
    for attribute in ATTRIBUTES:
        edits += [Edit(attribute, change=c) for c in range(-5, 6) if c]
        edits += [Edit(attribute, target=t) for t in range(6)]
    found = {}
    for quality in ("fast", "balanced", "paper"):
        for edit in edits:
            command = pack_command(edit, quality)
            assert unpack_command(command) == (edit, quality)
            found[command] = (edit, quality)
    assert sorted(found) == list(range(COMMANDS))
    assert COMMANDS <= 256
    with pytest.raises(InvalidRequest, match=str(COMMANDS)):
        unpack_command(COMMANDS)


def test_names_are_looked_up_like_a_mapping(schemes: Schemes) -> None:
    assert list(schemes) == [scheme.value for scheme in Scheme]
    assert len(schemes) == len(Scheme)
    assert "pca-lmmse" in schemes
    assert "jpeg" not in schemes
    assert schemes["pca-lmmse"] is schemes["pca-lmmse"]
    with pytest.raises(InvalidRequest, match="nothing"):
        schemes["nothing"]


def test_a_bundle_without_the_codec_says_which_net_is_missing(random_bundle: Path) -> None:
    with pytest.raises(BundleError, match="deepsc"):
        Schemes.from_bundle(Bundle.open(random_bundle))["deepsc+edit"]


# ------------------------------------------------------------------------------------ the latent's


def test_editable_deepsc_is_what_transmitter_and_receiver_make(
    schemes: Schemes, face: Tensor, baselines_bundle: Path
) -> None:
    bundle = Bundle.open(baselines_bundle)
    transmitter, receiver = Transmitter.from_bundle(bundle), Receiver.from_bundle(bundle)
    scheme = schemes["editable-deepsc"]
    w, _ = schemes.editor.latent(face, SMILE, "fast", snr_db=3.0)
    for config in (ChannelConfig("rayleigh"), ChannelConfig("rician", csi="estimated")):
        symbols = transmitter.channel_encoder(w, 3.0)
        sent = scheme.transmit(face, SMILE, 3.0, "fast")
        assert torch.equal(sent.symbols, symbols)
        reception = Channel(config)(symbols, 3.0, seeded(4))
        assert torch.allclose(scheme.receive(reception).image, receiver(reception), atol=1e-4)


def test_the_closed_form_is_the_code_before_training(generator: torch.Generator) -> None:
    shape = torch.linspace(1.0, -2.0, 64).exp()
    latents = to_sphere(torch.randn(500, 64, generator=generator) * shape)
    config = replace(Adapters().config, latent=64)
    start = Adapters(config, LinearCode.fit(latents))
    trained = Adapters(config, LinearCode.fit(latents))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    back = closed_form(trained)
    with torch.no_grad():
        x = start.encoder(latents[:8], 2.0)
        assert not torch.allclose(trained.encoder(latents[:8], 2.0), x, atol=1e-3)
        assert torch.allclose(back.encoder(latents[:8], 2.0), x, atol=1e-5)
        assert torch.allclose(back.decoder(x, 2.0), start.decoder(x, 2.0), atol=1e-4)


# ------------------------------------------------------------------------------------- every scheme


def check(schemes: Schemes, name: str, face: Tensor) -> None:
    scheme = schemes[name]
    first, again, other = (
        scheme(face, SMILE, 2.0, AWGN, seeded(seed), "fast") for seed in (1, 1, 2)
    )
    assert first.image.shape == first.sent.shape == face.shape
    assert first.image.abs().max() <= 1
    assert torch.equal(first.image, again.image)
    assert (first.ber, first.block_errors) == (again.ber, again.block_errors)
    if first.bits is None:
        assert not torch.equal(first.image, other.image)
        assert (first.ber, first.blocks) == (None, 0)
    else:
        assert first.blocks > 0
        assert first.ber is not None
    assert first.timings_ms["total"] == pytest.approx(
        sum(ms for stage, ms in first.timings_ms.items() if stage != "total")
    )
    sent = scheme.transmit(face, SMILE, 2.0, "fast")
    assert sent.symbols.shape == (1, scheme.uses)
    assert average_power(sent.symbols) == pytest.approx(1.0, abs=1e-4)
    assert first.cbr.uses == scheme.uses
    pilots = scheme(
        face, None, 2.0, Channel(ChannelConfig("rayleigh", csi="estimated")), seeded(1), "fast"
    )
    assert pilots.cbr.uses == scheme.uses + 8
    one = torch.ones(1, 1, dtype=torch.complex64)
    short = Reception(torch.ones(1, 7, dtype=torch.complex64), one, None, torch.ones(1))
    with pytest.raises(InvalidRequest, match=str(scheme.uses)):
        scheme.receive(short)


@pytest.mark.parametrize("name", ANALOGUE)
def test_an_analogue_scheme_keeps_the_rules(schemes: Schemes, name: str, face: Tensor) -> None:
    check(schemes, name, face)


@pytest.mark.slow
@pytest.mark.parametrize("name", [s.value for s in Scheme if PLANS[s].carrier == "jpeg"])
def test_a_digital_scheme_keeps_the_rules(schemes: Schemes, name: str, face: Tensor) -> None:
    check(schemes, name, face)


def test_m1_edits_what_was_received_and_m2_what_is_sent(schemes: Schemes, face: Tensor) -> None:
    after, before = schemes["deepsc+edit"], schemes["edit+deepsc"]
    m1 = after.transmit(face, SMILE, 20.0, "fast")
    m2 = before.transmit(face, SMILE, 20.0, "fast")
    edited, degrees = schemes.editor(face, SMILE, "fast")
    assert m1.degrees.before is None
    assert m2.degrees == degrees
    # What crosses with M1 is the face, with M2 the edited face, but for what the codec does.
    for sent, picture in ((m1, face), (m2, edited)):
        plain = before.carrier.send(picture, None, 20.0, watch()).picture  # type: ignore[attr-defined]
        assert torch.equal(sent.picture, plain)
    reception = AWGN(m1.symbols, 20.0, seeded(3))
    got = after.receive(reception)
    assert got.edit == SMILE
    body = after.carrier.receive(reception, watch()).picture  # type: ignore[attr-defined]
    expected, seen = schemes.editor(body, SMILE, "fast")
    assert torch.equal(got.image, expected)
    assert got.degrees == seen
    assert before.receive(AWGN(m2.symbols, 20.0, seeded(3))).edit is None


def watch() -> object:
    from baselines.editor import Watch

    return Watch()


def test_without_an_edit_the_picture_only_crosses(schemes: Schemes, face: Tensor) -> None:
    for name in ("deepsc+edit", "edit+deepsc"):
        outcome = schemes[name](face, None, 20.0, AWGN, seeded(3), "fast")
        assert outcome.degrees.before is None
        assert "edit" not in outcome.timings_ms
        assert torch.equal(outcome.sent, schemes[name].transmit(face, None, 20.0, "fast").picture)


def test_the_header_of_an_analogue_m1_is_counted(schemes: Schemes) -> None:
    with_header, without = schemes["deepsc+edit"], schemes["edit+deepsc"]
    assert with_header.uses == without.uses + with_header.header_uses
    assert with_header.header_uses == 128
    assert with_header.cbr().paper > without.cbr().paper == pytest.approx(1 / 12)
    assert with_header.cbr_printed == pytest.approx(1 / 12)


@pytest.mark.slow
def test_below_the_cliff_a_jpeg_is_grey_and_above_it_is_flat(
    schemes: Schemes, face: Tensor
) -> None:
    scheme = schemes["jpeg-ldpc+edit"]
    lost = scheme(face, SMILE, -6.0, AWGN, seeded(1), "fast")
    assert not lost.decoded
    assert lost.block_errors == lost.blocks
    assert torch.equal(lost.image, torch.zeros_like(face))
    good = [scheme(face, SMILE, snr, AWGN, seeded(1), "fast") for snr in (6.0, 18.0)]
    assert all(outcome.decoded and outcome.ber == 0 for outcome in good)
    assert torch.equal(good[0].image, good[1].image)
    assert good[0].bits is not None
    assert good[0].bits <= 0.7 * 32 * 32
    assert good[0].cbr_printed == pytest.approx(0.0389, abs=5e-5)


def test_pictures_are_float_in_and_float_out(schemes: Schemes, face: Tensor) -> None:
    outcome = schemes["pca-lmmse"](face, None, 6.0, AWGN, seeded(1), "fast")
    assert outcome.image.dtype == torch.float32
    assert encode_png(outcome.image)
    with pytest.raises(InvalidRequest, match="quality"):
        schemes["pca-lmmse"].transmit(face, None, 6.0, "best")  # type: ignore[arg-type]
