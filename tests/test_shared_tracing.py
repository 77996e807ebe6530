"""Traces: one tree from the browser through the gateway and the three services, and its export."""

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import channel_sim.service
import receiver.service
import transmitter.service
from gateway.answer import Order
from gateway.app import create_app
from gateway.link import Caller, Link
from shared.errors import BundleError, DeadlineExceeded, Unavailable
from shared.rpc import GrpcService, Server
from shared.settings import Settings
from shared.telemetry import configure_logging
from shared.tracing import ENDPOINT_VARIABLES, Tracing, is_traceparent, trace_id_of
from tests.test_gateway_app import png

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SENTENCE = "make the smile bigger"
REGISTERS: dict[GrpcService, Callable[[Server], Callable[[], None]]] = {
    "transmitter": transmitter.service.register,
    "channel": channel_sim.service.register,
    "receiver": receiver.service.register,
}


@pytest.fixture(scope="module")
def traced(random_bundle: Path) -> Iterator[tuple[InMemorySpanExporter, Settings]]:
    """The three services, each with a tracer of its own and one exporter for all."""
    spans = InMemorySpanExporter()
    settings = Settings(
        transmitter_port=0, channel_port=0, receiver_port=0, weights=random_bundle, threads=1
    )
    servers, targets = [], {}
    for name, register in REGISTERS.items():
        server = Server(settings, name, Tracing(name, spans, batched=False))
        load = register(server)
        targets[f"{name}_target"] = f"127.0.0.1:{server.start()}"
        server.worker.submit(None, load).result(60)
        server.ready()
        servers.append(server)
    yield spans, settings.model_copy(update=targets)
    for server in servers:
        server.drain(0.0)


def service_of(span: ReadableSpan) -> str:
    return str(span.resource.attributes["service.name"])


def edit(
    traced: tuple[InMemorySpanExporter, Settings], headers: dict[str, str]
) -> dict[tuple[str, str], ReadableSpan]:
    """One edit over REST; gives its spans by (service, name)."""
    exporter, settings = traced
    exporter.clear()
    link = Link(settings, tracing=Tracing("gateway", exporter, batched=False))
    with TestClient(create_app(link)) as client:
        form = {"instruction": SENTENCE, "align": "false", "quality": "fast"}
        answer = client.post("/v1/edits", files={"image": png()}, data=form, headers=headers)
        assert answer.status_code == 200, answer.text
    deadline = time.monotonic() + 5.0  # a service ends its span after its answer
    while len(exporter.get_finished_spans()) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    return {(service_of(span), span.name): span for span in exporter.get_finished_spans()}


HOPS = {
    "edsc.v1.Transmitter/Transmit": "edsc-transmitter",
    "edsc.v1.Channel/Propagate": "edsc-channel",
    "edsc.v1.Receiver/Receive": "edsc-receiver",
}


def test_one_trace_goes_through_all_four_processes(
    traced: tuple[InMemorySpanExporter, Settings],
) -> None:
    spans = edit(traced, {"traceparent": PARENT, "x-request-id": "mine-1"})
    root = spans["edsc-gateway", "POST /v1/edits"]
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert len(spans) == 7
    for method, service in HOPS.items():
        client, server = spans["edsc-gateway", method], spans[service, method]
        assert client.parent is not None
        assert server.parent is not None
        assert client.context is not None
        assert root.context is not None
        assert client.parent.span_id == root.context.span_id
        assert server.parent.span_id == client.context.span_id
        for span in (client, server):
            assert span.context is not None
            assert f"{span.context.trace_id:032x}" == TRACE
            assert span.attributes is not None
            assert span.attributes["edsc.request_id"] == "mine-1"
        assert client.attributes is not None
        assert client.attributes["rpc.grpc.status_code"] == 0
    stages = spans["edsc-transmitter", "edsc.v1.Transmitter/Transmit"].attributes
    assert stages is not None
    assert float(str(stages["edsc.invert_ms"])) >= 0.0


def test_a_stream_is_traced_too(traced: tuple[InMemorySpanExporter, Settings]) -> None:
    spans = edit(traced, {"accept": "text/event-stream"})
    client = spans["edsc-gateway", "edsc.v1.Transmitter/TransmitStream"]
    server = spans["edsc-transmitter", "edsc.v1.Transmitter/TransmitStream"]
    assert server.parent is not None
    assert client.context is not None
    assert server.parent.span_id == client.context.span_id


