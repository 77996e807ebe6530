"""`edsc up --engine ray`: the three services as Ray Serve deployments behind the one gRPC contract.

::

    gateway --gRPC--> Front ---- Serve handle ----> Replica 1..N, on any machine of the cluster
    (unchanged)       this process, bytes only      the service as it always is: servicer, pipeline,
                                                    worker, limits, deadlines, batches

Serve places the replicas, shares the calls among them, watches their health and starts what died
again. A replica holds a whole service on a port that only it uses, so nothing of a service knows
that it runs here. The front decodes nothing: a message that comes in is handed over as it is, with
its metadata and the time it has left, and what comes back, errors too, goes out as it is.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from edsc.cluster import connected
from shared.errors import Busy, EdscError, Unavailable
from shared.pb import edsc_pb2
from shared.rpc import (
    ERROR_KIND_KEY,
    FULL_NAMES,
    GrpcService,
    Server,
    open_aio_channel,
    wait_until_serving,
)
from shared.settings import MIB, Settings
from shared.telemetry import logger

# The schemes compared with are not among them: their process is for evaluation.
SERVICES: Final[tuple[GrpcService, ...]] = tuple(FULL_NAMES)
# CPUs that Serve sets aside for a replica. The channel hardly computes.
CPUS: Final[Mapping[GrpcService, float]] = {"transmitter": 1.0, "channel": 0.1, "receiver": 0.5}
START_S: Final = 300.0  # weights on every machine, from a cold disk
LOOK_S: Final = 0.5  # between two looks at the health of the deployments
_KIND_OF_SERVICE: Final = {full.rpartition(".")[2]: name for name, full in FULL_NAMES.items()}
Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Answer:
    """What a replica's own server answered: bytes, or a status; plain values, to be pickled."""

    body: bytes = b""
    code: str = "OK"
    details: str = ""
    trailing: Metadata = ()


def _refusal(error: grpc.aio.AioRpcError) -> Answer:
    trailing = tuple((key, value) for key, value in error.trailing_metadata())
    return Answer(b"", error.code().name, error.details() or "", trailing)


class Replica:
    """One replica of a service, in a Serve actor. Raises EdscError while it cannot start."""

    def __init__(self, service: GrpcService, settings: Settings) -> None:
        from channel_sim.service import register as channel
        from receiver.service import register as receiver
        from transmitter.service import register as transmitter

        registers: dict[GrpcService, Callable[[Server], Callable[[], None]]] = {
            "transmitter": transmitter,
            "channel": channel,
            "receiver": receiver,
        }
        self._server = Server(settings, service)
        load = registers[service](self._server)
        target = f"127.0.0.1:{self._server.start()}"
        self._server.worker.submit(None, load).result(START_S)
        self._server.ready()
        self._service: GrpcService = service
        self._settings = settings.model_copy(update={f"{service}_target": target})
        self._channel: grpc.aio.Channel | None = None

    def _to(self) -> grpc.aio.Channel:
        if self._channel is None:  # opened inside the event loop that uses it
            self._channel = open_aio_channel(self._settings, self._service)
        return self._channel

    async def unary(
        self, method: str, body: bytes, metadata: Metadata, timeout_s: float | None
    ) -> Answer:
        """One call. Cancelled when the caller goes away, and then so is the work."""
        call: Any = self._to().unary_unary(method)
        try:
            return Answer(await call(body, timeout=timeout_s, metadata=metadata))
        except grpc.aio.AioRpcError as error:
            return _refusal(error)

    async def stream(
        self, method: str, body: bytes, metadata: Metadata, timeout_s: float | None
    ) -> AsyncIterator[Answer]:
        """One call that is answered with a stream; a status other than OK comes last."""
        call: Any = self._to().unary_stream(method)
        try:
            async for part in call(body, timeout=timeout_s, metadata=metadata):
                yield Answer(part)
        except grpc.aio.AioRpcError as error:
            yield _refusal(error)

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.drain(0.0)


