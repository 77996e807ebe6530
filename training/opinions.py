"""Recipe: two nets of the bundle that guide edits beside P (`transmitter.opinions`).

They learn what P learns, from the same photographs. Trunk, resolution, augmentation and seed are
shared with neither P nor the judge, for only nets that err apart are worth more than one. The judge
is never asked by the transmitter: what it guides it could no longer judge.

Run the fields' recipe again afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from training import predictor
from training.augment import Augmentation
from training.predictor import PredictorRecipe
from training.run import RunOptions
from transmitter.opinions import OPINIONS


@dataclass(frozen=True)
class Member:
    """One of them; seed is added to the run's."""

    seed: int
    recipe: PredictorRecipe


_RECIPES: Final = (
    Member(
        4242,
        PredictorRecipe(
            length=480,
            learning_rate=1.5e-3,
            resolution=112,
            widths=(24, 56, 112, 176),
            depths=(0, 1, 2, 1),
            augmentation=Augmentation(
                shift=0.05, turn_deg=7.0, zoom=0.10, colour=0.8, noise=0.06, erased=0.25
            ),
        ),
    ),
    Member(
        5303,
        PredictorRecipe(
            length=600,
            learning_rate=1.5e-3,
            resolution=80,
            widths=(28, 64, 112, 192),
            depths=(0, 1, 2, 0),
            augmentation=Augmentation(
                shift=0.06, turn_deg=8.0, zoom=0.09, colour=0.9, noise=0.07, erased=0.15
            ),
        ),
    ),
)

MEMBERS: Final[Mapping[str, Member]] = MappingProxyType(dict(zip(OPINIONS, _RECIPES, strict=True)))
"""About 5 and 4 minutes of one CPU core; in fp16 3.4 and 2.0 MB."""


def train(options: RunOptions, *, members: Mapping[str, Member] = MEMBERS) -> None:
    """Train every one of them and write it to the bundle; each resumes exactly."""
    for net, member in members.items():
        own = replace(options, seed=options.seed + member.seed)
        predictor.train(own, net=net, recipe=member.recipe)
