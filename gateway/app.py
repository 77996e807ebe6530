"""The REST interface and the page: one FastAPI app around a Link and an EditStore.

::

    POST /v1/edits                    photo + sentence in; JSON, PNG or progress events out
    GET  /v1/edits/{id}               the same answer again        DELETE forgets it
    GET  /v1/edits/{id}/{image}.png   aligned, sent or received
    POST /v1/instructions             the edit that a sentence asks for
    GET  /v1/attributes /v1/channels /v1/schemes /v1/model /v1/samples
    GET  /healthz /readyz /metrics /docs

Every error is application/problem+json with the request's id.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, FastAPI, File, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from gateway.answer import (
    MAX_SENTENCE,
    PICTURES,
    UNEDITED,
    EditAnswer,
    EditRead,
    Order,
)
from gateway.edge import (
    PROBLEM_TYPE,
    Edge,
    kind_of_status,
    problem,
    problem_of,
    problem_response,
)
from gateway.form import EVENT_STREAM, preferred, read_order
from gateway.link import Caller, Link
from gateway.store import EditStore, StoredEdit
from shared.attributes import ATTRIBUTES, DEGREE_NAMES, MAX_DEGREE
from shared.errors import Busy, Cancelled, EdscError, InvalidRequest, PayloadTooLarge
from shared.telemetry import Metrics, logger

STATIC: Final = Path(__file__).parent / "static"
SAMPLES: Final = Path(__file__).parent.parent / "samples"
KEEPALIVE_S: Final = 10.0
# The page needs nothing from anywhere else, and says so to the browser.
PAGE_POLICY: Final = (
    "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)

T = TypeVar("T")


class Instruction(BaseModel):
    """Body of POST /v1/instructions."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_SENTENCE)]


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: {
        "description": words,
        "content": {PROBLEM_TYPE: {"schema": Problem.model_json_schema()}},
    }
    for status, words in {
        413: "The upload is too large",
        415: "Not a picture, or not a form",
        422: "The request, the photo or the sentence cannot be served",
        429: "Too busy; Retry-After says when to come back",
        503: "A service is down or starting",
        504: "The time for this edit ran out",
    }.items()
}


class _Desk:
    """Where edits are taken in: at most `max_in_flight` at a time, each kept when it is done."""

    def __init__(self, link: Link, store: EditStore, metrics: Metrics, max_in_flight: int) -> None:
        self.link = link
        self.store = store
        self.metrics = metrics
        self.max_in_flight = max_in_flight
        self.in_flight = 0

    async def edit(
        self,
        photo: bytes,
        order: Order,
        caller: Caller,
        progress: Callable[[str, float, float], None] | None = None,
    ) -> StoredEdit:
        """Run one edit through the link and keep it. Raises Busy when too many are under way."""
        if self.in_flight >= self.max_in_flight:
            raise Busy(f"{self.in_flight} edits are under way; at most {self.max_in_flight} may be")
        self.in_flight += 1
        try:
            done = await self.link.edit(
                secrets.token_hex(16), photo, order, caller=caller, progress=progress
            )
        finally:
            self.in_flight -= 1
        self.store.put(done)
        self.metrics.stages(done.answer.timings_ms)
        return done


def create_app(
    link: Link,
    *,
    store: EditStore | None = None,
    metrics: Metrics | None = None,
    max_photo_bytes: int = 20 * 2**20,
    max_in_flight: int = 32,
    samples: Path = SAMPLES,
) -> FastAPI:
    """The app. It closes `link` when it shuts down.

    max_photo_bytes: largest upload, bytes. max_in_flight: edits under way before 429 (each holds
    its photo in memory). samples: folder of PNGs to offer on the page; may be missing.
    """
    kept = EditStore() if store is None else store
    counted = Metrics("gateway") if metrics is None else metrics
    desk = _Desk(link, kept, counted, max_in_flight)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await link.close()

    app = FastAPI(
        title="Editable-DeepSC",
        version="0.1.0",
        description="Edit a face photograph with a sentence, across a simulated radio channel.",
        docs_url=None,  # /docs is served from here: Swagger UI would come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(
        Edge,
        metrics=counted,
        max_photo_bytes=max_photo_bytes,
        multipart_paths=frozenset({"/v1/edits"}),
    )
    _add_errors(app)
    _add_edits(app, desk, max_photo_bytes)
    _add_facts(app, link)
    _add_operations(app, link, counted)
    _add_page(app, samples)
    return app


