"""Recipe: the SNR adapters A_CE and A_CD, on the latents of training faces.

    faces --inversion encoder--> w --A_CE--> fading + noise --equaliser--> A_CD --> w_hat
                                 |                                               |
                                 |---- latent error, in the code's components ---|
                                 '---- pixels and features, G(w) and G(w_hat) ---'

1. Latents of a few thousand training faces, and how far the picture moves along each direction.
2. The closed form: principal components in that metric, water-filled (`LinearCode.fit`).
3. The residual networks, from there, over random SNR (-10..20 dB) and random fading. Errors are
   counted relative to what the closed form leaves at that SNR; otherwise the noisiest messages
   would be all that counts.

One pair for the whole range (`adapters`), or with `--per-snr` one per SNR of the paper
(`adapters_per_snr`). The generator and the inversion encoder come from the bundle, unchanged.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from shared.stylegan2 import Generator, to_sphere
from shared.symbols import Reception, noise_variance_to_snr_db, snr_db_to_noise_variance
from training.components import draft_spectrum
from training.data import FaceSet, load_faces
from training.run import Run, RunOptions, frozen
from training.teachers import IDENTITY_FILE, FaceIdentity
from transmitter.inversion import InversionEncoder
from transmitter.predictor import Predictor

NAME = "adapters"

Distance = Callable[[Tensor, Tensor], Tensor]
REPORT_SNRS_DB = (-10.0, *PAPER_SNRS_DB)


@dataclass(frozen=True)
class AdaptersRecipe:
    """Lengths and rates; about four minutes on two CPU cores.

    probes: renderings with which the metric is measured; 0 for plain mean squared error of w.
    jitter: standard deviation added to latents: edited ones lie beside those of real faces.
    pictures: faces rendered at every `picture_steps`-th step.
    """

    per_snr: bool = False
    length: int = 1500
    batch: int = 256
    rate: float = 3e-4
    warm_up: int = 50
    faces: int = 3072
    jitter: float = 0.1
    probes: int = 512
    probe_noise: float = 0.3
    metric_floor: float = 0.1
    draft_share: float = 0.3  # of the metric, where the generator has a draft
    picture_steps: int = 8
    pictures: int = 4
    picture_weight: float = 4.0
    report_steps: int = 250
    checkpoint_minutes: float = 1.0

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
        generator = Generator.from_bundle(bundle).to(run.device)
        distance = picture_distance(bundle, options.data, run.device)
        held_out = faces_to_latents(load_faces(options.data, "val"), bundle, run.device, limit=512)
        made_for = {net: str(bundle.index["nets"][net]["sha256"]) for net in _SOURCES}
        if state is not None and state["made_for"] != made_for:
            raise InvalidRequest(
                f"{run.folder} was trained for another generator or inversion encoder than "
                f"{bundle.folder} has; start afresh (--fresh)"
            )
        if state is None:
            latents = faces_to_latents(
                load_faces(options.data, "train", recipe.faces), bundle, run.device
            )
            metric = picture_metric(latents, generator, distance, recipe, options.seed)
            code = LinearCode.fit(latents, metric)
        else:
            latents, code = state["latents"], LinearCode(**state["code"])
        classes = PAPER_SNRS_DB if recipe.per_snr else ()
        adapters = Adapters(AdapterConfig(latents.shape[1], classes_db=classes), code)
        adapters = adapters.to(run.device)
        optimizer = torch.optim.AdamW(adapters.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
        if state is not None:
            adapters.load_state_dict(state["adapters"])
            optimizer.load_state_dict(state["optimizer"])
        codes = {
            "as it is": Adapters(AdapterConfig(latents.shape[1])).to(run.device),
            "closed form": Adapters(AdapterConfig(latents.shape[1]), code).to(run.device),
            "trained": adapters,
        }

        def save() -> None:
            run.save(
                {
                    "latents": latents,
                    "code": vars(code),
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
                group["lr"] = learning_rate(recipe, run.step)
            # Seeded by the step, so that a resumed run draws what an unbroken one would have.
            draws = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            loss = step_loss(adapters, code, latents, generator, distance, recipe, run.step, draws)
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
        print(table(codes, held_out, code, generator, distance), flush=True)


def train_per_snr(options: RunOptions) -> None:
    """The paper's way: one pair of residual networks per SNR (-6, 0, 6, 12, 18 dB)."""
    train(options, AdaptersRecipe(per_snr=True))


_SOURCES = ("generator", "inversion")


