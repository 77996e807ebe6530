"""Uploads of every kind: each becomes upright RGB, or one clear error."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from shared.errors import EdscError, InvalidRequest, PayloadTooLarge, UnsupportedImage
from shared.images import ImageLimits, decode_photo, encode_png, to_float, to_uint8

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters(width: int = 40, height: int = 24) -> Image.Image:
    """Red, green / blue, white: every turn and flip of it looks different."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def corner(photo: torch.Tensor, right: bool = False, bottom: bool = False) -> tuple[int, ...]:
    row, column = (-3 if bottom else 2), (-3 if right else 2)
    return tuple(photo[:, row, column].tolist())


def close(got: tuple[int, ...], expected: tuple[int, ...], within: int) -> bool:
    return all(abs(a - b) <= within for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "within"),
    [("PNG", 0), ("JPEG", 30), ("WEBP", 30), ("BMP", 0), ("TIFF", 0), ("PPM", 0)],
)
def test_formats(kind: str, within: int) -> None:
    photo = decode_photo(file_of(quarters(), kind))
    assert photo.dtype == torch.uint8
    assert photo.shape == (3, 24, 40)
    assert photo.is_contiguous()
    assert close(corner(photo), RED, within)
    assert close(corner(photo, right=True), GREEN, within)
    assert close(corner(photo, bottom=True), BLUE, within)
    assert close(corner(photo, right=True, bottom=True), WHITE, within)


def test_avif() -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF codec")
    assert close(corner(decode_photo(file_of(quarters(64, 64), "AVIF"))), RED, 40)


# EXIF 2.32, tag 274: where the first row and the first column of the stored picture belong.
ORIENTED = {
    1: (RED, GREEN, BLUE, WHITE),
    2: (GREEN, RED, WHITE, BLUE),
    3: (WHITE, BLUE, GREEN, RED),
    4: (BLUE, WHITE, RED, GREEN),
    5: (RED, BLUE, GREEN, WHITE),
    6: (BLUE, RED, WHITE, GREEN),
    7: (WHITE, GREEN, BLUE, RED),
    8: (GREEN, WHITE, RED, BLUE),
}


@pytest.mark.parametrize("orientation", sorted(ORIENTED))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = decode_photo(file_of(quarters(64, 48), kind, exif=exif))
    assert photo.shape == ((3, 48, 64) if orientation < 5 else (3, 64, 48))
    found = [corner(photo, right, bottom) for bottom in (False, True) for right in (False, True)]
    for got, expected in zip(found, ORIENTED[orientation], strict=True):
        assert close(got, expected, 40)


def test_orientation_out_of_range_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert decode_photo(file_of(quarters(), "JPEG", exif=exif)).shape == (3, 24, 40)


def test_cmyk() -> None:
    photo = decode_photo(file_of(quarters().convert("CMYK"), "JPEG", quality=95))
    assert close(corner(photo), RED, 40)
    assert close(corner(photo, right=True, bottom=True), WHITE, 40)


def test_grey_and_bilevel() -> None:
    photo = decode_photo(file_of(Image.new("L", (9, 7), 77)))
    assert photo.shape == (3, 7, 9)
    assert bool((photo == 77).all())
    assert bool((decode_photo(file_of(Image.new("1", (9, 7), 1))) == 255).all())


def test_sixteen_bits() -> None:
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert decode_photo(file_of(Image.fromarray(ramp)))[0].tolist() == [[0, 1, 128, 255]]


def test_thirty_two_bits_have_no_white() -> None:
    data = file_of(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(UnsupportedImage, match="32-bit"):
        decode_photo(data)


def test_palette() -> None:
    photo = decode_photo(file_of(quarters().quantize(16)))
    assert close(corner(photo), RED, 8)
    assert close(corner(photo, bottom=True), BLUE, 8)


def test_palette_with_transparency_lies_over_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 4, 8))
    photo = decode_photo(file_of(image, transparency=0))
    assert corner(photo) == WHITE
    assert corner(photo, right=True) == BLUE


