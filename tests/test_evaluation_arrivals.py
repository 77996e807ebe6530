"""Arrivals of a load test: a Poisson process, a uniform mix, both from their seed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evaluation.arrivals import (
    Job,
    Mix,
    Photo,
    by_snr,
    check_target,
    plan,
    poisson_times,
    read_photos,
    read_sentences,
)
from gateway.answer import Order
from shared.errors import InvalidRequest

PHOTO = Photo("face.png", b"not looked at")
MIX = Mix((PHOTO,))


def test_counts_are_poisson() -> None:
    """Mean and variance of the count are both rate * seconds (an equidispersed process)."""
    rate, seconds, runs = 4.0, 5.0, 2000
    counts = np.array(
        [len(poisson_times(rate, seconds, np.random.default_rng(seed))) for seed in range(runs)]
    )
    mean = rate * seconds
    # Five standard errors: of a mean sqrt(m / N), of a Poisson variance sqrt((2 m^2 + m) / N).
    assert abs(counts.mean() - mean) < 5 * math.sqrt(mean / runs)
    assert abs(counts.var(ddof=1) - mean) < 5 * math.sqrt((2 * mean**2 + mean) / runs)


def test_gaps_are_exponential_and_without_memory() -> None:
    rate = 50.0
    times = poisson_times(rate, 200.0, np.random.default_rng(5))
    gaps = np.diff(times)
    assert (gaps > 0.0).all()
    assert stats.kstest(gaps, "expon", args=(0.0, 1.0 / rate)).pvalue > 0.001
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 5 / math.sqrt(len(gaps))


def test_counts_in_separate_halves_are_independent() -> None:
    halves = []
    for seed in range(2000):
        times = poisson_times(3.0, 4.0, np.random.default_rng(seed))
        halves.append(((times < 2.0).sum(), (times >= 2.0).sum()))
    first, second = np.array(halves).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(len(halves))


def test_arrivals_come_from_their_seed() -> None:
    one = plan(MIX, 5.0, 10.0, most=1000, seed=3)
    assert one == plan(MIX, 5.0, 10.0, most=1000, seed=3)
    assert one != plan(MIX, 5.0, 10.0, most=1000, seed=4)
    # The same edits, whatever the rate.
    faster = plan(MIX, 10.0, 10.0, most=len(one), seed=3)
    assert [a.job for a in faster] == [a.job for a in one]
    assert all(0.0 <= a.at_s < 10.0 for a in one)
    assert [a.at_s for a in one] == sorted(a.at_s for a in one)


def test_arrivals_are_bounded_in_count() -> None:
    assert len(plan(MIX, 100.0, 10.0, most=7, seed=0)) == 7


def test_every_choice_is_equally_likely() -> None:
    mix = Mix((PHOTO, Photo("b", b"")), ("-", "add bangs"), (0.0, 6.0, 12.0))
    random = np.random.default_rng(1)
    orders = [mix.draw(random).order for _ in range(6000)]
    for of in (lambda o: o.instruction, lambda o: o.snr_db, lambda o: o.channel):
        assert stats.chisquare(list(Counter(map(of, orders)).values())).pvalue > 0.001
    assert len({order.seed for order in orders}) > 5990


def test_a_slow_rate_may_bring_nobody() -> None:
    assert len(poisson_times(0.001, 0.1, np.random.default_rng(0))) == 0
    for rate, seconds in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(InvalidRequest, match="above 0"):
            poisson_times(rate, seconds, np.random.default_rng(0))


def test_a_mix_needs_something_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="photos is empty"):
        Mix(())
    with pytest.raises(InvalidRequest, match="99"):
        Mix((PHOTO,), snrs_db=(99.0,))
    with pytest.raises(InvalidRequest, match="no photographs"):
        read_photos(tmp_path)
    (tmp_path / "b.JPG").write_bytes(b"b")
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "notes.txt").write_text("add bangs\n\n less beard \n")
    assert [p.name for p in read_photos(tmp_path)] == ["a.png", "b.JPG"]
    assert read_sentences(tmp_path / "notes.txt") == ("add bangs", "less beard")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "http://localhost:1", "https://[::1]:8000", "http://127.9.9.9"]
)
def test_this_machine_may_be_loaded(url: str) -> None:
    check_target(url, ())


def test_the_baseline_takes_every_snr_in_turn() -> None:
    jobs = [Job(PHOTO, Order("-", snr_db=snr)) for snr in (0.0,) * 10 + (6.0,) * 2 + (12.0,)]
    taken = [job.order.snr_db for job in by_snr(jobs, 6)]
    assert taken == [0.0, 6.0, 12.0, 0.0, 6.0, 0.0]
    assert by_snr([], 5) == []
    assert len(by_snr(jobs, 100)) == len(jobs)
