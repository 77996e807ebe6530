"""Recipe: the fields M_a, one per attribute, that the transmitter walks along to edit a latent.

    training faces --inversion encoder--> codes w --G--> pictures --P--> scores
                                             |                   `--EdgeFace--> who it is
        1. start: how w differs between real faces with less and more of it (training/nature.py)
        2. training: w --walk along a field, either way--> w' --G--> augmented --P--> losses

Real inverted codes come first, because fields trained on sampled faces alone edit real photographs
badly; jittered and sampled codes are mixed in.

An edit has to be visible, and a pattern that fools P is not. So what is judged is what arrives: the
walked latent has crossed the channel, with its noise, and the picture is cut to its range. Two
predictors have to see the degree in views that are shifted, softened and made noisy: P, and a coach
that was trained apart and is never shipped. How far to walk per unit of score is learned together
with the directions: where the length is given, a steeper field is one that overshoots, and nothing
makes walks short.

Losses, Eqs. (12) to (15): cross-entropy of P with the asked degree; the other attributes keep their
distributions; the same person (1 - cosine of EdgeFace, and a small perceptual term); the walk stays
where codes are (Mahalanobis norm, in the place of softplus(-D): the discriminator of a generator
trained for reconstruction first says little about an edit).

Run it again whenever the generator, the inversion encoder or the predictor in the bundle has
changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from channel_sim.channel import Channel, ChannelConfig
from shared.adapters import Adapters
from shared.attributes import ATTRIBUTES, MAX_DEGREE, Edit
from shared.bundle import Bundle, write_net
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator, to_sphere
from training.augment import add_noise, jitter_geometry, soften
from training.data import FaceSet, load_faces
from training.nature import Nature, observe
from training.predictor import PredictorRecipe, open_coach
from training.run import Run, RunOptions
from training.teachers import FaceIdentity
from transmitter.editing import MatchLimits, match
from transmitter.fields import Fields, FieldsConfig, turn
from transmitter.inversion import InversionEncoder
from transmitter.predictor import Predictor, feature_distance

NAME = "fields"


@dataclass(frozen=True)
class FieldsRecipe:
    """Lengths, weights of the losses, and how far walks go. About 9 minutes on two CPU cores."""

    length: int = 100
    depth: int = 8
    per_attribute: int = 3
    codes: int = 1200
    sampled_share: float = 0.1
    jittered_share: float = 0.2
    jitter: float = 0.25
    learning_rate: float = 3e-4
    warm_up: int = 20
    roll_out: int = 3
    step_rad: float = 0.02
    largest_turn: float = 0.8
    slope_rate: float = 0.02
    lowest_snr_db: float = 9.0
    highest_snr_db: float = 18.0
    target_weight: float = 1.0
    others_weight: float = 1.0
    identity_weight: float = 4.0
    perceptual_weight: float = 0.5
    natural_weight: float = 0.0
    natural_faces: int = 3000
    stay_natural: bool = False
    views: int = 1
    statistics_weight: float = 2.0
    checkpoint_minutes: float = 3.0
    report_steps: int = 10
    validation_faces: int = 8


@dataclass(frozen=True)
class Codes:
    """The pool: w [N,512], scores [N,5] of G(w), who [N,512] (unit; zero without EdgeFace)."""

    w: Tensor
    scores: Tensor
    who: Tensor


@dataclass(frozen=True)
class Nets:
    """Everything frozen that a walk is judged by."""

    generator: Generator
    encoder: InversionEncoder
    predictor: Predictor
    identity: FaceIdentity | None
    coach: Predictor | None = None
    adapters: Adapters | None = None

    def received(self, w: Tensor, snr_db: float, draw: torch.Generator) -> Tensor:
        """Latents [B,512] -> pictures [B,3,S,S] in [-1,1] of what arrives of them; differentiable.

        Without adapters nothing is lost on the way.
        """
        if self.adapters is not None:
            symbols = self.adapters.encoder(w, snr_db)
            arrived = Channel(ChannelConfig("awgn"))(symbols, snr_db, draw).y
            w = self.adapters.decoder(arrived, snr_db)
        with torch.autocast(w.device.type, torch.bfloat16):
            image = self.generator.synthesis(w)
        return image.float().clamp(-1, 1)

    def who(self, image: Tensor) -> Tensor:
        """Unit embeddings [B,512] of faces [B,3,128,128]; zeros without an identity net."""
        if self.identity is None:
            return image.new_zeros(len(image), 512)
        return self.identity(image)


def open_nets(
    options: RunOptions, device: torch.device, coach_recipe: PredictorRecipe | None = None
) -> Nets:
    """The bundle's nets and the coach, frozen, on the device; InvalidRequest names the first one
    missing.
    """
    bundle = Bundle.open(options.bundle)
    for net in ("generator", "inversion", "predictor"):
        if not bundle.has(net):
            raise InvalidRequest(
                f"training fields needs {net!r} in {bundle.folder}: train it first"
            )
    known = (options.data / "nets" / "edgeface_xs.torchscript.pt").is_file()
    coach = open_coach(options, recipe=coach_recipe)
    return Nets(
        Generator.from_bundle(bundle).to(device),
        InversionEncoder.from_bundle(bundle).to(device),
        Predictor.from_bundle(bundle).to(device),
        FaceIdentity(options.data, device) if known else None,
        coach.to(device),
        Adapters.from_bundle(bundle).to(device),
    )


@torch.no_grad()
def collect_codes(
    nets: Nets,
    faces: FaceSet,
    recipe: FieldsRecipe,
    device: torch.device,
    generator: torch.Generator,
) -> Codes:
    """Encode training faces, jitter some, sample some, and look at what the generator makes of them
    all.
    """
    sampled = round(recipe.codes * recipe.sampled_share)
    index = torch.randperm(len(faces), generator=generator)[: recipe.codes - sampled]
    parts = []
    for part in torch.split(index, 32):
        mirror = torch.rand(len(part), generator=generator) < 0.5
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(nets.encoder(faces.batch(part, mirror).to(device)).float())
    w = torch.cat(parts)
    jittered = round(recipe.codes * recipe.jittered_share)
    noise = torch.randn(w[:jittered].shape, generator=generator).to(device)
    w[:jittered] = to_sphere(w[:jittered] + recipe.jitter * noise)
    if sampled:
        z = torch.randn(sampled, nets.generator.config.z_dim, generator=generator).to(device)
        w = torch.cat([w, nets.generator.mapping(z)])
    scores, who = [], []
    for part in torch.split(w, 16):
        with torch.autocast(device.type, torch.bfloat16):
            image = nets.generator.synthesis(part).float().clamp(-1, 1)
            scores.append(nets.predictor.steady_scores(image).float())
        who.append(nets.who(image))
    return Codes(w, torch.cat(scores), torch.cat(who))


@torch.no_grad()
def measure_slopes(nets: Nets, fields: Fields, codes: Codes, turn_rad: float = 0.2) -> Tensor:
    """Mean rise of each attribute's score per radian along its field, [5]; 24 codes, both ways.

    The steeper way counts: most faces show nothing of an attribute, and to take away what is not
    there hardly moves the score.
    """
    some = slice(-len(codes.w) // 2, None)
    w, start, slopes = codes.w[some][:24], codes.scores[some][:24], []
    for attribute in ATTRIBUTES:
        rises = []
        for sign in (1, -1):
            moved = roll_out_one(fields, w, attribute.index, sign * turn_rad, 3)
            image = nets.generator.synthesis(moved).clamp(-1, 1)
            end = nets.predictor.steady_scores(image)
            rises.append(sign * (end - start)[:, attribute.index].mean() / turn_rad)
        slopes.append(max(rises, key=lambda rise: float(rise.abs())))
    return torch.stack(slopes)


def roll_out_one(fields: Fields, w: Tensor, index: int, turn_rad: float, steps: int) -> Tensor:
    """Walk w [B,512] along one field by a total angle, in equal steps."""
    for _ in range(steps):
        w = turn(w, fields.direction(w, ATTRIBUTES[index]), turn_rad / steps)
    return w


def roll_out(fields: Fields, w: Tensor, turn_rad: Tensor, steps: int) -> Tensor:
    """Walk w [5,B,512], one row per attribute, by total angles [5,B], in equal steps;
    differentiable.
    """
    angle = (turn_rad / steps).reshape(-1, 1)
    shape = w.shape
    for _ in range(steps):
        direction = fields.each(w).reshape(-1, shape[-1])
        w = turn(w.reshape(-1, shape[-1]), direction, angle).reshape(shape)
    return w


def train(
    options: RunOptions,
    *,
    recipe: FieldsRecipe | None = None,
    coach_recipe: PredictorRecipe | None = None,
) -> None:
    """Train the fields of the bundle's generator and write them to it; resumes exactly."""
    recipe = FieldsRecipe() if recipe is None else recipe
    nets = open_nets(options, options.torch_device(), coach_recipe)
    with Run(NAME, options) as run:
        state = run.restore()
        made_of = Bundle.open(options.bundle, verify=False)
        digest = "".join(
            made_of.index["nets"][n]["sha256"][:8] for n in ("generator", "inversion", "predictor")
        )
        if state is not None and state["digest"] != digest:
            raise InvalidRequest(
                f"{run.folder} belongs to nets {state['digest']}, the bundle now has {digest}: "
                "start anew with --fresh"
            )
        init = torch.Generator().manual_seed(options.seed)
        fields = Fields(FieldsConfig(depth=recipe.depth, step_rad=recipe.step_rad), init).to(
            run.device
        )
        if state is None:
            draw = torch.Generator().manual_seed(options.seed)
            faces = load_faces(options.data, "train")
            nature = observe(
                nets.encoder,
                nets.predictor,
                None if nets.identity is None else nets.who,
                faces,
                run.device,
                draw,
                recipe.natural_faces,
            )
            codes = collect_codes(nets, faces, recipe, run.device, draw)
            del faces
            fields.start_at(nature.axes)
            log_slopes = measure_slopes(nets, fields, codes).abs().clamp(min=0.5).log()  # [5]
        else:
            codes = Codes(*(state[key] for key in ("w", "scores", "who")))
            nature = Nature(state["axes"], state["subspace"])
            log_slopes = state["log_slopes"]
            fields.load_state_dict(state["fields"])
        whiten = whitener(codes.w)
        log_slopes.requires_grad_(True)
        optimizer = torch.optim.Adam(
            [
                {"params": list(fields.parameters()), "peak": recipe.learning_rate},
                {"params": [log_slopes], "peak": recipe.slope_rate},
            ]
        )
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])

        def save(final: bool) -> None:
            run.save(
                {
                    "digest": digest,
                    **vars(codes),
                    **vars(nature),
                    "log_slopes": log_slopes.detach(),
                    "fields": fields.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
            )
            rises = measure_slopes(nets, fields, codes).abs().clamp(min=0.5).tolist()
            fields.config = replace(fields.config, slopes=tuple(round(r, 3) for r in rises))
            scores: dict[str, Any] = {}
            if final:
                scores = validate(nets, fields, load_faces(options.data, "val"), recipe, run)
                run.record(**{k: v for k, v in scores.items() if isinstance(v, float)})
            write_net(
                options.bundle,
                NAME,
                config=fields.config.to_json(),
                tensors=fields.state_dict(),
                provenance=run.provenance(nets=digest, validation=scores),
            )

        totals: dict[str, float] = {}
        while run.step < recipe.length and not run.stopping:
            spent = 0.0 if options.minutes is None else run.minutes_here / options.minutes
            progress = min(1.0, max(run.step / recipe.length, spent))
            ramp = min(1.0, (run.step + 1) / recipe.warm_up) * (1 - 0.9 * progress)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * ramp
            draw = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            losses = walk_losses(
                nets, fields, codes, nature, log_slopes.exp(), whiten, recipe, draw
            )
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(fields.parameters(), 1.0)
            optimizer.step()
            if recipe.stay_natural:
                stay_natural(fields, nature)
            run.step += 1
            run.images += len(ATTRIBUTES) * recipe.per_attribute
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + float(value.detach())
            if run.step % recipe.report_steps == 0:
                run.record(**{key: value / recipe.report_steps for key, value in totals.items()})
                totals = {}
            if run.due("checkpoint", recipe.checkpoint_minutes):
                save(final=False)
        save(final=True)


@torch.no_grad()
def stay_natural(fields: Fields, nature: Nature) -> None:
    """Project the last layers, so that whatever the fields answer lies in nature's subspace."""
    fields.weight[-1].copy_(nature.keep(fields.weight[-1]))
    fields.bias[-1].copy_(nature.keep(fields.bias[-1].T).T)


def whitener(w: Tensor) -> Tensor:
    """A [512,512] such that the rows of w @ A have unit covariance, floored at 2 % of the mean
    variance.
    """
    centred = (w - w.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(w))
    values = values.clamp(min=0.02 * float(values.mean()))
    scaled: Tensor = vectors / values.sqrt()
    return scaled.float()


def walk_losses(
    nets: Nets,
    fields: Fields,
    codes: Codes,
    nature: Nature,
    slopes: Tensor,
    whiten: Tensor,
    recipe: FieldsRecipe,
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """One batch of walks, `per_attribute` for each attribute, and what they cost."""
    n, m = len(ATTRIBUTES), recipe.per_attribute
    device, cuts = codes.w.device, nets.predictor.cuts
    index = torch.randint(len(codes.w), (n * m,), generator=draw).to(device)
    rows = torch.arange(n, device=device).repeat_interleave(m)  # the attribute of each walk
    w, scores = codes.w[index], codes.scores[index]
    degree = nets.predictor.score_degrees(scores)[torch.arange(n * m), rows]  # [n * m]

    sign = (2 * torch.randint(0, 2, (n * m,), generator=draw) - 1).to(device)
    sign = torch.where(degree == 0, 1, torch.where(degree == MAX_DEGREE, -1, sign))
    size = torch.randint(1, 4, (n * m,), generator=draw).to(device)
    target = (degree + sign * size).clamp(0, MAX_DEGREE)
    # The angle that the mean slope says is needed, give or take: long enough to get there, no
    # longer.
    aim = torch.where(
        sign > 0, cuts[rows, (target - 1).clamp(min=0)] + 1, cuts[rows, target.clamp(max=4)] - 1
    )
    need = (aim - scores[torch.arange(n * m), rows]).abs() / slopes[rows]
    stretch = 0.8 + 0.5 * torch.rand(n * m, generator=draw).to(device)
    angle = sign * (need * stretch).clamp(0.04, recipe.largest_turn)

    walked = roll_out(fields, w.reshape(n, m, -1), angle.reshape(n, m), recipe.roll_out)
    walked = walked.reshape(n * m, -1)
    span = recipe.highest_snr_db - recipe.lowest_snr_db
    snr_db = recipe.lowest_snr_db + span * float(torch.rand(1, generator=draw))
    image = nets.received(walked, snr_db, draw)
    views = torch.cat([image] * recipe.views)
    seen = jitter_geometry(views, draw, shift=0.03, turn_deg=3.0, zoom=0.03)
    seen = add_noise(soften(seen, draw), draw, 0.05)
    with torch.autocast(device.type, torch.bfloat16):
        features = nets.predictor.features(seen)
    after, _ = nets.predictor.heads(features[-1].float().flatten(1))  # [views * n * m, 5]
    log_p = nets.predictor.score_logits(after).log_softmax(-1)
    log_p = log_p.reshape(recipe.views, n * m, n, -1).mean(0)  # [n * m, 5, 6]
    with torch.no_grad():
        kept = nets.predictor.score_logits(scores).softmax(-1)

    own = torch.zeros(n * m, n, device=device)
    own[torch.arange(n * m), rows] = 1
    reach = -log_p[torch.arange(n * m), rows, target]  # Eq. (12)
    if nets.coach is not None:
        again = jitter_geometry(image, draw, shift=0.03, turn_deg=3.0, zoom=0.03)
        again = soften(again, draw)
        with torch.autocast(device.type, torch.bfloat16):
            last = nets.coach.features(again)[-1]
        told = nets.coach.score_logits(nets.coach.heads(last.float().flatten(1))[0])
        reach = (reach - told.log_softmax(-1)[torch.arange(n * m), rows, target]) / 2
    drift = (kept * (kept.clamp(min=1e-9).log() - log_p)).sum(-1)  # KL, [n * m, 5]
    losses = {
        # A degree that is many classes away costs a lot whatever the field does: bound its pull.
        "target": recipe.target_weight * (6 * torch.tanh(reach / 6)).mean(),
        "others": recipe.others_weight * ((1 - own) * drift.clamp(max=8)).sum(1).mean() / (n - 1),
    }
    asked = (target - degree).abs().clamp(min=1)
    gone = sign * nature.degrees_moved(w, walked, rows)  # degrees, as real faces differ
    losses["natural"] = recipe.natural_weight * F.relu(1 - gone / asked).mean()
    if nets.identity is not None:
        same = (nets.who(image) * codes.who[index]).sum(-1)
        losses["identity"] = recipe.identity_weight * (1 - same).mean()  # Eq. (13)
    if recipe.perceptual_weight > 0:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            plain = nets.generator.synthesis(w).float().clamp(-1, 1)
            original = nets.predictor.features(plain)[:3]
        with torch.autocast(device.type, torch.bfloat16):
            edited = nets.predictor.features(image)[:3]
        losses["perceptual"] = recipe.perceptual_weight * feature_distance(edited, original).mean()
    # Eq. (15) by other means: the walk must not leave the cloud of codes.
    centre = codes.w.mean(0)
    spread = ((walked - centre) @ whiten).square().mean(1)
    before = ((w - centre) @ whiten).square().mean(1)
    losses["statistics"] = recipe.statistics_weight * F.relu(spread - before - 0.05).mean()
    return losses


@torch.no_grad()
def validate(
    nets: Nets, fields: Fields, faces: FaceSet, recipe: FieldsRecipe, run: Run
) -> dict[str, float]:
    """Edits of unseen people by two degrees each way; draws a sheet of them.

    moved: share whose degree moved the asked way (and per attribute and way); reached: share at the
    asked degree; drift: mean change of the other degrees; identity: cosine to the unedited
    rendering.
    """
    index = torch.arange(min(len(faces), recipe.validation_faces))
    w = torch.cat([nets.encoder(faces.batch(i[None]).to(run.device)) for i in index])
    plain = nets.generator.synthesis(w).clamp(-1, 1)
    who = nets.who(plain)
    limits = MatchLimits(looks=8, batch=4)
    result: dict[str, float] = {}
    columns, all_moved, all_reached, all_drift, all_same = [plain], 0, 0, 0.0, 0.0
    tried = 0
    for attribute in ATTRIBUTES:
        for change in (2, -2):
            moved = reached = count = 0
            pictures = plain.clone()
            for i in range(len(w)):
                found = match(
                    w[i : i + 1],
                    Edit(attribute, change=change),
                    generator=nets.generator,
                    fields=fields,
                    predictor=nets.predictor,
                    limits=limits,
                )
                pictures[i] = found.image[0]
                before, after = (
                    int(found.before[attribute.index]),
                    int(found.after[attribute.index]),
                )
                if found.expected == before:
                    continue
                count += 1
                moved += (after - before) * change > 0
                reached += found.reached
                gap = (found.after - found.before).abs().float()
                all_drift += float(gap.sum() - gap[attribute.index]) / (len(ATTRIBUTES) - 1)
                all_same += float((nets.who(pictures[i : i + 1]) * who[i : i + 1]).sum())
            way = "more" if change > 0 else "less"
            result[f"moved_{attribute}_{way}"] = round(moved / max(count, 1), 3)
            columns.append(pictures)
            all_moved, all_reached, tried = all_moved + moved, all_reached + reached, tried + count
    tried = max(tried, 1)
    result |= {
        "moved": round(all_moved / tried, 3),
        "reached": round(all_reached / tried, 3),
        "drift": round(all_drift / tried, 3),
        "identity": round(all_same / tried, 3),
    }
    shown = min(8, len(w))
    run.sheet(torch.stack([c[:shown] for c in columns], 1).flatten(0, 1), len(columns))
    return result
