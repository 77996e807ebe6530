"""The wire border under bytes that nobody thought of: refused by name, never INTERNAL, no crash.

Three kinds of harm: bytes that are no message, messages with any values in any field, and good
messages with a few bytes turned.
"""

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shared.errors import EdscError
from shared.pb import edsc_pb2
from shared.rpc import ERROR_KIND_KEY, wait_until_serving
from shared.settings import Settings
from shared.symbols import Reception
from shared.wire import (
    edit_from_wire,
    frame_from_wire,
    frame_to_wire,
    reception_from_wire,
    reception_to_wire,
)
from tests.test_gateway_app import png

REFUSED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
}
SYMBOLS = torch.ones(1, 256, dtype=torch.complex64)  # [1, n], power 1
FRAME = frame_to_wire(SYMBOLS, 6.0)
RECEIVED = reception_to_wire(
    Reception(
        y=SYMBOLS, h=torch.ones(1, 1, dtype=torch.complex64), pilots=None,
        noise_variance=torch.ones(1),
    )
)  # fmt: skip
GOOD: dict[str, Any] = {
    "/edsc.v1.Channel/Propagate": edsc_pb2.PropagateRequest(frame=FRAME, snr_db=6.0, seed=1),
    "/edsc.v1.Receiver/Receive": edsc_pb2.ReceiveRequest(frame=RECEIVED),
    "/edsc.v1.Transmitter/Transmit": edsc_pb2.TransmitRequest(
        image=png(), instruction="-", snr_db=6.0, quality="fast", align=False
    ),
    "/edsc.v1.Transmitter/ReadInstruction": edsc_pb2.ReadInstructionRequest(instruction="smile"),
}

floats = st.floats(width=32) | st.sampled_from([0.0, -0.0, 6.0, -20.0, 40.0, math.inf, math.nan])
counts = st.integers(0, 2**32 - 1) | st.integers(0, 300)
samples = st.binary(max_size=64) | st.just(FRAME.samples) | st.just(bytes(8 * 256))
words = st.text(max_size=40) | st.sampled_from(
    ["awgn", "rician", "fast", "block", "estimated", "-"]
)
frames = st.builds(
    edsc_pb2.SymbolFrame,
    samples=samples,
    messages=counts | st.just(1),
    uses=counts | st.just(256),
    snr_db=floats,
)
receptions = st.builds(
    edsc_pb2.ReceivedFrame,
    samples=samples,
    messages=counts | st.just(1),
    uses=counts | st.just(256),
    csi=samples | st.just(bytes(8)),
    csi_uses=counts | st.sampled_from([0, 1, 256]),
    pilots=samples,
    pilot_uses=counts | st.just(8),
    noise_variance=st.lists(floats, max_size=3),
)
ANY: dict[str, st.SearchStrategy[Any]] = {
    "/edsc.v1.Channel/Propagate": st.builds(
        edsc_pb2.PropagateRequest,
        frame=frames,
        channel=words,
        fading=words,
        csi=words,
        k_factor_db=st.none() | floats,
        pilots=st.none() | counts,
        snr_db=st.none() | floats,
        seed=st.none() | st.integers(0, 2**64 - 1),
        image_size=counts,
    ),
    "/edsc.v1.Receiver/Receive": st.builds(edsc_pb2.ReceiveRequest, frame=receptions),
    "/edsc.v1.Transmitter/Transmit": st.builds(
        edsc_pb2.TransmitRequest,
        image=st.binary(max_size=200) | st.just(png()),
        instruction=words | st.just("smile"),
        snr_db=st.none() | floats,
        quality=st.sampled_from(["fast", "", "best", "\0"]),
        align=st.none() | st.booleans(),
        omit_pictures=st.booleans(),
    ),
    "/edsc.v1.Transmitter/ReadInstruction": st.builds(
        edsc_pb2.ReadInstructionRequest, instruction=st.text(max_size=2100)
    ),
}


@st.composite
def turned(draw: Callable[..., Any], data: bytes) -> bytes:
    """A good message with bytes changed, cut off or put in."""
    harmed = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        if not harmed:
            break
        # Lengths and tags stand in front: half of the harm is done there.
        at = draw(st.integers(0, len(harmed) - 1) | st.integers(0, min(40, len(harmed) - 1)))
        how = draw(st.sampled_from(["turn", "cut", "put"]))
        if how == "turn":
            harmed[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del harmed[at : at + draw(st.integers(1, 9))]
        else:
            harmed[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(harmed)


def harm(services: Settings, method: str, examples: int) -> None:
    """`examples` harmful requests to one method."""
    requests = (
        st.binary(max_size=300)
        | ANY[method].map(lambda message: message.SerializeToString())
        | turned(GOOD[method].SerializeToString())
    )
    service: Any = method.split("/")[1].rpartition(".")[2].lower()
    with grpc.insecure_channel(services.target(service)) as channel:
        call: Any = channel.unary_unary(method)  # no codec: bytes go and come as they are

        @given(data=requests)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def one(data: bytes) -> None:
            answer = call.future(data, timeout=20.0)  # waits for the end and raises nothing
            told = f"{answer.code()} {answer.details()}"
            assert answer.code() in REFUSED, told
            if answer.code() is grpc.StatusCode.INVALID_ARGUMENT:
                assert ERROR_KIND_KEY in {item.key for item in answer.trailing_metadata()}, told

        one()
        assert call(GOOD[method].SerializeToString(), timeout=20.0)
    wait_until_serving(services, service, 5.0)


@pytest.mark.parametrize("method", GOOD)
def test_harmful_messages_are_refused(services: Settings, method: str) -> None:
    harm(services, method, examples=25)


@pytest.mark.slow
@pytest.mark.parametrize("method", GOOD)
def test_thousands_of_harmful_messages_are_refused(services: Settings, method: str) -> None:
    harm(services, method, examples=2500)


def test_bytes_that_are_no_message_are_the_callers_fault(services: Settings) -> None:
    with grpc.insecure_channel(services.channel_target) as channel:
        call: Any = channel.unary_unary("/edsc.v1.Channel/Propagate")
        with pytest.raises(grpc.RpcError) as raised:
            call(b"\xff\xff\xff", timeout=5.0)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be decoded" in str(raised.value.details())


@given(data=st.binary(max_size=200), frame=frames, reception=receptions)
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
def test_the_border_raises_only_what_callers_are_told(
    data: bytes, frame: Any, reception: Any
) -> None:
    edit = edsc_pb2.Edit()
    try:
        edit.MergeFromString(data)
    except Exception:
        edit = edsc_pb2.Edit(attribute=data.decode("latin-1"))
    borders: list[tuple[Callable[[Any], object], Any]] = [
        (frame_from_wire, frame),
        (reception_from_wire, reception),
        (edit_from_wire, edit),
    ]
    for read, message in borders:
        try:
            read(message)
        except EdscError:
            continue
