"""Recipe: the SNR adapters A_CE and A_CD, on training faces.

    face --inversion encoder--> w --A_CE--> fading + noise --equaliser--> A_CD --> w_hat --G--> y
      |                         |                                                   |           |
      |                         '--------- latent error, in the code's components --'           |
      '------------------------- perceptual distance, who it is, pixels ------------------------'

1. Latents of a few thousand training faces, and how far the picture moves along each direction.
2. The closed form: principal components in that metric, water-filled (`LinearCode.fit`).
3. The same components turned towards what the perceptual distance and the recogniser see: the
   regression of the faces' own features on their latents says how much each direction explains
   (`seen_metric`).
4. All that learns, from there, by what the received picture is judged by, at every step, over
   random SNR (-10..20 dB) and random fading. Latents are nearly Gaussian, so in squared error there
   is nothing to gain over the closed form. Errors are counted relative to what that leaves;
   otherwise the noisiest messages would be all that counts.

One pair for the whole range (`adapters`), or with `--per-snr` one per SNR of the paper
(`adapters_per_snr`). The generator, the inversion encoder and the predictor come from the bundle,
unchanged.
"""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from channel_sim.channel import Channel
from channel_sim.fading import ChannelConfig, Fading
from receiver.equaliser import equalise
from shared.adapters import (
    NET,
    NET_PER_SNR,
    PAPER_SNRS_DB,
    AdapterConfig,
    Adapters,
    ChannelDecoder,
    LinearCode,
)
from shared.bundle import Bundle, write_net
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator
from shared.symbols import Reception, noise_variance_to_snr_db, snr_db_to_noise_variance
from training.data import FaceSet, load_faces
from training.judging import Distance, Judges, Probes, picture_metric, seen_metric
from training.run import Run, RunOptions, frozen
from transmitter.inversion import InversionEncoder

NAME = "adapters"

REPORT_SNRS_DB = (-10.0, *PAPER_SNRS_DB)


@dataclass(frozen=True)
class AdaptersRecipe:
    """Lengths, rates and weights.

    probes: how the closed form's metric is measured, on the first `probed` faces. turned,
    person: shares of the features and of who it is in the metric that the components are turned
    to; with neither they stay as they are.
    batch: messages a step, each rendered. judged: one in so many is shown to the recogniser, which
    costs as much as half a picture. low: the share of messages at -10..4 dB.
    rate_affine, rate_turn: of the scales and shifts by SNR, and of the turned components.
    """

    per_snr: bool = False
    length: int = 500
    batch: int = 8
    rate: float = 2e-4
    rate_affine: float = 3e-3
    rate_turn: float = 2e-5
    warm_up: int = 20
    faces: int = 6000
    probed: int = 3072
    probes: Probes = field(default_factory=Probes)
    turned: float = 0.4
    person: float = 0.4
    low: float = 0.7
    pixel_weight: float = 0.3
    identity_weight: float = 0.7
    latent_weight: float = 0.02
    judged: int = 2
    report_steps: int = 50
    checkpoint_minutes: float = 2.0

    @property
    def net(self) -> str:
        return NET_PER_SNR if self.per_snr else NET


