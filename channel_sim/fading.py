"""Flat fading laws: drawing h, which is all that tells one channel from another.

Every law has E|h|^2 = 1, so SNR averaged over fading is Es/N0, and a uniform phase:

    awgn      h = 1
    rayleigh  h = g,                                                       g ~ CN(0, 1)
    rician    h = sqrt(K / (K + 1)) e^{j theta} + sqrt(1 / (K + 1)) g,     theta ~ U(-pi, pi)

`block` draws one h per message (the coherence time is longer than the message), `fast` one per
channel use. The line-of-sight phase theta belongs to the geometry, not to the scattering: it is
drawn once per message under both. CN(0, v) is circularly symmetric, v / 2 per real dimension.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from shared.errors import InvalidRequest

Kind = Literal["awgn", "rayleigh", "rician"]
Fading = Literal["block", "fast"]
Csi = Literal["perfect", "estimated"]

K_FACTOR_MIN_DB: Final = -20.0
K_FACTOR_MAX_DB: Final = 40.0
PILOTS_MAX: Final = 1024


@dataclass(frozen=True)
class ChannelConfig:
    """Which channel; checked when it is made.

    kind: "awgn", "rayleigh" or "rician".
    fading: "block" or "fast"; without meaning for AWGN, where h = 1.
    k_factor_db: line-of-sight over scattered power, -20..40 dB, for Rician only. The default is
        the mean over urban microcells in line of sight (3GPP TR 38.901, table 7.5-6).
    csi: "perfect", or "estimated" from `pilots` known unit symbols sent before the message; they
        count in the bandwidth.
    pilots: 1..1024, without meaning under perfect CSI.

    Raises InvalidRequest naming the value and what was expected.
    """

    kind: Kind
    fading: Fading = "block"
    k_factor_db: float = 9.0
    csi: Csi = "perfect"
    pilots: int = 8

    def __post_init__(self) -> None:
        _check_word("channel", self.kind, get_args(Kind))
        _check_word("fading", self.fading, get_args(Fading))
        _check_word("csi", self.csi, get_args(Csi))
        if not (
            _is_number(self.k_factor_db) and K_FACTOR_MIN_DB <= self.k_factor_db <= K_FACTOR_MAX_DB
        ):
            raise InvalidRequest(
                f"k_factor_db is {self.k_factor_db!r}; expected a finite number in "
                f"{K_FACTOR_MIN_DB:g}..{K_FACTOR_MAX_DB:g} dB"
            )
        whole = isinstance(self.pilots, int) and not isinstance(self.pilots, bool)
        if not (whole and 1 <= self.pilots <= PILOTS_MAX):
            raise InvalidRequest(
                f"pilots is {self.pilots!r}; expected a whole number 1..{PILOTS_MAX}"
            )
        if self.csi == "estimated" and self.fading == "fast" and self.kind != "awgn":
            raise InvalidRequest(
                "fading is 'fast' with csi 'estimated'; expected 'block': under fast fading every "
                "use has its own h, so pilots sent before the message say nothing about it"
            )

    @property
    def pilot_uses(self) -> int:
        """Channel uses spent on pilots, to be counted in the CBR."""
        return self.pilots if self.csi == "estimated" else 0

    @property
    def coefficients(self) -> Literal["one", "every use"]:
        """How many fading coefficients a message sees."""
        return "every use" if self.fading == "fast" and self.kind != "awgn" else "one"


def complex_normal(
    rows: int, columns: int, generator: torch.Generator, device: torch.device | None = None
) -> Tensor:
    """CN(0, 1): [rows, columns] complex64 with E|g|^2 = 1, that is 1/2 per real dimension.

    Drawn on the generator's device and then moved, so a CPU generator gives the same samples
    whatever the symbols live on.
    """
    pairs = torch.randn(
        rows, columns, 2, generator=generator, device=generator.device, dtype=torch.float32
    )
    return torch.view_as_complex(pairs * math.sqrt(0.5)).to(device or generator.device)


def draw_fading(
    config: ChannelConfig,
    batch: int,
    uses: int,
    generator: torch.Generator,
    device: torch.device | None = None,
) -> Tensor:
    """Draw h with E|h|^2 = 1: [batch, 1] (AWGN, block) or [batch, uses] (fast), complex64."""
    columns = uses if config.coefficients == "every use" else 1
    target = device or generator.device
    if config.kind == "awgn":
        return torch.ones(batch, 1, dtype=torch.complex64, device=target)
    scattered = complex_normal(batch, columns, generator, target)  # [B, 1 or n]
    if config.kind == "rayleigh":
        return scattered
    k_factor = 10.0 ** (config.k_factor_db / 10.0)
    theta = 2 * math.pi * torch.rand(batch, 1, generator=generator, device=generator.device)
    line_of_sight = torch.polar(torch.ones_like(theta), theta).to(target)  # [B, 1]
    return (
        math.sqrt(k_factor / (k_factor + 1)) * line_of_sight
        + math.sqrt(1 / (k_factor + 1)) * scattered
    )


def _check_word(name: str, got: object, expected: tuple[str, ...]) -> None:
    if got not in expected:
        raise InvalidRequest(f"{name} is {got!r}; expected one of {', '.join(expected)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
