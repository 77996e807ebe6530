"""The one border between tensors and protobuf: every `x_to_wire` has its `x_from_wire`.

What comes in is checked for length, finiteness and power before anything is computed, and refused
with both numbers named. What goes out is checked too: a frame that would be refused is never sent.
A complex sample travels as two little-endian float32, real part first: 8 bytes.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from shared.attributes import ATTRIBUTES, MAX_DEGREE, Attribute, Edit
from shared.bundle import Bundle
from shared.errors import InvalidRequest, PayloadTooLarge
from shared.pb import edsc_pb2
from shared.schemes import PLANS, Plan, Scheme
from shared.symbols import Cbr, Reception, average_power, cbr, check_snr_db

BYTES_PER_SAMPLE: Final = 8
POWER_TOLERANCE: Final = 1e-3
DEFAULT_MAX_SAMPLES: Final = 2**20
# N0 at -20..40 dB is 100..0.0001; a factor of 100 on either side is room for a measured one.
NOISE_VARIANCE_MIN: Final = 1e-6
NOISE_VARIANCE_MAX: Final = 1e4


def frame_to_wire(symbols: Tensor, snr_db: float) -> edsc_pb2.SymbolFrame:
    """Symbols for the air.

    symbols: [B, n] complex64, mean |x|^2 = 1 per message. snr_db: -20..40 dB, what was coded for.
    Raises InvalidRequest for anything that `frame_from_wire` would refuse.
    """
    check_snr_db(snr_db)
    _check_power(symbols)
    messages, uses = symbols.shape
    return edsc_pb2.SymbolFrame(
        samples=_to_bytes(symbols), messages=messages, uses=uses, snr_db=snr_db
    )


def frame_from_wire(
    frame: edsc_pb2.SymbolFrame, max_samples: int = DEFAULT_MAX_SAMPLES
) -> tuple[Tensor, float]:
    """(symbols [B, n] complex64, snr_db) of a frame.

    Raises InvalidRequest unless the length is right, every sample finite, the average power of
    every message 1 within 0.001 and the SNR in -20..40 dB; PayloadTooLarge over `max_samples`.
    """
    _check_size(frame.messages, frame.uses, max_samples)
    symbols = _from_bytes("samples", frame.samples, frame.messages, frame.uses)  # [B, n]
    _check_power(symbols)
    check_snr_db(frame.snr_db)
    return symbols, frame.snr_db


def reception_to_wire(reception: Reception) -> edsc_pb2.ReceivedFrame:
    """What the receiver's antenna hands on: y, h or pilots, and N0 of every message."""
    messages, uses = reception.y.shape
    frame = edsc_pb2.ReceivedFrame(
        samples=_to_bytes(reception.y),
        messages=messages,
        uses=uses,
        noise_variance=reception.noise_variance.tolist(),
    )
    if reception.h is not None:
        frame.csi, frame.csi_uses = _to_bytes(reception.h), reception.h.shape[1]
    if reception.pilots is not None:
        frame.pilots, frame.pilot_uses = _to_bytes(reception.pilots), reception.pilots.shape[1]
    return frame


def reception_from_wire(
    frame: edsc_pb2.ReceivedFrame, max_samples: int = DEFAULT_MAX_SAMPLES
) -> Reception:
    """The Reception in a frame.

    Raises InvalidRequest unless every length is right, every sample finite, N0 positive, and
    there is either channel state information or pilots; PayloadTooLarge over `max_samples`.
    """
    messages, uses = frame.messages, frame.uses
    _check_size(messages, max(uses, frame.csi_uses, frame.pilot_uses), max_samples)
    y = _from_bytes("samples", frame.samples, messages, uses)  # [B, n]
    if len(frame.noise_variance) != messages:
        raise InvalidRequest(
            f"noise_variance has {len(frame.noise_variance)} values; expected {messages}, one per"
            " message"
        )
    for value in frame.noise_variance:
        if not NOISE_VARIANCE_MIN <= value <= NOISE_VARIANCE_MAX:  # NaN is refused here as well
            raise InvalidRequest(
                f"noise_variance is {value:g}; expected a number in"
                f" {NOISE_VARIANCE_MIN:g}..{NOISE_VARIANCE_MAX:g}"
            )
    noise_variance = torch.tensor(list(frame.noise_variance), dtype=torch.float32)  # [B]
    h = pilots = None
    if frame.csi or frame.csi_uses:
        h = _from_bytes("csi", frame.csi, messages, frame.csi_uses)  # [B, 1] or [B, n]
    if frame.pilots or frame.pilot_uses:
        pilots = _from_bytes("pilots", frame.pilots, messages, frame.pilot_uses)  # [B, P]
    return Reception(y=y, h=h, pilots=pilots, noise_variance=noise_variance)


def cbr_to_wire(spent: Cbr, pilots: int = 0) -> edsc_pb2.BandwidthRatio:
    """Bandwidth spent on a message; pilots: how many of its uses (count) are pilots."""
    return edsc_pb2.BandwidthRatio(
        paper=spent.paper, complex_uses=spent.complex_uses, uses=spent.uses, pilot_uses=pilots
    )


def cbr_from_wire(message: edsc_pb2.BandwidthRatio) -> Cbr:
    """The same, back."""
    return Cbr(paper=message.paper, complex_uses=message.complex_uses, uses=message.uses)


