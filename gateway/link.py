"""The order of the hops: transmit -> propagate -> receive. This is the whole link.

::

    photo, sentence --> Transmitter --SymbolFrame--> Channel --ReceivedFrame--> Receiver --> PNG

A request with another scheme goes to the Transmitter and the Receiver of the process `baselines`.

Frames pass through here as they came: not decoded, not checked, not touched. One deadline covers
the whole edit; every hop gets what the ones before it left over, and an edit that is cancelled
cancels the call under way.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, TypeVar

import grpc.aio

from gateway.answer import (
    PICTURES,
    Bandwidth,
    ChannelCode,
    ChannelName,
    Degrees,
    EditAnswer,
    EditRead,
    Order,
    StoredEdit,
    images_at,
    notes_on,
    stage_timings,
)
from shared.errors import BundleError, Cancelled, DeadlineExceeded, EdscError, Unavailable
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import (
    FULL_NAMES,
    GrpcService,
    is_serving,
    open_aio_channel,
    outgoing_metadata,
    translated,
)
from shared.schemes import PLANS, Plan, Scheme
from shared.settings import Settings
from shared.tracing import Tracing

T = TypeVar("T")
Progress = Callable[[str, float, float], None]  # stage, fraction of it 0..1, milliseconds so far

ATTEMPTS: Final = 3  # at a hop that a service dropped, on top of what gRPC itself tries again
PAUSE_S: Final = 0.1  # between them
FACTS_DEADLINE_S: Final = 5.0  # for a call that computes next to nothing
HEALTH_DEADLINE_S: Final = 2.0
START: Final = (
    "Schemes other than editable-deepsc are carried by a process of their own: start it with"
    " `edsc up --baselines`, or `python -m baselines`"
)


@dataclass(frozen=True)
class Caller:
    """Who asks, as every hop is told: request id and W3C traceparent (empty: none)."""

    request_id: str
    traceparent: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """gRPC metadata of a call on this caller's behalf."""
        return outgoing_metadata(self.request_id, self.traceparent)


class _Budget:
    """Seconds that an edit may take, and what is left of them."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = perf_counter()
        self.hops_ms: dict[str, float] = {}

    def left(self, service: GrpcService) -> float:
        """Seconds left for a call to `service`. Raises DeadlineExceeded when there are none."""
        left = self.seconds - (perf_counter() - self.start)
        if left <= 0.0:
            raise DeadlineExceeded(f"nothing of the {self.seconds:g} s is left for the {service}")
        return left

    def spent_ms(self) -> float:
        """Milliseconds since the edit began."""
        return (perf_counter() - self.start) * 1000.0

    @contextmanager
    def hop(self, name: str) -> Iterator[None]:
        """Time one call."""
        start = self.spent_ms()
        yield
        self.hops_ms[name] = self.spent_ms() - start


@contextmanager
def _calling(service: GrpcService, scheme: Scheme | None = None) -> Iterator[None]:
    """Errors of a call in our own words; a service that drops us is not a caller that left.

    scheme: what is being carried, for a service that need not be running.
    """
    try:
        with translated(service):
            yield
    except Unavailable as error:
        if service == "baselines" and scheme is not None:
            raise Unavailable(
                f"scheme {scheme.value!r} is not on offer: {error}. {START}"
            ) from error
        raise
    except Cancelled as error:
        raise Unavailable(f"the {service} dropped the call: it is shutting down") from error


async def _insist(budget: _Budget, hop: Callable[[], Awaitable[T]]) -> T:
    """A hop, tried again while there is time when a service goes away under it.

    gRPC tries again what was refused or lost before the first byte of an answer. It does not where
    a stream had begun, or where a service that is shutting down cancelled what it could not finish;
    at another replica that may still be done. Raises what the last attempt raised.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await hop()
        except Unavailable:
            if attempt == ATTEMPTS or budget.seconds * 1000.0 - budget.spent_ms() < 1000.0:
                raise
        await asyncio.sleep(PAUSE_S * attempt)
    raise AssertionError("the last attempt returns or raises")