def train(options: RunOptions, recipe: AdaptersRecipe | None = None) -> None:
    """Train from the last checkpoint and write the net to the bundle.

    Raises BundleError where the bundle lacks the generator or the inversion encoder.
    """
    recipe = recipe or AdaptersRecipe()
    bundle = Bundle.open(options.bundle)
    with Run(recipe.net, options) as run:
        state = run.restore()
        generator = Generator.from_bundle(bundle).to(run.device).requires_grad_(False)
        judges = Judges.of(bundle, options.data, run.device)
        faces = load_faces(options.data, "train", recipe.faces)
        held_out = faces_to_latents(load_faces(options.data, "val"), bundle, run.device, limit=256)
        made_for = {net: str(bundle.index["nets"][net]["sha256"]) for net in _SOURCES}
        if state is not None and state["made_for"] != made_for:
            raise InvalidRequest(
                f"{run.folder} was trained for another generator or inversion encoder than "
                f"{bundle.folder} has; start afresh (--fresh)"
            )
        if state is None:
            latents = faces_to_latents(faces, bundle, run.device)
            metric = picture_metric(
                latents[: recipe.probed], generator, judges.distance, recipe.probes, options.seed
            )
            code = LinearCode.fit(latents, metric)
            turned = turned_code(latents, faces, code, judges, recipe)
        else:
            latents, code = state["latents"], LinearCode(**state["code"])
            turned = LinearCode(**state["turned"])
        adapters = start(code, turned, PAPER_SNRS_DB if recipe.per_snr else ()).to(run.device)
        optimizer = torch.optim.AdamW(
            groups(adapters, recipe), betas=(0.9, 0.99), weight_decay=1e-4
        )
        if state is not None:
            adapters.load_state_dict(state["adapters"])
            optimizer.load_state_dict(state["optimizer"])
        plain = AdapterConfig(latents.shape[1])
        codes = {
            "as it is": Adapters(plain).to(run.device),
            "closed form": Adapters(plain, code).to(run.device),
            "turned": start(code, turned, ()).to(run.device),
            "trained": adapters,
        }

        def save() -> None:
            run.save(
                {
                    "latents": latents,
                    "code": vars(code),
                    "turned": vars(turned),
                    "made_for": made_for,
                    "adapters": adapters.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
            )

        def ship() -> None:
            scores = {name: score(pair, held_out, code) for name, pair in codes.items()}
            write_net(
                options.bundle,
                recipe.net,
                config=adapters.config.to_json(),
                tensors=adapters.state_dict(),
                provenance=run.provenance(made_for=made_for, latent_error_left=scores),
            )

        while run.step < recipe.length and not run.stopping:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * schedule(recipe, run.step)
            # Seeded by the step, so that a resumed run draws what an unbroken one would have.
            draws = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            loss = step_loss(adapters, code, latents, faces, generator, judges, recipe, draws)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapters.parameters(), 1.0)
            optimizer.step()
            run.step += 1
            run.images += recipe.batch
            if run.step % recipe.report_steps == 0:
                errors = score(adapters, held_out, code)
                run.record(
                    loss=float(loss.detach()), **{f"left_{k}dB": v for k, v in errors.items()}
                )
            if run.due("checkpoint", recipe.checkpoint_minutes):
                save()
                ship()
        save()
        ship()
        print(table(codes, held_out, code, generator, judges.distance), flush=True)


def train_per_snr(options: RunOptions) -> None:
    """The paper's way: one pair of residual networks per SNR (-6, 0, 6, 12, 18 dB)."""
    train(options, AdaptersRecipe(per_snr=True))


_SOURCES = ("generator", "inversion")


def schedule(recipe: AdaptersRecipe, step: int) -> float:
    """Share of the rates: a warm-up, then a cosine to zero at the end of the recipe."""
    warm = min(1.0, (step + 1) / recipe.warm_up)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.length)))


def groups(adapters: Adapters, recipe: AdaptersRecipe) -> list[dict[str, Any]]:
    """The parameters by their `rate`: a scale is learned from fewer pictures than a matrix."""
    rates: dict[float, list[Tensor]] = {}
    for name, parameter in adapters.named_parameters():
        rate = recipe.rate
        if name.endswith("affine.weight"):
            rate = recipe.rate_affine
        elif name.endswith("turn"):
            rate = recipe.rate_turn
        rates.setdefault(rate, []).append(parameter)
    return [{"params": some, "rate": rate} for rate, some in rates.items()]


@torch.no_grad()
def faces_to_latents(
    faces: FaceSet, bundle: Bundle, device: torch.device, limit: int | None = None
) -> Tensor:
    """Latents [N, k] of the faces by the bundle's inversion encoder, every other face mirrored."""
    encoder = InversionEncoder.from_bundle(bundle).to(device)
    count = len(faces) if limit is None else min(limit, len(faces))
    index = torch.arange(count)
    parts = [
        encoder(faces.batch(part, mirror=part % 2 == 1).to(device)).float()
        for part in index.split(64)
    ]
    return torch.cat(parts)  # [N, k]


