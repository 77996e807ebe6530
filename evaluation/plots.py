"""The paper's figures from rows: PNG, each below 200 kB, no photograph in any of them.

quality-CHANNEL.png   perceptual, fd, kd, identity, moved against SNR, one line a scheme
bounds.png            what is left of the latent: measured, linear, rate-distortion; capacity
outage.png            messages lost by digital schemes, and the least that any code loses
changes.png           inversion steps, matching, adapters
time.png              seconds per image by stage
faces-low.png         faces of our own generator through every scheme, at the lowest SNR
faces-high.png        and at the highest
"""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from channel_sim.channel import channel
from channel_sim.fading import Kind
from evaluation.bounds import (
    capacity_bits,
    ergodic_capacity_bits,
    least_snr_db,
    lmmse_left,
    outage_bound,
    rate_distortion_left,
    rate_distortion_over_fading,
)
from evaluation.candidates import OURS, PER_SNR, RAW, UNMATCHED, Candidates, steps_name, steps_of
from evaluation.figures import sampled_face
from evaluation.results import Results
from evaluation.trial import SENTENCES, read_wish
from shared.adapters import Adapters
from shared.bundle import Bundle
from shared.errors import RateUnreachable
from shared.images import to_uint8
from shared.schemes import Scheme
from transmitter.editing import Quality

LARGEST: Final = 200_000  # bytes of a picture in the repository
PANELS: Final = (
    ("perceptual", "perceptual distance"),
    ("fd", "fd"),
    ("kd", "kd"),
    ("identity", "identity cosine"),
    ("moved", "degree moved as asked"),
    ("drift", "drift of other attributes, degrees"),
)
_GRID: Final = (
    Scheme.EDITABLE_DEEPSC.value,
    Scheme.DEEPSC_EDIT.value,
    Scheme.EDIT_DEEPSC.value,
    Scheme.JPEG_EDIT.value,
    Scheme.EDIT_JPEG.value,
)
_DPI: Final = 80


def draw_all(results: Results, bundle: Bundle, folder: Path, quality: Quality) -> list[Path]:
    """Every figure that the rows allow, into `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {f"quality-{name}.png": quality_figure(results, name) for name in results.channels}
    drawn["bounds.png"] = bounds_figure(results, bundle)
    if (outage := outage_figure(results)) is not None:
        drawn["outage.png"] = outage
    if (changes := changes_figure(results)) is not None:
        drawn["changes.png"] = changes
    drawn["time.png"] = time_figure(results)
    paths = []
    for name, figure in drawn.items():
        buffer = BytesIO()
        # Software and date would make every drawing another file.
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        buffer.seek(0)
        paths.append(_write_small(Image.open(buffer).convert("RGB"), folder / name))
    candidates = Candidates(bundle)
    for name, snr_db in (("low", results.snrs_db[0]), ("high", results.snrs_db[-1])):
        sheet = faces_sheet(candidates, quality, snr_db)
        paths.append(_write_small(sheet, folder / f"faces-{name}.png"))
    return paths


def quality_figure(results: Results, kind: str) -> Figure:
    """Six panels against SNR; dashed, ours without noise; dotted, SNRs where JPEG may arrive."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    names = results.names(channel=kind)
    for axis, (metric, label) in zip(axes.flat, PANELS, strict=True):
        for number, name in enumerate(names):
            points = [
                (snr_db, results.value(results.cell(name, kind, snr_db), metric, intervals=False))
                for snr_db in results.snrs_db
            ]
            known = [(snr_db, value.mean) for snr_db, value in points if value is not None]
            if known:
                _line(axis, known, name, number)
        clean = results.value(results.noiseless(OURS), metric, intervals=False)
        if clean is not None:
            axis.axhline(clean.mean, color="black", linestyle="--", linewidth=0.8)
        if kind == "awgn":
            for snr_db in _limits(results, names):
                axis.axvline(snr_db, color="grey", linestyle=":", linewidth=0.7)
        label = f"{metric}_{results.embedding}" if metric in ("fd", "kd") else label
        _label(axis, "SNR, dB", label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7)
    figure.suptitle(f"{kind}, {results.pictures()} faces; dashed: ours without noise")
    return figure


def _limits(results: Results, names: Sequence[str]) -> list[float]:
    """Es/N0 at which capacity meets the rate of every digital scheme."""
    found = set()
    for name in names:
        for row in results.cell(name, "awgn", results.snrs_db[0])[:1]:
            if row.get("blocks"):
                found.add(round(least_snr_db(row["bits"], row["uses"]), 3))
    return sorted(found)


