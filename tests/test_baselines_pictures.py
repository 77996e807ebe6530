"""Picture codecs under a budget: they fill it, keep to it, and show what arrived of a stream."""

import io

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from baselines.pictures import (
    Avif,
    Jpeg,
    PictureCodec,
    bytes_at,
    jpeg_bits_per_pixel,
)
from shared.errors import InvalidRequest, RateUnreachable
from shared.images import to_float, to_uint8

SIZE = 128


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """Smooth shapes and some texture, as a face has: [1, 3, 128, 128] in [-1, 1]."""
    draws = torch.Generator().manual_seed(3)
    layers = [
        0.5**level
        * F.interpolate(torch.randn(1, 3, side, side, generator=draws), SIZE, mode="bicubic")
        for level, side in enumerate((4, 8, 16, 32))
    ]
    return to_float(to_uint8((0.5 * torch.stack(layers).sum(0)).clamp(-1, 1)))


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def test_the_papers_rates() -> None:
    assert (jpeg_bits_per_pixel(128), jpeg_bits_per_pixel(1024)) == (0.7, 0.2)
    assert bytes_at(0.7, 128) == 1433  # of 11,468.8 bits
    assert bytes_at(0.2, 1024) == 26_214


@pytest.mark.parametrize("tables", ["shared", "sent"])
@pytest.mark.parametrize("bits_per_pixel", [0.7, 1.0, 2.0])
def test_rate_control_hits_the_target(picture: Tensor, tables: str, bits_per_pixel: float) -> None:
    capacity = bytes_at(bits_per_pixel, SIZE)
    stream = Jpeg(SIZE, capacity, tables).encode(picture)  # type: ignore[arg-type]
    assert 0.93 * capacity < len(stream) <= capacity


def test_one_scale_finer_does_not_fit(picture: Tensor) -> None:
    codec = Jpeg(SIZE, bytes_at(0.7, SIZE))
    stream = codec.encode(picture)
    finer = codec._stream(codec_input(picture), stream[0] - 1)
    assert len(finer) > codec.capacity


def codec_input(picture: Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [128, 1024])
def test_sent_tables_cost_what_the_headers_weigh(picture: Tensor, size: int) -> None:
    """The shared stream is the file without its header, but for the byte that names the scale."""
    large = F.interpolate(picture, (size, size), mode="bicubic").clamp(-1, 1)
    pillow, scale = codec_input(large), 128
    shared, sent = (
        Jpeg(size, 10**6, tables)._stream(pillow, scale) for tables in ("shared", "sent")
    )
    assert len(sent) - len(shared) == 623 - 1
    assert sent.endswith(shared[1:])


def test_shared_and_sent_tables_give_the_picture_that_a_jpeg_file_has(picture: Tensor) -> None:
    file = io.BytesIO()
    scale = 100
    shared, sent = Jpeg(SIZE, 10**6), Jpeg(SIZE, 10**6, "sent")
    file.write(sent._stream(codec_input(picture), scale))
    with Image.open(file) as opened:
        expected = torch.tensor(list(opened.convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = expected.reshape(SIZE, SIZE, 3).permute(2, 0, 1)
    for codec in (shared, sent):
        found = codec.decode(codec._stream(codec_input(picture), scale), True)
        assert torch.equal(to_uint8(found), pixels)


def test_padding_behind_the_end_of_a_stream_changes_nothing(picture: Tensor) -> None:
    for codec in (Jpeg(SIZE, 2000), Jpeg(SIZE, 3000, "sent"), Avif(SIZE, 700)):
        stream = codec.encode(picture)
        padded = stream.ljust(codec.capacity, b"\0")
        assert torch.equal(codec.decode(padded, True), codec.decode(stream, True))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_stream_cut_short_shows_its_beginning_and_then_grey(
    picture: Tensor, share: float
) -> None:
    codec = Jpeg(SIZE, bytes_at(0.7, SIZE))
    stream = codec.encode(picture)
    whole, cut = codec.decode(stream, True), codec.decode(stream[: int(share * len(stream))], False)
    same = (whole == cut).all(dim=1)[0].all(dim=1)  # [128], rows that arrived
    arrived = int(same.long().cumprod(0).sum())
    assert abs(arrived / SIZE - share) < 0.25
    # In between: the block that was cut in its middle, and chroma interpolated over its border.
    below = cut[:, :, arrived + 32 :]
    assert share > 0.7 or below.numel() > 0
    assert bool((below.abs() < 0.02).all())


@pytest.mark.parametrize("codec", [Jpeg(SIZE, 1433), Jpeg(SIZE, 1433, "sent"), Avif(SIZE, 700)])
@pytest.mark.parametrize("head", [b"", b"\x80"])
def test_nothing_to_decode_is_mid_grey(codec: PictureCodec, head: bytes) -> None:
    assert torch.equal(codec.decode(head, False), torch.zeros(1, 3, SIZE, SIZE))


def test_wrong_bytes_under_a_right_check_are_mid_grey() -> None:
    assert torch.equal(
        Avif(SIZE, 46).decode(b"\x07" + bytes(45), True), torch.zeros(1, 3, SIZE, SIZE)
    )
    assert torch.equal(Avif(SIZE, 46).decode(b"\xff" * 46, True), torch.zeros(1, 3, SIZE, SIZE))


def test_a_budget_below_the_coarsest_stream_is_refused(picture: Tensor) -> None:
    noise = 2 * torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) - 1
    with pytest.raises(RateUnreachable, match=r"JPEG takes \d+ bytes .* at most 60"):
        Jpeg(SIZE, 60).encode(noise)
    with pytest.raises(RateUnreachable, match=r"AVIF takes \d+ bytes .* at most 12"):
        Avif(SIZE, 12).encode(picture)
    with pytest.raises(InvalidRequest, match="64"):
        Jpeg(SIZE, 1433).encode(noise[:, :, :64, :64])


def test_avif_without_its_shared_header_is_the_picture_that_the_file_has(picture: Tensor) -> None:
    """At full size: the frame put back into its container decodes to what Pillow would show."""
    picture = picture[:, :, 32:96, 32:96]
    stream = Avif(64, 1200).encode(picture)
    assert stream[0] == 3  # coded at 64 px
    found = Avif(64, 1200).decode(stream, True)
    for quality in range(100, -1, -1):
        file = io.BytesIO()
        codec_input(picture).save(
            file, "AVIF", quality=quality, subsampling="4:2:0", speed=6, max_threads=1
        )
        if file.getvalue().endswith(stream[1:]):
            break
    else:
        pytest.fail("the stream is no part of any file")
    with Image.open(file) as opened:
        pixels = torch.tensor(list(opened.convert("RGB").tobytes()), dtype=torch.uint8)
    assert torch.equal(to_uint8(found), pixels.reshape(64, 64, 3).permute(2, 0, 1))


def test_more_bytes_make_better_pictures(picture: Tensor) -> None:
    for codecs in (
        [Jpeg(SIZE, capacity) for capacity in (700, 1433, 3000)],
        [Avif(SIZE, capacity) for capacity in (60, 200, 800)],
    ):
        quality = [psnr(codec.decode(codec.encode(picture), True), picture) for codec in codecs]
        assert quality == sorted(quality)
        assert quality[-1] > quality[0] + 3


def test_the_same_picture_gives_the_same_stream(picture: Tensor) -> None:
    for codec in (Jpeg(SIZE, 1433), Avif(SIZE, 64)):
        assert codec.encode(picture) == codec.encode(picture)
