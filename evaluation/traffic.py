"""Load for a running gateway, and what became of it.

::

    closed_loop   N clients, each sends its next edit when it has the answer: finds the capacity
    open_loop     edits at random times (Poisson) of a given rate, whether or not answers come:
                  what users do, and the only way to see what happens above the capacity

Every request ends as an `Outcome`: nothing is retried, nothing left out.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

import httpx

SENTENCES: Final = (
    "make the smile bigger",
    "give this person a fuller beard",
    "add eyeglasses",
    "make the bangs longer",
    "make this person look older",
)
LOST: Final = 0  # the status of a request that got no answer at all
BUSY: Final = 429


@dataclass(frozen=True)
class Outcome:
    """One edit. began_s, ended_s: time.monotonic(). status: HTTP, or LOST. why: of a failure."""

    began_s: float
    ended_s: float
    status: int
    why: str = ""

    @property
    def seconds(self) -> float:
        """From the first byte sent to the last received."""
        return self.ended_s - self.began_s


@dataclass
class Traffic:
    """What edits look like, and the outcomes so far (appended by one thread, read by any)."""

    url: str
    photos: Sequence[bytes]
    quality: str = "fast"
    snr_db: float = 6.0
    align: bool = True
    timeout_s: float = 90.0
    outcomes: list[Outcome] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=count)

    async def one(self, client: httpx.AsyncClient) -> Outcome:
        """Send one edit; photos, sentences and seeds take turns."""
        number = next(self._number)
        data = {
            "instruction": SENTENCES[number % len(SENTENCES)],
            "quality": self.quality,
            "snr_db": str(self.snr_db),
            "seed": str(number),
            "align": str(self.align).lower(),
        }
        photo = self.photos[number % len(self.photos)]
        began_s = time.monotonic()
        status, why = LOST, ""
        try:
            answer = await client.post("/v1/edits", files={"image": ("photo", photo)}, data=data)
            status = answer.status_code
            if status != 200:
                why = f"{answer.json().get('detail', '')} ({answer.headers.get('retry-after')})"
        except (httpx.HTTPError, ValueError) as error:
            why = repr(error)
        outcome = Outcome(began_s, time.monotonic(), status, why)
        self.outcomes.append(outcome)
        return outcome

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client that makes a connection an edit: it never meets one that is being closed."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self.url, timeout=self.timeout_s, limits=limits
        ) as client:
            yield client


async def _closed(traffic: Traffic, clients: int, seconds: float) -> None:
    end_s = time.monotonic() + seconds

    async def client_of_its_own(client: httpx.AsyncClient) -> None:
        while time.monotonic() < end_s:
            if (await traffic.one(client)).status != 200:
                await asyncio.sleep(0.1)

    async with traffic.client() as client:
        await asyncio.gather(*(client_of_its_own(client) for _ in range(clients)))


def closed_loop(traffic: Traffic, clients: int, seconds: float) -> None:
    """`clients` edits under way at all times for `seconds`; returns when the last is answered."""
    asyncio.run(_closed(traffic, clients, seconds))


async def _open(traffic: Traffic, rate_hz: float, seed: int, over: Callable[[float], bool]) -> None:
    random_times = random.Random(seed)
    under_way: set[asyncio.Task[Outcome]] = set()
    start_s = next_s = time.monotonic()
    async with traffic.client() as client:
        # By the time that it was due, not by the clock: on a busy machine nothing is left out.
        while not over((next_s := next_s + random_times.expovariate(rate_hz)) - start_s):
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            task = asyncio.create_task(traffic.one(client))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)


def open_loop(traffic: Traffic, rate_hz: float, seconds: float, seed: int = 0) -> None:
    """Edits at `rate_hz` a second on average for `seconds`; returns when the last is answered."""
    asyncio.run(_open(traffic, rate_hz, seed, lambda elapsed_s: elapsed_s >= seconds))


@contextmanager
def in_background(traffic: Traffic, rate_hz: float, seed: int = 0) -> Iterator[None]:
    """Open-loop load for as long as the block lasts, and until its last edit is answered."""
    end = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="traffic") as pool:
        load = pool.submit(
            lambda: asyncio.run(_open(traffic, rate_hz, seed, lambda _: end.is_set()))
        )
        try:
            yield
        finally:
            end.set()
            load.result()


# --------------------------------------------------------------------------------- what came of it


def goodput_hz(outcomes: Sequence[Outcome], from_s: float, to_s: float) -> float:
    """Edits answered with 200 a second, between two moments of time.monotonic()."""
    if to_s <= from_s:
        raise ValueError(f"from {from_s:g} s to {to_s:g} s is no time")
    done = sum(1 for one in outcomes if one.status == 200 and from_s <= one.ended_s < to_s)
    return done / (to_s - from_s)


def statuses(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How often each status came; `lost` for no answer."""
    found = Counter("lost" if one.status == LOST else str(one.status) for one in outcomes)
    return dict(sorted(found.items()))


def failures(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """What was neither done nor turned away at the door."""
    return [one for one in outcomes if one.status not in (200, BUSY)]


def resident_mib(pids: Sequence[int]) -> float:
    """Resident memory of processes together, MiB; 0 where the system has no /proc."""
    total_kib = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return total_kib / 1024


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time that processes have used, seconds; 0 where the system has no /proc."""
    total = 0.0
    for pid in pids:
        try:
            # After the name, which may hold blanks: utime and stime are fields 14 and 15.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / 100.0  # USER_HZ is 100 on every Linux
    return total


def pin(pids: Sequence[int]) -> None:
    """Give every process one core, in turn, with all its threads. Linux only."""
    cores = sorted(os.sched_getaffinity(0))
    for number, pid in enumerate(pids):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {cores[number % len(cores)]})
