"""What a connection between two services carries beside its messages: credentials, trace context.

::

    gateway --- TLS: each shows a certificate that the other's CA has signed ---> service
            --- metadata: x-request-id, traceparent of this hop's client span -->

mTLS is on as soon as `tls_certificate`, `tls_key` and `tls_ca` are set: a server then answers
nobody who shows no certificate of that CA, and a client talks to no server that shows none for the
name it was called by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from shared.call import REQUEST_ID_KEY, TRACEPARENT_KEY
from shared.errors import InvalidRequest, Unavailable
from shared.pb import edsc_pb2
from shared.settings import Settings
from shared.tracing import Span, Tracing

ERROR_KIND_KEY: Final = "edsc-error-kind"
GrpcService = Literal["transmitter", "channel", "receiver", "baselines"]
FULL_NAMES: Final[dict[GrpcService, str]] = {
    "transmitter": "edsc.v1.Transmitter",
    "channel": "edsc.v1.Channel",
    "receiver": "edsc.v1.Receiver",
}
# What each process offers; health of a process is reported under all of its names.
OFFERS: Final[dict[GrpcService, tuple[str, ...]]] = {
    **{service: (name,) for service, name in FULL_NAMES.items()},
    "baselines": (FULL_NAMES["transmitter"], FULL_NAMES["receiver"]),
}

_UNTRACED: Final = ("/grpc.health.", "/grpc.reflection.")  # asked every few seconds, by machines


def full_name(service: GrpcService, method: str) -> str:
    """Which of the services that a process offers has this method."""
    found = (
        each.full_name
        for each in edsc_pb2.DESCRIPTOR.services_by_name.values()
        if each.full_name in OFFERS[service] and method in each.methods_by_name
    )
    return next(found, OFFERS[service][0])


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What a server shows and asks for; None where no certificate is set: plain text.

    With `tls_ca`, clients without a certificate of that CA are not let in. Raises Unavailable for
    a CA without a certificate of one's own.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        if settings.tls_ca is not None:
            raise Unavailable(
                "tls_ca is set without tls_certificate and tls_key; expected all three: the"
                " service would answer in plain text"
            )
        return None
    pair = (settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())
    authority = settings.tls_ca.read_bytes() if settings.tls_ca else None
    return grpc.ssl_server_credentials([pair], authority, authority is not None)


def client_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """What a client believes and shows; None where no CA is set: plain text."""
    if settings.tls_ca is None:
        return None
    return grpc.ssl_channel_credentials(
        settings.tls_ca.read_bytes(),
        settings.tls_key.read_bytes() if settings.tls_key else None,
        settings.tls_certificate.read_bytes() if settings.tls_certificate else None,
    )


@dataclass(frozen=True)
class _Undecodable:
    """Stands for a request whose bytes are no message of the contract."""

    reason: str


class Decoding(grpc.ServerInterceptor):
    """Answers bytes that are no message with INVALID_ARGUMENT.

    gRPC itself would say INTERNAL, as if it were our fault, and log the traceback.
    """

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a call, with a decoder that does not raise."""
        handler = continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        decode = handler.request_deserializer

        def decoded(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError as error:
                return _Undecodable(str(error))

        def checked(behaviour: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
            assert behaviour is not None  # a handler has the one that its kind says

            def handle(request: Any, context: grpc.ServicerContext) -> Any:
                if isinstance(request, _Undecodable):
                    context.set_trailing_metadata(((ERROR_KIND_KEY, InvalidRequest.__name__),))
                    context.abort(
                        grpc.StatusCode.INVALID_ARGUMENT,
                        f"the request cannot be decoded: {request.reason}; expected a message of"
                        f" {handler_call_details.method}",
                    )
                return behaviour(request, context)

            return handle

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                checked(handler.unary_stream), decoded, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            checked(handler.unary_unary), decoded, handler.response_serializer
        )


def interceptors(tracing: Tracing) -> list[grpc.aio.ClientInterceptor]:
    """Interceptors of an asyncio channel: a client span around every call, where spans are sent.

    The trace's id is in the caller's metadata anyway.
    """
    return [_TracedUnary(tracing), _TracedStream(tracing)] if tracing.sent else []


def _begin(
    tracing: Tracing, details: grpc.aio.ClientCallDetails
) -> tuple[Span, grpc.aio.ClientCallDetails] | None:
    """A client span under the call's traceparent, and the call as a child of it; None: untraced."""
    method = details.method.decode() if isinstance(details.method, bytes) else details.method
    if method.startswith(_UNTRACED):
        return None
    metadata = {str(key): value for key, value in details.metadata or ()}
    service, _, name = method.strip("/").partition("/")
    span = tracing.start(
        f"{service}/{name}",
        str(metadata.get(TRACEPARENT_KEY, "")),
        "client",
        {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "edsc.request_id": str(metadata.get(REQUEST_ID_KEY, "")),
        },
    )
    metadata[TRACEPARENT_KEY] = span.traceparent
    told = grpc.aio.ClientCallDetails(
        method=details.method,
        timeout=details.timeout,
        metadata=grpc.aio.Metadata(*metadata.items()),
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )
    return span, told


def _end(span: Span, code: grpc.StatusCode) -> None:
    span.set("rpc.grpc.status_code", int(code.value[0]))
    span.end(failed=None if code is grpc.StatusCode.OK else code.name)


class _TracedUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def intercept_unary_unary(
        self,
        continuation: Callable[[Any, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        begun = _begin(self._tracing, client_call_details)
        if begun is None:
            return await continuation(client_call_details, request)
        span, details = begun
        code = grpc.StatusCode.CANCELLED
        call = None
        try:
            call = await continuation(details, request)
            code = await call.code()
            return call
        except asyncio.CancelledError:
            if call is not None:
                call.cancel()  # waiting for the code alone would leave the call running
            raise
        finally:
            _end(span, code)


class _TracedStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._ending: set[asyncio.Task[None]] = set()  # the loop itself keeps weak references only

    async def intercept_unary_stream(
        self,
        continuation: Callable[[Any, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        begun = _begin(self._tracing, client_call_details)
        if begun is None:
            return await continuation(client_call_details, request)
        span, details = begun
        call = await continuation(details, request)

        async def end() -> None:
            _end(span, await call.code())

        def ended(_: object) -> None:
            task = asyncio.ensure_future(end())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

        call.add_done_callback(ended)
        return call
