"""Work that is done a step at a time, so that several requests can share a pass through a network.

::

    request A   --ask(LOOK, 3 latents)--.
    request B   --ask(LOOK, 1 latent)---+--> one call of LOOK on 4 latents --> 3 to A, 1 to B
    request C   --ask(ENCODE, 1 face)------> one call of ENCODE on 1 face  --> 1 to C

A request is a generator. It yields what it needs of a network (`Ask`) and is sent the results; all
between is its own. So the same code runs alone (`alone`) and in company (`shared/worker.py`), and a
request that needs three looks shares them with one that needs eight.

What an operation gives for an item must not depend, beyond rounding, on the items beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Operation(Generic[Item, Result]):
    """Something that costs less for several items at once than for one after another.

    name: for metrics. run: items -> results, as many and in the same order. most: items in one
    call. dear: most of the work, so a pass that is not full may wait for company. aside: items are
    taken one by one, on a thread of their own beside the batches (pictures are decoded so), unless
    the worker has one thread for all.
    """

    name: str
    run: Callable[[Sequence[Item]], Sequence[Result]]
    most: int = 64
    dear: bool = False
    aside: bool = False

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"{self.name}: most is {self.most}; expected at least 1")

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Results of any number of items, `most` at a time."""
        results: list[Result] = []
        size = 1 if self.aside else self.most
        for first in range(0, len(items), size):
            results += self.run(items[first : first + size])
        if len(results) != len(items):
            raise ValueError(f"{self.name} gave {len(results)} results for {len(items)} items")
        return results


@dataclass(frozen=True, eq=False)
class Ask:
    """What a request waits for: `operation` on its own `items`."""

    operation: Operation[Any, Any]
    items: Sequence[Any]


Steps = Generator[Ask, "list[Any]", T]
"""A request under way: yields what it asks, is sent the results, returns its answer."""


def ask(operation: Operation[Item, Result], items: Sequence[Item]) -> Steps[list[Result]]:
    """`results = yield from ask(operation, items)`, with their types."""
    return (yield Ask(operation, items))


def ask_one(operation: Operation[Item, Result], item: Item) -> Steps[Result]:
    """The same for a single item."""
    (result,) = yield Ask(operation, [item])
    return result  # type: ignore[no-any-return]  # the scheduler hands back what `run` gave


def alone(steps: Steps[T]) -> T:
    """Run a request by itself, on this thread."""
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(wanted.operation(wanted.items))
    except StopIteration as end:
        answer: T = end.value
        return answer
    finally:
        steps.close()