def bounds_figure(results: Results, bundle: Bundle) -> Figure:
    """Left: the share of the latent that is lost. Right: bits that 512 reals carry."""
    spectrum = Adapters.from_bundle(bundle).encoder.spectrum
    uses = len(spectrum) // 2
    grid = [float(snr_db) for snr_db in range(-8, 21)]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds: tuple[Kind, ...] = ("awgn", "rayleigh")
    for kind, colour in zip(kinds, ("tab:blue", "tab:orange"), strict=True):
        linear = [lmmse_left(spectrum, snr_db, kind) for snr_db in grid]
        left.plot(grid, linear, color=colour, label=f"{kind}: linear code (LMMSE)")
        if kind == "awgn":
            bound = [rate_distortion_left(spectrum, capacity_bits(s, uses)) for s in grid]
        else:
            bound = [rate_distortion_over_fading(spectrum, s, kind, uses=uses) for s in grid]
        left.plot(grid, bound, color=colour, linestyle="--", label=f"{kind}: rate-distortion")
        for name, mark in ((Scheme.PCA_LMMSE.value, "o"), (OURS, "*")):
            measured = [
                (snr_db, results.mean(results.cell(name, kind, snr_db), "latent_left"))
                for snr_db in results.snrs_db
            ]
            known = [(snr_db, value.mean) for snr_db, value in measured if value is not None]
            if known:
                left.plot(*zip(*known, strict=True), mark, color=colour, label=f"{kind}: {name}")
        bits = [ergodic_capacity_bits(snr_db, kind, uses) for snr_db in grid]
        right.plot(grid, bits, color=colour, label=f"{kind}: capacity of {uses} uses")
    left.set_yscale("log")
    _label(left, "SNR, dB", "share of the latent's variance left")
    _label(right, "SNR, dB", "bits per picture")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    return figure


def outage_figure(results: Results) -> Figure | None:
    """Messages that did not arrive whole, and the bound; None without digital schemes."""
    figure = Figure(figsize=(4 * len(results.channels), 4), layout="constrained")
    axes = figure.subplots(1, len(results.channels), squeeze=False)[0]
    any_drawn = False
    kinds: dict[str, Kind] = {"awgn": "awgn", "rayleigh": "rayleigh", "rician": "rician"}
    for axis, name in zip(axes, results.channels, strict=True):
        for number, scheme in enumerate(results.names(channel=name)):
            known = []
            for snr_db in results.snrs_db:
                if found := results.coded(results.cell(scheme, name, snr_db)):
                    known.append((snr_db, found.outage.mean))
            if not known or not scheme.startswith("edit+"):
                continue  # M1 and M2 send as many bits: one of them tells it all
            any_drawn = True
            _line(axis, known, scheme, number)
            row = results.cell(scheme, name, results.snrs_db[0])[0]
            grid = [results.snrs_db[0] + 0.25 * i for i in range(97)]
            factor = row["k_factor_db"] or 9.0
            bound = [outage_bound(row["bits"], row["uses"], s, kinds[name], factor) for s in grid]
            axis.plot(grid, bound, color=f"C{number % 10}", linestyle=":", linewidth=0.9)
        axis.set_title(name, fontsize=9)
        _label(axis, "SNR, dB", "outage (dotted: bound)")
    if not any_drawn:
        return None
    axes[0].legend(fontsize=6)
    return figure


