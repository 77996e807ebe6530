"""What became of the arrivals of a load test, and the figures made of that.

Every arrival is one of ok (status 200), rejected (another status), failed (none, or no JSON) and
unsent; they add up. Latency counts from the moment at which the request was due.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np

from evaluation.arrivals import Job
from evaluation.bench import percentile

PERCENTS: Final = (50, 95, 99)
# A picture of 8 bits a channel that is drawn again in other company may be rounded otherwise.
SAME_DB: Final = 0.1

Fate = Literal["ok", "rejected", "failed", "unsent"]


@dataclass(frozen=True)
class Outcome:
    """What became of one arrival. Times in seconds from the step's start, latencies in ms.

    status: HTTP status, 0 where there was none. reason: the problem's kind, or what failed.
    """

    due_s: float
    sent_s: float
    done_s: float
    fate: Fate
    status: int
    reason: str
    snr_db: float
    channel: str
    quality: str
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    retry_after: bool = False
    psnr_db: float | None = None
    pixels: str = ""  # hash of the received ones
    job: Job | None = field(default=None, repr=False)

    @property
    def latency_ms(self) -> float:
        """From the moment the request was due to the last byte of its answer."""
        return (self.done_s - self.due_s) * 1000.0

    @property
    def lag_ms(self) -> float:
        """How late this generator was in sending it."""
        return (self.sent_s - self.due_s) * 1000.0

    def row(self) -> dict[str, object]:
        """The outcome in JSON."""
        return {
            "due_s": round(self.due_s, 4),
            "latency_ms": round(self.latency_ms, 2),
            "lag_ms": round(self.lag_ms, 2),
            "fate": self.fate,
            "status": self.status,
            "reason": self.reason,
            "snr_db": self.snr_db,
            "channel": self.channel,
            "quality": self.quality,
            "psnr_db": None if self.psnr_db is None else round(self.psnr_db, 4),
        }


@dataclass(frozen=True)
class Step:
    """One rate, summed up. Percentiles (p50, p95, p99) in ms, of answers with status 200.

    ok + rejected + failed + unsent = arrivals. good: ok within the deadline. goodput: good a second
    over span_s, which ends with the step's time or its last answer, whichever is later.
    """

    rate: float
    seconds: float
    arrivals: int
    ok: int
    good: int
    rejected: Mapping[str, int]
    failed: Mapping[str, int]
    unsent: int
    span_s: float
    goodput: float
    latency_ms: Mapping[str, float]
    rejected_ms: Mapping[str, float]
    stages_ms: Mapping[str, Mapping[str, float]]
    lag_ms: Mapping[str, float]
    busy_without_retry_after: int
    pictures_missing: int


@dataclass(frozen=True)
class QualityAt:
    """PSNR in dB of received against sent pictures at one SNR, under load and without.

    count, under_load: all edits of the load test. pairs: those made again without load;
    pair_under_load, pair_alone: their means both ways; worst: largest difference of a pair;
    identical: pairs with the same pixels.
    """

    snr_db: float
    count: int
    under_load: float
    pairs: int
    pair_under_load: float | None
    pair_alone: float | None
    worst: float | None
    identical: int


@dataclass(frozen=True)
class LoadReport:
    """All of a load test."""

    url: str
    started: str
    options: Mapping[str, object]
    steps: tuple[Step, ...]
    quality: tuple[QualityAt, ...]
    outcomes: tuple[tuple[Outcome, ...], ...]  # [step][arrival]
    baseline_failures: tuple[str, ...] = ()

    @property
    def same_quality(self) -> bool | None:
        """Whether no picture differs by SAME_DB from its pair; None where nothing was paired."""
        worst = [at.worst for at in self.quality if at.worst is not None]
        return max(worst) <= SAME_DB if worst else None

    def to_json(self) -> dict[str, Any]:
        """The report, every arrival included."""
        return {
            "url": self.url,
            "started": self.started,
            "options": dict(self.options),
            "steps": [asdict(step) for step in self.steps],
            "quality": [asdict(at) for at in self.quality],
            "same_quality": self.same_quality,
            "baseline_failures": list(self.baseline_failures),
            "requests": [[outcome.row() for outcome in step] for step in self.outcomes],
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of some values; nothing of none."""
    if not values:
        return {}
    return {f"p{percent}": round(percentile(values, percent), 3) for percent in PERCENTS}


def summarise(rate: float, seconds: float, outcomes: Sequence[Outcome], deadline_s: float) -> Step:
    """One step's figures from its outcomes."""
    ok = [o for o in outcomes if o.fate == "ok"]
    rejected = [o for o in outcomes if o.fate == "rejected"]
    good = sum(o.latency_ms <= deadline_s * 1000.0 for o in ok)
    span_s = max([seconds, *(o.done_s for o in outcomes)])
    names = dict.fromkeys(name for o in ok for name in o.timings_ms)
    return Step(
        rate=rate,
        seconds=seconds,
        arrivals=len(outcomes),
        ok=len(ok),
        good=good,
        rejected=dict(Counter(f"{o.status} {o.reason}" for o in rejected).most_common()),
        failed=dict(Counter(o.reason for o in outcomes if o.fate == "failed").most_common()),
        unsent=sum(o.fate == "unsent" for o in outcomes),
        span_s=round(span_s, 3),
        goodput=good / span_s,
        latency_ms=percentiles([o.latency_ms for o in ok]),
        rejected_ms=percentiles([o.latency_ms for o in rejected]),
        stages_ms={
            name: percentiles([o.timings_ms[name] for o in ok if name in o.timings_ms])
            for name in names
        },
        lag_ms=percentiles([o.lag_ms for o in outcomes if o.fate != "unsent"]),
        busy_without_retry_after=sum(o.status == 429 and not o.retry_after for o in rejected),
        pictures_missing=sum(o.psnr_db is None for o in ok),
    )


def quality_by_snr(
    under_load: Sequence[Outcome], pairs: Sequence[tuple[Outcome, Outcome]]
) -> tuple[QualityAt, ...]:
    """PSNR by SNR; pairs: (under load, alone) of the same edit, both with pictures."""
    table = []
    for snr_db in sorted({o.snr_db for o in under_load if o.psnr_db is not None}):
        here = [o.psnr_db for o in under_load if o.snr_db == snr_db and o.psnr_db is not None]
        both = [
            (loaded.psnr_db, alone.psnr_db, loaded.pixels == alone.pixels)
            for loaded, alone in pairs
            if loaded.snr_db == snr_db and loaded.psnr_db is not None and alone.psnr_db is not None
        ]
        table.append(
            QualityAt(
                snr_db=snr_db,
                count=len(here),
                under_load=float(np.mean(here)),
                pairs=len(both),
                pair_under_load=float(np.mean([a for a, _, _ in both])) if both else None,
                pair_alone=float(np.mean([b for _, b, _ in both])) if both else None,
                worst=max((abs(a - b) for a, b, _ in both), default=None),
                identical=sum(same for _, _, same in both),
            )
        )
    return tuple(table)
