"""Generator and inversion encoder, trained together through the channel.

::

    faces --principal components--> draft of G, projection of E        (once, at the start)

    face --E--> w on the sphere --closed-form code, AWGN--> w_hat --G--> rendering
      |                                                                     |
      `-------------- pixels, perceptual distance, identity ----------------'
    z --mapping--> w --G--> sampled face ----> D <---- faces, renderings

A start from principal components is worth days: 512 of them, weighted towards the pixels that a
face recogniser looks at, already carry a face across the channel; the convolutions of both nets
begin as corrections of nothing. What the channel does is known in closed form: component i gets
the power p_i of water-filling and G is given the posterior mean p_i / (p_i + N0) of it, so a bad
channel reaches G as a short vector with its fine components gone, and G learns to draw the face it
can be sure of.

The adversary joins after `adversary_from` images, when there is something to sharpen. The mapping
network is kept on the distribution of encoded faces from the start (energy distance), so that
drawing from z gives latents which G knows.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.bundle import Bundle, write_net
from shared.errors import BundleError
from shared.stylegan2 import Discriminator, Generator, GeneratorConfig, default_channels
from training.components import draft_spectrum, noisy, pixel_weights, set_components
from training.data import FaceSet, Order, load_faces
from training.run import Run, RunOptions, State, frozen
from training.teachers import FaceIdentity, SqueezeFeatures
from transmitter.inversion import InversionConfig, InversionEncoder

NAME = "generator"


@dataclass(frozen=True)
class Recipe:
    """Every number of this recipe. Lengths are counted in images, so they hold for any batch.

    `length` is where a run ends that was given neither minutes nor steps: on two CPU cores about
    a day, on one data-centre GPU too.
    """

    length: int = 2_000_000
    batch: int = 8
    channels: tuple[int, ...] = (256, 256, 256, 192, 96, 32)
    encoder_channels: tuple[int, ...] = (32, 64, 128, 192, 256)
    discriminator_channels: tuple[int, ...] = (256, 256, 192, 128, 64, 32)
    draft_size: int = 64
    pixel_weight_power: float = 0.5  # 0: plain principal components
    rate: float = 2e-4
    rate_falls_after: int = 16_000  # then as 1 / sqrt(images)
    warmup: int = 2_000
    mse: float = 4.0
    perceptual: float = 0.3
    identity: float = 3.0
    energy: float = 0.05
    sampled: int = 32  # latents drawn by the mapping network at every step
    codes_kept: int = 256  # of faces seen last, to compare them with
    adversary: float = 0.03
    adversary_from: int = 40_000
    discriminator_rate: float = 1e-3
    r1_gamma: float = 0.1
    r1_every: int = 16
    snr_high_db: float = 24.0
    snr_low_db: float = -8.0
    ema_images: int = 6_000
    validation_faces: int = 128


CPU = Recipe()
CUDA = Recipe(
    length=12_000_000,
    batch=64,
    channels=default_channels(128, 16384),
    discriminator_channels=default_channels(128, 16384),
    adversary_from=400_000,
)


def train(options: RunOptions, recipe: Recipe | None = None) -> None:
    """Train until the minutes or steps are used up, or SIGTERM; write the nets to the bundle."""
    with Run(NAME, options) as run:
        recipe = recipe or (CUDA if run.device.type == "cuda" else CPU)
        faces = load_faces(options.data, "train")
        judges = Judges.load(options.data, run.device)
        validation = Validation(load_faces(options.data, "val", recipe.validation_faces), judges)
        nets = Nets(recipe, run.device)
        draws = torch.Generator().manual_seed(options.seed)
        order = Order(len(faces), recipe.batch, draws)
        state = run.restore()
        if state is not None:
            nets.load(state)
            order.load(state["order"])
        else:
            run.images = 0 if options.fresh else nets.start_from_bundle(options.bundle)
            if run.images == 0:
                nets.start_from_components(faces, judges, recipe)

        def checkpoint() -> None:
            run.save({**nets.state(), "order": order.state()})

        def validate_and_write() -> None:
            encoder = nets.settled_encoder(faces)
            run.record(**validation.scores(encoder, nets.smooth_generator))
            run.sheet(validation.sheet(encoder, nets.smooth_generator), 8)
            nets.write(options.bundle, encoder, run)

        bounded = options.minutes is not None or options.steps is not None
        while not run.stopping and (bounded or run.images < recipe.length):
            real = faces.batch(order.next(), torch.rand(recipe.batch, generator=draws) < 0.5)
            real = real.to(run.device, memory_format=torch.channels_last)
            report = reconstruct(nets, judges, real, recipe, run.images, draws)
            if run.images >= recipe.adversary_from:
                report |= discriminate(nets, real, recipe, run.step, draws)
            run.step += 1
            run.images += recipe.batch
            nets.average(recipe, run.images)
            if run.due("report", 1):
                run.record(**{key: float(value.detach()) for key, value in report.items()})
            if run.due("checkpoint", 3):
                checkpoint()
            if run.due("validation", 6):
                validate_and_write()
        checkpoint()
        validate_and_write()


@dataclass(frozen=True)
class Judges:
    """The frozen nets that say how far a rendering is from its face."""

    squeeze: SqueezeFeatures
    identity: FaceIdentity

    @classmethod
    def load(cls, data: Path, device: torch.device) -> "Judges":
        return cls(SqueezeFeatures(data).to(device), FaceIdentity(data, device))


class Nets:
    """Everything that learns, its optimisers and its running averages."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        config = GeneratorConfig(channels=recipe.channels, draft_size=recipe.draft_size)
        form = {"device": device, "memory_format": torch.channels_last}
        self.device, self.recipe = device, recipe
        self.generator = Generator(config).to(**form)  # type: ignore[call-overload]
        inversion = InversionConfig(channels=recipe.encoder_channels, draft_size=recipe.draft_size)
        self.encoder = InversionEncoder(inversion).to(**form)  # type: ignore[call-overload]
        self.discriminator = Discriminator(config.image_size, recipe.discriminator_channels)
        self.discriminator.to(**form)  # type: ignore[call-overload]
        self.optimiser = torch.optim.AdamW(
            rate_groups(self.generator, self.encoder), recipe.rate, (0.9, 0.98), fused=True
        )
        self.critic = torch.optim.Adam(
            self.discriminator.parameters(), lr=recipe.discriminator_rate, betas=(0.0, 0.99)
        )
        self.smooth_generator = deepcopy(self.generator).eval().requires_grad_(False)
        self.smooth_encoder = deepcopy(self.encoder).eval().requires_grad_(False)
        self.codes = torch.zeros(0, config.w_dim, device=device)  # of the faces seen last
        self.spectrum = torch.ones(config.w_dim, device=device)

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "generator": self.generator,
            "encoder": self.encoder,
            "discriminator": self.discriminator,
            "optimiser": self.optimiser,
            "critic": self.critic,
            "smooth_generator": self.smooth_generator,
            "smooth_encoder": self.smooth_encoder,
        }

    def state(self) -> State:
        parts: State = {key: part.state_dict() for key, part in self._parts().items()}
        return {**parts, "codes": self.codes, "spectrum": self.spectrum}

    def load(self, state: State) -> None:
        for key, part in self._parts().items():
            part.load_state_dict(state[key])
        self.codes, self.spectrum = state["codes"], state["spectrum"]

    @torch.no_grad()
    def start_from_components(self, faces: FaceSet, judges: "Judges", recipe: Recipe) -> None:
        """Give the generator's draft and the encoder's projection the faces' components."""
        size, power = recipe.draft_size, recipe.pixel_weight_power
        weight = pixel_weights(faces, judges.identity, size, power, self.device)
        set_components(self.generator, self.encoder, faces, weight)
        self.smooth_generator.load_state_dict(self.generator.state_dict())
        self.smooth_encoder.load_state_dict(self.encoder.state_dict())
        self.spectrum = draft_spectrum(self.generator, weight)

    def start_from_bundle(self, folder: Path) -> int:
        """Go on from a shipped bundle where no run folder is left; the images seen, else 0.

        Also 0 where the bundle's nets have another shape than the recipe's: then it starts afresh.
        """
        try:
            bundle = Bundle.open(folder)
        except BundleError:
            return 0
        if not (bundle.has("generator") and bundle.has("inversion")):
            return 0
        shapes = (self.generator.config, self.encoder.config)
        there = (
            GeneratorConfig.from_json(bundle.config("generator")),
            InversionConfig.from_json(bundle.config("inversion")),
        )
        if shapes != there:
            print(f"{folder} holds nets of another shape, {there}: starting afresh", flush=True)
            return 0
        self.generator.load_state_dict(bundle.tensors("generator"))
        self.encoder.load_state_dict(bundle.tensors("inversion"))
        if bundle.has("discriminator"):
            self.discriminator.load_state_dict(bundle.tensors("discriminator"))
        self.smooth_generator.load_state_dict(self.generator.state_dict())
        self.smooth_encoder.load_state_dict(self.encoder.state_dict())
        self.spectrum = draft_spectrum(self.generator, None)
        return int(bundle.provenance("generator")["images"])

    @torch.no_grad()
    def average(self, recipe: Recipe, images: int) -> None:
        """Exponential moving average over about `ema_images` pictures, fewer at the start."""
        span = min(recipe.ema_images, images // 10 + 1)
        keep = 0.5 ** (recipe.batch / span)
        for smooth, live in (
            (self.smooth_generator, self.generator),
            (self.smooth_encoder, self.encoder),
        ):
            torch._foreach_lerp_(  # one call instead of a loop over 200 tensors
                list(smooth.parameters()), list(live.parameters()), 1 - keep
            )

    @torch.no_grad()
    def settled_encoder(self, faces: FaceSet, count: int = 512) -> InversionEncoder:
        """The averaged encoder with normalisation statistics measured on `count` training faces.

        Running statistics lag behind weights that move, and belong to the live weights anyway.
        """
        encoder: InversionEncoder = deepcopy(self.smooth_encoder)
        encoder.train()
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # a plain mean over the batches
        for index in torch.arange(min(count, len(faces))).split(128):
            encoder(faces.batch(index).to(self.device))
        encoder.eval()
        return encoder

    def write(self, folder: Path, encoder: InversionEncoder, run: Run) -> None:
        """Write G and E, and D once it has learned: a later run can go on from the bundle."""
        provenance = run.provenance()
        nets: list[tuple[str, nn.Module, dict[str, Any]]] = [
            ("generator", self.smooth_generator, self.generator.config.to_json()),
            ("inversion", encoder, self.encoder.config.to_json()),
        ]
        if run.images > self.recipe.adversary_from:
            nets.append(("discriminator", self.discriminator, {}))
        for net, module, config in nets:
            write_net(
                folder, net, config=config, tensors=module.state_dict(), provenance=provenance
            )


def rate_groups(generator: Generator, encoder: InversionEncoder) -> list[dict[str, Any]]:
    """Parameters by how far one step of Adam may move them.

    A step moves every weight alike, so a layer that sums 512 inputs of one sign moves its output
    512 times as far. Demodulated and batch-normalised convolutions do not mind; styles, RGB,
    the mapping network and the encoder's head do. The draft is right already, and nearly so is
    what the encoder projects: corrections come slowly, or the noise of small batches undoes them.
    """
    scales: dict[float, list[nn.Parameter]] = {1.0: [], 0.3: [], 0.1: [], 0.005: []}
    for name, parameter in generator.named_parameters():
        if name.startswith("synthesis.draft"):
            scales[0.005].append(parameter)
        elif "style" in name or name.startswith("mapping"):
            scales[0.1].append(parameter)
        else:
            scales[0.3 if "to_rgb" in name else 1.0].append(parameter)
    for name, parameter in encoder.named_parameters():
        scales[0.005 if name.startswith("head") else 0.1].append(parameter)
    return [{"params": parameters, "scale": scale} for scale, parameters in scales.items()]


def learning_rate(recipe: Recipe, images: int) -> float:
    """Linear warm-up, constant, then falling with the square root: no end has to be known."""
    rise = min(1.0, (images + recipe.batch) / recipe.warmup)
    fall: float = min(1.0, (recipe.rate_falls_after / max(images, 1)) ** 0.5)
    return recipe.rate * rise * fall


def draw_snr_db(recipe: Recipe, draws: torch.Generator) -> Tensor:
    """[B] uniform SNRs of the whole range."""
    span = recipe.snr_high_db - recipe.snr_low_db
    return recipe.snr_low_db + span * torch.rand(recipe.batch, generator=draws)


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 E|a - b| - E|a - a'| - E|b - b'| between samples [N, D] and [M, D]; zero for one law."""

    def within(x: Tensor) -> Tensor:
        return F.pdist(x).mean()

    return 2 * torch.cdist(a, b).mean() - within(a) - within(b)


def energy_distance_twice(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Between latents in their own measure, where all D numbers count alike, and in the picture's
    (`scale` [D]), where a few decide."""
    return energy_distance(a, b) + energy_distance(a * scale, b * scale)


def reconstruct(
    nets: Nets, judges: Judges, real: Tensor, recipe: Recipe, images: int, draws: torch.Generator
) -> dict[str, Tensor]:
    """One step of E, G and the mapping network; returns its losses."""
    for group in nets.optimiser.param_groups:
        group["lr"] = learning_rate(recipe, images) * group["scale"]
    with torch.no_grad(), torch.autocast(real.device.type, torch.bfloat16):
        features = judges.squeeze(real)
    with torch.autocast(real.device.type, torch.bfloat16):
        w = nets.encoder(real)  # [B, 512]
        received = noisy(w, draw_snr_db(recipe, draws), draws, nets.spectrum)
        rendering = nets.generator.synthesis(received)
        perceptual = judges.squeeze.distance(rendering, features).mean()
    mse = (rendering - real).square().mean()
    loss = recipe.mse * mse + recipe.perceptual * perceptual
    report = {"mse": mse, "perceptual": perceptual}
    with torch.no_grad():
        person = judges.identity(real)
    cosine = (judges.identity(rendering) * person).sum(1).mean()
    loss = loss + recipe.identity * (1 - cosine)
    report["identity"] = cosine
    nets.codes = torch.cat([nets.codes, w.detach()])[-recipe.codes_kept :]
    z = torch.randn(recipe.sampled, w.shape[1], generator=draws).to(w)
    sampled = nets.generator.mapping(z)
    scale = (nets.spectrum / nets.spectrum.mean()).sqrt()
    distance = energy_distance_twice(sampled, nets.codes, scale)
    loss = loss + recipe.energy * distance
    report["energy"] = distance
    if images >= recipe.adversary_from:
        with frozen(nets.discriminator), torch.autocast(real.device.type, torch.bfloat16):
            fakes = torch.cat([rendering, nets.generator.synthesis(sampled[: len(w) // 2])])
            fooled = F.softplus(-nets.discriminator(augment(fakes, draws))).mean()
        loss = loss + recipe.adversary * fooled
        report["fooled"] = fooled
    nets.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    drawing = [*nets.generator.synthesis.parameters(), *nets.encoder.parameters()]
    torch.nn.utils.clip_grad_norm_(drawing, 1.0)
    nets.optimiser.step()
    return report


def discriminate(
    nets: Nets, real: Tensor, recipe: Recipe, step: int, draws: torch.Generator
) -> dict[str, Tensor]:
    """One step of D on real faces, renderings and sampled faces; lazy R1 on the real ones."""
    half = len(real) // 2
    with torch.no_grad(), torch.autocast(real.device.type, torch.bfloat16):
        z = torch.randn(len(real) - half, nets.generator.config.z_dim, generator=draws)
        latents = torch.cat([nets.encoder(real[:half]), nets.generator.mapping(z.to(real))])
        fakes = nets.generator.synthesis(latents)
    with torch.autocast(real.device.type, torch.bfloat16):
        on_fakes = nets.discriminator(augment(fakes, draws))
        on_real = nets.discriminator(augment(real, draws))
    loss = F.softplus(on_fakes).mean() + F.softplus(-on_real).mean()
    if step % recipe.r1_every == 0:  # in float32: the second derivative does not survive bf16
        exact = augment(real, draws).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(nets.discriminator(exact).sum(), exact, create_graph=True)
        penalty = slope.square().sum((1, 2, 3)).mean()
        loss = loss + recipe.r1_gamma / 2 * recipe.r1_every * penalty
    nets.critic.zero_grad(set_to_none=True)
    loss.backward()
    nets.critic.step()
    return {"d_real": on_real.mean(), "d_fake": on_fakes.mean()}


def augment(images: Tensor, draws: torch.Generator) -> Tensor:
    """DiffAugment (Zhao et al. 2020): brightness, saturation, contrast, translation, cutout."""
    count, _, size, _ = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, 1, 1, 1, generator=draws)).to(images)

    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * uniform(0.5, 1.5)
    level = images.mean((1, 2, 3), keepdim=True)
    images = level + (images - level) * uniform(0.6, 1.4) + uniform(-0.4, 0.4)
    reach = size // 8
    padded = F.pad(images, (reach,) * 4)
    shifts = torch.randint(0, 2 * reach + 1, (count, 2), generator=draws).tolist()
    moved = [padded[i, :, y : y + size, x : x + size] for i, (y, x) in enumerate(shifts)]
    images = torch.stack(moved).contiguous(memory_format=torch.channels_last)
    corners = torch.randint(-size // 4, size, (count, 2), generator=draws)
    row = torch.arange(size)
    inside = [
        (row[None] >= corners[:, axis, None]) & (row[None] < corners[:, axis, None] + size // 2)
        for axis in (0, 1)
    ]
    hole = inside[0][:, :, None] & inside[1][:, None, :]  # [B, S, S]
    return images * (~hole)[:, None].to(images)


class Validation:
    """The same faces and the same noise every time, so scores of two moments can be compared."""

    SNRS_DB = (-6.0, 6.0, 12.0, 18.0)

    def __init__(self, faces: FaceSet, judges: Judges) -> None:
        self.faces = faces.batch(torch.arange(len(faces)))
        self.judges = judges

    def _renderings(
        self, encoder: InversionEncoder, generator: Generator, snr_db: float, count: int
    ) -> Tensor:
        spectrum = draft_spectrum(generator, None)
        device = next(encoder.parameters()).device
        draws = torch.Generator().manual_seed(1)
        out = []
        for batch in self.faces[:count].split(32):
            snr = torch.full((len(batch),), snr_db)
            out.append(generator.synthesis(noisy(encoder(batch.to(device)), snr, draws, spectrum)))
        return torch.cat(out).clamp(-1, 1)

    @torch.no_grad()
    def scores(self, encoder: InversionEncoder, generator: Generator) -> dict[str, float]:
        """PSNR (dB), identity cosine and uncalibrated perceptual distance at each SNR."""
        result = {}
        faces = self.faces.to(next(encoder.parameters()).device)
        person, features = self.judges.identity(faces), self.judges.squeeze(faces)
        for snr_db in self.SNRS_DB:
            made = self._renderings(encoder, generator, snr_db, len(faces))
            mse = (made - faces).square().mean((1, 2, 3)) / 4
            at = f"{snr_db:g}dB"
            result[f"psnr_{at}"] = float((-10 * mse.log10()).mean())
            result[f"id_{at}"] = float((self.judges.identity(made) * person).sum(1).mean())
            result[f"perc_{at}"] = float(self.judges.squeeze.distance(made, features).mean())
        return result

    @torch.no_grad()
    def sheet(self, encoder: InversionEncoder, generator: Generator) -> Tensor:
        """Rows of eight: faces, received at 12 dB and at -6 dB (twice), then sampled faces."""
        rows = []
        for first in (0, 8):
            part = slice(first, first + 8)
            rows.append(self.faces[part])
            for snr_db in (12.0, -6.0):
                rows.append(self._renderings(encoder, generator, snr_db, first + 8)[part].cpu())
        device = next(encoder.parameters()).device
        z = torch.randn(16, generator.config.z_dim, generator=torch.Generator().manual_seed(2))
        rows.append(generator(z.to(device)).cpu().clamp(-1, 1))
        return torch.cat(rows)