def turned_code(
    latents: Tensor, faces: FaceSet, code: LinearCode, judges: Judges, recipe: AdaptersRecipe
) -> LinearCode:
    """The components that matter to the features and to who it is, in the recipe's shares, and for
    the rest of it to `code`'s own metric; each is counted by the variance that it sees in the
    latents."""
    wanted = (
        (recipe.turned, seen_metric(latents, faces, judges.features) if recipe.turned else None),
        (recipe.person, seen_metric(latents, faces, judges.person) if recipe.person else None),
    )
    parts = [(share, metric.double()) for share, metric in wanted if metric is not None]
    if not parts:
        return code
    data = latents.double()
    covariance = (data - data.mean(0)).T @ (data - data.mean(0)) / (len(data) - 1)
    own = (code.analysis.T @ code.analysis).double()
    mixed = (1 - sum(share for share, _ in parts)) * own / (own * covariance).sum()
    for share, metric in parts:
        mixed = mixed + share * metric / (metric * covariance).sum().clamp_min(1e-30)
    scale, axes = torch.linalg.eigh(mixed)
    floor = 2e-3 * scale.clamp_min(0).mean()
    return LinearCode.fit(latents, axes * scale.clamp_min(floor) @ axes.T)


def start(code: LinearCode, turned: LinearCode, classes_db: tuple[float, ...]) -> Adapters:
    """Adapters that send the components of `turned`, written as a turn of those of `code`."""
    config = AdapterConfig(len(code.mean), classes_db=classes_db, turned=True)
    adapters = Adapters(config, code)
    white = code.synthesis.double() * code.spectrum.double().sqrt()  # white components to latents
    turn = (turned.analysis.double() / turned.spectrum.double().sqrt().unsqueeze(1)) @ white
    with torch.no_grad():
        adapters.encoder.turn.copy_(turn)
        # Of the same latents both are white, so the turn is a rotation and this its inverse.
        adapters.decoder.turn.copy_(torch.linalg.inv(turn).T)
        for end in (adapters.encoder, adapters.decoder):
            end.weights.copy_(turned.spectrum)
    return adapters


def random_channel(draws: torch.Generator) -> Channel:
    """Half of the steps AWGN; the rest Rayleigh and Rician, block and fast, perfect CSI."""

    def uniform() -> float:
        return float(torch.rand((), generator=draws))

    if uniform() < 0.5:
        return Channel(ChannelConfig("awgn"))
    fading: Fading = "block" if uniform() < 0.7 else "fast"
    if uniform() < 0.5:
        return Channel(ChannelConfig("rayleigh", fading))
    return Channel(ChannelConfig("rician", fading, k_factor_db=-5 + 20 * uniform()))


def across(
    adapters: Adapters, w: Tensor, snr_db: Tensor, channel: Channel, draws: torch.Generator
) -> Tensor:
    """w [B, k] through encoder, channel, equaliser and decoder -> w_hat [B, k]."""
    reception = channel(adapters.encoder(w, snr_db), snr_db, draws)
    return decode(adapters.decoder, reception)


def decode(decoder: ChannelDecoder, reception: Reception) -> Tensor:
    """What the receiver does before it renders, here with gradients."""
    x_hat, snr_db = equalise(reception)
    w_hat: Tensor = decoder(x_hat, snr_db, noise_variance_to_snr_db(reception.noise_variance))
    return w_hat


def draw_snrs_db(recipe: AdaptersRecipe, draws: torch.Generator) -> Tensor:
    """SNRs [B] of a step's messages: those of the paper, or -10..20 dB, the low ones more often."""
    if recipe.per_snr:
        choice = torch.randint(len(PAPER_SNRS_DB), (recipe.batch,), generator=draws)
        return torch.tensor(PAPER_SNRS_DB)[choice]
    where = torch.rand(recipe.batch, generator=draws)
    low = torch.rand(recipe.batch, generator=draws) < recipe.low
    return torch.where(low, -10 + 14 * where, 4 + 16 * where)


