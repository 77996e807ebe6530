"""Editing a latent: a field per attribute, and a walk that stops at the degree asked (Eqs. 10, 11).

    w --+--> field of the attribute --> direction --> a small turn --> w' --> G --> P --> degree
        ^                                                               |
        +---------- until the expected degree is seen, or overshot -----+

Latents lie on the sphere |w| = sqrt(512), so a step is a turn by a small angle: the result has
the same power, needs no scalar beside it on the air, and 40 steps of 0.03 rad are at most 1.2 rad.

The walk is rolled out in latent space alone, which is cheap; generator and predictor look at a few
of its steps at a time (`MatchLimits`). With one look per step it is the paper's loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.attributes import ATTRIBUTES, Attribute, Edit
from shared.batching import Operation, Steps, alone, ask, ask_one
from shared.bundle import Bundle
from shared.errors import Cancelled

Quality = Literal["fast", "balanced", "paper"]


@dataclass(frozen=True)
class FieldsConfig:
    """Sizes of the fields.

    `depth` linear layers of `width` x `width` per attribute; `step_rad` is the turn of one step;
    `slopes` is how fast each attribute's score rises along its field, per radian, as measured on
    training codes: a first guess of how far to walk.
    """

    width: int = 512
    depth: int = 8
    step_rad: float = 0.03
    slopes: tuple[float, ...] = (8.0, 8.0, 8.0, 8.0, 8.0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FieldsConfig:
        return cls(
            int(values["width"]),
            int(values["depth"]),
            float(values["step_rad"]),
            tuple(float(slope) for slope in values["slopes"]),
        )


class Fields(nn.Module):
    """Five fields M_a: latents to directions, 8 x Linear(512, 512) with LeakyReLU 0.2, batched.

    Parameters `weight` [depth, 5, out, in] and `bias` [depth, 5, out].
    """

    def __init__(self, config: FieldsConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        d, n, k = config.depth, len(ATTRIBUTES), config.width
        gain = math.sqrt(2 / (1 + 0.2**2) / k)
        self.weight = nn.Parameter(gain * torch.randn(d, n, k, k, generator=generator))
        self.bias = nn.Parameter(torch.zeros(d, n, k))

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Fields:
        """The bundle's fields, in evaluation mode, gradients off."""
        return bundle.load_into("fields", cls(FieldsConfig.from_json(bundle.config("fields"))))

    def start_at(self, directions: Tensor) -> None:
        """Make every field constant, its `directions` [5,512]: where training starts."""
        with torch.no_grad():
            self.weight[-1].zero_()
            self.bias[-1].copy_(F.normalize(directions, dim=-1) * math.sqrt(self.config.width))

    def forward(self, w: Tensor) -> Tensor:
        """w [B,512] -> all five directions [B,5,512], not normalised."""
        return self.each(w.expand(len(ATTRIBUTES), *w.shape)).transpose(0, 1)

    def each(self, x: Tensor) -> Tensor:
        """Latents of each attribute [5,B,512] -> the direction of that attribute [5,B,512]."""
        for layer in range(self.config.depth):
            x = torch.baddbmm(self.bias[layer][:, None], x, self.weight[layer].transpose(1, 2))
            if layer < self.config.depth - 1:
                x = F.leaky_relu(x, 0.2)
        return x

    def direction(self, w: Tensor, attribute: Attribute) -> Tensor:
        """w [B,512] -> the direction [B,512] of one attribute: a fifth of the work of `forward`."""
        index, x = attribute.index, w
        for layer in range(self.config.depth):
            x = F.linear(x, self.weight[layer, index], self.bias[layer, index])
            if layer < self.config.depth - 1:
                x = F.leaky_relu(x, 0.2)
        return x

    def step(self, w: Tensor, attribute: Attribute, turn_rad: float | Tensor) -> Tensor:
        """One step along the field (against it where `turn_rad` < 0): w [B,512] -> w' [B,512]."""
        return turn(w, self.direction(w, attribute), turn_rad)


