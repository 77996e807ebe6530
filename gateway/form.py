"""What a request asks for: the form of POST /v1/edits, and the media type that Accept prefers."""

from typing import Annotated, Final

from fastapi import Form
from starlette.exceptions import HTTPException

from gateway.answer import (
    DEFAULT_K_DB,
    DEFAULT_SNR_DB,
    K_MAX_DB,
    K_MIN_DB,
    MAX_SEED,
    MAX_SENTENCE,
    SNR_MAX_DB,
    SNR_MIN_DB,
    ChannelName,
    Csi,
    Fading,
    Order,
    Quality,
)
from shared.errors import InvalidRequest
from shared.schemes import Scheme

EVENT_STREAM: Final = "text/event-stream"


async def read_order(
    instruction: Annotated[
        str,
        Form(
            min_length=1,
            max_length=MAX_SENTENCE,
            description='what to change, in plain English; "-" sends the photo unedited',
            examples=["make the smile bigger"],
        ),
    ],
    snr_db: Annotated[
        float,
        Form(ge=SNR_MIN_DB, le=SNR_MAX_DB, allow_inf_nan=False, description="Es/N0 in dB"),
    ] = DEFAULT_SNR_DB,
    channel: Annotated[ChannelName, Form(description="law of the channel")] = ChannelName.AWGN,
    k_factor_db: Annotated[
        float,
        Form(ge=K_MIN_DB, le=K_MAX_DB, allow_inf_nan=False, description="Rician K in dB"),
    ] = DEFAULT_K_DB,
    fading: Annotated[
        Fading, Form(description="one coefficient per message, or one per channel use")
    ] = Fading.BLOCK,
    csi: Annotated[
        Csi, Form(description="the receiver is told the fading, or estimates it from pilots")
    ] = Csi.PERFECT,
    seed: Annotated[
        int | None, Form(ge=0, le=MAX_SEED, description="of fading and noise; drawn if absent")
    ] = None,
    quality: Annotated[
        Quality, Form(description="refinement of the inversion: 0, 10 or 110 steps")
    ] = Quality.BALANCED,
    scheme: Annotated[Scheme, Form(description="how the picture travels")] = (
        Scheme.EDITABLE_DEEPSC
    ),
    align: Annotated[
        bool, Form(description="find and align the face; false for input aligned already")
    ] = True,
) -> Order:
    """The form of POST /v1/edits, every default filled in."""
    if csi is Csi.ESTIMATED and fading is Fading.FAST and channel is not ChannelName.AWGN:
        raise InvalidRequest(
            "csi=estimated with fading=fast: a coefficient that changes with every channel use "
            "cannot be estimated from pilots sent before it; use fading=block or csi=perfect"
        )
    order = Order(
        instruction=instruction,
        snr_db=snr_db,
        channel=channel,
        k_factor_db=k_factor_db,
        fading=fading,
        csi=csi,
        quality=quality,
        scheme=scheme,
        align=align,
    )
    return order if seed is None else Order(**{**vars(order), "seed": seed})


def preferred(accept: str) -> str:
    """The media type to answer with. Raises 406 where Accept leaves none.

    JSON wins a tie, so that */* and browsers get it.
    """
    offered = ("application/json", "image/png", EVENT_STREAM)
    best, best_q = "", 0.0
    for offer in offered:
        q = _quality_of(accept, offer)
        if q > best_q:
            best, best_q = offer, q
    if not best:
        raise HTTPException(406, f"Accept is {accept!r}; expected one of {', '.join(offered)}")
    return best


def _quality_of(accept: str, offer: str) -> float:
    """The q-value of `offer` under an Accept header: that of the most specific range it fits."""
    best_rank, best_q = -1, 0.0
    for part in accept.split(","):
        media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
        ranks = {"*/*": 0, offer.partition("/")[0] + "/*": 1, offer: 2}
        rank = ranks.get(media_range, -1)
        if rank <= best_rank:
            continue
        q = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    q = float(value)
                except ValueError:
                    q = 0.0
        best_rank, best_q = rank, q
    return best_q
