"""Source coding of the baselines: a picture as so many bytes at most, and back from what arrived.

::

    picture --JPEG, finest quantiser that fits--> bytes <= capacity ~~> the bytes before the first
                                                                        lost block --> picture

**JPEG**: baseline sequential, 4:2:0, the standard's own Huffman tables, and its quantisation tables
(ITU-T T.81, Annex K) times one scale of 256, spaced by 2^(1/16). With shared tables, which is the
default, both ends know everything up to the start of the scan (623 bytes as a file) but the scale:
what crosses is one byte for the scale, the scan, and the end marker. With sent tables the whole
file crosses; nothing is left of 0.2 bpp then, and half of 0.7 bpp at 128 px.

**AVIF**: one AV1 key frame. The container and the sequence header depend on the picture's size
alone and are shared; what crosses is one byte that names the coded size (the picture may be reduced
before it is coded, down to 16 px) and the frame.

JPEG XL is not here: at 256 channel uses it does not exist. The naked codestream of a grey 8 x 8
square is 55 bytes, of a face reduced to that size 96 and more (libjxl 0.11.2, effort 9, distance
25), and 46 bytes are the most that the uses carry at rate 3/4.

**Undecodable blocks**. A JPEG scan is decoded up to the first lost block; what comes after stays
mid-grey, and a picture of which nothing came is mid-grey all over. An AVIF frame is one piece: it
arrives whole, or the picture is mid-grey. Nothing is asked for again.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared.errors import InvalidRequest, RateUnreachable
from shared.images import to_float, to_uint8

Tables = Literal["shared", "sent"]
_END: Final = b"\xff\xd9"  # JPEG's EOI
_SCALES: Final = 256
_AVIF_SIDES: Final = (256, 128, 96, 64, 48, 32, 24, 16)  # px, coded sizes by their number
_FRAME_OBU: Final = 0x32  # OBU_FRAME with a size field, AV1 specification 5.3.2


class PictureCodec(Protocol):
    """A source codec with rate control.

    capacity: the most bytes that `encode` gives (count).
    """

    @property
    def capacity(self) -> int: ...

    def encode(self, image: Tensor) -> bytes:
        """image [1, 3, S, S] in [-1, 1] -> at most `capacity` bytes; RateUnreachable otherwise."""
        ...

    def decode(self, head: bytes, whole: bool) -> Tensor:
        """The bytes before the first lost block -> [1, 3, S, S]; whole: nothing was lost."""
        ...


def jpeg_bits_per_pixel(size: int) -> float:
    """The paper's rates: 0.7 bit per pixel at 128 px, 0.2 at 1024 px; the nearer one otherwise."""
    return 0.7 if size < 512 else 0.2


def bytes_at(bits_per_pixel: float, size: int) -> int:
    """Whole bytes of a size x size picture at a rate, rounded down: 1433 for 0.7 at 128 px."""
    return int(bits_per_pixel * size * size / 8 + 1e-9)


@dataclass(frozen=True)
class Jpeg:
    """JPEG at a target rate.

    size: side of the square picture, px. capacity: bytes to spend on it. tables: whether the
    headers are shared beforehand or sent; sent ones count.
    """

    size: int
    capacity: int
    tables: Tables = "shared"

    def encode(self, image: Tensor) -> bytes:
        """The finest quantiser whose stream fits. RateUnreachable where the coarsest does not.

        image: [1, 3, size, size] in [-1, 1].
        """
        picture = _to_pillow(image, self.size)
        finest = _first_that_fits(
            _SCALES, lambda scale: len(self._stream(picture, scale)) <= self.capacity
        )
        if finest is None:
            smallest = len(self._stream(picture, _SCALES - 1))
            raise RateUnreachable(
                f"JPEG takes {smallest} bytes for this {self.size} px picture at its coarsest;"
                f" expected at most {self.capacity}"
            )
        return self._stream(picture, finest)

    def decode(self, head: bytes, whole: bool) -> Tensor:
        """Decode as far as the bytes go; grey beyond, grey all over where the header is lost."""
        del whole  # the stream itself says where it ends
        if self.tables == "shared":
            if len(head) < 2:
                return _grey(self.size)
            scan = head[1:]
            scan = scan[: scan.index(_END)] if _END in scan else scan
            head = _jpeg_header(self.size, head[0]) + scan
        try:
            # An end marker makes the decoder fill in what is missing instead of waiting for it.
            return _decoded(head + _END, self.size)
        except InvalidRequest:  # sent tables, and not all of them came
            return _grey(self.size)

    def _stream(self, picture: Image.Image, scale: int) -> bytes:
        file = _jpeg(picture, scale)
        if self.tables == "sent":
            return file
        return bytes([scale]) + file[len(_jpeg_header(self.size, scale)) :]


