"""SNR adapters: a latent of 512 reals as 256 symbols, and back; one pair serves every SNR.

    w --> s = T A (w - mean) --> a(N0) s + R_enc(s, SNR) --> pair, unit power --> x
                                                                                  |
    w_hat <-- mean + S T'(u g LMMSE(r) + b + R_dec(r, SNR)) <-- unpair, r <-- x_hat

The linear part is a closed form. A turns the latent into uncorrelated components of variance
lambda_i; water-filling gives component i the power p_i that minimises what the best linear receiver
leaves (Lee and Petersen, "Optimal linear coding for vector channels", 1976):

    D = sum_i lambda_i N0 / (p_i + N0),    p_i = max(0, mu sqrt(lambda_i) - N0),   sum_i p_i = k

Untrained, lambda = 1 and A = S = I: the latent is sent as it is and shrunk by 1 / (1 + N0), which
is the posterior mean of unit-variance components. `LinearCode.fit` replaces that by the principal
axes of real latents. What squared error likes is not all that a picture's judges like, so where
`turned` says so both ends turn the white components by learned matrices T and T' into others that
matter more to those, and power is filled by weights of their own; the decoder scales and shifts
each by the SNR, g and b. With T = I, g = 1 and b = 0 that is the closed form again. The residuals R
are the paper's adapters, four Linear(k, k) with LeakyReLU; their last layer starts at zero, so
training begins at the linear code and can only leave it for something better. They are modulated by
the SNR (FiLM), or there is one of them per SNR class.

The linear code gives the posterior mean. Its norm is smaller than the latent's on purpose: the
synthesis network is trained on such latents. No scalar of the message crosses beside the symbols:
u, which undoes the scale that the power constraint took, is found from |w|^2 = k (`undo_scale`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.symbols import (
    check_snr_db,
    normalise_power,
    snr_db_to_noise_variance,
    to_complex,
    to_real,
)

PAPER_SNRS_DB = (-6.0, 0.0, 6.0, 12.0, 18.0)
_NEPER = math.log(10) / 10  # sigmoid(-_NEPER snr_db) = N0 / (1 + N0)
NET = "adapters"
NET_PER_SNR = "adapters_per_snr"


@dataclass(frozen=True)
class AdapterConfig:
    """latent: k reals, so k / 2 symbols. layers: Linear(k, k) per residual.

    snr_low_db, snr_high_db: the range the modulation tells apart; beyond it only the closed form
    follows the SNR. classes_db: SNR classes with a residual each (the paper: -6, 0, 6, 12, 18);
    empty for one residual modulated by the SNR. turned: whether the components are turned, and the
    received ones scaled and shifted.
    """

    latent: int = 512
    layers: int = 4
    snr_low_db: float = -10.0
    snr_high_db: float = 20.0
    snr_features: int = 8
    classes_db: tuple[float, ...] = ()
    turned: bool = False

    def __post_init__(self) -> None:
        if self.latent < 2 or self.latent % 2 or self.layers < 2:
            raise InvalidRequest(
                f"got latent={self.latent}, layers={self.layers}; "
                "expected an even latent and at least 2 layers"
            )
        # JSON knows no tuples; a config read back from a bundle equals the one that was written.
        object.__setattr__(self, "classes_db", tuple(float(snr) for snr in self.classes_db))

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "AdapterConfig":
        """Read what `to_json` wrote."""
        return cls(**config)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `bundle.json`."""
        return {**asdict(self), "classes_db": list(self.classes_db)}


