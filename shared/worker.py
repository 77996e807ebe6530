"""One thread that does a process's work, bounded queues before it, and the calls that wait there.

::

    handler threads              Worker, one thread
    calls --submit--> [ lane: fast  ] --.    requests in progress       one pass of a network
          --submit--> [ lane: paper ] --+--> A asks LOOK x 3  --.
                          |             '--> B asks LOOK x 1  --+-----> LOOK on 4 items
                          |                  C asks ENCODE x 1
       hung up or too late: dropped before and between the steps

Batching is continuous: a request joins the others between two passes and leaves when it is done,
however many steps theirs take. Lanes share the thread's time evenly, so that neither a stream of
quick requests nor a few long ones can keep the other kind waiting.

Two inferences at once on the same cores finish no sooner than one after the other, and torch
keeps a team of OpenMP threads for every thread that calls it: so there is one.
"""

import contextvars
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from shared.batching import Ask, Operation, Steps
from shared.errors import Busy, Cancelled, DeadlineExceeded, EdscError
from shared.telemetry import Metrics, Stopwatch

REQUEST_ID_KEY: Final = "x-request-id"
TRACEPARENT_KEY: Final = "traceparent"

T = TypeVar("T")
_PATIENCE: Final = 4  # passes
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


@dataclass(eq=False)
class _Lane:
    """Requests of one kind: those that wait, how many are in progress, and the time they had."""

    name: str
    waiting: "deque[_Job]" = field(default_factory=deque)
    active: int = 0
    spent_s: float = 0.0


@dataclass(eq=False)
class _Job:
    """A request from its submission to its answer."""

    lane: _Lane
    call: Call | None
    begin: Callable[[], Steps[Any]]
    future: Future[Any]
    context: contextvars.Context
    queued_at: float
    steps: Steps[Any] | None = None
    wanted: Ask | None = None  # what it waits for
    aside: Future[list[Any]] | None = None  # its step on the side thread, under way or done
    admitted: bool = False
    passed_over: int = 0  # passes of its lane that went by since it asked

    def gone(self) -> bool:
        return self.call is not None and self.call.cancelled()


