"""Bars: verdicts, text, JSON; intervals of samples that come in groups."""

import json
import math

import pytest
import torch

from evaluation.bars import Bar, exactly, grouped, statistic, table
from evaluation.metrics import Figure, figure
from shared.errors import InvalidRequest

FIGURE = Figure(0.5, 0.4, 0.6, 12)


@pytest.mark.parametrize(
    ("figure_", "wanted", "at_least", "verdict"),
    [
        (FIGURE, 0.5, True, "reached"),
        (FIGURE, 0.51, True, "missed"),
        (FIGURE, 0.5, False, "reached"),
        (FIGURE, 0.49, False, "missed"),
        (FIGURE, None, True, "shown"),
        (None, 0.5, True, "not measured"),
    ],
)
def test_verdicts(
    figure_: Figure | None, wanted: float | None, at_least: bool, verdict: str
) -> None:
    assert Bar("x", "what", figure_, wanted, at_least).verdict == verdict


def test_a_line_says_bar_value_interval_count_and_verdict() -> None:
    line = Bar("x", "hits", FIGURE, 0.7, unit="%", note="60 faces").line()
    for part in ("missed", "hits", ">= 70 %", "50.0 %", "40.0 % .. 60.0 %", "N = 12", "60 faces"):
        assert part in line
    missing = Bar("x", "hits", None, 0.02, at_least=False, unit="dB", note="no net").line()
    for part in ("not measured", "<= 0.02 dB", "no net"):
        assert part in missing
    assert ".." not in Bar("x", "size", exactly(93.2), 100.0, at_least=False, unit="MB").line()


def test_bars_survive_json_and_make_a_table() -> None:
    bars = [
        Bar("a", "first", FIGURE, 0.4, unit="%"),
        Bar("b", "second", None, 4.0, at_least=False, note="no judge"),
        Bar("c", "third", FIGURE),
    ]
    back = [Bar.from_json(json.loads(json.dumps(bar.to_json()))) for bar in bars]
    assert back == bars
    rows = table(bars)
    assert len(rows) == 5
    assert {row.count("|") for row in rows} == {7}
    assert rows[2].endswith("| 12 | reached |")
    assert "no judge" in rows[3]
    assert rows[3].endswith("| not measured |")


def test_groups_of_one_are_plain_samples() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    plain, alone = figure(values), grouped(values, torch.arange(300))
    assert (alone.mean, alone.low, alone.high) == pytest.approx((plain.mean, plain.low, plain.high))


def test_equal_samples_in_groups_count_once() -> None:
    """Nine copies of each sample say no more than one: the interval is three times that of 900."""
    one = torch.randn(100, generator=torch.Generator().manual_seed(1))
    values, groups = one.repeat_interleave(9), torch.arange(100).repeat_interleave(9)
    wide, narrow = grouped(values, groups), figure(values)
    assert wide.count == 900
    assert wide.high - wide.low == pytest.approx(3 * (narrow.high - narrow.low), rel=0.15)


def test_ratios_are_of_means() -> None:
    top, bottom = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 8.0])
    found = grouped(top, torch.tensor([0, 0, 1]), over=bottom)
    assert found.mean == pytest.approx(0.5)
    # Two groups: a resample holds the first twice (3/4), both (6/12), or the second twice (3/8).
    assert found.low == pytest.approx(0.375)
    assert found.high == pytest.approx(0.75)


def test_median_and_its_interval() -> None:
    values = torch.randn(401, generator=torch.Generator().manual_seed(2))
    found = statistic(values, lambda x: x.quantile(0.5, -1), resamples=2000)
    assert found.mean == pytest.approx(float(values.median()), abs=1e-6)
    # The median's standard error: sqrt(pi / 2) / sqrt(N).
    wide = 2 * 1.96 * math.sqrt(math.pi / 2 / 401)
    assert found.high - found.low == pytest.approx(wide, rel=0.3)


def test_no_samples_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="got 0"):
        statistic(torch.empty(0), lambda x: x.mean(-1))
    with pytest.raises(InvalidRequest, match=r"got 2 values, 3 groups"):
        grouped(torch.ones(2), torch.arange(3))