@dataclass(frozen=True)
class LinearCode:
    """The closed form: w = mean + S s, s = A (w - mean), Var s_i = spectrum_i, largest first.

    mean [k], analysis A [k, k], synthesis S = A^-1 [k, k], spectrum [k].
    """

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor
    spectrum: Tensor

    @classmethod
    def identity(cls, latent: int) -> "LinearCode":
        """White latents of zero mean: nothing to turn, nothing to favour."""
        eye = torch.eye(latent)
        return cls(torch.zeros(latent), eye, eye.clone(), torch.ones(latent))

    @classmethod
    def fit(cls, latents: Tensor, metric: Tensor | None = None) -> "LinearCode":
        """Principal components of latents [N, k], for the distortion e^T M e.

        metric: M [k, k], symmetric positive definite: how much the picture changes along each
        direction of the latent; the identity (plain mean squared error) when None.
        With C the covariance and M^1/2 C M^1/2 = V diag(lambda) V^T: A = V^T M^1/2, S = M^-1/2 V.
        """
        if latents.ndim != 2 or latents.shape[0] < 2:
            raise InvalidRequest(f"latents have shape {list(latents.shape)}; expected [N > 1, k]")
        data = latents.double()
        mean = data.mean(dim=0)
        covariance = (data - mean).T @ (data - mean) / (data.shape[0] - 1)  # [k, k]
        root = inverse_root = torch.eye(data.shape[1], dtype=torch.float64, device=data.device)
        if metric is not None:
            scale, axes = torch.linalg.eigh(metric.double())
            scale = scale / scale.mean()
            if float(scale.min()) <= 0:
                raise InvalidRequest("the metric is singular; expected a positive definite matrix")
            root = axes * scale.sqrt() @ axes.T
            inverse_root = axes * scale.rsqrt() @ axes.T
        spectrum, basis = torch.linalg.eigh(root @ covariance @ root)
        spectrum, basis = spectrum.flip(0), basis.flip(1)  # largest first
        # Fewer latents than dimensions leave zeros; a floor keeps every component decodable.
        spectrum = spectrum.clamp_min(1e-3 * float(spectrum.mean()))
        return cls(
            mean.float(),
            (basis.T @ root).float(),
            (inverse_root @ basis).float(),
            spectrum.float(),
        )

    def distortion(self, noise_variance: Tensor) -> Tensor:
        """D / sum lambda, the share of the variance that the linear code leaves: N0 [B] -> [B]."""
        power = water_fill(self.spectrum, noise_variance)  # [B, k]
        noise = noise_variance.unsqueeze(1)  # [B, 1]
        return (self.spectrum * noise / (power + noise)).sum(dim=1) / self.spectrum.sum()


def water_fill(spectrum: Tensor, noise_variance: Tensor) -> Tensor:
    """Powers p [B, k] with sum_i p_i = k that minimise sum_i lambda_i N0 / (p_i + N0).

    spectrum: lambda [k], largest first. noise_variance: N0 [B]; power 1 and noise N0 per real
    component are the same ratio as P = 1 and N0 per complex symbol.
    """
    root = spectrum.sqrt()  # [k]
    noise = noise_variance.unsqueeze(1)  # [B, 1]
    count = torch.arange(1, len(root) + 1, device=root.device)
    # The water level if exactly the m strongest components got power, for every m at once.
    level = (len(root) + count * noise) / root.cumsum(0)  # [B, k]
    active = (level * root > noise).sum(dim=1, keepdim=True).clamp_min(1)  # [B, 1]
    mu = level.gather(1, active - 1)  # [B, 1]
    return (mu * root - noise).clamp_min(0)


def undo_scale(
    moved: Tensor, mean: Tensor, energies: Tensor, power: Tensor, noise: Tensor
) -> Tensor:
    """What to multiply the linear estimate v of w - mean by: [B, 1], close to 1.

    Uneven power makes the power of a message fluctuate, and normalising it scales the message by
    an unknown c. No scalar crosses for that: |w|^2 = k is known at both ends, so with D the error
    of the estimate, u = 1 / c solves

        |mean + u v|^2 = k - D,    D = sum_i d_i,    d_i = l_i N0 / (p_i + N0)

    The solution errs with the noise, Var ln u ~ sum (4 (l - d) d + 2 d^2) / (2 sum (l - d))^2, and
    c varies by tau^2 = (sum p^2 - (sum p l)^2 / sum l^2) / (2 k^2) only: what of the message's
    power |w|^2 does not fix already, nothing when p is even. So u is believed as far as Wiener's
    rule says, u^(tau^2 / (tau^2 + Var ln u)).

    moved: v [B, k]. energies: l_i = lambda_i |S_i|^2 [k]. power: p [B, k]. noise: N0 [B, 1].
    """
    k = len(energies)
    left = energies * noise / (power + noise)  # d, [B, k]
    kept = energies - left
    norm = moved.square().sum(dim=1).clamp_min(1e-12)  # |v|^2, [B]
    cross = moved @ mean  # mean . v, [B]
    rest = k - left.sum(dim=1) - mean.square().sum()  # k - D - |mean|^2
    solution = ((cross.square() + norm * rest).clamp_min(1e-6).sqrt() - cross) / norm
    spread = (4 * kept * left + 2 * left.square()).sum(dim=1) / (2 * kept.sum(dim=1)).square()
    fixed = (power * energies).sum(dim=1).square() / energies.square().sum()
    tau = (power.square().sum(dim=1) - fixed).clamp_min(0) / (2 * k * k)
    trust = tau / (tau + spread + 1e-6)  # [B], 0..1
    return solution.clamp(0.1, 10.0).pow(trust).unsqueeze(1)


