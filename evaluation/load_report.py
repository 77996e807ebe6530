"""The report of a load test: load.json with every arrival, and one HTML page with its plots.

The page is whole in itself: styles and plots (SVG) are inside, nothing is fetched and no script
runs, so it can be kept, mailed or put behind any policy.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log10
from pathlib import Path
from typing import Final

from evaluation.outcomes import SAME_DB, LoadReport, Outcome, Step

# Told apart also by most who see colours otherwise (Okabe and Ito), and by their marks' order.
COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8a00")
FATE_COLOURS: Final[Mapping[str, str]] = {
    "ok": "#009e73",
    "rejected": "#e69f00",
    "failed": "#d55e00",
    "unsent": "#7f7f7f",
}
# Of timings_ms, in the order in which they happen; what is not here comes after.
STAGES: Final = (
    "queue", "read", "decode", "align", "invert", "edit", "encode", "draw", "pictures",
    "propagate", "receive", "overhead",
)  # fmt: skip
MOST_DOTS: Final = 4000  # of a scatter plot; a page should open
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #666; --line: #ddd; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a0a0a0; --line: #3a3a3a; --paper: #161616; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .4em; }
p, figcaption { color: var(--soft); } figcaption b { color: var(--ink); }
.plots { display: flex; flex-wrap: wrap; gap: 1.2em; } figure { margin: 0; flex: 1 1 480px; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); } .wrap { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
code { overflow-wrap: anywhere; }
"""


def write_report(report: LoadReport, folder: Path) -> tuple[Path, Path]:
    """Write load.json and load.html into `folder`, which is made; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "load.json", folder / "load.html"
    data.write_text(json.dumps(report.to_json(), allow_nan=False) + "\n", "utf-8")
    page.write_text(html(report), "utf-8")
    return data, page


# ------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class Series:
    """A line with marks, or marks alone. points: (x, y, words shown on hovering)."""

    name: str
    colour: str
    points: Sequence[tuple[float, float, str]]
    line: bool = True
    dashed: bool = False
    radius: float = 3.5


@dataclass
class Plot:
    """Axes, series, a legend; `svg()` draws them. log_y: decades; all y must then be positive."""

    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    log_y: bool = False

    def svg(self) -> str:
        """The plot as an SVG element; words in place of one without a point."""
        points = [(x, y) for one in self.series for x, y, _ in one.points]
        if not points:
            return "<p>No data.</p>"
        xs = _axis(min(x for x, _ in points), max(x for x, _ in points))
        y_low, y_high = min(y for _, y in points), max(y for _, y in points)
        ys = _decades(y_low, y_high) if self.log_y else _axis(min(0.0, y_low), y_high)
        to_x = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
        at: Callable[[float], float] = log10 if self.log_y else float
        place = _scale(at(ys[0]), at(ys[-1]), HEIGHT - BOTTOM, TOP)

        def to_y(y: float) -> float:
            return place(at(y))

        parts = [_grid(xs, ys, to_x, to_y), _labels(self.x_label, self.y_label)]
        parts += [_draw(one, to_x, to_y) for one in self.series]
        return _svg(parts) + _legend([(one.name, one.colour) for one in self.series])


def bars(
    groups: Sequence[tuple[str, Sequence[tuple[str, str, float]]]], x_label: str, unit: str
) -> str:
    """Stacked bars, a group each: (label, [(part, colour, value >= 0), ...])."""
    highest = max((sum(v for _, _, v in parts) for _, parts in groups), default=0.0)
    if highest <= 0.0:
        return "<p>No data.</p>"
    ys = _axis(0.0, highest)
    to_y = _scale(0.0, ys[-1], HEIGHT - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    drawn = [_grid([], ys, lambda x: x, to_y), _labels(x_label, unit)]
    for place, (label, parts) in enumerate(groups):
        left, base = LEFT + slot * (place + 0.15), 0.0
        for part, colour, value in parts:
            top = to_y(base + value)
            drawn.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{slot * 0.7:.1f}" '
                f'height="{to_y(base) - top:.2f}" fill="{colour}">'
                f"<title>{escape(f'{label}, {part}: {value:.6g}')}</title></rect>"
            )
            base += value
        drawn.append(_text(left + slot * 0.35, HEIGHT - BOTTOM + 15, label, "middle"))
    names = dict.fromkeys((part, colour) for _, parts in groups for part, colour, _ in parts)
    return _svg(drawn) + _legend(list(names))


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _axis(low: float, high: float) -> list[float]:
    """Round ticks that enclose low..high, about five."""
    if high <= low:
        low, high = low - 0.5 * abs(low or 1.0), high + 0.5 * abs(high or 1.0)
    raw = (high - low) / 5
    size = 10.0 ** floor(log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = floor(log10(low)), ceil(log10(high))
    return [10.0**n for n in range(first, max(last, first + 1) + 1)]


def _grid(
    xs: Sequence[float],
    ys: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> str:
    parts = []
    for y in ys:
        at = to_y(y)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            + _text(LEFT - 6, at + 4, f"{y:.6g}", "end")
        )
    parts += [_text(to_x(x), HEIGHT - BOTTOM + 15, f"{x:.6g}", "middle") for x in xs]
    return "".join(parts)


def _labels(x_label: str, y_label: str) -> str:
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    return (
        _text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 8, x_label, "middle")
        + f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        + f"{escape(y_label)}</text>"
    )


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _draw(one: Series, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    parts = []
    if one.line and len(one.points) > 1:
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y, _ in one.points)
        dash = ' stroke-dasharray="6 4"' if one.dashed else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="2"{dash}/>'
        )
    if one.radius:
        parts += [
            f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="{one.radius}" fill="{one.colour}">'
            f"<title>{escape(words)}</title></circle>"
            for x, y, words in one.points
        ]
    return "".join(parts)


def _legend(names: Sequence[tuple[str, str]]) -> str:
    items = (
        f'<span style="color:{colour}">&#9632;</span> {escape(name)}' for name, colour in names
    )
    return f"<p>{' &nbsp; '.join(items)}</p>"


# ------------------------------------------------------------------------------------ the figures


def goodput_plot(steps: Sequence[Step]) -> str:
    """Good answers a second against arrivals a second; on the dashed line everything is served."""
    offered = [step.rate for step in steps]
    good = [(s.rate, s.goodput, f"{s.rate:g}/s: goodput {s.goodput:.3g}/s") for s in steps]
    ends = sorted({0.0, max(offered)})
    return Plot(
        "arrivals a second",
        "good answers a second",
        [
            Series("all served", "#7f7f7f", [(x, x, "") for x in ends], dashed=True, radius=0),
            Series("goodput", COLOURS[0], good),
        ],
    ).svg()


def latency_plot(steps: Sequence[Step]) -> str:
    """p50, p95, p99 of the answers against the rate."""
    series = [
        Series(
            name,
            COLOURS[place],
            [
                (s.rate, s.latency_ms[name], f"{s.rate:g}/s: {name} {s.latency_ms[name]:.0f} ms")
                for s in steps
                if name in s.latency_ms
            ],
        )
        for place, name in enumerate(("p50", "p95", "p99"))
    ]
    return Plot("arrivals a second", "latency, ms", series, log_y=True).svg()


def fates_plot(steps: Sequence[Step]) -> str:
    """What became of the arrivals of every step."""
    groups = [
        (
            f"{step.rate:g}/s",
            [(name, FATE_COLOURS[name], float(count)) for name, count in fates(step).items()],
        )
        for step in steps
    ]
    return bars(groups, "arrivals a second", "arrivals")


def fates(step: Step) -> dict[str, int]:
    """Counts that add up to the step's arrivals."""
    return {
        "ok": step.ok,
        "rejected": sum(step.rejected.values()),
        "failed": sum(step.failed.values()),
        "unsent": step.unsent,
    }


