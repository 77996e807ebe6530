"""Recipe: the mapping network z -> w, so that sampled latents are distributed as faces' are.

::

    z --mapping--> w ---.--> critic of codes (a few linear layers) ----------.
                        |                                                     > adversarial losses,
    faces --E--> codes -'--> draft --SqueezeNet--> critic of pictures -------'  both ways

Most of it renders nothing. A code says all that the generator will draw, and a critic that reads
512 numbers is a thousand times cheaper than one that reads pictures. It reads them twice, as they
are and in the picture's measure (`draft_spectrum`), where a few numbers decide what a face looks
like. Non-saturating loss with R1 (Mescheder et al. 2018), and the energy distance as an anchor.

Such a critic sees how numbers are spread and hardly how they belong together: an outline of hair is
the agreement of a hundred of them, and faces without it are ghosts. So after `pictures_from` steps
a second one looks at the draft, which is one matrix product: frozen features of SqueezeNet, a few
spectrally normalised convolutions on each of four layers, hinge loss (Projected GAN, Sauer et al.
2021), both sides flipped, moved and coloured at random. At last the spread of each number is set
(`calibrate`). The rest of the generator is left as it is: renderings and edits do not change.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from shared.bundle import Bundle, write_net
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator, Mapping
from training.adapters import faces_to_latents
from training.augment import jitter_colour, jitter_geometry
from training.components import draft_spectrum
from training.data import load_faces
from training.generator import energy_distance, energy_distance_twice
from training.run import Run, RunOptions, State
from training.teachers import SqueezeFeatures

NAME = "mapping"
SEEN = (0, 1, 2, 6)  # which of SqueezeFeatures' layers the critic of pictures looks at

Look = Callable[[Tensor, torch.Generator], list[Tensor]]


@dataclass(frozen=True)
class MappingRecipe:
    """Lengths, rates and weights; about half an hour on one CPU core, most of it the pictures.

    batch: latents a step. drawn: how many of them are looked at, from step `pictures_from` on.
    side: pixels at which they are seen.
    """

    length: int = 6_200
    pictures_from: int = 2_673
    batch: int = 256
    drawn: int = 32
    side: int = 64
    falling: int = 400  # last steps, over which both rates fall to nothing
    rate: float = 3e-4
    critic_rate: float = 6e-4
    critic_width: int = 512
    critic_layers: int = 3
    head_width: int = 64
    r1_gamma: float = 0.5
    r1_every: int = 4
    energy: float = 2.0
    strong: int = 64  # how many numbers, of those that move the picture most, are drawn narrower
    narrow: float = 0.9  # by this share of the codes' spread
    warm_up: int = 200  # steps over which the average follows quickly
    average: float = 0.03
    report_steps: int = 100


class Critic(nn.Module):
    """w [B, D] -> logit [B], large for codes of faces."""

    scale: Tensor

    def __init__(self, scale: Tensor, width: int, layers: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        sizes = [2 * len(scale)] + [width] * layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, 1)

    def forward(self, w: Tensor) -> Tensor:
        x = torch.cat([w, w * self.scale], 1)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        logit: Tensor = self.out(x)[:, 0]
        return logit


class PictureCritic(nn.Module):
    """Features of a picture, [B, C_i, H_i, H_i] each -> logits [B, P_i] each, large for faces."""

    def __init__(self, features: list[Tensor], width: int) -> None:
        """features: of any picture, for their sizes. width: channels of every convolution."""
        super().__init__()
        self.heads = nn.ModuleList(
            _head(found.shape[1], found.shape[2], width) for found in features
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        with torch.autocast(features[0].device.type, torch.bfloat16):
            return [
                head(found).float().flatten(1)
                for head, found in zip(self.heads, features, strict=True)
            ]


def _head(channels: int, side: int, width: int) -> nn.Sequential:
    """Features [B, C, H, H] -> logits [B, 1, h, h], h of 4 at most."""
    layers: list[nn.Module] = [spectral_norm(nn.Conv2d(channels, width, 1)), nn.LeakyReLU(0.2)]
    while side > 4:
        layers += [spectral_norm(nn.Conv2d(width, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
        side //= 2
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(width, 1, 3, padding=1)))


def looking(generator: Generator, squeeze: SqueezeFeatures, side: int) -> Look:
    """How the critic of pictures sees latents [B, D]: features of their drafts, disturbed.

    A generator without a draft is rendered instead, which takes its time.
    """
    draw = generator.synthesis if generator.synthesis.draft is None else generator.synthesis.draft

    def look(w: Tensor, draws: torch.Generator) -> list[Tensor]:
        picture = F.interpolate(draw(w), (side, side), mode="bilinear", antialias=True)
        picture = jitter_colour(jitter_geometry(picture, draws), draws, 0.5)
        with torch.autocast(w.device.type, torch.bfloat16):
            features = squeeze(picture)
        # Unit vectors of C numbers; the critic likes numbers about 1.
        return [features[i] * features[i].shape[1] ** 0.5 for i in SEEN]

    return look


@dataclass(frozen=True)
class Learners:
    """What a step changes: the mapping network and its two critics, with their optimisers."""

    mapping: nn.Module
    critic: Critic
    picture_critic: PictureCritic
    optimiser: torch.optim.Optimizer
    judge: torch.optim.Optimizer

    @classmethod
    def of(cls, mapping: nn.Module, scale: Tensor, look: Look, recipe: MappingRecipe) -> "Learners":
        """Critics with random weights. scale: `measure` of the generator."""
        critic = Critic(scale, recipe.critic_width, recipe.critic_layers)
        with torch.no_grad():
            features = look(torch.zeros(1, len(scale), device=scale.device), torch.Generator())
        picture_critic = PictureCritic(features, recipe.head_width)
        judged = [*critic.parameters(), *picture_critic.parameters()]
        return cls(
            mapping,
            critic.to(scale.device),
            picture_critic.to(scale.device),
            torch.optim.Adam(mapping.parameters(), recipe.rate, (0.0, 0.99)),
            torch.optim.Adam(judged, recipe.critic_rate, (0.0, 0.99)),
        )

    def pace(self, share: float, recipe: MappingRecipe) -> None:
        """Set both rates to this share of the recipe's."""
        for optimiser, rate in ((self.optimiser, recipe.rate), (self.judge, recipe.critic_rate)):
            for group in optimiser.param_groups:
                group["lr"] = share * rate

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What a checkpoint keeps, by name."""
        return dict(vars(self))


def train(options: RunOptions, recipe: MappingRecipe | None = None) -> None:
    """Train from the last checkpoint and write the generator with its new mapping to the bundle.

    Raises BundleError where the bundle lacks the generator or the inversion encoder.
    """
    recipe = recipe or MappingRecipe()
    bundle = Bundle.open(options.bundle)
    with Run(NAME, options) as run:
        state = run.restore()
        generator = Generator.from_bundle(bundle).to(run.device).requires_grad_(False)
        encoder_hash = str(bundle.index["nets"]["inversion"]["sha256"])
        if state is not None and state["encoder"] != encoder_hash:
            raise InvalidRequest(
                f"{run.folder} was trained for another inversion encoder than {bundle.folder} has; "
                "start afresh (--fresh)"
            )
        if state is None:
            codes = faces_to_latents(load_faces(options.data, "train"), bundle, run.device)
        else:
            codes = state["codes"]
        scale = measure(generator)
        look = looking(generator, SqueezeFeatures(options.data).to(run.device), recipe.side)
        mapping = generator.mapping.requires_grad_(True)
        smooth = deepcopy(mapping).requires_grad_(False)
        learners = Learners.of(mapping, scale, look, recipe)
        parts = {**learners.parts(), "smooth": smooth}
        if state is not None:
            for key, part in parts.items():
                part.load_state_dict(state[key])

        def save() -> None:
            saved: State = {key: part.state_dict() for key, part in parts.items()}
            run.save({**saved, "codes": codes, "encoder": encoder_hash})

        def ship() -> None:
            drawn = deepcopy(generator)
            drawn.mapping.load_state_dict(smooth.state_dict())
            calibrate(drawn.mapping, codes, scale, recipe)
            z = torch.randn(24, generator.config.z_dim, generator=torch.Generator().manual_seed(2))
            with torch.no_grad():
                run.sheet(drawn(z.to(run.device)).clamp(-1, 1), 8)
            write_net(
                options.bundle,
                "generator",
                config=generator.config.to_json(),
                tensors=drawn.state_dict(),
                provenance={
                    **bundle.provenance("generator"),
                    NAME: run.provenance(distance=score(drawn.mapping, codes, scale)),
                },
            )

        while run.step < recipe.length and not run.stopping:
            # Seeded by the step, so that a resumed run draws what an unbroken one would have.
            draws = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            learners.pace(min(1.0, (recipe.length - run.step) / recipe.falling), recipe)
            step(learners, codes, look, recipe, run.step, draws)
            follow = 0.1 if run.step < recipe.warm_up else recipe.average
            with torch.no_grad():
                torch._foreach_lerp_(list(smooth.parameters()), list(mapping.parameters()), follow)
            run.step += 1
            run.images += recipe.batch  # latents here
            if run.step % recipe.report_steps == 0:
                run.record(distance=score(smooth, codes, scale))
            if run.due("checkpoint", 2):
                save()
        save()
        ship()


def measure(generator: Generator) -> Tensor:
    """[D]: amplitudes with which the numbers of w move the picture, of mean square 1."""
    if generator.synthesis.draft is None:
        return torch.ones(generator.config.w_dim, device=next(generator.parameters()).device)
    spectrum = draft_spectrum(generator, None)
    return (spectrum / spectrum.mean()).sqrt()


def step(
    learners: Learners,
    codes: Tensor,
    look: Look,
    recipe: MappingRecipe,
    number: int,
    draws: torch.Generator,
) -> None:
    """One step of the critics, then one of the mapping network."""
    critic, picture_critic = learners.critic, learners.picture_critic
    drawn = recipe.drawn if number >= recipe.pictures_from else 0

    def latents() -> Tensor:
        z = torch.randn(recipe.batch, codes.shape[1], generator=draws)
        found: Tensor = learners.mapping(z.to(codes.device))
        return found

    index = torch.randint(len(codes), (recipe.batch,), generator=draws).to(codes.device)
    real = codes[index].requires_grad_(True)
    with torch.no_grad():
        fake = latents()
    on_real = critic(real)
    loss = F.softplus(critic(fake)).mean() + F.softplus(-on_real).mean()
    if number % recipe.r1_every == 0:
        (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
        loss = loss + recipe.r1_gamma / 2 * recipe.r1_every * slope.square().sum(1).mean()
    if drawn:
        with torch.no_grad():
            features = look(torch.cat([real[:drawn], fake[:drawn]]), draws)
        for logits in picture_critic(features):
            of_real, of_fake = logits.chunk(2)
            loss = loss + F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()
    learners.judge.zero_grad(set_to_none=True)
    loss.backward()
    learners.judge.step()

    fake, real = latents(), real.detach()
    anchor = energy_distance_twice(fake, real, critic.scale)
    fooled = F.softplus(-critic(fake)).mean() + recipe.energy * anchor
    if drawn:
        for logits in picture_critic(look(fake[:drawn], draws)):
            fooled = fooled - logits.mean()
    learners.optimiser.zero_grad(set_to_none=True)
    fooled.backward()
    learners.optimiser.step()


@torch.no_grad()
def calibrate(mapping: Mapping, codes: Tensor, scale: Tensor, recipe: MappingRecipe) -> None:
    """Give each sampled number the spread [D] that it has in codes, the strongest a narrower one.

    Adversaries leave light and pose too wide, and it is their extremes that look like no photograph
    (truncation, as StyleGAN's, but of what shows: on the sphere there is no way to the middle). A
    leaky ReLU passes factors on, so those of the last layer's rows are factors of what it draws.
    """
    z = torch.randn(4_000, codes.shape[1], generator=torch.Generator().manual_seed(1))
    wanted = codes.std(0)
    wanted[scale.topk(min(recipe.strong, len(scale))).indices] *= recipe.narrow
    last = mapping.layers[-1]
    assert isinstance(last, nn.Linear)
    for _ in range(4):  # each changes the length, which the sphere then shares out anew
        factor = (wanted / mapping(z.to(codes.device)).std(0).clamp_min(1e-6)).clamp(0.2, 5)
        last.weight.mul_(factor[:, None])
        last.bias.mul_(factor)


@torch.no_grad()
def score(mapping: nn.Module, codes: Tensor, scale: Tensor, count: int = 1_000) -> float:
    """Energy distance, in the picture's measure, between sampled latents and faces' codes."""
    draws = torch.Generator().manual_seed(1)
    z = torch.randn(count, codes.shape[1], generator=draws).to(codes.device)
    chosen = codes[torch.randperm(len(codes), generator=draws)[:count].to(codes.device)]
    return float(energy_distance(mapping(z) * scale, chosen * scale))
