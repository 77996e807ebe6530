"""What the gRPC servers and their clients have in common; the only translator of errors.

::

    client                         server
    open_channel ---- call ---->   handler thread --submit--> Worker (one thread, bounded queue)
         ^                              |                          |
         '--- EdscError <-- status <----'<------- result ---------'

A handler is decode -> work -> encode. The work itself runs on the process's one worker thread
(`shared/worker.py`); everything else here keeps it from being asked for more than it can do.
"""

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.call import REQUEST_ID_KEY, TRACEPARENT_KEY, Call, new_request_id
from shared.errors import (
    BundleError,
    Busy,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    EdscError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    Unauthorized,
    Unavailable,
    by_kind,
)
from shared.settings import MIB, Settings
from shared.telemetry import Metrics, configure_logging, logger
from shared.tracing import Tracing, trace_id_of
from shared.transport import (
    ERROR_KIND_KEY,
    FULL_NAMES,
    OFFERS,
    Decoding,
    GrpcService,
    client_credentials,
    full_name,
    interceptors,
    server_credentials,
)
from shared.worker import Worker

__all__ = [
    "ERROR_KIND_KEY",
    "FULL_NAMES",
    "OFFERS",
    "REQUEST_ID_KEY",
    "Call",
    "GrpcService",
    "Server",
    "Slot",
    "channel_options",
    "error_from_rpc",
    "is_serving",
    "new_request_id",
    "open_aio_channel",
    "open_channel",
    "outgoing_metadata",
    "serve",
    "streaming",
    "translated",
    "unary",
    "wait_until_serving",
]

P = TypeVar("P")
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_WATCHERS: Final = 64  # health watches at once; more of them wait, Check does not
# Handler threads beyond the queue: health checks and descriptions never wait for inference.
_SPARE_THREADS: Final = 8
_MOST_LANES: Final = 3


# ---------------------------------------------------------------------------- the server


class Server:
    """The gRPC server of one process: health, reflection, limits, one worker. Not yet serving.

    settings: limits and addresses. service: which process it is. tracing: makes a span of every
    call; None: no spans.
    """

    def __init__(
        self, settings: Settings, service: GrpcService, tracing: Tracing | None = None
    ) -> None:
        self.settings = settings
        self.tracing = tracing or Tracing.off()
        self.service: GrpcService = service
        self.metrics = Metrics(service)
        self.worker = Worker(settings.queue_size, self.metrics)
        # Every request that waits or is in progress holds a thread; these cost nothing until used.
        handlers = _MOST_LANES * (settings.queue_size + settings.max_batch) + _SPARE_THREADS
        self.grpc = grpc.server(
            ThreadPoolExecutor(handlers, thread_name_prefix="rpc"),
            interceptors=[Decoding()],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_mib * MIB),
                ("grpc.max_send_message_length", settings.max_message_mib * MIB),
                # A second server on the same port is a mistake to be told about, not a replica.
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Calls under way end on the old connection; the client asks its resolver again.
                ("grpc.max_connection_age_ms", round(settings.max_connection_age_s * 1000)),
            ],
        )
        # Watches queue their reports and wait on threads of their own. The non-blocking mode sends
        # them under the servicer's lock, which the serving thread wants when a watcher hangs up:
        # a client that leaves while the server drains would then stop it for good.
        self._health = health.HealthServicer(
            experimental_non_blocking=False,
            experimental_thread_pool=ThreadPoolExecutor(_WATCHERS, "health-watch"),
        )
        self._set_health(_NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            [*OFFERS[service], health.SERVICE_NAME, reflection.SERVICE_NAME], self.grpc
        )

    def batch(self, lanes: Sequence[str] = ("",)) -> None:
        """Let requests share passes, `max_batch` of each lane at a time; before the first call."""
        if len(lanes) > _MOST_LANES:
            raise ValueError(f"{len(lanes)} lanes; expected at most {_MOST_LANES}")
        self.worker.stop(timeout_s=1.0)
        self.worker = Worker(
            self.settings.queue_size,
            self.metrics,
            max_batch=self.settings.max_batch,
            max_delay_s=self.settings.max_delay_ms / 1000.0,
            lanes=lanes,
        )

    def _set_health(self, status: Any) -> None:
        for name in ("", *OFFERS[self.service]):
            self._health.set(name, status)

    def start(self) -> int:
        """Bind and answer, health NOT_SERVING; gives the port. Unavailable if it is taken."""
        settings = self.settings
        address = f"{settings.host}:{settings.port(self.service)}"
        try:
            if (credentials := server_credentials(settings)) is not None:
                port = self.grpc.add_secure_port(address, credentials)
            else:
                port = self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise Unavailable(f"the {self.service} cannot bind {address}: {error}") from None
        self.grpc.start()
        return port

    def ready(self) -> None:
        """Weights are loaded and warm: health SERVING."""
        self._set_health(_SERVING)
        self.metrics.ready.set(1)

    def drain(self, grace_s: float) -> bool:
        """Unready, finish what is under way in `grace_s` seconds, stop. Whether all ended."""
        self._health.enter_graceful_shutdown()
        self.metrics.ready.set(0)
        # Calls sent before a balancer hears of it are still served; after stop() they are not.
        time.sleep(min(0.1, grace_s))
        self.grpc.stop(grace_s).wait()
        return self.worker.stop(timeout_s=1.0)


