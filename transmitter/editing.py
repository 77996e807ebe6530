"""Editing a latent: a walk along a field that stops at the degree asked (Eqs. 10, 11).

    w --+--> field of the attribute --> a small turn --> w' --> arrival --> G --> P --> degree
        ^                                                |
        +------ until the expected degree is met --------+

What counts is the degree that is received. A channel at a finite SNR takes of every component what
the code gave it too little power for, and the picture that is drawn there is kept in range. So a
step is judged as it will arrive on average (`Arrival`) and as it will be shown, not as it is sent:
the editing knows the channel code, as joint editing-channel coding has it.

The walk is rolled out in latent space alone, which is cheap; generator and predictor look at a few
of its steps at a time (`MatchLimits`). With one look per step it is the paper's loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from shared.adapters import ChannelDecoder, ChannelEncoder
from shared.attributes import Attribute, Edit
from shared.batching import Operation, Steps, alone, ask, ask_one
from shared.errors import Cancelled
from transmitter.fields import Fields, FieldsConfig, turn

Quality = Literal["fast", "balanced", "paper"]
Arrival = Callable[[Tensor], Tensor]
"""Latents [B,512] as sent -> [B,512] as they arrive on average: no noise, but what it costs."""


LOWEST_ARRIVAL_DB = 0.0


@dataclass(frozen=True)
class MatchLimits:
    """How far to walk and how closely to watch.

    max_steps: longest walk. looks: how many pictures may be drawn and judged after the first one;
    None: one per step, in order (the paper's loop). batch: pictures drawn at once. near: a score
    this close to the aim ends the search (degrees are 2 wide; two predictors differ by about 1).
    stride: the turn of a step, in `step_rad`. straight: steps along a great circle before the field
    is asked again for its direction (1: the paper's loop; fields are trained on whole walks).
    """

    max_steps: int = 40
    looks: int | None = 8
    batch: int = 4
    near: float = 0.2
    stride: float = 1.0
    straight: int = 8

    def __post_init__(self) -> None:
        looks = 1 if self.looks is None else self.looks
        if min(self.max_steps, looks, self.batch, self.straight) < 1:
            raise ValueError(
                "max_steps, looks, batch and straight must be at least 1, got "
                f"{self.max_steps}, {self.looks}, {self.batch} and {self.straight}"
            )


LIMITS: Mapping[str, MatchLimits] = MappingProxyType(
    {
        "fast": MatchLimits(max_steps=40, looks=5, batch=3),
        "balanced": MatchLimits(max_steps=40, looks=16, batch=4),
        "paper": MatchLimits(max_steps=100, looks=None, batch=1, stride=0.4, straight=1),
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


@dataclass(frozen=True, eq=False)
class Matching:
    """The networks of the matching as operations that requests can share.

    look: latents [1, 512] -> pictures and scores. walk: stretches -> the latents along them, each
    [1, 512]. config, judge: of the fields and of the predictor behind them.
    """

    look: Operation[Tensor, Look]
    walk: Operation[Stretch, list[Tensor]]
    config: FieldsConfig
    judge: Judge

    @classmethod
    def of(cls, generator: Renderer, fields: Fields, predictor: Judge, most: int = 8) -> Matching:
        """most: pictures in one pass."""

        @torch.no_grad()
        def look(latents: Sequence[Tensor]) -> Sequence[Look]:
            # In range, as they are shown: blacker than black reads as hair to the predictor.
            images = generator.synthesis(torch.cat(list(latents))).clamp(-1, 1)
            scores = predictor.steady_scores(images)  # [B, 5]
            # Clones: a picture that is kept should not keep the others of its batch in memory.
            return [Look(images[i : i + 1].clone(), scores[i].clone()) for i in range(len(latents))]

        @torch.no_grad()
        def walk(stretches: Sequence[Stretch]) -> Sequence[list[Tensor]]:
            return _walk_together(fields, stretches)

        return cls(
            Operation("look", look, most, dear=True),
            Operation("walk", walk),
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
    arrival: Arrival | None = None,
    max_steps: int | None = None,
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
    networks = Matching.of(generator, fields, predictor)
    return alone(
        matching(
            w,
            edit,
            networks,
            arrival=arrival,
            max_steps=max_steps,
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
    max_steps: int | None = None,
    limits: MatchLimits | Quality = "balanced",
    cancelled: Callable[[], bool] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Steps[Match]:
    """`match` as a request in steps: what it walks and looks at can be shared with others."""
    if w.ndim != 2 or w.shape[0] != 1:
        raise ValueError(f"w must be [1, {networks.config.width}], got {list(w.shape)}")
    limit = LIMITS[limits] if isinstance(limits, str) else limits
    steps = limit.max_steps if max_steps is None else max_steps
    walk = _Walk(w, edit, networks, arrival or _as_sent, cancelled, limit)
    yield from walk.look([0])
    before = walk.degrees(0)
    expected = edit.expected(int(before[walk.index]))  # Eq. (10)
    if expected == int(before[walk.index]):
        return Match(w, before, expected, before, 0, True, walk.image)
    walk.head_for(expected)
    if limit.looks is None:
        yield from _watch_every_step(walk, steps, limit, progress)
    else:
        yield from _watch_some_steps(walk, steps, limit, limit.looks, progress)
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


def _as_sent(w: Tensor) -> Tensor:
    return w


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
        arrival: Arrival,
        cancelled: Callable[[], bool] | None,
        limit: MatchLimits,
    ) -> None:
        self.attribute, self.index = edit.attribute, edit.attribute.index
        self.networks, self.judge, self.arrival = networks, networks.judge, arrival
        self.cancelled = cancelled
        self.turn_rad, self.straight = limit.stride * networks.config.step_rad, limit.straight
        self.path = [w]
        self.scores: dict[int, Tensor] = {}  # step -> scores [5]
        self.sign, self.expected = 1, 0
        self.low = self.high = 0.0
        self.best, self.image = 0, w  # until the first look
        self._worth = (0, 0.0, 0)

    def head_for(self, expected: int) -> None:
        """Set the degree to reach: its interval of the score, and the way to walk."""
        cuts = self.judge.cuts[self.index].tolist()
        self.expected = expected
        self.low = cuts[expected - 1] if expected > 0 else -math.inf
        self.high = cuts[expected] if expected < len(cuts) else math.inf
        self.sign = 1 if self.score(0) < self.low else -1
        self._worth = self._rank(0)

    @property
    def aim(self) -> float:
        """The score to aim at: the interval's middle, 1.5 beyond the cut for the outermost ones."""
        if math.isinf(self.low):
            return self.high - 1.5
        if math.isinf(self.high):
            return self.low + 1.5
        return (self.low + self.high) / 2

    def look(self, steps: list[int]) -> Steps[None]:
        """Draw the steps' faces and judge them, in one batch."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the edit was cancelled while matching the attribute")
        new = [step for step in steps if step not in self.scores]
        if not new:
            return
        if (missing := max(new) + 1 - len(self.path)) > 0:
            turn_rad = self.sign * self.turn_rad
            stretch = Stretch(self.path[-1], self.attribute, turn_rad, missing, self.straight)
            self.path += yield from ask_one(self.networks.walk, stretch)
        if new == [0]:
            latents = self.path[:1]
        else:
            latents = list(self.arrival(torch.cat([self.path[step] for step in new])).split(1))
        seen = yield from ask(self.networks.look, latents)
        for step, look in zip(new, seen, strict=True):
            self.scores[step] = look.scores
            if step == 0:
                self.image = look.image
            elif (worth := self._rank(step)) > self._worth:
                self.best, self.image, self._worth = step, look.image, worth

    def _rank(self, step: int) -> tuple[int, float, int]:
        """At the target by nearness to the aim, before all that are not; the earlier first.

        In thousandths: a batch's rounding must not decide between steps that are alike.
        """
        if self.at_target(step):
            return 1, -round(self.off(step), 3), -step
        return 0, -round(self.lacks(step), 3), -step

    def score(self, step: int) -> float:
        return float(self.scores[step][self.index])

    def degrees(self, step: int) -> Tensor:
        return self.judge.score_degrees(self.scores[step][None])[0]

    def at_target(self, step: int) -> bool:
        return int(self.degrees(step)[self.index]) == self.expected

    def off(self, step: int) -> float:
        """How far the score is from the aim."""
        return abs(self.score(step) - self.aim)

    def past(self, step: int) -> bool:
        """Has the walk met the aim, or gone past it?"""
        return self.sign * (self.score(step) - self.aim) >= 0

    def lacks(self, step: int) -> float:
        """How far the score is outside of the target's interval; 0 inside."""
        s = self.score(step)
        return max(self.low - s, s - self.high, 0.0)


def _watch_every_step(
    walk: _Walk, steps: int, limit: MatchLimits, progress: Callable[[float], None] | None
) -> Steps[None]:
    """The paper's loop: one step, one look, until the aim is met or overshot."""
    for step in range(1, steps + 1):
        yield from walk.look([step])
        if progress is not None:
            progress(step / steps)
        if walk.past(step) or walk.off(step) <= limit.near:
            return


def _watch_some_steps(
    walk: _Walk,
    steps: int,
    limit: MatchLimits,
    looks: int,
    progress: Callable[[float], None] | None,
) -> Steps[None]:
    """Few looks: a coarse sweep until the aim is bracketed, then where the line crosses it."""
    near, far = 0, None  # the aim lies after `near` and not after `far`
    left = looks
    while left > 0:
        count = min(limit.batch, left)
        if far is None:
            if near >= steps:
                return
            candidates = _ahead(walk, near, steps, count)
        else:
            candidates = _between(walk, near, far, count)
        candidates = [step for step in candidates if step not in walk.scores]
        if not candidates:
            return
        yield from walk.look(candidates)
        left -= len(candidates)
        if progress is not None:
            progress(1 - left / looks)
        if min(map(walk.off, walk.scores)) <= limit.near:
            return
        far = min(filter(walk.past, walk.scores), default=None)
        near = max(s for s in walk.scores if far is None or s < far)
        if far is not None and far - near <= 1:
            return


def _ahead(walk: _Walk, near: int, steps: int, count: int) -> list[int]:
    """`count` steps after `near`, spread about the distance that the slope predicts: the one seen
    so far, or before that the field's mean one, measured without a channel.
    """
    slope = max(walk.networks.config.slopes[walk.index] * walk.turn_rad, 1e-6)
    if near > 0:
        last = max(step for step in walk.scores if step < near)
        seen = walk.sign * (walk.score(near) - walk.score(last)) / (near - last)
        slope = min(max(seen, slope / 4), slope * 2)
    expected = abs(walk.aim - walk.score(near)) / slope
    reach = [near + math.ceil(expected * factor) for factor in _SPREAD[-count:]]
    return sorted({min(steps, max(near + 1, step)) for step in reach})


_SPREAD = (0.35, 0.6, 1.0, 1.7)
"""Fields are steeper or flatter than their mean slope by about a factor of two, face by face."""


def _between(walk: _Walk, near: int, far: int, count: int) -> list[int]:
    """Steps between: where the line through both scores meets the aim, and beside it."""
    rise = walk.score(far) - walk.score(near)
    fraction = (walk.aim - walk.score(near)) / rise if rise else 0.5
    centre = near + min(max(fraction, 0.0), 1.0) * (far - near)
    inside = range(near + 1, far)
    return sorted(sorted(inside, key=lambda step: abs(step - centre))[:count])