def stages_plot(steps: Sequence[Step]) -> str:
    """Medians of the stages, stacked."""
    names = _stages(steps)
    groups = [
        (
            f"{step.rate:g}/s",
            [
                (name, COLOURS[place % len(COLOURS)], step.stages_ms.get(name, {}).get("p50", 0.0))
                for place, name in enumerate(names)
            ],
        )
        for step in steps
    ]
    return bars(groups, "arrivals a second", "median, ms")


def _stages(steps: Sequence[Step]) -> list[str]:
    there = dict.fromkeys(name for step in steps for name in step.stages_ms if name != "total")
    return sorted(there, key=lambda n: STAGES.index(n) if n in STAGES else len(STAGES))


def course_plot(outcomes: Sequence[Sequence[Outcome]]) -> str:
    """Latency of every request against the moment it was due, steps one after another."""
    dots: dict[str, list[tuple[float, float, str]]] = {name: [] for name in FATE_COLOURS}
    start = 0.0
    for step in outcomes:
        for o in step:
            words = f"{o.fate} {o.status or ''} {o.reason}: {o.latency_ms:.0f} ms"
            dots[o.fate].append((start + o.due_s, max(o.latency_ms, 0.1), words))
        start += max((o.done_s for o in step), default=0.0)
    thin = max(1, ceil(sum(map(len, dots.values())) / MOST_DOTS))
    series = [
        Series(name, FATE_COLOURS[name], found[::thin], line=False, radius=2)
        for name, found in dots.items()
        if found
    ]
    return Plot("due, seconds from the start", "latency, ms", series, log_y=True).svg()