class _Bumps(nn.Module):
    """Overlapping bumps over the SNR range: [B, snrs] dB -> [B, snrs x features]."""

    centres: Tensor

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        centres = torch.linspace(config.snr_low_db, config.snr_high_db, config.snr_features)
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, snrs_db: Tensor) -> Tensor:
        low, high = self.centres[0], self.centres[-1]
        step = (high - low) / (len(self.centres) - 1)
        inside = torch.minimum(torch.maximum(snrs_db, low), high).unsqueeze(2)
        return torch.exp(-0.5 * ((inside - self.centres) / step).square()).flatten(1)


class _Residual(nn.Module):
    """Linear(k, k) x layers with LeakyReLU .2, scaled and shifted by the SNR; zero at the start."""

    def __init__(self, config: AdapterConfig, snrs: int) -> None:
        super().__init__()
        k, self.layers = config.latent, config.layers
        linears = [nn.Linear(k, k) for _ in range(config.layers)]
        nn.init.zeros_(linears[-1].weight)
        nn.init.zeros_(linears[-1].bias)
        self.linears = nn.ModuleList(linears)
        self.film: nn.Sequential | None = None
        if snrs:
            last = nn.Linear(64, 2 * k * (config.layers - 1))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.film = nn.Sequential(nn.Linear(snrs * config.snr_features, 64), nn.SiLU(), last)
            self.bumps = _Bumps(config)

    def forward(self, s: Tensor, snrs_db: Tensor) -> Tensor:
        """s [B, k], snrs_db [B, snrs] -> [B, k]."""
        scales: tuple[Tensor, ...] = ()
        if self.film is not None:
            scales = self.film(self.bumps(snrs_db)).chunk(2 * (self.layers - 1), dim=1)
        for number, linear in enumerate(self.linears):
            s = linear(s)
            if number == self.layers - 1:
                break
            if scales:
                s = s * (1 + scales[2 * number]) + scales[2 * number + 1]
            s = F.leaky_relu(s, 0.2)
        # The closed form is off by at most what the noise leaves, so a correction is of that size;
        # without noise, and far above the SNRs of the training, it is none.
        return s if self.film is None else s * torch.sigmoid(-_NEPER * snrs_db[:, -1:]).sqrt()


class _Residuals(nn.Module):
    """One modulated residual, or one per SNR class and the nearest class is used."""

    classes: Tensor

    def __init__(self, config: AdapterConfig, snrs: int) -> None:
        super().__init__()
        several = len(config.classes_db)
        self.banks = nn.ModuleList(
            [_Residual(config, 0 if several else snrs) for _ in range(max(1, several))]
        )
        self.register_buffer("classes", torch.tensor(config.classes_db), persistent=False)

    def forward(self, s: Tensor, snrs_db: Tensor) -> Tensor:
        """The first column of snrs_db [B, snrs] decides the class: both ends know that one."""
        if len(self.banks) == 1:
            only: Tensor = self.banks[0](s, snrs_db)
            return only
        nearest = (snrs_db[:, :1] - self.classes).abs().argmin(dim=1)  # [B]
        out = torch.zeros_like(s)
        for number, bank in enumerate(self.banks):
            chosen = (nearest == number).nonzero().squeeze(1)
            if len(chosen):
                out = out.index_copy(0, chosen, bank(s[chosen], snrs_db[chosen]))
        return out


