"""Metrics against closed forms and independent implementations."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
)
from torchmetrics.image.kid import poly_mmd

from evaluation.metrics import (
    MS_SSIM_WEIGHTS,
    coded_errors,
    cosine,
    figure,
    frechet_distance,
    frechet_figure,
    gain_figure,
    kernel_distance,
    kernel_figure,
    ms_ssim,
    ms_ssim_scales,
    non_target_drift,
    peak_memory_mib,
    psnr_db,
)
from shared.attributes import Attribute
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


def _ms_ssim_by_scipy(x: NDArray[np.float64], y: NDArray[np.float64], scales: int) -> float:
    """One picture [3, S, S] in 0..1, after the paper: full filters, then only what they fill."""
    taps = scipy.signal.windows.gaussian(11, 1.5)
    taps = taps / taps.sum()

    def blur(z: NDArray[np.float64]) -> NDArray[np.float64]:
        across = scipy.signal.convolve(z, taps[None, None, :], mode="valid", method="direct")
        return np.asarray(
            scipy.signal.convolve(across, taps[None, :, None], mode="valid", method="direct")
        )

    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    result = 1.0
    for scale, weight in enumerate(weights):
        mx, my = blur(x), blur(y)
        structure = (2 * (blur(x * y) - mx * my) + 0.0009) / (
            blur(x * x) - mx * mx + blur(y * y) - my * my + 0.0009
        )
        if scale == scales - 1:
            structure = structure * (2 * mx * my + 0.0001) / (mx * mx + my * my + 0.0001)
        result *= max(0.0, structure.mean()) ** weight
        x, y = (z.reshape(3, z.shape[1] // 2, 2, z.shape[2] // 2, 2).mean((2, 4)) for z in (x, y))
    return result


@pytest.mark.parametrize(("side", "scales"), [(32, 2), (128, 4), (192, 5)])
def test_ms_ssim_agrees_with_scipy_and_torchmetrics(
    side: int, scales: int, generator: torch.Generator
) -> None:
    small = torch.rand(3, 3, side // 8, side // 8, generator=generator)
    a = torch.nn.functional.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)
    noise = torch.randn(a.shape, generator=generator)
    b = (a + torch.tensor([0.02, 0.1, 0.4]).view(3, 1, 1, 1) * noise).clamp(0, 1)
    assert ms_ssim_scales(side) == scales
    ours = ms_ssim(2 * b - 1, 2 * a - 1)
    for number in range(3):
        exact = _ms_ssim_by_scipy(b[number].double().numpy(), a[number].double().numpy(), scales)
        assert float(ours[number]) == pytest.approx(exact, abs=2e-6)
    weights = torch.tensor(MS_SSIM_WEIGHTS[:scales])
    theirs = multiscale_structural_similarity_index_measure(
        b, a, data_range=1.0, betas=tuple((weights / weights.sum()).tolist()), reduction="none"
    )
    assert isinstance(theirs, Tensor)
    # torchmetrics lets mirrored borders into its last scale; the definition does not. At 32 px that
    # is most of the picture.
    torch.testing.assert_close(ours, theirs, atol=5e-3 if side > 100 else 0.1, rtol=0)


def test_ms_ssim_of_equal_pictures_is_one() -> None:
    picture = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    assert float(ms_ssim(picture, picture)) == pytest.approx(1)
    with pytest.raises(InvalidRequest, match="8 px"):
        ms_ssim_scales(8)


def test_cosine_and_drift_by_hand() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert float(cosine(a, b)) == pytest.approx(24 / 25)
    before = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    after = torch.tensor([[5.0, 1.5, 2.0, 2.0, 4.5]])
    assert float(non_target_drift(before, after, Attribute.BANGS)) == pytest.approx(2 / 4)
    assert float(non_target_drift(before, after, None)) == pytest.approx(7 / 5)


def _with_moments(mean: Tensor, root: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Samples whose own mean and covariance are exactly mean and root root^T."""
    x = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1)))
    made: Tensor = mean + x @ white.T @ root.T
    return made


def test_frechet_distance_of_gaussians_is_its_closed_form(generator: torch.Generator) -> None:
    zeros, eye = torch.zeros(4).double(), torch.eye(4).double()
    a = _with_moments(zeros, eye, 50, generator)
    shifted = _with_moments(zeros + 2, 3 * eye, 70, generator)
    # |m|^2 + tr (sigma_a - sigma_b)^2 = 4 x 4 + 4 x (3 - 1)^2
    assert frechet_distance(a, shifted) == pytest.approx(16 + 16)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(40, 12), (9, 12)])
