"""The order of the hops, against real gRPC servers: what passes, what is told, what is given up."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch

from gateway.answer import ChannelName, Order
from gateway.link import Caller, Link
from receiver.pipeline import Receiver
from shared.bundle import Bundle
from shared.errors import (
    Busy,
    DeadlineExceeded,
    InstructionRefused,
    InvalidRequest,
    Unavailable,
    UnsupportedImage,
)
from shared.images import encode_png
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import FULL_NAMES, GrpcService, Server, unary
from shared.settings import Settings
from shared.wire import frame_from_wire, reception_from_wire

CALLER = Caller("test-1", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


@pytest.fixture(scope="module")
def photo() -> bytes:
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return encode_png(pixels)


FORM = {"instruction": "-", "align": "false"}


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def order(**fields: Any) -> Order:
    return Order("-", **{"align": False, "seed": 7, **fields})


async def edit(link: Link, photo: bytes, what: Order, **options: Any) -> Any:
    try:
        return await link.edit("id", photo, what, caller=CALLER, **options)
    finally:
        await link.close()


class Recorder(grpc.ServerInterceptor):
    """Keeps the metadata and the time left of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str]]] = []

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        metadata = {str(key): str(value) for key, value in details.invocation_metadata}
        self.calls.append((details.method, metadata))
        return continuation(details)


class Forwarder(edsc_pb2_grpc.TransmitterServicer, edsc_pb2_grpc.ChannelServicer):
    """A transmitter and a channel that pass on to the real ones and keep what they saw."""

    def __init__(self, behind: Settings) -> None:
        self.transmitter = grpc.insecure_channel(behind.transmitter_target)
        self.channel = grpc.insecure_channel(behind.channel_target)
        self.sent: list[edsc_pb2.TransmitReply] = []
        self.asked: list[edsc_pb2.PropagateRequest] = []
        self.left_s: list[float] = []
        self.delay_s = 0.0
        self.started = threading.Event()

    def Transmit(self, request: Any, context: Any) -> Any:
        self.started.set()
        time.sleep(self.delay_s)
        reply = edsc_pb2_grpc.TransmitterStub(self.transmitter).Transmit(request, timeout=30)
        # A field of a later version of the contract: whoever decodes and encodes loses it.
        reply.frame.MergeFromString(b"\xfa\x01\x05later")
        self.sent.append(reply)
        return reply

    def Propagate(self, request: Any, context: Any) -> Any:
        self.left_s.append(context.time_remaining())
        self.asked.append(request)
        return edsc_pb2_grpc.ChannelStub(self.channel).Propagate(request, timeout=30)


