"""edsc.v1.Receiver: decode -> equalise, decode, draw -> encode as PNG."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from receiver.pipeline import Receiver
from shared.batching import Operation, Steps, ask, ask_one
from shared.bundle import Bundle
from shared.compute import in_shares, settle
from shared.errors import InvalidRequest, PayloadTooLarge
from shared.images import encode_png
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import Call, Server, Slot, unary
from shared.schemes import Scheme
from shared.symbols import Reception
from shared.wire import model_to_wire, reception_from_wire

MAX_MESSAGES: Final = 64  # pictures in one reply
PICTURES: Final[Operation[Tensor, bytes]] = Operation(
    "pictures", lambda images: [encode_png(image) for image in images], aside=True
)


@dataclass(frozen=True)
class Model:
    """What is loaded: the pipeline, as an operation that requests share, and its description."""

    receiver: Receiver
    draw: Operation[Reception, Tensor]
    description: edsc_pb2.ModelDescription


class ReceiverService(edsc_pb2_grpc.ReceiverServicer):
    """Servicer of edsc.v1.Receiver; keeps nothing between calls."""

    def __init__(self, server: Server, model: Slot[Model]) -> None:
        self.server = server
        self._model = model

    @unary
    def Receive(self, request: edsc_pb2.ReceiveRequest, call: Call) -> edsc_pb2.ReceiveReply:
        """Draw one picture per message."""
        model = self._model.get()
        return self.server.worker.run_steps(call, lambda: self._receive(model, request, call))

    def _receive(
        self, model: Model, request: edsc_pb2.ReceiveRequest, call: Call
    ) -> Steps[edsc_pb2.ReceiveReply]:
        with call.watch.stage("decode"):
            scheme = Scheme.parse(request.scheme)
            if scheme is not Scheme.EDITABLE_DEEPSC:
                raise InvalidRequest(
                    f"scheme is {scheme.value!r}; expected {Scheme.EDITABLE_DEEPSC.value!r}: the"
                    " others are carried by the process `baselines`"
                )
            frame = request.frame
            if frame.messages > MAX_MESSAGES:
                raise PayloadTooLarge(
                    f"frame has {frame.messages} messages; expected at most {MAX_MESSAGES}"
                )
            if frame.uses != model.description.uses:
                raise InvalidRequest(
                    f"frame has {frame.uses} uses per message; expected {model.description.uses}"
                )
            reception = reception_from_wire(frame, self.server.settings.max_samples)
        with call.watch.stage("receive"):
            images = yield from ask_one(model.draw, reception)  # [B, 3, H, W]
        with call.watch.stage("pictures"):
            pictures = yield from ask(PICTURES, images.split(1))
        reply = edsc_pb2.ReceiveReply(
            png=pictures, image_size=images.shape[-1], digest=model.description.digest
        )
        reply.timings_ms.update(call.watch.timings_ms())
        return reply

    @unary
    def Describe(
        self, request: edsc_pb2.DescribeModelRequest, call: Call
    ) -> edsc_pb2.ModelDescription:
        """Which weights are loaded."""
        return self._model.get().description


def load_model(
    bundle: Bundle, device: torch.device, precision: torch.dtype = torch.float32
) -> Model:
    """Load the pipeline of a bundle and draw once: the first picture is slower than the others."""
    receiver = Receiver.from_bundle(bundle, device, precision=precision)
    silence = Reception(
        y=torch.ones(1, receiver.uses, dtype=torch.complex64),  # [1, n], power 1
        h=torch.ones(1, 1, dtype=torch.complex64),  # [1, 1]
        pilots=None,
        noise_variance=torch.ones(1),  # [1]
    )
    image = receiver(silence)  # [1, 3, S, S]
    return Model(
        receiver,
        in_shares(Operation("receive", receiver.draw, receiver.most), device),
        model_to_wire(bundle, uses=receiver.uses, image_size=image.shape[-1]),
    )


def register(server: Server) -> Callable[[], None]:
    """Add the servicer to `server`; gives the function that loads the weights."""
    settings = server.settings
    server.batch()
    model: Slot[Model] = Slot("receiver")
    edsc_pb2_grpc.add_ReceiverServicer_to_server(ReceiverService(server, model), server.grpc)

    def load() -> None:
        device, precision = settle(settings, server.worker)
        model.put(load_model(Bundle.open(settings.weights), device, precision))

    return load
