"""Symbols: pairing, the power constraint, SNR and bandwidth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import InvalidRequest
from shared.symbols import (
    Reception,
    average_power,
    capacity,
    cbr,
    check_snr_db,
    noise_variance_to_snr_db,
    normalise_power,
    snr_db_to_noise_variance,
    to_complex,
    to_real,
)

# The same examples in every run, however busy the machine is.
REPEATABLE = settings(derandomize=True, deadline=None)
BAD_SNRS = [math.nan, math.inf, -math.inf, -100.0, 1000.0, -20.1, 40.1]


def _random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ---- pairing --------------------------------------------------------------------------------


def test_first_half_is_the_real_part_and_nothing_is_scaled() -> None:
    x = to_complex(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert torch.equal(x, torch.tensor([[1 + 3j, 2 + 4j]]))


@REPEATABLE
@given(rows=st.integers(0, 4), pairs=st.integers(1, 32), seed=st.integers(0, 2**31))
def test_pairing_round_trips_exactly(rows: int, pairs: int, seed: int) -> None:
    reals = _random(rows, 2 * pairs, seed)
    x = to_complex(reals)
    assert x.shape == (rows, pairs)
    assert x.dtype == torch.complex64
    assert torch.equal(to_real(x), reals)


@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 2, 2)])
def test_reals_that_do_not_pair_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"expected \[B, 2n\]"):
        to_complex(torch.zeros(shape))


def test_types_are_not_mixed_up() -> None:
    with pytest.raises(InvalidRequest, match="float"):
        to_complex(torch.zeros(1, 4, dtype=torch.complex64))
    with pytest.raises(InvalidRequest, match="complex64"):
        to_real(torch.zeros(1, 4))


# ---- power ----------------------------------------------------------------------------------


@REPEATABLE
@given(seed=st.integers(0, 2**31), scale_db=st.floats(-60, 60))
def test_power_is_one_for_every_message_whatever_its_neighbours(seed: int, scale_db: float) -> None:
    messages = to_complex(_random(3, 64, seed))
    messages[1] *= 10 ** (scale_db / 20)
    x = normalise_power(messages)
    assert average_power(x) == pytest.approx(torch.ones(3), rel=1e-5)
    # Alone or in a batch: the same symbols.
    assert torch.equal(normalise_power(messages[:1]), x[:1])


def test_power_counts_both_parts() -> None:
    assert average_power(torch.tensor([[3 + 4j, 0j]])) == pytest.approx(torch.tensor([12.5]))
    assert average_power(torch.tensor([[3.0, 4.0]])) == pytest.approx(torch.tensor([12.5]))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_silence_and_nonsense_cannot_be_normalised(value: float) -> None:
    with pytest.raises(InvalidRequest, match="message power is"):
        normalise_power(torch.full((2, 4), value, dtype=torch.complex64))


def test_gradients_pass_through_normalisation() -> None:
    reals = _random(2, 8).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda r: to_real(normalise_power(to_complex(r))), reals)


# ---- SNR ------------------------------------------------------------------------------------


@REPEATABLE
@given(snr_db=st.floats(-20, 40), power=st.floats(0.1, 10))
def test_snr_round_trips(snr_db: float, power: float) -> None:
    noise_variance = snr_db_to_noise_variance(snr_db, power)
    assert noise_variance_to_snr_db(noise_variance, power) == pytest.approx(snr_db, abs=1e-9)


def test_snr_of_tensors_is_the_snr_of_numbers() -> None:
    snrs = torch.tensor([-20.0, 0.0, 6.0, 40.0])
    variances = snr_db_to_noise_variance(snrs)
    assert variances == pytest.approx([snr_db_to_noise_variance(float(s)) for s in snrs])
    assert noise_variance_to_snr_db(variances) == pytest.approx(snrs, abs=1e-5)
    assert snr_db_to_noise_variance(0.0) == 1.0
    assert snr_db_to_noise_variance(3.0) == pytest.approx(0.501, abs=1e-3)


@pytest.mark.parametrize("snr_db", BAD_SNRS)
def test_bad_snr_is_refused_with_both_numbers(snr_db: float) -> None:
    for value in (snr_db, torch.tensor([6.0, snr_db])):
        with pytest.raises(InvalidRequest, match=rf"snr_db is {snr_db:g}; .*-20\.\.40 dB"):
            check_snr_db(value)


@pytest.mark.parametrize("snr_db", [-20, -20.0, 0, 40.0])
def test_the_ends_of_the_range_are_in_it(snr_db: float) -> None:
    check_snr_db(snr_db)


def test_512_reals_carry_few_bits() -> None:
    bits = [round(256 * capacity(snr)) for snr in (-6, 0, 6, 12, 18)]
    assert bits == [83, 256, 593, 1043, 1537]


# ---- bandwidth ------------------------------------------------------------------------------


def test_cbr_both_ways() -> None:
    ratio = cbr(256, 128, 128)
    assert ratio.paper == pytest.approx(0.0104, abs=5e-5)  # the paper's table
    assert ratio.complex_uses == ratio.paper / 2
    assert ratio.uses == 256
    assert cbr(256, 1024, 1024).paper == pytest.approx(0.0002, abs=5e-5)


def test_pilots_and_headers_are_paid_for() -> None:
    ratio = cbr(256, 128, 128, pilots=8, header_uses=4)
    assert ratio.uses == 268
    assert ratio.paper == pytest.approx(2 * 268 / (3 * 128 * 128))


@pytest.mark.parametrize("bad", [(-1, 128, 128), (256, 0, 128), (256, 128, -1)])
def test_cbr_of_nothing_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidRequest, match="expected"):
        cbr(*bad)


# ---- reception ------------------------------------------------------------------------------


def test_a_reception_knows_the_fading_or_pilots_and_never_both() -> None:
    y, h, n0 = torch.zeros(2, 4) + 0j, torch.ones(2, 1) + 0j, torch.ones(2)
    Reception(y=y, h=h, pilots=None, noise_variance=n0)
    Reception(y=y, h=torch.ones(2, 4) + 0j, pilots=None, noise_variance=n0)
    Reception(y=y, h=None, pilots=torch.ones(2, 8) + 0j, noise_variance=n0)
    with pytest.raises(InvalidRequest, match="neither"):
        Reception(y=y, h=None, pilots=None, noise_variance=n0)
    with pytest.raises(InvalidRequest, match="both"):
        Reception(y=y, h=h, pilots=h, noise_variance=n0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 4)}, "y has shape"),
        ({"h": torch.ones(3, 1) + 0j}, "h has shape"),
        ({"h": torch.ones(2, 2) + 0j}, "h has shape"),
        ({"h": None, "pilots": torch.ones(1, 8) + 0j}, "pilots have shape"),
        ({"noise_variance": torch.ones(2, 1)}, "noise_variance has shape"),
    ],
)
def test_shapes_of_a_reception_must_agree(change: dict[str, Tensor | None], message: str) -> None:
    parts: dict[str, Tensor | None] = {
        "y": torch.zeros(2, 4) + 0j,
        "h": torch.ones(2, 1) + 0j,
        "pilots": None,
        "noise_variance": torch.ones(2),
    }
    with pytest.raises(InvalidRequest, match=message):
        Reception(**{**parts, **change})  # type: ignore[arg-type]
