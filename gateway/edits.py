"""REST of edits and conversations: the form in, the answer out, in whatever shape was asked for.

::

    POST   /v1/edits                      JSON, PNG, progress events; 202 with Prefer: respond-async
    GET    /v1/edits/{id}                 the answer, or 202 and how far it is
    POST   /v1/edits/{id}/rerun           run a failed one again
    DELETE /v1/edits/{id}                 pictures, latent and row are gone
    GET    /v1/edits/{id}/{image}.png     aligned, sent, received
    GET    /v1/edits/{id}/latent          what was sent: complex64 symbols, little-endian
    POST   /v1/conversations              edits that belong together: send `conversation` with them
    GET    /v1/conversations/{id}         its edits in order        DELETE removes them all
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from fastapi import APIRouter, Depends, File, Form, Header, Request, UploadFile
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from gateway.answer import PICTURES, EditAnswer, Order, StoredEdit
from gateway.desk import Asked, Desk
from gateway.edge import PROBLEM_TYPE, problem, problem_of
from gateway.form import EVENT_STREAM, preferred, read_order
from gateway.ledger import Entry, State
from gateway.link import Caller
from gateway.store import answer_of, fingerprint_of
from shared.errors import Cancelled, EdscError, InvalidRequest, PayloadTooLarge
from shared.telemetry import logger

KEEPALIVE_S: Final = 10.0
T = TypeVar("T")
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]{1,255}")


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class EditStatus(BaseModel):
    """An edit that is not done."""

    id: str
    state: Literal["accepted", "running", "failed"]
    detail: Annotated[str, Field(description="what that means, and what can be done")]
    attempts: Annotated[int, Field(description="how often it was begun")]
    rerunnable: Annotated[bool, Field(description="failed, and its photo is still kept")]
    conversation: str | None
    created_at: Annotated[float, Field(description="seconds since 1970, UTC")]
    updated_at: Annotated[float, Field(description="seconds since 1970, UTC")]
    problem: Annotated[Problem | None, Field(description="why it failed")]


class Conversation(BaseModel):
    """Edits that belong together."""

    id: str
    created_at: Annotated[float, Field(description="seconds since 1970, UTC")]
    edits: Annotated[list[EditAnswer | EditStatus], Field(description="in order")]


_WORDS: Final[Mapping[int, str]] = {
    400: "The body cannot be read",
    401: "No API key, or an unknown one",
    404: "There is none of this id",
    406: "Accept asks for none of the three",
    408: "The body did not arrive in time",
    409: "Its state does not allow it",
    413: "The upload is too large",
    415: "Not a picture, or not a form",
    422: "The request, the photo or the sentence cannot be served",
    429: "Too busy, or asked too often; Retry-After says when to come back",
    500: "Something went wrong here",
    503: "A service is down or starting",
    504: "The time for this edit ran out",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI is told of errors; every path may also answer 401, 429, 500 and 503."""
    return {
        status: {
            "description": _WORDS[status],
            "content": {PROBLEM_TYPE: {"schema": Problem.model_json_schema()}},
        }
        for status in sorted({*statuses, 401, 429, 500, 503})
    }


def caller_of(request: Request) -> Caller:
    """Who asks."""
    return Caller(request.state.request_id, request.state.traceparent)


def edits_router(desk: Desk, max_photo_bytes: int) -> APIRouter:
    """The paths of edits and conversations. max_photo_bytes: largest upload, bytes."""
    router = APIRouter(tags=["edits"])
    _add_taking(router, desk, max_photo_bytes)
    _add_keeping(router, desk)
    _add_conversations(router, desk)
    return router


