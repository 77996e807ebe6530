"""Recipe: the latent regressor R, which foresees what the guide will see along a walk.

    training faces --inversion encoder--> w --field--> w' --A_CE, no noise, A_CD--> w_hat
                                          |                                           |
                                   G, opinions: s_0                            G, opinions: s
                                          |                                           |
                            R(w) should be s_0 <---- and the difference right ----> R(w_hat)

First walks are looked at, of all attributes, lengths and SNRs; then R learns them by heart as far
as it goes. A walk asks by how much the score moves, and much of what R is wrong about a face it is
wrong about at both ends: so the difference has a loss of its own.

Run it again whenever the generator, the inversion encoder, the predictors, the adapters or the
fields in the bundle have changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.adapters import Adapters
from shared.attributes import ATTRIBUTES
from shared.bundle import Bundle, write_net
from shared.compute import in_precision, multiplying_in, precision_of
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator
from training.data import FaceSet, load_faces
from training.run import Run, RunOptions, digest_of, require
from transmitter.editing import LIMITS, Matching, Sight, Stretch, arrival_of
from transmitter.fields import Fields
from transmitter.inversion import InversionEncoder
from transmitter.opinions import OPINIONS, Opinions
from transmitter.regressor import NET, Regressor, RegressorConfig


@dataclass(frozen=True)
class RegressorRecipe:
    """How much is looked at and how long it is learned. About a quarter of an hour of one core.

    length: batches of faces; walks: of every face. backward: share of the walks that go on in the
    direction that the face is already in. fit_steps: of `fit_batch` walks each. held_out: one batch
    in so many is kept to measure on.
    """

    length: int = 700
    faces: int = 8
    walks: int = 3
    backward: float = 0.25
    shortest: int = 2
    lowest_snr_db: float = 0.0
    highest_snr_db: float = 20.0
    width: int = 512
    fit_steps: int = 1500
    fit_batch: int = 256
    rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: int = 100
    difference_weight: float = 2.0
    held_out: int = 10
    checkpoint_minutes: float = 2.0
    report_batches: int = 50


@dataclass(frozen=True)
class Walked:
    """Walks that were looked at: w, w_hat [N,512], the attribute [N] walked along, and the scores
    [N,5] that the guide saw at both ends.
    """

    w: Tensor
    w_hat: Tensor
    attribute: Tensor
    before: Tensor
    after: Tensor

    def __getitem__(self, rows: Tensor) -> Walked:
        return Walked(*(each[rows] for each in vars(self).values()))

    @classmethod
    def joined(cls, parts: list[Walked]) -> Walked:
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def moved(self) -> Tensor:
        """By how much the score of the attribute moved, [N]."""
        return (self.after - self.before).gather(1, self.attribute[:, None])[:, 0]


@dataclass(frozen=True)
class Nets:
    """Everything frozen that a walk goes through."""

    encoder: InversionEncoder
    guide: Opinions
    adapters: Adapters
    matching: Matching


def open_nets(options: RunOptions, device: torch.device) -> tuple[Nets, str]:
    """The bundle's nets on the device, and their digest; InvalidRequest names one missing."""
    bundle = Bundle.open(options.bundle)
    needed = ("generator", "inversion", "predictor", "fields")
    require(bundle, needed, NET)
    guide = Opinions.from_bundle(bundle).to(device)
    generator, fields = Generator.from_bundle(bundle).to(device), Fields.from_bundle(bundle)
    matching = Matching.of(generator, fields.to(device), guide)
    look = in_precision(matching.look, precision_of("auto", device), device)
    nets = Nets(
        InversionEncoder.from_bundle(bundle).to(device),
        guide,
        Adapters.from_bundle(bundle).to(device),
        replace(matching, look=look),
    )
    return nets, digest_of(bundle, (*needed, *OPINIONS, "adapters"))