class Link:
    """The services as one: opened inside a running event loop, closed by whoever made it.

    settings: targets, limits and TLS. deadline_s: for one edit, all hops together; None: the
    settings' default deadline. tracing: makes a span of every call; None: no spans.
    """

    def __init__(
        self,
        settings: Settings,
        deadline_s: float | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.tracing = tracing or Tracing.off()
        self.deadline_s = settings.default_deadline_s if deadline_s is None else deadline_s
        self._channels: dict[GrpcService, grpc.aio.Channel] = {}

    def _to(self, service: GrpcService) -> grpc.aio.Channel:
        if service not in self._channels:
            self._channels[service] = open_aio_channel(self.settings, service, self.tracing)
        return self._channels[service]

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    # ------------------------------------------------------------------------------------- one edit

    async def edit(
        self,
        edit_id: str,
        photo: bytes,
        order: Order,
        *,
        caller: Caller,
        progress: Progress | None = None,
    ) -> StoredEdit:
        """Send `photo` through the three hops.

        photo: the file as uploaded. Raises the services' own errors (InvalidRequest and its kinds,
        Busy), Unavailable for one that is down, DeadlineExceeded when `deadline_s` is spent.
        """
        budget = _Budget(self.deadline_s)
        tell = progress or (lambda stage, fraction, elapsed_ms: None)

        with budget.hop("transmit"):
            sent = await _insist(
                budget, lambda: self._transmit(photo, order, budget, caller, progress)
            )
        tell("propagate", 0.0, budget.spent_ms())
        with budget.hop("propagate"):
            crossed = await _insist(budget, lambda: self._propagate(sent, order, budget, caller))
        tell("receive", 0.0, budget.spent_ms())
        with budget.hop("receive"):
            drawn = await _insist(
                budget, lambda: self._receive(crossed.frame, order, budget, caller)
            )
        if len(drawn.png) != 1:
            raise EdscError(f"the receiver drew {len(drawn.png)} pictures; expected 1")

        # Whoever edited knows the degrees: the sender, or with M1 the receiver.
        by = drawn if drawn.degrees else sent
        edited = next((d for d in by.degrees if d.HasField("expected")), None)
        reached = by.reached if by.HasField("reached") else None
        code = _channel_code(sent, drawn)
        rician = order.channel is ChannelName.RICIAN
        answer = EditAnswer(
            id=edit_id,
            instruction=order.instruction,
            edit=_edit_read(sent.edit) if sent.HasField("edit") else None,
            degrees=_degrees(by.degrees),
            reached=reached,
            match_steps=by.match_steps,
            faces_found=sent.faces_found,
            notes=notes_on(
                edited=edited.attribute if edited else None,
                expected=edited.expected if edited else None,
                after=edited.after if edited else None,
                reached=reached,
                faces_found=sent.faces_found,
                code=code,
                edit_lost=(
                    sent.HasField("edit")
                    and PLANS[order.scheme].edit == "after"
                    and not drawn.HasField("edit")
                ),
            ),
            cbr=Bandwidth(
                paper=crossed.cbr.paper,
                complex_uses=crossed.cbr.complex_uses,
                uses=crossed.cbr.uses,
                pilot_uses=crossed.cbr.pilot_uses,
                header_uses=sent.header_uses,
            ),
            code=code,
            snr_db=order.snr_db,
            channel=order.channel,
            fading=order.fading,
            k_factor_db=order.k_factor_db if rician else None,
            csi=order.csi,
            fading_db=round(crossed.fading_db[0], 3) if crossed.fading_db else None,
            seed=crossed.seed,
            quality=order.quality,
            scheme=order.scheme,
            timings_ms=stage_timings(
                sent.timings_ms, crossed.timings_ms, drawn.timings_ms, budget.spent_ms()
            ),
            hops_ms={name: round(ms, 3) for name, ms in budget.hops_ms.items()},
            images=images_at(f"/v1/edits/{edit_id}"),
            bundle_digest=drawn.digest,
        )
        pngs = (sent.aligned_png, sent.sent_png, drawn.png[0])
        return StoredEdit(answer, dict(zip(PICTURES, pngs, strict=True)), sent.frame.samples)

    async def _transmit(
        self,
        photo: bytes,
        order: Order,
        budget: _Budget,
        caller: Caller,
        progress: Progress | None,
    ) -> edsc_pb2.TransmitReply:
        request = edsc_pb2.TransmitRequest(
            image=photo,
            instruction=order.instruction,
            snr_db=order.snr_db,
            quality=order.quality.value,
            align=order.align,
            scheme=order.scheme.value,
        )
        service = _carrier(order.scheme, "transmitter")
        stub = edsc_pb2_grpc.TransmitterStub(self._to(service))
        timeout, begun_ms = budget.left(service), budget.spent_ms()
        with _calling(service, order.scheme):
            if progress is None:
                reply: edsc_pb2.TransmitReply = await stub.Transmit(
                    request, timeout=timeout, metadata=caller.metadata
                )
                return reply
            async for event in stub.TransmitStream(
                request, timeout=timeout, metadata=caller.metadata
            ):
                if event.WhichOneof("event") == "reply":
                    reply = event.reply
                    return reply
                news = event.progress
                progress(news.stage, news.fraction, begun_ms + news.elapsed_ms)
        raise Unavailable(f"the {service} ended its stream without a reply")

    async def _propagate(
        self, sent: edsc_pb2.TransmitReply, order: Order, budget: _Budget, caller: Caller
    ) -> edsc_pb2.PropagateReply:
        request = edsc_pb2.PropagateRequest(
            frame=sent.frame,
            channel=order.channel.value,
            fading=order.fading.value,
            k_factor_db=order.k_factor_db,
            csi=order.csi.value,
            snr_db=order.snr_db,
            seed=order.seed,
            image_size=_png_width(sent.sent_png),
        )
        stub = edsc_pb2_grpc.ChannelStub(self._to("channel"))
        with _calling("channel"):
            reply: edsc_pb2.PropagateReply = await stub.Propagate(
                request, timeout=budget.left("channel"), metadata=caller.metadata
            )
        return reply

    async def _receive(
        self, frame: edsc_pb2.ReceivedFrame, order: Order, budget: _Budget, caller: Caller
    ) -> edsc_pb2.ReceiveReply:
        service = _carrier(order.scheme, "receiver")
        stub = edsc_pb2_grpc.ReceiverStub(self._to(service))
        with _calling(service, order.scheme):
            reply: edsc_pb2.ReceiveReply = await stub.Receive(
                edsc_pb2.ReceiveRequest(frame=frame, scheme=order.scheme.value),
                timeout=budget.left(service),
                metadata=caller.metadata,
            )
        return reply

    # ------------------------------------------------------------------------------------ the facts

    async def read(self, text: str, *, caller: Caller) -> EditRead | None:
        """The edit that a sentence asks for; None for "-". Raises InstructionRefused for none."""
        stub = edsc_pb2_grpc.TransmitterStub(self._to("transmitter"))
        request = edsc_pb2.ReadInstructionRequest(instruction=text)
        with _calling("transmitter"):
            reply = await stub.ReadInstruction(
                request, timeout=FACTS_DEADLINE_S, metadata=caller.metadata
            )
        return _edit_read(reply.edit) if reply.HasField("edit") else None

    async def channels(self, *, caller: Caller) -> dict[str, Any]:
        """The channels that there are, and limits on their parameters."""
        stub = edsc_pb2_grpc.ChannelStub(self._to("channel"))
        with _calling("channel"):
            about = await stub.Describe(
                edsc_pb2.DescribeChannelRequest(),
                timeout=FACTS_DEADLINE_S,
                metadata=caller.metadata,
            )
        return {
            "channels": [
                {
                    "name": kind.name,
                    "description": kind.description,
                    "fadings": list(kind.fadings),
                    "has_k_factor": kind.has_k_factor,
                }
                for kind in about.channels
            ],
            "csi": list(about.csi),
            "snr_db": {"minimum": about.min_snr_db, "maximum": about.max_snr_db},
            "k_factor_db": {"default": about.default_k_factor_db},
            "pilots": {"default": about.default_pilots},
        }

    async def schemes(self, *, caller: Caller) -> list[dict[str, Any]]:
        """How a picture can travel, with the bandwidth of each scheme where its process runs.

        `missing` says what a scheme lacks; no service has to be up for the list itself.
        """
        near, far = await asyncio.gather(
            self._carried("transmitter", caller), self._carried("baselines", caller)
        )
        return [
            _scheme_entry(plan, *(far if plan.is_baseline else near)) for plan in PLANS.values()
        ]

    async def _carried(
        self, service: GrpcService, caller: Caller
    ) -> tuple[dict[str, edsc_pb2.SchemeDescription], str]:
        """What a process carries by name, and why it says nothing (empty where it does)."""
        stub = edsc_pb2_grpc.TransmitterStub(self._to(service))
        try:
            with _calling(service):
                about = await stub.DescribeModel(
                    edsc_pb2.DescribeModelRequest(),
                    timeout=HEALTH_DEADLINE_S,
                    metadata=caller.metadata,
                )
        except EdscError as error:
            return {}, f"{error}. {START}" if service == "baselines" else str(error)
        return {entry.name: entry for entry in about.schemes}, ""

    async def model(self, *, caller: Caller) -> dict[str, Any]:
        """The weights at both ends. Raises BundleError when they are not the same."""
        request = edsc_pb2.DescribeModelRequest()
        with _calling("transmitter"):
            near = await edsc_pb2_grpc.TransmitterStub(self._to("transmitter")).DescribeModel(
                request, timeout=FACTS_DEADLINE_S, metadata=caller.metadata
            )
        with _calling("receiver"):
            far = await edsc_pb2_grpc.ReceiverStub(self._to("receiver")).Describe(
                request, timeout=FACTS_DEADLINE_S, metadata=caller.metadata
            )
        if near.digest != far.digest:
            raise BundleError(
                f"the transmitter has {near.name} {near.digest[:12]}, "
                f"the receiver {far.name} {far.digest[:12]}; expected the same"
            )
        return {
            "name": near.name,
            "digest": near.digest,
            "uses": near.uses,
            "image_size": near.image_size,
            "attributes": list(near.attributes),
            "max_degree": near.max_degree,
            "qualities": list(near.qualities),
            "networks": list(near.networks),
        }

    async def health(self) -> dict[str, str]:
        """Health of the three that a link needs, by grpc.health.v1.

        SERVING or NOT_SERVING (also when not reached).
        """
        serving = await asyncio.gather(
            *(is_serving(self._to(name), name, HEALTH_DEADLINE_S) for name in FULL_NAMES)
        )
        return {
            name: "SERVING" if ok else "NOT_SERVING"
            for name, ok in zip(FULL_NAMES, serving, strict=True)
        }


# --------------------------------------------------------------------------- protobuf to the answer


def _edit_read(edit: edsc_pb2.Edit) -> EditRead:
    change = edit.change if edit.HasField("change") else None
    return EditRead(
        attribute=edit.attribute,
        mode="target" if change is None else "change",
        direction=edit.direction or None,
        value=None if change is None else abs(change),
        target=edit.target if edit.HasField("target") else None,
        confidence=round(edit.confidence, 4),
        description=edit.description,
    )


def _carrier(scheme: Scheme, usual: GrpcService) -> GrpcService:
    """The process that carries a scheme; `usual`: the one that does for Editable-DeepSC."""
    return "baselines" if PLANS[scheme].is_baseline else usual


def _channel_code(sent: edsc_pb2.TransmitReply, drawn: edsc_pb2.ReceiveReply) -> ChannelCode | None:
    """Bits and blocks of a digital scheme; None for an analogue one."""
    if not drawn.blocks:
        return None
    return ChannelCode(
        stream_bits=sent.stream_bits, blocks=drawn.blocks, block_errors=drawn.block_errors
    )


def _scheme_entry(
    plan: Plan, carried: Mapping[str, edsc_pb2.SchemeDescription], silence: str
) -> dict[str, Any]:
    """One scheme of /v1/schemes; silence: why its process says nothing of it."""
    entry = carried.get(plan.scheme.value)
    bandwidth = None
    if entry is not None and entry.HasField("cbr"):
        bandwidth = {
            "paper": entry.cbr.paper,
            "complex_uses": entry.cbr.complex_uses,
            "uses": entry.cbr.uses,
            "header_uses": entry.header_uses,
            "printed": entry.printed_cbr if entry.HasField("printed_cbr") else None,
        }
    missing = entry.missing if entry is not None else silence or "its process does not carry it"
    return {
        "name": plan.scheme.value,
        "description": plan.description,
        "baseline": plan.is_baseline,
        "available": bandwidth is not None,
        "missing": missing or None,
        "cbr": bandwidth,
    }


def _png_width(png: bytes) -> int:
    """Pixels, from the header chunk that every PNG begins with; 0 for no picture."""
    return int.from_bytes(png[16:20], "big")


def _degrees(degrees: Iterable[edsc_pb2.AttributeDegrees]) -> Degrees:
    before = {d.attribute: d.before for d in degrees if d.HasField("before")}
    return Degrees(
        before=before or None,
        expected={d.attribute: d.expected for d in degrees if d.HasField("expected")},
        after={d.attribute: d.after for d in degrees if d.HasField("after")},
    )
