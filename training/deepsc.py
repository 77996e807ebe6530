"""Recipe: the learned codec for whole pictures that the baselines send, on training faces.

    face --encoder--> x --fading + noise--> equaliser --decoder--> face'
      |                                                              |
      '----------------------- squared error ------------------------'

1. Principal components of 8 x 8 patches of a thousand faces: the closed form (`PatchCode.fit`).
2. The networks beside it, from zero, over random SNR (-10..20 dB) and random fading. The error of a
   message is counted relative to what the closed form leaves at its SNR; otherwise the noisiest
   messages would be all that counts.

What is shipped is a moving average of the weights, so a run that is cut short is usable too. It
needs no other net of the bundle.
"""

import argparse
import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from baselines.coherent import equalise
from baselines.deepsc import NET, Deepsc, DeepscConfig, PatchCode
from channel_sim.channel import Channel
from channel_sim.fading import ChannelConfig
from shared.adapters import PAPER_SNRS_DB, water_fill
from shared.bundle import write_net
from shared.symbols import noise_variance_to_snr_db, snr_db_to_noise_variance
from training.adapters import random_channel
from training.data import FaceSet, Order, load_faces
from training.run import Run, RunOptions, frozen

NAME = NET


@dataclass(frozen=True)
class DeepscRecipe:
    """Lengths and rates.

    length: steps of the whole schedule, at the end of which the rate is zero. code_faces: faces
    that the components are measured on. ema_images: span of the moving average, in pictures.
    """

    config: DeepscConfig = field(default_factory=DeepscConfig)
    length: int = 20_000
    batch: int = 16
    rate: float = 1e-3
    warm_up: int = 100
    code_faces: int = 1024
    ema_images: int = 8_000
    faces: int | None = None
    held_out: int = 32
    report_minutes: float = 2.0
    checkpoint_minutes: float = 5.0


def train(options: RunOptions, recipe: DeepscRecipe | None = None) -> None:
    """Train from the last checkpoint and write the net `deepsc` to the bundle."""
    recipe = recipe or DeepscRecipe()
    with Run(NAME, options) as run:
        state = run.restore()
        faces = load_faces(options.data, "train", recipe.faces)
        validation = load_faces(options.data, "val", recipe.held_out)
        held_out = validation.batch(torch.arange(len(validation))).to(run.device)
        if state is None:
            some = torch.arange(min(recipe.code_faces, len(faces)))
            pictures = faces.batch(some, mirror=some % 2 == 1)
            code = PatchCode.fit(pictures, recipe.config.components)
            total = patch_variance(pictures, code.mean)
        else:
            code, total = PatchCode(**state["code"]), float(state["total"])
        closed = Deepsc(recipe.config, code).to(run.device)
        net = copy.deepcopy(closed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        smooth = copy.deepcopy(net)
        optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
        order = Order(len(faces), recipe.batch, torch.Generator().manual_seed(options.seed))
        if state is not None:
            net.load_state_dict(state["net"])
            smooth.load_state_dict(state["smooth"])
            optimizer.load_state_dict(state["optimizer"])
            order.load(state["order"])

        def save() -> None:
            run.save(
                {
                    "code": vars(code),
                    "total": total,
                    "net": net.state_dict(),
                    "smooth": smooth.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "order": order.state(),
                }
            )

        start = score(closed, held_out)  # once: scoring costs as much as several steps

        def ship() -> dict[str, dict[str, float]]:
            scores = {"closed form": start, "trained": score(smooth, held_out)}
            write_net(
                options.bundle,
                NET,
                config=recipe.config.to_json(),
                tensors=smooth.state_dict(),
                provenance=run.provenance(psnr_db=scores),
            )
            run.sheet(sheet(smooth, held_out[:8]), 8)
            return scores

        while run.step < recipe.length and not run.stopping:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, run.step)
            # Seeded by the step, so that a resumed run draws what an unbroken one would have.
            draws = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            images = next_batch(faces, order, draws).to(run.device)
            loss = step_loss(net, images, total, draws)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            run.step += 1
            run.images += recipe.batch
            average(smooth, net, recipe, run.images)
            if run.due("report", recipe.report_minutes):
                found = score(smooth, held_out)
                run.record(
                    loss=float(loss.detach()), **{f"psnr_{k}dB": v for k, v in found.items()}
                )
            if run.due("checkpoint", recipe.checkpoint_minutes):
                save()
                ship()
        save()
        print(table(ship()), flush=True)


def learning_rate(recipe: DeepscRecipe, step: int) -> float:
    """Warm-up, then a cosine to zero at the end of the recipe."""
    warm = min(1.0, (step + 1) / recipe.warm_up)
    return recipe.rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.length)))