@torch.no_grad()
def look_at_walks(
    nets: Nets, faces: FaceSet, recipe: RegressorRecipe, device: torch.device, draw: torch.Generator
) -> Walked:
    """Some faces, each walked along a few fields and looked at where it would arrive."""
    index = torch.randint(len(faces), (recipe.faces,), generator=draw)
    with multiplying_in(precision_of("auto", device), device):
        w = nets.encoder(faces.batch(index).to(device))  # [B, 512]
    plain = nets.matching.look([Sight(one) for one in w.split(1)])
    before = torch.stack([seen.scores for seen in plain])
    middle = nets.guide.cuts[:, nets.guide.cuts.shape[1] // 2]  # [5]
    limit = LIMITS["fast"]
    parts = []
    for _ in range(recipe.walks):
        attribute = torch.randint(len(ATTRIBUTES), (recipe.faces,), generator=draw)
        steps = torch.randint(recipe.shortest, limit.max_steps + 1, (recipe.faces,), generator=draw)
        snr_db = torch.empty(recipe.faces).uniform_(
            recipe.lowest_snr_db, recipe.highest_snr_db, generator=draw
        )
        forward = torch.rand(recipe.faces, generator=draw) >= recipe.backward
        shows = (before > middle).gather(1, attribute.to(device)[:, None])[:, 0].cpu()
        turns = torch.where(forward ^ shows, 1.0, -1.0) * nets.matching.config.step_rad
        paths = nets.matching.walk(
            [
                Stretch(w[i : i + 1], ATTRIBUTES[a], turn_rad, count, limit.straight)
                for i, (a, turn_rad, count) in enumerate(
                    zip(attribute.tolist(), turns.tolist(), steps.tolist(), strict=True)
                )
            ]
        )
        sights = [
            Sight(path[-1], arrival_of(nets.adapters.encoder, nets.adapters.decoder, db))
            for path, db in zip(paths, snr_db.tolist(), strict=True)
        ]
        w_hat = torch.cat([sight.arrived() for sight in sights])
        after = torch.stack([seen.scores for seen in nets.matching.look(sights)])
        parts.append(Walked(w, w_hat, attribute.to(device), before, after))
    return Walked.joined(parts)


def fit(
    walked: Walked, recipe: RegressorRecipe, draw: torch.Generator
) -> tuple[Regressor, dict[str, list[float]]]:
    """A regressor of these walks; and, by attribute, the median of what it is wrong by about how
    far a score moves (`wrong_by`), on batches that were held out, and the median move (`moves_by`).

    Raises InvalidRequest where all batches are held out.
    """
    per_batch = recipe.faces * recipe.walks
    batches = torch.arange(len(walked.w)) // per_batch
    held = batches % recipe.held_out == 0
    kept, unseen = walked[(~held).nonzero()[:, 0]], walked[held.nonzero()[:, 0]]
    if not len(kept.w):
        raise InvalidRequest(f"got {len(walked.w)} walks, expected more: all of them are held out")
    net = Regressor(RegressorConfig(walked.w.shape[1], recipe.width)).to(walked.w.device)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay
    )
    for step in range(recipe.fit_steps):
        ramp = min(1.0, (step + 1) / recipe.warm_up) * (1 - step / recipe.fit_steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * ramp
        some = kept[torch.randint(len(kept.w), (recipe.fit_batch,), generator=draw)]
        before, after = net(some.w), net(some.w_hat)
        moved = (after - before).gather(1, some.attribute[:, None])[:, 0]
        loss = F.smooth_l1_loss(before, some.before) + F.smooth_l1_loss(after, some.after)
        loss = loss + recipe.difference_weight * F.smooth_l1_loss(moved, some.moved())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
    net.eval().requires_grad_(False)
    both = net(unseen.w_hat) - net(unseen.w)
    moved = both.gather(1, unseen.attribute[:, None])[:, 0]
    off, far = (moved - unseen.moved()).abs(), unseen.moved().abs()
    along = [unseen.attribute == attribute.index for attribute in ATTRIBUTES]
    return net, {
        "wrong_by": [_median(off[rows]) for rows in along],
        "moves_by": [_median(far[rows]) for rows in along],
    }


def _median(values: Tensor) -> float:
    return round(float(values.median()), 3) if len(values) else 0.0


def train(options: RunOptions, *, recipe: RegressorRecipe | None = None) -> None:
    """Train the regressor of the bundle's nets and write it to it; resumes exactly."""
    recipe = RegressorRecipe() if recipe is None else recipe
    nets, digest = open_nets(options, options.torch_device())
    with Run(NET, options) as run:
        state = run.restore(digest)
        parts: list[Walked] = []
        if state is not None:
            parts = [Walked(*(state[key] for key in Walked.__dataclass_fields__))]
        faces = load_faces(options.data, "train")

        def save() -> None:
            run.save({"digest": digest, **vars(Walked.joined(parts))})

        while run.step < recipe.length and not run.stopping:
            draw = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            parts.append(look_at_walks(nets, faces, recipe, run.device, draw))
            run.step += 1
            run.images += recipe.faces * (1 + recipe.walks)
            if run.step % recipe.report_batches == 0:
                run.record(moved=float(Walked.joined(parts[-1:]).moved().abs().mean()))
            if run.due("checkpoint", recipe.checkpoint_minutes):
                save()
        if not parts:
            return
        save()
        if run.step < 2:  # of one batch, all is held out
            return
        net, unseen = fit(Walked.joined(parts), recipe, torch.Generator().manual_seed(options.seed))
        names = [attribute.value for attribute in ATTRIBUTES]
        run.record(**dict(zip(names, unseen["wrong_by"], strict=True)))
        write_net(
            options.bundle,
            NET,
            config=net.config.to_json(),
            tensors=net.state_dict(),
            provenance=run.provenance(nets=digest, unseen=unseen),
        )