def changes_figure(results: Results) -> Figure | None:
    """Editable-DeepSC with one part changed; None where that was not measured."""
    steps = sorted(
        {found for row in results.trials if (found := steps_of(row["scheme"])) is not None}
    )
    others = [n for n in (RAW, PER_SNR, UNMATCHED) if results.cell(n, "awgn", results.snrs_db[0])]
    if not steps and not others:
        return None
    figure = Figure(figsize=(12, 4), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    for number, snr_db in enumerate(results.snrs_db):
        known = [
            (float(count), value.mean)
            for count in steps
            if (
                value := results.mean(results.cell(steps_name(count), "awgn", snr_db), "perceptual")
            )
        ]
        if known:
            _line(first, known, f"{snr_db:g} dB", number)
    _label(first, "inversion steps", "perceptual distance")
    for axis, metric, names in (
        (second, "moved", [OURS, UNMATCHED]),
        (third, "perceptual", [OURS, RAW, PER_SNR]),
    ):
        for number, name in enumerate(names):
            points = []
            for snr_db in results.snrs_db:
                rows = results.side_cell(name, snr_db)
                if (value := results.mean(rows, metric)) is not None:
                    points.append((snr_db, value.mean))
            if points:
                _line(axis, points, name, number)
        label = "degree moved as asked" if metric == "moved" else "perceptual distance"
        _label(axis, "SNR, dB", label)
    for axis in (first, second, third):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure


def time_figure(results: Results) -> Figure:
    """Stacked milliseconds by stage, one bar a scheme."""
    names = results.names()[::-1]
    stages = {name: results.stages(name) for name in names}
    figure = Figure(figsize=(9, 0.4 * len(names) + 1.5), layout="constrained")
    axis = figure.subplots()
    order = dict.fromkeys(stage for found in stages.values() for stage in found)
    start = [0.0] * len(names)
    for stage in order:
        widths = [stages[name].get(stage, 0.0) / 1000 for name in names]
        axis.barh(names, widths, left=start, label=stage)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    axis.tick_params(labelsize=7)
    _label(axis, "seconds per image", "")
    axis.legend(fontsize=7)
    return figure


# ---------------------------------------------------------------------------------- faces of nobody


@torch.no_grad()
def _received(
    candidates: Candidates, name: str, face: Tensor, seed: int, snr_db: float, quality: Quality
) -> Tensor | None:
    """What arrives of a sampled face; None where the scheme cannot send it."""
    (attribute, direction), sentence = list(SENTENCES.items())[2 * (seed % 5)]
    wish = read_wish(candidates.transmitter.reader, sentence, attribute, direction)
    scheme = candidates[name]
    try:
        with torch.enable_grad():  # inversion descends
            sent = scheme.transmit(face, wish.edit, snr_db, quality)
    except RateUnreachable:
        return None
    reception = channel(sent.symbols, snr_db, torch.Generator().manual_seed(seed))
    return scheme.receive(reception).image


def faces_sheet(
    candidates: Candidates, quality: Quality, snr_db: float, faces: int = 5
) -> Image.Image:
    """A row per sampled face: itself, then what arrives by each scheme that the bundle has."""
    names = []
    for name in _GRID:
        if "deepsc" in name.split("+") and not candidates.bundle.has("deepsc"):
            continue
        names.append(name)
    size, head, margin = candidates.transmitter.image_size, 14, 120
    sheet = Image.new("RGB", (margin + size * (len(names) + 1), head + size * faces), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(["sampled face", *names]):
        pen.text((margin + column * size + 2, 1), title[: size // 6], fill="black")
    for row in range(faces):
        face = sampled_face(candidates.transmitter.generator, 1000 + row)
        sentence = list(SENTENCES.values())[2 * (row % 5)]
        for line, start in enumerate(range(0, len(sentence), 18)):
            text = sentence[start : start + 18]
            pen.text((2, head + row * size + size // 2 + 12 * line - 12), text, fill="black")
        tiles = [face, *(_received(candidates, n, face, row, snr_db, quality) for n in names)]
        for column, tile in enumerate(tiles):
            if tile is not None:
                picture = Image.fromarray(to_uint8(tile).permute(1, 2, 0).contiguous().numpy())
                sheet.paste(picture, (margin + column * size, head + row * size))
    return sheet


def _write_small(picture: Image.Image, path: Path) -> Path:
    """A PNG of at most LARGEST bytes: fewer colours first, then a smaller picture."""
    scale = 1.0
    while True:
        size = (round(picture.width * scale), round(picture.height * scale))
        smaller = picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)
        buffer = BytesIO()
        smaller.quantize(256, Image.Quantize.MEDIANCUT).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= LARGEST:
            path.write_bytes(buffer.getvalue())
            return path
        scale *= 0.85


def _line(axis: Axes, points: Sequence[tuple[float, float]], name: str, number: int) -> None:
    ours = name == OURS
    xs, ys = zip(*points, strict=True)
    finite = [y if math.isfinite(y) else float("nan") for y in ys]
    axis.plot(
        xs,
        finite,
        marker="*" if ours else "osv^D<>"[number % 7],
        markersize=8 if ours else 3.5,
        linewidth=2.2 if ours else 1.0,
        color="black" if ours else f"C{number % 10}",
        label=name,
    )


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.grid(alpha=0.3)
