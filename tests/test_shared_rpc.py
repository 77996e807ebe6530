"""Real servers in this process: errors, deadlines, limits, queue, health; one more in its own."""

import asyncio
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shared.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    EdscError,
    InvalidRequest,
    PayloadTooLarge,
    Unavailable,
    by_kind,
)
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import (
    ERROR_KIND_KEY,
    REQUEST_ID_KEY,
    Call,
    Server,
    Slot,
    is_serving,
    open_aio_channel,
    open_channel,
    outgoing_metadata,
    streaming,
    translated,
    unary,
    wait_until_serving,
)
from shared.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Probe(edsc_pb2_grpc.ChannelServicer):
    """A servicer whose work is whatever the test puts into `work`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.work: Callable[[Call], None] = lambda call: None
        self.calls: list[Call] = []

    @unary
    def Propagate(self, request: edsc_pb2.PropagateRequest, call: Call) -> edsc_pb2.PropagateReply:
        self.calls.append(call)
        self.server.worker.run(call, lambda: self.work(call))
        return edsc_pb2.PropagateReply(seed=request.seed)


@contextmanager
def probing(**chosen: Any) -> Iterator[tuple[Probe, Any, Settings]]:
    server = Server(Settings(channel_port=0, **chosen), "channel")
    probe = Probe(server)
    edsc_pb2_grpc.add_ChannelServicer_to_server(probe, server.grpc)
    port = server.start()
    server.ready()
    settings = Settings(channel_target=f"127.0.0.1:{port}", max_message_mib=16)
    try:
        with open_channel(settings, "channel") as channel:
            yield probe, edsc_pb2_grpc.ChannelStub(channel), settings
    finally:
        server.drain(0.0)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Probe, Any, Settings]]:
    with probing() as parts:
        yield parts


REQUEST = edsc_pb2.PropagateRequest(seed=3)


def _raises(error: BaseException) -> Callable[[Call], None]:
    def work(call: Call) -> None:
        raise error

    return work


def _waits(event: threading.Event) -> Callable[[Call], None]:
    def work(call: Call) -> None:
        event.wait(5)

    return work


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", sorted(set(by_kind) - {"Cancelled"}))
def test_every_error_arrives_as_it_left(served: tuple[Probe, Any, Settings], kind: str) -> None:
    probe, stub, _ = served
    probe.work = _raises(by_kind[kind]("got 7, expected 5 (naïve “quotes” too)"))
    with pytest.raises(EdscError) as raised, translated("channel"):
        stub.Propagate(REQUEST, timeout=5)
    assert type(raised.value) is by_kind[kind]
    assert str(raised.value) == "got 7, expected 5 (naïve “quotes” too)"


def test_trailers_carry_kind_and_request_id(served: tuple[Probe, Any, Settings]) -> None:
    probe, stub, _ = served
    probe.work = _raises(by_kind["NoFaceFound"]("no face"))
    with pytest.raises(grpc.RpcError) as raised:
        stub.Propagate(REQUEST, timeout=5, metadata=outgoing_metadata("abc-1", "00-aa-bb-01"))
    trailers = {item.key: str(item.value) for item in raised.value.trailing_metadata()}
    assert trailers[ERROR_KIND_KEY] == "NoFaceFound"
    assert trailers[REQUEST_ID_KEY] == "abc-1"
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert probe.calls[-1].traceparent == "00-aa-bb-01"


def test_a_strange_request_id_is_replaced(served: tuple[Probe, Any, Settings]) -> None:
    probe, stub, _ = served
    probe.work = lambda call: None
    stub.Propagate(REQUEST, timeout=5, metadata=((REQUEST_ID_KEY, "a b " + "c" * 300),))
    assert re.fullmatch("[0-9a-f]{32}", probe.calls[-1].request_id)


def test_a_bug_is_told_without_its_insides(served: tuple[Probe, Any, Settings]) -> None:
    probe, stub, _ = served
    probe.work = _raises(KeyError("secret"))
    with pytest.raises(EdscError) as raised, translated("channel"):
        stub.Propagate(REQUEST, timeout=5, metadata=outgoing_metadata("bug-1"))
    assert str(raised.value) == "internal error of the channel, request bug-1"
    probe.work = lambda call: None
    assert stub.Propagate(REQUEST, timeout=5).seed == 3


def test_a_long_message_is_cut_not_lost(served: tuple[Probe, Any, Settings]) -> None:
    probe, stub, _ = served
    probe.work = _raises(InvalidRequest("long " * 5000))
    with pytest.raises(InvalidRequest) as raised, translated("channel"):
        stub.Propagate(REQUEST, timeout=5)
    assert len(str(raised.value)) == 1000


def test_nobody_there_is_unavailable_at_once() -> None:
    settings = Settings(channel_target="127.0.0.1:1")
    start = time.monotonic()
    with (
        open_channel(settings, "channel") as channel,
        pytest.raises(Unavailable),
        translated("channel"),
    ):
        edsc_pb2_grpc.ChannelStub(channel).Propagate(REQUEST, timeout=10)
    assert time.monotonic() - start < 5


def test_metrics_count_codes(served: tuple[Probe, Any, Settings]) -> None:
    probe, stub, _ = served
    probe.work = _raises(Busy("full"))
    with pytest.raises(Busy), translated("channel"):
        stub.Propagate(REQUEST, timeout=5)
    deadline = time.monotonic() + 2
    wanted = 'edsc_requests_total{code="RESOURCE_EXHAUSTED",method="Propagate",service="channel"}'
    while wanted not in (text := probe.server.metrics.text().decode()):
        assert time.monotonic() < deadline, text
    assert 'edsc_rejected_total{reason="Busy",service="channel"}' in text
    assert 'edsc_queue_depth{service="channel"} 0.0' in text


# -------------------------------------------------------------------- deadlines and the queue


def test_the_callers_deadline_ends_the_work(served: tuple[Probe, Any, Settings]) -> None:
    probe, stub, _ = served
    stopped = threading.Event()

    def work(call: Call) -> None:
        while not call.cancelled():
            time.sleep(0.005)
        stopped.set()
        raise Cancelled("nobody waits")

    probe.work = work
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded), translated("channel"):
        stub.Propagate(REQUEST, timeout=0.2)
    assert time.monotonic() - start < 4
    assert stopped.wait(2)
    assert isinstance(probe.calls[-1].gone(), DeadlineExceeded)


def test_a_call_without_a_deadline_gets_one() -> None:
    with probing(default_deadline_s=0.2) as (probe, stub, _):
        free = threading.Event()
        probe.work = _waits(free)
        told = r"the channel was not done in time: Propagate had 0\.2 s"
        with pytest.raises(DeadlineExceeded, match=told), translated("channel"):
            stub.Propagate(REQUEST)
        free.set()


def test_hanging_up_ends_the_work(served: tuple[Probe, Any, Settings]) -> None:
    probe, stub, _ = served
    begun, stopped = threading.Event(), threading.Event()

    def work(call: Call) -> None:
        begun.set()
        while not call.cancelled():
            time.sleep(0.005)
        stopped.set()

    probe.work = work
    future = stub.Propagate.future(REQUEST, timeout=30)
    assert begun.wait(5)
    future.cancel()
    assert stopped.wait(5)
    assert isinstance(probe.calls[-1].gone(), Cancelled)


def test_a_full_queue_is_busy_and_those_who_left_make_room() -> None:
    with probing(queue_size=2) as (probe, stub, _):
        free, begun = threading.Event(), threading.Event()
        done: list[int] = []

        def work(call: Call) -> None:
            begun.set()
            free.wait(10)
            done.append(1)

        def until(waiting: float) -> None:
            deadline = time.monotonic() + 5
            text = f'edsc_queue_depth{{service="channel"}} {waiting}'
            while text not in probe.server.metrics.text().decode():
                assert time.monotonic() < deadline
                time.sleep(0.005)

        probe.work = work
        running = stub.Propagate.future(REQUEST, timeout=30)
        assert begun.wait(5)
        first = stub.Propagate.future(REQUEST, timeout=30)
        until(1.0)
        second = stub.Propagate.future(REQUEST, timeout=30)
        until(2.0)
        with pytest.raises(Busy, match="expected at most 2"), translated("channel"):
            stub.Propagate(REQUEST, timeout=5)
        second.cancel()
        until(1.0)
        third = stub.Propagate.future(REQUEST, timeout=30)
        until(2.0)
        free.set()
        assert [f.result(5).seed for f in (running, first, third)] == [3, 3, 3]
        assert len(done) == 3  # the one that hung up was never served


def test_too_large_a_message_is_refused_and_nothing_breaks() -> None:
    with probing(max_message_mib=1) as (_, stub, _settings):
        large = edsc_pb2.PropagateRequest(frame={"samples": bytes(2 * 2**20)})
        with pytest.raises(PayloadTooLarge, match="larger than max"), translated("channel"):
            stub.Propagate(large, timeout=5)
        assert stub.Propagate(REQUEST, timeout=5).seed == 3


def test_many_callers_one_at_a_time(served: tuple[Probe, Any, Settings]) -> None:
    probe, stub, _ = served
    at_once, most = 0, 0

    def work(call: Call) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.002)
        at_once -= 1

    probe.work = work
    with ThreadPoolExecutor(12) as pool:
        seeds = range(60)
        replies = pool.map(
            lambda s: stub.Propagate(edsc_pb2.PropagateRequest(seed=s), timeout=10).seed, seeds
        )
        assert list(replies) == list(seeds)
    assert most == 1


# --------------------------------------------------------------------------- health, streams


def test_health_lifecycle() -> None:
    server = Server(Settings(channel_port=0), "channel")
    probe = Probe(server)
    edsc_pb2_grpc.add_ChannelServicer_to_server(probe, server.grpc)
    port = server.start()
    settings = Settings(channel_target=f"127.0.0.1:{port}")
    seen: list[int] = []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "edsc.v1.Channel"):
            request = health_pb2.HealthCheckRequest(service=name)
            assert health.Check(request, timeout=5).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=5)
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(Unavailable, match=r"is not up after 0\.2 s"):
            wait_until_serving(settings, "channel", 0.2)

        watch = health.Watch(health_pb2.HealthCheckRequest(service="edsc.v1.Channel"), timeout=20)

        def look() -> None:
            with suppress(grpc.RpcError):  # the server stops
                seen.extend(reply.status for reply in watch)

        watcher = threading.Thread(target=look)
        watcher.start()
        deadline = time.monotonic() + 5  # the first report, or the watch may miss it
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        server.ready()
        wait_until_serving(settings, "channel", 5)

        async def check() -> bool:
            async with open_aio_channel(settings, "channel") as aio_channel:
                return await is_serving(aio_channel, "channel", 5)

        assert asyncio.run(check())
        server.drain(0.2)
        watcher.join(5)
    assert seen == [NOT_SERVING, SERVING, NOT_SERVING]


def test_before_loading_a_slot_is_unavailable() -> None:
    slot: Slot[str] = Slot("receiver")
    with pytest.raises(Unavailable, match="still loading"):
        slot.get()
    slot.put("weights")
    assert slot.get() == "weights"


def test_drain_finishes_what_is_under_way() -> None:
    with probing() as (probe, stub, _):
        begun = threading.Event()

        def work(call: Call) -> None:
            begun.set()
            time.sleep(0.4)

        probe.work = work
        future = stub.Propagate.future(REQUEST, timeout=10)
        assert begun.wait(5)
        assert probe.server.drain(5.0)
        assert future.result(1).seed == 3


class Counting(edsc_pb2_grpc.TransmitterServicer):
    """Streams two events, or an error after the first."""

    def __init__(self, server: Server, fail: bool) -> None:
        self.server = server
        self.fail = fail

    @streaming
    def TransmitStream(
        self, request: edsc_pb2.TransmitRequest, call: Call
    ) -> Iterator[edsc_pb2.TransmitEvent]:
        yield edsc_pb2.TransmitEvent(progress={"stage": "read"})
        if self.fail:
            raise by_kind["NoFaceFound"]("no face")
        yield edsc_pb2.TransmitEvent(reply={"match_steps": 2})


@pytest.mark.parametrize("fail", [False, True])
def test_streams(fail: bool) -> None:
    server = Server(Settings(transmitter_port=0), "transmitter")
    edsc_pb2_grpc.add_TransmitterServicer_to_server(Counting(server, fail), server.grpc)
    settings = Settings(transmitter_target=f"127.0.0.1:{server.start()}")
    server.ready()
    kinds = []
    with open_channel(settings, "transmitter") as channel:
        stub = edsc_pb2_grpc.TransmitterStub(channel)
        try:
            with translated("transmitter"):
                for event in stub.TransmitStream(edsc_pb2.TransmitRequest(), timeout=5):
                    kinds.append(event.WhichOneof("event"))
        except EdscError as error:
            kinds.append(error.kind)
    server.drain(0.0)
    assert kinds == ["progress", "NoFaceFound" if fail else "reply"]


def test_reflection_lists_the_service() -> None:
    with probing() as (_, _stub, settings):
        with grpc.insecure_channel(settings.channel_target) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (reply,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
        names = {service.name for service in reply.list_services_response.service}
    assert names == {
        "edsc.v1.Channel",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_a_taken_port_is_told() -> None:
    with probing() as (_, _stub, settings):
        port = int(settings.channel_target.rpartition(":")[2])
        second = Server(Settings(channel_port=port), "channel")
        with pytest.raises(Unavailable, match=f"cannot bind 127.0.0.1:{port}"):
            second.start()
        second.drain(0.0)


def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    try:
        subprocess.run(
            [
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
                "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                "-keyout", str(key), "-out", str(certificate),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    tls = {"tls_certificate": certificate, "tls_key": key, "tls_ca": certificate}
    with probing(**tls) as (_, plain, settings):
        client = settings.model_copy(update=tls)
        with open_channel(client, "channel") as channel:
            stub = edsc_pb2_grpc.ChannelStub(channel)
            assert stub.Propagate(REQUEST, timeout=10).seed == 3
        with pytest.raises(Unavailable), translated("channel"):
            plain.Propagate(REQUEST, timeout=2)
