"""Says in a PNG what it shows: who drew it, what was changed, which channel it crossed.

::

    signature | IHDR | iTXt Software, Description, Warning, Source, edsc, XMP | IDAT ... | IEND

A picture that looks like a photograph of a person and is none has to say so wherever it is copied
to. People read `Description` and `Warning`, programs `edsc` (JSON) and the XMP packet, whose
DigitalSourceType is the IPTC's word for generative media. The pixels stay as they are.

PNG (Third Edition, W3C 2025): chunks 5.3, CRC 5.5, keywords 11.3.3; IPTC Photo Metadata 2023.2.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from gateway.answer import EditAnswer
from shared.errors import EdscError
from shared.schemes import PLANS

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
SOFTWARE: Final = "Editable-DeepSC"
WARNING: Final = (
    "Not a photograph: a generative model drew this face from 512 numbers. It may not look like "
    "the person, and shows what the person never looked like."
)
UNTOUCHED: Final = (
    "Cut out of the uploaded photograph and aligned; nothing in it was edited or generated."
)
XMP_KEYWORD: Final = "XML:com.adobe.xmp"
_XMP: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    # Every pixel comes from the model: created with generative AI, not a composite with a photo.
    " Iptc4xmpExt:DigitalSourceType="
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and data of every chunk. Raises EdscError for what is no whole PNG."""
    if not png.startswith(SIGNATURE):
        raise EdscError(f"the picture begins with {png[:8]!r}; expected a PNG's {SIGNATURE!r}")
    at = len(SIGNATURE)
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        data = png[at + 8 : at + 8 + length]
        check = int.from_bytes(png[at + 8 + length : at + 12 + length], "big")
        if len(data) != length or check != zlib.crc32(kind + data):
            raise EdscError(
                f"chunk {kind!r} at byte {at} has {len(data)} of {length} bytes and CRC"
                f" {check:08x}; expected {zlib.crc32(kind + data):08x}"
            )
        yield kind, data
        at += 12 + length


def texts_of(png: bytes) -> dict[str, str]:
    """Keyword -> text of the iTXt chunks that `with_texts` writes."""
    found = {}
    for kind, data in chunks(png):
        if kind == b"iTXt":
            keyword, _, rest = data.partition(b"\0")
            # Two bytes say "not compressed"; language and translated keyword are empty.
            found[keyword.decode("latin-1")] = rest[2:].split(b"\0", 2)[2].decode()
    return found


def with_texts(png: bytes, texts: Mapping[str, str]) -> bytes:
    """The same picture with an iTXt chunk (UTF-8, not compressed) for every text, after IHDR.

    Raises EdscError for what is no whole PNG.
    """
    parts = [SIGNATURE]
    for kind, data in chunks(png):
        parts.append(_chunk(kind, data))
        if kind == b"IHDR":
            parts += [
                # Keyword, null, compression flag and method, language, null, translation, null.
                _chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode())
                for keyword, text in texts.items()
            ]
    return b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def is_generated(answer: EditAnswer, picture: str) -> bool:
    """Whether the generator drew this picture: what it carries is a latent, or it was edited.

    JPEG, AVIF and the learned codec carry the photograph itself; the editor redraws it, before the
    channel or after.
    """
    plan = PLANS[answer.scheme]
    if picture == "aligned":
        return False
    if plan.carrier == "latent":
        return True
    return answer.edit is not None and (plan.edit == "before" or picture == "received")


def how(answer: EditAnswer, picture: str = "received") -> str:
    """The edit and the channel in a sentence; the user's own words are not in it."""
    edit, done = answer.edit, "Face edited by a generative model"
    if not is_generated(answer, picture):
        done = f"Photograph carried by {answer.scheme.value}, neither edited nor generated"
    elif edit is None:
        done = "Face redrawn by a generative model, not edited"
    else:
        degrees = answer.degrees
        before = (degrees.before or {}).get(edit.attribute)
        after = degrees.after.get(edit.attribute)
        done += f": {edit.description or edit.attribute} (degree {before} to {after} of 5)"
    k_factor = f" with K = {answer.k_factor_db:g} dB" if answer.k_factor_db is not None else ""
    fading = "" if answer.channel.value == "awgn" else f", {answer.fading.value} fading{k_factor}"
    return (
        f"{done}. Sent as {answer.cbr.uses} symbols over {answer.channel.value}{fading}"
        f" at {answer.snr_db:g} dB."
    )


def texts_for(answer: EditAnswer, picture: str) -> dict[str, str]:
    """What the PNG `picture` ("aligned", "sent", "received") of an edit says about itself."""
    if picture == "aligned":
        return {"Software": SOFTWARE, "Description": UNTOUCHED}
    facts: dict[str, Any] = {
        "picture": picture,
        "edit": answer.edit.model_dump(exclude={"confidence"}) if answer.edit else None,
        "degrees": answer.degrees.model_dump(),
        "snr_db": answer.snr_db,
        "channel": answer.channel.value,
        "fading": answer.fading.value,
        "k_factor_db": answer.k_factor_db,
        "csi": answer.csi.value,
        "seed": answer.seed,
        "quality": answer.quality.value,
        "scheme": answer.scheme.value,
        "bundle_digest": answer.bundle_digest,
    }
    if not is_generated(answer, picture):
        return {
            "Software": SOFTWARE,
            "Description": how(answer, picture),
            "edsc": json.dumps(facts, sort_keys=True),
        }
    return {
        "Software": SOFTWARE,
        "Description": how(answer, picture),
        "Warning": WARNING,
        "Source": f"StyleGAN2, weights {answer.bundle_digest or 'unknown'}",
        "edsc": json.dumps(facts, sort_keys=True),
        XMP_KEYWORD: _XMP,
    }


def marked(answer: EditAnswer, pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """The pictures of an edit (PNG by name), each saying what it is."""
    return {name: with_texts(png, texts_for(answer, name)) for name, png in pictures.items()}
