"""Principal components against a full decomposition, and the channel's closed form."""

import pytest
import torch

from shared.adapters import LinearCode
from training.components import noisy, principal_components
from training.data import FaceSet


def test_channel_noise_leaves_the_posterior_mean() -> None:
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(400, 512, generator=draws)
    snr_db = torch.zeros(400)  # N0 = 1: half the variance of even components is lost
    error = (noisy(w, snr_db, draws, torch.ones(512)) - w).square().mean()
    assert float(error) == pytest.approx(0.5, rel=0.01)


def test_channel_loses_what_water_filling_says() -> None:
    """sum_i lambda_i N0 / (p_i + N0), the closed form's distortion, in any order of lambda."""
    draws = torch.Generator().manual_seed(1)
    spectrum = (2.0 ** -(torch.arange(64) / 4.0))[torch.randperm(64, generator=draws)]
    w = torch.randn(20_000, 64, generator=draws)
    received = noisy(w, torch.full((20_000,), -3.0), draws, spectrum)
    lost = ((received - w).square().mean(0) * spectrum).sum() / spectrum.sum()
    falling = spectrum.sort(descending=True).values
    code = LinearCode(torch.zeros(64), torch.eye(64), torch.eye(64), falling)
    expected = float(code.distortion(torch.tensor([10**0.3])))
    assert float(lost) == pytest.approx(expected, rel=0.02)


def test_components_are_those_of_the_data() -> None:
    """Against a full singular value decomposition, with weights, of faces and mirror images."""
    draws = torch.Generator().manual_seed(2)
    pictures = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=draws)
    faces = FaceSet(
        tuple(map(str, range(40))),
        pictures,
        torch.ones(40, 1, dtype=torch.int8),
        ("Male",),
        torch.arange(40),
        torch.zeros(40, 5, 2),
    )
    weight = 0.5 + torch.rand(1, 8, 8, generator=draws).expand(3, -1, -1)
    found = principal_components(faces, weight, 20)
    data = faces.batch(torch.arange(40))
    data = torch.cat([data, data.flip(3)]).flatten(1)
    centred = (data - data.mean(0)) * weight.flatten()
    singular = torch.linalg.svdvals(centred)
    torch.testing.assert_close(found.mean, data.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.deviation, singular[:20] / 80**0.5, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(found.axes @ found.axes.t(), torch.eye(20), rtol=1e-3, atol=1e-3)
