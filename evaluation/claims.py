"""Claims and sentences about results, written by rule from numbers.

A verdict compares an interval with a bar and knows three words: holds (the whole interval is beyond
it), does not hold (the whole interval falls short), open (the interval includes it). Nothing is
called better whose interval does not say so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from evaluation import paper
from evaluation.candidates import OURS, RAW, steps_name
from evaluation.metrics import Figure
from evaluation.results import Results

_DIGITS: Final[Mapping[str, int]] = {"psnr_db": 2, "kd": 5, "perceptual": 4, "latent_left": 4}


@dataclass(frozen=True)
class Verdict:
    """A claim, the figure that was measured for it, and the bar it is held to."""

    claim: str
    measured: str
    printed: str
    word: str

    def row(self) -> str:
        return f"| {self.claim} | {self.measured} | {self.printed} | {self.word} |"


def judge(found: Figure | None, bar: float) -> str:
    """holds, does not hold, open; not measured where there is no figure."""
    if found is None:
        return "not measured"
    if found.low >= bar:
        return "holds"
    return "does not hold" if found.high < bar else "open"


def verdicts(results: Results) -> list[Verdict]:
    """The paper's claims at the lowest SNR, and this project's bars, as far as rows tell."""
    found = []
    lowest = results.snrs_db[0]
    for metric, bar in paper.BARS.items():
        gain = results.gain(metric, "awgn", lowest)
        printed = f"{100 * paper.GAINS_AT_MINUS_6_DB[metric]:.1f} % (its own metric)"
        claim = (
            f"{lowest:g} dB, AWGN: {metric_name(results, metric)} at least {100 * bar:.0f} % "
            "smaller than the second-best scheme's"
        )
        if gain is None:
            found.append(Verdict(claim, paper.MISSING, printed, "not measured"))
            continue
        name, figure = gain
        measured = f"{percent(figure)} than {name}"
        found.append(Verdict(claim, measured, printed, judge(figure, bar)))
    for channel in [c for c in ("awgn", "rayleigh") if c in results.channels]:
        low = [snr_db for snr_db in results.snrs_db if snr_db <= 6]
        for metric in ("perceptual", "fd", "kd"):
            won = [s for s in results.first_at(metric, channel) if s in low]
            word = "holds in the mean" if won == low else "does not hold"
            where = ", ".join(f"{s:g}" for s in won) or "none"
            claim = f"first in {metric_name(results, metric)} up to 6 dB, {channel}"
            if not any(True for _ in results.competitors(channel, lowest)):
                where, word = paper.MISSING, "not measured"
            found.append(Verdict(claim, f"first at {where} dB", "yes", word))
    found += _costs_verdicts(results)
    return found


def _costs_verdicts(results: Results) -> list[Verdict]:
    mine = results.mean(results.arrived(OURS), "seconds")
    ratios = {}
    for name, _ in results.competitors("awgn", results.snrs_db[0]):
        theirs = results.mean(results.arrived(name), "seconds")
        if mine is not None and theirs is not None:
            ratios[name] = mine.mean / theirs.mean
    claim = "seconds per image at most half of every baseline's"
    if not ratios:
        return [Verdict(claim, paper.MISSING, f"{paper.TIME_SHARE}", "not measured")]
    worst = max(ratios, key=lambda name: ratios[name])
    best = min(ratios, key=lambda name: ratios[name])
    measured = f"{ratios[best]:.2f} of {best}'s to {ratios[worst]:.2f} of {worst}'s"
    word = "holds in the mean" if ratios[worst] <= 0.5 else "does not hold"
    return [Verdict(claim, measured, f"{paper.TIME_SHARE}", word)]


def quality_words(results: Results) -> Iterator[str]:
    """What the lowest SNR says, and where the others overtake."""
    lowest = results.snrs_db[0]
    gain = results.gain("perceptual", "awgn", lowest)
    if gain is None:
        yield "No complete competitor was measured."
        return
    name, figure = gain
    if figure.low > 0:
        yield (
            f"At {lowest:g} dB ours is {percent(figure)} than that of {name}, the next best in"
            " `perceptual`."
        )
    elif figure.high < 0:
        yield f"At {lowest:g} dB {name} is better than ours in `perceptual`, by these pictures."
    else:
        yield f"At {lowest:g} dB ours and {name} cannot be told apart in `perceptual`."
    won = results.first_at("perceptual", "awgn")
    lost = [snr_db for snr_db in results.snrs_db if snr_db not in won]
    if lost:
        where = ", ".join(f"{s:g}" for s in lost)
        yield (
            f"At {where} dB another scheme is first: 512 numbers hold less of a picture than"
            f" what it"
            " sends in more channel uses, once these arrive."
        )


def steps_words(results: Results, steps: Sequence[int]) -> Iterator[str]:
    highest = results.snrs_db[-1]
    figures = {
        number: results.mean(results.side_cell(steps_name(number), highest), "perceptual")
        for number in steps
    }
    known = {number: value for number, value in figures.items() if value is not None}
    if len(known) < 2:
        return
    best = min(known, key=lambda number: known[number].mean)
    chosen = known.get(paper.R_INV)
    yield f"At {highest:g} dB the smallest mean is at {best} steps."
    if chosen is not None and best != paper.R_INV:
        overlap = chosen.low <= known[best].high
        told = "cannot be told from it" if overlap else "is worse by more than the intervals"
        yield f"The paper's {paper.R_INV} {told}."


def adapter_words(results: Results) -> Iterator[str]:
    lowest = results.snrs_db[0]
    with_, without = (
        results.mean(results.side_cell(name, lowest), "perceptual") for name in (OURS, RAW)
    )
    if with_ is None or without is None:
        return
    share = 1 - with_.mean / without.mean
    printed = 1 - paper.AT_MINUS_6_DB.lpips / paper.WITHOUT_ADAPTERS.lpips
    apart = with_.high < without.low
    yield (
        f"At {lowest:g} dB adapters take {100 * share:.0f} % off `perceptual`"
        f" ({'beyond' if apart else 'within'} the intervals); the paper's take "
        f"{100 * printed:.0f} % off"
        " LPIPS."
    )


def metric_name(results: Results, metric: str) -> str:
    return f"{metric}_{results.embedding}" if metric in ("fd", "kd") else metric


def show(found: Figure | None, metric: str = "") -> str:
    if found is None:
        return paper.MISSING
    digits = _DIGITS.get(metric, 3)
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def percent(found: Figure) -> str:
    """A gain in words: "40 % [35, 44] smaller", or larger where it is none."""
    if found.mean >= 0:
        low, high, word = found.low, found.high, "smaller"
    else:
        low, high, word = -found.high, -found.low, "larger"
    return f"{100 * abs(found.mean):.0f} % [{100 * low:.0f}, {100 * high:.0f}] {word}"