def _add_edits(app: FastAPI, desk: _Desk, max_photo_bytes: int) -> None:
    @app.post(
        "/v1/edits",
        response_model=EditAnswer,
        tags=["edits"],
        summary="Edit a photo and send it across the channel",
        responses={
            200: {
                "description": "The edit as JSON, the received picture as PNG, or progress events "
                "with the JSON last, as Accept asks",
                "content": {"image/png": {}, EVENT_STREAM: {}},
            },
            406: {
                "description": "Accept asks for none of the three",
                "content": {PROBLEM_TYPE: {}},
            },
            **PROBLEMS,
        },
    )
    async def edit_photo(
        request: Request,
        image: Annotated[UploadFile, File(description="the photo: JPEG, PNG, WebP, ...")],
        order: Annotated[Order, Depends(read_order)],
    ) -> Response:
        """Inverts the photo, edits it, sends symbols, draws what was received."""
        wanted = preferred(request.headers.get("accept", "*/*"))
        # `size` is what was received, so a part that is too large is never read back.
        if (image.size or 0) > max_photo_bytes:
            raise PayloadTooLarge(
                f"the photo has {image.size} bytes; expected at most {max_photo_bytes}"
            )
        photo = await image.read()
        if not photo:
            raise InvalidRequest("the photo is empty: 0 bytes")
        caller = _caller(request)
        if wanted == EVENT_STREAM:
            events = _events(desk, photo, order, caller)
            return StreamingResponse(
                events, media_type=EVENT_STREAM, headers={"cache-control": "no-store"}
            )
        done = await _unless_gone(request, desk.edit(photo, order, caller))
        where = {"location": f"/v1/edits/{done.answer.id}", "x-edit-id": done.answer.id}
        if wanted == "image/png":
            return Response(done.pictures["received"], media_type="image/png", headers=where)
        return JSONResponse(done.answer.model_dump(mode="json"), headers=where)

    @app.get(
        "/v1/edits/{edit_id}",
        response_model=EditAnswer,
        tags=["edits"],
        summary="One of the recent edits",
    )
    async def get_edit(edit_id: str) -> EditAnswer:
        return desk.store.get(edit_id).answer

    @app.delete("/v1/edits/{edit_id}", status_code=204, tags=["edits"], summary="Forget an edit")
    async def delete_edit(edit_id: str) -> None:
        desk.store.delete(edit_id)

    @app.get(
        "/v1/edits/{edit_id}/{picture}.png",
        tags=["edits"],
        summary="A picture of an edit: " + ", ".join(PICTURES),
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}},
    )
    async def get_picture(edit_id: str, picture: str) -> Response:
        return Response(
            desk.store.picture(edit_id, picture),
            media_type="image/png",
            headers={"cache-control": "private, max-age=3600, immutable"},
        )

    @app.post(
        "/v1/instructions",
        tags=["edits"],
        summary="Read a sentence",
        responses={status: PROBLEMS[status] for status in (422, 429, 503, 504)},
    )
    async def read_instruction(request: Request, instruction: Instruction) -> EditRead | None:
        """The edit that the sentence asks for; null for "-"; 422 for one that asks for no edit."""
        if instruction.text.strip() == UNEDITED:
            return None
        return await desk.link.read(instruction.text, caller=_caller(request))


def _add_facts(app: FastAPI, link: Link) -> None:
    @app.get("/v1/attributes", tags=["facts"], summary="What can be edited")
    async def attributes() -> dict[str, Any]:
        return {
            "max_degree": MAX_DEGREE,
            "attributes": [
                {
                    "name": attribute.value,
                    "index": attribute.index,
                    "degrees": list(DEGREE_NAMES[attribute]),
                }
                for attribute in ATTRIBUTES
            ],
        }

    @app.get("/v1/channels", tags=["facts"], summary="The channels, and limits on their parameters")
    async def channels(request: Request) -> dict[str, Any]:
        return await link.channels(caller=_caller(request))

    @app.get("/v1/schemes", tags=["facts"], summary="How a picture can travel")
    async def schemes(request: Request) -> dict[str, Any]:
        """Every scheme with its CBR: the paper's way of counting, complex uses (CRC, header and
        padding included), and the figure that the paper prints. `missing` where it cannot be had.
        """
        return {"schemes": await link.schemes(caller=_caller(request))}

    @app.get("/v1/model", tags=["facts"], summary="The weights that are loaded at both ends")
    async def model(request: Request) -> dict[str, Any]:
        return await link.model(caller=_caller(request))


