"""`edsc up --engine ray`: the services on a cluster, the gateway on this machine, in one command.

::

    browser --> python -m gateway --gRPC--> Front --> replicas on the cluster   (edsc/service.py)
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import httpx

from edsc.cluster import MOST_WORKERS, ROOT
from edsc.service import SERVICES, ray_services
from edsc.up import START_S, parse_counts, print_log
from shared.errors import Unavailable
from shared.settings import ServiceName, Settings


class Gateway:
    """`python -m gateway` in front of services that are elsewhere. Use as a context manager."""

    def __init__(
        self,
        settings: Settings,
        *,
        free_port: bool = False,
        log: Callable[[ServiceName, str], None] = print_log,
    ) -> None:
        self._settings, self._log = settings, log
        self._port = 0 if free_port else settings.gateway_port
        self.url = ""

    def __enter__(self) -> "Gateway":
        environment = {
            key: value for key, value in os.environ.items() if key != "EDSC_METRICS_PORT"
        }
        for name, value in self._settings.model_dump(mode="json").items():
            if value not in (None, ""):
                environment[f"EDSC_{name.upper()}"] = str(value)
            else:
                environment.pop(f"EDSC_{name.upper()}", None)
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "gateway", "--port", str(self._port)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(self._settings.drain_s + 5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def check(self) -> None:
        """Raise Unavailable when the process has ended."""
        if (status := self._process.poll()) is not None:
            raise Unavailable(f"the gateway ended with status {status}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("gateway listening on "):
                host, _, port = line.split()[-1].rpartition(":")
                host = "127.0.0.1" if host in ("0.0.0.0", "::", "[::]") else host
                scheme = "https" if self._settings.tls_certificate else "http"
                self.url = f"{scheme}://{host}:{port}"
                self._listening.set()
            self._log("gateway", line.rstrip("\n"))

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._listening.wait(0.1):
            self.check()
        answer: object = None
        with httpx.Client(base_url=self.url, timeout=5.0, verify=False) as client:
            while time.monotonic() < deadline:
                self.check()
                try:
                    reply = client.get("/readyz")
                    if reply.status_code == 200:
                        return
                    answer = reply.text
                except httpx.HTTPError as error:
                    answer = error
                time.sleep(0.1)
        raise Unavailable(f"the gateway is not ready after {START_S:g} s: {answer}")


def up_on_ray(settings: Settings, replicas: str = "", *, free_ports: bool = False) -> NoReturn:
    """Serve from a cluster until a signal comes (Interrupted) or the gateway dies (Unavailable)."""
    counts = parse_counts(replicas, SERVICES, MOST_WORKERS)
    with ray_services(settings, counts) as there, Gateway(there, free_port=free_ports) as gateway:
        print(f"the page is at {gateway.url}  (Ctrl-C ends)", flush=True)
        while True:
            gateway.check()
            time.sleep(0.25)
