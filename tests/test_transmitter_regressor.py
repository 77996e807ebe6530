"""What the latent regressor foresees of a walk, on the toy of `test_transmitter_editing`."""

from collections.abc import Callable

import pytest
from torch import Tensor

from shared.attributes import Attribute, Edit
from tests.test_transmitter_editing import Mirror, Reader, halved, start, toy_fields
from transmitter.editing import LIMITS, MatchLimits, match
from transmitter.regressor import Regressor, RegressorConfig


class Seer(Regressor):
    """R: the numbers themselves, times a factor by which it is wrong."""

    def __init__(self, factor: float) -> None:
        super().__init__(RegressorConfig(width=4))
        self.factor, self.asked = factor, 0

    def forward(self, w: Tensor) -> Tensor:
        self.asked += len(w)
        return self.factor * w[:, :5]


@pytest.mark.parametrize("degree", [1, 3, 4])
@pytest.mark.parametrize("arrival", [None, halved])
def test_what_is_foreseen_rightly_is_looked_at_once(
    degree: int, arrival: Callable[[Tensor], Tensor] | None
) -> None:
    """The first look is at the face, the second where the regressor says, and that is the last;
    it is told what arrives, and of some steps only."""
    seer = Seer(1.0)
    found = match(
        start(),
        Edit(Attribute.BEARD, target=degree),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        regressor=seer,
        arrival=arrival,
        limits="fast",
    )
    assert found.reached
    assert found.looks == 2
    assert 0 < seer.asked < LIMITS["fast"].max_steps / 2


@pytest.mark.parametrize("factor", [0.3, 0.7, 1.5, 3.0, 0.0])
def test_what_is_foreseen_wrongly_is_mended_by_what_is_seen(factor: float) -> None:
    seer = Seer(factor)
    found = match(
        start(),
        Edit(Attribute.BEARD, target=3),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        regressor=seer,
        limits="balanced",
    )
    assert found.reached
    assert found.looks > 2
    assert seer.asked


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 5])
def test_the_shortest_walks_are_foreseen_too(longest: int) -> None:
    found = match(
        start(),
        Edit(Attribute.BEARD, target=5),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        regressor=Seer(1.0),
        limits=MatchLimits(max_steps=longest),
    )
    assert found.steps == longest
    assert not found.reached


@pytest.mark.parametrize(("begin", "change", "looks"), [(4.0, 2, 2), (6.5, -1, 2)])
def test_what_the_channel_takes_is_foreseen_too(begin: float, change: int, looks: int) -> None:
    """The beard that is seen on the face would arrive as half of it: a walk to more makes up for
    that first, and one to less may have arrived before it began, which has to be looked at."""
    found = match(
        start(beard=begin),
        Edit(Attribute.BEARD, change=change),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        regressor=Seer(1.0),
        arrival=halved,
        limits="fast",
    )
    assert found.looks == looks
    assert found.reached
    assert found.steps
