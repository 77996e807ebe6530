"""A process's work in passes that requests share, bounded queues before it, and who waits there.

::

    handler threads              Worker, one thread
    calls --submit--> [ lane: fast  ] --.    requests in progress       one pass of a network
          --submit--> [ lane: paper ] --+--> A asks LOOK x 3  --.
                          |             '--> B asks LOOK x 1  --+-----> LOOK on 4 items
                          |                  C asks ENCODE x 1
       hung up or too late: dropped before and between the steps

Batching is continuous: a request joins the others between two passes and leaves when it is done,
however many steps theirs take. Lanes share the time evenly, so that neither a stream of quick
requests nor a few long ones can keep the other kind waiting.

A request that is alone has all cores for each of its passes. Cores that share a pass wait for each
other many times in it, so where there is company each takes a pass of its own (`passes_at_once`):
one looks at the pictures of some requests while another encodes the faces of others.
"""

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from shared.batching import Ask, Operation, Steps
from shared.call import Call
from shared.errors import Busy
from shared.telemetry import Metrics

T = TypeVar("T")
_PATIENCE: Final = 4  # passes


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
    under_way: bool = False  # in a pass on a thread of the executor
    admitted: bool = False
    passed_over: float = 0.0  # passes of its lane that went by since it asked

    def gone(self) -> bool:
        return self.call is not None and self.call.cancelled()


@dataclass(eq=False)
class _Pass:
    """An operation on the items of several requests, under way on a thread of the executor."""

    operation: Operation[Any, Any]
    jobs: list[_Job]
    future: Future[tuple[list[list[Any] | BaseException], float]]


class Worker:
    """A thread that does the work of a process, in steps that requests share, bounded waiting.

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
        self._passes: list[_Pass] = []  # under way; the worker thread's own
        self._executor: Executor | None = None
        self._at_once = 1
        self._aside = True
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

    def passes_at_once(self, executor: Executor, count: int) -> None:
        """From now on up to `count` passes are under way at a time on the executor's threads, each
        of its share of `Operation.most`; a request without company goes on as before.

        With 1, the worker's own thread does all that it is given, what else goes aside too: whoever
        gives a process one core means one.
        """
        with self._changed:
            self._executor, self._at_once = (executor, count) if count > 1 else (None, 1)
            self._aside = count > 1

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
            while self._step():
                pass
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
        if any(lane.waiting and lane.active < self._max_batch for lane in self._lanes.values()):
            return True
        if any(one.future.done() for one in self._passes):
            return True
        room = len(self._passes) < self._at_once
        return any(
            job.gone() or (job.aside.done() if job.aside else room and not job.under_way)
            for job in self._active
        )

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
            if wanted.operation.aside and self._aside:
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
        """Requests whose step on another thread is done go on."""
        for one in [one for one in self._passes if one.future.done()]:
            self._passes.remove(one)
            self._hand_out(one.operation, one.jobs, *one.future.result())
        for job in [job for job in self._active if job.aside is not None and job.aside.done()]:
            assert job.aside is not None
            if (error := job.aside.exception()) is not None:
                self._end(job, error=error)
            else:
                self._resume(job, job.aside.result())

    @staticmethod
    def _operation_of(jobs: list[_Job], share: int) -> Operation[Any, Any]:
        """A full pass before one that is not; a dear one that is not full comes last, when the
        others have brought it all that they can, and first what is done one by one, which brings
        company to all. But nobody is passed over for long."""
        waiting: dict[Operation[Any, Any], int] = {}
        for job in jobs:
            assert job.wanted is not None
            operation = job.wanted.operation
            if job.passed_over >= _PATIENCE:
                return operation
            waiting[operation] = waiting.get(operation, 0) + len(job.wanted.items)
        full = [one for one, items in waiting.items() if items * share >= one.most]
        return full[0] if full else min(waiting, key=lambda one: (one.dear, not one.aside))

    def _step(self) -> bool:
        """One pass: an operation, on the items of as many requests as ask for it and fit. Whether
        it is under way elsewhere, so that another one may begin.
        """
        ready = [
            job
            for job in self._active
            if job.wanted is not None and job.aside is None and not job.under_way
        ]
        executor = self._executor if len(self._active) > 1 else None
        if not ready or (executor is not None and len(self._passes) >= self._at_once):
            return False
        share = 1 if executor is None else self._at_once
        lane = min((job.lane for job in ready), key=lambda lane: lane.spent_s)
        operation = self._operation_of([job for job in ready if job.lane is lane], share)
        jobs: list[_Job] = []
        items = 0
        # The lane whose turn it is first, and in it the oldest: they end sooner, none the later.
        for job in sorted(ready, key=lambda job: job.lane is not lane):
            assert job.wanted is not None
            most = 1 if operation.aside else operation.most
            if job.wanted.operation is operation and (
                not jobs or (items + len(job.wanted.items)) * share <= most
            ):
                jobs.append(job)
                items += len(job.wanted.items)
                job.passed_over = 0.0
            elif job.lane is lane:  # what is done one by one counts all together as a pass
                job.passed_over += 1 / self._max_batch if operation.aside else 1
        asked = [job.wanted.items for job in jobs if job.wanted]
        if executor is None:
            self._hand_out(operation, jobs, *_timed(operation, asked))
            return False
        for job in jobs:
            job.under_way = True
        future = executor.submit(_timed, operation, asked)
        self._passes.append(_Pass(operation, jobs, future))
        future.add_done_callback(lambda _: self._wake())
        return True

    def _hand_out(
        self,
        operation: Operation[Any, Any],
        jobs: list[_Job],
        answers: list[list[Any] | BaseException],
        elapsed_s: float,
    ) -> None:
        """Give the requests of a pass what came of it; those that left meanwhile have ended."""
        sizes = [len(job.wanted.items) if job.wanted else 0 for job in jobs]
        if not operation.aside:
            self._metrics.batch(operation.name, sum(sizes))
        for job, size, answer in zip(jobs, sizes, answers, strict=True):
            job.under_way = False
            job.lane.spent_s += elapsed_s * size / max(1, sum(sizes))
            if job not in self._active:
                continue
            if isinstance(answer, BaseException):
                self._end(job, error=answer)
            else:
                self._resume(job, answer)


def _timed(
    operation: Operation[Any, Any], asked: list[Sequence[Any]]
) -> tuple[list[list[Any] | BaseException], float]:
    start = time.perf_counter()
    return _results(operation, asked), time.perf_counter() - start


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
