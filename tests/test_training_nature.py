"""Axes of real differences, on latents whose law is known."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.attributes import ATTRIBUTES
from shared.stylegan2 import Generator, GeneratorConfig, to_sphere
from training.fields import Codes, FieldsRecipe, Nets, stay_natural, walk_losses, whitener
from training.nature import Nature, nature_of, regress
from transmitter.fields import Fields, FieldsConfig, turn
from transmitter.inversion import InversionConfig, InversionEncoder
from transmitter.predictor import Predictor, PredictorConfig

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


def observed(shift: float = 0.5) -> tuple[Nature, Tensor, Tensor, Tensor]:
    w, degrees, axes = population(shift)
    level = (degrees >= 3).float()
    labels = torch.cat([level, torch.zeros(N, 1)], 1)  # a label that nobody has
    return nature_of(w, degrees, level, labels, torch.zeros(N)), w, degrees, axes


def test_axes_are_those_of_the_population_and_hold_the_others_still() -> None:
    nature, _, _, axes = observed()
    cosine = torch.nn.functional.normalize(nature.axes, dim=1) @ axes.T
    # 512 numbers with a standard error of 1 / sqrt(6000) each, beside 0.5 a degree.
    assert float(cosine.diagonal().min()) > 0.87
    assert float((cosine - torch.diag(cosine.diagonal())).abs().max()) < 0.15


def test_a_degree_is_one_along_its_axis() -> None:
    nature, w, degrees, _ = observed()
    for index in range(len(ATTRIBUTES)):
        rows = torch.full((N,), index)
        along = nature.degrees_moved(torch.zeros(N, K), w, rows)
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
    level, labels, male = (degrees >= 3).float(), torch.zeros(N, 1), torch.zeros(N)
    anybody = nature_of(w, degrees, level, labels, male).axes[0]
    same = nature_of(w, degrees, level, labels, male, person).axes[0]
    assert float(anybody[0] / anybody[20]) > 0.3
    assert abs(float(same[0] / same[20])) < 0.05


def test_where_all_is_chance_an_axis_is_left() -> None:
    draws = torch.Generator().manual_seed(2)
    moved = regress(torch.randn(5, K, generator=draws), torch.randn(5, 3, generator=draws))
    assert bool((moved.norm(dim=1) > 0).all())


def test_subspace_is_orthonormal_and_holds_the_axes() -> None:
    nature, _, _, _ = observed()
    k = nature.subspace.shape[1]
    assert 5 <= k <= 5 + 5 + 5  # axes, evidence alone, labels; not the label that nobody has
    torch.testing.assert_close(nature.subspace.T @ nature.subspace, torch.eye(k), atol=1e-5, rtol=0)
    torch.testing.assert_close(nature.keep(nature.axes.T).T, nature.axes, atol=1e-3, rtol=1e-3)


def test_fields_that_stay_natural_answer_inside_the_subspace() -> None:
    nature, _, _, _ = observed()
    fields = Fields(FieldsConfig(depth=3), torch.Generator().manual_seed(0))
    stay_natural(fields, nature)
    answer = fields(torch.randn(4, K, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(nature.keep(answer.mT).mT, answer, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5), (2.0, 0.0)])
def test_a_walk_shorter_than_nature_costs_what_it_lacks(share: float, expected: float) -> None:
    """Walks of a known length along the axes, asked for so many degrees that a share is gone."""
    nature, w, _, _ = observed()
    torch.manual_seed(0)
    predictor = Predictor(PredictorConfig(resolution=32, widths=(4, 4), depths=(0, 0))).eval()
    generator = Generator(GeneratorConfig(32, mapping_layers=1, channels=(4,) * 4)).eval()
    nets = Nets(
        generator, InversionEncoder(InversionConfig(32, channels=(4, 4, 4))), predictor, None
    )
    fields = Fields(FieldsConfig(depth=2), torch.Generator().manual_seed(0))
    fields.start_at(nature.axes)
    w = to_sphere(w[:40])
    recipe = replace(
        FieldsRecipe(), natural_weight=1.0, per_attribute=4, largest_turn=0.08, roll_out=1
    )
    # Everybody is at degree 0, so a walk goes up; every one turns by exactly 0.08 rad.
    codes = Codes(w, torch.full((40, 5), -9.0), torch.zeros(40, 512))
    gone = torch.stack(
        [
            nature.degrees_moved(w, turn(w, axis.expand_as(w), 0.08), torch.full((40,), number))
            for number, axis in enumerate(nature.axes)
        ]
    ).mean()
    scaled = Nature(nature.axes * share / float(gone), nature.subspace)
    losses = walk_losses(
        nets,
        fields,
        codes,
        scaled,
        torch.ones(5),
        whitener(w),
        recipe,
        torch.Generator().manual_seed(3),
    )
    lacking = float(losses["natural"].detach())
    if expected == 0.0:
        assert lacking < 0.5  # asked for up to three degrees, two are gone
    else:
        assert 0.5 <= lacking < 0.9  # half a degree of one, two or three