def test_frechet_distance_agrees_with_a_matrix_root(
    rows: int, columns: int, generator: torch.Generator
) -> None:
    """The textbook formula with scipy's square root; below, with fewer pictures than dimensions."""
    a = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    b = torch.randn(rows + 3, columns, generator=generator, dtype=torch.float64) @ mix + 0.5
    x, y = a.numpy(), b.numpy()
    ca, cb = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # The product of two covariances of low rank has no principal square root of its own; this
    # symmetric one does: tr (Ca Cb)^(1/2) = tr (Ca^(1/2) Cb Ca^(1/2))^(1/2).
    values, axes = scipy.linalg.eigh(ca)
    root = axes @ np.diag(np.sqrt(np.clip(values, 0, None))) @ axes.T
    common = np.sqrt(np.clip(scipy.linalg.eigvalsh(root @ cb @ root), 0, None)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * common
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_agrees_with_torchmetrics(generator: torch.Generator) -> None:
    a = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(20, 6, generator=generator, dtype=torch.float64) * 1.3 + 0.2
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_kernel_distance_is_unbiased(generator: torch.Generator) -> None:
    """Zero on average for sets of one law; and the closed form for a shifted mean in one dimension.

    With x ~ N(m, 1): E k(x, x') = 1 + 3 m^2 + 3 E(x x')^2 + E(x x')^3, whose terms are
    3 (1 + m^2)^2 and (m^3 + 3 m)^2.
    """
    same, shifted = [], []
    for _ in range(400):
        a, b = torch.randn(2, 12, 1, generator=generator, dtype=torch.float64)
        same.append(kernel_distance(a, b))
        shifted.append(kernel_distance(a, b + 0.5))

    def moments(m: float) -> tuple[float, float, float]:
        return m, 1 + m * m, m**3 + 3 * m

    (a1, a2, a3), (b1, b2, b3) = moments(0.0), moments(0.5)
    exact = 3 * (a1 - b1) ** 2 + 3 * (a2 - b2) ** 2 + (a3 - b3) ** 2
    error = float(torch.tensor(same).std()) / 20
    assert float(np.mean(same)) == pytest.approx(0, abs=4 * error)
    assert float(np.mean(shifted)) == pytest.approx(
        exact, abs=4 * float(torch.tensor(shifted).std()) / 20
    )


def test_paired_sets_that_are_equal_are_at_distance_zero(generator: torch.Generator) -> None:
    a = torch.randn(10, 5, generator=generator)
    assert kernel_distance(a, a, paired=True) == pytest.approx(0, abs=1e-12)
    assert kernel_distance(a, a) != pytest.approx(0, abs=1e-6)
    found = kernel_figure(a, a, resamples=50)
    assert (found.low, found.high) == pytest.approx((0, 0), abs=1e-12)
    assert frechet_figure(a, a, resamples=5).high == pytest.approx(0, abs=1e-9)


def test_intervals_of_set_distances_hold_the_distance(generator: torch.Generator) -> None:
    a = torch.randn(60, 3, generator=generator)
    b = a + 0.3 * torch.randn(60, 3, generator=generator) + 0.5
    kernel, frechet = kernel_figure(a, b), frechet_figure(a, b)
    assert kernel.low < kernel.mean < kernel.high
    assert frechet.low < frechet.mean < frechet.high
    assert kernel.count == frechet.count == 60
    # As with embeddings: more dimensions than pictures, where resamples are all farther apart.
    a = torch.randn(30, 64, generator=generator)
    wide = frechet_figure(a, a + 0.5 * torch.randn(30, 64, generator=generator))
    assert wide.low < wide.mean < wide.high


def test_gain_is_the_share_by_which_ours_is_smaller(generator: torch.Generator) -> None:
    theirs = 2 + torch.rand(50, generator=generator)
    found = gain_figure(0.25 * theirs, theirs)
    assert (found.low, found.mean, found.high) == pytest.approx((0.75, 0.75, 0.75))


def test_interval_is_that_of_the_normal_law(generator: torch.Generator) -> None:
    found = figure(torch.randn(400, generator=generator) + 3, resamples=4000)
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.1)
    assert found.count == 400


def test_coded_errors_are_counted() -> None:
    found = coded_errors([0.0, 0.25], [4, 4], [0, 3], [True, False])
    assert found.ber.mean == pytest.approx(0.125)
    assert found.bler == pytest.approx(3 / 8)
    assert found.outage.mean == pytest.approx(0.5)
    with pytest.raises(InvalidRequest, match="more lost blocks"):
        coded_errors([0.0], [1], [2], [False])
    with pytest.raises(InvalidRequest, match="equal counts"):
        coded_errors([0.0], [1, 1], [0], [True])


def test_memory_is_that_of_a_process_with_torch() -> None:
    assert 50 < peak_memory_mib() < 100_000


def test_no_samples_have_no_mean() -> None:
    with pytest.raises(InvalidRequest, match="got 0"):
        figure(torch.empty(0))
    with pytest.raises(InvalidRequest, match="at least 2 rows"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(InvalidRequest, match=r"\(3, 2\).*\(4, 2\)"):
        kernel_figure(torch.zeros(3, 2), torch.zeros(4, 2))
