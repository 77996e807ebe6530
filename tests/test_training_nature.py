"""Axes of real differences, on latents whose law is known."""

import pytest
import torch
from torch import Tensor

from shared.attributes import ATTRIBUTES
from training.nature import natural_axes, regress

N, K = 6000, 512


def population(shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """White w [N, 512] that moves by `shift` along an axis per degree, degrees [N, 5], the axes."""
    draws = torch.Generator().manual_seed(0)
    degrees = torch.randint(0, 6, (N, 5), generator=draws).float()
    degrees[:, 1] = torch.where(
        degrees[:, 0] > 2, degrees[:, 1], degrees[:, 1] / 2
    )  # come together
    axes = torch.linalg.qr(torch.randn(K, 5, generator=draws)).Q.T  # [5, 512]
    return shift * degrees @ axes + torch.randn(N, K, generator=draws), degrees, axes


def observed(shift: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w, degrees, axes = population(shift)
    return natural_axes(w, degrees, (degrees >= 3).float(), torch.zeros(N)), w, degrees, axes


def test_axes_are_those_of_the_population_and_hold_the_others_still() -> None:
    found, _, _, axes = observed()
    cosine = torch.nn.functional.normalize(found, dim=1) @ axes.T
    # 512 numbers with a standard error of 1 / sqrt(6000) each, beside 0.5 a degree.
    assert float(cosine.diagonal().min()) > 0.87
    assert float((cosine - torch.diag(cosine.diagonal())).abs().max()) < 0.15


def test_a_degree_is_one_along_its_axis() -> None:
    found, w, degrees, _ = observed()
    for index in range(len(ATTRIBUTES)):
        along = w @ found[index]
        centred = degrees[:, index] - degrees[:, index].mean()
        slope = float((along * centred).sum() / centred.square().sum())
        assert slope == pytest.approx(1.0, abs=1e-3)


def test_chance_is_shrunk_away() -> None:
    """Of an axis on one number, the other 511 would be chance: 1 / sqrt(N) each."""
    draws = torch.Generator().manual_seed(1)
    cause = torch.randn(N, 1, generator=draws)
    w = torch.randn(N, K, generator=draws)
    w[:, 7] += 0.5 * cause[:, 0]
    moved = regress(w, cause)[0]
    assert float(moved[7]) == pytest.approx(0.5, abs=0.05)
    rest = torch.cat([moved[:7], moved[8:]])
    raw = ((w * cause).mean(0)).square().sum() - (w[:, 7] * cause[:, 0]).mean().square()
    # E[chi^2 - 2 + 1 / chi^2 | chi > 1] P(chi > 1) is about a third of E[chi^2].
    assert float(rest.square().sum()) < 0.5 * float(raw)
    assert bool((rest == 0).sum() > 0.6 * len(rest))


def test_what_belongs_to_the_person_is_left_out() -> None:
    """The first attribute comes with another face: its axis must not change the face."""
    draws = torch.Generator().manual_seed(4)
    person = torch.randn(N, 12, generator=draws)
    degrees = torch.randint(0, 6, (N, 5), generator=draws).float()
    degrees[:, 0] = (2.5 + 1.5 * person[:, 0] + 0.7 * torch.randn(N, generator=draws)).clamp(0, 5)
    w = 0.3 * torch.randn(N, K, generator=draws)
    w[:, :12] += person
    w[:, 20:25] += 0.5 * degrees
    level, male = (degrees >= 3).float(), torch.zeros(N)
    anybody = natural_axes(w, degrees, level, male)[0]
    same = natural_axes(w, degrees, level, male, person)[0]
    assert float(anybody[0] / anybody[20]) > 0.3
    assert abs(float(same[0] / same[20])) < 0.05


def test_where_all_is_chance_an_axis_is_left() -> None:
    draws = torch.Generator().manual_seed(2)
    moved = regress(torch.randn(5, K, generator=draws), torch.randn(5, 3, generator=draws))
    assert bool((moved.norm(dim=1) > 0).all())
