"""`edsc load`: Poisson arrivals against a running gateway, and what became of them.

::

    plan --> |  |    |   | |      |  arrivals, fixed beforehand          (evaluation/arrivals.py)
             v  v    v   v v      v
            POST /v1/edits          each sent when it is due, whatever has not been answered yet
             |
             +--> latency from the moment it was due, status, the stages the answer reports
             '--> GET sent.png, received.png: PSNR under load
    then, one at a time: the same edits again, PSNR without load

Latency counts from the scheduled arrival and not from the sending: a generator or a server that
falls behind cannot make its own figures better (no coordinated omission). Every arrival is one of
ok, rejected, failed or unsent, and they add up.
"""

import asyncio
import hashlib
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.arrivals import Arrival, Job, Mix, by_snr, check_target, plan
from evaluation.outcomes import Fate, LoadReport, Outcome, Step, quality_by_snr, summarise
from shared.errors import DeadlineExceeded, EdscError, InvalidRequest, Unavailable

MOST_RATE: Final = 1000.0  # arrivals a second
MOST_SECONDS: Final = 3600.0  # a step
MOST_ARRIVALS: Final = 100_000  # in all


@dataclass(frozen=True)
class LoadOptions:
    """What to put on whom, and for how long.

    rates: arrivals a second, a step each. seconds: of a step. most: arrivals in all. deadline_s:
    an answer later than this is no good. timeout_s: then the request is given up.
    max_in_flight: requests open at a time; an arrival beyond is counted as unsent. baseline: edits
    made again without load, to compare pictures. allowed_hosts: hosts beside this machine.
    Raises InvalidRequest out of range.
    """

    mix: Mix
    url: str = "http://127.0.0.1:8000"
    rates: tuple[float, ...] = (1.0,)
    seconds: float = 30.0
    most: int = 10_000
    seed: int = 0
    deadline_s: float = 30.0
    timeout_s: float = 60.0
    max_in_flight: int = 1000
    warm_ups: int = 2
    baseline: int = 40
    allowed_hosts: tuple[str, ...] = ()
    api_key: str = ""
    authority: Path | None = None

    def __post_init__(self) -> None:
        check_target(self.url, self.allowed_hosts)
        if not self.rates:
            raise InvalidRequest("no rate is given; expected at least one, in arrivals a second")
        limits: dict[str, tuple[float, float, float]] = {
            **{f"rate {rate:g}": (rate, 0.001, MOST_RATE) for rate in self.rates},
            "seconds": (self.seconds, 0.1, MOST_SECONDS),
            "most": (self.most, 1, MOST_ARRIVALS),
            "deadline_s": (self.deadline_s, 0.001, MOST_SECONDS),
            "timeout_s": (self.timeout_s, 0.001, MOST_SECONDS),
            "max_in_flight": (self.max_in_flight, 1, 10_000),
            "warm_ups": (self.warm_ups, 0, 100),
            "baseline": (self.baseline, 0, 1000),
        }
        for name, (value, low, high) in limits.items():
            if not (isfinite(value) and low <= value <= high):
                raise InvalidRequest(f"{name} is {value:g}; expected {low:g}..{high:g}")


# -------------------------------------------------------------------------------------- one request


