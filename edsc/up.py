"""The four services on one machine: start, wait for health, forward logs, stop together.

::

    Stack --> python -m transmitter  x N  |
          --> python -m channel_sim  x N  |  each with its port; logs come back as `name | line`
          --> python -m receiver     x N  |
          --> python -m baselines    x N  |  if wanted: the schemes compared with
          --> python -m gateway      x N  |  told where all of them are; they share one listener

If one dies while starting, whoever waits is told which and with what last words. Once all serve,
`watch` starts a process that dies again, after a pause that grows; `roll` restarts them one after
another. On the way out all are drained.

The gateways' listener is opened here and handed down, so a connection that comes while a gateway is
being replaced waits in it and is not refused.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Literal, Self, TypeVar

import httpx

from gateway.__main__ import open_listener
from shared.errors import EdscError, InvalidRequest, Unavailable
from shared.rpc import GrpcService
from shared.settings import AT_BARRIERS, ServiceName, Settings

ROOT: Final = Path(__file__).resolve().parent.parent
MODULES: Final[Mapping[ServiceName, str]] = {
    "transmitter": "transmitter",
    "channel": "channel_sim",
    "receiver": "receiver",
    "baselines": "baselines",
    "gateway": "gateway",
}
SERVICES: Final[tuple[ServiceName, ...]] = ("transmitter", "channel", "receiver", "gateway")
START_S: Final = 120.0  # weights from a cold disk, four imports of torch on two cores
MOST_REPLICAS: Final = 64
NameT = TypeVar("NameT", bound=str)
LAST_WORDS: Final = 30  # lines kept of each process
SPARE_S: Final = 5.0  # on top of the drain, before a process is killed
SETTLE_S: Final = 1.5  # before a client is sure to have found a process that came back
PAUSE_S: Final = 0.5  # before a process that died is started again; doubles each time
LONGEST_PAUSE_S: Final = 30.0
STEADY_S: Final = 60.0  # a process that ran so long before it died starts with the short pause


@dataclass(eq=False)
class _Process:
    """One replica of a service: `transmitter` is the first, `transmitter-2` the next."""

    name: str
    service: ServiceName
    port: int  # 0 until it said which
    popen: subprocess.Popen[str] | None = None
    reader: threading.Thread | None = None
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_WORDS))
    ready: bool = False
    started_at: float = 0.0
    failures: int = 0  # ends that nobody asked for, in a row
    again_at: float | None = None

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs or where it was not started."""
        return None if self.popen is None else self.popen.poll()