def deploy(
    serve: Any, settings: Settings, replicas: Mapping[GrpcService, int]
) -> dict[GrpcService, Any]:
    """Run the three services on the connected cluster; gives their Serve handles once they serve.

    Raises Unavailable for one that does not come up.
    """
    # Replicas listen for themselves alone, without TLS: between machines it is Ray that speaks.
    inside = settings.model_copy(
        update={
            "host": "127.0.0.1",
            **{f"{name}_port": 0 for name in SERVICES},
            **{f"tls_{name}": None for name in ("certificate", "key", "ca")},
        }
    )
    # Room for what the replica's own bounded queue may hold: it is that one which refuses.
    most = settings.queue_size + 16
    targets = []
    for service in SERVICES:
        deployment = serve.deployment(
            Replica,
            name=service,
            num_replicas=replicas.get(service, 1),
            max_ongoing_requests=most,
            max_queued_requests=most,
            ray_actor_options={"num_cpus": CPUS[service]},
        )
        bound = deployment.bind(service, inside)
        targets.append(serve.RunTarget(bound, name=f"edsc-{service}", route_prefix=None))
    try:
        handles = serve.run_many(targets)  # they load side by side
    except Exception as error:
        raise Unavailable(f"the services do not start on the cluster: {error}") from error
    return dict(zip(SERVICES, handles, strict=True))


