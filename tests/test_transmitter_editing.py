"""Fields and attribute matching, on a toy whose answer is known in closed form.

The toy generator shows the latent itself, scaled to the range of pictures, and the toy predictor
reads attribute a off its a-th number. A field that points along that axis, from a latent at right
angles to it, gives the score sqrt(512) sin(steps * step_rad): so the step at which each degree
begins can be computed.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.adapters import Adapters
from shared.attributes import ATTRIBUTES, Attribute, Edit
from shared.bundle import Bundle, write_net
from shared.errors import Cancelled
from shared.stylegan2 import to_sphere
from transmitter.editing import LIMITS, MatchLimits, arrival_of, match
from transmitter.fields import Fields, FieldsConfig, turn
from transmitter.predictor import Predictor, PredictorConfig

STEP_RAD = 0.02
RANGE = 23.0  # just above sqrt(512)
CUTS = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
PAPER = MatchLimits(max_steps=100, looks=None, near=0.0)  # walk until the aim is met


class Mirror:
    """G: the image is the latent, which has no number above RANGE."""

    def __init__(self) -> None:
        self.drawn = 0

    @property
    def synthesis(self) -> Callable[[Tensor], Tensor]:
        return self._draw

    def _draw(self, w: Tensor) -> Tensor:
        self.drawn += len(w)
        return w / RANGE


class Reader:
    """P: the score of attribute a is the a-th number."""

    def __init__(self) -> None:
        self.cuts = CUTS.repeat(5, 1)
        self._law = Predictor(PredictorConfig(widths=(4,), depths=(0,), resolution=2))
        self._law.cuts.copy_(self.cuts)

    def steady_scores(self, image: Tensor) -> Tensor:
        return image[:, :5] * RANGE

    def score_degrees(self, scores: Tensor) -> Tensor:
        return self._law.score_degrees(scores)


def axes() -> Tensor:
    """Directions [5, 512]: field a along axis a."""
    return torch.eye(512)[:5]


def toy_fields(directions: Tensor | None = None) -> Fields:
    config = FieldsConfig(depth=2, step_rad=STEP_RAD, slopes=(22.0,) * 5)
    fields = Fields(config, torch.Generator().manual_seed(0))
    fields.start_at(axes() if directions is None else directions)
    return fields.requires_grad_(False)


def start(**scores: float) -> Tensor:
    """A latent [1,512] on the sphere whose first five numbers are the given scores, else 0."""
    w = torch.zeros(1, 512)
    for name, value in scores.items():
        w[0, Attribute(name).index] = value
    w[0, 5] = math.sqrt(512 - float(w.square().sum()))
    return w


def score_after(steps: int) -> float:
    return math.sqrt(512) * math.sin(steps * STEP_RAD)


def closest_to(target: float) -> int:
    return min(range(78), key=lambda k: abs(score_after(k) - target))


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_paper_loop_keeps_the_step_nearest_to_the_middle_of_the_degree(degree: int) -> None:
    found = match(
        start(),
        Edit(Attribute.SMILING, target=degree),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        limits=PAPER,
    )
    # The ordered logit is symmetric about the middle of an interval: there a degree is likeliest.
    assert found.steps == closest_to(2.0 * degree)
    assert found.reached
    assert found.expected == degree
    assert found.before.tolist() == [0] * 5
    assert found.after.tolist() == [0, 0, 0, degree, 0]
    torch.testing.assert_close(found.w[0, 3].item(), score_after(found.steps), atol=1e-3, rtol=0)


@pytest.mark.parametrize("quality", ["fast", "balanced"])
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize(("begin", "degree"), [(0.0, 2), (0.0, 5), (8.0, 3), (10.0, 0), (4.0, 4)])
def test_few_looks_reach_the_same_degree(
    quality: str, attribute: Attribute, begin: float, degree: int
) -> None:
    generator = Mirror()
    found = match(
        start(**{attribute.value: begin}),
        Edit(attribute, target=degree),
        generator=generator,
        fields=toy_fields(),
        predictor=Reader(),
        limits=LIMITS[quality],
    )
    assert found.reached
    assert int(found.after[attribute.index]) == degree
    looks = LIMITS[quality].looks
    assert looks is not None
    assert generator.drawn == found.looks <= looks + 1


@pytest.mark.parametrize("limits", ["fast", "balanced", "paper"])
@pytest.mark.parametrize(("begin", "degree"), [(0.0, 2), (0.0, 5), (10.0, 0), (8.0, 3)])
def test_a_degree_is_met_in_its_middle_and_the_outermost_not_passed_by_far(
    limits: str, begin: float, degree: int
) -> None:
    """Where degrees are open, more is not better: every further step costs the person."""
    found = match(
        start(smiling=begin),
        Edit(Attribute.SMILING, target=degree),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        limits=LIMITS[limits],
    )
    aim = {0: 1.0 - 1.5, 5: 9.0 + 1.5}.get(degree, 2.0 * degree)
    step = math.sqrt(512) * STEP_RAD  # 0.45
    assert abs(float(found.w[0, 3]) - aim) <= max(step / 2, LIMITS[limits].near) + 1e-3


def halved(w: Tensor) -> Tensor:
    """A channel whose code keeps half of the five attributes' numbers."""
    return torch.cat([w[:, :5] / 2, w[:, 5:]], 1)