def _add_operations(app: FastAPI, link: Link, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["operations"], summary="This process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"], summary="All three services are serving")
    async def readyz() -> JSONResponse:
        services = await link.health()
        ready = all(state == "SERVING" for state in services.values())
        metrics.ready.set(1.0 if ready else 0.0)
        return JSONResponse(
            {"ready": ready, "services": services}, status_code=200 if ready else 503
        )

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _add_page(app: FastAPI, samples: Path) -> None:
    @app.get("/v1/samples", tags=["facts"], summary="Sample faces, drawn by our own generator")
    async def list_samples() -> dict[str, list[dict[str, str]]]:
        found = sorted(samples.glob("*.png")) if samples.is_dir() else []
        return {"samples": [{"name": p.stem, "image": f"/samples/{p.name}"} for p in found]}

    async def page(name: str) -> FileResponse:
        return FileResponse(STATIC / name, headers={"content-security-policy": PAGE_POLICY})

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return await page("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return await page("docs.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> RedirectResponse:
        return RedirectResponse("/static/icon.svg")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.mount("/samples", StaticFiles(directory=samples, check_dir=False), name="samples")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(EdscError)
    async def ours(request: Request, error: EdscError) -> JSONResponse:
        return problem_response(problem_of(error, request.state.request_id))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [_field_error(e) for e in error.errors()]
        detail = "; ".join(f"{e['field']}: {e['message']}" for e in errors)
        body = problem("InvalidRequest", 422, detail, request.state.request_id, errors)
        return problem_response(body)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> JSONResponse:
        status = error.status_code
        detail = str(error.detail)
        if status in (404, 405):
            detail = f"{request.method} {request.url.path} is not part of this interface; see /docs"
        body = problem(kind_of_status(status), status, detail, request.state.request_id)
        return problem_response(body, error.headers)


def _field_error(error: Mapping[str, Any]) -> dict[str, str]:
    """One validation error in words that name the field, what was got and what was expected."""
    field = ".".join(str(part) for part in error["loc"][1:]) or str(error["loc"][0])
    message = str(error["msg"])
    if error["type"] == "missing" and field == "instruction":
        message = f'missing or empty; say what to change, or "{UNEDITED}" to change nothing'
    elif error["type"] == "missing":
        message = "missing or empty"
    elif isinstance(error.get("input"), str) and len(error["input"]) <= 40:
        message = f"{message}, got {error['input']!r}"
    elif error["type"] == "string_too_long":
        message = f"{message}, got {len(error['input'])}"
    return {"field": field, "message": message}


def _caller(request: Request) -> Caller:
    return Caller(request.state.request_id, request.state.traceparent)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, but drop it when the client hangs up. Raises Cancelled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client closed the connection before the answer was ready")
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _events(desk: _Desk, photo: bytes, order: Order, caller: Caller) -> AsyncIterator[bytes]:
    """Server-sent events: `progress` while the work goes on, then one `result` or one `problem`."""
    queue: asyncio.Queue[bytes] = asyncio.Queue()

    def progress(stage: str, fraction: float, elapsed_ms: float) -> None:
        news = {"stage": stage, "fraction": round(fraction, 4), "elapsed_ms": round(elapsed_ms, 1)}
        queue.put_nowait(_event("progress", news))

    task = asyncio.create_task(desk.edit(photo, order, caller, progress))
    try:
        while not task.done() or not queue.empty():
            news = asyncio.create_task(queue.get())
            done, _ = await asyncio.wait(
                {news, task}, timeout=KEEPALIVE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if news in done:
                yield news.result()
                continue
            news.cancel()
            if not done:
                yield b": still here\n\n"  # a comment: keeps proxies from closing the stream
        try:
            yield _event("result", task.result().answer.model_dump(mode="json"))
        except EdscError as error:
            yield _event("problem", problem_of(error, caller.request_id))
        except Exception:
            logger().exception("failed")
            body = problem("InternalError", 500, "The log has more.", caller.request_id)
            yield _event("problem", body)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