def edit_to_wire(edit: Edit, confidence: float) -> edsc_pb2.Edit:
    """An edit as read; confidence: probability, 0..1."""
    message = edsc_pb2.Edit(
        attribute=edit.attribute.value,
        direction=edit.direction or "",
        description=edit.describe(),
        confidence=confidence,
    )
    if edit.change is not None:
        message.change = edit.change
    if edit.target is not None:
        message.target = edit.target
    return message


def edit_from_wire(message: edsc_pb2.Edit) -> tuple[Edit, float]:
    """(edit, confidence). InvalidRequest for an attribute or a number that does not exist."""
    if not 0.0 <= message.confidence <= 1.0:
        raise InvalidRequest(f"confidence is {message.confidence:g}; expected 0..1")
    return (
        Edit(
            attribute=Attribute.parse(message.attribute),
            change=message.change if message.HasField("change") else None,
            target=message.target if message.HasField("target") else None,
        ),
        message.confidence,
    )


def degrees_to_wire(
    after: Sequence[int],
    before: Sequence[int] | None = None,
    edit: Edit | None = None,
    expected: int | None = None,
) -> list[edsc_pb2.AttributeDegrees]:
    """Degrees 0..5 of the five attributes, in their order, for a reply.

    before: None where nothing was edited. expected: asked of the edit's attribute.
    """
    found = []
    for attribute in ATTRIBUTES:
        degrees = edsc_pb2.AttributeDegrees(attribute=attribute.value, after=after[attribute.index])
        if before is not None:
            degrees.before = before[attribute.index]
        if edit is not None and expected is not None and edit.attribute is attribute:
            degrees.expected = expected
        found.append(degrees)
    return found


def scheme_to_wire(
    plan: Plan,
    *,
    spent: Cbr | None,
    header_uses: int = 0,
    printed: float | None = None,
    missing: str = "",
) -> edsc_pb2.SchemeDescription:
    """What a process says of a scheme that it carries.

    spent: without pilots; None where the scheme cannot be had, and `missing` says why. printed: the
    paper's figure, if it has one. It goes one way only: a caller reads the message itself.
    """
    return edsc_pb2.SchemeDescription(
        name=plan.scheme.value,
        description=plan.description,
        cbr=None if spent is None else cbr_to_wire(spent),
        header_uses=header_uses,
        printed_cbr=printed,
        missing=missing,
    )


def model_to_wire(
    bundle: Bundle,
    *,
    uses: int,
    image_size: int,
    qualities: Sequence[str] = (),
    schemes: Sequence[edsc_pb2.SchemeDescription] | None = None,
) -> edsc_pb2.ModelDescription:
    """What a process says of its weights.

    uses: complex channel uses per message. image_size: pixels. schemes: what it carries; None for
    Editable-DeepSC alone. It goes one way only: a caller reads the message itself.
    """
    if schemes is None:
        spent = cbr(uses, image_size, image_size)
        plan = PLANS[Scheme.EDITABLE_DEEPSC]
        schemes = (scheme_to_wire(plan, spent=spent, printed=spent.paper),)
    return edsc_pb2.ModelDescription(
        name=bundle.name,
        digest=bundle.digest,
        uses=uses,
        image_size=image_size,
        attributes=[attribute.value for attribute in ATTRIBUTES],
        max_degree=MAX_DEGREE,
        qualities=qualities,
        networks=bundle.nets,
        threads=torch.get_num_threads(),
        schemes=schemes,
    )


def _to_bytes(samples: Tensor) -> bytes:
    if samples.ndim != 2 or samples.dtype != torch.complex64:
        raise InvalidRequest(
            f"samples have shape {list(samples.shape)}, {samples.dtype}; expected [B, n] complex64"
        )
    pairs = torch.view_as_real(samples.detach().resolve_conj()).cpu().contiguous()  # [B, n, 2]
    return pairs.numpy().astype("<f4", copy=False).tobytes()


def _from_bytes(name: str, data: bytes, messages: int, uses: int) -> Tensor:
    if len(data) != messages * uses * BYTES_PER_SAMPLE or not data:
        raise InvalidRequest(
            f"{name} is {len(data)} bytes; expected {messages * uses * BYTES_PER_SAMPLE}"
            f" ({messages} messages x {uses} uses x {BYTES_PER_SAMPLE} bytes), and not 0"
        )
    # The copy is 2 KiB and makes it ours: bytes are read-only, tensors are not.
    floats = np.frombuffer(data, dtype="<f4").astype(np.float32)
    if not np.isfinite(floats).all():
        first = int(np.flatnonzero(~np.isfinite(floats))[0])
        raise InvalidRequest(
            f"{name}[{first // 2}] is {floats[first]}; expected every sample to be finite"
        )
    return torch.view_as_complex(torch.from_numpy(floats).view(messages, uses, 2))  # [B, n]


def _check_size(messages: int, uses: int, max_samples: int) -> None:
    if messages < 1 or uses < 1:
        raise InvalidRequest(
            f"frame has {messages} messages of {uses} uses; expected at least 1 of each"
        )
    if messages * uses > max_samples:
        raise PayloadTooLarge(
            f"frame has {messages * uses} samples; expected at most {max_samples}"
        )


def _check_power(symbols: Tensor) -> None:
    for message, power in enumerate(average_power(symbols).tolist()):
        if not abs(power - 1.0) <= POWER_TOLERANCE:  # written so that a NaN is refused
            told = f"{power:.6g}" if math.isfinite(power) else str(power)
            raise InvalidRequest(
                f"message {message} has average power {told}; expected 1 within {POWER_TOLERANCE:g}"
            )