class Slot(Generic[P]):
    """Holds a pipeline once it is loaded. Before, `get` raises Unavailable."""

    def __init__(self, service: GrpcService) -> None:
        self._service = service
        self._value: P | None = None

    def put(self, value: P) -> None:
        """Hand over the loaded pipeline."""
        self._value = value

    def get(self) -> P:
        """The pipeline; Unavailable while it is still being loaded."""
        if self._value is None:
            raise Unavailable(f"the {self._service} is still loading its weights")
        return self._value


class Servicer(Protocol):
    """What `unary` and `streaming` need of a servicer: the server that it belongs to."""

    server: Server


S = TypeVar("S", bound=Servicer)
Request = TypeVar("Request")
Reply = TypeVar("Reply")


def unary(
    method: Callable[[S, Request, Call], Reply],
) -> Callable[[S, Request, grpc.ServicerContext], Reply]:
    """Decorator of an rpc: gives it a Call, counts and logs it, translates what it raises."""

    @functools.wraps(method)
    def handle(self: S, request: Request, context: grpc.ServicerContext) -> Reply:
        with _answering(self.server, method.__name__, context) as call:
            return method(self, request, call)

    return handle


def streaming(
    method: Callable[[S, Request, Call], Iterator[Reply]],
) -> Callable[[S, Request, grpc.ServicerContext], Iterator[Reply]]:
    """The same for an rpc that answers with a stream."""

    @functools.wraps(method)
    def handle(self: S, request: Request, context: grpc.ServicerContext) -> Iterator[Reply]:
        with _answering(self.server, method.__name__, context) as call:
            yield from method(self, request, call)

    return handle


@contextmanager
def _answering(server: Server, method: str, context: grpc.ServicerContext) -> Iterator[Call]:
    call = Call(context, server.service, method, server.settings.default_deadline_s)
    metrics = server.metrics
    metrics.in_flight.inc()
    context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
    code = "OK"
    span = server.tracing.start(
        f"{full_name(server.service, method)}/{method}",
        call.traceparent,
        "server",
        {"rpc.system": "grpc", "rpc.method": method, "edsc.request_id": call.request_id},
    )
    known = {"request_id": call.request_id, "method": method}
    if trace_id := trace_id_of(span.traceparent):
        known["trace_id"] = trace_id
    with structlog.contextvars.bound_contextvars(**known):
        try:
            yield call
        except EdscError as error:
            told = call.gone() if isinstance(error, Cancelled) else error
            code = told.grpc_code
            metrics.rejected(told.kind)
            logger().info("refused", kind=told.kind, reason=str(told))
            _abort(context, told, call)
        except GeneratorExit:
            code = Cancelled.grpc_code  # the caller of a stream hung up
            raise
        except Exception:
            code = EdscError.grpc_code
            logger().exception("failed")
            # What went wrong inside is for the log; the id leads there.
            _abort(
                context,
                EdscError(f"internal error of the {server.service}, request {call.request_id}"),
                call,
            )
        finally:
            elapsed_ms = call.watch.elapsed_ms()

            def account() -> None:
                metrics.in_flight.dec()
                metrics.answered(method, code, elapsed_ms / 1000.0)
                metrics.stages(call.watch.stages_ms())
                for stage, stage_ms in call.watch.stages_ms().items():
                    span.set(f"edsc.{stage}_ms", round(stage_ms, 3))
                span.end(failed=None if code == "OK" else code)
                logger().info("answered", code=code, duration_ms=round(elapsed_ms, 2), **known)

            # Once the answer is on its way: nobody has to wait for our book-keeping.
            call.on_end(account)


