"""`make bench`: what one edit costs through the four processes, and what the processes weigh.

Starts the four processes, sends one edit at a time over REST (latency is measured, not load) and
prints, for each quality:

    p50, p95     milliseconds from the first byte of the upload to the last byte of the answer, as
                 the plainest client has them: http.client, the form put together before
    hops         the part of it that is nobody's computing: HTTP, the gateway, its store and the
                 three gRPC hops; the client's time less the stages that the services report
    stages       medians of those stages

and the resident memory of each process after all edits. Warm-up edits come first and do not count.
A failed edit is counted and shown, never left out in silence.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from itertools import cycle, islice
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.table import Table

from edsc.up import Stack, interruptible
from evaluation.arrivals import read_photos
from shared.errors import InvalidRequest
from shared.settings import Settings

ROOT: Final = Path(__file__).resolve().parent.parent
SENTENCES: Final = (
    "make the smile bigger",
    "give this person a fuller beard",
    "add eyeglasses",
    "make the bangs longer",
    "make this person look older",
)
# Entries of timings_ms that are not computing: waiting, what is left over, and the sum.
NOT_STAGES: Final = frozenset({"queue", "overhead", "total"})
# Milliseconds at p50 on two CPU cores; `paper` is reported without one.
GOALS_MS: Final[Mapping[str, float]] = {"fast": 700.0, "balanced": 2000.0}
HOPS_GOAL_MS: Final = 10.0


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    edits: counted edits of `fast` and `balanced`; paper_edits: of `paper`, which takes ten times
    as long. warm_ups: edits made first for each quality, not counted. snr_db: Es/N0, -20..40.
    photos: files as uploaded. align: find the face in them; they are aligned faces otherwise.
    """

    edits: int = 20
    paper_edits: int = 5
    warm_ups: int = 2
    snr_db: float = 6.0
    qualities: tuple[str, ...] = ("fast", "balanced", "paper")
    photos: tuple[bytes, ...] = ()
    align: bool = True

    def __post_init__(self) -> None:
        for name in ("edits", "paper_edits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")

    def count(self, quality: str) -> int:
        """Counted edits of a quality."""
        return self.paper_edits if quality == "paper" else self.edits


@dataclass(frozen=True)
class Sample:
    """One edit: the client's time and what the services said of it, in milliseconds."""

    client_ms: float
    stages_ms: Mapping[str, float]

    @property
    def hops_ms(self) -> float:
        """What is left of the client's time when all computing and waiting is taken away."""
        waited = self.stages_ms.get("queue", 0.0)
        return self.client_ms - waited - sum(_computing(self.stages_ms).values())


@dataclass
class Measured:
    """All edits of one quality."""

    quality: str
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """Percentiles of one quality, in milliseconds; `stages_ms` are medians."""

    p50_ms: float
    p95_ms: float
    hops_p50_ms: float
    hops_p95_ms: float
    stages_ms: Mapping[str, float]


def _computing(timings_ms: Mapping[str, float]) -> dict[str, float]:
    return {name: ms for name, ms in timings_ms.items() if name not in NOT_STAGES}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks, percent in 0..100; ValueError on no values."""
    if not values:
        raise ValueError("percentile of no values; expected at least 1")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(samples: Sequence[Sample]) -> Summary:
    """Percentiles of what the client saw and of the hops, medians of the stages."""
    client = [sample.client_ms for sample in samples]
    hops = [sample.hops_ms for sample in samples]
    names = list(dict.fromkeys(name for s in samples for name in _computing(s.stages_ms)))
    stages = {
        name: statistics.median(sample.stages_ms.get(name, 0.0) for sample in samples)
        for name in names
    }
    return Summary(
        p50_ms=percentile(client, 50),
        p95_ms=percentile(client, 95),
        hops_p50_ms=percentile(hops, 50),
        hops_p95_ms=percentile(hops, 95),
        stages_ms=stages,
    )


def resident_mib(pid: int) -> float | None:
    """Resident memory of a process in MiB; None where the system has no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")), None)
    return None if kib is None else int(kib) / 1024


def one_edit(client: HTTPConnection, photo: bytes, form: Mapping[str, str]) -> Sample:
    """One edit over REST. Raises HTTPException for an answer that is not 200, OSError for none."""
    files = {"image": ("photo.png", photo, "application/octet-stream")}
    upload = httpx.Request("POST", "http://gateway/v1/edits", files=files, data=form)
    body, headers = upload.read(), {"content-type": upload.headers["content-type"]}
    start = time.perf_counter()
    client.request("POST", upload.url.path, body, headers)
    answer = client.getresponse()
    told = answer.read()
    elapsed_ms = (time.perf_counter() - start) * 1000
    if answer.status != 200:
        raise HTTPException(f"{answer.status} {answer.reason}: {told[:500].decode()}")
    return Sample(elapsed_ms, json.loads(told)["timings_ms"])


