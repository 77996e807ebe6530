"""Passes side by side: who runs where, how much each takes, what becomes of those who leave."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shared.batching import Operation, Steps, ask
from shared.call import Call
from shared.errors import Cancelled
from shared.telemetry import Metrics
from shared.worker import Worker
from tests.test_shared_batching import Caller

AT_ONCE = 2


class Hall:
    """An operation whose passes wait until they are let go; keeps who was in each, and where."""

    def __init__(self, name: str, most: int = 64, aside: bool = False) -> None:
        self.passes: list[tuple[list[int], str]] = []
        self.inside = threading.Semaphore(0)
        self.free = threading.Event()
        self.operation = Operation(name, self.run, most, aside=aside)

    def run(self, items: Sequence[int]) -> list[int]:
        self.passes.append((list(items), threading.current_thread().name))
        self.inside.release()
        assert self.free.wait(10)
        if -1 in items:
            raise ZeroDivisionError("-1")
        return [-item for item in items]

    def wait_for(self, passes: int = 1) -> None:
        for _ in range(passes):
            assert self.inside.acquire(timeout=10)

    def visit(self, *items: int) -> Callable[[], Steps[list[int]]]:
        def steps() -> Steps[list[int]]:
            return (yield from ask(self.operation, items))

        return steps


def through(first: Hall, second: Hall, number: int) -> Callable[[], Steps[list[int]]]:
    """Visits one, and the other with what came of it."""

    def steps() -> Steps[list[int]]:
        found = yield from ask(first.operation, [number])
        return (yield from ask(second.operation, found))

    return steps


@pytest.fixture
def worker() -> Iterator[Worker]:
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="core") as executor:
        made = Worker(100, Metrics("test"), max_batch=16)
        made.passes_at_once(executor, AT_ONCE)
        yield made
        assert made.stop(10.0)


@pytest.fixture
def halls() -> Iterator[Callable[..., Hall]]:
    made: list[Hall] = []

    def make(*args: Any) -> Hall:
        made.append(Hall(*args))
        return made[-1]

    yield make
    for hall in made:
        hall.free.set()  # nobody is left waiting when a test fails


def test_one_alone_is_served_by_the_worker_itself(
    worker: Worker, halls: Callable[..., Hall]
) -> None:
    hall = halls("a")
    hall.free.set()
    assert worker.submit_steps(None, hall.visit(1, 2)).result(10) == [-1, -2]
    assert hall.passes == [([1, 2], "worker")]


def company(worker: Worker, halls: Callable[..., Hall]) -> tuple[Hall, Any]:
    """A hall in which one request is held up on the worker's thread: what comes next, comes at
    once when it is let go."""
    door = halls("door")
    future = worker.submit_steps(None, door.visit(0))
    door.wait_for()
    return door, future


def test_two_in_company_have_a_pass_each_at_the_same_time(
    worker: Worker, halls: Callable[..., Hall]
) -> None:
    door, first = company(worker, halls)
    a, b = halls("a"), halls("b")
    futures = [worker.submit_steps(None, hall.visit(number)) for number, hall in ((1, a), (2, b))]
    door.free.set()
    a.wait_for()
    b.wait_for()  # both are inside, neither has been let go
    assert {where for _, where in (*a.passes, *b.passes)} == {"core_0", "core_1"}
    a.free.set()
    b.free.set()
    assert [future.result(10) for future in futures] == [[-1], [-2]]
    assert first.result(10) == [0]


def test_each_takes_its_share_and_the_third_waits(
    worker: Worker, halls: Callable[..., Hall]
) -> None:
    door, _ = company(worker, halls)
    hall = halls("a", 8)  # at most eight in a pass of all cores: four in one of half of them
    futures = [worker.submit_steps(None, hall.visit(n, n, n)) for n in (1, 2, 3)]
    door.free.set()
    hall.wait_for(2)
    assert len(hall.passes) == AT_ONCE
    assert not hall.inside.acquire(timeout=0.2)
    hall.free.set()
    assert [future.result(10) for future in futures] == [[-1] * 3, [-2] * 3, [-3] * 3]
    assert [items for items, _ in hall.passes] == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_who_leaves_during_a_pass_is_gone_and_spoils_nothing(
    worker: Worker, halls: Callable[..., Hall]
) -> None:
    door, _ = company(worker, halls)
    hall, caller = halls("a"), Caller(30.0)
    left = worker.submit_steps(Call(caller, "hall", "Visit", 30.0), hall.visit(1))
    stayed = worker.submit_steps(None, hall.visit(2))
    door.free.set()
    hall.wait_for()
    caller.hang_up()
    with pytest.raises(Cancelled):
        left.result(10)
    assert not stayed.done()
    hall.free.set()
    assert stayed.result(10) == [-2]
    assert worker.submit_steps(None, hall.visit(3)).result(10) == [-3]


def test_an_error_is_its_own(worker: Worker, halls: Callable[..., Hall]) -> None:
    door, _ = company(worker, halls)
    hall = halls("a")
    hall.free.set()
    bad, good = (worker.submit_steps(None, hall.visit(number)) for number in (-1, 5))
    door.free.set()
    assert good.result(10) == [-5]
    with pytest.raises(ZeroDivisionError):
        bad.result(10)


def test_one_at_a_time_is_as_it_was(halls: Callable[..., Hall]) -> None:
    hall = halls("a")
    hall.free.set()
    with ThreadPoolExecutor(1) as executor:
        worker = Worker(100, Metrics("test"), max_batch=4)
        worker.passes_at_once(executor, 1)
        futures = [worker.submit_steps(None, hall.visit(n)) for n in range(3)]
        assert [future.result(10) for future in futures] == [[0], [-1], [-2]]
        assert {where for _, where in hall.passes} == {"worker"}
        assert worker.stop(10.0)


def test_one_thread_does_what_goes_aside_elsewhere(halls: Callable[..., Hall]) -> None:
    """A process that was given one core takes one, and a photo that cannot be read is its
    sender's affair alone."""
    door, photos, faces = halls("door"), halls("decode", 64, True), halls("look")
    photos.free.set()
    faces.free.set()

    with ThreadPoolExecutor(1) as executor:
        worker = Worker(100, Metrics("test"), max_batch=4)
        worker.passes_at_once(executor, 1)
        worker.submit_steps(None, door.visit(0))
        door.wait_for()  # the others come while the worker is busy, and wait together
        bad, *good = (
            worker.submit_steps(None, through(photos, faces, number)) for number in (-1, 2, 3)
        )
        door.free.set()
        assert [future.result(10) for future in good] == [[2], [3]]
        with pytest.raises(ZeroDivisionError):
            bad.result(10)
        assert worker.stop(10.0)
    assert sorted(items for items, _ in photos.passes) == [[-1], [2], [3]]  # one by one, once
    assert {where for _, where in photos.passes + faces.passes} == {"worker"}


