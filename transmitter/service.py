"""edsc.v1.Transmitter: decode -> invert, read, edit, code -> encode."""

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, cast, get_args

import torch
from torch import Tensor

from shared.batching import Operation, Steps, ask
from shared.bundle import Bundle
from shared.compute import settle
from shared.errors import EdscError, InvalidRequest, PayloadTooLarge
from shared.images import encode_png
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import Call, Server, Slot, streaming, unary
from shared.schemes import Scheme
from shared.settings import MIB, Settings
from shared.symbols import check_snr_db
from shared.wire import degrees_to_wire, edit_to_wire, frame_to_wire, model_to_wire
from shared.worker import Worker
from transmitter.editing import Quality
from transmitter.pipeline import NO_EDIT, Transmission, Transmitter

DEFAULT_QUALITY: Final[Quality] = "balanced"
LANES: Final[tuple[Quality, ...]] = (DEFAULT_QUALITY, "fast", "paper")
PICTURES: Final[Operation[Tensor, bytes]] = Operation(
    "pictures", lambda images: [encode_png(image) for image in images], aside=True
)


@dataclass(frozen=True)
class Model:
    """What is loaded: the pipeline, and its description for whoever asks."""

    transmitter: Transmitter
    description: edsc_pb2.ModelDescription


class TransmitterService(edsc_pb2_grpc.TransmitterServicer):
    """Servicer of edsc.v1.Transmitter; keeps nothing between calls."""

    def __init__(self, server: Server, model: Slot[Model]) -> None:
        self.server = server
        self._model = model
        # A sentence is read in milliseconds: it should not wait for an inversion of ten seconds.
        self._reader = Worker(server.settings.queue_size, server.metrics)

    @unary
    def Transmit(self, request: edsc_pb2.TransmitRequest, call: Call) -> edsc_pb2.TransmitReply:
        """Photo and sentence to symbols."""
        model = self._model.get()
        check_request(request, self.server.settings)
        return self.server.worker.run_steps(
            call, lambda: self.transmit(model, request, call, None), self.lane_of(request)
        )

    @streaming
    def TransmitStream(
        self, request: edsc_pb2.TransmitRequest, call: Call
    ) -> Iterator[edsc_pb2.TransmitEvent]:
        """The same, with an event for every stage under way."""
        model = self._model.get()
        check_request(request, self.server.settings)
        events: queue.SimpleQueue[edsc_pb2.TransmitEvent | None] = queue.SimpleQueue()

        def progress(stage: str, fraction: float) -> None:
            told = edsc_pb2.Progress(
                stage=stage, fraction=fraction, elapsed_ms=call.watch.elapsed_ms()
            )
            events.put(edsc_pb2.TransmitEvent(progress=told))

        future = self.server.worker.submit_steps(
            call, lambda: self.transmit(model, request, call, progress), self.lane_of(request)
        )
        future.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get(timeout=call.remaining_s())) is not None:
                yield event
        except queue.Empty:
            future.cancel()
            raise call.gone() from None
        yield edsc_pb2.TransmitEvent(reply=self.server.worker.wait(call, future))

    @unary
    def ReadInstruction(
        self, request: edsc_pb2.ReadInstructionRequest, call: Call
    ) -> edsc_pb2.ReadInstructionReply:
        """The edit that a sentence asks for."""
        model = self._model.get()
        check_sentence(request.instruction, self.server.settings)
        if request.instruction.strip() == NO_EDIT:
            return edsc_pb2.ReadInstructionReply()

        def read() -> edsc_pb2.ReadInstructionReply:
            with call.watch.stage("read"):
                reading = model.transmitter.read(request.instruction)
            return edsc_pb2.ReadInstructionReply(
                edit=edit_to_wire(reading.edit, reading.confidence)
            )

        return self._reader.run(call, read)

    @unary
    def DescribeModel(
        self, request: edsc_pb2.DescribeModelRequest, call: Call
    ) -> edsc_pb2.ModelDescription:
        """Which weights are loaded and what they can do."""
        return self._model.get().description

    def lane_of(self, request: edsc_pb2.TransmitRequest) -> str | None:
        """Requests of one quality take about as long as each other: they queue together."""
        return quality_of(request)

    def transmit(
        self,
        model: Model,
        request: edsc_pb2.TransmitRequest,
        call: Call,
        progress: Callable[[str, float], None] | None,
    ) -> Steps[edsc_pb2.TransmitReply]:
        """Run the pipeline on a checked request, in steps; on the worker's thread."""
        scheme = Scheme.parse(request.scheme)
        if scheme is not Scheme.EDITABLE_DEEPSC:
            raise InvalidRequest(
                f"scheme is {scheme.value!r}; expected {Scheme.EDITABLE_DEEPSC.value!r}: the others"
                " are carried by the process `baselines`"
            )
        sent = yield from model.transmitter.transmitting(
            request.image,
            request.instruction,
            snr_db=request.snr_db,
            quality=quality_of(request),
            align=align_of(request),
            cancelled=call.cancelled,
            progress=progress,
        )
        return (yield from reply_with(sent, request, call))


