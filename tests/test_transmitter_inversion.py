"""Inversion on a small untrained bundle: what the formulas promise, whatever the weights."""

import math
from pathlib import Path

import pytest
import torch

from shared.bundle import Bundle
from shared.errors import Cancelled, InvalidRequest
from shared.stylegan2 import Generator
from transmitter.inversion import InversionConfig, InversionEncoder, invert
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
