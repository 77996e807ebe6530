"""edsc.v1.Channel: decode -> fade and add noise -> encode."""

import secrets
from collections.abc import Callable
from typing import Final, cast, get_args

import torch

from channel_sim.channel import Channel, ChannelConfig
from channel_sim.fading import K_FACTOR_MAX_DB, Csi, Fading, Kind
from shared.errors import InvalidRequest
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import Call, Server, unary
from shared.symbols import SNR_MAX_DB, SNR_MIN_DB, average_power, cbr
from shared.wire import cbr_to_wire, frame_from_wire, frame_to_wire, reception_to_wire

DEFAULT_IMAGE_SIZE: Final = 128  # pixels
K_FACTOR_MIN_DB: Final = 0.0  # below, more is scattered than comes directly: ask for rayleigh
_SEED_BITS: Final = 53  # a drawn seed survives JSON, whose numbers are doubles

_DESCRIPTIONS: Final[dict[str, str]] = {
    "awgn": "additive white Gaussian noise, no fading",
    "rayleigh": "many scattered paths, none direct",
    "rician": "a direct path over scattered ones, K dB stronger",
}


class ChannelService(edsc_pb2_grpc.ChannelServicer):
    """Servicer of edsc.v1.Channel; keeps nothing between calls."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._max_samples = server.settings.max_samples

    @unary
    def Propagate(self, request: edsc_pb2.PropagateRequest, call: Call) -> edsc_pb2.PropagateReply:
        """Fade a frame and add noise."""
        return self.server.worker.run(call, lambda: self._propagate(request, call))

    def _propagate(self, request: edsc_pb2.PropagateRequest, call: Call) -> edsc_pb2.PropagateReply:
        with call.watch.stage("decode"):
            config = config_from_wire(request)
            if not request.HasField("snr_db"):
                raise InvalidRequest("snr_db is missing; expected -20..40 dB")
            symbols, _coded_for_db = frame_from_wire(request.frame, self._max_samples)  # [B, n]
            messages, uses = symbols.shape
            pilots = config.pilots if config.csi == "estimated" else 0
            if messages * pilots > self._max_samples:
                raise InvalidRequest(
                    f"{messages} messages x {pilots} pilots; expected at most {self._max_samples}"
                )
            seed = request.seed if request.HasField("seed") else secrets.randbits(_SEED_BITS)
            size = request.image_size or DEFAULT_IMAGE_SIZE
            spent = cbr(uses, size, size, pilots=pilots)
        with call.watch.stage("propagate"):
            generator = torch.Generator().manual_seed(seed)
            reception = Channel(config)(symbols, request.snr_db, generator)
        with call.watch.stage("encode"):
            reply = edsc_pb2.PropagateReply(
                frame=reception_to_wire(reception), cbr=cbr_to_wire(spent, pilots), seed=seed
            )
            if reception.h is not None:
                gain = average_power(reception.h).clamp_min(1e-12)  # [B]
                reply.fading_db.extend((10.0 * gain.log10()).tolist())
        reply.timings_ms.update(call.watch.timings_ms())
        return reply

    @unary
    def Describe(
        self, request: edsc_pb2.DescribeChannelRequest, call: Call
    ) -> edsc_pb2.ChannelDescription:
        """The channels that there are."""
        defaults = ChannelConfig("awgn")
        return edsc_pb2.ChannelDescription(
            channels=[
                edsc_pb2.ChannelKind(
                    name=kind,
                    description=_DESCRIPTIONS[kind],
                    fadings=[] if kind == "awgn" else get_args(Fading),
                    has_k_factor=kind == "rician",
                )
                for kind in get_args(Kind)
            ],
            csi=get_args(Csi),
            min_snr_db=SNR_MIN_DB,
            max_snr_db=SNR_MAX_DB,
            default_k_factor_db=defaults.k_factor_db,
            default_pilots=defaults.pilots,
            max_samples=self._max_samples,
        )


def config_from_wire(request: edsc_pb2.PropagateRequest) -> ChannelConfig:
    """The channel that a request asks for; InvalidRequest names a value that does not exist."""
    defaults = ChannelConfig("awgn")
    k_factor_db = defaults.k_factor_db
    if request.HasField("k_factor_db"):
        k_factor_db = request.k_factor_db
        if not K_FACTOR_MIN_DB <= k_factor_db <= K_FACTOR_MAX_DB:
            raise InvalidRequest(
                f"k_factor_db is {k_factor_db:g}; expected a finite number in"
                f" {K_FACTOR_MIN_DB:g}..{K_FACTOR_MAX_DB:g} dB"
            )
    return ChannelConfig(
        # Words go in as they came: ChannelConfig says which it knows.
        kind=cast(Kind, request.channel or defaults.kind),
        fading=cast(Fading, request.fading or defaults.fading),
        k_factor_db=k_factor_db,
        csi=cast(Csi, request.csi or defaults.csi),
        pilots=request.pilots if request.HasField("pilots") else defaults.pilots,
    )


def register(server: Server) -> Callable[[], None]:
    """Add the servicer to `server`; gives the function that warms it up."""
    torch.set_num_threads(server.settings.threads or 1)  # 256 samples are no work to share
    edsc_pb2_grpc.add_ChannelServicer_to_server(ChannelService(server), server.grpc)

    def load() -> None:
        generator = torch.Generator().manual_seed(0)
        symbols = torch.ones(1, 256, dtype=torch.complex64)  # [1, n], power 1
        for kind in get_args(Kind):
            received = Channel(ChannelConfig(kind))(symbols, 6.0, generator)
            reception_to_wire(received)
        frame_from_wire(frame_to_wire(symbols, 6.0))

    return load