def turn(w: Tensor, direction: Tensor, angle_rad: float | Tensor) -> Tensor:
    """Turn w [B,n] by an angle (a number, or [B,1]) towards a direction [B,n]; |w| is kept.

    Only the part of the direction that is tangent to the sphere counts, its length does not.
    """
    norm = w.norm(dim=-1, keepdim=True)
    unit = w / norm
    tangent = direction - (direction * unit).sum(-1, keepdim=True) * unit
    tangent = F.normalize(tangent, dim=-1)
    angle = torch.as_tensor(angle_rad, dtype=w.dtype, device=w.device)
    turned: Tensor = norm * (torch.cos(angle) * unit + torch.sin(angle) * tangent)
    return turned


@dataclass(frozen=True)
class MatchLimits:
    """How far to walk and how closely to watch.

    max_steps: longest walk. looks: how many pictures may be drawn and judged after the first one;
    None: one per step, in order (the paper's loop). batch: pictures drawn at once. confidence: a
    step at the target this sure ends the search. stride: the turn of a step, in `step_rad`.
    """

    max_steps: int = 40
    looks: int | None = 8
    batch: int = 4
    confidence: float = 0.6
    stride: float = 1.0

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.batch < 1 or (self.looks is not None and self.looks < 1):
            raise ValueError(
                "max_steps, batch and looks must be at least 1, got "
                f"{self.max_steps}, {self.batch} and {self.looks}"
            )


LIMITS: Mapping[str, MatchLimits] = MappingProxyType(
    {
        "fast": MatchLimits(max_steps=40, looks=6, batch=3),
        "balanced": MatchLimits(max_steps=40, looks=16, batch=4),
        "paper": MatchLimits(max_steps=100, looks=None, batch=1, stride=0.4),
    }
)


@dataclass(frozen=True)
class Match:
    """What the walk found.

    w [1,512]; before, after: the degrees [5] int64 the predictor sees on G(w) before and after;
    expected: the degree asked of the edited attribute, 0..5 (Eq. 10); steps walked to w; reached:
    whether after[attribute] == expected; image [1,3,H,W]: G(w) as it was drawn, not clamped;
    looks: pictures drawn and judged, the first included.
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
    """The part of the predictor that is needed; see `transmitter.predictor.Predictor`."""

    cuts: Tensor

    def scores(self, image: Tensor) -> Tensor: ...

    def score_degrees(self, scores: Tensor) -> Tensor: ...

    def score_logits(self, scores: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen at a latent: the picture [1, 3, H, W] and its scores [5]."""

    image: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Stretch:
    """A part of a walk: from w [1, 512], `steps` turns of `turn_rad` along an attribute's field."""

    w: Tensor
    attribute: Attribute
    turn_rad: float
    steps: int


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
            images = generator.synthesis(torch.cat(list(latents)))
            scores = predictor.scores(images)  # [B, 5]
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
    """All stretches, step by step. A field is 8 MB of weights: those on the same one share it."""
    paths: list[list[Tensor]] = [[] for _ in stretches]
    for attribute in dict.fromkeys(stretch.attribute for stretch in stretches):
        going = [i for i, one in enumerate(stretches) if one.attribute is attribute]
        w = torch.cat([stretches[i].w for i in going])  # [B, 512]
        turns = torch.tensor([[stretches[i].turn_rad] for i in going], device=w.device)  # [B, 1]
        for step in range(max(stretches[i].steps for i in going)):
            still = [row for row, i in enumerate(going) if stretches[i].steps > step]
            if len(still) < len(going):
                going, w, turns = [going[row] for row in still], w[still], turns[still]
            w = fields.step(w, attribute, turns)
            for row, i in enumerate(going):
                paths[i].append(w[row : row + 1])
    return paths