def test_no_picture_and_no_sentence_is_in_a_trace(
    traced: tuple[InMemorySpanExporter, Settings],
) -> None:
    for span in edit(traced, {}).values():
        told = span.to_json()
        assert SENTENCE not in told
        assert "PNG" not in told
        assert all(
            not isinstance(value, bytes) and len(str(value)) < 200
            for value in (span.attributes or {}).values()
        )


def test_an_error_names_its_kind(traced: tuple[InMemorySpanExporter, Settings]) -> None:
    exporter, settings = traced
    exporter.clear()
    tracing = Tracing("gateway", exporter, batched=False)
    away = settings.model_copy(update={"channel_target": "127.0.0.1:9"})

    async def fail() -> None:
        link = Link(away, tracing=tracing)
        try:
            with pytest.raises(Unavailable):
                await link.edit("x", png(), Order("-", align=False), caller=Caller("r", PARENT))
            with pytest.raises(DeadlineExceeded):
                await Link(settings, deadline_s=0.0, tracing=tracing).edit(
                    "x", png(), Order("-"), caller=Caller("r", PARENT)
                )
        finally:
            await link.close()

    asyncio.run(fail())
    # A hop that fails is tried again while there is time: a span for every try.
    tries = [s for s in exporter.get_finished_spans() if s.name == "edsc.v1.Channel/Propagate"]
    assert tries
    for failed in tries:
        assert failed.attributes is not None
        assert failed.attributes["error.type"] == "UNAVAILABLE"
        assert not failed.status.is_ok


def test_without_a_tracer_a_traceparent_passes_as_it_came() -> None:
    off = Tracing.off()
    with off.span("x", PARENT) as span:
        assert span.traceparent == PARENT
    assert not off.on
    off.close()


def test_without_an_exporter_there_are_still_ids() -> None:
    tracing = Tracing("gateway")
    with tracing.span("outer") as outer, tracing.span("inner", outer.traceparent) as inner:
        assert is_traceparent(outer.traceparent)
        assert trace_id_of(inner.traceparent) == trace_id_of(outer.traceparent)
    with tracing.span("other") as other:
        assert trace_id_of(other.traceparent) != trace_id_of(outer.traceparent)
    tracing.close()
    assert not tracing.on


@pytest.mark.parametrize(
    "text", ["", "00-aa-bb-01", PARENT.upper(), PARENT + "-x", f"00-{'0' * 32}-b7ad6b7169203331-01"]
)
def test_what_is_no_traceparent_begins_a_trace_of_its_own(text: str) -> None:
    assert not is_traceparent(text)
    assert trace_id_of(text) == ""
    exporter = InMemorySpanExporter()
    with Tracing("gateway", exporter, batched=False).span("x", text):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


@pytest.mark.usefixtures("logging_undone")
def test_log_lines_carry_the_trace(
    traced: tuple[InMemorySpanExporter, Settings], capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("all")
    edit(traced, {"traceparent": PARENT})
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[:1] == "{"]
    assert len(lines) >= 4
    assert {line["trace_id"] for line in lines} == {TRACE}


# ------------------------------------------------------------------------------------- the exporter


def test_spans_go_by_otlp_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="no extra otlp")
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

    got: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    tracing = Tracing.from_environment("channel")
    with tracing.span("edsc.v1.Channel/Propagate", PARENT, "server", {"edsc.request_id": "r"}):
        pass
    tracing.close()  # sends what it has
    server.shutdown()
    server.server_close()
    ((path, body),) = got
    assert path == "/v1/traces"
    (resource,) = trace_service_pb2.ExportTraceServiceRequest.FromString(body).resource_spans
    names = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert names["service.name"] == "edsc-channel"
    (span,) = resource.scope_spans[0].spans
    assert (span.name, span.trace_id.hex()) == ("edsc.v1.Channel/Propagate", TRACE)


def test_nothing_is_sent_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    tracing = Tracing.from_environment("channel")
    assert tracing.on
    tracing.close()


def test_an_endpoint_without_its_exporter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(BundleError, match=r"\[otlp\]"):
        Tracing.from_environment("channel")