def test_what_is_done_one_by_one_comes_first(halls: Callable[..., Hall]) -> None:
    """Else every photo that is read would be encoded before the next one is read: alone."""
    photos, faces = halls("decode", 64, True), halls("encode")
    faces.free.set()
    numbers = range(2, 9)

    with ThreadPoolExecutor(1) as executor:
        worker = Worker(100, Metrics("test"), max_batch=8)
        worker.passes_at_once(executor, 1)
        futures = [worker.submit_steps(None, through(photos, faces, number)) for number in numbers]
        photos.wait_for()  # the first is being read while the others come
        photos.free.set()
        assert [future.result(10) for future in futures] == [[n] for n in numbers]
        assert worker.stop(10.0)
    assert [items for items, _ in faces.passes] == [[-n for n in numbers]]


def test_a_flood_of_what_is_done_one_by_one_holds_nobody_up(halls: Callable[..., Hall]) -> None:
    """Refused sentences come and go by the thousand; an edit beside them still gets its turn."""
    reading, look = halls("read", 64, True), halls("look")
    reading.free.set()
    look.free.set()
    over = threading.Event()
    read = threading.Semaphore(0)

    with ThreadPoolExecutor(1) as executor:
        worker = Worker(100, Metrics("test"), max_batch=2)
        worker.passes_at_once(executor, 1)

        def one_more(_: object = None) -> None:
            if not over.is_set():
                read.release()
                worker.submit_steps(None, reading.visit(1)).add_done_callback(one_more)

        for _ in range(4):  # one is always waiting for its turn
            one_more()
        for _ in range(50):
            assert read.acquire(timeout=10)
        try:
            assert worker.submit_steps(None, look.visit(7)).result(10) == [-7]
        finally:
            over.set()
            assert worker.stop(10.0)


def test_many_requests_in_many_steps_all_end(worker: Worker) -> None:
    """Nothing is lost or waits for ever, whatever order passes end in."""
    operation: Operation[int, int] = Operation("square", lambda items: [i * i for i in items], 4)

    def steps(number: int) -> Callable[[], Steps[int]]:
        def run() -> Steps[int]:
            total = 0
            for step in range(20):
                total += sum((yield from ask(operation, [number, step])))
            return total

        return run

    futures = [worker.submit_steps(None, steps(number)) for number in range(60)]
    squares = sum(step * step for step in range(20))
    assert [f.result(30) for f in futures] == [20 * n * n + squares for n in range(60)]
