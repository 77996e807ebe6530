"""Inversion on a small untrained bundle: what the formulas promise, whatever the weights."""

import math
from pathlib import Path

import pytest
import torch

from shared.bundle import Bundle
from shared.errors import Cancelled, InvalidRequest
from shared.stylegan2 import Generator
from transmitter.inversion import InversionConfig, InversionEncoder, Projection, invert
from transmitter.predictor import Predictor

Nets = tuple[InversionEncoder, Generator, Predictor]


@pytest.fixture(scope="module")
def nets(random_bundle: Path) -> Nets:
    bundle = Bundle.open(random_bundle)
    return (
        InversionEncoder.from_bundle(bundle),
        Generator.from_bundle(bundle),
        Predictor.from_bundle(bundle),
    )


def drawn_face(generator: Generator, seed: int) -> torch.Tensor:
    z = torch.randn(1, generator.config.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        image: torch.Tensor = generator(z)
    return image


def objective(w: torch.Tensor, image: torch.Tensor, nets: Nets) -> float:
    _, generator, predictor = nets
    with torch.no_grad():
        made = generator.synthesis(w)
        return float((made - image).square().mean() + predictor.perceptual(made, image).mean())


def test_steps_lower_equation_8(nets: Nets) -> None:
    encoder, generator, predictor = nets
    image = drawn_face(generator, 1)
    losses = [
        objective(invert(image, encoder, generator, predictor, steps), image, nets)
        for steps in (0, 10, 60)
    ]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.5 * losses[0]


@pytest.mark.parametrize("steps", [0, 3])
def test_latents_stay_on_the_sphere(nets: Nets, steps: int) -> None:
    encoder, generator, predictor = nets
    w = invert(drawn_face(generator, 2), encoder, generator, predictor, steps)
    assert float(w.norm()) == pytest.approx(math.sqrt(512), rel=1e-5)
    assert not w.requires_grad


def test_no_steps_is_the_encoder_alone(nets: Nets) -> None:
    encoder, generator, predictor = nets
    image = drawn_face(generator, 3)
    torch.testing.assert_close(invert(image, encoder, generator, predictor, 0), encoder(image))


def test_a_caller_who_left_stops_the_descent(nets: Nets) -> None:
    encoder, generator, predictor = nets
    asked = iter([False, False, True])
    with pytest.raises(Cancelled, match="2 of 10"):
        invert(
            drawn_face(generator, 4),
            encoder,
            generator,
            predictor,
            10,
            cancelled=lambda: next(asked),
        )


def test_pictures_of_another_size_are_refused_with_both_shapes(nets: Nets) -> None:
    with pytest.raises(InvalidRequest, match=r"\(1, 3, 64, 64\).*32, 32"):
        nets[0](torch.zeros(1, 3, 64, 64))


def test_channel_counts_must_fit_the_size() -> None:
    with pytest.raises(InvalidRequest, match=r"got 2 .* expected 5"):
        InversionConfig(image_size=128, channels=(8, 8))


def test_a_projection_keeps_the_length_that_the_sphere_takes() -> None:
    """exp(level + spread w_D) times the direction gives the coordinates back, within 1 %."""
    projection = Projection(8, 512)
    projection.spread.fill_(0.2)
    draws = torch.Generator().manual_seed(0)
    length = torch.exp(0.2 * torch.randn(64, 1, generator=draws))
    coordinates = length * torch.randn(64, 511, generator=draws)
    w = projection.to_latent(coordinates)
    torch.testing.assert_close(w.norm(dim=1), torch.full((64,), math.sqrt(512)))
    scale = torch.exp(projection.level + projection.spread * w[:, -1:]) / math.sqrt(512)
    error = (w[:, :-1] * scale - coordinates).norm(dim=1) / coordinates.norm(dim=1)
    assert float(error.max()) < 0.02


def test_a_new_encoder_answers_the_projection_alone() -> None:
    torch.manual_seed(1)
    encoder = InversionEncoder(InversionConfig(32, (8, 8, 8), 16, draft_size=8)).eval()
    assert encoder.projection is not None
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = encoder.projection.to_latent(encoder.projection(image))
    torch.testing.assert_close(encoder(image), expected)