def _add_taking(router: APIRouter, desk: Desk, max_photo_bytes: int) -> None:
    @router.post(
        "/v1/edits",
        response_model=EditAnswer,
        summary="Edit a photo and send it across the channel",
        responses={
            200: {
                "description": "The edit as JSON, the received picture as PNG, or progress events "
                "with the JSON last, as Accept asks",
                "content": {
                    "image/png": {"schema": {"type": "string", "format": "binary"}},
                    EVENT_STREAM: {"schema": {"type": "string"}},
                },
            },
            202: {"description": "Accepted and kept; Location says where", "model": EditStatus},
            **problems(400, 404, 406, 408, 409, 413, 415, 422, 504),
        },
    )
    async def edit_photo(
        request: Request,
        image: Annotated[UploadFile, File(description="the photo: JPEG, PNG, WebP, ...")],
        order: Annotated[Order, Depends(read_order)],
        conversation: Annotated[
            str | None, Form(description="id of a conversation that this edit belongs to")
        ] = None,
        idempotency_key: Annotated[
            str | None,
            Header(
                max_length=255,
                description="a name for this request: sent again with it, it is answered again, "
                "and not edited twice",
            ),
        ] = None,
        prefer: Annotated[
            str, Header(description='"respond-async": 202 once the edit is kept (RFC 7240)')
        ] = "",
    ) -> Response:
        """Inverts the photo, edits it, sends 256 symbols, draws what was received."""
        wanted = preferred(request.headers.get("accept", "*/*"))
        # `size` is what was received, so a part that is too large is never read back.
        if (image.size or 0) > max_photo_bytes:
            raise PayloadTooLarge(
                f"the photo has {image.size} bytes; expected at most {max_photo_bytes}"
            )
        photo = await image.read()
        if not photo:
            raise InvalidRequest("the photo is empty: 0 bytes")
        if idempotency_key is not None and not _PRINTABLE.fullmatch(idempotency_key):
            raise InvalidRequest(
                f"the Idempotency-Key has {len(idempotency_key)} characters; expected 1 to 255"
                " printable ones without spaces"
            )
        fields = [(n, v) for n, v in (await request.form()).multi_items() if isinstance(v, str)]
        asked = Asked(
            photo=photo,
            order=order,
            caller=caller_of(request),
            fingerprint=fingerprint_of(fields, photo),
            owner=request.state.owner,
            key=idempotency_key,
            conversation=conversation or None,
            detached="respond-async" in re.split(r"[\s,;]+", prefer.lower()),
        )
        if asked.detached:
            return _status_response(await desk.submit(asked))
        if wanted == EVENT_STREAM:
            return StreamingResponse(
                _events(desk, asked), media_type=EVENT_STREAM, headers={"cache-control": "no-store"}
            )
        done = await _unless_gone(request, desk.edit(asked))
        where = _where(done.answer.id)
        if wanted == "image/png":
            return Response(done.pictures["received"], media_type="image/png", headers=where)
        return Response(done.json, media_type="application/json", headers=where)

    @router.post(
        "/v1/edits/{edit_id}/rerun",
        status_code=202,
        response_model=EditStatus,
        summary="Run a failed edit again",
        responses=problems(404, 409, 422),
    )
    async def rerun(request: Request, edit_id: str) -> Response:
        """For an edit that failed through no fault of its own: its photo is still kept."""
        entry = await desk.rerun(edit_id, request.state.owner, caller_of(request))
        return _status_response(entry)


def _add_keeping(router: APIRouter, desk: Desk) -> None:
    @router.get(
        "/v1/edits/{edit_id}",
        response_model=EditAnswer,
        summary="An edit",
        responses={
            200: {
                "description": "The answer of an edit that is done, the state of one that failed",
                "model": EditAnswer | EditStatus,
            },
            202: {"description": "Not done yet", "model": EditStatus},
            **problems(404, 422),
        },
    )
    async def get_edit(request: Request, edit_id: str) -> Response:
        entry = await desk.store.entry(edit_id, request.state.owner)
        if entry.state is State.DONE:
            return JSONResponse(answer_of(entry).model_dump(mode="json"))
        return _status_response(entry)

    @router.delete(
        "/v1/edits/{edit_id}",
        status_code=204,
        summary="Remove an edit",
        responses=problems(404, 422),
    )
    async def delete_edit(request: Request, edit_id: str) -> None:
        """Its pictures, its latent, its photo and its row; one under way is stopped."""
        await desk.delete(edit_id, request.state.owner)

    @router.get(
        "/v1/edits/{edit_id}/latent",
        summary="What the transmitter sent: complex64, little-endian",
        response_class=Response,
        responses={
            200: {
                "content": {
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
                }
            },
            **problems(404, 422),
        },
    )
    async def get_latent(request: Request, edit_id: str) -> Response:
        return Response(
            await desk.store.latent(edit_id, request.state.owner),
            media_type="application/octet-stream",
            headers={"cache-control": "private, no-store"},
        )

    @router.get(
        "/v1/edits/{edit_id}/{picture}.png",
        summary="A picture of an edit: " + ", ".join(PICTURES),
        response_class=Response,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **problems(404, 422),
        },
    )
    async def get_picture(request: Request, edit_id: str, picture: str) -> Response:
        return Response(
            await desk.store.picture(edit_id, picture, request.state.owner),
            media_type="image/png",
            headers={"cache-control": "private, max-age=3600, immutable"},
        )


