"""edsc.v1.Transmitter and edsc.v1.Receiver for the schemes compared with, in one process.

::

    TransmitRequest{scheme} --> read, align, scheme.transmit --> SymbolFrame   (to the Channel)
    ReceiveRequest{scheme}  --> scheme.receive, M1: edit     --> PNG

The two ends share the weights, which is what keeps this to one process; they share nothing of a
request: a receiver's answer is made from its frame alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, get_args

import torch

from baselines.editor import Watch
from baselines.pipeline import transmit
from baselines.schemes import BaseScheme, Schemes
from shared.batching import Steps
from shared.bundle import Bundle
from shared.compute import settle
from shared.errors import BundleError, EdscError, InvalidRequest, Unavailable
from shared.images import encode_png
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import Call, Server, Slot, unary
from shared.schemes import PLANS, Scheme
from shared.symbols import Reception
from shared.telemetry import logger
from shared.wire import (
    degrees_to_wire,
    edit_to_wire,
    model_to_wire,
    reception_from_wire,
    scheme_to_wire,
)
from transmitter.editing import Quality
from transmitter.service import (
    Model,
    TransmitterService,
    align_of,
    quality_of,
    reply_with,
)

WARM_UP_SNR_DB: Final = 12.0


@dataclass(frozen=True)
class Baselines(Model):
    """What is loaded: a transmitter's nets, their description, and the schemes around them."""

    schemes: Schemes


class BaselineTransmitterService(TransmitterService):
    """Servicer of edsc.v1.Transmitter for every scheme that `baselines.schemes` knows."""

    def __init__(self, server: Server, model: Slot[Model], baselines: Slot[Baselines]) -> None:
        super().__init__(server, model)
        self._baselines = baselines

    def lane_of(self, request: edsc_pb2.TransmitRequest) -> None:
        """All in the worker's one queue: schemes share no passes of the networks."""

    def transmit(
        self,
        model: Model,
        request: edsc_pb2.TransmitRequest,
        call: Call,
        progress: Callable[[str, float], None] | None,
    ) -> Steps[edsc_pb2.TransmitReply]:
        """Run the scheme's sending end on a checked request; on the worker's thread."""
        scheme = scheme_of(self._baselines.get(), request.scheme)
        transmission, sent = transmit(
            scheme,
            model.transmitter,
            request.image,
            request.instruction,
            snr_db=request.snr_db,
            quality=quality_of(request),
            align=align_of(request),
            cancelled=call.cancelled,
            progress=progress,
        )
        reply = yield from reply_with(transmission, request, call)
        reply.header_uses = scheme.header_uses
        reply.stream_bits = 0 if sent.data is None else 8 * len(sent.data)
        return reply


class BaselineReceiverService(edsc_pb2_grpc.ReceiverServicer):
    """Servicer of edsc.v1.Receiver for the same schemes; one message a frame."""

    def __init__(self, server: Server, baselines: Slot[Baselines]) -> None:
        self.server = server
        self._baselines = baselines

    @unary
    def Receive(self, request: edsc_pb2.ReceiveRequest, call: Call) -> edsc_pb2.ReceiveReply:
        """Decode, and edit where that is the receiver's part."""
        model = self._baselines.get()
        return self.server.worker.run(call, lambda: self._receive(model, request, call))

    def _receive(
        self, model: Baselines, request: edsc_pb2.ReceiveRequest, call: Call
    ) -> edsc_pb2.ReceiveReply:
        with call.watch.stage("decode"):
            scheme = scheme_of(model, request.scheme)
            if request.frame.messages != 1:
                raise InvalidRequest(f"frame has {request.frame.messages} messages; expected 1")
            reception = reception_from_wire(request.frame, self.server.settings.max_samples)
        with call.watch.stage("receive"):
            got = scheme.receive(reception, Watch(call.cancelled))
        with call.watch.stage("pictures"):
            picture = encode_png(got.image)
        reply = edsc_pb2.ReceiveReply(
            png=[picture],
            image_size=got.image.shape[-1],
            digest=model.description.digest,
            blocks=got.blocks,
            block_errors=got.block_errors,
        )
        if got.degrees is not None and got.edit is not None:
            seen = got.degrees
            reply.degrees.extend(degrees_to_wire(seen.after, seen.before, got.edit, seen.expected))
            reply.edit.CopyFrom(edit_to_wire(got.edit, 0.0))
            reply.match_steps = seen.match_steps
            if seen.reached is not None:
                reply.reached = seen.reached
        reply.timings_ms.update(call.watch.timings_ms())
        return reply

    @unary
    def Describe(
        self, request: edsc_pb2.DescribeModelRequest, call: Call
    ) -> edsc_pb2.ModelDescription:
        """Which weights are loaded, and the schemes."""
        return self._baselines.get().description


def scheme_of(model: Baselines, name: str) -> BaseScheme:
    """The scheme of this name. Unavailable where the bundle lacks its net, or Sionna is missing."""
    try:
        return model.schemes[name]
    except BundleError as error:
        raise Unavailable(f"scheme {name!r} cannot be had here: {error}") from error


def describe(schemes: Schemes) -> list[edsc_pb2.SchemeDescription]:
    """Every baseline with its bandwidth, or with what it lacks here: a net, or Sionna."""
    found = []
    for name in schemes:
        plan = PLANS[Scheme(name)]
        if not plan.is_baseline:
            continue
        try:
            scheme = schemes[name]
        except (BundleError, Unavailable) as error:
            logger().info("scheme not on offer", scheme=name, reason=str(error))
            found.append(scheme_to_wire(plan, spent=None, missing=str(error)))
            continue
        found.append(
            scheme_to_wire(
                plan,
                spent=scheme.cbr(),
                header_uses=scheme.header_uses,
                printed=scheme.cbr_printed,
            )
        )
    return found


def load_baselines(
    bundle: Bundle, device: torch.device, precision: torch.dtype = torch.float32
) -> Baselines:
    """Load what there is, and run every kind of carrier once: the first run is slower."""
    schemes = Schemes.from_bundle(bundle, device, precision)
    transmitter = schemes.editor.transmitter
    descriptions = describe(schemes)
    size = transmitter.image_size
    grey = torch.zeros(1, 3, size, size)
    for offered in descriptions:
        if offered.missing:
            continue
        scheme = schemes[offered.name]
        try:
            symbols = scheme.transmit(grey, None, WARM_UP_SNR_DB, "fast").symbols  # [1, n]
        except EdscError:  # grey may have no stream of this size; the codec ran all the same
            continue
        one = torch.ones(1, 1, dtype=torch.complex64)
        scheme.receive(Reception(symbols, one, None, torch.full((1,), 1e-3)))
    description = model_to_wire(
        bundle,
        uses=schemes[Scheme.PCA_LMMSE].uses,
        image_size=size,
        qualities=get_args(Quality),
        schemes=descriptions,
    )
    return Baselines(transmitter, description, schemes)


def register(server: Server) -> Callable[[], None]:
    """Add both servicers to `server`; gives the function that loads the weights."""
    settings = server.settings
    model: Slot[Model] = Slot("baselines")
    baselines: Slot[Baselines] = Slot("baselines")
    edsc_pb2_grpc.add_TransmitterServicer_to_server(
        BaselineTransmitterService(server, model, baselines), server.grpc
    )
    edsc_pb2_grpc.add_ReceiverServicer_to_server(
        BaselineReceiverService(server, baselines), server.grpc
    )

    def load() -> None:
        device, precision = settle(settings, server.worker)
        loaded = load_baselines(Bundle.open(settings.weights), device, precision)
        baselines.put(loaded)
        model.put(loaded)

    return load
