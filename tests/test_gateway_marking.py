"""What a returned PNG says about itself, read back with a reader that is not ours."""

import io
import json
from dataclasses import replace

import pytest
from PIL import Image, PngImagePlugin

from gateway.answer import ChannelName, EditRead, StoredEdit
from gateway.marking import SIGNATURE, WARNING, XMP_KEYWORD, chunks, how, marked, texts_of
from shared.errors import EdscError
from shared.schemes import Scheme
from tests.test_gateway_store import answer


def picture(seed: int = 0) -> bytes:
    file = io.BytesIO()
    image = Image.effect_noise((24, 24), 60.0 + seed).convert("RGB")
    image.save(file, "PNG")
    return file.getvalue()


def edited(**changes: object) -> StoredEdit:
    done = answer("e" * 32)
    edit = EditRead(
        attribute="beard",
        mode="change",
        direction="more",
        value=2,
        target=None,
        confidence=0.9,
        description="beard +2",
    )
    fields = {"edit": edit, "bundle_digest": "d1" * 32, "snr_db": -6.0, **changes}
    told = done.answer.model_copy(update=fields)
    return replace(done, answer=told, pictures={n: picture() for n in done.pictures})


def test_pixels_stay_as_they_are_and_pillow_reads_the_texts() -> None:
    done = edited()
    for name, png in marked(done.answer, done.pictures).items():
        before, after = (Image.open(io.BytesIO(data)) for data in (done.pictures[name], png))
        assert isinstance(after, PngImagePlugin.PngImageFile)
        after.load()
        assert after.tobytes() == before.tobytes()
        assert dict(after.text) == texts_of(png)


def test_a_generated_face_says_what_how_and_with_which_weights() -> None:
    done = edited()
    for name in ("sent", "received"):
        texts = texts_of(marked(done.answer, done.pictures)[name])
        assert "edited by a generative model: beard +2" in texts["Description"]
        assert "-6 dB" in texts["Description"]
        assert texts["Warning"] == WARNING
        assert "d1" * 32 in texts["Source"]
        assert "trainedAlgorithmicMedia" in texts[XMP_KEYWORD]
        facts = json.loads(texts["edsc"])
        assert facts["edit"]["attribute"] == "beard"
        assert (facts["snr_db"], facts["bundle_digest"]) == (-6.0, "d1" * 32)
        assert facts["picture"] == name


def test_the_users_words_are_not_in_the_picture() -> None:
    done = edited(instruction="make Uncle Theodor look like a pirate")
    for png in marked(done.answer, done.pictures).values():
        assert b"Theodor" not in png


def test_what_was_not_edited_does_not_say_so() -> None:
    plain = edited(edit=None)
    texts = texts_of(marked(plain.answer, plain.pictures)["received"])
    assert "not edited" in texts["Description"]
    assert "drew this face" in texts["Warning"]
    aligned = texts_of(marked(plain.answer, plain.pictures)["aligned"])
    assert "nothing in it was edited" in aligned["Description"]
    assert "Warning" not in aligned


@pytest.mark.parametrize(
    ("scheme", "edit", "sent", "received"),
    [
        (Scheme.EDIT_JPEG, True, True, True),
        (Scheme.JPEG_EDIT, True, False, True),
        (Scheme.EDIT_DEEPSC, False, False, False),
        (Scheme.AVIF_EDIT, False, False, False),
        (Scheme.PCA_LMMSE, False, True, True),
    ],
)
def test_only_what_the_generator_drew_is_called_generated(
    scheme: Scheme, edit: bool, sent: bool, received: bool
) -> None:
    done = edited(scheme=scheme) if edit else edited(scheme=scheme, edit=None)
    pictures = marked(done.answer, done.pictures)
    for name, drawn in (("sent", sent), ("received", received)):
        texts = texts_of(pictures[name])
        assert ("Warning" in texts, XMP_KEYWORD in texts) == (drawn, drawn)
        assert ("neither edited nor generated" in texts["Description"]) is not drawn
        assert json.loads(texts["edsc"])["scheme"] == scheme.value


def test_fading_is_named_where_there_is_some() -> None:
    assert "over awgn at" in how(edited().answer)
    rician = edited(channel=ChannelName.RICIAN, k_factor_db=3.0)
    assert "over rician, block fading with K = 3 dB at -6 dB" in how(rician.answer)


@pytest.mark.parametrize("damage", ["jpeg", "cut", "crc"])
def test_what_is_no_whole_png_is_told(damage: str) -> None:
    png = picture()
    broken = {"jpeg": b"\xff\xd8" + png, "cut": png[:-20], "crc": png[:-2] + b"\0\0"}[damage]
    with pytest.raises(EdscError, match="expected"):
        list(chunks(broken))
    assert SIGNATURE in png
