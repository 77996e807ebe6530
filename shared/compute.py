"""The device, threads, precision and memory of a process that runs networks."""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Final, TypeVar

import torch

from shared.batching import Operation
from shared.errors import Unavailable
from shared.settings import Precision, Settings
from shared.worker import Worker

Item = TypeVar("Item")
Result = TypeVar("Result")


def prepare(device: str, threads: int) -> torch.device:
    """The torch device called `device`; inference then uses `threads` threads (0: torch's choice).

    device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
    Raises Unavailable for a device that does not exist here.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise Unavailable(f"device is {device!r}; expected one of this machine: {error}") from None
    return found


def precision_of(chosen: Precision, device: torch.device) -> torch.dtype:
    """The format in which networks multiply; "auto": bfloat16 where the device does so natively.

    A picture then differs from the one in float32 by 65 dB, a quarter of what rounding to 8 bits
    does to it (the generator's draft and all sums stay float32), and is drawn in two thirds of the
    time. Where bfloat16 is only imitated it is slower: "auto" is float32 there.
    """
    if chosen == "float32":
        return torch.float32
    if chosen == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def multiplying_in(
    precision: torch.dtype, device: torch.device
) -> AbstractContextManager[object, bool | None]:
    """Within it, on this thread, convolutions and matrix products are of this precision."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, precision)


def most_in_a_pass(device: torch.device) -> int:
    """As many pictures of 128 px in one pass as pay: eight to each thread of a CPU (`in_shares`),
    whose caches hold no more; a GPU starves on fewer than 64."""
    return 8 * torch.get_num_threads() if device.type == "cpu" else 64


def in_precision(
    operation: Operation[Item, Result], precision: torch.dtype, device: torch.device
) -> Operation[Item, Result]:
    """The same, `multiplying_in` this precision."""

    def run(items: Sequence[Item]) -> Sequence[Result]:
        with multiplying_in(precision, device):
            return operation.run(items)

    return replace(operation, run=run)


SMALLEST_SHARE: Final = 2  # items; alone, a picture is drawn sooner by all threads together


@cache
def lone_threads(threads: int) -> ThreadPoolExecutor:
    """A thread per core, each of which computes by itself."""

    def alone() -> None:
        # A thread takes the number set last by anybody when it first asks for it: so it asks now.
        torch.get_num_threads()
        torch.set_num_threads(1)

    return ThreadPoolExecutor(threads, thread_name_prefix="share", initializer=alone)


def in_shares(
    operation: Operation[Item, Result], device: torch.device, smallest: int = SMALLEST_SHARE
) -> Operation[Item, Result]:
    """The same; on a CPU the items of a large pass are shared out among the threads.

    smallest: items of a share; with 1, a single item too is computed by one thread.

    Threads that split every layer of a small picture wait for each other at its end, dozens of
    times a pass; with whole pictures of their own they meet once. (Two cores, 8 pictures of 128 px:
    51 a second instead of 40.)
    """

    if device.type != "cpu":
        return operation

    def run(items: Sequence[Item]) -> list[Result]:
        threads = torch.get_num_threads()
        shares = min(threads, len(items) // smallest)
        if shares < 2 and (smallest > 1 or threads == 1):
            return list(operation.run(items))
        ends = [len(items) * number // shares for number in range(shares + 1)]
        parts = [items[start:end] for start, end in pairwise(ends)]
        done = list(lone_threads(threads).map(operation.run, parts))
        return [result for results in done for result in results]

    return replace(operation, run=run)


def settle(settings: Settings, worker: Worker) -> tuple[torch.device, torch.dtype]:
    """The device and the precision that a service's settings choose, its worker told of the cores.

    Where requests have company every thread of a CPU has a pass of its own. Two cores, edits: 6.5
    to 6.9 a second, where both of them on every pass do 5.7. Raises as `prepare` does.
    """
    device = prepare(settings.device, settings.threads)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        worker.passes_at_once(lone_threads(threads), threads)
    return device, precision_of(settings.precision, device)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # malloc.h
_MIB: Final = 2**20


def keep_memory() -> bool:
    """Let the C library keep what a pass through a network gives back; whether it could.

    A batch at 128 px is tensors of 25 MB each. glibc takes blocks of that size from the system and
    returns them at once, and the page faults of every operation cost a sixth of the whole pass.
    Called in `main`, before there are threads: they share one heap, which is trimmed above 256 MiB.
    Elsewhere than on glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    chosen = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, 32 * _MIB),  # the most that glibc takes
        (_M_TRIM_THRESHOLD, 256 * _MIB),
        (_M_TOP_PAD, 16 * _MIB),
    )
    return all([mallopt(name, value) for name, value in chosen])
