"""What every request passes on its way in and out: ids, limits, problems, metrics, one log line.

::

    request --> id, span --> media type --> body: bytes, time --> app --> status counted --> answer

Pure ASGI, so that streaming works and a client that hangs up is noticed at once.
"""

import asyncio
import re
import secrets
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from shared.errors import Busy, EdscError, InvalidRequest, PayloadTooLarge, Unavailable
from shared.telemetry import Metrics, logger
from shared.tracing import Tracing, is_traceparent, trace_id_of

SMALL_BODY: Final = 2**16  # bytes of a body that is no form: JSON with one sentence
FORM_OVERHEAD: Final = 2**20  # bytes of a form beside its photo: boundaries, the other fields
PROBLEM_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = 1

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

# What a person reads first; the detail then says what exactly was wrong.
_TITLES: Final[Mapping[str, str]] = {
    "InvalidRequest": "The request is not valid",
    "InstructionRefused": "The sentence asks for nothing that can be edited",
    "NoFaceFound": "No face found in the photo",
    "RateUnreachable": "The picture does not fit into the scheme's channel uses",
    "UnsupportedImage": "Not a picture of a supported format",
    "PayloadTooLarge": "The upload is too large",
    "Unauthorized": "No API key that is known here",
    "NotFound": "Not found",
    "Conflict": "Not in this state",
    "Busy": "Too busy",
    "RateLimited": "Asked too often",
    "Cancelled": "The client went away",
    "Unavailable": "A service is not available",
    "DeadlineExceeded": "The edit took too long",
    "BundleError": "The weights do not fit",
    "MethodNotAllowed": "Method not allowed",
    "UnsupportedMediaType": "Unsupported media type",
    "NotAcceptable": "Not acceptable",
    "BadRequest": "Bad request",
    "RequestTimeout": "The body did not arrive in time",
    "InternalError": "Something went wrong here",
}
_KINDS_OF_STATUS: Final[Mapping[int, str]] = {
    400: "BadRequest",
    404: "NotFound",
    405: "MethodNotAllowed",
    401: "Unauthorized",
    406: "NotAcceptable",
    408: "RequestTimeout",
    409: "Conflict",
    413: "PayloadTooLarge",
    415: "UnsupportedMediaType",
    422: "InvalidRequest",
    429: "Busy",
    503: "Unavailable",
    504: "DeadlineExceeded",
}


def kind_of_status(status: int) -> str:
    """Name of the problem for a status that a framework chose."""
    return _KINDS_OF_STATUS.get(status, "InternalError" if status >= 500 else "InvalidRequest")


