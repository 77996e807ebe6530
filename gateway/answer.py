"""What a client asks for and what it gets back: the JSON of one edit, with its units.

The gateway fills it in from protobuf, `edsc` from tensors when it runs without a network; both
print the same fields. Only the standard library and pydantic: the gateway stays light.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from shared.schemes import Scheme

UNEDITED = "-"  # the sentence that sends the photo as it is
MAX_SEED = 2**53 - 1  # survives JSON, whose numbers are doubles
MAX_SENTENCE = 2000  # characters, as the transmitter's
SNR_MIN_DB, SNR_MAX_DB = -20.0, 40.0
K_MIN_DB, K_MAX_DB = 0.0, 40.0
DEFAULT_SNR_DB = 12.0
DEFAULT_K_DB = 9.0  # as the channel's own
STAGES = ("read", "decode", "align", "invert", "edit", "compress", "encode", "draw", "pictures")
PICTURES = ("aligned", "sent", "received")


class ChannelName(StrEnum):
    """Laws of the channel."""

    AWGN = "awgn"
    RAYLEIGH = "rayleigh"
    RICIAN = "rician"


class Fading(StrEnum):
    """How often the fading coefficient changes: once a message, or with every channel use."""

    BLOCK = "block"
    FAST = "fast"


class Csi(StrEnum):
    """What the receiver knows of the fading: told, or estimated from pilots."""

    PERFECT = "perfect"
    ESTIMATED = "estimated"


class Quality(StrEnum):
    """How long the inversion is refined: 0, 10 or 110 steps of Eq. (8)."""

    FAST = "fast"
    BALANCED = "balanced"
    PAPER = "paper"


@dataclass(frozen=True)
class Order:
    """One edit as asked for, every default filled in.

    snr_db: Es/N0 in dB, -20..40. k_factor_db: Rician K in dB, 0..40. seed: of fading and noise.
    """

    instruction: str
    snr_db: float = DEFAULT_SNR_DB
    channel: ChannelName = ChannelName.AWGN
    k_factor_db: float = DEFAULT_K_DB
    fading: Fading = Fading.BLOCK
    csi: Csi = Csi.PERFECT
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    quality: Quality = Quality.BALANCED
    scheme: Scheme = Scheme.EDITABLE_DEEPSC
    align: bool = True


_ORDER: Final = TypeAdapter(Order)


def request_of(order: Order) -> str:
    """An order as JSON, to be kept."""
    return _ORDER.dump_json(order).decode()


def order_of(request: str) -> Order:
    """The order that `request_of` wrote down."""
    return _ORDER.validate_json(request)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EditRead(_Frozen):
    """The edit that a sentence asks for."""

    attribute: str
    mode: Annotated[str, Field(description='"change" or "target"')]
    direction: Annotated[
        str | None, Field(description='"more" or "less"; null for a target in between')
    ]
    value: Annotated[int | None, Field(description="size of a change in degrees, 1 to 5")]
    target: Annotated[int | None, Field(description="degree to end at, 0 to 5")]
    confidence: Annotated[float, Field(description="how sure the text encoder is, 0 to 1")]
    description: str = ""


class Degrees(_Frozen):
    """Degrees 0..5 as the predictor sees them, by attribute.

    `before` is null where nothing was edited; `expected` names the edited attribute only (Eq. 10).
    """

    before: dict[str, int] | None
    expected: dict[str, int]
    after: dict[str, int]


class Bandwidth(_Frozen):
    """Channel bandwidth ratio, counted both ways."""

    paper: Annotated[float, Field(description="real numbers sent per real number of the picture")]
    complex_uses: Annotated[
        float, Field(description="channel uses per real number of the picture, pilots included")
    ]
    uses: Annotated[int, Field(description="complex channel uses of the message, pilots included")]
    pilot_uses: Annotated[int, Field(description="pilots among them")]
    header_uses: Annotated[
        int, Field(description="uses among them that tell the receiver the edit and nothing else")
    ] = 0


class ChannelCode(_Frozen):
    """What became of a digital message."""

    stream_bits: Annotated[int, Field(description="length of the compressed picture, in bits")]
    blocks: Annotated[int, Field(description="code blocks of the message")]
    block_errors: Annotated[int, Field(description="blocks that could not be decoded")]


class Images(_Frozen):
    """Where the three pictures are: the aligned input, what was sent, what was received."""

    aligned: str
    sent: str
    received: str


class EditAnswer(_Frozen):
    """One edit, done."""

    id: str
    instruction: str
    edit: Annotated[EditRead | None, Field(description='null for the instruction "-"')]
    degrees: Degrees
    reached: Annotated[bool | None, Field(description="whether the degree asked for was reached")]
    match_steps: Annotated[int, Field(description="steps that attribute matching took (Eq. 11)")]
    faces_found: Annotated[int, Field(description="faces in the photo; 0 with align=false")]
    notes: Annotated[list[str], Field(description="what a person should know about this edit")]
    cbr: Bandwidth
    code: Annotated[ChannelCode | None, Field(description="digital schemes only")] = None
    snr_db: float
    channel: ChannelName
    fading: Fading
    k_factor_db: Annotated[float | None, Field(description="Rician only, in dB")]
    csi: Csi
    fading_db: Annotated[
        float | None,
        Field(description="|h|^2 of this message in dB; null where only pilots tell of it"),
    ]
    seed: int
    quality: Quality
    scheme: Scheme
    timings_ms: Annotated[
        dict[str, float],
        Field(
            description="stages of the transmitter (read, decode, align, invert, edit, compress, "
            "encode, draw, pictures), then propagate and receive; queue is time waiting for a "
            "worker, overhead what the gateway and the three hops add, total the sum as the "
            "gateway saw it"
        ),
    ]
    hops_ms: Annotated[
        dict[str, float],
        Field(description="transmit, propagate, receive: each call as the gateway saw it"),
    ]
    images: Images
    bundle_digest: Annotated[
        str, Field(description="SHA-256 of the weights that drew the picture; empty: not told")
    ] = ""
    state: Literal["done"] = "done"
    conversation: Annotated[
        str | None, Field(description="the conversation that this edit belongs to")
    ] = None


@dataclass(frozen=True)
class StoredEdit:
    """One edit, done: the answer as sent, and what is kept beside it.

    pictures: PNG by name (aligned, sent, received). latent: the edited latent as the transmitter
    coded it, complex64 little-endian, 8 bytes a symbol; empty where it is not told.
    """

    answer: EditAnswer
    pictures: Mapping[str, bytes]
    latent: bytes = b""

    @cached_property
    def json(self) -> str:
        """The answer as it is sent and kept; made once."""
        return self.answer.model_dump_json()


def notes_on(
    *,
    edited: str | None,
    expected: int | None,
    after: int | None,
    reached: bool | None,
    faces_found: int,
    code: ChannelCode | None = None,
    edit_lost: bool = False,
) -> list[str]:
    """What a person should be told: several faces, a degree not reached, what the channel took.

    edited: the attribute edited, None where there was no edit. expected, after: its degrees, 0..5.
    code: of a digital scheme. edit_lost: the receiver was to edit, and did not learn what.
    """
    notes = []
    if faces_found > 1:
        notes.append(f"{faces_found} faces found; the largest one was taken")
    if edited is not None and reached is False:
        notes.append(
            f"{edited}: degree {expected} was asked for, {after} is as far as this face went"
        )
    if code is not None and code.block_errors:
        notes.append(
            f"{code.block_errors} of {code.blocks} code blocks could not be decoded: what comes"
            " after the first of them is grey"
        )
    if edit_lost:
        notes.append("the edit itself was lost on the way, so the receiver changed nothing")
    return notes


def images_at(folder: str, suffix: str = "") -> Images:
    """Paths of the three pictures in `folder`, for instance /v1/edits/ID/received.png."""
    return Images(**{name: f"{folder}/{suffix}{name}.png" for name in PICTURES})


def stage_timings(
    transmit: Mapping[str, float],
    propagate: Mapping[str, float],
    receive: Mapping[str, float],
    total_ms: float,
) -> dict[str, float]:
    """One table of times from what each service reports, in milliseconds.

    The transmitter's stages keep their names; the channel and the receiver count as one stage each;
    `overhead` is what is left of `total_ms`: the gateway and the three hops.
    """
    services = (transmit, propagate, receive)
    # A protobuf map keeps no order.
    names = sorted(transmit, key=lambda n: STAGES.index(n) if n in STAGES else len(STAGES))
    stages = {name: transmit[name] for name in names if name not in ("queue", "total")}
    stages["propagate"] = propagate.get("total", 0.0) - propagate.get("queue", 0.0)
    stages["receive"] = receive.get("total", 0.0) - receive.get("queue", 0.0)
    timings = {
        "queue": sum(times.get("queue", 0.0) for times in services),
        **stages,
        "overhead": max(0.0, total_ms - sum(times.get("total", 0.0) for times in services)),
        "total": total_ms,
    }
    return {name: round(ms, 3) for name, ms in timings.items()}
