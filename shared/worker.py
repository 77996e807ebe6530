"""One thread that does a process's work, a bounded queue before it, and the calls that wait in it.

::

    handler threads            Worker
    call, call, call --submit--> [ queue ] --> one thread --> results
                                    |
             hung up or too late: dropped before it costs anything

Two inferences at once on the same cores finish no sooner than one after the other, and torch
keeps a team of OpenMP threads for every thread that calls it: so there is one.
"""

import contextvars
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any, Final, Protocol, TypeVar

from shared.errors import Busy, Cancelled, DeadlineExceeded, EdscError
from shared.telemetry import Metrics, Stopwatch

REQUEST_ID_KEY: Final = "x-request-id"
TRACEPARENT_KEY: Final = "traceparent"

T = TypeVar("T")
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

    method: name of the rpc. request_id: the caller's x-request-id, or a new one.
    traceparent: the caller's W3C trace context, or "". watch: timings of the call's stages.
    """

    def __init__(self, context: CallContext, method: str, limit_s: float) -> None:
        metadata = {key: value for key, value in context.invocation_metadata()}
        asked_id = str(metadata.get(REQUEST_ID_KEY, ""))
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
                f"{self.method} had {self.limit_s:.3g} s and was not done in time"
            )
        return Cancelled(f"the caller of {self.method} went away")

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if nobody waits any more."""
        if self.cancelled():
            raise self.gone()


class Worker:
    """One thread that does the work of a process, first come first served, with bounded waiting.

    waiting: how many may wait beside the one being served (count). Raises Busy beyond.
    """

    def __init__(self, waiting: int, metrics: Metrics) -> None:
        self._waiting = waiting
        self._metrics = metrics
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._running = 0
        self._queued = 0
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def submit(self, call: Call | None, work: Callable[[], T]) -> Future[T]:
        """Queue `work`; it is forgotten if `call` ends before its turn. None: work of our own."""
        future: Future[T] = Future()
        with self._lock:
            if self._running + self._queued > self._waiting:
                self._metrics.rejected("queue_full")
                raise Busy(
                    f"{self._queued} requests are waiting, expected at most {self._waiting}:"
                    " try again in a moment"
                )
            self._queued += 1
        self._metrics.queue_depth.inc()
        future.add_done_callback(self._forget)
        if call is not None:
            call.on_end(future.cancel)
        context = contextvars.copy_context()
        queued_at = time.perf_counter()

        def job() -> T:
            if call is not None:
                call.watch.add("queue", (time.perf_counter() - queued_at) * 1000.0)
                call.check()
            return context.run(work)

        self._jobs.put((future, job))
        return future

    def _forget(self, future: Future[Any]) -> None:
        # Cancelled means: before its turn. Whatever ran has left the queue in _work.
        if future.cancelled():
            self._metrics.queue_depth.dec()
            with self._lock:
                self._queued -= 1

    def run(self, call: Call, work: Callable[[], T]) -> T:
        """Queue `work` and wait for its result, no longer than the call may take."""
        return self.wait(call, self.submit(call, work))

    @staticmethod
    def wait(call: Call, future: Future[T]) -> T:
        """Result of a submitted future; Cancelled or DeadlineExceeded once nobody waits for it."""
        try:
            return future.result(timeout=call.remaining_s())
        except (CancelledError, TimeoutError):
            future.cancel()
            raise call.gone() from None

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the work it has; whether it ended in time."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            self._metrics.queue_depth.dec()
            with self._lock:
                self._queued -= 1
                self._running = 1
            try:
                result = work()
            except BaseException as error:
                self._free()
                future.set_exception(error)
            else:
                self._free()
                future.set_result(result)
            # The next get() may wait long; nothing of this request should stay in memory meanwhile.
            del job, future, work

    def _free(self) -> None:
        # Before the answer is out: whoever got it may ask again at once and must find room.
        with self._lock:
            self._running = 0
