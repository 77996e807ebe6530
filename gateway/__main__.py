"""`python -m gateway`: the HTTP edge as a process of its own. SIGTERM drains."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn
import uvloop

from gateway.app import create_app
from gateway.desk import Limits
from gateway.keys import Keyring, RateLimit
from gateway.link import Link
from gateway.store import EditStore
from shared.errors import EdscError
from shared.settings import MIB, Settings, settings_from_flags
from shared.telemetry import configure_logging
from shared.tracing import Tracing


def open_listener(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    """A listening socket. Raises OSError when the address is taken."""
    # asyncio switches Nagle's algorithm off only where the protocol is named; with it on, every
    # answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # A port whose last connections are still closing may be taken again at once.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(512)
    except OSError:
        listener.close()
        raise
    return listener


def bind(settings: Settings) -> socket.socket:
    """The listener: EDSC_LISTEN_FD, which whoever started us keeps open, or one of our own.

    Raises OSError when the address is taken or the descriptor is no listener.
    """
    if handed := os.environ.get("EDSC_LISTEN_FD", ""):
        if not handed.isdecimal():
            raise OSError(f"EDSC_LISTEN_FD is {handed!r}; expected the number of a descriptor")
        given = socket.socket(fileno=int(handed))
        return socket.socket(given.family, given.type, socket.IPPROTO_TCP, given.detach())
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    return open_listener(family, (settings.host, settings.gateway_port))


class Server(uvicorn.Server):
    """uvicorn, but a drain on SIGTERM ends the process with status 0, not with the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `serve` below, which does not raise them again at the end."""
        yield


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is under way within `drain_s` seconds.

    Raises EdscError where the settings name a store, keys or an exporter that cannot be had.
    """
    keyring = Keyring() if settings.api_keys is None else Keyring.read(settings.api_keys)
    tracing = Tracing.from_environment("gateway")
    app = create_app(
        Link(settings, tracing=tracing),
        store=EditStore.open(settings),
        max_photo_bytes=settings.max_image_mib * MIB,
        limits=Limits(
            max_in_flight=settings.max_in_flight,
            lease_s=settings.lease_s,
            max_attempts=settings.max_attempts,
            patience_s=settings.patience_s,
        ),
        keyring=keyring,
        rate_limit=RateLimit(settings.rate_per_minute, settings.rate_burst),
        body_timeout_s=settings.body_timeout_s,
    )
    certificate, key = settings.https or (None, None)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        http="h11",  # httptools, where it is installed, knows no limit on a request's head
        h11_max_incomplete_event_size=2**16,  # bytes of one
    )
    server = Server(config)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, server.handle_exit, signum, None)
    await server.serve(sockets=[listener])
    tracing.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway; gives the exit status, 0 after a drain."""
    settings = settings_from_flags("gateway", argv)
    configure_logging("gateway", settings.log_level)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    try:
        listener = bind(settings)
    except OSError as error:
        print(
            f"the gateway cannot bind {settings.host}:{settings.gateway_port}: {error}",
            file=sys.stderr,
        )
        return 1
    host, port = listener.getsockname()[:2]
    # For whoever started us with port 0, and for a person at a terminal.
    print(f"gateway listening on {host}:{port}", flush=True)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, listener))
    except EdscError as error:
        print(f"the gateway cannot start: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
