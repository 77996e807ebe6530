"""Requests in steps: alone, in company, out of turn, given up; against a worker that is real."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import pytest

from shared.batching import Operation, Steps, alone, ask, ask_one
from shared.call import Call
from shared.errors import Busy, Cancelled, DeadlineExceeded
from shared.telemetry import Metrics
from shared.worker import Worker


class Caller:
    """A transport of our own: hangs up when told to."""

    def __init__(self, limit_s: float | None = None) -> None:
        self.limit_s = limit_s
        self.callbacks: list[Callable[[], None]] = []

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return []

    def time_remaining(self) -> float | None:
        return self.limit_s

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.callbacks.append(callback)
        return True

    def hang_up(self) -> None:
        for callback in self.callbacks:
            callback()


class Squares:
    """An operation that keeps the sizes of its passes, and can be held up."""

    def __init__(self, most: int = 64, aside: bool = False) -> None:
        self.passes: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.begun = threading.Event()
        self.operation = Operation("square", self.run, most, aside=aside)

    def run(self, items: Sequence[int]) -> list[int]:
        self.passes.append(list(items))
        self.begun.set()
        assert self.free.wait(10)
        if -1 in items:
            raise ZeroDivisionError("-1")
        return [item * item for item in items]


def sum_of_squares(squares: Squares, numbers: Sequence[int]) -> Steps[int]:
    total = 0
    for number in numbers:  # one pass a number
        total += yield from ask_one(squares.operation, number)
    return total


@pytest.fixture
def workers() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(**options: Any) -> Worker:
        made.append(Worker(options.pop("waiting", 100), Metrics("test"), **options))
        return made[-1]

    yield make
    for worker in made:
        assert worker.stop(5.0)


def test_alone_a_request_gets_what_it_asks_for() -> None:
    squares = Squares(most=2)

    def steps() -> Steps[list[int]]:
        return (yield from ask(squares.operation, [1, 2, 3]))

    assert alone(steps()) == [1, 4, 9]
    assert squares.passes == [[1, 2], [3]]  # at most two in a pass
    assert alone(sum_of_squares(squares, [3, 4])) == 25


def test_alone_an_error_ends_the_request() -> None:
    with pytest.raises(ZeroDivisionError):
        alone(sum_of_squares(Squares(), [1, -1]))


def test_an_operation_must_answer_every_item() -> None:
    with pytest.raises(ValueError, match="gave 0 results for 1 items"):
        Operation[int, int]("nothing", lambda items: [])([1])
    with pytest.raises(ValueError, match="most is 0"):
        Operation[int, int]("nothing", lambda items: [], most=0)


def test_requests_share_passes_though_they_end_at_different_steps(
    workers: Callable[..., Worker],
) -> None:
    squares = Squares()
    squares.free.clear()
    worker = workers(max_batch=4)
    first = worker.submit_steps(None, lambda: sum_of_squares(squares, [1]))
    assert squares.begun.wait(5)  # the others come while a pass is under way, and join the next
    rest = [
        worker.submit_steps(None, partial(sum_of_squares, squares, [10 * n + i for i in range(n)]))
        for n in (1, 2, 3)
    ]
    squares.free.set()
    assert first.result(5) == 1
    assert [future.result(5) for future in rest] == [100, 400 + 441, 900 + 961 + 1024]
    assert squares.passes == [[1], [10, 20, 30], [21, 31], [32]]


def test_max_batch_of_one_shares_nothing(workers: Callable[..., Worker]) -> None:
    squares = Squares()
    worker = workers(max_batch=1)
    futures = [worker.submit_steps(None, lambda: sum_of_squares(squares, [1, 2])) for _ in range(3)]
    assert [future.result(5) for future in futures] == [5, 5, 5]
    assert squares.passes == [[1], [2]] * 3


def test_the_first_after_a_pause_waits_for_company_but_not_for_long(
    workers: Callable[..., Worker],
) -> None:
    squares = Squares()
    worker = workers(max_batch=2, max_delay_s=0.5)
    start = time.monotonic()
    assert worker.submit_steps(None, lambda: sum_of_squares(squares, [1])).result(5) == 1
    assert 0.4 < time.monotonic() - start < 3.0
    start = time.monotonic()
    futures = [worker.submit_steps(None, lambda: sum_of_squares(squares, [2])) for _ in range(2)]
    assert [future.result(5) for future in futures] == [4, 4]
    assert time.monotonic() - start < 0.4  # two are company enough
    assert squares.passes == [[1], [2, 2]]


def test_a_request_that_spoils_a_pass_spoils_its_own_only(workers: Callable[..., Worker]) -> None:
    squares = Squares()
    worker = workers(max_batch=3, max_delay_s=1.0)
    numbers = (2, -1, 3)
    futures = [worker.submit_steps(None, partial(sum_of_squares, squares, [n])) for n in numbers]
    assert futures[0].result(5) == 4
    assert futures[2].result(5) == 9
    with pytest.raises(ZeroDivisionError):
        futures[1].result(5)


def test_who_hangs_up_in_progress_is_dropped_before_the_next_step(
    workers: Callable[..., Worker],
) -> None:
    squares = Squares()
    squares.free.clear()
    closed = threading.Event()

    def steps() -> Steps[int]:
        try:
            return (yield from sum_of_squares(squares, range(1000)))
        finally:
            closed.set()

    worker = workers(max_batch=2)
    caller = Caller()
    future = worker.submit_steps(Call(caller, "hall", "Test", 60.0), steps)
    assert squares.begun.wait(5)
    caller.hang_up()
    squares.free.set()
    with pytest.raises(Cancelled):
        future.result(5)
    assert closed.wait(5)
    assert len(squares.passes) == 1


def test_who_is_out_of_time_is_dropped_before_its_turn_and_between_steps(
    workers: Callable[..., Worker],
) -> None:
    squares = Squares()
    squares.free.clear()
    worker = workers(max_batch=1)
    begun = worker.submit_steps(
        Call(Caller(0.05), "hall", "Test", 60.0), lambda: sum_of_squares(squares, [1, 2])
    )
    assert squares.begun.wait(5)
    waiting = worker.submit_steps(
        Call(Caller(0.05), "hall", "Test", 60.0), lambda: sum_of_squares(squares, [3])
    )
    time.sleep(0.1)
    squares.free.set()
    for future in (begun, waiting):
        with pytest.raises((DeadlineExceeded, CancelledError)):
            future.result(5)
    assert squares.passes == [[1]]


def test_a_step_aside_does_not_hold_up_the_others(workers: Callable[..., Worker]) -> None:
    slow, quick = Squares(aside=True), Squares()
    slow.free.clear()
    worker = workers(max_batch=2)
    waits = worker.submit_steps(None, lambda: sum_of_squares(slow, [5]))
    assert slow.begun.wait(5)
    assert worker.submit_steps(None, lambda: sum_of_squares(quick, [2, 3])).result(5) == 13
    slow.free.set()
    assert waits.result(5) == 25


def test_lanes_have_queues_of_their_own(workers: Callable[..., Worker]) -> None:
    squares = Squares()
    squares.free.clear()
    worker = workers(waiting=1, max_batch=1, lanes=("fast", "paper"))
    paper = [
        worker.submit_steps(None, lambda: sum_of_squares(squares, [1]), "paper") for _ in range(2)
    ]
    with pytest.raises(Busy, match="expected at most 1"):
        worker.submit_steps(None, lambda: sum_of_squares(squares, [1]), "paper")
    fast = worker.submit_steps(None, lambda: sum_of_squares(squares, [2]), "fast")
    squares.free.set()
    assert [future.result(5) for future in (*paper, fast)] == [1, 1, 4]


def test_neither_lane_starves(workers: Callable[..., Worker]) -> None:
    """A few long requests of dear steps, a stream of quick ones of cheap steps: half the time to
    each while both have work."""
    spent: dict[str, float] = {"fast": 0.0, "paper": 0.0}

    def taking(name: str, seconds: float) -> Operation[int, int]:
        def run(items: Sequence[int]) -> list[int]:
            start = time.perf_counter()
            time.sleep(seconds)
            spent[name] += time.perf_counter() - start  # on a busy machine more than `seconds`
            return list(items)

        return Operation(name, run)

    dear, cheap = taking("paper", 0.02), taking("fast", 0.004)

    def asks(operation: Operation[int, int], times: int) -> Steps[None]:
        for _ in range(times):
            yield from ask_one(operation, 0)

    worker = workers(max_batch=2, lanes=("fast", "paper"), waiting=1000)
    paper = [worker.submit_steps(None, lambda: asks(dear, 60), "paper") for _ in range(2)]
    time.sleep(0.1)
    before = dict(spent)
    fast = [worker.submit_steps(None, lambda: asks(cheap, 8), "fast") for _ in range(20)]
    for future in fast:
        future.result(20)
    assert not any(future.done() for future in paper), "the quick ones went first, at least"
    used = {name: spent[name] - before[name] for name in spent}
    assert 0.5 < used["fast"] / used["paper"] < 2.0
    for future in paper:
        future.result(20)


def test_metrics_tell_what_was_shared(workers: Callable[..., Worker]) -> None:
    squares = Squares()
    metrics = Metrics("test")
    worker = Worker(10, metrics, max_batch=2, max_delay_s=1.0)
    futures = [worker.submit_steps(None, lambda: sum_of_squares(squares, [2])) for _ in range(2)]
    for future in futures:
        future.result(5)
    assert worker.stop(5.0)
    text = metrics.text().decode()
    assert 'edsc_batch_size_sum{operation="square",service="test"} 2.0' in text
    assert 'edsc_batch_size_count{operation="square",service="test"} 1.0' in text
    assert 'edsc_active{service="test"} 0.0' in text
    assert 'edsc_queue_depth{service="test"} 0.0' in text
