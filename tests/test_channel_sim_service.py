"""The channel process's servicer over real gRPC: what it sends on, and what it refuses."""

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from channel_sim.channel import Channel, ChannelConfig
from channel_sim.service import register
from shared.errors import EdscError, InvalidRequest, PayloadTooLarge
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import Server, open_channel, translated
from shared.settings import Settings
from shared.symbols import normalise_power
from shared.wire import frame_to_wire, reception_from_wire


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    settings = Settings(channel_port=0, channel_target="", max_samples=4096, threads=1)
    server = Server(settings, "channel")
    load = register(server)
    port = server.start()
    server.worker.submit(None, load).result(30)
    server.ready()
    client = settings.model_copy(update={"channel_target": f"127.0.0.1:{port}"})
    with open_channel(client, "channel") as channel:
        yield edsc_pb2_grpc.ChannelStub(channel)
    server.drain(0.0)


def _symbols(messages: int = 1, uses: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(messages, uses, dtype=torch.complex64, generator=generator)  # [B, n]
    return normalise_power(noise)


def _request(**fields: Any) -> edsc_pb2.PropagateRequest:
    given = {"frame": frame_to_wire(_symbols(), 6.0), "snr_db": 6.0, "seed": 7, **fields}
    return edsc_pb2.PropagateRequest(**given)


def _refusal(stub: Any, request: edsc_pb2.PropagateRequest) -> EdscError:
    with pytest.raises(EdscError) as refused, translated("channel"):
        stub.Propagate(request, timeout=5)
    return refused.value


@pytest.mark.parametrize("kind", ["awgn", "rayleigh", "rician"])
@pytest.mark.parametrize("csi", ["perfect", "estimated"])
def test_the_service_is_the_channel(stub: Any, kind: Any, csi: Any) -> None:
    symbols = _symbols(3)
    request = _request(frame=frame_to_wire(symbols, 6.0), channel=kind, csi=csi, seed=11)
    reply = stub.Propagate(request, timeout=5)
    here = Channel(ChannelConfig(kind, csi=csi))(symbols, 6.0, torch.Generator().manual_seed(11))
    there = reception_from_wire(reply.frame)
    assert torch.equal(there.y, here.y)
    assert torch.equal(there.noise_variance, here.noise_variance)
    if csi == "perfect":
        assert here.h is not None
        assert there.h is not None
        assert torch.equal(there.h, here.h)
        assert len(reply.fading_db) == 3
    else:
        assert here.pilots is not None
        assert there.pilots is not None
        assert torch.equal(there.pilots, here.pilots)
        # What the receiver has to estimate is told to nobody.
        assert not reply.frame.csi
        assert not reply.fading_db


def test_same_seed_same_samples_under_concurrent_calls(stub: Any) -> None:
    def propagate(seed: int) -> bytes:
        request = _request(channel="rayleigh", fading="fast", seed=seed)
        return bytes(stub.Propagate(request, timeout=10).frame.SerializeToString())

    alone = [propagate(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(propagate, [seed for _ in range(8) for seed in range(8)]))
    assert together == alone * 8
    assert len(set(alone)) == 8


def test_a_seed_is_drawn_and_told(stub: Any) -> None:
    request = _request()
    request.ClearField("seed")
    first, second = (stub.Propagate(request, timeout=5) for _ in range(2))
    assert first.frame.samples != second.frame.samples
    request.seed = first.seed
    assert stub.Propagate(request, timeout=5).frame.samples == first.frame.samples
    assert first.seed < 2**53  # survives JSON


def test_bandwidth_counts_pilots(stub: Any) -> None:
    plain = stub.Propagate(_request(), timeout=5).cbr
    assert plain.paper == pytest.approx(512 / (3 * 128 * 128))
    assert (plain.uses, plain.pilot_uses) == (256, 0)
    counted = stub.Propagate(_request(csi="estimated", pilots=16), timeout=5).cbr
    assert (counted.uses, counted.pilot_uses) == (272, 16)
    assert counted.complex_uses == pytest.approx(272 / (3 * 128 * 128))


def test_zero_db_and_seed_zero_are_values(stub: Any) -> None:
    reply = stub.Propagate(_request(snr_db=0.0, seed=0), timeout=5)
    assert reply.seed == 0
    assert list(reply.frame.noise_variance) == [1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"snr_db": float("nan")}, "snr_db is nan; expected a finite number in -20..40 dB"),
        ({"snr_db": float("inf")}, "snr_db is inf; expected a finite number in -20..40 dB"),
        ({"snr_db": -100.0}, "snr_db is -100; expected a finite number in -20..40 dB"),
        ({"snr_db": 1000.0}, "snr_db is 1000; expected a finite number in -20..40 dB"),
        ({"snr_db": None}, "snr_db is missing; expected -20..40 dB"),
        ({"channel": "ether"}, "channel is 'ether'; expected one of awgn, rayleigh, rician"),
        ({"fading": "slow"}, "fading is 'slow'; expected one of block, fast"),
        ({"csi": "guessed"}, "csi is 'guessed'; expected one of perfect, estimated"),
        ({"channel": "rician", "k_factor_db": -3.0}, "k_factor_db is -3; expected"),
        ({"channel": "rician", "k_factor_db": float("nan")}, "k_factor_db is nan; expected"),
        ({"csi": "estimated", "pilots": 0}, "pilots is 0; expected a whole number 1..1024"),
        ({"channel": "rayleigh", "fading": "fast", "csi": "estimated"}, "expected 'block'"),
        ({"frame": None}, "frame has 0 messages of 0 uses; expected at least 1 of each"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(stub: Any, fields: dict[str, Any], message: str) -> None:
    error = _refusal(stub, _request(**fields))
    assert type(error) is InvalidRequest
    assert message in str(error)


def _broken(how: str) -> edsc_pb2.SymbolFrame:
    frame = frame_to_wire(_symbols(), 6.0)
    if how == "nan":
        frame.samples = struct.pack("<f", float("nan")) + frame.samples[4:]
    elif how == "power 2":
        frame.samples = torch.view_as_real(_symbols() * 2**0.5).numpy().tobytes()
    elif how == "short":
        frame.samples = frame.samples[:-8]
    elif how == "huge":
        frame.messages = 2**32 - 1
    return frame


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("nan", InvalidRequest, "samples[0] is nan; expected every sample to be finite"),
        ("power 2", InvalidRequest, "message 0 has average power 2; expected 1 within 0.001"),
        ("short", InvalidRequest, "samples is 2040 bytes; expected 2048"),
        ("huge", PayloadTooLarge, "expected at most 4096"),
    ],
)
def test_the_channel_refuses_broken_frames(
    stub: Any, how: str, kind: type[EdscError], message: str
) -> None:
    error = _refusal(stub, _request(frame=_broken(how)))
    assert type(error) is kind
    assert message in str(error)
    # Nothing is lost: the next call is served.
    assert stub.Propagate(_request(), timeout=5).frame.messages == 1


def test_refusal_is_invalid_argument_to_any_client(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.Propagate(_request(channel="ether"), timeout=5)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_describe(stub: Any) -> None:
    told = stub.Describe(edsc_pb2.DescribeChannelRequest(), timeout=5)
    assert [kind.name for kind in told.channels] == ["awgn", "rayleigh", "rician"]
    assert [kind.has_k_factor for kind in told.channels] == [False, False, True]
    assert (told.min_snr_db, told.max_snr_db, told.max_samples) == (-20.0, 40.0, 4096)
