"""Many independent pieces of work: here one after another, or spread over a Ray cluster.

::

    with fan_out(Engine.RAY) as spread:
        for result in spread(function, items):     # in order, as the built-in map
            ...

Ray places the work, starts a task again elsewhere when its machine dies, and keeps worker processes
warm; nothing here schedules. `function` is pickled once: a function of a module, or a partial of
one, whose caches (`functools.lru_cache`) then live as long as the worker process, so weights are
loaded once in each. All machines of a cluster need this package, of the same version.

Ray is an extra: pip install '.[scale]'. RAY_ADDRESS names a running cluster; without it one is
started on this machine and ended afterwards.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol, TypeVar

from shared.errors import InvalidRequest, Unavailable
from shared.settings import AT_BARRIERS

ROOT: Final = Path(__file__).resolve().parent.parent
MOST_WORKERS: Final = 4096
MOST_RETRIES: Final = 3  # of a task whose worker or machine died

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(StrEnum):
    """Where work is done: in this process (or on this machine), or on a Ray cluster."""

    LOCAL = "local"
    RAY = "ray"


class Map(Protocol):
    """`map`: results in the order of the items; an error of `function` is raised in its place."""

    def __call__(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """Lazy: items are taken as there is room for them."""
        ...


@contextmanager
def fan_out(
    engine: Engine = Engine.LOCAL, *, workers: int | None = None, threads: int = 1
) -> Iterator[Map]:
    """A `Map` by `engine`, inside the block.

    workers: tasks at a time; None: as many as the cluster has room for. threads: CPUs (and OpenMP
    threads) of a task. Both are for Ray. Raises Unavailable where Ray is not installed or does not
    answer.
    """
    if engine is Engine.LOCAL:
        yield _here
        return
    if (workers is not None and not 1 <= workers <= MOST_WORKERS) or threads < 1:
        raise InvalidRequest(
            f"workers is {workers}, threads {threads}; expected 1..{MOST_WORKERS} and at least 1"
        )
    with connected((workers or os.cpu_count() or 1) * threads) as ray:
        room = int(ray.cluster_resources().get("CPU", 1.0)) // threads
        if room < 1:
            raise Unavailable(f"no machine of the cluster has {threads} CPUs for a task")
        yield _RayMap(ray, min(workers or room, room), threads)


def _here(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    return map(function, items)


class _RayMap:
    """Ray tasks, `workers` at work and as many waiting: items of gigabytes are no memory at all."""

    def __init__(self, ray: ModuleType, workers: int, threads: int) -> None:
        self._ray = ray
        self._window = 2 * workers
        self._task = ray.remote(num_cpus=threads, max_retries=MOST_RETRIES)(_call)

    def __call__(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        shipped = self._ray.put(function)
        under_way: deque[Any] = deque()
        try:
            for item in items:
                under_way.append(self._task.remote(shipped, item))
                if len(under_way) >= self._window:
                    yield self._result(under_way.popleft())
            while under_way:
                yield self._result(under_way.popleft())
        finally:  # an error, or a caller that has seen enough: the rest is not wanted
            for task in under_way:
                self._ray.cancel(task, force=True)

    def _result(self, task: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            # What the function raised, as it would have been raised here.
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except errors.RayError as error:
            raise Unavailable(
                f"the cluster lost a task {MOST_RETRIES + 1} times: {error}"
            ) from None


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


@contextmanager
def connected(cpus: int) -> Iterator[ModuleType]:
    """The module `ray`, connected to RAY_ADDRESS or to a Ray of `cpus` CPUs started here.

    A connection that exists already is used and left open.
    """
    try:
        import ray
    except ImportError:
        raise Unavailable(
            "Ray is not installed; expected the extra: pip install '.[scale]'"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {}
    if not address:
        # Ray's workers give way to everything else (nice 15); here they are what it is all for.
        niceness = {"worker_niceness": 0}
        local = {"num_cpus": cpus, "include_dashboard": False, "_system_config": niceness}
    # A cluster started here runs this very code, also where another copy is installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**AT_BARRIERS, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            configure_logging=False,
            **local,
        )
    except Exception as error:
        raise Unavailable(f"Ray at {address or 'this machine'} does not start: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
