"""Recipe: the mapping network z -> w, so that sampled latents are distributed as faces' are.

::

    z --mapping--> w ----.
                          > critic (a few linear layers over w) --> adversarial loss, both ways
    faces --E--> codes --'

Nothing is rendered: a code says all that the generator will draw, and a critic that reads 512
numbers is a thousand times cheaper than one that reads pictures. It reads them twice, as they are
and in the picture's measure (`draft_spectrum`), where a few numbers decide what a face looks like.
Non-saturating loss with R1 (Mescheder et al. 2018) on the codes, and the energy distance as an
anchor. The rest of the generator is left as it is: renderings and edits do not change.
"""

from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.bundle import Bundle, write_net
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator
from training.adapters import faces_to_latents
from training.components import draft_spectrum
from training.data import load_faces
from training.generator import energy_distance, energy_distance_twice
from training.run import Run, RunOptions, State

NAME = "mapping"


@dataclass(frozen=True)
class MappingRecipe:
    """Lengths, rates and weights; about ten minutes on one CPU core."""

    length: int = 6_000
    batch: int = 256
    rate: float = 2e-4
    critic_rate: float = 4e-4
    critic_width: int = 512
    critic_layers: int = 3
    r1_gamma: float = 0.5
    r1_every: int = 4
    energy: float = 0.1
    warm_up: int = 200  # steps over which the average follows quickly
    average: float = 0.005
    report_steps: int = 250


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


def train(options: RunOptions, recipe: MappingRecipe | None = None) -> None:
    """Train from the last checkpoint and write the generator with its new mapping to the bundle.

    Raises BundleError where the bundle lacks the generator or the inversion encoder.
    """
    recipe = recipe or MappingRecipe()
    bundle = Bundle.open(options.bundle)
    with Run(NAME, options) as run:
        state = run.restore()
        generator = Generator.from_bundle(bundle).to(run.device)
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
        mapping = generator.mapping.requires_grad_(True)
        smooth = deepcopy(mapping).requires_grad_(False)
        critic = Critic(scale, recipe.critic_width, recipe.critic_layers).to(run.device)
        optimiser = torch.optim.Adam(mapping.parameters(), recipe.rate, (0.0, 0.99))
        judge = torch.optim.Adam(critic.parameters(), recipe.critic_rate, (0.0, 0.99))
        parts: dict[str, nn.Module | torch.optim.Optimizer] = {
            "mapping": mapping,
            "smooth": smooth,
            "critic": critic,
            "optimiser": optimiser,
            "judge": judge,
        }
        if state is not None:
            for key, part in parts.items():
                part.load_state_dict(state[key])

        def save() -> None:
            saved: State = {key: part.state_dict() for key, part in parts.items()}
            run.save({**saved, "codes": codes, "encoder": encoder_hash})

        def ship() -> None:
            drawn = deepcopy(generator)
            drawn.mapping.load_state_dict(smooth.state_dict())
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
                    NAME: run.provenance(distance=score(smooth, codes, scale)),
                },
            )

        while run.step < recipe.length and not run.stopping:
            # Seeded by the step, so that a resumed run draws what an unbroken one would have.
            draws = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            step(mapping, critic, optimiser, judge, codes, recipe, run.step, draws)
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
    mapping: nn.Module,
    critic: Critic,
    optimiser: torch.optim.Optimizer,
    judge: torch.optim.Optimizer,
    codes: Tensor,
    recipe: MappingRecipe,
    number: int,
    draws: torch.Generator,
) -> None:
    """One step of the critic, then one of the mapping network."""

    def latents() -> Tensor:
        z = torch.randn(recipe.batch, codes.shape[1], generator=draws)
        drawn: Tensor = mapping(z.to(codes.device))
        return drawn

    index = torch.randint(len(codes), (recipe.batch,), generator=draws).to(codes.device)
    real = codes[index].requires_grad_(True)
    with torch.no_grad():
        fake = latents()
    on_real = critic(real)
    loss = F.softplus(critic(fake)).mean() + F.softplus(-on_real).mean()
    if number % recipe.r1_every == 0:
        (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
        loss = loss + recipe.r1_gamma / 2 * recipe.r1_every * slope.square().sum(1).mean()
    judge.zero_grad(set_to_none=True)
    loss.backward()
    judge.step()

    fake, real = latents(), real.detach()
    anchor = energy_distance_twice(fake, real, critic.scale)
    fooled = F.softplus(-critic(fake)).mean() + recipe.energy * anchor
    optimiser.zero_grad(set_to_none=True)
    fooled.backward()
    optimiser.step()


@torch.no_grad()
def score(mapping: nn.Module, codes: Tensor, scale: Tensor, count: int = 1_000) -> float:
    """Energy distance, in the picture's measure, between sampled latents and faces' codes."""
    draws = torch.Generator().manual_seed(1)
    z = torch.randn(count, codes.shape[1], generator=draws).to(codes.device)
    chosen = codes[torch.randperm(len(codes), generator=draws)[:count].to(codes.device)]
    return float(energy_distance(mapping(z) * scale, chosen * scale))
