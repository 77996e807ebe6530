"""Metrics against closed forms and independent implementations."""

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from evaluation.metrics import figure, psnr_db
from shared.errors import InvalidRequest


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    reference = torch.zeros(2, 3, 8, 8)
    image = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.02)])
    expected = torch.tensor([20 * math.log10(2 / 0.2), 20 * math.log10(2 / 0.02)])
    torch.testing.assert_close(psnr_db(image, reference), expected)


def test_psnr_agrees_with_torchmetrics(generator: torch.Generator) -> None:
    a, b = torch.rand(2, 1, 3, 16, 16, generator=generator) * 2 - 1
    theirs = peak_signal_noise_ratio(a, b, data_range=2.0)
    torch.testing.assert_close(psnr_db(a, b)[0], theirs)


def test_psnr_refuses_pictures_of_different_shapes() -> None:
    with pytest.raises(InvalidRequest, match=r"\(1, 3, 8, 8\).*\(1, 3, 4, 4\)"):
        psnr_db(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4))


def test_interval_is_that_of_the_normal_law(generator: torch.Generator) -> None:
    found = figure(torch.randn(400, generator=generator) + 3, resamples=4000)
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.1)
    assert found.count == 400


def test_no_samples_have_no_mean() -> None:
    with pytest.raises(InvalidRequest, match="got 0"):
        figure(torch.empty(0))