class ChannelEncoder(nn.Module):
    """Channel encoder adapter A_CE: latent -> symbols.

    turn [k, k], weights [k]: T, and the spectrum that power is filled by, where the config says so.
    """

    mean: Tensor
    analysis: Tensor
    spectrum: Tensor
    weights: Tensor

    def __init__(self, config: AdapterConfig | None = None, code: LinearCode | None = None) -> None:
        super().__init__()
        self.config = config or AdapterConfig()
        code = code or LinearCode.identity(self.config.latent)
        self.register_buffer("mean", code.mean)
        self.register_buffer("analysis", code.analysis)
        self.register_buffer("spectrum", code.spectrum)
        if self.config.turned:
            self.turn = nn.Parameter(torch.eye(self.config.latent))
            self.register_buffer("weights", code.spectrum.clone())
        self.residual = _Residuals(self.config, snrs=1)

    @classmethod
    def from_bundle(cls, bundle: Bundle, net: str = NET) -> "ChannelEncoder":
        """The bundle's encoder; see `Adapters.from_bundle`."""
        return Adapters.from_bundle(bundle, net).encoder

    def forward(self, w: Tensor, snr_db: float | Tensor) -> Tensor:
        """w [B, k] (zero mean, |w|^2 = k), snr_db (average, -20..40 dB, a number or [B])
        -> x [B, k/2] complex64, (1/n) sum |x_i|^2 = 1 for every message.

        Raises InvalidRequest for another shape, an SNR out of range or a latent without direction.
        """
        _check_matrix("latent", w, self.config.latent)
        check_snr_db(snr_db)
        snr = _per_message(snr_db, w)  # [B]
        white = (w - self.mean) @ self.analysis.T / self.spectrum.sqrt()  # [B, k], unit variance
        levels = self.spectrum
        if self.config.turned:
            white, levels = white @ self.turn.T, self.weights
        power = water_fill(levels, snr_db_to_noise_variance(snr))  # [B, k]
        sent = white * power.sqrt() + self.residual(white, snr.unsqueeze(1))
        return normalise_power(to_complex(sent))  # [B, k/2]