def quality_plot(report: LoadReport) -> str:
    """PSNR against SNR: all edits under load, and the pairs made again without."""
    loaded, alone, paired = [], [], []
    for at in report.quality:
        snr = at.snr_db
        words = f"{snr:g} dB: {at.under_load:.2f} dB over {at.count} edits"
        loaded.append((snr, at.under_load, words))
        if at.pair_alone is not None and at.pair_under_load is not None:
            words = f"{snr:g} dB: {at.pairs} edits, %s {at.pair_under_load:.2f}, alone %.2f"
            words = words % ("under load", at.pair_alone)
            paired.append((snr, at.pair_under_load, words))
            alone.append((snr, at.pair_alone, words))
    series = [
        Series("under load, all", COLOURS[0], loaded),
        Series("under load, pairs", COLOURS[3], paired, radius=6),
        Series("the pairs without load", COLOURS[2], alone, dashed=True),
    ]
    return Plot("SNR, dB", "PSNR, received against sent, dB", series).svg()


# ----------------------------------------------------------------------------------------- the page


def html(report: LoadReport) -> str:
    """The whole page."""
    steps = report.steps
    figures = (
        ("Goodput", "answers within the deadline; the dashed line is all of them",
         goodput_plot(steps)),
        ("Latency", "of the answers, from the moment a request was due", latency_plot(steps)),
        ("What became of them", "every arrival is one of four", fates_plot(steps)),
        ("Stages", "medians, as the services report them", stages_plot(steps)),
        ("Course", "one dot a request", course_plot(report.outcomes)),
        ("Quality", _verdict(report), quality_plot(report)),
    )  # fmt: skip
    plots = "".join(
        f"<figure><figcaption><b>{escape(title)}</b>: {escape(words)}</figcaption>{plot}</figure>"
        for title, words, plot in figures
    )
    options = escape(json.dumps(dict(report.options), indent=1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Load test</title><style>{STYLE}</style></head><body>"
        f"<h1>Load test of {escape(report.url)}</h1>"
        f"<p>{escape(report.started)}. Poisson arrivals, sent when they were due whatever had been "
        "answered; latency counts from that moment. "
        "Goodput: answers within the deadline a second, over the step's time or until its last "
        f'answer, whichever is later.</p><div class="plots">{plots}</div>'
        f"<h2>Steps</h2>{_steps_table(steps)}"
        f"<h2>Stages, ms</h2>{_stages_table(steps)}"
        f"<h2>Rejected and failed</h2>{_reasons_table(steps)}"
        f"<h2>Quality</h2>{_quality_table(report)}"
        f"<h2>Options</h2><pre><code>{options}</code></pre></body></html>\n"
    )


def _verdict(report: LoadReport) -> str:
    if report.same_quality is None:
        return "nothing was made again without load"
    same = "the same" if report.same_quality else "NOT the same"
    return f"{same} with and without load (within {SAME_DB:g} dB for every edit)"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return "<p>None.</p>"
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    others = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wrap"><table><tr>{first}</tr>{others}</table></div>'


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _spread(found: Mapping[str, float]) -> list[float | None]:
    return [found.get(name) for name in ("p50", "p95", "p99")]


def _steps_table(steps: Sequence[Step]) -> str:
    head = (
        "rate, 1/s", "seconds", "arrivals", "ok", "in time", "rejected", "failed", "unsent",
        "goodput, 1/s", "p50, ms", "p95", "p99", "sent late, p99, ms", "429 without Retry-After",
    )  # fmt: skip
    rows: list[list[object]] = []
    for s in steps:
        counts = fates(s)
        rows.append([
            f"{s.rate:g}", s.seconds, s.arrivals, s.ok, s.good, counts["rejected"],
            counts["failed"], s.unsent, s.goodput, *_spread(s.latency_ms), s.lag_ms.get("p99"),
            s.busy_without_retry_after,
        ])  # fmt: skip
    return _table(head, rows)


def _stages_table(steps: Sequence[Step]) -> str:
    head = ["stage", *(f"{s.rate:g}/s {name}" for s in steps for name in ("p50", "p95", "p99"))]
    rows: list[list[object]] = [
        [name, *(ms for s in steps for ms in _spread(s.stages_ms.get(name, {})))]
        for name in [*_stages(steps), "total"]
    ]
    return _table(head, rows if any(s.stages_ms for s in steps) else [])


def _reasons_table(steps: Sequence[Step]) -> str:
    reasons = dict.fromkeys(name for s in steps for name in (*s.rejected, *s.failed))
    return _table(
        ["what", *(f"{s.rate:g}/s" for s in steps)],
        [[name, *(s.rejected.get(name, s.failed.get(name, 0)) for s in steps)] for name in reasons],
    )


def _quality_table(report: LoadReport) -> str:
    head = (
        "SNR, dB", "edits", "PSNR under load, dB", "pairs", "under load", "without load",
        "largest difference", "same pixels",
    )  # fmt: skip
    rows: list[list[object]] = [
        [
            f"{q.snr_db:g}", q.count, q.under_load, q.pairs, q.pair_under_load, q.pair_alone,
            q.worst, q.identical,
        ]
        for q in report.quality
    ]  # fmt: skip
    lost = "".join(f"<p>Without load, failed: {escape(f)}</p>" for f in report.baseline_failures)
    return _table(head, rows) + lost