def check_sentence(instruction: str, settings: Settings) -> None:
    """Raise InvalidRequest for an empty or an over-long sentence."""
    if not instruction.strip():
        raise InvalidRequest('instruction is empty; expected a sentence, or "-" for no edit')
    if len(instruction) > settings.max_sentence:
        raise InvalidRequest(
            f"instruction has {len(instruction)} characters; expected at most"
            f" {settings.max_sentence}"
        )


def check_request(request: edsc_pb2.TransmitRequest, settings: Settings) -> None:
    """Refuse what needs no network to refuse, before it waits for one."""
    if len(request.image) > settings.max_image_mib * MIB:
        raise PayloadTooLarge(
            f"image has {len(request.image)} bytes; expected at most {settings.max_image_mib * MIB}"
        )
    if not request.image:
        raise InvalidRequest("image has 0 bytes; expected a photo: JPEG, PNG, WebP, ...")
    check_sentence(request.instruction, settings)
    if not request.HasField("snr_db"):
        raise InvalidRequest("snr_db is missing; expected -20..40 dB")
    check_snr_db(request.snr_db)
    if request.quality and request.quality not in get_args(Quality):
        raise InvalidRequest(
            f"quality is {request.quality!r}; expected one of {', '.join(get_args(Quality))}"
        )


def quality_of(request: edsc_pb2.TransmitRequest) -> Quality:
    """The quality asked for, or the default."""
    return cast(Quality, request.quality or DEFAULT_QUALITY)


def align_of(request: edsc_pb2.TransmitRequest) -> bool:
    """Whether the face is to be found and aligned; true where the request does not say."""
    return request.align if request.HasField("align") else True


def reply_with(
    sent: Transmission, request: edsc_pb2.TransmitRequest, call: Call
) -> Steps[edsc_pb2.TransmitReply]:
    """The reply with the pictures and the time per stage; the last step of a request."""
    for stage, milliseconds in sent.timings_ms.items():
        if stage != "total":
            call.watch.add(stage, milliseconds)
    reply = transmission_to_wire(sent, request.snr_db)
    if not request.omit_pictures:
        with call.watch.stage("pictures"):
            pictures = yield from ask(PICTURES, [sent.aligned, sent.sent])
            reply.aligned_png, reply.sent_png = pictures
    reply.timings_ms.update(call.watch.timings_ms())
    return reply


def transmission_to_wire(sent: Transmission, snr_db: float) -> edsc_pb2.TransmitReply:
    """The reply without pictures and timings."""
    reply = edsc_pb2.TransmitReply(
        frame=frame_to_wire(sent.symbols, snr_db),
        match_steps=sent.match_steps,
        faces_found=sent.faces_found,
    )
    if sent.edit is not None:
        reply.edit.CopyFrom(edit_to_wire(sent.edit, sent.confidence or 0.0))
    if sent.reached is not None:
        reply.reached = sent.reached
    reply.degrees.extend(degrees_to_wire(sent.after, sent.before, sent.edit, sent.expected))
    return reply


def load_model(
    bundle: Bundle, device: torch.device, precision: torch.dtype = torch.float32
) -> Model:
    """Load the pipeline of a bundle and send two pictures: the first is slower than the others."""
    transmitter = Transmitter.from_bundle(bundle, device, precision)
    size = transmitter.image_size
    grey = encode_png(torch.zeros(1, 3, size, size))
    sent = transmitter.transmit(grey, NO_EDIT, snr_db=6.0, quality="fast", align=False)
    for align in (True, False):
        # A grey square has no face and perhaps no smile: the networks ran all the same.
        try:
            transmitter.transmit(
                grey, "make the smile bigger", snr_db=6.0, quality="balanced", align=align
            )
        except EdscError:
            continue
    description = model_to_wire(
        bundle,
        uses=sent.symbols.shape[1],
        image_size=sent.sent.shape[-1],
        qualities=get_args(Quality),
    )
    return Model(transmitter, description)


def register(server: Server) -> Callable[[], None]:
    """Add the servicer to `server`; gives the function that loads the weights."""
    settings = server.settings
    server.batch(LANES)
    model: Slot[Model] = Slot("transmitter")
    edsc_pb2_grpc.add_TransmitterServicer_to_server(TransmitterService(server, model), server.grpc)

    def load() -> None:
        device, precision = settle(settings, server.worker)
        model.put(load_model(Bundle.open(settings.weights), device, precision))

    return load
