"""Recipe: the attribute predictor P, from CelebA's labels or, where there are some, true degrees.

    faces -> augmented (shifted, recoloured, softened, noisy) -> trunk
                  |-> five scores -> cumulative logits of the level of evidence
                  `-> all 40 labels -> binary cross-entropy

The labels beside the five make the features rich enough to serve as the perceptual distance, and
act as a regulariser. At the end the scores of the training faces, half of them softened, are cut
into six degrees (`training.degrees`), batch normalisation is folded, and the net is written to the
bundle.

`edsc train judge` makes another predictor, net `judge`, that only evaluates: another seed, another
trunk at another resolution, other augmentation (parts of the face hidden), its own fitted scores
and cuts. The transmitter walks by P and two more (`training.opinions`) and never loads the judge,
so an edit that fools them is found out by it.

Put CelebA-Dialog's annotation at `data/celeba128/celeba_dialog.txt` to train with its degrees
instead.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.attributes import ATTRIBUTES, MAX_DEGREE
from shared.bundle import Bundle, write_net
from shared.errors import InvalidRequest
from training.augment import Augmentation, resample
from training.data import FaceSet, load_faces
from training.degrees import LEVELS, MIN_GAP, QUANTILES, auc, cut_points, levels
from training.run import Run, RunOptions, commit
from transmitter.predictor import Predictor, PredictorConfig, read_celeba_dialog

NAME = "predictor"
JUDGE = "judge"
DIALOG_FILE = "celeba_dialog.txt"


@dataclass(frozen=True)
class PredictorRecipe:
    """Lengths, rates, trunk and augmentation. `length` steps of `batch` faces: about 8 epochs, 8
    minutes on two CPU cores. `resolution`, `widths`, `depths` as `PredictorConfig` has them.
    """

    length: int = 1800
    batch: int = 64
    learning_rate: float = 2e-3
    warm_up: int = 100
    weight_decay: float = 0.05
    label_weight: float = 2.0
    checkpoint_minutes: float = 3.0
    report_steps: int = 100
    calibration_faces: int = 4000
    resolution: int = 128
    widths: tuple[int, ...] = (24, 48, 96, 192, 256)
    depths: tuple[int, ...] = (0, 1, 2, 2, 0)
    augmentation: Augmentation = field(default_factory=Augmentation)


JUDGE_RECIPE: Final = PredictorRecipe(
    learning_rate=1.5e-3,
    resolution=96,
    widths=(32, 64, 128, 160),
    depths=(1, 1, 1, 1),
    augmentation=Augmentation(
        shift=0.04, turn_deg=9.0, zoom=0.12, colour=0.7, noise=0.05, erased=0.35
    ),
)
"""Four stages where the shipped predictor has five, most of its work at fine resolution, 1.4 M
parameters: 2.8 MB. About 8 minutes on two CPU cores.
"""
JUDGE_SEED: Final = 7919  # added to the run's: what starts the judge never started the predictor


class Thresholds(nn.Module):
    """Increasing thresholds [5,5] of the cumulative-link model; attribute a uses the first
    `tops[a]` of them.
    """

    used: Tensor

    def __init__(self, tops: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(len(ATTRIBUTES)))
        self.gaps = nn.Parameter(torch.ones(len(ATTRIBUTES), MAX_DEGREE - 1))
        used = torch.arange(MAX_DEGREE) < torch.tensor(tops)[:, None]
        self.register_buffer("used", used)

    def forward(self) -> Tensor:
        return torch.cat(
            [self.first[:, None], self.first[:, None] + F.softplus(self.gaps).cumsum(1)], dim=1
        )

    def loss(self, scores: Tensor, level: Tensor) -> Tensor:
        """-log likelihood of "level > k" over the used thresholds; scores, level [B,5]."""
        logits = scores[..., None] - self()  # [B, 5, 5]
        above = (level[..., None] > torch.arange(MAX_DEGREE, device=level.device)).float()
        each = F.binary_cross_entropy_with_logits(logits, above, reduction="none")
        return (each * self.used).sum(-1).mean()


def targets(faces: FaceSet, options: RunOptions) -> tuple[Tensor, tuple[int, ...], str]:
    """Levels [N,5], the highest level of each attribute, and where they come from, in words."""
    path = options.data / "celeba128" / DIALOG_FILE
    if path.is_file():
        known = read_celeba_dialog(path)
        missing = [name for name in faces.names if name not in known]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} of {len(faces)} faces, first {missing[0]}"
            )
        rows = torch.tensor([known[name] for name in faces.names])
        return rows, (MAX_DEGREE,) * len(ATTRIBUTES), "CelebA-Dialog degrees"
    return levels(faces.label), LEVELS, "ordered evidence from CelebA's binary labels"


def train(options: RunOptions, *, net: str = NAME, recipe: PredictorRecipe | None = None) -> None:
    """Train P and write it to `options.bundle` as `net`; resumes exactly. A judge is another `net`
    and seed.
    """
    recipe = PredictorRecipe() if recipe is None else recipe
    with Run(net, options) as run:
        state = run.restore()
        faces, held_out = load_faces(options.data, "train"), load_faces(options.data, "val")
        level, tops, source = targets(faces, options)
        labels = (faces.labels > 0).float()  # [N, 40]

        config = PredictorConfig(
            recipe.resolution, recipe.widths, recipe.depths, faces.label_names, batch_norm=True
        )
        model = Predictor(config).to(run.device).channels_last()
        thresholds = Thresholds(tops).to(run.device)
        parameters = [*model.parameters(), *thresholds.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, recipe.learning_rate, (0.9, 0.98), weight_decay=recipe.weight_decay
        )
        if state is not None:
            model.load_state_dict(state["model"])
            thresholds.load_state_dict(state["thresholds"])
            optimizer.load_state_dict(state["optimizer"])

        def save() -> None:
            run.save(
                {
                    "model": model.state_dict(),
                    "thresholds": thresholds.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
            )

        def ship() -> None:
            shipped = calibrate(model, thresholds, faces, recipe, dialog=tops[0] == MAX_DEGREE)
            scores = validate(shipped, held_out, options)
            run.record(**scores)
            write_net(
                options.bundle,
                net,
                config={
                    **shipped.config.to_json(),
                    "degrees": source,
                    "levels": list(tops),
                    **cut_rule(),
                },
                tensors=shipped.state_dict(),
                provenance=run.provenance(recipe="training/predictor.py", validation=scores),
            )

        total = 0.0
        while run.step < recipe.length and not run.stopping:
            spent = 0.0 if options.minutes is None else run.minutes_here / options.minutes
            rate = learning_rate(recipe, run.step, spent)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Seeded by the step, so that a resumed run draws what an unbroken one would have.
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            index = torch.randint(len(faces), (recipe.batch,), generator=generator)
            image = recipe.augmentation(faces.batch(index).to(run.device), generator)
            model.train()
            with torch.autocast(run.device.type, torch.bfloat16):
                last = model.features(image)[-1]
            flat = last.float().flatten(1)
            scores, evidence = model.heads(flat)
            loss = thresholds.loss(scores, level[index].to(run.device))
            loss = loss + recipe.label_weight * F.binary_cross_entropy_with_logits(
                evidence, labels[index].to(run.device)
            )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 2.0)
            optimizer.step()
            run.step += 1
            run.images += recipe.batch
            total += float(loss.detach())
            if run.step % recipe.report_steps == 0:
                run.record(loss=total / recipe.report_steps, learning_rate=rate)
                total = 0.0
            if run.due("checkpoint", recipe.checkpoint_minutes):
                save()
        save()
        ship()


def train_judge(options: RunOptions, *, recipe: PredictorRecipe | None = None) -> None:
    """Train the independent judge and write it to the bundle as net `judge`; resumes exactly."""
    train(
        replace(options, seed=options.seed + JUDGE_SEED),
        net=JUDGE,
        recipe=JUDGE_RECIPE if recipe is None else recipe,
    )


def learning_rate(recipe: PredictorRecipe, step: int, spent: float) -> float:
    """Warm-up, then a cosine to zero at the end of the recipe or of the time given, whichever is
    nearer.
    """
    progress = min(1.0, max(step / recipe.length, spent))
    ramp = min(1.0, (step + 1) / recipe.warm_up)
    return recipe.learning_rate * ramp * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-6


@torch.no_grad()
def score_all(model: Predictor, images: Tensor) -> Tensor:
    """Scores [N,5] of pictures [N,3,H,W] in [-1,1], 64 at a time."""
    device = model.cuts.device
    return torch.cat([model.scores(part.to(device)).cpu() for part in torch.split(images, 64)])


def calibrate(
    model: Predictor,
    thresholds: Thresholds,
    faces: FaceSet,
    recipe: PredictorRecipe,
    *,
    dialog: bool,
) -> Predictor:
    """The net to ship: normalisation folded, `cuts` set on training faces, every second one
    softened.
    """
    shipped = model.fold().channels_last()
    if dialog:  # true degrees: the learnt thresholds are the cut points
        cuts = thresholds().detach()
    else:
        cuts = fit_cuts(shipped, thresholds()[:, 0].detach(), faces, recipe)
    shipped.cuts.copy_(cuts)
    return shipped


def fit_cuts(
    model: Predictor, thresholds: Tensor, faces: FaceSet, recipe: PredictorRecipe
) -> Tensor:
    """Cut points [5,5] from the scores of training faces, every second batch softened."""
    stride = max(1, len(faces) // recipe.calibration_faces)
    parts = []
    for number, part in enumerate(torch.arange(0, len(faces), stride).split(64)):
        images = faces.batch(part)
        parts.append(score_all(model, images if number % 2 else resample(images, 56)))
    return cut_points(torch.cat(parts), thresholds)


def cut_rule() -> dict[str, Any]:
    """How scores are cut into degrees, for the bundle: nets that are compared share one rule."""
    return {"quantiles": [list(q) for q in QUANTILES], "min_gap": MIN_GAP}


@torch.no_grad()
def recut(
    options: RunOptions, *, net: str = NAME, recipe: PredictorRecipe | None = None
) -> Predictor:
    """Cut the scores of a net of the bundle anew by today's rule, its weights as they are.

    Nets that were trained on the old degrees (fields) have to be trained again. Raises
    InvalidRequest for a net that learned true degrees.
    """
    bundle = Bundle.open(options.bundle)
    config = bundle.config(net)
    if list(config.get("levels", LEVELS)) != list(LEVELS):
        raise InvalidRequest(
            f"{net!r} of {bundle.folder} has levels {config['levels']}: its cuts are learned, "
            "expected a net of binary labels"
        )
    model = Predictor.from_bundle(bundle, net)
    faces, held_out = load_faces(options.data, "train"), load_faces(options.data, "val")
    # Degree 1 begins where the old cuts had it: that threshold was learned.
    recipe = PredictorRecipe() if recipe is None else recipe
    model.cuts.copy_(fit_cuts(model, model.cuts[:, 0].clone(), faces, recipe))
    write_net(
        options.bundle,
        net,
        config={**config, **cut_rule()},
        tensors=model.state_dict(),
        provenance={
            **bundle.provenance(net),
            "recut_at": commit(),
            "validation": validate(model, held_out, options),
        },
    )
    return model


def validate(model: Predictor, faces: FaceSet, options: RunOptions) -> dict[str, Any]:
    """On faces of unseen people: AUC of "shows it at all" and "shows most of it", sharp and
    softened; accuracy at the cut between degrees 0 and 1; rank agreement of degrees with levels
    (share of ordered pairs).
    """
    level, tops, _ = targets(faces, options)
    images = faces.batch(torch.arange(len(faces)))
    sharp, soft = score_all(model, images), score_all(model, resample(images, 48))
    degrees = model.score_degrees(sharp.to(model.cuts.device)).cpu()
    result: dict[str, Any] = {}
    for index, attribute in enumerate(ATTRIBUTES):
        # Age's first level (bags under young eyes) is weak evidence; "not Young" is what
        # CelebA asked.
        least = 2 if attribute == "age" and tops == LEVELS else 1
        some = level[:, index] >= least
        result[f"auc_{attribute}"] = auc(sharp[:, index], some)
        result[f"auc_{attribute}_soft"] = auc(soft[:, index], some)
        if attribute != "age":
            result[f"accuracy_{attribute}"] = float(
                ((degrees[:, index] > 0) == some).float().mean()
            )
        result[f"ordered_{attribute}"] = ordered_pairs(sharp[:, index], level[:, index])
    return {k: (round(v, 4) if math.isfinite(v) else -1.0) for k, v in result.items()}


def ordered_pairs(score: Tensor, level: Tensor) -> float:
    """Share of the pairs with different levels whose scores are in the same order; nan without such
    a pair.
    """
    higher = level[:, None] > level[None, :]
    pairs = int(higher.sum())
    agree = int((higher & (score[:, None] > score[None, :])).sum())
    return agree / pairs if pairs else float("nan")


def main() -> None:
    """`python -m training.predictor --recut [--net judge] ...`: cut points anew, in a minute."""
    parser = argparse.ArgumentParser(description="Cut a predictor's scores into degrees anew.")
    parser.add_argument("--recut", action="store_true", required=True)
    parser.add_argument("--net", default=NAME, choices=[NAME, JUDGE])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bundle", type=Path)
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    net = given.pop("net")
    del given["recut"]
    print(recut(RunOptions.default(**given), net=net).cuts.round(decimals=2))


if __name__ == "__main__":
    main()
