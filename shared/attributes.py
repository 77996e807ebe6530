"""The five attributes a sentence can edit, their degrees 0..5, and the edit itself.

The degrees are CelebA-Dialog's (Jiang et al., "Talk-to-Edit", 2021). Its attribute "Young" grows
with age, so it is called `age` here and the name "young" is read as an alias. The sentence "-"
sends a photo unedited; everywhere in this repository that edit is None.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from shared.errors import InvalidRequest

MAX_DEGREE = 5


class Attribute(StrEnum):
    """An editable attribute; the order is the order of every [.., 5] tensor."""

    BANGS = "bangs"
    EYEGLASSES = "eyeglasses"
    BEARD = "beard"
    SMILING = "smiling"
    AGE = "age"

    @property
    def index(self) -> int:  # type: ignore[override]  # a position, not str.index
        """Position 0..4 in degree tensors."""
        return ATTRIBUTES.index(self)

    @classmethod
    def parse(cls, name: str) -> "Attribute":
        """Read a name, any case; "young" means age. Raises InvalidRequest for any other word."""
        word = name.strip().lower()
        try:
            return cls(_ALIASES.get(word, word))
        except ValueError:
            expected = ", ".join(cls)
            raise InvalidRequest(f"attribute is {name!r}; expected one of {expected}") from None


ATTRIBUTES: tuple[Attribute, ...] = tuple(Attribute)
_ALIASES: Mapping[str, str] = MappingProxyType({"young": "age"})

DEGREE_NAMES: Mapping[Attribute, tuple[str, ...]] = MappingProxyType(
    {
        Attribute.BANGS: (
            "no bangs",
            "tiny bangs",
            "short bangs",
            "bangs over half of the forehead",
            "bangs over almost all of the forehead",
            "bangs over all of the forehead",
        ),
        Attribute.EYEGLASSES: (
            "no eyeglasses",
            "rimless eyeglasses",
            "eyeglasses with a thin frame",
            "eyeglasses with a thick frame",
            "sunglasses with a thin frame",
            "sunglasses with a thick frame",
        ),
        Attribute.BEARD: (
            "no beard",
            "stubble or a goatee",
            "a short beard",
            "a medium beard",
            "a bushy beard or a big moustache",
            "a full, very long beard",
        ),
        Attribute.SMILING: (
            "a serious face",
            "the corners of the mouth up",
            "a smile with some teeth",
            "a beaming smile",
            "a big smile",
            "a laugh",
        ),
        Attribute.AGE: (
            "a child",
            "a teenager",
            "in the twenties or thirties",
            "in the forties",
            "in the fifties or sixties",
            "in the eighties",
        ),
    }
)


@dataclass(frozen=True)
class Edit:
    """One edit of one attribute: a change (+/-1..5 degrees) or a target degree (0..5).

    Raises InvalidRequest unless exactly one of `change` and `target` is given, and in range.
    """

    attribute: Attribute
    change: int | None = None
    target: int | None = None

    def __post_init__(self) -> None:
        if (self.change is None) == (self.target is None):
            raise InvalidRequest(
                f"edit has change={self.change} and target={self.target}; expected exactly one"
            )
        if self.change is not None and not (
            _is_whole(self.change) and 1 <= abs(self.change) <= MAX_DEGREE
        ):
            raise InvalidRequest(
                f"change is {self.change!r}; expected a whole number, "
                f"-{MAX_DEGREE}..-1 or 1..{MAX_DEGREE}"
            )
        if self.target is not None:
            check_degree("target", self.target)

    @property
    def mode(self) -> Literal["change", "target"]:
        """Whether the sentence named a step or a degree."""
        return "target" if self.change is None else "change"

    @property
    def direction(self) -> Literal["more", "less"] | None:
        """Which way the degree moves; None for a target in between, where the face decides."""
        if self.change is not None:
            return "more" if self.change > 0 else "less"
        if self.target == 0:
            return "less"
        return "more" if self.target == MAX_DEGREE else None

    @property
    def value(self) -> int | None:
        """Size of a change, 1..5; None for a target."""
        return None if self.change is None else abs(self.change)

    def expected(self, degree: int) -> int:
        """The degree asked for: a_exp = clamp(a + change, 0, 5), or the target. Eq. (10).

        degree: the attribute's degree before the edit, 0..5.
        """
        check_degree("degree", degree)
        if self.target is not None:
            return self.target
        assert self.change is not None  # __post_init__ made sure of one of the two
        return max(0, min(MAX_DEGREE, degree + self.change))

    def describe(self) -> str:
        """The edit in plain words, e.g. "beard: 2 degrees more" or "age: a teenager"."""
        if self.target is not None:
            return f"{self.attribute}: {DEGREE_NAMES[self.attribute][self.target]}"
        unit = "degree" if self.value == 1 else "degrees"
        return f"{self.attribute}: {self.value} {unit} {self.direction}"


def check_degree(name: str, degree: int) -> None:
    """Raise InvalidRequest unless `degree` is a whole number 0..5."""
    if not (_is_whole(degree) and 0 <= degree <= MAX_DEGREE):
        raise InvalidRequest(f"{name} is {degree!r}; expected a whole number 0..{MAX_DEGREE}")


def _is_whole(number: object) -> bool:
    # bool is an int to Python; `change=True` is a mistake, not one degree.
    return isinstance(number, int) and not isinstance(number, bool)