def next_batch(faces: FaceSet, order: Order, draws: torch.Generator) -> Tensor:
    """Pictures [B, 3, S, S], half of them mirrored."""
    index = order.next()
    return faces.batch(index, mirror=torch.rand(len(index), generator=draws) < 0.5)


def patch_variance(images: Tensor, mean: Tensor) -> float:
    """Energy of an 8 x 8 patch beside the mean colour: 192 x E|image - mean|^2."""
    return 192 * float((images - mean[:, None, None]).square().mean())


def step_loss(net: Deepsc, images: Tensor, total: float, draws: torch.Generator) -> Tensor:
    """Mean over messages of the squared error over what linear coding leaves at their SNRs."""
    snr_db = (-10 + 30 * torch.rand(len(images), generator=draws)).to(images.device)
    channel = random_channel(draws)
    # The networks' own products in bfloat16; sums, powers and the channel stay in float32.
    with torch.autocast(images.device.type, torch.bfloat16):
        x = net.encode(images, snr_db)
        reception = channel(x, snr_db, draws)
        x_hat, received_db = equalise(reception)
        decoded = net.decode(x_hat, received_db, snr_db, images.shape[3])
    error = 192 * (decoded - images).square().mean((1, 2, 3))  # [B], per patch
    left = linear_error(net, total, snr_db, received_db)
    return (error / left).mean()


@torch.no_grad()
def linear_error(net: Deepsc, total: float, sent_db: Tensor, received_db: Tensor) -> Tensor:
    """Squared error of a patch that water-filling at one SNR and LMMSE at another leave: [B].

    At least a thousandth of the patch's energy `total`, below which no picture changes.
    """
    spectrum = net.root.square()
    power = water_fill(spectrum, snr_db_to_noise_variance(sent_db))  # [B, c]
    noise = snr_db_to_noise_variance(received_db).unsqueeze(1)  # [B, 1]
    kept = (spectrum * noise / (power + noise)).sum(dim=1)
    lost = max(0.0, total - float(spectrum.sum()))
    return (kept + lost).clamp_min(1e-3 * total)


@torch.no_grad()
def average(smooth: Deepsc, net: Deepsc, recipe: DeepscRecipe, images: int) -> None:
    """Exponential moving average over about `ema_images` pictures, fewer at the start."""
    span = min(recipe.ema_images, images // 4 + 1)
    keep = 0.5 ** (recipe.batch / span)
    for slow, fast in zip(smooth.parameters(), net.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)


@torch.no_grad()
def over_awgn(net: Deepsc, images: Tensor, snr_db: float) -> Tensor:
    """Pictures [B, 3, S, S] across the plain channel at one SNR; always the same noise."""
    with frozen(net):
        draws = torch.Generator().manual_seed(1)
        snrs = torch.full((len(images),), snr_db, device=images.device)
        reception = Channel(ChannelConfig("awgn"))(net.encode(images, snrs), snrs, draws)
        x_hat, received_db = equalise(reception)
        sent_db = noise_variance_to_snr_db(reception.noise_variance)
        return net.decode(x_hat, received_db, sent_db, images.shape[3]).clamp(-1, 1)


def score(net: Deepsc, images: Tensor) -> dict[str, float]:
    """Mean PSNR in dB over AWGN, by SNR in dB."""
    found = {}
    for snr in PAPER_SNRS_DB:
        error = (over_awgn(net, images, snr) - images).square().mean((1, 2, 3))  # [B]
        found[f"{snr:g}"] = float((10 * torch.log10(4 / error.clamp_min(1e-10))).mean())
    return found


def sheet(net: Deepsc, images: Tensor) -> Tensor:
    """Faces, and what arrives of them at -6, 6 and 18 dB: rows of pictures."""
    return torch.cat([images, *(over_awgn(net, images, snr) for snr in (-6.0, 6.0, 18.0))])


def table(scores: dict[str, dict[str, float]]) -> str:
    """PSNR by SNR, a line a net."""
    lines = ["psnr, dB     " + "".join(f"{snr:>8g}" for snr in PAPER_SNRS_DB)]
    for name, found in scores.items():
        lines.append(f"{name:<13}" + "".join(f"{value:8.2f}" for value in found.values()))
    return "\n".join(lines)


def main() -> None:
    """`python -m training.deepsc ...`"""
    parser = argparse.ArgumentParser(description="Train the learned codec of the baselines.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    train(RunOptions.default(**given))


if __name__ == "__main__":
    main()
