"""Several predictors of degrees as one: what guides an edit.

    image --------> P ------------> scores --------------------------.
        `-mirrored-> opinion2 -----> scores --onto P's cut points----+-- mean --> scores [B,5]
        `----------> opinion3 -----> scores --onto P's cut points----'

A walk looks for a picture that its guide takes for the degree asked, and so it finds what the guide
is wrong about. Three nets that were trained apart are wrong about different pictures: on edited
faces their mean differs from a fourth net, which had no part in it, by two thirds of what P alone
does where that is most (eyeglasses). They look at a picture and its mirror image in turn, for what
is seen in one of them only should not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from shared.bundle import Bundle
from transmitter.predictor import Predictor

OPINIONS: Final = ("opinion2", "opinion3")
"""Nets of the bundle that are asked beside its `predictor`, where there are any."""


class Opinions(nn.Module):
    """P and others, which give scores [B,5] in P's units, to be cut by P's `cuts` [5,5]."""

    def __init__(self, first: Predictor, others: Sequence[Predictor] = ()) -> None:
        super().__init__()
        self.first = first
        self.others = nn.ModuleList(others)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Opinions:
        """The bundle's predictors that may guide, weights frozen."""
        others = [Predictor.from_bundle(bundle, net) for net in OPINIONS if bundle.has(net)]
        return cls(Predictor.from_bundle(bundle), others)

    @property
    def members(self) -> list[Predictor]:
        """All of them, P first."""
        return [self.first, *self.others]

    @property
    def cuts(self) -> Tensor:
        """P's cut points [5,5]."""
        return self.first.cuts

    def steady_scores(self, image: Tensor) -> Tensor:
        """image [B,3,S,S] in [-1,1] -> scores [B,5]; P alone looks at the mirror image as well."""
        if not self.others:
            return self.first.steady_scores(image)
        mirrored = image.flip(3)
        members = enumerate(self.members)
        return self.mean([each.scores(mirrored if n % 2 else image) for n, each in members])

    def mean(self, scores: Sequence[Tensor]) -> Tensor:
        """Scores [...,5] by every member, in its own units -> their mean [...,5] in P's."""
        pairs = zip(scores, self.members, strict=True)
        return torch.stack([onto(each, net.cuts, self.cuts) for each, net in pairs]).mean(0)

    def score_degrees(self, scores: Tensor) -> Tensor:
        """Scores [B,5] -> degrees [B,5] int64 in 0..5."""
        return self.first.score_degrees(scores)

    def score_logits(self, scores: Tensor) -> Tensor:
        """Scores [B,5] -> log probabilities [B,5,6] of the degrees."""
        return self.first.score_logits(scores)

    def degrees(self, image: Tensor) -> Tensor:
        """The degree seen for each attribute, [B,5] int64 in 0..5."""
        return self.score_degrees(self.steady_scores(image))


def onto(scores: Tensor, cuts: Tensor, others: Tensor) -> Tensor:
    """Scores [...,5] of a net with `cuts` [5,5] in the units of a net with other cuts [5,5].

    A score on a cut point lands on the other net's, those between in proportion; beyond the
    outermost ones a unit stays a unit.
    """
    s = scores[..., None]
    share = ((s - cuts[:, :-1]) / (cuts[:, 1:] - cuts[:, :-1])).clamp(0, 1)  # [..., 5, 4]
    inside = (share * (others[:, 1:] - others[:, :-1])).sum(-1)
    below = (scores - cuts[:, 0]).clamp(max=0)
    above = (scores - cuts[:, -1]).clamp(min=0)
    return others[:, 0] + below + inside + above
