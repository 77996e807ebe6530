"""Several predictors as one: whose units, what a lone one sees, what the mean is."""

from pathlib import Path

import pytest
import torch

from shared.bundle import Bundle, write_net
from transmitter.opinions import OPINIONS, Opinions, onto
from transmitter.predictor import Predictor, PredictorConfig


def small(seed: int, stretch: float = 1.0) -> Predictor:
    torch.manual_seed(seed)
    net = Predictor(PredictorConfig(resolution=32, widths=(8, 8, 8), depths=(0, 0, 0)))
    with torch.no_grad():
        net.cuts.mul_(stretch)
    return net.eval().requires_grad_(False)


def test_a_cut_point_lands_on_the_cut_point_and_the_rest_between() -> None:
    cuts = torch.tensor([0.0, 2.0, 4.0, 7.0, 8.0]).expand(5, 5)
    others = torch.tensor([1.0, 2.0, 6.0, 8.0, 12.0]).expand(5, 5)
    mine = torch.tensor([-3.0, 0.0, 1.0, 4.0, 5.5, 8.0, 9.0])[:, None].expand(7, 5)
    want = torch.tensor([-2.0, 1.0, 1.5, 6.0, 7.0, 12.0, 13.0])[:, None].expand(7, 5)
    torch.testing.assert_close(onto(mine, cuts, others), want)
    torch.testing.assert_close(onto(mine, cuts, cuts), mine)


def test_degrees_survive_the_change_of_units(generator: torch.Generator) -> None:
    cuts = torch.randn(5, 5, generator=generator).sort().values
    others = torch.randn(5, 5, generator=generator).sort().values
    scores = 2 * torch.randn(200, 5, generator=generator)
    degrees = (scores[..., None] >= cuts).sum(-1)
    moved = onto(scores, cuts, others)
    assert torch.equal((moved[..., None] >= others - 1e-6).sum(-1), degrees)
    order = scores.argsort(0)
    assert (moved.gather(0, order).diff(dim=0) >= 0).all()


def test_one_alone_sees_what_it_always_saw(generator: torch.Generator) -> None:
    net = small(0)
    image = torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1
    guide = Opinions(net)
    assert torch.equal(guide.steady_scores(image), net.steady_scores(image))
    assert torch.equal(guide.degrees(image), net.score_degrees(net.steady_scores(image)))
    assert guide.cuts is net.cuts


def test_the_mean_is_in_the_units_of_the_first(generator: torch.Generator) -> None:
    nets = [small(0), small(1, 2.0), small(2, 0.5)]
    image = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    want = torch.stack(
        [
            nets[0].scores(image),
            onto(nets[1].scores(image.flip(3)), nets[1].cuts, nets[0].cuts),
            onto(nets[2].scores(image), nets[2].cuts, nets[0].cuts),
        ]
    ).mean(0)
    guide = Opinions(nets[0], nets[1:])
    torch.testing.assert_close(guide.steady_scores(image), want)
    torch.testing.assert_close(guide.score_logits(want), nets[0].score_logits(want))


def test_a_bundle_without_others_is_guided_by_its_predictor(tmp_path: Path) -> None:
    def write(name: str, net: Predictor) -> None:
        tensors = net.state_dict()
        write_net(tmp_path, name, config=net.config.to_json(), tensors=tensors, provenance={})

    write("predictor", small(0))
    assert len(Opinions.from_bundle(Bundle.open(tmp_path)).members) == 1
    write(OPINIONS[1], small(1))
    guide = Opinions.from_bundle(Bundle.open(tmp_path))
    assert len(guide.members) == 2
    assert all(not p.requires_grad for p in guide.parameters())


@pytest.mark.parametrize("count", [1, 3])
def test_scores_have_a_gradient(count: int, generator: torch.Generator) -> None:
    nets = [small(seed) for seed in range(count)]
    image = (torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1).requires_grad_(True)
    Opinions(nets[0], nets[1:]).steady_scores(image).sum().backward()
    assert image.grad is not None
    assert float(image.grad.abs().sum()) > 0