def problem(
    kind: str,
    status: int,
    detail: str,
    request_id: str,
    errors: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """The body of an error answer (RFC 9457) with the request's id, and `errors` by field."""
    slug = re.sub(r"(?<!^)(?=[A-Z])", "-", kind).lower()
    body: dict[str, Any] = {
        "type": f"urn:edsc:problem:{slug}",
        "title": _TITLES.get(kind, kind),
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }
    if errors:
        body["errors"] = list(errors)
    return body


def problem_of(error: EdscError, request_id: str) -> dict[str, Any]:
    """The body for an error of ours. A fault of this side says no more than it must."""
    return problem(error.kind, error.http_status, str(error), request_id)


def problem_response(
    body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error answer; 429 and 503 say when to come back."""
    extra = dict(headers or {})
    if body["status"] in (Busy.http_status, Unavailable.http_status):
        extra.setdefault("retry-after", str(RETRY_AFTER_S))
    return JSONResponse(
        dict(body), status_code=body["status"], headers=extra, media_type=PROBLEM_TYPE
    )


class Edge:
    """ASGI middleware around the whole app.

    max_photo_bytes: largest photo, bytes; a form may be FORM_OVERHEAD larger than that, any other
    body has at most SMALL_BODY bytes. multipart_paths: POST paths that take a form and nothing else
    (415 otherwise). body_timeout_s: longest wait for the next piece of a body. tracing: makes a
    span of every request; None: no spans.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        max_photo_bytes: int,
        multipart_paths: frozenset[str],
        body_timeout_s: float = 30.0,
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.body_timeout_s = body_timeout_s
        self.tracing = tracing or Tracing.off()
        self.metrics = metrics
        self.max_photo_bytes = max_photo_bytes
        self.max_body = max_photo_bytes + FORM_OVERHEAD
        self.multipart_paths = multipart_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["drain"] = self._drain
        traceparent = headers.get("traceparent", "")
        method = scope["method"]
        known = {"request_id": request_id}
        # Named once the route is known: an address may hold an id.
        span = self.tracing.start(
            method,
            traceparent if is_traceparent(traceparent) else "",
            "server",
            {"http.request.method": method, "edsc.request_id": request_id},
        )
        state["traceparent"] = span.traceparent
        if trace_id := trace_id_of(span.traceparent):
            known["trace_id"] = trace_id

        start = perf_counter()
        status = 500
        started = False

        async def send_on(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                started = True
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out.setdefault("x-content-type-options", "nosniff")
                out.setdefault("referrer-policy", "no-referrer")
            await send(message)

        self.metrics.in_flight.inc()
        try:
            with bound_contextvars(**known):
                refusal = self._refuse(scope, headers)
                if refusal is not None:
                    if isinstance(refusal, PayloadTooLarge):
                        await self._drain(receive)
                    answer: Response = problem_response(problem_of(refusal, request_id))
                    await answer(scope, receive, send_on)
                else:
                    await self.app(scope, self._limited(scope, receive), send_on)
        except Exception:
            # Starlette's own last resort has run by now: it has answered, and raises for the log.
            logger().exception("failed", **known)
            if not started:
                body = problem("InternalError", 500, "The log has more.", request_id)
                await problem_response(body)(scope, receive, send_on)
        finally:
            self.metrics.in_flight.dec()
            seconds = perf_counter() - start
            route = scope.get("route")
            path = getattr(route, "path", "unmatched")
            self.metrics.answered(f"{method} {path}", str(status), seconds)
            if status in (401, 408, 413, 429, 503, 504):
                self.metrics.rejected(str(state.get("reason") or kind_of_status(status)))
            span.rename(f"{method} {path}")
            span.set("http.response.status_code", status)
            span.end(failed=str(status) if status >= 500 else None)
            if path not in ("/healthz", "/readyz", "/metrics"):
                logger().info(
                    "served",
                    method=method,
                    path=path,
                    status=status,
                    duration_ms=round(seconds * 1000.0, 1),
                    owner=state.get("owner", ""),
                    **known,
                )

    def _refuse(self, scope: Scope, headers: Headers) -> EdscError | None:
        """The reason not to read this request's body at all, if there is one."""
        if scope["method"] == "POST" and scope["path"] in self.multipart_paths:
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "multipart/form-data":
                return UnsupportedMedia(
                    f"content-type is {media_type or 'missing'}; expected multipart/form-data "
                    "with the fields image and instruction"
                )
        length = headers.get("content-length", "")
        # At most 18 digits: int() itself refuses thousands of them.
        if length.isdigit() and (len(length) > 18 or int(length) > self._most(scope)):
            return self._too_large(scope, f"{length[:18]} bytes")
        return None

    def _most(self, scope: Scope) -> int:
        """Bytes that the body of this request may have."""
        return self.max_body if scope["path"] in self.multipart_paths else SMALL_BODY

    def _too_large(self, scope: Scope, got: str) -> PayloadTooLarge:
        if scope["path"] not in self.multipart_paths:
            return PayloadTooLarge(f"the request body has {got}; expected at most {SMALL_BODY}")
        limit = self.max_photo_bytes / 2**20
        return PayloadTooLarge(f"the request body has {got}; a photo may have {limit:g} MiB")

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that stops a body, also one of unknown length, at the limit, and one that does
        not arrive: whoever sends a byte a minute would hold a place for hours."""
        taken = 0
        most = self._most(scope)
        complete = False

        async def next_piece() -> Message:
            if complete:
                return await receive()  # waits for the client to hang up, as long as that takes
            try:
                async with asyncio.timeout(self.body_timeout_s):
                    return await receive()
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"nothing of the body arrived for {self.body_timeout_s:g} s",
                    {"connection": "close"},
                ) from None

        async def limited() -> Message:
            nonlocal taken, complete
            message = await next_piece()
            if message["type"] == "http.request":
                complete = not message.get("more_body", False)
                taken += len(message.get("body", b""))
                if taken > most:
                    if message.get("more_body", False):
                        await self._drain(receive)
                    # The one exception that FastAPI lets through while it reads a body.
                    raise HTTPException(413, str(self._too_large(scope, f"more than {most} bytes")))
            return message

        return limited

    async def _drain(self, receive: Receive) -> None:
        """Read on and throw away, up to a point: a client that is still sending would otherwise see
        its connection reset instead of the answer."""
        thrown_away = 0
        while thrown_away < 4 * self.max_body:
            try:
                async with asyncio.timeout(self.body_timeout_s):
                    message = await receive()
            except TimeoutError:
                return
            thrown_away += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return


class UnsupportedMedia(InvalidRequest):
    """The request's own media type, not the picture's, is one that this path does not take."""

    http_status = 415

    @property
    def kind(self) -> str:
        """HTTP's name for it."""
        return "UnsupportedMediaType"