def measure(url: str, quality: str, options: BenchOptions, timeout_s: float = 120.0) -> Measured:
    """Warm up, then make `options.count(quality)` edits one after another, on one connection to the
    gateway at `url` (http)."""
    client = HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    measured = Measured(quality)
    jobs = zip(cycle(options.photos), cycle(SENTENCES), strict=False)
    total = options.warm_ups + options.count(quality)
    for number, (photo, sentence) in enumerate(islice(jobs, total)):
        form = {
            "instruction": sentence,
            "quality": quality,
            "snr_db": str(options.snr_db),
            "seed": str(number),
            "align": str(options.align).lower(),
        }
        try:
            sample = one_edit(client, photo, form)
        except (HTTPException, OSError) as error:
            client.close()  # the next one opens it again
            measured.failures.append(f"{sentence!r}: {error}")
            continue
        if number >= options.warm_ups:
            measured.samples.append(sample)
    client.close()
    return measured


def _verdict(value: float, goal: float | None) -> str:
    told = f"{value:.0f}" if value >= 100.0 else f"{value:.1f}"
    if goal is None:
        return told
    return f"[{'green' if value < goal else 'red'}]{told}[/] (goal {goal:.0f})"


def report(
    console: Console, measured: Sequence[Measured], memory_mib: Mapping[str, float | None]
) -> None:
    """Print the tables: latency by quality, medians of the stages, memory by process."""
    latency = Table(title="one edit, end to end, ms", title_justify="left")
    for name in ("quality", "edits", "failed", "p50", "p95", "hops p50", "hops p95"):
        latency.add_column(name, justify="left" if name == "quality" else "right")
    summaries = {m.quality: summarise(m.samples) for m in measured if m.samples}
    for one in measured:
        row = [one.quality, str(len(one.samples)), str(len(one.failures))]
        if summary := summaries.get(one.quality):
            row += [
                _verdict(summary.p50_ms, GOALS_MS.get(one.quality)),
                f"{summary.p95_ms:.0f}",
                _verdict(summary.hops_p50_ms, HOPS_GOAL_MS),
                f"{summary.hops_p95_ms:.1f}",
            ]
        latency.add_row(*row)
    console.print(latency)

    stages = Table(title="stages, medians, ms", title_justify="left")
    stages.add_column("stage")
    for quality in summaries:
        stages.add_column(quality, justify="right")
    for name in dict.fromkeys(name for s in summaries.values() for name in s.stages_ms):
        stages.add_row(name, *(f"{s.stages_ms.get(name, 0.0):.1f}" for s in summaries.values()))
    console.print(stages)

    memory = Table(title="resident memory, MiB", title_justify="left")
    memory.add_column("process")
    memory.add_column("RSS", justify="right")
    for name, mib in memory_mib.items():
        memory.add_row(name, "unknown" if mib is None else f"{mib:.0f}")
    console.print(memory)
    for one in measured:
        for failure in one.failures:
            console.print(f"failed, {one.quality}: {failure}", style="red", markup=False)


def _options(argv: Sequence[str] | None) -> BenchOptions:
    defaults = BenchOptions()
    parser = argparse.ArgumentParser(prog="make bench", description="Time edits, end to end.")
    parser.add_argument("--edits", type=int, default=defaults.edits)
    parser.add_argument("--paper-edits", type=int, default=defaults.paper_edits)
    parser.add_argument("--warm-ups", type=int, default=defaults.warm_ups)
    parser.add_argument("--snr-db", type=float, default=defaults.snr_db)
    parser.add_argument(
        "--photos", type=Path, default=ROOT / "samples", help="a folder of photographs"
    )
    parser.add_argument(
        "--quality", action="append", choices=defaults.qualities, help="may be given again"
    )
    given = parser.parse_args(argv)
    try:
        photos = tuple(photo.data for photo in read_photos(given.photos))
    except InvalidRequest as error:
        parser.error(str(error))
    return BenchOptions(
        edits=given.edits,
        paper_edits=given.paper_edits,
        warm_ups=given.warm_ups,
        snr_db=given.snr_db,
        qualities=tuple(given.quality or defaults.qualities),
        photos=photos,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Start, measure, print, stop. Exit status 1 if any edit failed.

    The ports are free ones, so that a demo that is already serving is left alone.
    """
    options = _options(argv)
    console = Console()
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    console.print(
        f"{len(options.photos)} photographs, {options.snr_db:g} dB AWGN, one edit at a time, "
        f"{os.cpu_count()} cores, OMP_NUM_THREADS {threads}"
    )
    started = time.perf_counter()
    with interruptible(), Stack(Settings(), free_ports=True) as stack:
        console.print(f"four processes ready after {time.perf_counter() - started:.1f} s")
        measured = [measure(stack.url, quality, options) for quality in options.qualities]
        memory = {name: resident_mib(pid) for name, pid in stack.pids.items()}
    report(console, measured, memory)
    return 1 if any(one.failures for one in measured) else 0


if __name__ == "__main__":
    raise SystemExit(main())
