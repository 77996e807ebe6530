"""The arithmetic of `make bench`; the measuring itself is not a test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evaluation.bench import BenchOptions, Sample, percentile, resident_mib, summarise


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (50, 3.0), (100, 5.0), (95, 4.8), (25, 2.0)]
)
def test_percentile_interpolates(percent: float, expected: float) -> None:
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], percent) == pytest.approx(expected)


def test_percentile_of_one_value_and_of_none() -> None:
    assert percentile([7.0], 95) == 7.0
    with pytest.raises(ValueError, match="expected at least 1"):
        percentile([], 50)


def test_hops_are_what_is_nobodys_computing() -> None:
    timings = {"queue": 5.0, "invert": 60.0, "receive": 25.0, "overhead": 8.0, "total": 98.0}
    assert Sample(100.0, timings).hops_ms == pytest.approx(10.0)


def test_summary_takes_medians_of_stages() -> None:
    samples = [Sample(10.0 + n, {"invert": float(n), "total": 99.0}) for n in range(5)]
    summary = summarise(samples)
    assert summary.stages_ms == {"invert": 2.0}
    assert summary.p50_ms == pytest.approx(12.0)
    assert summary.hops_p50_ms == pytest.approx(10.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_resident_memory_of_this_process() -> None:
    mib = resident_mib(os.getpid())
    assert mib is not None
    assert 10 < mib < 100_000


def test_resident_memory_of_no_process_is_unknown() -> None:
    assert resident_mib(2**30) is None


def test_bench_options_refuse_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="edits is 0"):
        BenchOptions(edits=0)
