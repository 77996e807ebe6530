"""How far received pictures are from what was sent and from what was asked, and how sure that is.

Metrics of one picture give a number per picture, [B]. Distances of sets (Frechet, kernel) give one
number for all pictures of a scheme, on an embedding that has to be named beside it: `fd_edgeface`
and `fd_inception` (which is FID) are different numbers. Nothing here loads a network.

Means come with percentile bootstrap intervals (Efron 1979) over pictures. A set distance is
recomputed for every resample: the kernel distance leaves pairs of equal pictures out of it, for
they would add k(x, x); the Frechet distance has a bias of its own with few pictures, so figures
with different N must not be compared.
"""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.attributes import Attribute
from shared.errors import InvalidRequest

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11  # px of the Gaussian window of SSIM, sigma 1.5
_SIGMA = 1.5
RESAMPLES = 1000


# ------------------------------------------------------------------------------ of single pictures


def psnr_db(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB [B] of pictures [B, 3, H, W] in [-1, 1] (peak to peak 2)."""
    _check_pair(image, reference)
    mse = (image - reference).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / mse)


def ms_ssim_scales(side: int) -> int:
    """Scales, 1..5, at which the 11 px window still fits: 5 from 176 px, 4 at 128, 2 at 32.

    Raises InvalidRequest below 11 px.
    """
    if side < _WINDOW:
        raise InvalidRequest(f"picture is {side} px; expected at least {_WINDOW}")
    scales = 1
    while scales < len(MS_SSIM_WEIGHTS) and side >> scales >= _WINDOW:
        scales += 1
    return scales


def ms_ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Multi-scale structural similarity [B] in 0..1 of pictures [B, 3, S, S] in [-1, 1].

        MS-SSIM = l_M^w_M c_M^w_M  prod_{j<M} c_j^w_j      (Wang, Simoncelli and Bovik 2003)

    At 128 px the fifth scale would be smaller than the window: the first four weights, scaled to
    the sum of one, are used. Negative structure counts as none.
    """
    _check_pair(image, reference)
    scales = ms_ssim_scales(min(image.shape[2:]))
    weights = torch.tensor(MS_SSIM_WEIGHTS[:scales], dtype=torch.float64)
    weights = weights / weights.sum()
    x, y = (image.double() + 1) / 2, (reference.double() + 1) / 2
    result = torch.ones(len(x), dtype=torch.float64)
    for scale in range(scales):
        similarity, structure = _ssim(x, y)
        part = similarity if scale == scales - 1 else structure
        result = result * part.clamp_min(0) ** weights[scale]
        if scale < scales - 1:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result.float()


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part, means over channels and positions: [B], [B]."""
    place = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    taps = torch.exp(-place.square() / (2 * _SIGMA**2))
    taps = taps / taps.sum()
    channels = x.shape[1]
    across = taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    down = taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1)

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, across, groups=channels), down, groups=channels)

    c1, c2 = 0.01**2, 0.03**2  # of a range of one
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x.square()
    var_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (luminance * structure).flatten(1).mean(1), structure.flatten(1).mean(1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [B] in -1..1 of embeddings [B, D]: identity, where the embedding is a recogniser's."""
    return F.cosine_similarity(a.double(), b.double(), dim=1).float()


def non_target_drift(before: Tensor, after: Tensor, edited: Attribute | None) -> Tensor:
    """Mean absolute change [B] of the other attributes' expected degrees [B, 5], in degrees.

    edited: the attribute that was to change, which does not count; None counts all five.
    """
    change = (after - before).abs()
    if edited is None:
        return change.mean(1)
    others = [i for i in range(change.shape[1]) if i != edited.index]
    return change[:, others].mean(1)


# ------------------------------------------------------------------------------------ of whole sets


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of embeddings [N, D], [M, D] as if they were Gaussian.

        |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2)          (Dowson and Landau 1982)

    The last trace is the sum of the singular values of A^T B with C_a = A A^T, C_b = B B^T, so no
    square root of a matrix is taken and fewer pictures than dimensions do no harm. Covariances
    divide by N - 1. Needs two pictures a set.
    """
    _check_sets(a, b, 2)
    x, y = a.double(), b.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    left = (x - mean_x) / (len(x) - 1) ** 0.5  # A^T [N, D]
    right = (y - mean_y) / (len(y) - 1) ** 0.5  # B^T [M, D]
    common = torch.linalg.svdvals(_thin(left) @ _thin(right).T).sum()
    traces = left.square().sum() + right.square().sum()
    return float((mean_x - mean_y).square().sum() + traces - 2 * common)


def _thin(rows: Tensor) -> Tensor:
    """At most as many rows as columns with the same Gram matrix rows^T rows: R of a QR."""
    if rows.shape[0] <= rows.shape[1]:
        return rows
    r: Tensor = torch.linalg.qr(rows, mode="r").R
    return r


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """k(x, y) = (x . y / D + 1)^3 (Binkowski et al. 2018): [N, D], [M, D] -> [N, M] float64."""
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def kernel_distance(a: Tensor, b: Tensor, paired: bool = False) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of embeddings, polynomial kernel.

    May be negative; zero on average where both sets have one law. a: [N, D], b: [M, D].
    paired: row i of both belongs to one picture. Then a_i and b_i are not independent and their
    kernel is left out (Gretton et al. 2012, Eq. 4), so that equal sets are at distance 0.
    """
    _check_sets(a, b, 2)
    if paired and len(a) != len(b):
        raise InvalidRequest(f"got {len(a)} and {len(b)} paired embeddings, expected equal counts")
    ones_a, ones_b = torch.ones(1, len(a)).double(), torch.ones(1, len(b)).double()
    kernels = polynomial_kernel(a, a), polynomial_kernel(b, b), polynomial_kernel(a, b)
    return float(_mmd(*kernels, ones_a, ones_b, paired)[0])