@dataclass(frozen=True)
class Avif:
    """AVIF at a target rate; of the coded sizes, the one that comes closest to the picture.

    size: side of the square picture, px. capacity: bytes to spend on it.
    """

    size: int
    capacity: int

    def encode(self, image: Tensor) -> bytes:
        """The closest of the frames that fit. RateUnreachable where none does.

        image: [1, 3, size, size] in [-1, 1].
        """
        whole = to_float(to_uint8(image))
        picture = _to_pillow(image, self.size)
        best, least, smallest = b"", float("inf"), 2**31
        for number, side in enumerate(_AVIF_SIDES):
            if side > self.size:
                continue
            small = picture.resize((side, side), Image.Resampling.LANCZOS)
            frames = _AvifFrames(small)
            smallest = min(smallest, 1 + len(frames[100]))
            room = self.capacity - 1
            drop = _first_that_fits(101, partial(frames.fits, room))
            if drop is None:
                continue
            data = bytes([number]) + frames[drop]
            error = float((self.decode(data, True) - whole).square().mean())
            if error < least:
                best, least = data, error
        if not best:
            raise RateUnreachable(
                f"AVIF takes {smallest} bytes for this picture at its smallest"
                f" ({_AVIF_SIDES[-1]} px, headers shared); expected at most {self.capacity}"
            )
        return best

    def decode(self, head: bytes, whole: bool) -> Tensor:
        """The picture of a whole frame, interpolated to `size`; mid-grey otherwise."""
        if not whole or not head or head[0] >= len(_AVIF_SIDES):
            return _grey(self.size)
        side = _AVIF_SIDES[head[0]]
        try:
            small = _decoded(_avif_file(side, head[1:]), side)
        except InvalidRequest:  # a CRC that held over wrong bytes: one in 65,536 lost blocks
            return _grey(self.size)
        if side == self.size:
            return small
        large = F.interpolate(small, (self.size, self.size), mode="bicubic", align_corners=False)
        return large.clamp(-1, 1)


# ---------------------------------------------------------------------------------------- the files


def _first_that_fits(count: int, fits: Callable[[int], bool]) -> int | None:
    """The least i of 0..count-1 with fits(i), for sizes that fall with i; None where there is none.

    Streams do not shrink quite evenly, so this is the edge that bisection finds: what is returned
    fits, and the one before it does not.
    """
    if not fits(count - 1):
        return None
    low, high = -1, count - 1  # `low` does not fit, `high` does
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=1)
def _annex_k() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The luminance and chrominance tables of T.81, Annex K: what quality 50 stands for."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=50)
    with Image.open(file) as picture:
        tables: dict[int, list[int]] = picture.quantization  # type: ignore[attr-defined]
    return tuple(tables[0]), tuple(tables[1])


def _jpeg(picture: Image.Image, scale: int) -> bytes:
    """A JPEG file at Annex K's tables times 2^(scale / 16 - 7)."""
    factor = 2.0 ** (scale / 16 - 7)
    tables = [[min(255, max(1, round(factor * step))) for step in table] for table in _annex_k()]
    file = io.BytesIO()
    picture.save(file, "JPEG", qtables=tables, subsampling="4:2:0", optimize=False)
    return file.getvalue()


