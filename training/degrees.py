"""Degrees 0..5 out of CelebA's binary labels: ordered evidence, a monotone score, cut points.

CelebA says only yes or no. The recipe orders the yeses into levels, learns one score per attribute
whose cumulative thresholds separate the levels, then cuts that score into six classes at fixed
quantiles:

    bangs       no; Bangs
    eyeglasses  no; Eyeglasses
    beard       No_Beard; stubble (or unnamed); + 1 for each of Goatee, Mustache, Sideburns
    smiling     no; Smiling; + 1 for Mouth_Slightly_Open, + 1 for High_Cheekbones
    age         Young; Young with bags, double chin ...; not Young;
                + 1 for Bags_Under_Eyes, Double_Chin, Bald each, + 2 for Gray_Hair, at most + 2

So degree 3 means "the middle of those who have it", not a measured length: the model card says so.
Who has CelebA-Dialog's annotation trains with true degrees instead
(`transmitter.predictor.read_celeba_dialog`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shared.attributes import ATTRIBUTES, MAX_DEGREE

LEVELS = (1, 1, 4, 3, 4)
"""The highest level of evidence of bangs, eyeglasses, beard, smiling, age."""

QUANTILES: tuple[tuple[float, ...], ...] = (
    (0.20, 0.42, 0.64, 0.85),
    (0.20, 0.42, 0.64, 0.85),
    (0.30, 0.55, 0.75, 0.90),
    (0.15, 0.40, 0.65, 0.87),
    (0.06, 0.20, 0.62, 0.80, 0.93),
)
"""Where the score is cut. Four numbers: degrees 2..5 start at these quantiles of the faces that
show the attribute at all (degree 1 starts where it is as likely as not). Five: degrees 1..5, of all
faces.
"""

MIN_GAP = 2.0
"""Least distance of two cut points in logistic units, so that a degree is more than one net's view.

The scores of two predictors that were trained apart differ by about 1.5 units (standard deviation)
on one and the same edited face, whatever its degree. Where degrees are 1 unit wide, as quantiles
alone make some of them, the two agree on every third edited face; where they are 2 wide, on more
than every second, and on 19 of 20 within one degree. The highest degrees are rare among real faces.
"""


def levels(label: Callable[[str], Tensor]) -> Tensor:
    """Binary labels -> levels of evidence [N,5] int64, at most LEVELS. `label(name)` gives [N]
    bool.
    """
    young, gray = label("Young"), label("Gray_Hair").long()
    wear = label("Bald").long() + label("Double_Chin").long() + label("Bags_Under_Eyes").long()
    bearded = ~label("No_Beard") | label("5_o_Clock_Shadow") | label("Goatee") | label("Mustache")
    parts = label("Goatee").long() + label("Mustache").long() + label("Sideburns").long()
    smiling = label("Smiling")
    open_mouth = label("Mouth_Slightly_Open").long() + label("High_Cheekbones").long()
    return torch.stack(
        [
            label("Bangs").long(),
            label("Eyeglasses").long(),
            torch.where(bearded, 1 + parts, 0),
            torch.where(smiling, 1 + open_mouth, 0),
            torch.where(young, (wear + gray).clamp(max=1), 2 + (wear + 2 * gray).clamp(max=2)),
        ],
        dim=1,
    )  # [N, 5]


def cut_points(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Scores [N,5] of many faces -> cut points [5,5], at least MIN_GAP apart.

    `thresholds[a]` is the score at which level 1 is as likely as level 0.
    """
    if scores.ndim != 2 or scores.shape[1] != len(ATTRIBUTES) or len(scores) < 2:
        raise ValueError(f"scores must be [N >= 2, {len(ATTRIBUTES)}], got {list(scores.shape)}")
    rows = []
    for index, quantiles in enumerate(QUANTILES):
        s = scores[:, index].double().cpu()
        if len(quantiles) == MAX_DEGREE:
            cuts = torch.quantile(s, s.new_tensor(quantiles))
        else:
            first = thresholds[index].double().cpu().reshape(1)
            positives = s[s > first]
            if len(positives) < 2:  # nobody shows it (tiny data): space the degrees evenly
                rest = first + 2.0 * torch.arange(1, MAX_DEGREE)
            else:
                rest = torch.quantile(positives, s.new_tensor(quantiles))
            cuts = torch.cat([first, rest])
        # From the first cut upwards, for it says who shows the attribute; or, where all cuts are
        # quantiles, from the middle outwards.
        fixed = MAX_DEGREE // 2 if len(quantiles) == MAX_DEGREE else 0
        for k in range(fixed + 1, MAX_DEGREE):
            cuts[k] = torch.maximum(cuts[k], cuts[k - 1] + MIN_GAP)
        for k in range(fixed - 1, -1, -1):
            cuts[k] = torch.minimum(cuts[k], cuts[k + 1] - MIN_GAP)
        rows.append(cuts)
    return torch.stack(rows).float()  # [5, 5]


def auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of a score [N] for a label [N] bool; nan where a class is empty."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    _, inverse, counts = torch.unique(score.double(), return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = ends - (counts.double() - 1) / 2  # mean rank of each distinct value, from 1
    total = float(ranks[inverse][positive].sum())
    return (total - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