@pytest.mark.parametrize("limits", ["fast", "balanced", "paper"])
@pytest.mark.parametrize("degree", [2, 4])
def test_the_degree_is_met_where_it_arrives(limits: str, degree: int) -> None:
    """Half of the attribute is lost on the way, so twice as much is sent; what the edit starts from
    is the face, not what would have become of it.
    """
    found = match(
        start(beard=2.0),  # degree 1; it would arrive as 1.0, at the edge
        Edit(Attribute.BEARD, change=degree - 1),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        arrival=halved,
        limits=LIMITS[limits],
    )
    assert int(found.before[2]) == 1
    assert found.expected == degree
    assert found.reached
    assert int(found.after[2]) == degree
    assert torch.equal(found.image, halved(found.w) / RANGE)
    arrived = float(found.w[0, 2]) / 2
    assert abs(arrived - 2.0 * degree) <= 0.3
    unaware = match(
        start(beard=2.0),
        Edit(Attribute.BEARD, target=degree),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        limits=LIMITS[limits],
    )
    assert found.steps > 1.5 * unaware.steps


class Brighter(Mirror):
    """Draws so brightly that a number of 6 is white, and nothing shows more."""

    def _draw(self, w: Tensor) -> Tensor:
        return super()._draw(w) * RANGE / 6


class BrightReader(Reader):
    def steady_scores(self, image: Tensor) -> Tensor:
        return image[:, :5] * 6


@pytest.mark.parametrize(("degree", "reached"), [(2, True), (4, False)])
def test_only_what_can_be_shown_counts(degree: int, reached: bool) -> None:
    """What leaves the range is cut when it is drawn, so a degree beyond it is not promised."""
    found = match(
        start(),
        Edit(Attribute.SMILING, target=degree),
        generator=Brighter(),
        fields=toy_fields(),
        predictor=BrightReader(),
        limits=PAPER,
    )
    assert found.reached == reached
    assert float(found.image.max()) <= 1.0


def test_arrival_is_the_code_without_noise() -> None:
    """At a high SNR nothing is lost; at a low one the latent shrinks by 1 / (1 + N0)."""
    code = Adapters()  # untrained: the latent is sent as it is, and shrunk
    w = to_sphere(torch.randn(3, 512, generator=torch.Generator().manual_seed(4)))
    clear = arrival_of(code.encoder, code.decoder, 40.0)(w)
    torch.testing.assert_close(clear, w, atol=1e-2, rtol=0)
    dim = arrival_of(code.encoder, code.decoder, 0.0)(w)
    torch.testing.assert_close(dim, w / 2, atol=1e-2, rtol=0)
    assert not dim.requires_grad
    torch.testing.assert_close(arrival_of(code.encoder, code.decoder, -20.0)(w), dim)


class Crooked(Reader):
    """A score that runs away from what slope and sine foresee."""

    def steady_scores(self, image: Tensor) -> Tensor:
        return super().steady_scores(image).square() / 8


def test_a_look_near_the_aim_is_the_last() -> None:
    def looks(near: float) -> int:
        return match(
            start(),
            Edit(Attribute.SMILING, target=2),
            generator=Mirror(),
            fields=toy_fields(),
            predictor=Crooked(),
            limits=MatchLimits(looks=12, near=near),
        ).looks

    assert looks(0.9) < looks(0.0)


def test_a_field_of_another_slope_than_measured_still_arrives() -> None:
    for slope in (3.0, 200.0):  # ten times off, either way
        fields = toy_fields()
        fields.config = FieldsConfig(depth=2, step_rad=STEP_RAD, slopes=(slope,) * 5)
        found = match(
            start(),
            Edit(Attribute.AGE, target=3),
            generator=Mirror(),
            fields=fields,
            predictor=Reader(),
            limits="balanced",
        )
        assert found.reached


@pytest.mark.parametrize(
    ("begin", "change", "expected"), [(8.0, 3, 5), (10.0, 1, 5), (2.0, -4, 0), (0.0, -2, 0)]
)
def test_changes_are_clamped(begin: float, change: int, expected: int) -> None:
    """Eq. (10): a_exp = clamp(a + change, 0, 5)."""
    found = match(
        start(bangs=begin),
        Edit(Attribute.BANGS, change=change),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        limits=PAPER,
    )
    assert found.expected == expected
    assert found.reached
    assert int(found.after[0]) == expected


def test_already_there_returns_the_latent_untouched() -> None:
    w, generator = start(beard=2.0), Mirror()
    found = match(
        w,
        Edit(Attribute.BEARD, target=1),
        generator=generator,
        fields=toy_fields(),
        predictor=Reader(),
    )
    assert found.steps == 0
    assert found.reached
    assert generator.drawn == 1
    assert torch.equal(found.w, w)


