"""Editing a latent: a walk along a field that stops at the degree asked (Eqs. 10, 11).

    w --+--> field of the attribute --> a small turn --> w' --> arrival --> G --> P --> degree
        ^                                                |
        +------ until the expected degree is met --------+

What counts is the degree that is received. A channel at a finite SNR takes of every component what
the code gave it too little power for, and the picture that is drawn there is kept in range. So a
step is judged as it will arrive on average (`Arrival`) and as it will be shown, not as it is sent:
the editing knows the channel code, as joint editing-channel coding has it.

The walk is rolled out in latent space alone, which is cheap, and the latent regressor says what
would be seen along it; generator and predictor look where it should meet the aim, and what they see
corrects what was foreseen (`MatchLimits`). With a look at every step it is the paper's loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from shared.adapters import ChannelDecoder, ChannelEncoder
from shared.attributes import Attribute, Edit
from shared.batching import Operation, Steps, alone, ask, ask_one
from shared.errors import Cancelled
from transmitter.fields import Fields, FieldsConfig, turn
from transmitter.regressor import Regressor

Quality = Literal["fast", "balanced", "paper"]
Arrival = Callable[[Tensor], Tensor]
"""Latents [B,512] as sent -> [B,512] as they arrive on average: no noise, but what it costs."""


LOWEST_ARRIVAL_DB = 0.0


@dataclass(frozen=True)
class MatchLimits:
    """How far to walk and how closely to watch.

    max_steps: longest walk. looks: how many pictures may be drawn and judged after the first one;
    None: one per step, in order (the paper's loop). near: a score this close to the aim ends the
    search (degrees are 2 wide; two predictors differ by about 1). stride: the turn of a step, in
    `step_rad`. straight: steps along a great circle before the field is asked again for its
    direction (1: the paper's loop; fields are trained on whole walks).
    """

    max_steps: int = 46
    looks: int | None = 8
    near: float = 0.2
    stride: float = 1.0
    straight: int = 8

    def __post_init__(self) -> None:
        looks = 1 if self.looks is None else self.looks
        if min(self.max_steps, looks, self.straight) < 1:
            raise ValueError(
                "max_steps, looks and straight must be at least 1, got "
                f"{self.max_steps}, {self.looks} and {self.straight}"
            )


LIMITS: Mapping[str, MatchLimits] = MappingProxyType(
    {
        # The last steps of a long walk cost the person more than they add to the degree.
        "fast": MatchLimits(max_steps=40, looks=4),
        "balanced": MatchLimits(max_steps=46, looks=12, near=0.05),
        "paper": MatchLimits(max_steps=100, looks=None, stride=0.46, straight=1),
    }
)


@dataclass(frozen=True)
class Match:
    """What the walk found.

    w [1,512]; before, after: the degrees [5] int64 the predictor sees on G of the latent given, and
    on G of w as it arrives; expected: the degree asked of the edited attribute, 0..5 (Eq. 10);
    steps walked to w; reached: whether after[attribute] == expected; image [1,3,H,W] in [-1, 1]:
    what `after` was seen on; looks: pictures drawn and judged, the first included.
    """

    w: Tensor
    before: Tensor
    expected: int
    after: Tensor
    steps: int
    reached: bool
    image: Tensor
    looks: int = 1


class Renderer(Protocol):
    """The part of the generator that is needed: latents [B,512] to images [B,3,H,W]."""

    @property
    def synthesis(self) -> Callable[[Tensor], Tensor]: ...


class Judge(Protocol):
    """What is needed of who sees degrees: one `Predictor`, or several as `Opinions`."""

    @property
    def cuts(self) -> Tensor: ...

    def steady_scores(self, image: Tensor) -> Tensor: ...

    def score_degrees(self, scores: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Sight:
    """Latents [B, 512] to be seen as they arrive; without an arrival, as they are."""

    w: Tensor
    arrival: Arrival | None = None

    def arrived(self) -> Tensor:
        if self.arrival is None:
            return self.w
        with torch.autocast(self.w.device.type, enabled=False):  # a latent has more than 8 bits
            return self.arrival(self.w)


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen at a latent: the picture [1, 3, H, W] in [-1, 1] and its scores [5]."""

    image: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Stretch:
    """A part of a walk: from w [1, 512], `steps` turns of `turn_rad` along an attribute's field,
    `straight` of them at a time in one direction.
    """

    w: Tensor
    attribute: Attribute
    turn_rad: float
    steps: int
    straight: int


_POST = 4  # steps
_ALIKE = 0.05  # of a score: degrees are 2 wide
_BEND = 4.0  # how many times faster or slower than foreseen a score may turn out to move


@dataclass(frozen=True, eq=False)
class Matching:
    """The networks of the matching as operations that requests can share.

    look: sights of one latent -> pictures and scores. walk: stretches -> the latents along them,
    each [1, 512]. foresee: sights of B latents -> the scores [B, 5] that should be seen on them;
    None without a regressor. config, judge: of the fields and of the predictor behind them.
    """

    look: Operation[Sight, Look]
    walk: Operation[Stretch, list[Tensor]]
    foresee: Operation[Sight, Tensor] | None
    config: FieldsConfig
    judge: Judge

    @classmethod
    def of(
        cls,
        generator: Renderer,
        fields: Fields,
        predictor: Judge,
        regressor: Regressor | None = None,
        most: int = 8,
    ) -> Matching:
        """most: pictures in one pass."""

        @torch.no_grad()
        def look(sights: Sequence[Sight]) -> Sequence[Look]:
            # In range, as they are shown: blacker than black reads as hair to the predictor.
            images = generator.synthesis(torch.cat([s.arrived() for s in sights])).clamp(-1, 1)
            scores = predictor.steady_scores(images)  # [B, 5]
            # Clones: a picture that is kept should not keep the others of its batch in memory.
            return [Look(images[i : i + 1].clone(), scores[i].clone()) for i in range(len(sights))]

        @torch.no_grad()
        def walk(stretches: Sequence[Stretch]) -> Sequence[list[Tensor]]:
            return _walk_together(fields, stretches)

        @torch.no_grad()
        def foresee(sights: Sequence[Sight]) -> Sequence[Tensor]:
            assert regressor is not None
            scores = regressor(torch.cat([sight.arrived() for sight in sights]))
            return list(scores.split([len(sight.w) for sight in sights]))

        return cls(
            Operation("look", look, most, dear=True),
            Operation("walk", walk),
            None if regressor is None else Operation("foresee", foresee),
            fields.config,
            predictor,
        )


def _walk_together(fields: Fields, stretches: Sequence[Stretch]) -> list[list[Tensor]]:
    """All stretches, direction by direction. A field is 8 MB of weights: those on it share it."""
    paths: list[list[Tensor]] = [[] for _ in stretches]
    for attribute, straight in dict.fromkeys((one.attribute, one.straight) for one in stretches):
        going = [
            i
            for i, one in enumerate(stretches)
            if (one.attribute, one.straight) == (attribute, straight)
        ]
        w = torch.cat([stretches[i].w for i in going])  # [B, 512]
        steps = torch.arange(1, straight + 1, device=w.device)[:, None, None]
        while going:
            turns = w.new_tensor([stretches[i].turn_rad for i in going])[:, None]  # [B, 1]
            leg = turn(w, fields.direction(w, attribute), steps * turns)  # [straight, B, 512]
            for row, i in enumerate(going):
                missing = stretches[i].steps - len(paths[i])
                paths[i] += leg[:missing, row].split(1)
            still = [row for row, i in enumerate(going) if len(paths[i]) < stretches[i].steps]
            going, w = [going[row] for row in still], leg[-1, still]
    return paths


def match(
    w: Tensor,
    edit: Edit,
    *,
    generator: Renderer,
    fields: Fields,
    predictor: Judge,
    regressor: Regressor | None = None,
    arrival: Arrival | None = None,
    limits: MatchLimits | Quality = "balanced",
    cancelled: Callable[[], bool] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Match:
    """Iterative attribute matching (Eqs. 10, 11) of one latent w [1,512].

    Walks along the attribute's field until the predictor sees the expected degree in G(w), as w
    arrives (as it is, without an `arrival`), and keeps the step that is nearest to the degree's
    middle: there it is likeliest, and there another observer agrees most often. Where no step shows
    it, the step whose score came nearest is returned with `reached` False. A face that already
    shows it is returned as it is. `progress` gets 0..1. Raises Cancelled once `cancelled()` is
    true, ValueError for a wrong shape.
    """
    networks = Matching.of(generator, fields, predictor, regressor)
    return alone(
        matching(
            w,
            edit,
            networks,
            arrival=arrival,
            limits=limits,
            cancelled=cancelled,
            progress=progress,
        )
    )


def matching(
    w: Tensor,
    edit: Edit,
    networks: Matching,
    *,
    arrival: Arrival | None = None,
    limits: MatchLimits | Quality = "balanced",
    cancelled: Callable[[], bool] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Steps[Match]:
    """`match` as a request in steps: what it walks and looks at can be shared with others."""
    if w.ndim != 2 or w.shape[0] != 1:
        raise ValueError(f"w must be [1, {networks.config.width}], got {list(w.shape)}")
    limit = LIMITS[limits] if isinstance(limits, str) else limits
    walk = _Walk(w, edit, networks, arrival, cancelled, limit)
    yield from walk.look(0)
    before = walk.degrees(0)
    expected = edit.expected(int(before[walk.index]))  # Eq. (10)
    if expected == int(before[walk.index]):
        return Match(w, before, expected, before, 0, True, walk.image)
    walk.head_for(expected)
    if limit.looks is None:
        yield from _watch_every_step(walk, limit, progress)
    else:
        yield from _watch_likely_steps(walk, limit, limit.looks, progress)
    after = walk.degrees(walk.best)
    return Match(
        w=walk.path[walk.best].clone(),
        before=before,
        expected=expected,
        after=after,
        steps=walk.best,
        reached=int(after[walk.index]) == expected,
        image=walk.image,
        looks=len(walk.scores),
    )


def aim_of(cuts: Sequence[float], degree: int) -> float:
    """The score to aim at for a degree: its interval's middle, 1.5 beyond the outermost cuts."""
    if degree == 0:
        return cuts[0] - 1.5
    if degree == len(cuts):
        return cuts[-1] + 1.5
    return (cuts[degree - 1] + cuts[degree]) / 2


def arrival_of(encoder: ChannelEncoder, decoder: ChannelDecoder, snr_db: float) -> Arrival:
    """How latents arrive on average at this SNR: coded and decoded, without the noise.

    Below LOWEST_ARRIVAL_DB as there: to see a whole degree behind a channel that leaves a fifth of
    the face, a walk would have to spend all of the message's power on it.
    """
    snr_db = max(snr_db, LOWEST_ARRIVAL_DB)

    @torch.no_grad()
    def arrive(w: Tensor) -> Tensor:
        w_hat: Tensor = decoder(encoder(w, snr_db), snr_db)
        return w_hat

    return arrive


class _Walk:
    """The path of one edit: latents by step, and the scores of the steps that were looked at.

    Step 0 is looked at as it is, for its degree is what the edit starts from; the others as they
    arrive. best: the step at the target whose score is nearest to the aim (Eq. 11), else the one
    that lacks least. image: the picture drawn there.
    """

    def __init__(
        self,
        w: Tensor,
        edit: Edit,
        networks: Matching,
        arrival: Arrival | None,
        cancelled: Callable[[], bool] | None,
        limit: MatchLimits,
    ) -> None:
        self.attribute, self.index = edit.attribute, edit.attribute.index
        self.networks, self.judge, self.arrival = networks, networks.judge, arrival
        self.cancelled = cancelled
        self.turn_rad, self.straight = limit.stride * networks.config.step_rad, limit.straight
        self.path = [w]
        self.scores: dict[int, Tensor] = {}  # step -> scores [5]
        self.seen: dict[int, float] = {}  # step -> score of the attribute
        self.foreseen: list[float] = []  # by step: how far the score should have moved
        self.sign, self.expected = 1, 0
        self.low = self.high = self.aim = 0.0
        self.best, self.image = 0, w  # until the first look

    def head_for(self, expected: int) -> None:
        """Set the degree to reach: its interval of the score, and the way to walk."""
        cuts = self.judge.cuts[self.index].tolist()
        self.expected = expected
        self.low = cuts[expected - 1] if expected > 0 else -math.inf
        self.high = cuts[expected] if expected < len(cuts) else math.inf
        self.aim = aim_of(cuts, expected)
        self.sign = 1 if self.seen[0] < self.low else -1

    def look(self, step: int) -> Steps[None]:
        """Draw the step's face and judge it."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the edit was cancelled while matching the attribute")
        yield from self._walk_to(step)
        sight = Sight(self.path[step], self.arrival if step else None)
        look = yield from ask_one(self.networks.look, sight)
        self.scores[step], self.seen[step] = look.scores, float(look.scores[self.index])
        if step == 0:
            self.image = look.image
        elif self._beats_best(step):
            self.best, self.image = step, look.image

    def _walk_to(self, step: int) -> Steps[None]:
        if (missing := step + 1 - len(self.path)) > 0:
            turn_rad = self.sign * self.turn_rad
            stretch = Stretch(self.path[-1], self.attribute, turn_rad, missing, self.straight)
            self.path += yield from ask_one(self.networks.walk, stretch)

    def foresee(self, steps: int) -> Steps[None]:
        """Walk to the end and say what should be seen on the way, without drawing it: what the
        regressor says, but no standstill; without a regressor, the field's mean slope.
        """
        slope = max(self.networks.config.slopes[self.index] * self.turn_rad, 1e-6)
        moved = [slope * step for step in range(steps + 1)]
        if self.networks.foresee is not None:
            yield from self._walk_to(steps)
            posts = [*range(0, steps, _POST), steps]  # scores are smooth: some steps are enough
            ways = torch.cat([self.path[step] for step in posts])
            sights = [Sight(self.path[0]), Sight(ways, self.arrival)]
            start, along = yield from ask(self.networks.foresee, sights)
            rises = (self.sign * (along - start)[:, self.index]).tolist()
            moved = [0.0] + [
                low + (high - low) * (step - near) / (far - near)
                for (near, far), (low, high) in zip(pairwise(posts), pairwise(rises), strict=True)
                for step in range(near + 1, far + 1)
            ]
        least = slope / _BEND
        self.foreseen = list(accumulate(moved, lambda before, now: max(before + least, now)))

    def expect(self, step: int) -> float:
        """The score to be seen at a step: as foreseen, bent to go through those that were seen.

        Between two of them it moves from one to the other in the proportion foreseen; beyond the
        last, as many times faster or slower as it did up to there.
        """
        near = max(one for one in self.seen if one < step)
        move = self.foreseen[step] - self.foreseen[near]
        if further := [one for one in self.seen if one > step]:
            far = min(further)
            whole = self.foreseen[far] - self.foreseen[near]
            return self.seen[near] + move / whole * (self.seen[far] - self.seen[near])
        faster = 1.0
        if near:
            faster = self.sign * (self.seen[near] - self.seen[0]) / self.foreseen[near]
        return self.seen[near] + self.sign * min(max(faster, 1 / _BEND), _BEND) * move

    def _rank(self, step: int) -> tuple[bool, float]:
        """Whether it is at the target, and how far from the aim; or how far from the target."""
        there = self.at_target(step)
        return there, self.off(step) if there else self.lacks(step)

    def _beats_best(self, step: int) -> bool:
        """Is it worth more than the best so far? Not by a hair: who shares the pass of a picture
        moves its scores by thousandths, and must not decide what is sent."""
        (there, far), (best_there, best_far) = self._rank(step), self._rank(self.best)
        return far < best_far - _ALIKE if there == best_there else there

    def degrees(self, step: int) -> Tensor:
        return self.judge.score_degrees(self.scores[step][None])[0]

    def at_target(self, step: int) -> bool:
        return int(self.degrees(step)[self.index]) == self.expected

    def off(self, step: int) -> float:
        """How far the score is from the aim."""
        return abs(self.seen[step] - self.aim)

    def past(self, step: int) -> bool:
        """Has the walk met the aim, or gone past it?"""
        return self.sign * (self.seen[step] - self.aim) >= 0

    def lacks(self, step: int) -> float:
        """How far the score is outside of the target's interval; 0 inside."""
        s = self.seen[step]
        return max(self.low - s, s - self.high, 0.0)


def _watch_every_step(
    walk: _Walk, limit: MatchLimits, progress: Callable[[float], None] | None
) -> Steps[None]:
    """The paper's loop: one step, one look, until the aim is met or overshot."""
    for step in range(1, limit.max_steps + 1):
        yield from walk.look(step)
        if progress is not None:
            progress(step / limit.max_steps)
        if walk.past(step) or walk.off(step) <= limit.near:
            return


def _watch_likely_steps(
    walk: _Walk, limit: MatchLimits, looks: int, progress: Callable[[float], None] | None
) -> Steps[None]:
    """Few looks: always at the step that should be nearest to the aim, until none should be nearer
    than what has been seen.
    """
    yield from walk.foresee(limit.max_steps)
    for count in range(1, looks + 1):
        best = min(map(walk.off, walk.seen))
        if best <= limit.near:
            return
        unseen = [step for step in range(1, limit.max_steps + 1) if step not in walk.seen]
        if not unseen:
            return
        missed = {step: abs(walk.expect(step) - walk.aim) for step in unseen}
        likely = min(unseen, key=missed.__getitem__)  # the earliest of those that are alike
        if count > 1 and missed[likely] >= best:
            return
        yield from walk.look(likely)
        if progress is not None:
            progress(count / looks)
