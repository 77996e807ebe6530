"""One request under way, as a service sees it: its id, its deadline, whether anybody waits."""

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from shared.errors import Cancelled, DeadlineExceeded, EdscError
from shared.telemetry import Stopwatch

REQUEST_ID_KEY: Final = "x-request-id"
TRACEPARENT_KEY: Final = "traceparent"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def new_request_id() -> str:
    """A fresh request id: 32 hexadecimal digits."""
    return uuid.uuid4().hex


class CallContext(Protocol):
    """What a Call wants to know from the transport (a grpc.ServicerContext has it)."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """Pairs of key and value that came with the call."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Run `callback` when the call ends; False if it has ended."""


class Call:
    """One request under way: who asked, how long it may take, whether anybody still waits.

    service, method: whose rpc it is, and its name. request_id: the caller's x-request-id, or a
    new one. traceparent: the caller's W3C trace context, or "". watch: timings of its stages.
    """

    def __init__(self, context: CallContext, service: str, method: str, limit_s: float) -> None:
        metadata = {key: value for key, value in context.invocation_metadata()}
        asked_id = str(metadata.get(REQUEST_ID_KEY, ""))
        self.service = service
        self.method = method
        self.request_id = asked_id if _REQUEST_ID.fullmatch(asked_id) else new_request_id()
        self.traceparent = str(metadata.get(TRACEPARENT_KEY, ""))
        self.watch = Stopwatch()
        # None: the caller set no deadline; every call gets one.
        remaining_s = context.time_remaining()
        self.limit_s = limit_s if remaining_s is None else min(limit_s, remaining_s)
        self._deadline = time.monotonic() + self.limit_s
        self._lock = threading.Lock()
        self._ended = False
        self._callbacks: list[Callable[[], object]] = []
        if not context.add_callback(self._end):
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_end(self, callback: Callable[[], object]) -> None:
        """Run `callback` (quick, any thread) when the call ends, at once if it has."""
        with self._lock:
            if not self._ended:
                self._callbacks.append(callback)
                return
        callback()

    def remaining_s(self) -> float:
        """Seconds until the deadline, never below 0."""
        return max(0.0, self._deadline - time.monotonic())

    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._deadline

    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more: hung up, or out of time."""
        return self._ended or self.expired()

    def gone(self) -> EdscError:
        """The error that says why the work was dropped."""
        # The transport ends a call at its deadline, a moment before or after our own clock does.
        if self.remaining_s() < 0.01:
            return DeadlineExceeded(
                f"the {self.service} was not done in time: {self.method} had {self.limit_s:.3g} s"
            )
        return Cancelled(f"the caller of the {self.service}'s {self.method} went away")

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if nobody waits any more."""
        if self.cancelled():
            raise self.gone()