def _mmd(
    kaa: Tensor, kbb: Tensor, kab: Tensor, count_a: Tensor, count_b: Tensor, paired: bool
) -> Tensor:
    """MMD^2 of resamples: counts [R, N], [R, M] say how often each row was drawn -> [R].

    Pairs of one and the same row are left out, however often it was drawn.
    """

    def mean(kernel: Tensor, u: Tensor, v: Tensor, without_diagonal: bool) -> Tensor:
        total = ((u @ kernel) * v).sum(1)
        pairs = u.sum(1) * v.sum(1)
        if without_diagonal:
            both = u * v
            total = total - both @ kernel.diagonal()
            pairs = pairs - both.sum(1)
        return total / pairs.clamp_min(1)

    within = mean(kaa, count_a, count_a, True) + mean(kbb, count_b, count_b, True)
    return within - 2 * mean(kab, count_a, count_b, paired)


# ----------------------------------------------------------------------------------- and how sure


@dataclass(frozen=True)
class Figure:
    """A statistic over N samples with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (N = {self.count})"


def figure(samples: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """The mean of samples [N] and its percentile bootstrap interval (Efron 1979)."""
    values = samples.double().flatten()
    if not len(values):
        raise InvalidRequest("got 0 samples, expected at least one")
    means = values[_draws(len(values), resamples, seed)].mean(1)
    return _interval(float(values.mean()), means, len(values))


def gain_figure(ours: Tensor, theirs: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """1 - mean(ours) / mean(theirs), in -inf..1: the share by which ours is smaller.

    ours, theirs: [N], row by row of the same pictures, so both are resampled together.
    """
    _check_rows(ours, theirs)
    x, y = ours.double().flatten(), theirs.double().flatten()
    index = _draws(len(x), resamples, seed)
    gains = 1 - x[index].mean(1) / y[index].mean(1)
    return _interval(float(1 - x.mean() / y.mean()), gains, len(x))


def frechet_figure(a: Tensor, b: Tensor, resamples: int = 100, seed: int = 0) -> Figure:
    """Frechet distance of paired sets [N, D], both resampled together.

    A resample holds a third of its pictures twice or more, and fewer different ones are farther
    apart: all of its distances are too great. So the interval is their spread about their own mean,
    laid about the distance of the sets (bootstrap estimate of bias, Efron and Tibshirani 1993, 10).
    """
    _check_rows(a, b)
    index = _draws(len(a), resamples, seed)
    values = torch.tensor([frechet_distance(a[i], b[i]) for i in index], dtype=torch.float64)
    value = frechet_distance(a, b)
    return _interval(value, values - values.mean() + value, len(a))


def kernel_figure(a: Tensor, b: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """Kernel distance of paired sets [N, D], both resampled together."""
    _check_rows(a, b)
    n = len(a)
    index = _draws(n, resamples, seed)
    counts = torch.zeros(resamples, n, dtype=torch.float64)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    kernels = polynomial_kernel(a, a), polynomial_kernel(b, b), polynomial_kernel(a, b)
    values = _mmd(*kernels, counts, counts, True)
    return _interval(kernel_distance(a, b, paired=True), values, n)


def _draws(count: int, resamples: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(count, (resamples, count), generator=source)


def _interval(value: float, resampled: Tensor, count: int) -> Figure:
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(resampled, ends)
    return Figure(value, float(low), float(high), count)


# --------------------------------------------------------------------------- of links and processes


@dataclass(frozen=True)
class CodedErrors:
    """What a coded link lost.

    ber: wrong bits over bits, after channel decoding. bler: lost blocks over blocks. outage: share
    of messages that did not arrive whole.
    """

    ber: Figure
    bler: float
    outage: Figure


def coded_errors(
    bers: Sequence[float], blocks: Sequence[int], lost: Sequence[int], whole: Sequence[bool]
) -> CodedErrors:
    """From one entry per message; raises InvalidRequest where the counts do not fit together."""
    sizes = {len(bers), len(blocks), len(lost), len(whole)}
    if len(sizes) != 1 or not bers:
        raise InvalidRequest(f"got {sorted(sizes)} entries, expected equal counts of at least one")
    if any(bad > all_ or bad < 0 for bad, all_ in zip(lost, blocks, strict=True)):
        raise InvalidRequest("got more lost blocks than blocks in a message")
    return CodedErrors(
        ber=figure(torch.tensor(bers)),
        bler=sum(lost) / max(1, sum(blocks)),
        outage=figure(1.0 - torch.tensor([float(ok) for ok in whole])),
    )


def peak_memory_mib() -> float:
    """The most resident memory that this process had so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def _check_pair(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape or image.ndim != 4:
        raise InvalidRequest(
            f"got pictures of shapes {tuple(image.shape)} and {tuple(reference.shape)}, "
            "expected equal ones, [B, 3, H, W]"
        )


def _check_rows(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or not len(a):
        raise InvalidRequest(
            f"got paired samples of shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            "expected equal ones, at least one row"
        )


def _check_sets(a: Tensor, b: Tensor, least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise InvalidRequest(
            f"got embeddings of shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            f"expected [N, D] and [M, D] with at least {least} rows each"
        )
