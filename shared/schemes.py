"""The schemes: how an edited picture can travel, by name. No torch in here: the gateway reads it.

::

    M2   edit+CARRIER   face --edit--> face' --carrier, channel--> what is received
    M1   CARRIER+edit   face --carrier, channel--> what is received --edit--> face'

The carriers are JPEG or AVIF with 5G NR LDPC and 4-QAM, a learned codec (`deepsc`), and the latent
of Editable-DeepSC itself. A scheme at another code rate than its carrier's usual one says so in its
name: `jpeg-ldpc-r34+edit` is rate 3/4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from types import MappingProxyType
from typing import Final, Literal

from shared.errors import InvalidRequest

Carrier = Literal["latent", "jpeg", "avif", "deepsc"]
Place = Literal["before", "after"]


class Scheme(StrEnum):
    """Names of the schemes, as requests and reports have them."""

    EDITABLE_DEEPSC = "editable-deepsc"
    JPEG_EDIT = "jpeg-ldpc+edit"
    EDIT_JPEG = "edit+jpeg-ldpc"
    DEEPSC_EDIT = "deepsc+edit"
    EDIT_DEEPSC = "edit+deepsc"
    PCA_LMMSE = "pca-lmmse"
    AVIF_EDIT = "avif-ldpc+edit"
    EDIT_AVIF = "edit+avif-ldpc"
    JPEG_R12_EDIT = "jpeg-ldpc-r12+edit"
    JPEG_R23_EDIT = "jpeg-ldpc-r23+edit"
    JPEG_R34_EDIT = "jpeg-ldpc-r34+edit"
    EDIT_JPEG_R12 = "edit+jpeg-ldpc-r12"
    EDIT_JPEG_R23 = "edit+jpeg-ldpc-r23"
    EDIT_JPEG_R34 = "edit+jpeg-ldpc-r34"
    AVIF_R13_EDIT = "avif-ldpc-r13+edit"
    AVIF_R12_EDIT = "avif-ldpc-r12+edit"
    AVIF_R23_EDIT = "avif-ldpc-r23+edit"
    EDIT_AVIF_R13 = "edit+avif-ldpc-r13"
    EDIT_AVIF_R12 = "edit+avif-ldpc-r12"
    EDIT_AVIF_R23 = "edit+avif-ldpc-r23"

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """Read a name; empty means Editable-DeepSC. InvalidRequest for one that does not exist."""
        try:
            return cls(name or cls.EDITABLE_DEEPSC)
        except ValueError:
            expected = ", ".join(cls)
            raise InvalidRequest(f"scheme is {name!r}; expected one of {expected}") from None


# The paper's rate for JPEG. For AVIF the highest: of 200 test faces, 192 have a stream that fits
# into 256 channel uses then, at rate 1/3 none.
USUAL_RATES: Final[Mapping[str, Fraction]] = MappingProxyType(
    {"jpeg": Fraction(1, 3), "avif": Fraction(3, 4)}
)


@dataclass(frozen=True)
class Plan:
    """What a scheme is made of.

    carrier: what crosses the channel. edit: before the channel (M2) or after it (M1). rate: of the
    channel code; None where there is none. description: a sentence for people.
    """

    scheme: Scheme
    carrier: Carrier
    edit: Place
    rate: Fraction | None
    description: str

    @property
    def is_baseline(self) -> bool:
        """Whether the process `baselines` carries it; Editable-DeepSC needs none."""
        return self.scheme is not Scheme.EDITABLE_DEEPSC


def _plan(scheme: Scheme) -> Plan:
    if scheme is Scheme.EDITABLE_DEEPSC:
        text = (
            "The edited StyleGAN2 latent as 256 symbols of a learned joint source-channel code, "
            "redrawn at the receiver"
        )
        return Plan(scheme, "latent", "before", None, text)
    if scheme is Scheme.PCA_LMMSE:
        text = (
            "The same latent and symbols with the closed-form code alone: principal components, "
            "water-filled power, linear estimation"
        )
        return Plan(scheme, "latent", "before", None, text)
    first, second = scheme.value.split("+")
    place: Place = "before" if first == "edit" else "after"
    carrier = second if first == "edit" else first
    when = "edited first, then sent" if place == "before" else "sent first, then edited"
    if carrier == "deepsc":
        text = f"A learned codec for whole pictures, CBR 0.0833; {when}"
        return Plan(scheme, "deepsc", place, None, text)
    kind: Carrier = "jpeg" if carrier.startswith("jpeg") else "avif"
    _, _, digits = carrier.partition("-r")
    rate = Fraction(int(digits[0]), int(digits[1])) if digits else USUAL_RATES[kind]
    source = "JPEG at 0.7 bpp (0.2 from 512 px)" if kind == "jpeg" else "AVIF in 256 channel uses"
    text = f"{source}, 5G NR LDPC of rate {rate}, 4-QAM; {when}"
    return Plan(scheme, kind, place, rate, text)


PLANS: Final[Mapping[Scheme, Plan]] = MappingProxyType({each: _plan(each) for each in Scheme})