def _abort(context: grpc.ServicerContext, error: EdscError, call: Call) -> None:
    context.set_trailing_metadata(((ERROR_KIND_KEY, error.kind), (REQUEST_ID_KEY, call.request_id)))
    # Status details travel in a header: 8 KiB for all of them.
    context.abort(grpc.StatusCode[error.grpc_code], str(error)[:1000])


# ---------------------------------------------------------------------- a process's whole life


def serve(
    settings: Settings, service: GrpcService, register: Callable[[Server], Callable[[], None]]
) -> int:
    """Run a service until SIGTERM or SIGINT; gives the exit status, 0 after a drain.

    register: adds the servicer to the server and gives the function that loads and warms what it
    needs. That runs on the worker's thread, while health says NOT_SERVING.
    """
    configure_logging(service, settings.log_level)
    tracing = Tracing.from_environment(service)
    server = Server(settings, service, tracing)
    load = register(server)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    try:
        port = server.start()
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    # For whoever started us with port 0, and for a person at a terminal.
    print(f"{service} listening on {settings.host}:{port}", flush=True)
    if settings.metrics_port is not None:
        metrics_port = server.metrics.serve(settings.metrics_port, settings.host)
        print(f"{service} metrics on {settings.host}:{metrics_port}", flush=True)
    loading = server.worker.submit(None, load)
    while not (loading.done() or stop.wait(0.05)):
        pass
    if loading.done() and (failure := loading.exception()) is not None:
        # An error of ours says it all; anything else is a bug, and its traceback is wanted.
        unexpected = None if isinstance(failure, EdscError) else failure
        logger().error("cannot start", reason=str(failure), exc_info=unexpected)
        print(f"the {service} cannot start: {failure}", file=sys.stderr)
        server.drain(0.0)
        tracing.close()
        return 1
    if not stop.is_set():
        server.ready()
        print(f"{service} ready", flush=True)
        stop.wait()
    logger().info("draining", grace_s=settings.drain_s)
    drained = server.drain(settings.drain_s)
    tracing.close()
    if not drained:
        # The worker is inside torch; an ordinary exit would wait for it or crash with it.
        sys.stdout.flush()
        os._exit(0)
    return 0


# ---------------------------------------------------------------------- the client


def outgoing_metadata(request_id: str, traceparent: str = "") -> tuple[tuple[str, str], ...]:
    """Metadata that ties a call to the request it belongs to, on every hop."""
    trace = ((TRACEPARENT_KEY, traceparent),) if traceparent else ()
    return ((REQUEST_ID_KEY, request_id), *trace)


