"""The REST interface and the page: one FastAPI app around a Link and an EditStore.

::

    request --> Edge (ids, limits, metrics) --> Guard (keys, rates) --> edits, facts, page

    /v1/edits ... /v1/conversations ...    gateway/edits.py
    POST /v1/instructions                  the edit that a sentence asks for
    GET  /v1/attributes /v1/channels /v1/schemes /v1/model /v1/samples
    GET  /healthz /readyz /metrics /docs

Every error is application/problem+json with the request's id.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from gateway.answer import MAX_SENTENCE, UNEDITED, EditRead
from gateway.desk import Desk, Limits
from gateway.edge import Edge, kind_of_status, problem, problem_of, problem_response
from gateway.edits import caller_of, edits_router, problems
from gateway.keys import Guard, Keyring, RateLimit
from gateway.link import Link
from gateway.store import EditStore
from shared.attributes import ATTRIBUTES, DEGREE_NAMES, MAX_DEGREE
from shared.errors import EdscError
from shared.telemetry import Metrics

STATIC: Final = Path(__file__).parent / "static"
SAMPLES: Final = Path(__file__).parent.parent / "samples"
# The page needs nothing from anywhere else, and says so to the browser.
PAGE_POLICY: Final = (
    "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class Instruction(BaseModel):
    """Body of POST /v1/instructions."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_SENTENCE)]


def create_app(
    link: Link,
    *,
    store: EditStore | None = None,
    metrics: Metrics | None = None,
    max_photo_bytes: int = 20 * 2**20,
    limits: Limits | None = None,
    keyring: Keyring | None = None,
    rate_limit: RateLimit | None = None,
    body_timeout_s: float = 30.0,
    samples: Path = SAMPLES,
) -> FastAPI:
    """The app. It closes `link` and `store` when it shuts down.

    store: where edits are kept; None: in memory. max_photo_bytes: largest upload, bytes. limits: of
    edits under way. keyring: who may ask; None: everybody. rate_limit: how often; None: as often as
    they like. body_timeout_s: longest wait for a piece of a body. samples: folder of PNGs to offer
    on the page; may be missing.
    """
    kept = EditStore.in_memory() if store is None else store
    counted = Metrics("gateway") if metrics is None else metrics
    desk = Desk(link, kept, counted, limits)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await desk.start()
        yield
        await desk.close()
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
        Guard, keyring=keyring or Keyring(), limit=rate_limit or RateLimit(0.0, burst=1)
    )
    app.add_middleware(
        Edge,
        metrics=counted,
        max_photo_bytes=max_photo_bytes,
        multipart_paths=frozenset({"/v1/edits"}),
        body_timeout_s=body_timeout_s,
        tracing=link.tracing,
    )
    _add_errors(app)
    app.include_router(edits_router(desk, max_photo_bytes))
    _add_facts(app, link)
    _add_operations(app, link, kept, counted)
    _add_page(app, samples)
    return app


def _add_facts(app: FastAPI, link: Link) -> None:
    @app.post(
        "/v1/instructions",
        tags=["edits"],
        summary="Read a sentence",
        responses=problems(400, 408, 413, 422, 504),
    )
    async def read_instruction(request: Request, instruction: Instruction) -> EditRead | None:
        """The edit that the sentence asks for; null for "-"; 422 for one that asks for no edit."""
        if instruction.text.strip() == UNEDITED:
            return None
        return await link.read(instruction.text, caller=caller_of(request))

    @app.get("/v1/attributes", tags=["facts"], summary="What can be edited", responses=problems())
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

    @app.get(
        "/v1/channels",
        tags=["facts"],
        summary="The channels, and limits on their parameters",
        responses=problems(504),
    )
    async def channels(request: Request) -> dict[str, Any]:
        return await link.channels(caller=caller_of(request))

    @app.get(
        "/v1/schemes",
        tags=["facts"],
        summary="How a picture can travel",
        responses=problems(504),
    )
    async def schemes(request: Request) -> dict[str, Any]:
        """Every scheme with its CBR: the paper's way of counting, complex uses (CRC, header and
        padding included), and the figure that the paper prints. `missing` where it cannot be had.
        """
        return {"schemes": await link.schemes(caller=caller_of(request))}

    @app.get(
        "/v1/model",
        tags=["facts"],
        summary="The weights that are loaded at both ends",
        responses=problems(504),
    )
    async def model(request: Request) -> dict[str, Any]:
        return await link.model(caller=caller_of(request))


def _add_operations(app: FastAPI, link: Link, store: EditStore, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["operations"], summary="This process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["operations"],
        summary="All three services are serving, and edits can be kept",
        responses={503: {"description": "Not ready; the body says what is missing"}},
    )
    async def readyz() -> JSONResponse:
        services = await link.health()
        try:
            await store.ping()
            keeps = "SERVING"
        except EdscError:
            keeps = "NOT_SERVING"
        ready = all(state == "SERVING" for state in (keeps, *services.values()))
        metrics.ready.set(1.0 if ready else 0.0)
        return JSONResponse(
            {"ready": ready, "services": services, "store": keeps},
            status_code=200 if ready else 503,
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
        request.state.reason = error.kind
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