def psnr_db(received: NDArray[np.uint8], sent: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two pictures [H, W, 3], peak 255; 99 where equal.

    As evaluation/metrics.py has it, without torch. Raises InvalidRequest for unequal shapes.
    """
    if received.shape != sent.shape:
        raise InvalidRequest(f"got pictures {received.shape} and {sent.shape}, expected equal ones")
    mse = float(np.mean((received.astype(np.float64) - sent.astype(np.float64)) ** 2))
    return 99.0 if mse == 0.0 else 10.0 * float(np.log10(255.0**2 / mse))


def _pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


async def _compare(client: httpx.AsyncClient, images: Mapping[str, str]) -> tuple[float, str]:
    """PSNR of the received picture against the sent one, and a hash of the received pixels."""
    paths = images["sent"], images["received"]
    sent, received = await asyncio.gather(*map(client.get, paths))
    for answer in (sent, received):
        answer.raise_for_status()
    pixels = _pixels(received.content)
    return psnr_db(pixels, _pixels(sent.content)), hashlib.sha256(pixels.tobytes()).hexdigest()


async def one_edit(
    client: httpx.AsyncClient, arrival: Arrival, clock: Callable[[], float], timeout_s: float
) -> Outcome:
    """Send one arrival that is due and see what becomes of it; raises nothing of httpx.

    clock: seconds since the step's start. timeout_s: counts from the moment the request was due.
    """
    job, sent_s = arrival.job, clock()
    fate, status, reason, retry_after = "failed", 0, "", False
    body: dict[str, Any] = {}
    try:
        async with asyncio.timeout(max(0.0, arrival.at_s + timeout_s - sent_s)):
            answer = await client.post(
                "/v1/edits", files={"image": (job.photo.name, job.photo.data)}, data=job.form()
            )
        status = answer.status_code
        body = answer.json()
        fate, reason = ("ok", "") if status == 200 else ("rejected", _kind(body, status))
        retry_after = "retry-after" in answer.headers
    except (TimeoutError, httpx.TimeoutException):
        reason = "timeout"
    except httpx.HTTPError as error:
        reason = type(error).__name__
    except ValueError:
        reason = "not JSON"
    outcome = Outcome(
        due_s=arrival.at_s,
        sent_s=sent_s,
        done_s=clock(),
        fate=_fate(fate),
        status=status,
        reason=reason,
        snr_db=job.order.snr_db,
        channel=job.order.channel.value,
        quality=job.order.quality.value,
        timings_ms=body.get("timings_ms", {}) if fate == "ok" else {},
        retry_after=retry_after,
        job=job,
    )
    if fate != "ok":
        return outcome
    try:  # after the clock has stopped
        async with asyncio.timeout(timeout_s):
            psnr, pixels = await _compare(client, body["images"])
    except (TimeoutError, httpx.HTTPError, OSError, KeyError):
        return outcome  # counted: Step.pictures_missing
    return replace(outcome, psnr_db=psnr, pixels=pixels)


def _fate(word: str) -> Fate:
    fates: dict[str, Fate] = {"ok": "ok", "rejected": "rejected"}
    return fates.get(word, "failed")


def _kind(body: object, status: int) -> str:
    kind = body.get("type", "") if isinstance(body, dict) else ""
    return str(kind).rpartition(":")[2] or str(status)


async def run_step(
    client: httpx.AsyncClient,
    arrivals: Sequence[Arrival],
    *,
    timeout_s: float,
    max_in_flight: int,
) -> list[Outcome]:
    """Send every arrival when it is due; gives the outcomes in the order of arrival."""
    start = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start

    open_requests: set[asyncio.Task[Outcome]] = set()
    tasks: list[asyncio.Task[Outcome] | Outcome] = []
    for arrival in arrivals:
        if (wait_s := arrival.at_s - clock()) > 0.0:
            await asyncio.sleep(wait_s)
        if len(open_requests) >= max_in_flight:
            tasks.append(_unsent(arrival, clock()))
            continue
        task = asyncio.create_task(one_edit(client, arrival, clock, timeout_s))
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
        tasks.append(task)
    return [task if isinstance(task, Outcome) else await task for task in tasks]


def _unsent(arrival: Arrival, now_s: float) -> Outcome:
    order = arrival.job.order
    return Outcome(
        arrival.at_s, now_s, now_s, "unsent", 0, "too many open requests",
        order.snr_db, order.channel.value, order.quality.value, job=arrival.job,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- the whole test


def run_load(options: LoadOptions, tell: Callable[[str], None] = lambda line: None) -> LoadReport:
    """Put the load on and measure. tell: called with a line of news for each step.

    Raises Unavailable where the gateway does not answer or is not ready at the start, and what it
    raises where the warm-up edits fail.
    """
    return asyncio.run(_run(options, tell))


async def _run(options: LoadOptions, tell: Callable[[str], None]) -> LoadReport:
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    steps, all_outcomes = [], []
    left = options.most
    async with _client(options) as client:
        await _ready(client, options)
        for number, rate in enumerate(options.rates):
            if left <= 0:
                tell(f"{rate:g}/s: left out, {options.most} arrivals are used up")
                continue
            arrivals = plan(
                options.mix, rate, options.seconds, most=left, seed=options.seed + number
            )
            left -= len(arrivals)
            outcomes = await run_step(
                client, arrivals, timeout_s=options.timeout_s, max_in_flight=options.max_in_flight
            )
            # Cut short by `most`, a step ends with its last arrival.
            cut = left <= 0 and bool(arrivals)
            seconds = arrivals[-1].at_s if cut else options.seconds
            step = summarise(rate, seconds, outcomes, options.deadline_s)
            tell(_line(step))
            steps.append(step)
            all_outcomes.append(tuple(outcomes))
        pairs, failures = await _alone(client, all_outcomes, options)
    seen = [outcome for step_outcomes in all_outcomes for outcome in step_outcomes]
    return LoadReport(
        url=options.url,
        started=started,
        options={
            "mix": options.mix.describe(),
            "rates": list(options.rates),
            "seconds": options.seconds,
            "most": options.most,
            "seed": options.seed,
            "deadline_s": options.deadline_s,
            "timeout_s": options.timeout_s,
            "max_in_flight": options.max_in_flight,
            "baseline": options.baseline,
        },
        steps=tuple(steps),
        quality=quality_by_snr(seen, pairs),
        outcomes=tuple(all_outcomes),
        baseline_failures=tuple(failures),
    )


def _client(options: LoadOptions) -> httpx.AsyncClient:
    verify: Any = True
    if options.authority is not None:
        import ssl

        verify = ssl.create_default_context(cafile=str(options.authority))
    return httpx.AsyncClient(
        base_url=options.url,
        # One deadline for a whole request is kept in one_edit; no queue for connections here.
        timeout=httpx.Timeout(options.timeout_s),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        headers={"authorization": f"Bearer {options.api_key}"} if options.api_key else {},
        verify=verify,
        trust_env=False,  # a proxy between would be what is measured
    )


async def _ready(client: httpx.AsyncClient, options: LoadOptions) -> None:
    try:
        answer = await client.get("/readyz")
    except httpx.HTTPError as error:
        raise Unavailable(f"{options.url} does not answer: {error}") from None
    if answer.status_code != 200:
        raise Unavailable(f"{options.url} is not ready: {answer.text[:300]}")
    random = np.random.default_rng([options.seed, 2])
    for _ in range(options.warm_ups):
        outcome = await _now(client, options.mix.draw(random), options.timeout_s)
        if outcome.reason == "timeout":
            raise DeadlineExceeded(f"a first edit took more than {options.timeout_s:g} s")
        # A sentence or a photo may be refused: that is part of the mix.
        if outcome.status in (0, 401, 403) or outcome.status >= 500:
            raise EdscError(f"a first edit ended with {outcome.status} {outcome.reason}")


async def _now(client: httpx.AsyncClient, job: Job, timeout_s: float) -> Outcome:
    start = time.perf_counter()
    return await one_edit(client, Arrival(0.0, job), lambda: time.perf_counter() - start, timeout_s)


async def _alone(
    client: httpx.AsyncClient, steps: Sequence[Sequence[Outcome]], options: LoadOptions
) -> tuple[list[tuple[Outcome, Outcome]], list[str]]:
    """Some of the edits again, one at a time; pairs of outcomes, and what went wrong."""
    loaded = {id(o.job): o for step in steps for o in step if o.psnr_db is not None and o.job}
    again = by_snr([o.job for o in loaded.values() if o.job], options.baseline)
    pairs, failures = [], []
    for job in again:
        outcome = await _now(client, job, options.timeout_s)
        if outcome.psnr_db is None:
            failures.append(f"{outcome.status} {outcome.reason or 'no picture'}")
        else:
            pairs.append((loaded[id(job)], outcome))
    return pairs, failures


def _line(step: Step) -> str:
    lost = sum(step.rejected.values()), sum(step.failed.values()), step.unsent
    spread = ", ".join(f"{name} {ms:.0f}" for name, ms in step.latency_ms.items()) or "none"
    return (
        f"{step.rate:g}/s for {step.seconds:.0f} s: {step.arrivals} arrivals, {step.ok} ok, "
        f"{lost[0]} rejected, {lost[1]} failed, {lost[2]} unsent; goodput {step.goodput:.2f}/s; "
        f"latency, ms: {spread}"
    )
