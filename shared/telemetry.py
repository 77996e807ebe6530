"""What a process tells its operator: JSON logs on stderr and Prometheus metrics.

A log line carries the request id of the call that it belongs to. Photographs and sentences are the
user's own: above debug level they never reach a log, whatever a caller passes, also not in what an
unexpected exception says.
"""

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final, cast

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)

PRIVATE_KEYS: Final = frozenset({"instruction", "sentence", "text", "image", "photo", "filename"})

# Seconds: a hop takes half a millisecond, a `paper` edit on a CPU ten seconds and more.
DURATION_BUCKETS: Final = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip

BATCH_BUCKETS: Final = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def keep_private(
    _logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """structlog processor: take user content out of every line above debug level."""
    for key, value in list(event.items()):
        if isinstance(value, bytes | bytearray | memoryview):
            event[key] = f"<{len(value)} bytes>"
        elif key in PRIVATE_KEYS and method != "debug":
            event[key] = f"<{len(value)} characters>" if isinstance(value, str) else "<private>"
    return event


def frames_only(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """structlog processor: an exception as its kinds and the lines that it passed, no messages.

    What a bug says of itself may quote what it stumbled over, and that may be somebody's sentence.
    """
    given = event.pop("exc_info", None)
    if not given:
        return event
    error = given if isinstance(given, BaseException) else sys.exc_info()[1]
    told = []
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        told.append(
            {
                "kind": f"{type(error).__module__}.{type(error).__qualname__}",
                "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
            }
        )
        error = error.__cause__ or error.__context__
    event["exception"] = told
    return event


def configure_logging(service: str, level: str = "info") -> None:
    """Send structlog to stderr as one JSON object a line; called once, in `main`."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            keep_private,
            structlog.processors.format_exc_info if level == "debug" else frames_only,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(service=service)


def logger() -> structlog.typing.FilteringBoundLogger:
    """The process's logger: `logger().info("served", method=..., duration_ms=...)`."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger())


class Metrics:
    """Counters and histograms of one process, in a registry of their own (two can share a test).

    Durations are in seconds, as Prometheus wants them; every series carries the service's name.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "edsc_requests", "Requests answered.", ["service", "method", "code"],
            registry=self.registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "edsc_request_seconds", "Duration of a request, seconds.", ["service", "method"],
            buckets=DURATION_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._stage_seconds = Histogram(
            "edsc_stage_seconds", "Duration of a stage of the work, seconds.", ["service", "stage"],
            buckets=DURATION_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._rejected = Counter(
            "edsc_rejected", "Requests turned away.", ["service", "reason"], registry=self.registry
        )
        self._edits = Counter(
            "edsc_edits", "Edits that ended, by how.", ["service", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self._kept = Gauge(
            "edsc_edits_kept", "Edits in the store, by state.", ["service", "state"],
            registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "edsc_in_flight", "Requests under way.", ["service"], registry=self.registry
        ).labels(service)
        self.queue_depth = Gauge(
            "edsc_queue_depth", "Requests waiting for their turn.", ["service"],
            registry=self.registry,
        ).labels(service)  # fmt: skip
        self.active = Gauge(
            "edsc_active", "Requests in progress in the worker, which may share its passes.",
            ["service"], registry=self.registry,
        ).labels(service)  # fmt: skip
        self._batch_size = Histogram(
            "edsc_batch_size", "Items in one pass through a network.", ["service", "operation"],
            buckets=BATCH_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._dropped = Counter(
            "edsc_dropped", "Requests given up in progress: their caller left or ran out of time.",
            ["service"], registry=self.registry,
        )  # fmt: skip
        self.ready = Gauge(
            "edsc_ready", "1 once weights are loaded and warm.", ["service"], registry=self.registry
        ).labels(service)

    def answered(self, method: str, code: str, seconds: float) -> None:
        """Count one request with its status (gRPC name or HTTP number) and duration."""
        self._requests.labels(self.service, method, code).inc()
        self._request_seconds.labels(self.service, method).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count one request turned away; reason is a kind of error or "queue_full"."""
        self._rejected.labels(self.service, reason).inc()

    def batch(self, operation: str, items: int) -> None:
        """Count one pass of an operation, by how many items shared it."""
        self._batch_size.labels(self.service, operation).observe(items)

    def dropped(self) -> None:
        """Count one request given up between two of its steps."""
        self._dropped.labels(self.service).inc()

    def edited(self, outcome: str) -> None:
        """Count one edit that ended: done, failed or rejected."""
        self._edits.labels(self.service, outcome).inc()

    def kept(self, state: str, count: int) -> None:
        """Say how many edits the store has in a state."""
        self._kept.labels(self.service, state).set(count)

    def stages(self, timings_ms: Mapping[str, float]) -> None:
        """Record the duration of every stage, given in milliseconds."""
        for stage, milliseconds in timings_ms.items():
            self._stage_seconds.labels(self.service, stage).observe(milliseconds / 1000.0)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve the metrics over HTTP from a thread of their own; gives the port bound."""
        server, _thread = start_http_server(port, addr=host, registry=self.registry)
        return int(server.server_port)


class Stopwatch:
    """Milliseconds per stage: `with watch.stage("decode"): ...`, then `watch.timings_ms()`."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; the same name adds up."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(name, (perf_counter() - start) * 1000.0)

    def add(self, name: str, milliseconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._stages[name] = self._stages.get(name, 0.0) + milliseconds

    def elapsed_ms(self) -> float:
        """Milliseconds since the watch was made."""
        return (perf_counter() - self._start) * 1000.0

    def stages_ms(self) -> dict[str, float]:
        """Milliseconds of every stage so far."""
        return dict(self._stages)

    def timings_ms(self) -> dict[str, float]:
        """Every stage, and `total`: all the time since the watch was made."""
        return {**self._stages, "total": self.elapsed_ms()}
