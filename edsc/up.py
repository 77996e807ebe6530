"""The four processes on one machine: start, wait for health, forward logs, stop together.

::

    Stack --> python -m transmitter   |
          --> python -m channel_sim   |  each with its port; logs come back as `name | line`
          --> python -m receiver      |
          --> python -m gateway       |  told where the three are
          --> python -m baselines     |  if wanted: the schemes compared with

If one dies, whoever waits is told which and with what last words; on the way out all are drained.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Literal, Self

import httpx

from shared.errors import EdscError, Unavailable
from shared.rpc import GrpcService, wait_until_serving
from shared.settings import ServiceName, Settings

ROOT: Final = Path(__file__).resolve().parent.parent
MODULES: Final[Mapping[ServiceName, str]] = {
    "transmitter": "transmitter",
    "channel": "channel_sim",
    "receiver": "receiver",
    "gateway": "gateway",
    "baselines": "baselines",
}
START_S: Final = 120.0  # weights from a cold disk, four imports of torch on two cores
LAST_WORDS: Final = 30  # lines kept of each process
SPARE_S: Final = 5.0  # on top of the drain, before a process is killed


class Stack:
    """The processes. Use as a context manager: started and healthy inside, stopped after.

    settings: ports, weights, limits; handed to the processes as EDSC_* variables.
    free_ports: let the system choose every port (tests, a second stack on one machine).
    baselines: start the fifth process, which carries the schemes compared with.
    log: called with (service, line) for every line that a process prints; any thread.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        free_ports: bool = False,
        baselines: bool = False,
        log: Callable[[ServiceName, str], None] | None = None,
    ) -> None:
        self.settings = settings
        extra: tuple[Literal["baselines"], ...] = ("baselines",) if baselines else ()
        self._services: tuple[GrpcService, ...] = ("transmitter", "channel", "receiver", *extra)
        self._free_ports = free_ports
        self._log = log
        self._processes: dict[ServiceName, subprocess.Popen[str]] = {}
        self._readers: dict[ServiceName, threading.Thread] = {}
        self._last_words: dict[ServiceName, deque[str]] = {}
        self._ports: dict[ServiceName, int] = {}
        self._listening = threading.Condition()

    # ---------------------------------------------------------------------------------- looking at

    @property
    def url(self) -> str:
        """Address of the page and of the REST interface."""
        scheme = "https" if self.settings.https else "http"
        return f"{scheme}://{_reachable(self.settings.host)}:{self._ports['gateway']}"

    @property
    def pids(self) -> dict[str, int]:
        """Process id of each."""
        return {name: process.pid for name, process in self._processes.items()}

    def target(self, service: ServiceName) -> str:
        """host:port of a process."""
        return f"{_reachable(self.settings.host)}:{self._ports[service]}"

    def check(self) -> None:
        """Raise Unavailable with the last words of a process that has died."""
        for name, process in self._processes.items():
            if (status := process.poll()) is not None:
                self._readers[name].join(timeout=1.0)
                words = "\n".join(f"  {line}" for line in self._last_words[name])
                raise Unavailable(f"the {name} ended with status {status}\n{words}".rstrip())

    # -------------------------------------------------------------------------- starting, stopping

    def __enter__(self) -> Self:
        try:
            for name in self._services:
                self.start(name)
            for name in self._services:
                self._wait_listening(name)
            self.start("gateway")
            self._wait_listening("gateway")
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

    def start(self, name: ServiceName) -> None:
        """Start one process, on the port that it had before if it had one."""
        port = self._ports.pop(name, 0 if self._free_ports else self.settings.port(name))
        self._last_words[name] = deque(maxlen=LAST_WORDS)
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", MODULES[name], "--port", str(port)],
            cwd=ROOT,
            env=self._environment(name),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us alone; we then stop them in order
        )
        self._processes[name] = process
        reader = threading.Thread(target=self._read, args=(name, process), daemon=True)
        self._readers[name] = reader
        reader.start()

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Block until all services are SERVING, as the gateway sees them.

        Raises Unavailable when one dies or when `timeout_s` seconds are over.
        """
        deadline = time.monotonic() + timeout_s
        if "baselines" in self._services:
            self._wait_baselines(deadline)
        states: object = "no answer"
        with httpx.Client(base_url=self.url, timeout=5.0, verify=False) as client:
            while time.monotonic() < deadline:
                self.check()
                try:
                    answer = client.get("/readyz")
                    if answer.status_code == 200:
                        return
                    states = answer.json().get("services")
                except httpx.HTTPError as error:
                    states = error
                time.sleep(0.1)
        raise Unavailable(f"not ready after {timeout_s:g} s: {states}")

    def wait_end(self, name: ServiceName, timeout_s: float) -> int:
        """Block until a process ends by itself; gives its exit status."""
        try:
            return self._processes[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the {name} still runs after {timeout_s:g} s") from None

    def kill(self, name: ServiceName) -> None:
        """kill -9 one process and wait for its end: what a test of faults wants."""
        self._processes[name].kill()
        self._end(name, timeout_s=None)

    def stop(self) -> None:
        """Drain the gateway first, so that edits under way still find the services; then those."""
        grace_s = self.settings.drain_s + SPARE_S
        groups: tuple[tuple[ServiceName, ...], ...] = (("gateway",), self._services)
        for names in groups:
            for name in names:
                if (process := self._processes.get(name)) is not None and process.poll() is None:
                    process.terminate()
            deadline = time.monotonic() + grace_s
            for name in names:
                self._end(name, timeout_s=max(0.0, deadline - time.monotonic()))

    def _end(self, name: ServiceName, timeout_s: float | None) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._readers.pop(name).join(timeout=1.0)
        assert process.stdout is not None
        process.stdout.close()

    # ------------------------------------------------------------------------------------- details

    def _environment(self, name: ServiceName) -> dict[str, str]:
        environment = dict(os.environ)
        # Four processes share the cores: threads that spin at a barrier take the others'.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        for field, value in self.settings.model_dump(mode="json").items():
            if value not in (None, ""):
                environment[f"EDSC_{field.upper()}"] = str(value)
        # One metrics port cannot serve four processes; the gateway's are at /metrics anyway.
        environment.pop("EDSC_METRICS_PORT", None)
        if name == "gateway":
            for service in self._services:
                environment[f"EDSC_{service.upper()}_TARGET"] = self.target(service)
        return environment

    def _read(self, name: ServiceName, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip("\n")
            if line.startswith(f"{name} listening on "):
                with self._listening:
                    self._ports[name] = int(line.rpartition(":")[2])
                    self._listening.notify_all()
            self._last_words[name].append(line)
            if self._log is not None:
                self._log(name, line)

    def _wait_baselines(self, deadline: float) -> None:
        """The gateway is ready without them, so they are asked directly."""
        settings = self.settings.model_copy(update={"baselines_target": self.target("baselines")})
        while True:
            self.check()
            try:
                wait_until_serving(settings, "baselines", timeout_s=1.0)
                return
            except Unavailable:
                if time.monotonic() > deadline:
                    raise

    def _wait_listening(self, name: ServiceName) -> None:
        deadline = time.monotonic() + START_S
        with self._listening:
            while name not in self._ports:
                self.check()
                if time.monotonic() > deadline:
                    raise Unavailable(f"the {name} opened no port within {START_S:g} s")
                self._listening.wait(0.2)


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
    """Keep serving until a signal comes (Interrupted) or a process dies (Unavailable)."""
    while True:
        stack.check()
        time.sleep(0.25)


def print_log(service: ServiceName, line: str) -> None:
    """One line of a process on stderr, with its name."""
    print(f"{service:>11} | {line}", file=sys.stderr, flush=True)
