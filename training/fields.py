"""Recipe: the fields M_a, one per attribute, that the transmitter walks along to edit a latent.

    training faces --inversion encoder--> codes w --G--> pictures --opinions--> scores
                                             |                   `--EdgeFace--> who it is
        1. start: how w differs between real faces with less and more of it (training/nature.py)
        2. training: w --walk--> w' --A_CE, noise, A_CD--> G --in range--> picture --> losses

Real inverted codes come first, because fields trained on sampled faces alone edit real photographs
badly; jittered and sampled codes are mixed in.

An edit has to be visible, and a pattern that fools P is not. So what is judged is what arrives: the
walked latent has crossed the channel, with its noise, and the picture is cut to its range (left to
itself a field draws blacker than black, which P takes for hair). And every predictor that guides
edits has to see the degree, in the picture shifted and in its mirror image.

How far to walk per unit of score is learned together with the directions. Where the length is
given, a steeper field is one that overshoots, and nothing makes walks short; yet what an edit costs
is the person, and that grows with the length of the walk.

Most of a field is one direction for everybody (cosine .996 to .999 between faces after 223 steps of
all layers), so the last bias learns fast and the layers slowly.

Losses, Eqs. (12) to (14): distance of the scores from the middle of the asked degree; the other
attributes keep their degrees; the same person (1 - cosine of EdgeFace). And the same light, which
neither predictors nor EdgeFace mind: left to itself, a younger face is a burnt-out one. A fringe is
to have the hair's own colours where the forehead was: left to itself, it is a black wedge on every
head. Not for beards, which are dark themselves: one that has to keep the chin's colour turns pink.

Run it again whenever the generator, the inversion encoder, the predictor or the adapters in the
bundle have changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from channel_sim.channel import Channel, ChannelConfig
from shared.adapters import Adapters
from shared.attributes import ATTRIBUTES, MAX_DEGREE, Attribute, Edit
from shared.bundle import Bundle, write_net
from shared.stylegan2 import Generator, to_sphere
from training.augment import jitter_geometry
from training.data import FaceSet, load_faces
from training.nature import observe
from training.run import Run, RunOptions, digest_of, require
from training.teachers import FaceIdentity
from transmitter.editing import MatchLimits, aim_of, match
from transmitter.fields import Fields, FieldsConfig, turn
from transmitter.inversion import InversionEncoder
from transmitter.opinions import OPINIONS, Opinions
from transmitter.predictor import expected_degree

NAME = "fields"
# Where an aligned face has what, in 8 x 8 cells; of the forehead, how much of a row a full fringe
# covers.
HAIR_ROW, HAIR_COLUMNS = 0, slice(2, 6)
SKIN_ROW, SKIN_COLUMNS = 4, slice(3, 5)
FOREHEAD = {1: 0.6, 2: 0.8}


@dataclass(frozen=True)
class FieldsRecipe:
    """Lengths, rates, weights of the losses. About 40 minutes on one CPU core.

    walks: of each attribute in a batch; the hardest ones get most. bias_rate: of the last layer's
    bias, in its own units (its numbers are about 1); learning_rate: of all else. age_identity: how
    much of the identity loss counts for age, which is part of who one is. light_weights: of the
    squared distance of the picture's coarse colours from those wanted (`wanted_light`).
    """

    length: int = 1060
    depth: int = 8
    walks: tuple[int, ...] = (3, 3, 2, 1, 2)
    codes: int = 600
    sampled_share: float = 0.1
    jittered_share: float = 0.1
    jitter: float = 0.25
    learning_rate: float = 1e-5
    bias_rate: float = 0.08
    slope_rate: float = 0.02
    warm_up: int = 5
    step_rad: float = 0.02
    largest_turn: float = 0.8
    lowest_snr_db: float = 9.0
    highest_snr_db: float = 18.0
    identity_weight: float = 18.0
    age_identity: float = 0.5
    others_weight: float = 0.5
    light_weights: tuple[float, ...] = (150.0, 25.0, 0.0, 25.0, 25.0)
    natural_faces: int = 3000
    checkpoint_minutes: float = 5.0
    report_steps: int = 10
    validation_faces: int = 8


@dataclass(frozen=True)
class Codes:
    """The pool: w [N,512], scores [N,M,5] of G(w) by each of the opinions, who [N,512] (unit; zero
    without EdgeFace), light [N,3,8,8]: G(w) reduced to its coarse colours.
    """

    w: Tensor
    scores: Tensor
    who: Tensor
    light: Tensor


@dataclass(frozen=True)
class Nets:
    """Everything frozen that a walk is judged by."""

    generator: Generator
    encoder: InversionEncoder
    guide: Opinions
    adapters: Adapters
    identity: FaceIdentity | None

    def received(self, w: Tensor, snr_db: float, draw: torch.Generator) -> Tensor:
        """Latents [B,512] -> pictures [B,3,S,S] in [-1,1] of what arrives; differentiable."""
        symbols = self.adapters.encoder(w, snr_db)
        arrived = Channel(ChannelConfig("awgn"))(symbols, snr_db, draw).y
        w = self.adapters.decoder(arrived, snr_db)
        with torch.autocast(w.device.type, torch.bfloat16):
            image: Tensor = self.generator.synthesis(w)
        return image.float().clamp(-1, 1)

    def who(self, image: Tensor) -> Tensor:
        """Unit embeddings [B,512] of faces [B,3,128,128]; zeros without an identity net."""
        if self.identity is None:
            return image.new_zeros(len(image), 512)
        return self.identity(image)


def open_nets(options: RunOptions, device: torch.device) -> Nets:
    """The bundle's nets, frozen, on the device; InvalidRequest names the first one missing."""
    bundle = Bundle.open(options.bundle)
    require(bundle, ("generator", "inversion", "predictor"), NAME)
    known = (options.data / "nets" / "edgeface_xs.torchscript.pt").is_file()
    return Nets(
        Generator.from_bundle(bundle).to(device),
        InversionEncoder.from_bundle(bundle).to(device),
        Opinions.from_bundle(bundle).to(device),
        Adapters.from_bundle(bundle).to(device),
        FaceIdentity(options.data, device) if known else None,
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
    scores, who, light = [], [], []
    for part in torch.split(w, 16):
        with torch.autocast(device.type, torch.bfloat16):
            image = nets.generator.synthesis(part).float().clamp(-1, 1)
            seen = [net.steady_scores(image).float() for net in nets.guide.members]
            scores.append(torch.stack(seen, 1))  # [B, M, 5]
        who.append(nets.who(image))
        light.append(coarse(image))
    return Codes(w, torch.cat(scores), torch.cat(who), torch.cat(light))


def coarse(image: Tensor) -> Tensor:
    """The colours [B,3,8,8] of the 64 parts of pictures [B,3,S,S]."""
    return F.adaptive_avg_pool2d(image, 8)


@torch.no_grad()
def measure_slopes(nets: Nets, fields: Fields, codes: Codes, turn_rad: float = 0.2) -> Tensor:
    """Mean rise of each attribute's score per radian along its field, [5]; 24 codes, both ways.

    The steeper way counts: most faces show nothing of an attribute, and to take away what is not
    there hardly moves the score.
    """
    some = slice(-len(codes.w) // 2, None)
    w, slopes = codes.w[some][:24], []
    start = nets.guide.mean(codes.scores[some][:24].unbind(1))
    for attribute in ATTRIBUTES:
        rises = []
        for sign in (1, -1):
            moved = roll_out_one(fields, w, attribute.index, sign * turn_rad, 3)
            image = nets.generator.synthesis(moved).clamp(-1, 1)
            end = nets.guide.steady_scores(image)
            rises.append(sign * (end - start)[:, attribute.index].mean() / turn_rad)
        slopes.append(max(rises, key=lambda rise: float(rise.abs())))
    return torch.stack(slopes)


def roll_out_one(fields: Fields, w: Tensor, index: int, turn_rad: float, steps: int) -> Tensor:
    """Walk w [B,512] along one field by a total angle, in equal steps."""
    for _ in range(steps):
        w = fields.step(w, ATTRIBUTES[index], turn_rad / steps)
    return w


def train(options: RunOptions, *, recipe: FieldsRecipe | None = None) -> None:
    """Train the fields of the bundle's generator and write them to it; resumes exactly."""
    recipe = FieldsRecipe() if recipe is None else recipe
    nets = open_nets(options, options.torch_device())
    with Run(NAME, options) as run:
        made_of = ("generator", "inversion", "predictor", *OPINIONS, "adapters")
        digest = digest_of(Bundle.open(options.bundle, verify=False), made_of)
        state = run.restore(digest)
        init = torch.Generator().manual_seed(options.seed)
        fields = Fields(FieldsConfig(depth=recipe.depth, step_rad=recipe.step_rad), init).to(
            run.device
        )
        if state is None:
            draw = torch.Generator().manual_seed(options.seed)
            faces = load_faces(options.data, "train")
            axes = observe(
                nets.encoder,
                nets.guide.first,
                None if nets.identity is None else nets.who,
                faces,
                run.device,
                draw,
                recipe.natural_faces,
            )
            codes = collect_codes(nets, faces, recipe, run.device, draw)
            del faces
            fields.start_at(axes)
            log_slopes = measure_slopes(nets, fields, codes).abs().clamp(min=0.5).log()  # [5]
        else:
            codes = Codes(*(state[key] for key in ("w", "scores", "who", "light")))
            log_slopes = state["log_slopes"]
            fields.load_state_dict(state["fields"])
        log_slopes.requires_grad_(True)
        optimizer = torch.optim.Adam(
            [
                {"params": [fields.weight], "peak": recipe.learning_rate},
                {"params": [fields.bias], "peak": recipe.bias_rate},
                {"params": [log_slopes], "peak": recipe.slope_rate},
            ],
            betas=(0.8, 0.98),
        )
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])

        def save(final: bool) -> None:
            run.save(
                {
                    "digest": digest,
                    **vars(codes),
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
                bytewise=["weight"],  # most of what they say is in the last bias
            )

        totals: dict[str, float] = {}
        while run.step < recipe.length and not run.stopping:
            spent = 0.0 if options.minutes is None else run.minutes_here / options.minutes
            progress = min(1.0, max(run.step / recipe.length, spent))
            ramp = min(1.0, (run.step + 1) / recipe.warm_up) * (1 - 0.9 * progress)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * ramp
            draw = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            losses = walk_losses(nets, fields, codes, log_slopes.exp(), recipe, draw)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(fields.parameters(), 1.0)
            optimizer.step()
            run.step += 1
            run.images += sum(recipe.walks)
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + float(value.detach())
            if run.step % recipe.report_steps == 0:
                run.record(**{key: value / recipe.report_steps for key, value in totals.items()})
                totals = {}
            if run.due("checkpoint", recipe.checkpoint_minutes):
                save(final=False)
        save(final=True)


def aims(cuts: Tensor, degree: Tensor) -> Tensor:
    """The scores [B] that walks aim at for degrees [B], by cut points [B,5] (`aim_of`)."""
    pairs = zip(cuts.tolist(), degree.tolist(), strict=True)
    return cuts.new_tensor([aim_of(row, each) for row, each in pairs])


def walk_losses(
    nets: Nets,
    fields: Fields,
    codes: Codes,
    slopes: Tensor,
    recipe: FieldsRecipe,
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """One batch of walks, `recipe.walks` of each attribute, and what they cost.

    slopes [5]: how far a score goes per radian; how long the walks are depends on it.
    """
    device = codes.w.device
    rows = torch.arange(len(ATTRIBUTES)).repeat_interleave(torch.tensor(recipe.walks)).to(device)
    count, each = len(rows), torch.arange(len(rows), device=device)
    index = torch.randint(len(codes.w), (count,), generator=draw).to(device)
    w, opinions = codes.w[index], codes.scores[index].unbind(1)
    scores, cuts = nets.guide.mean(opinions), nets.guide.cuts
    degree = nets.guide.score_degrees(scores)[each, rows]  # [B]
    sign = (2 * torch.randint(0, 2, (count,), generator=draw) - 1).to(device)
    sign = torch.where(degree == 0, 1, torch.where(degree == MAX_DEGREE, -1, sign))
    size = torch.randint(1, 4, (count,), generator=draw).to(device)
    target = (degree + sign * size).clamp(0, MAX_DEGREE)
    own = torch.zeros(count, len(ATTRIBUTES), device=device)
    own[each, rows] = 1

    aim = aims(cuts[rows], target)
    need = (aim - scores[each, rows]) / slopes[rows]
    turn_rad = need.clamp(-recipe.largest_turn, recipe.largest_turn)[:, None]
    parts = zip(ATTRIBUTES, w.split(recipe.walks), strict=True)
    directions = torch.cat([fields.direction(part, attribute) for attribute, part in parts])
    span = recipe.highest_snr_db - recipe.lowest_snr_db
    snr_db = recipe.lowest_snr_db + span * float(torch.rand(1, generator=draw))
    image = nets.received(turn(w, directions, turn_rad), snr_db, draw)
    view = jitter_geometry(image, draw, shift=0.02, turn_deg=3.0, zoom=0.03)
    seen = torch.cat([view, image.flip(3)])
    reach, others = [], []
    for net, before in zip(nets.guide.members, opinions, strict=True):
        with torch.autocast(device.type, torch.bfloat16):
            last = net.features(seen)[-1]
        after = net.heads(last.float().flatten(1))[0].unflatten(0, (2, count)).mean(0)  # [B, 5]
        off = (after[each, rows] - aims(net.cuts[rows], target)) / 2  # degrees: they are 2 wide
        reach.append(F.huber_loss(off, torch.zeros_like(off)))  # Eq. (12)
        moved = expected_degree(net.score_logits(after)) - expected_degree(net.score_logits(before))
        others.append(((1 - own) * moved.abs()).sum(1).mean() / (len(ATTRIBUTES) - 1))
    losses = {
        "target": 2 * torch.stack(reach).mean(),
        "others": recipe.others_weight * torch.stack(others).mean(),
    }
    if nets.identity is not None:
        changed = 1 - (nets.who(image) * codes.who[index]).sum(1)
        counts = torch.where(rows == Attribute.AGE.index, recipe.age_identity, 1.0)
        losses["identity"] = recipe.identity_weight * (counts * changed).mean()  # Eq. (13)
    wanted = wanted_light(codes.light[index], rows, target - degree)
    dimmed = (coarse(image) - wanted).square().mean((1, 2, 3))  # [B]
    minds = torch.tensor(recipe.light_weights, device=device)[rows]
    losses["light"] = (minds * dimmed).mean()
    return losses


def wanted_light(light: Tensor, rows: Tensor, change: Tensor) -> Tensor:
    """Coarse colours [B,3,8,8] of faces after edits of the attributes `rows` [B] by `change` [B]
    degrees: those that there were, and on the forehead the hair's as far as the fringe grows.
    """
    hair = light[:, :, HAIR_ROW, HAIR_COLUMNS].mean(2)  # [B,3]
    skin = light[:, :, SKIN_ROW, SKIN_COLUMNS].mean(2)
    grown = torch.where(rows == Attribute.BANGS.index, change / MAX_DEGREE, 0.0)  # [B]
    wanted = light.clone()
    for row, share in FOREHEAD.items():
        wanted[:, :, row, HAIR_COLUMNS] += share * (grown[:, None] * (hair - skin))[:, :, None]
    return wanted


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
    limits = MatchLimits(looks=8)
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
                    predictor=nets.guide,
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