@lru_cache(maxsize=512)
def _jpeg_header(size: int, scale: int) -> bytes:
    """Everything before the scan's own bytes: the same for every picture of this size and scale."""
    file = _jpeg(Image.new("RGB", (size, size)), scale)
    start = file.index(b"\xff\xda")  # SOS
    return file[: start + 2 + int.from_bytes(file[start + 2 : start + 4], "big")]


def _avif(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    # Threads would only make the order of work vary; speed 6 of 10 is the library's default.
    picture.save(file, "AVIF", quality=quality, subsampling="4:2:0", speed=6, max_threads=1)
    return file.getvalue()


def _frame_start(file: bytes) -> int:
    """Where the frame begins in an AVIF file of ours: behind the sequence header, in mdat."""
    position = file.index(b"mdat") + 4
    while file[position] != _FRAME_OBU:
        position += _obu_length(file[position:])
    return position


class _AvifFrames(dict[int, bytes]):
    """Frame OBUs of one picture by the number of steps below quality 100, made when asked for."""

    def __init__(self, picture: Image.Image) -> None:
        super().__init__()
        self._picture = picture

    def __missing__(self, drop: int) -> bytes:
        file = _avif(self._picture, 100 - drop)
        self[drop] = file[_frame_start(file) :]
        return self[drop]

    def fits(self, room: int, drop: int) -> bool:
        return len(self[drop]) <= room


@lru_cache(maxsize=16)
def _avif_template(side: int) -> bytes:
    """An AVIF file of this size up to its frame."""
    file = _avif(Image.new("RGB", (side, side), (128, 128, 128)), 50)
    return file[: _frame_start(file)]


def _avif_file(side: int, frame: bytes) -> bytes:
    """The file around a frame: the template, with the two lengths that depend on the frame."""
    head = _avif_template(side)
    frame = frame[: _obu_length(frame)]  # without the padding of the channel code
    iloc = head.index(b"iloc") - 4
    # The item's length is the last field of iloc: one item, one extent, as we wrote it.
    field = iloc + int.from_bytes(head[iloc : iloc + 4], "big") - 4
    box = head.index(b"mdat") - 4
    length = len(head) + len(frame) - box  # of mdat, its own 8 bytes included
    item, whole = (length - 8).to_bytes(4, "big"), length.to_bytes(4, "big")
    return head[:field] + item + head[field + 4 : box] + whole + head[box + 4 :] + frame


def _obu_length(obu: bytes) -> int:
    """Bytes of an OBU with a size field: one of header, the leb128 size, the payload."""
    size = shift = 0
    for position, byte in enumerate(obu[1:9], start=2):
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return position + size
    raise InvalidRequest(f"AV1 unit of {len(obu)} bytes has no size; expected one of at most 8")


def _to_pillow(image: Tensor, size: int) -> Image.Image:
    if tuple(image.shape) != (1, 3, size, size):
        raise InvalidRequest(
            f"picture has shape {list(image.shape)}; expected [1, 3, {size}, {size}]"
        )
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy())


def _decoded(file: bytes, size: int) -> Tensor:
    """A picture file -> [1, 3, size, size]; InvalidRequest where it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(file), formats=("JPEG", "AVIF")) as picture:
            array = np.array(picture.convert("RGB"))  # [S, S, 3]
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise InvalidRequest(f"{len(file)} bytes are no picture: {error}") from error
    if array.shape != (size, size, 3):
        raise InvalidRequest(f"picture is {array.shape}; expected ({size}, {size}, 3)")
    return to_float(torch.from_numpy(array).permute(2, 0, 1).contiguous())


def _grey(size: int) -> Tensor:
    return torch.zeros(1, 3, size, size)