@pytest.mark.parametrize("limits", ["fast", "balanced", "paper"])
def test_unreachable_says_so_and_returns_the_nearest(limits: str) -> None:
    """A field that turns towards another axis cannot raise this one; a short walk only gets part of
    the way.
    """
    wrong = match(
        start(),
        Edit(Attribute.EYEGLASSES, target=5),
        generator=Mirror(),
        fields=toy_fields(torch.eye(512)[5:10].flip(0)),
        predictor=Reader(),
        limits=LIMITS[limits],
    )
    assert not wrong.reached
    assert wrong.expected == 5
    assert wrong.steps == 0  # nothing helped, so nothing was spoilt
    short = match(
        start(),
        Edit(Attribute.EYEGLASSES, target=5),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        limits=replace(LIMITS[limits], max_steps=10),
    )
    assert not short.reached
    assert short.steps == 10
    # sqrt(512) sin(0.2) = 4.5; the paper's steps are 0.46 of that long: 2.1
    assert int(short.after[1]) == (1 if limits == "paper" else 2)


class Restless(Reader):
    """P in passes that others share: each look's scores are off by thousandths."""

    def __init__(self, *off: float) -> None:
        super().__init__()
        self._off = cycle(off)

    def steady_scores(self, image: Tensor) -> Tensor:
        return super().steady_scores(image) + next(self._off)


@pytest.mark.parametrize("limits", ["fast", "balanced", "paper"])
@pytest.mark.parametrize("off", [(0.0, 0.004), (0.0, -0.004), (0.003, -0.003)])
def test_who_shares_a_pass_does_not_decide_which_step_is_sent(
    limits: str, off: tuple[float, float]
) -> None:
    found = match(
        start(),
        Edit(Attribute.BEARD, change=2),
        generator=Mirror(),
        fields=toy_fields(torch.eye(512)[6:11]),  # no step moves a score
        predictor=Restless(*off),
        limits=LIMITS[limits],
    )
    assert (found.steps, found.reached) == (0, False)


def test_cancelled_stops() -> None:
    generator = Mirror()
    with pytest.raises(Cancelled):
        match(
            start(),
            Edit(Attribute.AGE, target=5),
            generator=generator,
            fields=toy_fields(),
            predictor=Reader(),
            limits=PAPER,
            cancelled=lambda: generator.drawn >= 4,
        )
    assert generator.drawn == 4


def test_progress_rises_and_stays_in_range() -> None:
    seen: list[float] = []
    match(
        start(),
        Edit(Attribute.AGE, target=5),
        generator=Mirror(),
        fields=toy_fields(),
        predictor=Reader(),
        limits=PAPER,
        progress=seen.append,
    )
    assert seen == sorted(seen)
    assert 0 < seen[0] <= seen[-1] <= 1


def test_steps_stay_on_the_sphere_and_turn_by_the_angle_asked() -> None:
    generator = torch.Generator().manual_seed(1)
    w = to_sphere(torch.randn(4, 512, generator=generator))
    direction = torch.randn(4, 512, generator=generator)
    turned = turn(w, direction, 0.3)
    torch.testing.assert_close(turned.norm(dim=1), torch.full((4,), math.sqrt(512)))
    cosine = torch.cosine_similarity(w, turned)
    torch.testing.assert_close(cosine, torch.full((4,), math.cos(0.3)))
    angles = torch.tensor([[0.0], [0.1], [-0.1], [0.5]])
    torch.testing.assert_close(turn(w, direction, angles)[0], w[0])


def test_one_field_alone_equals_its_row_of_all_five() -> None:
    fields = Fields(FieldsConfig(depth=3), torch.Generator().manual_seed(2))
    w = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    every = fields(w)
    assert every.shape == (3, 5, 512)
    for attribute in ATTRIBUTES:
        torch.testing.assert_close(fields.direction(w, attribute), every[:, attribute.index])


def test_paper_sizes() -> None:
    """8 x Linear(512, 512) for each of five attributes."""
    fields = Fields(FieldsConfig())
    assert sum(p.numel() for p in fields.parameters()) == 5 * 8 * (512 * 512 + 512)


def test_fields_come_back_from_a_bundle(tmp_path: Path) -> None:
    fields = toy_fields()
    write_net(
        tmp_path,
        "fields",
        config=fields.config.to_json(),
        tensors=fields.state_dict(),
        provenance={},
        half=False,
    )
    loaded = Fields.from_bundle(Bundle.open(tmp_path))
    assert loaded.config == fields.config
    w = start(age=3.0)
    torch.testing.assert_close(loaded(w), fields(w))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w must be \[1, 512\], got \[2, 512\]"):
        match(
            torch.zeros(2, 512),
            Edit(Attribute.AGE, target=5),
            generator=Mirror(),
            fields=toy_fields(),
            predictor=Reader(),
        )
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MatchLimits(max_steps=0)