def _add_conversations(router: APIRouter, desk: Desk) -> None:
    @router.post(
        "/v1/conversations",
        status_code=201,
        response_model=Conversation,
        summary="Begin a conversation",
        responses=problems(422),
    )
    async def begin(request: Request) -> Response:
        """Its edits are listed together and removed together."""
        conversation_id, created_at = await desk.store.converse(request.state.owner)
        return JSONResponse(
            {"id": conversation_id, "created_at": created_at, "edits": []},
            status_code=201,
            headers={"location": f"/v1/conversations/{conversation_id}"},
        )

    @router.get(
        "/v1/conversations/{conversation_id}",
        response_model=Conversation,
        summary="A conversation",
        responses=problems(404, 422),
    )
    async def get_conversation(request: Request, conversation_id: str) -> Response:
        created_at, entries = await desk.store.conversation(conversation_id, request.state.owner)
        edits = [
            answer_of(entry).model_dump(mode="json")
            if entry.state is State.DONE
            else status_of(entry)
            for entry in entries
        ]
        return JSONResponse({"id": conversation_id, "created_at": created_at, "edits": edits})

    @router.delete(
        "/v1/conversations/{conversation_id}",
        status_code=204,
        summary="Remove a conversation and its edits",
        responses=problems(404, 409, 422),
    )
    async def delete_conversation(request: Request, conversation_id: str) -> None:
        owner = request.state.owner
        _, entries = await desk.store.conversation(conversation_id, owner)
        for entry in entries:
            await desk.delete(entry.id, owner)
        await desk.store.end_conversation(conversation_id)


def _where(edit_id: str) -> dict[str, str]:
    return {"location": f"/v1/edits/{edit_id}", "x-edit-id": edit_id}


def status_of(entry: Entry) -> dict[str, Any]:
    """What is told of an edit that is not done."""
    told = json.loads(entry.problem) if entry.problem else None
    waiting = {
        State.ACCEPTED: "kept; it will be run again, also if the gateway restarts",
        State.RUNNING: "kept and under way; it is finished also if the gateway restarts",
        State.FAILED: "failed; POST to its /rerun runs it again"
        if entry.rerunnable
        else "failed, and would fail again: see the problem",
        State.DONE: "done",
    }
    return {
        "id": entry.id,
        "state": entry.state.value,
        "detail": waiting[entry.state],
        "attempts": entry.attempts,
        "rerunnable": entry.rerunnable,
        "conversation": entry.conversation,
        "created_at": entry.created_at,
        "updated_at": entry.updated_at,
        "problem": told if entry.state is State.FAILED else None,
    }


def _status_response(entry: Entry) -> JSONResponse:
    """202 for an edit that goes on, 200 for one that has ended."""
    if entry.state is State.DONE:
        body = answer_of(entry).model_dump(mode="json")
        return JSONResponse(body, headers=_where(entry.id))
    status = 200 if entry.state is State.FAILED else 202
    return JSONResponse(status_of(entry), status_code=status, headers=_where(entry.id))


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


async def _events(desk: Desk, asked: Asked) -> AsyncIterator[bytes]:
    """Server-sent events: `progress` while the work goes on, then one `result` or one `problem`."""
    queue: asyncio.Queue[bytes] = asyncio.Queue()

    def progress(stage: str, fraction: float, elapsed_ms: float) -> None:
        news = {"stage": stage, "fraction": round(fraction, 4), "elapsed_ms": round(elapsed_ms, 1)}
        queue.put_nowait(_event("progress", news))

    task: asyncio.Task[StoredEdit] = asyncio.create_task(desk.edit(asked, progress))
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
            yield _event("problem", problem_of(error, asked.caller.request_id))
        except Exception:
            logger().exception("failed")
            body = problem("InternalError", 500, "The log has more.", asked.caller.request_id)
            yield _event("problem", body)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