def learning_rate(recipe: AdaptersRecipe, step: int) -> float:
    """Warm-up, then a cosine to zero at the end of the recipe."""
    warm = min(1.0, (step + 1) / recipe.warm_up)
    return recipe.rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.length)))


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


def picture_distance(bundle: Bundle, data: Path, device: torch.device) -> Distance:
    """d(a, b) [B]: 4 x mean squared error, the bundle's perceptual distance if it has one, and
    1 - cosine of who it is where the data folder has a recogniser."""
    predictor = Predictor.from_bundle(bundle).to(device) if bundle.has("predictor") else None
    recogniser = FaceIdentity(data, device) if (data / "nets" / IDENTITY_FILE).is_file() else None

    def distance(a: Tensor, b: Tensor) -> Tensor:
        result = 4 * (a - b).square().mean((1, 2, 3))
        if predictor is not None:
            result = result + predictor.perceptual(a, b)
        if recogniser is not None:
            result = result + 1 - (recogniser(a) * recogniser(b)).sum(1)
        return result

    return distance


def picture_metric(
    latents: Tensor,
    generator: Generator,
    distance: Distance,
    recipe: AdaptersRecipe,
    seed: int,
    batch: int = 16,
) -> Tensor | None:
    """M [k, k] with d(G(w), G(w + e)) ~ e^T M e for channel noise e; None without probes.

    The gradient of d at w + e is g = 2 M e, and e is white, so M ~ (E[g g^T])^(1/2): the root is
    positive definite by construction and no second derivative is needed. `metric_floor` of what is
    known without probes is mixed in: how far the generator's draft moves, which a few hundred
    probes would tell less surely, or the identity where there is no draft.
    """
    if recipe.probes == 0:
        return None
    draws = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(math.ceil(recipe.probes / batch)):
        index = torch.randint(len(latents), (batch,), generator=draws)
        noise = recipe.probe_noise * torch.randn(batch, latents.shape[1], generator=draws)
        clean = latents[index]
        moved = (clean + noise.to(clean.device)).requires_grad_(True)
        with torch.no_grad():
            target = generator.synthesis(clean)
        error = distance(generator.synthesis(moved), target).sum()
        gradients.append(torch.autograd.grad(error, moved)[0])
    g = torch.cat(gradients).double()  # [probes, k]
    scale, axes = torch.linalg.eigh(g.T @ g)
    metric = axes * scale.clamp_min(0).sqrt() @ axes.T
    known = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    share = recipe.metric_floor
    if isinstance(generator, Generator) and generator.synthesis.draft is not None:
        spectrum = draft_spectrum(generator, None).double()
        known = 0.05 * known + 0.95 * torch.diag(spectrum / spectrum.mean())
        share = recipe.draft_share
    mean = metric.diagonal().mean().clamp_min(1e-30)
    mixed: Tensor = (1 - share) * metric / mean + share * known
    return mixed


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


def step_loss(
    adapters: Adapters,
    code: LinearCode,
    latents: Tensor,
    generator: Generator,
    distance: Distance,
    recipe: AdaptersRecipe,
    step: int,
    draws: torch.Generator,
) -> Tensor:
    """Latent error over what the closed form leaves, plus the picture's at every few steps."""
    device, size = latents.device, latents.shape[1]
    index = torch.randint(len(latents), (recipe.batch,), generator=draws)
    noise = recipe.jitter * torch.randn(recipe.batch, size, generator=draws)
    w = to_sphere(latents[index] + noise.to(device))
    if recipe.per_snr:
        choice = torch.randint(len(PAPER_SNRS_DB), (recipe.batch,), generator=draws)
        snr_db = torch.tensor(PAPER_SNRS_DB)[choice].to(device)
    else:
        snr_db = (-10 + 30 * torch.rand(recipe.batch, generator=draws)).to(device)
    channel = random_channel(draws)
    w_hat = across(adapters, w, snr_db, channel, draws)
    # Relative to the closed form; at least .1 %, below which no picture changes.
    left = code.distortion(snr_db_to_noise_variance(snr_db)).clamp_min(1e-3)  # [B]
    loss = (component_error(w_hat - w, code) / left).mean()
    if recipe.picture_weight > 0 and step % recipe.picture_steps == 0:
        some = slice(0, recipe.pictures)
        with torch.no_grad():
            target = generator.synthesis(w[some])
        error = distance(generator.synthesis(w_hat[some]), target)
        loss = loss + recipe.picture_weight * error.mean()
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
