"""The transmitter as one call, on small random nets: what holds whatever the weights."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from receiver.pipeline import Receiver
from shared.batching import Steps, alone
from shared.bundle import Bundle
from shared.errors import BundleError, Cancelled, InvalidRequest, UnsupportedImage
from shared.images import encode_png
from shared.symbols import Reception, average_power, to_real
from shared.telemetry import Metrics
from shared.worker import Worker
from transmitter.editing import Quality
from transmitter.pipeline import INVERSION_STEPS, Transmission, Transmitter


@pytest.fixture(scope="module")
def transmitter(random_bundle: Path) -> Transmitter:
    return Transmitter.from_bundle(Bundle.open(random_bundle))


@pytest.fixture
def photo() -> bytes:
    picture = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return encode_png(picture)


def test_an_unedited_message_has_unit_power_and_no_edit(
    transmitter: Transmitter, photo: bytes
) -> None:
    sent = transmitter.transmit(photo, "-", snr_db=6.0, quality="fast", align=False)
    assert sent.symbols.shape == (1, 256)
    assert sent.symbols.dtype == torch.complex64
    torch.testing.assert_close(average_power(sent.symbols), torch.ones(1))
    assert sent.edit is None
    assert sent.before is None
    assert sent.expected is None
    assert sent.reached is None
    assert sent.faces_found == 0
    assert len(sent.after) == 5
    assert sent.aligned.shape == sent.sent.shape == (1, 3, 32, 32)


def test_what_was_sent_is_shown_as_sent_and_foreseen_as_it_arrives(
    transmitter: Transmitter, photo: bytes
) -> None:
    """The degrees after an edit are those of the picture that will arrive; the picture is not."""
    snr_db = 0.0
    sent = transmitter.transmit(
        photo, "make this person look older", snr_db=snr_db, quality="fast", align=False
    )
    # Untrained adapters send the latent as it is, whose power is that of two numbers a symbol.
    w = math.sqrt(2) * to_real(sent.symbols)
    torch.testing.assert_close(
        sent.sent, transmitter.generator.synthesis(w).clamp(-1, 1), atol=1e-3, rtol=0
    )
    arrived = transmitter.generator.synthesis(transmitter.arrival(snr_db)(w))
    assert float((arrived - sent.sent).abs().max()) > 0.01
    if sent.match_steps:
        scores = transmitter.guide.steady_scores(arrived)
        assert tuple(transmitter.guide.score_degrees(scores)[0].tolist()) == sent.after


def test_the_same_photo_gives_the_same_symbols(transmitter: Transmitter, photo: bytes) -> None:
    runs = [
        transmitter.transmit(photo, "-", snr_db=0.0, quality="balanced", align=False).symbols
        for _ in range(2)
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_bytes_and_pixels_are_the_same_photo(transmitter: Transmitter) -> None:
    square = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    as_bytes = encode_png(square[None].float() / 127.5 - 1)
    symbols = [
        transmitter.transmit(form, "-", snr_db=0.0, quality="fast", align=False).symbols
        for form in (square, as_bytes)
    ]
    torch.testing.assert_close(symbols[0], symbols[1], rtol=1e-4, atol=1e-4)


def test_every_stage_is_timed_and_told(transmitter: Transmitter, photo: bytes) -> None:
    told: list[tuple[str, float]] = []
    sent = transmitter.transmit(
        photo, "-", snr_db=6.0, quality="fast", align=False, progress=lambda *x: told.append(x)
    )
    stages = ["read", "decode", "align", "invert", "edit", "encode", "draw"]
    assert [stage for stage, _ in told] == stages
    assert [fraction for _, fraction in told] == sorted(fraction for _, fraction in told)
    parts = [sent.timings_ms[stage] for stage in stages]
    assert sent.timings_ms["total"] == pytest.approx(sum(parts))


def test_a_caller_who_left_is_not_worked_for(transmitter: Transmitter, photo: bytes) -> None:
    with pytest.raises(Cancelled, match="before read"):
        transmitter.transmit(photo, "-", snr_db=6.0, align=False, cancelled=lambda: True)


def test_an_aligned_picture_must_be_square(transmitter: Transmitter) -> None:
    with pytest.raises(InvalidRequest, match="40 x 30"):
        transmitter.transmit(
            torch.zeros(3, 30, 40, dtype=torch.uint8), "-", snr_db=6.0, align=False
        )


def test_unknown_quality_names_those_there_are(transmitter: Transmitter, photo: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"'best'.*fast, balanced, paper"):
        transmitter.transmit(photo, "-", snr_db=6.0, quality="best")  # type: ignore[arg-type]


def test_bytes_that_are_no_picture_are_refused(transmitter: Transmitter) -> None:
    with pytest.raises(UnsupportedImage):
        transmitter.transmit(b"not a picture at all", "-", snr_db=6.0)


def test_a_bundle_without_a_net_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"format": 1, "name": "x", "nets": {}}')
    with pytest.raises(BundleError, match="no net"):
        Transmitter.from_bundle(Bundle.open(tmp_path))


EDITED = "make the smile bigger"


def test_in_company_a_request_gets_what_it_gets_alone(
    transmitter: Transmitter, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All qualities and sentences at once, which end at different steps, through one worker.

    `paper` takes fewer steps here than its 110: a pass of three rounds otherwise than a pass of
    one, and from some fortieth step on a kink of the network (a leaky ReLU that falls on the other
    side) can make thousandths of that millionth, as it does of a millionth on the photo.
    """
    monkeypatch.setitem(INVERSION_STEPS, "paper", 25)
    orders: list[tuple[str, Quality, float]] = [
        ("-", "fast", 6.0),
        (EDITED, "fast", 0.0),
        ("add eyeglasses", "fast", 12.0),
        (EDITED, "balanced", 6.0),
        ("make this person look older", "paper", -6.0),
        ("-", "balanced", 18.0),
    ]

    def steps(instruction: str, quality: Quality, snr_db: float) -> Steps[Transmission]:
        return transmitter.transmitting(
            photo, instruction, snr_db=snr_db, quality=quality, align=False
        )

    separate = [alone(steps(*order)) for order in orders]
    metrics = Metrics("test")
    worker = Worker(10, metrics, max_batch=8, max_delay_s=1.0)
    try:
        futures = [worker.submit_steps(None, partial(steps, *order)) for order in orders]
        together = [future.result(600) for future in futures]
    finally:
        worker.stop(5.0)
    for mine, other in zip(separate, together, strict=True):
        torch.testing.assert_close(other.symbols, mine.symbols, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other.sent, mine.sent, atol=1e-4, rtol=1e-4)
        fields = ("edit", "before", "expected", "after", "reached", "match_steps", "faces_found")
        for name in fields:
            assert getattr(other, name) == getattr(mine, name), name
    text = metrics.text().decode()
    passes, items = (
        float(
            text.split(f'edsc_batch_size_{what}{{operation="look",service="test"}} ')[1].split()[0]
        )
        for what in ("count", "sum")
    )
    assert items > passes, "nothing was shared"


def test_bfloat16_draws_the_same_picture_to_the_eye(
    random_bundle: Path, transmitter: Transmitter, photo: bytes
) -> None:
    """Both ends: half a grey level of 255 apart on average at most, and its steps descend."""
    bundle = Bundle.open(random_bundle)
    rounded = Transmitter.from_bundle(bundle, precision=torch.bfloat16)
    exact, near = (
        nets.transmit(photo, "-", snr_db=6.0, quality="fast", align=False)
        for nets in (transmitter, rounded)
    )
    assert near.sent.dtype == torch.float32
    assert 0 < float((near.sent - exact.sent).abs().mean()) < 0.5 / 127.5
    descended = rounded.transmit(photo, "-", snr_db=6.0, quality="balanced", align=False)
    errors = [float((sent.sent - sent.aligned).square().mean()) for sent in (near, descended)]
    assert errors[1] < errors[0]
    drawn = [
        Receiver.from_bundle(bundle, precision=precision)(
            Reception(exact.symbols, torch.ones(1, 1, dtype=torch.complex64), None, torch.ones(1))
        )
        for precision in (torch.float32, torch.bfloat16)
    ]
    assert 0 < float((drawn[0] - drawn[1]).abs().mean()) < 0.5 / 127.5