@pytest.fixture
def forwarder(services: Settings) -> Iterator[tuple[Forwarder, Recorder, Settings]]:
    forwarder, recorder = Forwarder(services), Recorder()
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[recorder])
    edsc_pb2_grpc.add_TransmitterServicer_to_server(forwarder, server)
    edsc_pb2_grpc.add_ChannelServicer_to_server(forwarder, server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    changes = {"transmitter_target": target, "channel_target": target}
    yield forwarder, recorder, services.model_copy(update=changes)
    server.stop(None).wait()
    forwarder.transmitter.close()
    forwarder.channel.close()


def test_frames_pass_through_as_they_came(
    forwarder: tuple[Forwarder, Recorder, Settings], photo: bytes
) -> None:
    seen, _, settings = forwarder
    asyncio.run(edit(Link(settings), photo, order()))
    assert b"later" in seen.sent[0].frame.SerializeToString()
    assert seen.asked[0].frame.SerializeToString() == seen.sent[0].frame.SerializeToString()


def test_every_hop_is_told_who_asks(
    forwarder: tuple[Forwarder, Recorder, Settings], photo: bytes
) -> None:
    _, recorder, settings = forwarder
    asyncio.run(edit(Link(settings), photo, order()))
    told = {method.rpartition("/")[2]: metadata for method, metadata in recorder.calls}
    for method in ("Transmit", "Propagate"):
        assert told[method]["x-request-id"] == CALLER.request_id
        assert told[method]["traceparent"] == CALLER.traceparent


def test_a_hop_gets_the_time_that_is_left(
    forwarder: tuple[Forwarder, Recorder, Settings], photo: bytes
) -> None:
    seen, _, settings = forwarder
    seen.delay_s = 1.0
    asyncio.run(edit(Link(settings, deadline_s=20.0), photo, order()))
    assert seen.left_s[0] < 19.0
    assert seen.left_s[0] > 10.0


def test_the_order_goes_to_the_channel_whole(
    forwarder: tuple[Forwarder, Recorder, Settings], photo: bytes
) -> None:
    seen, _, settings = forwarder
    what = order(channel=ChannelName.RICIAN, k_factor_db=4.0, snr_db=-3.0, seed=2**40)
    done = asyncio.run(edit(Link(settings), photo, what))
    asked = seen.asked[0]
    assert (asked.channel, asked.fading, asked.csi) == ("rician", "block", "perfect")
    assert (asked.k_factor_db, asked.snr_db, asked.seed) == (4.0, -3.0, 2**40)
    assert asked.image_size == 32  # what these weights draw
    assert (done.answer.k_factor_db, done.answer.seed) == (4.0, 2**40)


def test_the_picture_is_what_the_receiver_draws_from_those_symbols(
    forwarder: tuple[Forwarder, Recorder, Settings], photo: bytes, random_bundle: Any
) -> None:
    from channel_sim.channel import channel

    seen, _, settings = forwarder
    done = asyncio.run(edit(Link(settings), photo, order(snr_db=0.0, seed=11)))
    symbols, _ = frame_from_wire(seen.sent[0].frame)
    reception = channel(symbols, 0.0, torch.Generator().manual_seed(11))
    image = Receiver.from_bundle(Bundle.open(random_bundle))(reception)
    assert done.pictures["received"] == encode_png(image)
    assert done.pictures["sent"] == seen.sent[0].sent_png


def test_progress_tells_every_stage_in_order(services: Settings, photo: bytes) -> None:
    told: list[tuple[str, float, float]] = []
    done = asyncio.run(
        edit(Link(services), photo, order(), progress=lambda *news: told.append(news))
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages[0] == "read"
    assert stages[-2:] == ["propagate", "receive"]
    assert all(0.0 <= fraction <= 1.0 for _, fraction, _ in told)
    assert done.answer.timings_ms["total"] >= max(elapsed for _, _, elapsed in told)


def test_timings_add_up(services: Settings, photo: bytes) -> None:
    timings = asyncio.run(edit(Link(services), photo, order())).answer.timings_ms
    parts = sum(ms for name, ms in timings.items() if name != "total")
    assert 0.5 * timings["total"] < parts <= 1.001 * timings["total"]
    assert min(timings.values()) >= 0.0


def test_errors_of_the_services_arrive_as_they_left(services: Settings, photo: bytes) -> None:
    with pytest.raises(UnsupportedImage):
        asyncio.run(edit(Link(services), b"no picture", order()))
    with pytest.raises(InvalidRequest, match="snr_db"):
        asyncio.run(edit(Link(services), photo, order(snr_db=90.0)))
    with pytest.raises(InstructionRefused):
        asyncio.run(edit(Link(services), photo, Order("😀", align=False)))


def test_edits_at_once_do_not_mix(services: Settings, photo: bytes) -> None:
    async def many() -> list[Any]:
        link = Link(services)
        try:
            orders = [order(seed=seed % 4, snr_db=0.0) for seed in range(8)]
            return await asyncio.gather(
                *(link.edit(str(n), photo, o, caller=CALLER) for n, o in enumerate(orders))
            )
        finally:
            await link.close()

    done = asyncio.run(many())
    pictures = [one.pictures["received"] for one in done]
    assert pictures[:4] == pictures[4:]
    assert len(set(pictures)) == 4


# --------------------------------------------------------------------------------- when things fail


class Stuck(edsc_pb2_grpc.ReceiverServicer):
    """A receiver that answers late, and knows when its caller has gone."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.started = threading.Event()
        self.dropped = threading.Event()

    @unary
    def Receive(self, request: Any, call: Any) -> Any:
        call.on_end(self.dropped.set)
        self.started.set()
        for _ in range(2400):
            time.sleep(0.025)
            call.check()
        return edsc_pb2.ReceiveReply()


@pytest.fixture
def stuck(services: Settings) -> Iterator[tuple[Stuck, Settings]]:
    server = Server(Settings(receiver_port=0), "receiver")
    servicer = Stuck(server)
    edsc_pb2_grpc.add_ReceiverServicer_to_server(servicer, server.grpc)
    target = f"127.0.0.1:{server.start()}"
    server.ready()
    yield servicer, services.model_copy(update={"receiver_target": target})
    server.drain(0.0)


def test_a_slow_service_is_given_up_in_time(
    stuck: tuple[Stuck, Settings], services: Settings, photo: bytes
) -> None:
    servicer, settings = stuck
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="receiver"):
        asyncio.run(edit(Link(settings, deadline_s=1.0), photo, order()))
    # The receiver would answer after a minute: that is not waited for, on a busy machine either.
    assert time.monotonic() - start < 30.0
    assert servicer.dropped.wait(30.0), "the receiver should hear that nobody waits"
    asyncio.run(edit(Link(services), photo, order()))  # the next one, with a receiver that works


def test_a_cancelled_edit_cancels_the_call_under_way(
    stuck: tuple[Stuck, Settings], photo: bytes
) -> None:
    servicer, settings = stuck

    async def cancel() -> None:
        task = asyncio.create_task(edit(Link(settings), photo, order()))
        assert await asyncio.to_thread(servicer.started.wait, 10.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert servicer.dropped.wait(30.0)


@contextmanager
def gateway(settings: Settings) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The gateway as a process of its own, in front of `settings`; gives it and its address."""
    targets = {f"EDSC_{n.upper()}_TARGET": settings.target(n) for n in FULL_NAMES}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gateway", "--port", "0"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **targets},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, "http://" + process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_client_that_hangs_up_is_noticed_to_the_last_hop(
    stuck: tuple[Stuck, Settings], photo: bytes, accept: str
) -> None:
    servicer, settings = stuck
    headers = {"accept": accept}
    with gateway(settings) as (_, url):
        with socket.create_connection(address(url)) as connection:
            request = httpx.Request(
                "POST", f"{url}/v1/edits", headers=headers, files={"image": photo}, data=FORM
            )
            head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
            connection.sendall(f"POST /v1/edits HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            assert servicer.started.wait(30.0)
        assert servicer.dropped.wait(30.0)
        assert httpx.get(f"{url}/healthz").status_code == 200


def test_sigterm_lets_the_edit_under_way_end(
    forwarder: tuple[Forwarder, Recorder, Settings], photo: bytes
) -> None:
    seen, _, settings = forwarder
    seen.delay_s = 1.0
    with gateway(settings) as (process, url), ThreadPoolExecutor(1) as pool:
        edit = pool.submit(
            httpx.post, f"{url}/v1/edits", timeout=30.0, data=FORM, files={"image": photo}
        )
        assert seen.started.wait(30.0)
        process.send_signal(signal.SIGTERM)
        assert edit.result(30.0).status_code == 200
        assert process.wait(10.0) == 0


@pytest.mark.parametrize("service", ["transmitter", "channel", "receiver"])
def test_a_service_that_is_down_is_unavailable_in_time(
    services: Settings, photo: bytes, service: GrpcService
) -> None:
    settings = services.model_copy(update={f"{service}_target": "127.0.0.1:9"})
    start = time.monotonic()
    with pytest.raises(Unavailable, match=service):
        asyncio.run(edit(Link(settings), photo, order()))
    assert time.monotonic() - start < 30.0  # half of the deadline, which it need not wait for


def test_a_service_that_is_still_loading_is_unavailable(services: Settings, photo: bytes) -> None:
    server = Server(Settings(receiver_port=0), "receiver")
    target = f"127.0.0.1:{server.start()}"
    settings = services.model_copy(update={"receiver_target": target})
    try:
        start = time.monotonic()
        with pytest.raises(Unavailable, match="receiver"):
            asyncio.run(edit(Link(settings), photo, order()))
        assert time.monotonic() - start < 30.0
    finally:
        server.drain(0.0)


def test_a_service_that_goes_and_comes_back_is_found_again(
    services: Settings, photo: bytes, random_bundle: Any
) -> None:
    import receiver.service

    settings = services.model_copy(update={"receiver_port": 0})
    here = Settings(weights=random_bundle, receiver_port=0)

    def start(settings: Settings) -> tuple[Server, int]:
        server = Server(settings, "receiver")
        load: Callable[[], None] = receiver.service.register(server)
        port = server.start()
        server.worker.submit(None, load).result(60)
        server.ready()
        return server, port

    async def run() -> None:
        server, port = start(here)
        link = Link(settings.model_copy(update={"receiver_target": f"127.0.0.1:{port}"}))
        try:
            first = await link.edit("a", photo, order(), caller=CALLER)
            await asyncio.to_thread(server.drain, 0.0)
            with pytest.raises(Unavailable):
                await link.edit("b", photo, order(), caller=CALLER)
            server, _ = start(here.model_copy(update={"receiver_port": port}))
            for _ in range(200):  # the channel is tried again at most every half second
                await asyncio.sleep(0.1)
                if (await link.health())["receiver"] == "SERVING":
                    break
            again = await link.edit("c", photo, order(), caller=CALLER)
            assert again.pictures == first.pictures
        finally:
            await link.close()
            await asyncio.to_thread(server.drain, 0.0)

    asyncio.run(run())


def test_a_full_queue_is_busy(services: Settings, photo: bytes, random_bundle: Any) -> None:
    import transmitter.service

    settings = Settings(
        transmitter_port=0, weights=random_bundle, queue_size=0, max_batch=1, threads=1
    )
    server = Server(settings, "transmitter")
    load = transmitter.service.register(server)
    port = server.start()
    server.worker.submit(None, load).result(60)
    server.ready()
    link_settings = services.model_copy(update={"transmitter_target": f"127.0.0.1:{port}"})

    async def many() -> list[Any]:
        link = Link(link_settings)
        try:
            calls = (link.edit(str(n), photo, order(), caller=CALLER) for n in range(6))
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await link.close()

    results = asyncio.run(many())
    server.drain(0.0)
    assert any(isinstance(result, Busy) for result in results)
    assert any(not isinstance(result, Exception) for result in results)
    assert all(isinstance(r, Busy) or not isinstance(r, Exception) for r in results), results


def test_different_weights_at_the_two_ends_are_told(services: Settings) -> None:
    class Other(edsc_pb2_grpc.ReceiverServicer):
        def Describe(self, request: Any, context: Any) -> Any:
            return edsc_pb2.ModelDescription(name="other", digest="0" * 64)

    server = grpc.server(ThreadPoolExecutor(2))
    edsc_pb2_grpc.add_ReceiverServicer_to_server(Other(), server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    async def ask() -> Any:
        link = Link(services.model_copy(update={"receiver_target": target}))
        try:
            return await link.model(caller=CALLER)
        finally:
            await link.close()

    with pytest.raises(Exception, match="expected the same"):
        asyncio.run(ask())
    server.stop(None).wait()


def test_what_the_receiver_gets_is_no_secret_of_the_transmitter(
    forwarder: tuple[Forwarder, Recorder, Settings], photo: bytes
) -> None:
    """The frame that crosses has y, what is known of the fading and N0, and nothing else."""
    seen, _, settings = forwarder
    asyncio.run(edit(Link(settings), photo, order()))
    reply = edsc_pb2_grpc.ChannelStub(seen.channel).Propagate(seen.asked[0], timeout=10)
    fields = {field.name for field, _ in reply.frame.ListFields()}
    assert fields <= {"samples", "messages", "uses", "csi", "csi_uses", "noise_variance"}
    assert reception_from_wire(reply.frame).y.shape == (1, 256)