def channel_options(settings: Settings, service: GrpcService) -> list[tuple[str, Any]]:
    """Options of a client's channel: limits, keepalive, balancing over healthy replicas, retries.

    UNAVAILABLE is tried again, three times in all, at another replica where there is one and never
    beyond the deadline: the services keep no state, so every call may be made twice.
    """
    policy = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": OFFERS[service][0]},
        "methodConfig": [
            {
                "name": [{"service": name} for name in OFFERS[service]],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
    return [
        ("grpc.max_receive_message_length", settings.max_message_mib * MIB),
        ("grpc.max_send_message_length", settings.max_message_mib * MIB),
        # What a retry would send again is kept; a photograph beyond this would be sent once only.
        ("grpc.per_rpc_retry_buffer_size", settings.max_message_mib * MIB),
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        *_authority(settings.target(service)),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # A service that restarts is found again within half a second, not within gRPC's minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.service_config", json.dumps(policy)),
    ]


def _authority(target: str) -> list[tuple[str, Any]]:
    """Of several addresses none is the server's name: TLS checks the first one's."""
    scheme, _, addresses = target.partition(":")
    if scheme not in ("ipv4", "ipv6") or "," not in addresses:
        return []
    return [("grpc.default_authority", addresses.split(",")[0])]


def open_channel(settings: Settings, service: GrpcService) -> grpc.Channel:
    """A blocking client's channel to `service`; connects when it is first used."""
    target, options = settings.target(service), channel_options(settings, service)
    if (credentials := client_credentials(settings)) is not None:
        return grpc.secure_channel(target, credentials, options)
    return grpc.insecure_channel(target, options)


def open_aio_channel(
    settings: Settings, service: GrpcService, tracing: Tracing | None = None
) -> grpc.aio.Channel:
    """The same for an asyncio client, made inside its event loop; `tracing` sees every call."""
    target, options = settings.target(service), channel_options(settings, service)
    watching = interceptors(tracing or Tracing.off())
    if (credentials := client_credentials(settings)) is not None:
        return grpc.aio.secure_channel(target, credentials, options, interceptors=watching)
    return grpc.aio.insecure_channel(target, options, interceptors=watching)


def error_from_rpc(error: grpc.RpcError, service: GrpcService) -> EdscError:
    """The exception that left the server, or the one nearest to a status that gRPC made itself."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return Unavailable(f"the call to the {service} failed: {error}")
    code, details = error.code(), error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KIND_KEY and str(value) in by_kind:
            return by_kind[str(value)](details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return PayloadTooLarge(f"the message to or from the {service} is too large: {details}")
    kind = _KIND_OF_CODE.get(code.name, EdscError)
    if kind is Unavailable:
        return Unavailable(f"the {service} does not answer: {details}")
    if kind is DeadlineExceeded:
        return DeadlineExceeded(f"the {service} was not done in time")
    return kind(f"the {service} answered {code.name}: {details}")


@contextmanager
def translated(service: GrpcService) -> Iterator[None]:
    """Turn whatever a call to `service` raises into the exception tree; blocking and asyncio."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_rpc(error, service) from error


async def is_serving(channel: grpc.aio.Channel, service: GrpcService, timeout_s: float) -> bool:
    """Whether `service` says SERVING within `timeout_s` seconds."""
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods exist at run time only
    request = health_pb2.HealthCheckRequest(service=OFFERS[service][0])
    try:
        reply = await stub.Check(request, timeout=timeout_s)
    except grpc.RpcError:
        return False
    return bool(reply.status == _SERVING)


def wait_until_serving(settings: Settings, service: GrpcService, timeout_s: float) -> None:
    """Block until `service` says SERVING; Unavailable after `timeout_s` seconds."""
    request = health_pb2.HealthCheckRequest(service=OFFERS[service][0])
    deadline = time.monotonic() + timeout_s
    with open_channel(settings, service) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods exist at run time only
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                if stub.Check(request, timeout=min(1.0, left_s)).status == _SERVING:
                    return
            except grpc.RpcError:
                pass  # not there yet
            time.sleep(0.05)
    raise Unavailable(
        f"the {service} at {settings.target(service)} is not up after {timeout_s:g} s"
    )


_KIND_OF_CODE: Final[dict[str, type[EdscError]]] = {
    kind.grpc_code: kind
    for kind in (
        InvalidRequest,
        Unauthorized,
        NotFound,
        Conflict,
        Busy,
        Cancelled,
        Unavailable,
        DeadlineExceeded,
        BundleError,
    )
}
