"""The wire border: what goes out comes back the same, and what is wrong does not come in."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.attributes import Attribute, Edit
from shared.errors import InvalidRequest, PayloadTooLarge
from shared.pb import edsc_pb2
from shared.symbols import Cbr, Reception, cbr, normalise_power
from shared.wire import (
    cbr_from_wire,
    cbr_to_wire,
    edit_from_wire,
    edit_to_wire,
    frame_from_wire,
    frame_to_wire,
    reception_from_wire,
    reception_to_wire,
)

counts = st.integers(1, 6)
lengths = st.integers(2, 40)
seeds = st.integers(0, 2**32)


def _noise(messages: int, uses: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(messages, uses, dtype=torch.complex64, generator=generator)  # [B, n]


def _symbols(messages: int = 2, uses: int = 8, seed: int = 1) -> Tensor:
    return normalise_power(_noise(messages, uses, seed))


def _frame() -> edsc_pb2.SymbolFrame:
    return frame_to_wire(_symbols(), 6.0)


def _reception(csi: str = "block") -> Reception:
    return Reception(
        y=_noise(2, 8, 2),
        h=None if csi == "pilots" else _noise(2, 8 if csi == "fast" else 1, 3),
        pilots=_noise(2, 4, 4) if csi == "pilots" else None,
        noise_variance=torch.tensor([0.25, 1.0]),
    )


@given(counts, lengths, seeds, st.floats(-20, 40, width=32))
def test_frame_round_trip(messages: int, uses: int, seed: int, snr_db: float) -> None:
    symbols = _symbols(messages, uses, seed)
    sent = frame_to_wire(symbols, snr_db).SerializeToString()
    back, back_db = frame_from_wire(edsc_pb2.SymbolFrame.FromString(sent))
    assert torch.equal(back, symbols)
    assert back_db == snr_db


@given(counts, lengths, seeds, st.sampled_from(["block", "fast", "pilots"]))
def test_reception_round_trip(messages: int, uses: int, seed: int, csi: str) -> None:
    reception = Reception(
        y=_noise(messages, uses, seed),
        h=None if csi == "pilots" else _noise(messages, uses if csi == "fast" else 1, seed + 1),
        pilots=_noise(messages, 3, seed + 2) if csi == "pilots" else None,
        noise_variance=torch.full((messages,), 0.3),
    )
    sent = reception_to_wire(reception).SerializeToString()
    back = reception_from_wire(edsc_pb2.ReceivedFrame.FromString(sent))
    assert torch.equal(back.y, reception.y)
    assert torch.equal(back.noise_variance, reception.noise_variance)
    for name in ("h", "pilots"):
        was, is_now = getattr(reception, name), getattr(back, name)
        assert (was is None) == (is_now is None)
        assert was is None or torch.equal(was, is_now)


edits = st.sampled_from(Attribute).flatmap(
    lambda attribute: st.one_of(
        st.integers(0, 5).map(lambda target: Edit(attribute, target=target)),
        st.sampled_from([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5]).map(
            lambda change: Edit(attribute, change=change)
        ),
    )
)


@given(edits, st.floats(0, 1, width=32))
def test_edit_round_trip(edit: Edit, confidence: float) -> None:
    assert edit_from_wire(edit_to_wire(edit, confidence)) == (edit, confidence)


@given(st.integers(1, 4096), st.sampled_from([32, 128, 1024]), st.integers(0, 64))
def test_cbr_round_trip(uses: int, size: int, pilots: int) -> None:
    spent: Cbr = cbr(uses, size, size, pilots=pilots)
    message = cbr_to_wire(spent, pilots)
    assert cbr_from_wire(message) == spent
    assert message.pilot_uses == pilots


def test_samples_are_little_endian_interleaved() -> None:
    symbols = torch.tensor([[0.6 + 0.8j, -0.8 + 0.6j]], dtype=torch.complex64)
    frame = frame_to_wire(symbols, 0.0)
    assert frame.samples == struct.pack("<4f", 0.6, 0.8, -0.8, 0.6)
    assert (frame.messages, frame.uses) == (1, 2)


def _with_sample(frame: edsc_pb2.SymbolFrame, value: float) -> edsc_pb2.SymbolFrame:
    frame.samples = struct.pack("<f", value) + frame.samples[4:]
    return frame


def test_nan_sample_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"samples\[0\] is nan; expected every"):
        frame_from_wire(_with_sample(_frame(), float("nan")))
    with pytest.raises(InvalidRequest, match=r"samples\[0\] is inf"):
        frame_from_wire(_with_sample(_frame(), float("inf")))


def test_power_two_is_refused_either_way() -> None:
    doubled = _symbols() * 2**0.5
    with pytest.raises(InvalidRequest, match="message 0 has average power 2; expected 1 within"):
        frame_to_wire(doubled, 6.0)
    frame = _frame()
    frame.samples = torch.view_as_real(doubled).numpy().tobytes()
    with pytest.raises(InvalidRequest, match="message 0 has average power 2; expected 1 within"):
        frame_from_wire(frame)


def test_power_is_per_message_not_per_batch() -> None:
    symbols = _symbols() * torch.tensor([[0.5**0.5], [1.5**0.5]])  # the batch's mean is 1
    with pytest.raises(InvalidRequest, match=r"message 0 has average power 0\.5"):
        frame_to_wire(symbols, 6.0)


@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_wrong_length_is_refused(change: int) -> None:
    frame = _frame()
    frame.samples = (frame.samples + b"\0" * 8)[: len(frame.samples) + change]
    with pytest.raises(InvalidRequest, match=rf"samples is {128 + change} bytes; expected 128"):
        frame_from_wire(frame)


@pytest.mark.parametrize(("messages", "uses"), [(0, 8), (2, 0), (0, 0)])
def test_empty_frame_is_refused(messages: int, uses: int) -> None:
    with pytest.raises(InvalidRequest, match="expected at least 1 of each"):
        frame_from_wire(edsc_pb2.SymbolFrame(messages=messages, uses=uses, snr_db=6.0))


def test_too_many_samples_are_refused_before_they_are_read() -> None:
    frame = edsc_pb2.SymbolFrame(messages=2**31, uses=2**31, snr_db=6.0)
    with pytest.raises(PayloadTooLarge, match="expected at most 16"):
        frame_from_wire(frame, max_samples=16)


@pytest.mark.parametrize("snr_db", [float("nan"), float("inf"), -100.0, 1000.0])
def test_snr_out_of_range_is_refused(snr_db: float) -> None:
    frame = _frame()
    frame.snr_db = snr_db
    with pytest.raises(InvalidRequest, match=r"snr_db is .*expected"):
        frame_from_wire(frame)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_variance_is_checked(value: float) -> None:
    frame = reception_to_wire(_reception())
    frame.noise_variance[1] = value
    with pytest.raises(InvalidRequest, match="noise_variance is"):
        reception_from_wire(frame)


def test_noise_variance_is_one_per_message() -> None:
    frame = reception_to_wire(_reception())
    frame.noise_variance.append(1.0)
    with pytest.raises(InvalidRequest, match="noise_variance has 3 values; expected 2"):
        reception_from_wire(frame)


def test_reception_without_and_with_both_kinds_of_csi_is_refused() -> None:
    frame = reception_to_wire(_reception())
    frame.csi, frame.csi_uses = b"", 0
    with pytest.raises(InvalidRequest, match="either h or pilots; got neither"):
        reception_from_wire(frame)
    both = reception_to_wire(_reception("pilots"))
    both.csi, both.csi_uses = reception_to_wire(_reception()).csi, 1
    with pytest.raises(InvalidRequest, match="either h or pilots; got both"):
        reception_from_wire(both)


@pytest.mark.parametrize("csi_uses", [0, 2, 7, 2**31])
def test_csi_of_the_wrong_length_is_refused(csi_uses: int) -> None:
    frame = reception_to_wire(_reception())
    frame.csi_uses = csi_uses
    with pytest.raises(InvalidRequest, match="expected"):
        reception_from_wire(frame)


def test_unknown_attribute_is_refused() -> None:
    message = edit_to_wire(Edit(Attribute.BEARD, change=2), 0.9)
    message.attribute = "hat"
    with pytest.raises(InvalidRequest, match="attribute is 'hat'; expected one of bangs"):
        edit_from_wire(message)
