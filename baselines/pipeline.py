"""The transmitter's end of any scheme, from an upload and a sentence: what a process serves.

    photo --decode, find, align--> face --.
    sentence --read--> edit --------------+--> scheme.transmit --> symbols

The receiver's end needs no more than the scheme itself: `scheme.receive(reception)`.
"""

from collections.abc import Callable

from baselines.editor import Watch
from baselines.schemes import BaseScheme, Sent
from shared.images import decode_photo
from transmitter.editing import Quality
from transmitter.pipeline import NO_EDIT, Transmission, Transmitter


def transmit(
    scheme: BaseScheme,
    transmitter: Transmitter,
    photo: bytes,
    instruction: str,
    *,
    snr_db: float,
    quality: Quality = "balanced",
    align: bool = True,
    cancelled: Callable[[], bool] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Transmission, Sent]:
    """What `Transmitter.transmit` does, for another scheme.

    transmitter: its face finder and text reader are used. The Transmission is filled in as far as
    the sender knows it: where the receiver edits, it has the edit but no degrees before it. Raises
    what `Transmitter.transmit` does, and RateUnreachable.
    """
    watch = Watch(cancelled, progress)
    with watch("read"):  # first: a refused sentence should not cost an inversion
        reading = None if instruction.strip() == NO_EDIT else transmitter.read(instruction)
    with watch("decode"):
        pixels = decode_photo(photo)  # [3, H, W]
    with watch("align"):
        face, faces_found = transmitter.aligned(pixels, align)
    edit = None if reading is None else reading.edit
    sent = scheme.transmit(face, edit, snr_db, quality, watch)
    degrees = sent.degrees
    timings = watch.timings_ms
    return (
        Transmission(
            symbols=sent.symbols,
            edit=edit,
            confidence=None if reading is None else reading.confidence,
            before=degrees.before,
            expected=degrees.expected,
            after=degrees.after,
            reached=degrees.reached,
            match_steps=degrees.match_steps,
            faces_found=faces_found,
            aligned=face.cpu(),
            sent=sent.picture,
            timings_ms={**timings, "total": sum(timings.values())},
        ),
        sent,
    )