def match(
    w: Tensor,
    edit: Edit,
    *,
    generator: Renderer,
    fields: Fields,
    predictor: Judge,
    max_steps: int | None = None,
    limits: MatchLimits | Quality = "balanced",
    cancelled: Callable[[], bool] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Match:
    """Iterative attribute matching (Eqs. 10, 11) of one latent w [1,512].

    Walks along the attribute's field until the predictor sees the expected degree in G(w), and
    keeps the most confident step at that degree. Where no step shows it, the step whose score came
    nearest is returned with `reached` False. A face that already shows it is returned as it is.
    `progress` gets 0..1. Raises Cancelled once `cancelled()` is true, ValueError for a wrong shape.
    """
    networks = Matching.of(generator, fields, predictor)
    return alone(
        matching(
            w,
            edit,
            networks,
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
    walk = _Walk(w, edit, networks, cancelled, limit.stride * networks.config.step_rad)
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


class _Walk:
    """The path of one edit: latents by step, and the scores of the steps that were looked at.

    best: the most confident step at the target (Eq. 11), else the one whose score is nearest.
    image: the picture drawn there.
    """

    def __init__(
        self,
        w: Tensor,
        edit: Edit,
        networks: Matching,
        cancelled: Callable[[], bool] | None,
        turn_rad: float,
    ) -> None:
        self.attribute, self.index = edit.attribute, edit.attribute.index
        self.networks, self.judge = networks, networks.judge
        self.cancelled, self.turn_rad = cancelled, turn_rad
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
            stretch = Stretch(self.path[-1], self.attribute, self.sign * self.turn_rad, missing)
            self.path += yield from ask_one(self.networks.walk, stretch)
        seen = yield from ask(self.networks.look, [self.path[step] for step in new])
        for step, look in zip(new, seen, strict=True):
            self.scores[step] = look.scores
            if step == 0:
                self.image = look.image
            elif (worth := self._rank(step)) > self._worth:
                self.best, self.image, self._worth = step, look.image, worth

    def _rank(self, step: int) -> tuple[int, float, int]:
        """At the target by confidence, before all that are not, by nearness; the earlier first."""
        if self.at_target(step):
            return 1, self.confidence(step), -step
        return 0, -self.lacks(step), -step

    def score(self, step: int) -> float:
        return float(self.scores[step][self.index])

    def degrees(self, step: int) -> Tensor:
        return self.judge.score_degrees(self.scores[step][None])[0]

    def at_target(self, step: int) -> bool:
        return int(self.degrees(step)[self.index]) == self.expected

    def confidence(self, step: int) -> float:
        logits = self.judge.score_logits(self.scores[step][None])[0, self.index]
        return float(logits.softmax(-1)[self.expected])

    def beyond(self, step: int) -> bool:
        """Has the walk gone past the target's interval?"""
        s = self.score(step)
        return s >= self.high if self.sign > 0 else s < self.low

    def lacks(self, step: int) -> float:
        """How far the score is outside of the target's interval; 0 inside."""
        s = self.score(step)
        return max(self.low - s, s - self.high, 0.0)


def _watch_every_step(
    walk: _Walk, steps: int, limit: MatchLimits, progress: Callable[[float], None] | None
) -> Steps[None]:
    """The paper's loop: one step, one look, until the target is sure or overshot."""
    for step in range(1, steps + 1):
        yield from walk.look([step])
        if progress is not None:
            progress(step / steps)
        if walk.beyond(step) or (walk.at_target(step) and walk.confidence(step) > limit.confidence):
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
        if any(walk.at_target(s) and walk.confidence(s) > limit.confidence for s in walk.scores):
            return
        past = [s for s in walk.scores if walk.sign * (walk.score(s) - walk.aim) >= 0]
        far = min(past, default=None)
        near = max(s for s in walk.scores if far is None or s < far)
        if far is not None and far - near <= 1:
            return


def _ahead(walk: _Walk, near: int, steps: int, count: int) -> list[int]:
    """`count` steps after `near`, spread about the distance that the field's measured slope
    predicts.
    """
    slope = max(walk.networks.config.slopes[walk.index] * walk.turn_rad, 1e-6)
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