class Worker:
    """One thread that does the work of a process, in steps that requests share, bounded waiting.

    waiting: how many requests may wait in a lane beside those in progress (count); Busy beyond.
    max_batch: requests in progress in a lane (count). max_delay_s: how long the first request after
    a pause waits for company. lanes: kinds of requests; each gets an even share of the time.
    """

    def __init__(
        self,
        waiting: int,
        metrics: Metrics,
        *,
        max_batch: int = 1,
        max_delay_s: float = 0.0,
        lanes: Sequence[str] = ("",),
    ) -> None:
        self._waiting = waiting
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._lanes = {name: _Lane(name) for name in lanes}
        self._default = lanes[0]
        self._active: list[_Job] = []  # in order of admission; the worker thread's own
        self._changed = threading.Condition()
        self._stopping = False
        self._side = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    # ----------------------------------------------------------------------- any thread

    def submit(
        self, call: Call | None, work: Callable[[], T], lane: str | None = None
    ) -> Future[T]:
        """Queue `work`; it is forgotten if `call` ends before its turn. None: work of our own."""

        def begin() -> Steps[T]:
            return work()
            yield  # never reached: makes this a request that asks for nothing

        return self.submit_steps(call, begin, lane)

    def submit_steps(
        self, call: Call | None, begin: Callable[[], Steps[T]], lane: str | None = None
    ) -> Future[T]:
        """Queue a request in steps. It ends as soon as `call` does, also between its steps.

        lane: which; None: the first. Raises Busy when that lane is full.
        """
        mine = self._lanes[self._default if lane is None else lane]
        future: Future[T] = Future()
        job = _Job(mine, call, begin, future, contextvars.copy_context(), time.perf_counter())
        with self._changed:
            if mine.active + len(mine.waiting) >= self._waiting + self._max_batch:
                self._metrics.rejected("queue_full")
                raise Busy(
                    f"{len(mine.waiting)} requests are waiting, expected at most {self._waiting}:"
                    " try again in a moment"
                )
            mine.waiting.append(job)
            self._metrics.queue_depth.inc()
            self._changed.notify_all()
        future.add_done_callback(lambda _: self._forget(job))
        if call is not None:
            call.on_end(lambda: self._left(job))
        return future

    def run(self, call: Call, work: Callable[[], T], lane: str | None = None) -> T:
        """Queue `work` and wait for its result, no longer than the call may take."""
        return self.wait(call, self.submit(call, work, lane))

    def run_steps(self, call: Call, begin: Callable[[], Steps[T]], lane: str | None = None) -> T:
        """Queue a request in steps and wait for its answer, no longer than the call may take."""
        return self.wait(call, self.submit_steps(call, begin, lane))

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
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._side.shutdown(wait=False, cancel_futures=True)
        return not self._thread.is_alive()

    def _left(self, job: _Job) -> None:
        # Before its turn that is all; in progress, the worker finds out between two steps.
        if not job.future.cancel():
            with self._changed:
                self._changed.notify_all()

    def _forget(self, job: _Job) -> None:
        with self._changed:
            if not job.admitted:  # cancelled before its turn: its photo should not lie in memory
                job.admitted = True
                job.lane.waiting.remove(job)
                self._metrics.queue_depth.dec()

    # ----------------------------------------------------------------------- the worker thread

    def _work(self) -> None:
        while self._wait():
            for job in self._admit():
                self._begin(job)
            self._drop_those_who_left()
            self._take_back()
            self._step()
            job = None  # type: ignore[assignment]  # its photo: the next wait may be long

    def _wait(self) -> bool:
        """Wait until there is something to do; False once stopped and done."""
        with self._changed:
            while not self._something_to_do():
                if self._stopping and not self._active:
                    return False
                self._changed.wait()
            if not self._active and self._max_delay_s > 0.0:
                self._wait_for_company()
        return True

    def _admit(self) -> list[_Job]:
        """The requests whose turn it is."""
        with self._changed:
            admitted = []
            for lane in self._lanes.values():
                while lane.waiting and lane.active < self._max_batch:
                    job = lane.waiting.popleft()
                    job.admitted = True
                    self._metrics.queue_depth.dec()
                    if not job.future.set_running_or_notify_cancel():
                        continue
                    if not lane.active:  # time that a lane did not ask for is no credit
                        others = [one.spent_s for one in self._lanes.values() if one.active]
                        lane.spent_s = max(lane.spent_s, min(others, default=lane.spent_s))
                    lane.active += 1
                    self._active.append(job)
                    admitted.append(job)
            self._metrics.active.set(len(self._active))
            return admitted

    def _something_to_do(self) -> bool:
        return any(
            lane.waiting and lane.active < self._max_batch for lane in self._lanes.values()
        ) or any(job.gone() or job.aside is None or job.aside.done() for job in self._active)

    def _wait_for_company(self) -> None:
        """The pause before a batch that would start with too few."""
        while not self._stopping:
            waiting = [job for lane in self._lanes.values() for job in lane.waiting]
            if not waiting or any(
                len(lane.waiting) >= self._max_batch for lane in self._lanes.values()
            ):
                return
            left_s = waiting[0].queued_at + self._max_delay_s - time.perf_counter()
            if left_s <= 0.0:
                return
            self._changed.wait(left_s)

    def _begin(self, job: _Job) -> None:
        if job.call is not None:
            job.call.watch.add("queue", (time.perf_counter() - job.queued_at) * 1000.0)
            if job.gone():
                return  # found and dropped with the others who left
        try:
            job.steps = job.context.run(job.begin)
        except BaseException as error:
            self._end(job, error=error)
        else:
            self._resume(job, None)

    def _resume(self, job: _Job, results: list[Any] | None) -> None:
        """Hand a request what it asked for; it asks the next thing or is done."""
        assert job.steps is not None
        job.wanted = job.aside = None
        try:
            wanted = job.context.run(job.steps.send, results)  # type: ignore[arg-type]
        except StopIteration as end:
            self._end(job, result=end.value)
        except BaseException as error:
            self._end(job, error=error)
        else:
            job.wanted = wanted
            if wanted.operation.aside:
                job.aside = self._side.submit(wanted.operation, wanted.items)
                job.aside.add_done_callback(lambda _: self._wake())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _end(self, job: _Job, result: Any = None, error: BaseException | None = None) -> None:
        if job.steps is not None:
            job.steps.close()
        if job.aside is not None:
            job.aside.cancel()
        # Before the answer is out: whoever got it may ask again at once and must find room.
        with self._changed:
            self._active.remove(job)
            job.lane.active -= 1
            self._metrics.active.set(len(self._active))
        if error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _drop_those_who_left(self) -> None:
        for job in [job for job in self._active if job.gone()]:
            assert job.call is not None
            self._metrics.dropped()
            self._end(job, error=job.call.gone())

    def _take_back(self) -> None:
        """Requests whose step on the side thread is done go on."""
        for job in [job for job in self._active if job.aside is not None and job.aside.done()]:
            assert job.aside is not None
            if (error := job.aside.exception()) is not None:
                self._end(job, error=error)
            else:
                self._resume(job, job.aside.result())

    @staticmethod
    def _operation_of(jobs: list[_Job]) -> Operation[Any, Any]:
        """A full pass before one that is not; a dear one that is not full comes last, when the
        others have brought it all that they can. But nobody is passed over for long."""
        waiting: dict[Operation[Any, Any], int] = {}
        for job in jobs:
            assert job.wanted is not None
            operation = job.wanted.operation
            if job.passed_over >= _PATIENCE:
                return operation
            waiting[operation] = waiting.get(operation, 0) + len(job.wanted.items)
        full = [operation for operation, items in waiting.items() if items >= operation.most]
        return full[0] if full else min(waiting, key=lambda operation: operation.dear)

    def _step(self) -> None:
        """One pass: an operation, on the items of as many requests as ask for it and fit."""
        ready = [job for job in self._active if job.wanted is not None and job.aside is None]
        if not ready:
            return
        lane = min((job.lane for job in ready), key=lambda lane: lane.spent_s)
        operation = self._operation_of([job for job in ready if job.lane is lane])
        jobs: list[_Job] = []
        items = 0
        # The lane whose turn it is first, and in it the oldest: they end sooner, none the later.
        for job in sorted(ready, key=lambda job: job.lane is not lane):
            assert job.wanted is not None
            if job.wanted.operation is operation and (
                not jobs or items + len(job.wanted.items) <= operation.most
            ):
                jobs.append(job)
                items += len(job.wanted.items)
                job.passed_over = 0
            elif job.lane is lane:
                job.passed_over += 1
        start = time.perf_counter()
        answers = _results(operation, [job.wanted.items for job in jobs if job.wanted])
        elapsed_s = time.perf_counter() - start
        self._metrics.batch(operation.name, items)
        for job, answer in zip(jobs, answers, strict=True):
            assert job.wanted is not None
            job.lane.spent_s += elapsed_s * len(job.wanted.items) / max(1, items)
            if isinstance(answer, BaseException):
                self._end(job, error=answer)
            else:
                self._resume(job, answer)


def _results(
    operation: Operation[Any, Any], asked: list[Sequence[Any]]
) -> list[list[Any] | BaseException]:
    """What each request asked for, from one call; the error of a request that spoils a call is its
    own, not its neighbours'.
    """
    try:
        together = operation([item for items in asked for item in items])
    except Exception as error:
        if len(asked) == 1:
            return [error]
        return [_results(operation, [items])[0] for items in asked]
    results: list[list[Any] | BaseException] = []
    for items in asked:
        results.append(together[: len(items)])
        together = together[len(items) :]
    return results