def step_loss(
    adapters: Adapters,
    code: LinearCode,
    latents: Tensor,
    faces: FaceSet,
    generator: Generator,
    judges: Judges,
    recipe: AdaptersRecipe,
    draws: torch.Generator,
) -> Tensor:
    """What the received pictures are judged by, over what the closed form leaves at their SNR."""
    device = latents.device
    index = torch.randint(len(latents), (recipe.batch,), generator=draws)
    w = latents[index]
    face = faces.batch(index, mirror=index % 2 == 1).to(device)
    snr_db = draw_snrs_db(recipe, draws).to(device)
    w_hat = across(adapters, w, snr_db, random_channel(draws), draws)
    left = code.distortion(snr_db_to_noise_variance(snr_db))  # [B]
    with torch.autocast(device.type, torch.bfloat16):
        picture = generator.synthesis(w_hat).float().clamp(-1, 1)
        seen = judges.perceptual(picture, face)
    wrong = seen + recipe.pixel_weight * (picture - face).square().mean((1, 2, 3))
    # Inversion loses something too, so what is judged does not fall to zero with the latent error.
    loss: Tensor = (wrong / (0.2 + left)).mean()
    loss = loss + recipe.latent_weight * (component_error(w_hat - w, code) / (0.2 + left)).mean()
    if recipe.identity_weight > 0:
        some = slice(0, max(1, recipe.batch // recipe.judged))
        loss = loss + recipe.identity_weight * judges.stranger(picture[some], face[some]).mean()
    return loss


def component_error(error: Tensor, code: LinearCode) -> Tensor:
    """e^T M e / sum lambda per message, [B, k] -> [B]: the share of the variance that is lost."""
    return (error @ code.analysis.T).square().sum(dim=1) / code.spectrum.sum()


@torch.no_grad()
def over_awgn(adapters: Adapters, latents: Tensor, snr_db: float) -> Tensor:
    """Latents [N, k] across the plain channel at one SNR; always the same noise."""
    with frozen(adapters):
        draws = torch.Generator().manual_seed(1)
        snrs = torch.full((len(latents),), snr_db, device=latents.device)
        return across(adapters, latents, snrs, Channel(ChannelConfig("awgn")), draws)


def score(adapters: Adapters, latents: Tensor, code: LinearCode) -> dict[str, float]:
    """Share of the (weighted) latent variance lost over AWGN, by SNR in dB."""
    return {
        f"{snr:g}": float(component_error(over_awgn(adapters, latents, snr) - latents, code).mean())
        for snr in REPORT_SNRS_DB
    }


@torch.no_grad()
def table(
    codes: dict[str, Adapters],
    latents: Tensor,
    code: LinearCode,
    generator: Generator,
    distance: Distance,
    count: int = 8,
) -> str:
    """Over AWGN, by SNR: share of the latent lost by each code, PSNR and distance to G(w)."""
    target = generator.synthesis(latents[:count])
    heads = "".join(f" | {name:>12}   psnr  dist" for name in codes)
    lines = [f"snr dB{heads}"]
    for snr in REPORT_SNRS_DB:
        line = f"{snr:6g}"
        for pair in codes.values():
            w_hat = over_awgn(pair, latents, snr)
            lost = float(component_error(w_hat - latents, code).mean())
            picture = generator.synthesis(w_hat[:count])
            mse = (picture.clamp(-1, 1) - target.clamp(-1, 1)).square().mean((1, 2, 3))
            psnr = float((10 * torch.log10(4 / mse.clamp_min(1e-10))).mean())
            line += f" | {lost:12.4f} {psnr:6.2f} {float(distance(picture, target).mean()):5.3f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """`python -m training.adapters [--per-snr] ...`"""
    parser = argparse.ArgumentParser(description="Train the SNR adapters of a bundle.")
    parser.add_argument("--per-snr", action="store_true", help="one pair per SNR of the paper")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    per_snr = given.pop("per_snr")
    train(RunOptions.default(**given), AdaptersRecipe(per_snr=per_snr))


if __name__ == "__main__":
    main()