def test_transparent_colour_lies_over_white() -> None:
    photo = decode_photo(file_of(quarters(), transparency=RED))
    assert corner(photo) == WHITE
    assert corner(photo, bottom=True) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    assert bool((decode_photo(file_of(image)) == 255).all())
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128)).convert(mode)
    assert close(corner(decode_photo(file_of(half))), (127, 127, 127), 1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert close(corner(decode_photo(data)), RED, 30)


def test_one_pixel() -> None:
    assert decode_photo(file_of(Image.new("RGB", (1, 1), RED)))[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_sixty_four_million_pixels_are_reduced(kind: str) -> None:
    image = Image.new("RGB", (8000, 8000), WHITE)
    image.paste(RED, (0, 0, 4000, 4000))
    data = file_of(image, kind, **({"compress_level": 1} if kind == "PNG" else {}))
    photo = decode_photo(data)
    assert photo.shape == (3, 2048, 2048)
    assert close(corner(photo), RED, 5)
    assert close(tuple(photo[:, 1010, 1010].tolist()), RED, 5)
    assert close(tuple(photo[:, 1040, 1040].tolist()), WHITE, 5)


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "L", "CMYK"])
def test_every_mode_is_reduced(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = file_of(Image.new("RGB", (1000, 500), RED).convert(mode), kind)
    photo = decode_photo(data, ImageLimits(working_side=100))
    assert photo.shape == (3, 50, 100)


def test_reduction_averages_and_transparent_colours_do_not_bleed() -> None:
    image = Image.new("RGBA", (400, 400), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 400, 198))
    photo = decode_photo(file_of(image), ImageLimits(working_side=100))
    assert corner(photo) == RED
    # The row on the border is half red, half white: never darker than either.
    assert int(photo[0].min()) == 255


def test_one_line_stays_one_line() -> None:
    photo = decode_photo(file_of(Image.new("RGB", (20000, 1), RED)))
    assert photo.shape == (3, 1, 2048)


def test_too_many_pixels_names_both_numbers() -> None:
    data = file_of(Image.new("L", (300, 200)))
    with pytest.raises(PayloadTooLarge, match="60000 pixels, expected at most 50000") as caught:
        decode_photo(data, ImageLimits(max_pixels=50_000))
    assert caught.value.http_status == 413


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares its size and holds next to nothing: a decompression bomb's fuse."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checked = name + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8001, 10_000, 50_000, 2_000_000])
def test_bombs_are_refused_before_a_pixel_is_decoded(side: int) -> None:
    with pytest.raises(PayloadTooLarge, match=f"{side * side} pixels, expected at most 64000000"):
        decode_photo(png_header(side, side))


def test_declared_size_without_the_pixels() -> None:
    with pytest.raises(UnsupportedImage, match="damaged or cut short"):
        decode_photo(png_header(4000, 4000))


def test_text_chunk_bomb() -> None:
    data = png_header(4, 4)
    body = b"c\0\0" + zlib.compress(b"a" * 80_000_000)
    chunk = b"zTXt" + body
    whole = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(UnsupportedImage):
        decode_photo(data[:33] + whole + data[33:])


def test_too_many_bytes_names_both_numbers() -> None:
    limits = ImageLimits()
    data = b"\xff\xd8\xff" + bytes(limits.max_bytes)
    with pytest.raises(PayloadTooLarge, match="20971523 bytes, expected at most 20971520"):
        decode_photo(data)


def test_empty() -> None:
    with pytest.raises(InvalidRequest, match="0 bytes") as caught:
        decode_photo(b"")
    assert caught.value.http_status == 422


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"hello, world",
        b"%PDF-1.7\n" + bytes(500),
        b"<svg></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ],
)
def test_not_a_picture(data: bytes) -> None:
    with pytest.raises(UnsupportedImage, match="not a picture") as caught:
        decode_photo(data)
    assert caught.value.http_status == 415


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), kind)
    with pytest.raises(UnsupportedImage):
        decode_photo(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damaged_files_decode_or_are_refused(kind: str) -> None:
    whole = file_of(quarters(), kind)
    chance = np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(whole)
        for place in chance.integers(0, len(data), 3):
            data[place] = chance.integers(0, 256)
        with contextlib.suppress(EdscError):  # anything else would crash a server
            assert decode_photo(bytes(data)).shape[0] == 3


def test_warnings_of_the_decoder_are_errors() -> None:
    data = bytearray(file_of(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01"))
    with pytest.raises(UnsupportedImage, match=r"[Ee]xif|EXIF"):
        decode_photo(bytes(data))


def test_float_and_back_is_exact() -> None:
    photo = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    image = to_float(photo)
    assert image.shape == (1, 3, 16, 16)
    assert float(image.min()) == -1.0
    assert float(image.max()) == 1.0
    assert torch.equal(to_uint8(image), photo)


def test_to_uint8_clamps_and_refuses_nan() -> None:
    image = torch.tensor([-3.0, 0.0, 3.0]).reshape(3, 1, 1)
    assert to_uint8(image).flatten().tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match="expected"):
        to_uint8(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected"):
        to_float(torch.zeros(3, 4, 4))


def test_png_round_trip_with_text() -> None:
    image = to_float(decode_photo(file_of(quarters())))
    data = encode_png(image, {"instruction": "gib ihm einen Bart – 😀", "snr_db": "6.0"})
    assert torch.equal(to_float(decode_photo(data)), image)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        assert opened.info["instruction"] == "gib ihm einen Bart – 😀"
        assert opened.info["snr_db"] == "6.0"
    with pytest.raises(ValueError, match="80 characters"):
        encode_png(image, {"k" * 80: "v"})


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_pixels is 0"):
        ImageLimits(max_pixels=0)
