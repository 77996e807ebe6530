"""Bars: what is wanted of a bundle, what was measured, reached or missed.

One object for the text on the terminal, the JSON, `bundle.json` and the model card. A number that
could not be measured says why; a number without a bar is shown for comparison.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evaluation.metrics import RESAMPLES, Figure
from shared.errors import InvalidRequest

Verdict = Literal["reached", "missed", "shown", "not measured"]


@dataclass(frozen=True)
class Bar:
    """One number of a bundle.

    name: its key in JSON. what: in words. figure: what was measured, None where it was not: then
    `note` says why. wanted: the bar, None for a number that is only shown. at_least: more is
    better; otherwise less is. unit: "%" for shares (0..1 inside), else as it is printed.
    """

    name: str
    what: str
    figure: Figure | None
    wanted: float | None = None
    at_least: bool = True
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """By the measured value itself; the interval stands beside it."""
        if self.figure is None:
            return "not measured"
        if self.wanted is None:
            return "shown"
        value = self.figure.mean
        reached = value >= self.wanted if self.at_least else value <= self.wanted
        return "reached" if reached else "missed"

    @property
    def bar(self) -> str:
        """The bar in words: `>= 20 dB`."""
        if self.wanted is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self._number(self.wanted, short=True)}"

    @property
    def value(self) -> str:
        """The measured value with its unit."""
        return "" if self.figure is None else self._number(self.figure.mean)

    @property
    def interval(self) -> str:
        """Both ends of the 95 % interval; nothing where the number is exact."""
        if self.figure is None or self.figure.low == self.figure.high:
            return ""
        return f"{self._number(self.figure.low)} .. {self._number(self.figure.high)}"

    def _number(self, value: float, short: bool = False) -> str:
        if self.unit == "%":
            return f"{100 * value:.4g} %" if short else f"{100 * value:.1f} %"
        number = f"{value:.4g}" if short else f"{value:.3f}"
        return f"{number} {self.unit}".strip()

    def line(self) -> str:
        """Bar, value, interval, N, reached or missed."""
        count = "" if self.figure is None else f"N = {self.figure.count}"
        note = f"  ({self.note})" if self.note else ""
        return (
            f"{self.verdict:<13}{self.what:<58} {self.bar:<12} {self.value:<11} "
            f"{self.interval:<22} {count}{note}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, the verdict among them."""
        return {**asdict(self), "verdict": self.verdict}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Bar":
        """Read what `to_json` wrote."""
        kept = {key: value for key, value in values.items() if key != "verdict"}
        if kept["figure"] is not None:
            kept["figure"] = Figure(**kept["figure"])
        return cls(**kept)


def table(bars: list[Bar]) -> list[str]:
    """The bars as lines of a Markdown table."""
    lines = ["| what | bar | value | 95 % interval | N | |", "|---|---|---|---|---|---|"]
    for bar in bars:
        count = "" if bar.figure is None else str(bar.figure.count)
        cells = [bar.what + (f" ({bar.note})" if bar.note else ""), bar.bar, bar.value]
        cells += [bar.interval, count, bar.verdict if bar.verdict != "shown" else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def exactly(value: float, count: int = 1) -> Figure:
    """A number that is no mean of samples: its interval is itself."""
    return Figure(value, value, value, count)


def grouped(
    values: Tensor,
    groups: Tensor,
    over: Tensor | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Figure:
    """mean(values), or mean(values) / mean(over), of samples [N] that come in groups [N].

    The edits of one face resemble each other, so the bootstrap draws whole groups (faces), not
    samples. Raises InvalidRequest for no samples or unequal lengths.
    """
    below = torch.ones_like(values) if over is None else over
    if not len(values) or values.shape != groups.shape or values.shape != below.shape:
        raise InvalidRequest(
            f"got {len(values)} values, {len(groups)} groups and {len(below)} values to divide by;"
            " expected equal counts of at least one"
        )
    _, place = torch.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    sums = torch.zeros(2, count, dtype=torch.float64)
    sums[0].scatter_add_(0, place, values.double())
    sums[1].scatter_add_(0, place, below.double())
    draws = torch.Generator().manual_seed(seed)
    index = torch.randint(count, (resamples, count), generator=draws)
    drawn = sums[:, index].sum(2)  # [2, resamples]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(drawn[0] / drawn[1], ends)
    return Figure(float(sums[0].sum() / sums[1].sum()), float(low), float(high), len(values))


def statistic(
    values: Tensor, of: Callable[[Tensor], Tensor], resamples: int = RESAMPLES, seed: int = 0
) -> Figure:
    """Any statistic of samples [N] with its bootstrap interval; `of`: [.., N] -> [..]."""
    if not len(values):
        raise InvalidRequest("got 0 samples, expected at least one")
    draws = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (resamples, len(values)), generator=draws)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(of(values.double()[index]), ends)
    return Figure(float(of(values.double())), float(low), float(high), len(values))