class ChannelDecoder(nn.Module):
    """Channel decoder adapter A_CD: equalised symbols -> posterior-mean latent.

    turn [k, k], weights [k], affine: T', the encoder's weights, and g - 1 and b by the two SNRs,
    where the config says so.
    """

    mean: Tensor
    synthesis: Tensor
    spectrum: Tensor
    weights: Tensor

    def __init__(self, config: AdapterConfig | None = None, code: LinearCode | None = None) -> None:
        super().__init__()
        self.config = config or AdapterConfig()
        code = code or LinearCode.identity(self.config.latent)
        self.register_buffer("mean", code.mean.clone())
        self.register_buffer("synthesis", code.synthesis)
        self.register_buffer("spectrum", code.spectrum.clone())
        if self.config.turned:
            k = self.config.latent
            self.turn = nn.Parameter(torch.eye(k))
            self.register_buffer("weights", code.spectrum.clone())
            self.bumps = _Bumps(self.config)
            self.affine = nn.Linear(2 * self.config.snr_features, 2 * k, bias=False)
            nn.init.zeros_(self.affine.weight)
        self.residual = _Residuals(self.config, snrs=2)
        self._kept: tuple[object, tuple[Tensor, Tensor]] | None = None  # see `_spread`

    @classmethod
    def from_bundle(cls, bundle: Bundle, net: str = NET) -> "ChannelDecoder":
        """The bundle's decoder; see `Adapters.from_bundle`."""
        return Adapters.from_bundle(bundle, net).decoder

    def forward(
        self, x_hat: Tensor, snr_db: float | Tensor, sent_snr_db: float | Tensor | None = None
    ) -> Tensor:
        """x_hat [B, k/2] complex64, equalised to gain one -> w_hat [B, k].

        snr_db: SNR after equalisation, any finite value (a deep fade may go below -20 dB).
        sent_snr_db: the average SNR that the encoder coded for, 10 log10(1 / N0); both ends know
            it. The same as snr_db when None, which is right without fading.
        """
        if not x_hat.is_complex():
            raise InvalidRequest(f"symbols are {x_hat.dtype}; expected complex64")
        _check_matrix("message", x_hat, self.config.latent // 2)
        received = math.sqrt(2) * to_real(x_hat)  # [B, k], unit power per real component
        snr = _per_message(snr_db, received)  # [B]
        sent = snr if sent_snr_db is None else _per_message(sent_snr_db, received)
        noise = snr_db_to_noise_variance(snr).unsqueeze(1)  # [B, 1]
        snrs = torch.stack((sent, snr), dim=1)  # [B, 2]
        spread, energies = self._spread()
        levels = self.weights if self.config.turned else self.spectrum
        power = water_fill(levels, snr_db_to_noise_variance(sent))  # [B, k]
        white = received * power.sqrt() / (power + noise)  # E[s | r] for unit variance
        moved = white @ spread.T  # [B, k]
        scale = undo_scale(moved, self.mean, energies, power, noise)  # [B, 1]
        # 1 / sqrt(1 + N0) brings whatever was received to unit variance for the network.
        seen = received / (1 + noise).sqrt()
        correction = self.residual(seen, snrs)
        if self.config.turned:
            gain, shift = self.affine(self.bumps(snrs)).chunk(2, dim=1)  # [B, k] each
            # Like the residual's, it is of the size of what the noise leaves.
            left = torch.sigmoid(-_NEPER * snrs[:, 1:]).sqrt()
            correction = correction + left * (gain * white + shift)
        latent: Tensor = self.mean + moved * scale + correction @ spread.T
        return latent  # [B, k]

    def _spread(self) -> tuple[Tensor, Tensor]:
        """White components to latents [k, k], and the energy of each [k].

        Kept while nothing it is made of changes: with a turn it is a product of 512 x 512 x 512.
        """
        parts = [self.synthesis, self.spectrum, *([self.turn] if self.config.turned else [])]
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            return self._spread_anew()
        key = tuple((part.data_ptr(), part._version, part.device) for part in parts)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = key, self._spread_anew()
        return self._kept[1]

    def _spread_anew(self) -> tuple[Tensor, Tensor]:
        spread = self.synthesis * self.spectrum.sqrt()
        if self.config.turned:
            spread = spread @ self.turn.T
        return spread, spread.square().sum(dim=0)


class Adapters(nn.Module):
    """Both ends, for training and for the bundle, which holds them as one net."""

    def __init__(self, config: AdapterConfig | None = None, code: LinearCode | None = None) -> None:
        super().__init__()
        self.config = config or AdapterConfig()
        self.encoder = ChannelEncoder(self.config, code)
        self.decoder = ChannelDecoder(self.config, code)

    @classmethod
    def from_bundle(cls, bundle: Bundle, net: str = NET) -> "Adapters":
        """The bundle's trained adapters; the untrained ones, which are a working code, where the
        bundle has no such net. Frozen, in evaluation mode."""
        if not bundle.has(net):
            return cls().eval().requires_grad_(False)
        return bundle.load_into(net, cls(AdapterConfig.from_json(bundle.config(net))))


def _check_matrix(name: str, x: Tensor, columns: int) -> None:
    if x.ndim != 2 or x.shape[1] != columns:
        raise InvalidRequest(f"{name} has shape {list(x.shape)}; expected [B, {columns}]")


def _per_message(value: float | Tensor, like: Tensor) -> Tensor:
    """One float32 number per row of `like`: [B]."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    if numbers.ndim > 1 or (numbers.ndim == 1 and numbers.shape[0] != like.shape[0]):
        raise InvalidRequest(
            f"snr_db has shape {list(numbers.shape)}; expected one number or [{like.shape[0]}]"
        )
    return numbers.expand(like.shape[0])
