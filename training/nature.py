"""How real faces differ, as moves of the latent: what an edit has to look like to be seen.

    training faces --inversion encoder--> w --.
                   --predictor--> degrees ----+--regression of w--> one axis per attribute
                   --people's labels ---------|
                   --EdgeFace: who it is -----'

A predictor can be fooled. In a latent whose numbers are white, the shortest way to another score is
a sum of many small moves that nobody sees, and a field that is trained against the predictor finds
it. Three things keep an axis where faces differ:

* the axes come from people's labels as much as from the predictor, so what only one predictor
  believes in is not in them;
* each number of an axis is shrunk by what of it may be chance (James and Stein, positive part):
  faint components, where there is nothing but chance, go to zero;
* who it is stays: what the recogniser's embedding tells of w and of the labels is taken out of both
  first (Frisch and Waugh), so an axis is how faces of one and the same person differ.

Regressing w on a score is not enough by itself: with white w it gives the same direction as
regressing the score on w, the predictor's own gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shared.attributes import ATTRIBUTES
from training.data import FaceSet
from training.degrees import levels
from transmitter.inversion import InversionEncoder
from transmitter.predictor import Predictor, expected_degree

RIDGE = 1e-2  # of the variance of what w is regressed on
IDENTITY_PARTS = 128  # principal components of the embedding that are held still


@torch.no_grad()
def observe(
    encoder: InversionEncoder,
    predictor: Predictor,
    who: Callable[[Tensor], Tensor] | None,
    faces: FaceSet,
    device: torch.device,
    draws: torch.Generator,
    count: int,
) -> Tensor:
    """Look at `count` training faces, half of them mirrored, and take their axes [5, 512].

    who: pictures [B, 3, S, S] -> embeddings [B, 512]; None where there is no recogniser.
    """
    index = torch.randperm(len(faces), generator=draws)[:count]
    latents, scores, people = [], [], []
    for part in index.split(32):
        mirror = torch.rand(len(part), generator=draws) < 0.5
        image = faces.batch(part, mirror).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            latents.append(encoder(image).float())
            scores.append(predictor.scores(image).float())
        if who is not None:
            people.append(who(image))
    degrees = expected_degree(predictor.score_logits(torch.cat(scores)))  # [N, 5]
    level = levels(faces.label)[index].float().to(device)  # [N, 5]
    male = faces.label("Male")[index].float().to(device)
    person = torch.cat(people) if people else None
    return natural_axes(torch.cat(latents), degrees, level, male, person)


def natural_axes(
    w: Tensor,
    degrees: Tensor,
    level: Tensor,
    male: Tensor,
    person: Tensor | None = None,
) -> Tensor:
    """w [N, 512], degrees and levels of evidence [N, 5], male [N] -> axes [5, 512]: along axis a,
    faces one degree apart differ by 1 in the mean (w . axis).

    person: embeddings [N, D] of who it is, held still; None: whoever it is.
    """
    evidence = standardised(degrees) + standardised(level)  # [N, 5]
    if person is not None:
        known = principal_parts(person)
        w, degrees, evidence = (beyond(known, columns) for columns in (w, degrees, evidence))
        male = beyond(known, male[:, None])[:, 0]
    directions = regress(w, torch.cat([evidence, male[:, None]], 1))[: len(ATTRIBUTES)]
    centred = degrees - degrees.mean(0)
    along = (w - w.mean(0)) @ directions.T  # [N, 5]
    # E[along | degree] rises by this per degree.
    rise = (along * centred).mean(0) / centred.square().mean(0).clamp(min=1e-6)
    return directions / rise.clamp(min=1e-6)[:, None]


def principal_parts(person: Tensor) -> Tensor:
    """Embeddings [N, D] -> orthonormal columns [N, K]: the strongest of their principal parts.

    K is IDENTITY_PARTS, but at most a tenth of the faces: with as many parts as faces, everything
    would be told by who it is.
    """
    centred = (person - person.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    count = min(IDENTITY_PARTS, len(person) // 10)
    if count == 0:
        return centred[:, :0]
    lengths = values.flip(0)[:count].clamp(min=1e-12).sqrt()
    parts: Tensor = centred @ vectors.flip(1)[:, :count] / lengths
    return parts


def beyond(known: Tensor, columns: Tensor) -> Tensor:
    """What of columns [N, m] the orthonormal columns `known` [N, K] do not tell: [N, m]."""
    centred = (columns - columns.mean(0)).double()
    left: Tensor = (centred - known @ (known.T @ centred)).float()
    return left


def standardised(columns: Tensor) -> Tensor:
    """Columns [N, m] with zero mean and unit variance; a constant column becomes zero."""
    centred = columns - columns.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp(min=1e-6)


def regress(w: Tensor, given: Tensor) -> Tensor:
    """How w [N, D] moves when one column of given [N, m] rises and the others stay: [m, D].

    Per standard deviation of the column, each number shrunk by what of it may be chance,
    max(0, 1 - variance / square): the standard error is that of ordinary least squares.
    """
    x = standardised(given.double())  # [N, m]
    y = (w - w.mean(0)).double()
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    inverse = torch.linalg.inv(x.T @ x + RIDGE * len(x) * eye)  # [m, m]
    moved = inverse @ x.T @ y  # [m, D]
    left = (y - x @ moved).square().sum(0) / max(1, len(x) - x.shape[1])  # [D]
    chance = inverse.diagonal()[:, None] * left  # [m, D]
    kept = (1 - chance / moved.square().clamp(min=1e-30)).clamp(min=0)
    nothing = (kept == 0).all(1, keepdim=True)  # too few faces to tell: better this than no axis
    result: Tensor = (moved * torch.where(nothing, 1.0, kept)).float()
    return result
