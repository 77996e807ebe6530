"""OpenTelemetry traces: one span per request and per hop, tied together by W3C traceparent.

::

    browser --traceparent--> gateway          span "POST /v1/edits"
                                |-- client    span "edsc.v1.Transmitter/Transmit" --> server span
                                |-- client    span "edsc.v1.Channel/Propagate"    --> server span
                                `-- client    span "edsc.v1.Receiver/Receive"     --> server span

A span's parent is what its traceparent says, never what happens to run on the same thread: so a
trace is as right across queues and worker threads as it is across processes. Attributes are
numbers, names and codes; the sentence and the pictures are the user's own and are not among them.

Where spans go is the environment's choice, as OpenTelemetry defines it: with
OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) they are sent by OTLP over HTTP,
without they are not sent, and their ids serve the logs. OTEL_TRACES_SAMPLER chooses what to keep.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, Self

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter

from shared.errors import BundleError

Kind = Literal["server", "client", "internal"]
Value = str | int | float | bool

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

# W3C Trace Context, section 3.2: version 00; all-zero ids are invalid.
_TRACEPARENT: Final = re.compile(
    r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
)
_KINDS: Final[Mapping[Kind, trace.SpanKind]] = {
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "internal": trace.SpanKind.INTERNAL,
}


def is_traceparent(text: str) -> bool:
    """Whether `text` is a W3C traceparent that a span can have as its parent."""
    return _TRACEPARENT.fullmatch(text) is not None


def trace_id_of(traceparent: str) -> str:
    """The 32 hexadecimal digits that name the trace; "" for none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found.group(1) if found else ""


class Span:
    """One span under way. Where nothing is traced it still has the traceparent to pass on."""

    def __init__(self, inner: trace.Span | None, traceparent: str) -> None:
        self._inner = inner
        self.traceparent = traceparent

    def set(self, name: str, value: Value) -> None:
        """Set an attribute, for instance "edsc.snr_db"."""
        if self._inner is not None:
            self._inner.set_attribute(name, value)

    def rename(self, name: str) -> None:
        """Another name, where the right one is known only later."""
        if self._inner is not None:
            self._inner.update_name(name)

    def end(self, failed: str | None = None) -> None:
        """The work is over; `failed` names the kind of error (never its message: it may quote)."""
        if self._inner is not None:
            if failed is not None:
                self._inner.set_attribute("error.type", failed)
                self._inner.set_status(trace.Status(trace.StatusCode.ERROR, failed))
            self._inner.end()


class Tracing:
    """Makes the spans of one process.

    service: its name in traces. exporter: where spans go; None: nowhere, and only ids are made.
    batched: send from a thread of its own, some at a time (servers), or each at once (tests).
    """

    def __init__(
        self, service: str, exporter: SpanExporter | None = None, *, batched: bool = True
    ) -> None:
        resource = Resource.create(
            {"service.name": f"edsc-{service}", "service.namespace": "editable-deepsc"}
        )
        self._exports = exporter is not None
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        if exporter is not None:
            processor = BatchSpanProcessor if batched else SimpleSpanProcessor
            self._provider.add_span_processor(processor(exporter))
        self._tracer: trace.Tracer | None = self._provider.get_tracer("edsc")

    @classmethod
    def off(cls) -> Self:
        """No spans: a traceparent that comes in goes out as it came."""
        nothing = cls.__new__(cls)
        nothing._tracer, nothing._exports = None, False
        return nothing

    @classmethod
    def from_environment(cls, service: str) -> Self:
        """As the OTEL_* variables say.

        Raises BundleError when they name an endpoint and the exporter is not installed.
        """
        if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
            return cls(service)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise BundleError(
                f"{' or '.join(ENDPOINT_VARIABLES)} is set, and the exporter is not installed:"
                ' pip install ".[otlp]"'
            ) from error
        return cls(service, OTLPSpanExporter())

    @property
    def on(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    @property
    def sent(self) -> bool:
        """Whether spans go anywhere; otherwise only their ids are of use."""
        return self.on and self._exports

    def start(
        self,
        name: str,
        traceparent: str = "",
        kind: Kind = "internal",
        attributes: Mapping[str, Value] | None = None,
    ) -> Span:
        """Begin a span under the one that `traceparent` names; "": a trace of its own."""
        if self._tracer is None or (traceparent and not self._exports):
            return Span(None, traceparent)  # which has the trace's id, all that anybody can use
        inner = self._tracer.start_span(
            name, _context(traceparent), kind=_KINDS[kind], attributes=attributes
        )
        own = inner.get_span_context()
        return Span(inner, f"00-{own.trace_id:032x}-{own.span_id:016x}-{int(own.trace_flags):02x}")

    @contextmanager
    def span(
        self,
        name: str,
        traceparent: str = "",
        kind: Kind = "internal",
        attributes: Mapping[str, Value] | None = None,
    ) -> Iterator[Span]:
        """The same around a block; an exception that leaves it is named and passed on."""
        span = self.start(name, traceparent, kind, attributes)
        try:
            yield span
        except BaseException as error:
            span.end(failed=type(error).__name__)
            raise
        span.end()

    def close(self) -> None:
        """Send what is still here, then make no more."""
        if self._tracer is not None:
            self._provider.shutdown()
            self._tracer = None


def _context(traceparent: str) -> Context:
    """An OpenTelemetry context whose current span is the remote one; empty for none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return Context()  # not None, which would mean whatever is current
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    parent = trace.SpanContext(
        trace_id=trace_id, span_id=span_id, is_remote=True, trace_flags=trace.TraceFlags(flags)
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())
