"""What a load test asks for, and when: a mix of edits on a Poisson process.

::

    Mix     photos x sentences x SNRs x channels x qualities   --draw-->  Job
    rate    exponential gaps, mean 1/rate                      ------->  Arrival(at_s, Job)

Arrivals are drawn before the first is sent and wait for nobody: a server that slows down gets as
many requests as one that does not (an open loop). The same seed gives the same arrivals.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from gateway.answer import SNR_MAX_DB, SNR_MIN_DB, UNEDITED, ChannelName, Order, Quality
from shared.errors import InvalidRequest

SENTENCES: Final = (
    "make the smile bigger",
    "give this person a fuller beard",
    "add eyeglasses",
    "make the bangs longer",
    "make this person look older",
    UNEDITED,
)
SNRS_DB: Final = (-6.0, 0.0, 6.0, 12.0, 18.0)  # the paper's
SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp")
MOST_PHOTOS: Final = 1000  # they are held in memory


@dataclass(frozen=True)
class Photo:
    """A file as it is uploaded."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Job:
    """One edit to ask for: a photo and the fields of POST /v1/edits."""

    photo: Photo
    order: Order

    def form(self) -> dict[str, str]:
        """The fields as a form has them."""
        return {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in vars(self.order).items()
        }


@dataclass(frozen=True)
class Arrival:
    """A job and the moment at which it is due, seconds from the start."""

    at_s: float
    job: Job


@dataclass(frozen=True)
class Mix:
    """What may be asked for; every choice is uniform, so a value given twice comes twice as often.

    snrs_db: Es/N0 in dB, -20..40. align: find the face, as for a photograph; False for pictures
    that are aligned already. Raises InvalidRequest for an empty choice or an SNR out of range.
    """

    photos: tuple[Photo, ...]
    sentences: tuple[str, ...] = SENTENCES
    snrs_db: tuple[float, ...] = SNRS_DB
    channels: tuple[ChannelName, ...] = tuple(ChannelName)
    qualities: tuple[Quality, ...] = (Quality.FAST,)
    align: bool = True

    def __post_init__(self) -> None:
        for name in ("photos", "sentences", "snrs_db", "channels", "qualities"):
            if not getattr(self, name):
                raise InvalidRequest(f"{name} is empty; expected at least one to choose from")
        for snr_db in self.snrs_db:
            if not SNR_MIN_DB <= snr_db <= SNR_MAX_DB:
                raise InvalidRequest(
                    f"snr_db is {snr_db:g}; expected {SNR_MIN_DB:g}..{SNR_MAX_DB:g} dB"
                )

    def draw(self, random: np.random.Generator) -> Job:
        """One job, with a channel seed of its own."""

        def one_of(count: int) -> int:
            return int(random.integers(count))

        order = Order(
            self.sentences[one_of(len(self.sentences))],
            snr_db=self.snrs_db[one_of(len(self.snrs_db))],
            channel=self.channels[one_of(len(self.channels))],
            quality=self.qualities[one_of(len(self.qualities))],
            seed=int(random.integers(2**32)),
            align=self.align,
        )
        return Job(self.photos[one_of(len(self.photos))], order)

    def describe(self) -> dict[str, object]:
        """The mix in JSON, photos by number."""
        return {
            "photos": len(self.photos),
            "sentences": list(self.sentences),
            "snrs_db": list(self.snrs_db),
            "channels": [channel.value for channel in self.channels],
            "qualities": [quality.value for quality in self.qualities],
        }


def poisson_times(rate: float, seconds: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Times in [0, seconds) of a Poisson process of `rate` arrivals a second, rising [N].

    The gaps are exponential with mean 1/rate, so N is Poisson with mean and variance
    rate * seconds. Raises InvalidRequest where either is not positive.
    """
    if not (rate > 0.0 and seconds > 0.0):
        raise InvalidRequest(f"rate is {rate:g}/s for {seconds:g} s; expected both above 0")
    expected = rate * seconds
    times: NDArray[np.float64] = np.empty(0)
    while not times.size or times[-1] < seconds:
        # Six standard deviations more than the mean: once round, nearly always.
        gaps = random.exponential(1.0 / rate, int(expected + 6.0 * expected**0.5) + 8)
        last = times[-1] if times.size else 0.0
        times = np.concatenate([times, last + np.cumsum(gaps)])
    return times[times < seconds]


def plan(mix: Mix, rate: float, seconds: float, *, most: int, seed: int) -> list[Arrival]:
    """Arrivals of `mix` at `rate` a second over `seconds`, `most` of them at most."""
    # Times and jobs have streams of their own: the same edits, whatever the rate.
    times, jobs = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    return [
        Arrival(float(at_s), mix.draw(jobs)) for at_s in poisson_times(rate, seconds, times)[:most]
    ]


def read_photos(folder: Path) -> tuple[Photo, ...]:
    """The photographs of a folder, by name. Raises InvalidRequest where there are none."""
    paths = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise InvalidRequest(f"{folder} has no photographs; expected some of {', '.join(SUFFIXES)}")
    return tuple(Photo(path.name, path.read_bytes()) for path in paths[:MOST_PHOTOS])


def read_sentences(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty."""
    return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())


def check_target(url: str, allowed: Sequence[str]) -> None:
    """Raise InvalidRequest unless `url` is on this machine or its host is one of `allowed`.

    A load test of somebody else's machine is an attack; nobody should run one by a slip.
    """
    parts = urlsplit(url)
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidRequest(f"url is {url!r}; expected http:// or https:// and a host")
    if host not in allowed and not _loopback(host):
        raise InvalidRequest(
            f"{host} is not this machine; to put load on it name it once more: --allow-host {host}"
        )


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def by_snr(jobs: Sequence[Job], most: int) -> list[Job]:
    """At most `most` of `jobs`, taken from every SNR in turn."""
    groups: Mapping[float, list[Job]] = {}
    groups = {snr_db: [] for snr_db in sorted({job.order.snr_db for job in jobs})}
    for job in jobs:
        groups[job.order.snr_db].append(job)
    return list(_in_turn(list(groups.values())))[:most]


def _in_turn(groups: Sequence[Sequence[Job]]) -> Iterator[Job]:
    for place in range(max(map(len, groups), default=0)):
        for group in groups:
            if place < len(group):
                yield group[place]
