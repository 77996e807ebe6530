"""How much a picture changes with its latent, as its judges see it: what the adapters minimise.

picture_metric   small errors, from gradients of the judges' distance through the generator
seen_metric      what a direction of the latent says of a face at all, by regression
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.bundle import Bundle
from shared.stylegan2 import Generator
from training.components import draft_spectrum
from training.data import FaceSet
from training.teachers import IDENTITY_FILE, FaceIdentity
from transmitter.predictor import Predictor

Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Judges:
    """What received pictures are judged by: the bundle's predictor and the data's recogniser."""

    predictor: Predictor | None
    recogniser: FaceIdentity | None

    @classmethod
    def of(cls, bundle: Bundle, data: Path, device: torch.device) -> "Judges":
        """Either is None where there is none."""
        predictor = Predictor.from_bundle(bundle).to(device) if bundle.has("predictor") else None
        there = (data / "nets" / IDENTITY_FILE).is_file()
        return cls(predictor, FaceIdentity(data, device) if there else None)

    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        """The bundle's own distance [B], nothing without a predictor."""
        return a.new_zeros(len(a)) if self.predictor is None else self.predictor.perceptual(a, b)

    def stranger(self, a: Tensor, b: Tensor) -> Tensor:
        """1 - cosine of who it is [B], nothing without a recogniser."""
        if self.recogniser is None:
            return a.new_zeros(len(a))
        with torch.no_grad():
            who = self.recogniser(b)
        return 1 - (self.recogniser(a) * who).sum(1)

    def features(self, face: Tensor) -> list[Tensor]:
        """What the perceptual distance sees: rows [B, D] whose squared differences sum to it."""
        if self.predictor is None:
            return []
        rows = []
        stages = self.predictor.features(face)
        for stage in stages:
            seen = stage.float()
            seen = seen * torch.rsqrt(seen.square().sum(1, keepdim=True) + 1e-6)
            rows.append(seen.flatten(1) / math.sqrt(len(stages) * seen[0, 0].numel()))
        return rows

    def person(self, face: Tensor) -> list[Tensor]:
        """The same for who it is: of unit vectors, 1 - cosine is half the squared difference."""
        return [] if self.recogniser is None else [self.recogniser(face).float() / math.sqrt(2)]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """What the closed form minimises: [B], 4 x mean squared error and both of the above."""
        pixels = (a - b).square().mean((1, 2, 3))
        return 4 * pixels + self.perceptual(a, b) + self.stranger(a, b)


@dataclass(frozen=True)
class Probes:
    """How `picture_metric` is measured.

    count: renderings; 0 for plain mean squared error of w. noise: standard deviation of what is
    added to latents. floor: share of what is known without probes; draft_share where the generator
    has a draft.
    """

    count: int = 512
    noise: float = 0.3
    floor: float = 0.1
    draft_share: float = 0.3


def picture_metric(
    latents: Tensor,
    generator: Generator,
    distance: Distance,
    probes: Probes,
    seed: int,
    batch: int = 16,
) -> Tensor | None:
    """M [k, k] with d(G(w), G(w + e)) ~ e^T M e for channel noise e; None without probes.

    The gradient of d at w + e is g = 2 M e, and e is white, so M ~ (E[g g^T])^(1/2): the root is
    positive definite by construction and no second derivative is needed. `floor` of what is
    known without probes is mixed in: how far the generator's draft moves, which a few hundred
    probes would tell less surely, or the identity where there is no draft.
    """
    if probes.count == 0:
        return None
    draws = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(math.ceil(probes.count / batch)):
        index = torch.randint(len(latents), (batch,), generator=draws)
        noise = probes.noise * torch.randn(batch, latents.shape[1], generator=draws)
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
    share = probes.floor
    if isinstance(generator, Generator) and generator.synthesis.draft is not None:
        spectrum = draft_spectrum(generator, None).double()
        known = 0.05 * known + 0.95 * torch.diag(spectrum / spectrum.mean())
        share = probes.draft_share
    mean = metric.diagonal().mean().clamp_min(1e-30)
    mixed: Tensor = (1 - share) * metric / mean + share * known
    return mixed


@torch.no_grad()
def seen_metric(
    latents: Tensor, faces: FaceSet, see: Callable[[Tensor], list[Tensor]], batch: int = 64
) -> Tensor | None:
    """M [k, k] = J^T J, J the regression on the latents of what `see` gives of a face.

    So e^T M e is the distance that knowing a latent to within e costs, as far as it is linear over
    the whole spread of faces: what is decided about a direction at low SNR is not a small step.
    Every face tells all slopes, a gradient tells one number's. What N faces too few add to J^T J,
    the unexplained variance times C^-1 / N, is taken off again. None where `see` gives nothing.
    """
    centred = (latents - latents.mean(0)).cpu()
    count, k = centred.shape
    crossed: list[Tensor] = []
    sums: list[Tensor] = []
    power = 0.0
    for part in torch.arange(count).split(batch):
        face = faces.batch(part, mirror=part % 2 == 1).to(latents.device)
        for number, rows in enumerate(see(face)):
            flat = rows.cpu()  # [b, D]
            if len(crossed) == number:
                crossed.append(torch.zeros(flat.shape[1], k))
                sums.append(torch.zeros(flat.shape[1]))
            crossed[number].addmm_(flat.T, centred[part])
            sums[number] += flat.sum(0)
            power += float(flat.square().sum())
    if not crossed:
        return None
    variance = power / count - sum(float((s / count).square().sum()) for s in sums)
    covariance = (centred.T @ centred / count).double()
    inverse = torch.linalg.inv(covariance + 1e-6 * covariance.diagonal().mean() * torch.eye(k))
    product = sum((c.T @ c).double() for c in crossed) / count**2  # C_wf C_fw
    metric = inverse @ product @ inverse
    unexplained = max(0.0, variance - float((metric * covariance).sum()))
    scale, axes = torch.linalg.eigh(metric - unexplained / max(count - k, 1) * inverse)
    positive: Tensor = axes * scale.clamp_min(0) @ axes.T
    return positive.to(latents.device)