class Front:
    """The gRPC server that stands for all three services. Use as a context manager.

    handles: of the deployments. states: gives the services that serve now; asked twice a second.
    explain: an error of the cluster in our own words.
    """

    def __init__(
        self,
        handles: Mapping[GrpcService, Any],
        states: Callable[[], Mapping[GrpcService, bool]],
        settings: Settings,
        explain: Callable[[GrpcService, Exception], EdscError],
    ) -> None:
        self.port = 0
        self._handles, self._states, self._settings = handles, states, settings
        self._explain = explain
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="front", daemon=True)
        self._health = health.aio.HealthServicer()
        self._closing = asyncio.Event()

    def __enter__(self) -> "Front":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30.0)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(
            self._settings.drain_s + 30.0
        )
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    async def _start(self) -> None:
        limit = self._settings.max_message_mib * MIB
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((_Router(self._unary, self._stream),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._look()
        await self._server.start()
        self._watch = asyncio.create_task(self._keep_looking())

    async def _stop(self) -> None:
        self._closing.set()
        await self._watch
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._settings.drain_s)

    async def _keep_looking(self) -> None:
        while not self._closing.is_set():
            try:
                await asyncio.wait_for(self._closing.wait(), LOOK_S)
            except TimeoutError:
                await self._look()

    async def _look(self) -> None:
        states = await asyncio.to_thread(self._states)
        status = health_pb2.HealthCheckResponse
        for service in SERVICES:
            serving = status.SERVING if states.get(service) else status.NOT_SERVING
            await self._health.set(FULL_NAMES[service], serving)

    def _asked(
        self, method: str, body: bytes, context: Any, *, stream: bool
    ) -> tuple[GrpcService, Any]:
        service = _KIND_OF_SERVICE[method.split("/")[1].rpartition(".")[2]]
        metadata = tuple(
            (key, value)
            for key, value in context.invocation_metadata()
            # What describes this hop's own transport is not for the next one.
            if not key.startswith((":", "grpc-")) and key not in ("user-agent", "te")
        )
        handle = self._handles[service].options(stream=stream)
        remote = handle.stream if stream else handle.unary
        return service, remote.remote(method, body, metadata, context.time_remaining())

    async def _unary(self, method: str, body: bytes, context: Any) -> bytes:
        service, response = self._asked(method, body, context, stream=False)
        answer = await self._settled(service, context, response, response)
        await _finish(context, answer)
        return answer.body

    async def _stream(self, method: str, body: bytes, context: Any) -> AsyncIterator[bytes]:
        service, response = self._asked(method, body, context, stream=True)
        parts = aiter(response)
        while True:
            try:
                answer = await self._settled(service, context, response, anext(parts))
            except StopAsyncIteration:
                return
            await _finish(context, answer)
            yield answer.body

    async def _settled(
        self, service: GrpcService, context: Any, response: Any, part: Any
    ) -> Answer:
        """Await `part` of a response; ends the call where the cluster gives none."""
        try:
            answer: Answer = await part
            return answer
        except asyncio.CancelledError:
            response.cancel()
            raise
        except StopAsyncIteration:
            raise
        except Exception as error:
            told = self._explain(service, error)
            logger().info("refused", kind=told.kind, reason=str(told))
        refusal = Answer(b"", told.grpc_code, str(told)[:1000], ((ERROR_KIND_KEY, told.kind),))
        await _finish(context, refusal)
        raise AssertionError("abort does not return")


async def _finish(context: Any, answer: Answer) -> None:
    if answer.code != "OK":
        context.set_trailing_metadata(answer.trailing)
        await context.abort(grpc.StatusCode[answer.code], answer.details)


class _Router(grpc.GenericRpcHandler):
    """Every method of proto/edsc.proto, by its path, as bytes."""

    def __init__(self, unary: Any, stream: Any) -> None:
        self._handlers: dict[str, Any] = {}
        for service in edsc_pb2.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                streams = method.server_streaming
                make = (
                    grpc.unary_stream_rpc_method_handler
                    if streams
                    else grpc.unary_unary_rpc_method_handler
                )
                self._handlers[path] = make(_bound(stream if streams else unary, path, streams))

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of a path; None for one that is not ours (UNIMPLEMENTED)."""
        return self._handlers.get(details.method)


def _bound(forward: Any, path: str, streams: bool) -> Any:
    if streams:

        async def parts(body: bytes, context: Any) -> AsyncIterator[bytes]:
            async for part in forward(path, body, context):
                yield part

        return parts

    async def one(body: bytes, context: Any) -> bytes:
        reply: bytes = await forward(path, body, context)
        return reply

    return one


@contextmanager
def ray_services(
    settings: Settings, replicas: Mapping[GrpcService, int] | None = None
) -> Iterator[Settings]:
    """The three services on the cluster, with a front on this machine; gives the settings with
    which a client, such as the gateway, finds them. Stopped on the way out.
    """
    counts = {service: (replicas or {}).get(service, 1) for service in SERVICES}
    wanted = sum(CPUS[service] * count for service, count in counts.items())
    with connected(max(os.cpu_count() or 1, int(wanted) + 1)) as ray:
        serve = _serve_of(ray)
        # Calls come through the front: Serve's own HTTP would only take a port.
        serve.start(proxy_location="Disabled")
        try:
            handles = deploy(serve, settings, counts)
            with Front(handles, lambda: _serving(serve), settings, _explain(ray)) as front:
                target = f"127.0.0.1:{front.port}"
                told = settings.model_copy(
                    update={**{f"{name}_target": target for name in SERVICES}, "tls_ca": None}
                )
                for service in SERVICES:
                    wait_until_serving(told, service, START_S)
                yield told
        finally:
            serve.shutdown()


def _serve_of(ray: ModuleType) -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise Unavailable(f"Ray {ray.__version__} comes without Serve: {error}") from None
    return serve


def _explain(ray: ModuleType) -> Callable[[GrpcService, Exception], EdscError]:
    from ray.serve.exceptions import BackPressureError, RayServeException

    def explain(service: GrpcService, error: Exception) -> EdscError:
        if isinstance(error, BackPressureError):
            return Busy(f"all replicas of the {service} are busy: try again in a moment")
        if isinstance(error, ray.exceptions.RayTaskError):  # raised there: a bug, not a loss
            return EdscError(f"internal error of the {service}")
        if isinstance(error, ray.exceptions.RayError | RayServeException):
            return Unavailable(f"the replica of the {service} that had this call is gone")
        return EdscError(f"the call to the {service} failed: {type(error).__name__}")

    return explain


def _serving(serve: Any) -> dict[GrpcService, bool]:
    try:
        found = serve.status().applications
    except Exception:  # no controller: nothing serves
        return {}
    return {
        service: f"edsc-{service}" in found and found[f"edsc-{service}"].status == "RUNNING"
        for service in SERVICES
    }
