"""Bytes of an upload <-> pictures.

Inside, pictures are float32 ``[B, 3, H, W]`` RGB in [-1, 1]; 8-bit samples exist only on this
border:

    bytes --decode_photo--> uint8 [3, H, W] --to_float--> float32 [1, 3, H, W] in [-1, 1]
    bytes <--encode_png---- float32 [1, 3, H, W]

A photograph is somebody else's data: everything about it is checked before it is believed, the
pixel count before a pixel is decoded.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from shared.errors import EdscError, InvalidRequest, PayloadTooLarge, UnsupportedImage

# Pillow only warns about some bombs and about damaged metadata. Set once for the process, not with
# catch_warnings around each decode: that swaps global state and servers decode in several threads.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("error", module=r"PIL(\.|$)")

# Raster formats whose decoders run inside this process. Pillow would also hand PostScript to an
# external program; uploads never get that far.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {  # EXIF 2.32, tag 274: what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageLimits:
    """What an upload may be.

    max_bytes     bytes of the file
    max_pixels    pixels the file declares; 64 million is one 8000 x 8000 photograph
    working_side  px; a picture whose longer side exceeds it is reduced to it while decoding (a face
                  ends up 128 px wide, so nothing that is sent is lost)
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 64_000_000
    working_side: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "working_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


DEFAULT_LIMITS = ImageLimits()


def decode_photo(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
    """Decode an uploaded file into an upright RGB picture.

    EXIF orientation is applied; CMYK, grey, palette and 16-bit pictures become 8-bit RGB;
    transparency is laid over white; of an animation the first frame is taken; a longer side above
    ``limits.working_side`` is reduced to it (area-averaged).

    Returns uint8 ``[3, H, W]`` in 0..255.

    Raises InvalidRequest (empty upload), PayloadTooLarge (too many bytes or pixels, both numbers
    named), UnsupportedImage (not a picture, truncated, damaged, or a format that is not accepted).
    """
    if not data:
        raise InvalidRequest("the upload is empty (0 bytes), expected a photograph")
    if len(data) > limits.max_bytes:
        raise PayloadTooLarge(
            f"the upload has {len(data)} bytes, expected at most {limits.max_bytes}"
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise _too_many_pixels(width * height, limits)
            return _to_tensor(_decode(image, limits.working_side))
    except EdscError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_many_pixels(int(found.group(1)) if found else None, limits) from error
    except UnidentifiedImageError as error:
        raise UnsupportedImage(
            f"the upload is not a picture in an accepted format ({', '.join(FORMATS)})"
        ) from error
    except MemoryError as error:
        raise PayloadTooLarge(
            f"the picture does not fit in memory; at most {limits.max_pixels} pixels are accepted"
        ) from error
    except Exception as error:
        # Decoders meet hostile bytes with every exception there is (OSError, SyntaxError,
        # struct.error, IndexError, warnings, ...); to the sender they all say the same thing.
        raise UnsupportedImage(f"the picture is damaged or cut short: {error}") from error


def to_float(photo: Tensor) -> Tensor:
    """uint8 ``[3, H, W]`` in 0..255 -> float32 ``[1, 3, H, W]`` in [-1, 1]."""
    if photo.dtype != torch.uint8 or photo.dim() != 3 or photo.shape[0] != 3:
        raise ValueError(f"got {photo.dtype} {tuple(photo.shape)}, expected torch.uint8 (3, H, W)")
    return photo.float().div(127.5).sub(1.0).unsqueeze(0)  # [1, 3, H, W]


def to_uint8(image: Tensor) -> Tensor:
    """float ``[1, 3, H, W]`` (or ``[3, H, W]``) in [-1, 1], clamped -> uint8 ``[3, H, W]``."""
    if image.dim() == 4 and image.shape[0] == 1:
        image = image[0]
    if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(
            f"got {image.dtype} {tuple(image.shape)}, expected floating point (1, 3, H, W)"
        )
    image = image.detach().float()
    if not bool(torch.isfinite(image).all()):
        raise ValueError("got a picture with NaN or infinite samples, expected finite ones")
    return image.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)  # [3, H, W]


def encode_png(image: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """float ``[1, 3, H, W]`` in [-1, 1] (clamped) or uint8 ``[3, H, W]`` -> a PNG file.

    ``text`` is written as iTXt chunks (UTF-8), keywords of 1..79 Latin-1 characters.
    """
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    if pixels.dim() != 3 or pixels.shape[0] != 3:
        raise ValueError(f"got shape {tuple(pixels.shape)}, expected (3, H, W)")
    info = PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        if not 1 <= len(keyword) <= 79:
            raise ValueError(f"keyword has {len(keyword)} characters, expected 1..79: {keyword!r}")
        info.add_itxt(keyword, value)
    buffer = io.BytesIO()
    array = pixels.permute(1, 2, 0).contiguous().cpu().numpy()  # [H, W, 3]
    # Level 6 of zlib costs ten times level 1 for a few per cent on photographs.
    Image.fromarray(array).save(buffer, format="PNG", pnginfo=info, compress_level=1)
    return buffer.getvalue()


def _too_many_pixels(got: int | None, limits: ImageLimits) -> PayloadTooLarge:
    said = "too many pixels" if got is None else f"{got} pixels"
    return PayloadTooLarge(f"the picture has {said}, expected at most {limits.max_pixels}")


def _decode(image: Image.Image, working_side: int) -> Image.Image:
    """An opened, not yet decoded picture -> upright 8-bit RGB, longer side <= working_side."""
    image.draft("RGB", (working_side, working_side))  # JPEG decodes at 1/2, 1/4, 1/8 for free
    image.load()
    # After load(): PNG may keep its EXIF chunk behind the pixels.
    turn = _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    flat = _flatten(image, working_side)
    return flat if turn is None else flat.transpose(turn)


def _flatten(image: Image.Image, working_side: int) -> Image.Image:
    """Any mode -> reduced RGB; alpha over white; 16-bit grey to its top 8 bits."""
    mode = image.mode
    if mode.startswith("I;16"):
        samples = np.asarray(image).astype(np.uint32)  # [H, W], 0..65535
        image = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    elif mode in ("I", "F"):
        raise UnsupportedImage(
            f"the picture has 32-bit samples (mode {mode}), expected 8 or 16 bits per channel"
        )
    elif image.has_transparency_data:
        # Colours of transparent pixels must not bleed: resize() averages RGBA premultiplied.
        front = _reduce(image.convert("RGBA"), working_side)
        back = Image.new("RGBA", front.size, (255, 255, 255, 255))
        return Image.alpha_composite(back, front).convert("RGB")
    elif mode not in ("L", "RGB", "CMYK", "YCbCr"):
        image = image.convert("RGB")  # palettes and bilevel cannot be averaged as they are
    return _reduce(image, working_side).convert("RGB")


def _reduce(image: Image.Image, working_side: int) -> Image.Image:
    longer = max(image.size)
    if longer <= working_side:
        return image
    width, height = (max(1, round(side * working_side / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _to_tensor(image: Image.Image) -> Tensor:
    array = np.array(image, dtype=np.uint8)  # [H, W, 3], a writable copy
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()  # [3, H, W]
