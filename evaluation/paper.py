"""What the paper prints (arXiv 2411.15702), as far as it is known here; everything else is "-".

LPIPS, FID and KID below are the paper's, measured with its weights on its pictures. Ours are other
numbers unless the rows carry `lpips_*` and `inception`: never subtract one from the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

SOURCE: Final = "arXiv 2411.15702"
MISSING: Final = "-"


@dataclass(frozen=True)
class Printed:
    """Quality at one SNR on one set of faces, with the paper's own metrics."""

    lpips: float
    fid: float
    kid: float


AT_MINUS_6_DB: Final = Printed(0.1618, 72.0, 0.0022)  # CelebA 128, AWGN
WITHOUT_ADAPTERS: Final = Printed(0.3049, 117.8, 0.0404)  # the same, channel coding not tuned
CELEBA_HQ: Final = Printed(0.3277, 92.3, 0.0209)  # 1024 px
METFACES: Final = Printed(0.2238, 125.3, 0.0434)  # 1024 px, out of distribution

GAINS_AT_MINUS_6_DB: Final[Mapping[str, float]] = MappingProxyType(
    {"perceptual": 0.404, "fd": 0.532, "kd": 0.956}
)
"""Smaller than the second-best scheme by this share; the paper: on LPIPS, FID, KID."""

BARS: Final[Mapping[str, float]] = MappingProxyType({"perceptual": 0.40, "fd": 0.53, "kd": 0.90})
"""What this project asks of itself at -6 dB."""

SIDE: Final = 128  # px of the pictures that the figures below are for

CBR: Final[Mapping[str, float]] = MappingProxyType(
    {"latent": 0.0104, "jpeg": 0.0389, "deepsc": 0.0833}
)
"""128 px, by carrier; for JPEG at 0.7 bpp with rate 1/3."""

SECONDS: Final[Mapping[str, str]] = MappingProxyType({"ours": "14.6", "baselines": "32.6..34.1"})
"""Seconds per image at 128 px on an RTX 2080 Ti."""

MEMORY: Final = "< 1600"  # MiB at 128 px
TIME_SHARE: Final = 0.44  # of the time of a baseline
TUNED: Final = 2.1e6  # parameters of the adapters, 8 x Linear(512, 512)
ALL: Final = 79.1e6  # parameters
R_INV: Final = 110  # inversion steps chosen; the paper tries 70..150