class Stack:
    """The processes. Use as a context manager: started and healthy inside, stopped after.

    settings: ports, weights, limits; handed to the processes as EDSC_* variables.
    free_ports: let the system choose every port (tests, a second stack on one machine).
    baselines: start the fifth service too, which carries the schemes compared with.
    log: called with (name, line) for every line that a process prints; any thread.
    replicas: how many of each service; 1 where not said. Further ones take free ports. Naming
    `baselines` starts it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        free_ports: bool = False,
        baselines: bool = False,
        log: Callable[[str, str], None] | None = None,
        replicas: Mapping[ServiceName, int] | None = None,
    ) -> None:
        self.settings = settings
        counts = dict(replicas or {})
        fifth = baselines or "baselines" in counts
        extra: tuple[Literal["baselines"], ...] = ("baselines",) if fifth else ()
        self._behind: tuple[GrpcService, ...] = ("transmitter", "channel", "receiver", *extra)
        # The gateway last: it is told where the others are.
        self.services: tuple[ServiceName, ...] = (*self._behind, "gateway")
        self._log = log
        self._changed = threading.Condition()
        self._listener: socket.socket | None = None
        self.replicas: dict[ServiceName, int] = {
            service: counts.get(service, 1) for service in self.services
        }
        if min(self.replicas.values()) < 1:
            raise InvalidRequest(f"replicas are {self.replicas}; expected at least 1 of each")
        self._all: dict[str, _Process] = {}
        for service, count in self.replicas.items():
            for number in range(1, count + 1):
                name = service if number == 1 else f"{service}-{number}"
                port = 0 if free_ports or number > 1 else settings.port(service)
                self._all[name] = _Process(name, service, port)

    # ---------------------------------------------------------------------------------- looking at

    @property
    def url(self) -> str:
        """Address of the page and of the REST interface."""
        scheme = "https" if self.settings.https else "http"
        return f"{scheme}://{_reachable(self.settings.host)}:{self._all['gateway'].port}"

    @property
    def pids(self) -> dict[str, int]:
        """Process id of every replica that was started."""
        return {one.name: one.popen.pid for one in self._all.values() if one.popen is not None}

    def is_ready(self, name: str) -> bool:
        """Whether a replica runs and has said that it serves."""
        one = self._all[name]
        return one.ready and one.popen is not None and one.status is None

    def target(self, service: ServiceName) -> str:
        """host:port of every replica of a service, with commas between."""
        host = _reachable(self.settings.host)
        return ",".join(
            f"{host}:{one.port}" for one in self._all.values() if one.service == service
        )

    def check(self) -> None:
        """Raise Unavailable with the last words of a process that has died."""
        for one in self._all.values():
            if (status := one.status) is not None:
                if one.reader is not None:
                    one.reader.join(timeout=1.0)
                words = "\n".join(f"  {line}" for line in one.last_words)
                raise Unavailable(f"the {one.name} ended with status {status}\n{words}".rstrip())

    # -------------------------------------------------------------------------- starting, stopping

    def __enter__(self) -> Self:
        first = [one.name for one in self._all.values() if one.service != "gateway"]
        last = [one.name for one in self._all.values() if one.service == "gateway"]
        try:
            for names in (first, last):
                for name in names:
                    self.start(name)
                for name in names:
                    self._wait_for(name, lambda one: one.port > 0, "opened no port")
            for name in first:
                self._wait_for(name, lambda one: one.ready, "is not ready")
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, name: str) -> None:
        """Start one process, on the port that it had before if it had one."""
        one = self._all[name]
        environment = self._environment(one.service)
        keep: tuple[int, ...] = ()
        if one.service == "gateway":
            keep = (self._listen(one).fileno(),)
            environment["EDSC_LISTEN_FD"] = str(keep[0])
        one.ready, one.again_at, one.started_at = False, None, time.monotonic()
        one.last_words.clear()
        one.popen = subprocess.Popen(
            [sys.executable, "-u", "-m", MODULES[one.service], "--port", str(one.port)],
            cwd=ROOT,
            env=environment,
            pass_fds=keep,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us alone; we then stop them in order
        )
        one.reader = threading.Thread(target=self._read, args=(one, one.popen), daemon=True)
        one.reader.start()

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Block until all services are SERVING, as the gateway sees them, and the baselines are.

        Raises Unavailable when one dies or when `timeout_s` seconds are over.
        """
        deadline = time.monotonic() + timeout_s
        states: object = "no answer"
        unseen = [one.name for one in self._all.values() if one.service == "baselines"]
        with httpx.Client(base_url=self.url, timeout=5.0, verify=False) as client:
            while time.monotonic() < deadline:
                self.check()
                try:
                    answer = client.get("/readyz")
                    # The gateway is ready without the baselines: they say it themselves.
                    late = [name for name in unseen if not self.is_ready(name)]
                    if answer.status_code == 200 and not late:
                        return
                    states = late or answer.json().get("services")
                except httpx.HTTPError as error:
                    states = error
                time.sleep(0.1)
        raise Unavailable(f"not ready after {timeout_s:g} s: {states}")

    def wait_end(self, name: str, timeout_s: float) -> int:
        """Block until a process ends by itself; gives its exit status."""
        popen = self._all[name].popen
        assert popen is not None
        try:
            return popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the {name} still runs after {timeout_s:g} s") from None

    def kill(self, name: str) -> None:
        """kill -9 one process and wait for its end: what a test of faults wants."""
        popen = self._all[name].popen
        if popen is not None:
            popen.kill()
        self._end(self._all[name], timeout_s=None)

    def stop(self) -> None:
        """Drain the gateway first, so that edits under way still find the services; then those."""
        for services in (("gateway",), self._behind):
            self._stop([one for one in self._all.values() if one.service in services])
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _stop(self, these: Sequence[_Process]) -> None:
        """SIGTERM, the time to drain, SIGKILL."""
        for one in these:
            if one.popen is not None and one.popen.poll() is None:
                one.popen.terminate()
        deadline = time.monotonic() + self.settings.drain_s + SPARE_S
        for one in these:
            self._end(one, timeout_s=max(0.0, deadline - time.monotonic()))

    def _end(self, one: _Process, timeout_s: float | None) -> None:
        popen, one.popen, one.again_at = one.popen, None, None
        if popen is None:
            return
        try:
            popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        if one.reader is not None:
            one.reader.join(timeout=1.0)
        assert popen.stdout is not None
        popen.stdout.close()

    # ------------------------------------------------------------------------------ while it serves

    def supervise(self) -> None:
        """Start what has died again, after a pause that doubles with every failure in a row."""
        for one in self._all.values():
            status, now = one.status, time.monotonic()
            if status is None:
                continue
            if one.again_at is None:
                if now - one.started_at > STEADY_S:
                    one.failures = 0
                pause_s = min(PAUSE_S * 2**one.failures, LONGEST_PAUSE_S)
                one.failures += 1
                one.again_at = now + pause_s
                self._say(one.name, f"ended with status {status}; again in {pause_s:g} s")
            elif now >= one.again_at:
                self._end(one, timeout_s=None)
                self.start(one.name)

    def roll(self, services: Sequence[ServiceName] | None = None) -> None:
        """Restart every replica, one after another, each when the last one serves.

        services: of these only; None: of all.
        With two replicas or more of a service (and of gateways any number: they share a listener)
        no request fails. Raises Unavailable when one does not come back.
        """
        for one in self._all.values():
            if services is not None and one.service not in services:
                continue
            if one.service == "gateway":
                self._replace(one)
                continue
            self._stop([one])
            self.start(one.name)
            self._wait_for(one.name, lambda it: it.ready, "is not ready")
            time.sleep(SETTLE_S)  # a client finds it again at most half a second later

    def _replace(self, one: _Process) -> None:
        """A gateway: the next one listens before the old one stops."""
        old = _Process(one.name, one.service, one.port, one.popen, one.reader)
        self.start(one.name)
        self._wait_for(one.name, lambda it: it.ready, "is not ready")
        time.sleep(SETTLE_S)
        self._stop([old])

    # ------------------------------------------------------------------------------------- details

    def _listen(self, one: _Process) -> socket.socket:
        """The listener of all gateways, opened when the first one starts. OSError when taken."""
        if self._listener is None:
            host = self.settings.host
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = open_listener(family, (host, one.port))
        for each in self._all.values():
            if each.service == "gateway":
                each.port = self._listener.getsockname()[1]
        return self._listener

    def _environment(self, service: ServiceName) -> dict[str, str]:
        environment = {**AT_BARRIERS, **os.environ}
        for field_name, value in self.settings.model_dump(mode="json").items():
            if value not in (None, ""):
                environment[f"EDSC_{field_name.upper()}"] = str(value)
        # One metrics port cannot serve them all; the gateway's are at /metrics anyway.
        environment.pop("EDSC_METRICS_PORT", None)
        if self.replicas[service] > 1 and not self.settings.threads:
            # More threads than cores, over all replicas, make each of them slower than one.
            threads = str(max(1, (os.cpu_count() or 1) // self.replicas[service]))
            environment["EDSC_THREADS"] = environment["OMP_NUM_THREADS"] = threads
        if service == "gateway":
            for each in self._behind:
                environment[f"EDSC_{each.upper()}_TARGET"] = self.target(each)
        return environment

    def _read(self, one: _Process, popen: subprocess.Popen[str]) -> None:
        assert popen.stdout is not None
        for line in popen.stdout:
            line = line.rstrip("\n")
            with self._changed:
                if line.startswith(f"{one.service} listening on "):
                    one.port = int(line.rpartition(":")[2])
                    one.ready = one.ready or one.service == "gateway"
                elif line == f"{one.service} ready":
                    one.ready = True
                self._changed.notify_all()
            one.last_words.append(line)
            self._say(one.name, line)

    def _say(self, name: str, line: str) -> None:
        if self._log is not None:
            self._log(name, line)

    def _wait_for(self, name: str, there: Callable[[_Process], bool], otherwise: str) -> None:
        one = self._all[name]
        deadline = time.monotonic() + START_S
        with self._changed:
            while not there(one):
                if one.status is not None:
                    self.check()
                if time.monotonic() > deadline:
                    raise Unavailable(f"the {name} {otherwise} within {START_S:g} s")
                self._changed.wait(0.2)


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


class Interrupted(EdscError):
    """SIGTERM or Ctrl-C: leave, and stop what was started."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into Interrupted in the main thread, so that stacks are left well.

    A second signal, while the first is being obeyed, is ignored.
    """

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signal.Signals(signum).name)

    old = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


def watch(stack: Stack) -> None:
    """Keep serving, starting again what dies, until a signal comes (Interrupted)."""
    while True:
        stack.supervise()
        time.sleep(0.25)


def print_log(name: str, line: str) -> None:
    """One line of a process on stderr, with its name."""
    print(f"{name:>13} | {line}", file=sys.stderr, flush=True)


def parse_replicas(text: str) -> dict[ServiceName, int]:
    """`transmitter=2,receiver=2` -> counts. Raises InvalidRequest for anything else."""
    return parse_counts(text, tuple(MODULES), MOST_REPLICAS)


def parse_counts(text: str, services: Sequence[NameT], most: int) -> dict[NameT, int]:
    """`NAME=COUNT,...` -> counts of 1..most for some of the services.

    Raises InvalidRequest for anything else.
    """
    counts: dict[NameT, int] = {}
    for part in filter(None, text.split(",")):
        name, _, count = part.strip().partition("=")
        service = next((one for one in services if one == name), None)
        if service is None or not count.isdecimal() or not 1 <= int(count) <= most:
            raise InvalidRequest(
                f"replicas has {part!r}; expected SERVICE=1..{most} with one of "
                f"{', '.join(services)}"
            )
        counts[service] = int(count)
    return counts
